#pragma once

#include "tools/profile/machine_profile.h"
#include "tools/profile/model_config.h"

#include <string>

namespace kvtier {

/// A config of tests/tools/model_configs: the keys that matter of a published one.
std::string config_path(const std::string& name);
/// The same document with some top-level keys added or replaced: `keys` is the inside of an object.
std::string with_keys(const std::string& name, const std::string& keys);
Result<ModelDescription> parse_config_text(const std::string& text,
                                           const std::string& read_as = "");

/// A machine with round figures: a GPU that reads 1 TB/s, a link of 10 GB/s, a disk of 1 GB/s, and
/// products at 100 Tflop/s. Nothing else takes time.
MachineProfile round_machine();

/// Writes `text` to a file that is removed with the test program's temporary directory.
std::string write_scratch(const std::string& name, const std::string& text);

}  // namespace kvtier
