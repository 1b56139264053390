#pragma once

#include <string>
#include <vector>

namespace kvtier {

/// How a run of the real program ended.
struct Outcome {
  int exit_code = -1;  ///< -1 when a signal ended it.
  std::string output;
  std::string errors;
};

/// Runs the built `kvtier` with these arguments and waits for its end. Its stdout goes to
/// `output_path` where one is given, and `output` stays empty.
Outcome run_kvtier(const std::vector<std::string>& arguments, const std::string& output_path = "");

}  // namespace kvtier
