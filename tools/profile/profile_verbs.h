#pragma once

#include "tools/cli/exit_codes.h"

namespace CLI {
class App;
}

namespace kvtier {

// The sub-verbs of `kvtier profile`: each is a file of its own that adds itself to `profile`, and
// one line in add_profile.cc. They behave as the verbs of tools/cli/verbs.h do.

void add_profile_budget(CLI::App& profile, ExitCode& exit_code);
void add_profile_heads(CLI::App& profile, ExitCode& exit_code);
void add_profile_machine(CLI::App& profile, ExitCode& exit_code);

}  // namespace kvtier
