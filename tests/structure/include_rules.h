#pragma once

#include <map>
#include <string>
#include <vector>

namespace kvtier {

/// Source text by path from the repository's root ("memory/status.h").
using SourceTree = std::map<std::string, std::string>;

/// Reads every source file (.h, .cc, .cu, .cuh) of the folders in the fixed layout.
SourceTree read_source_tree(const std::string& root);

/// Returns one line per broken rule, "path:line: what and what is allowed"; empty when all is well.
///
/// The rules: which folder may include which; third-party headers in their home folder only, and
/// out of reach of what other folders include; no environment below tools/; CUDA in kernels/ only.
std::vector<std::string> broken_rules(const SourceTree& tree);

}  // namespace kvtier
