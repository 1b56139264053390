// kvtier profile: what a model's heads need, and later what a machine gives.

#include "tools/cli/verbs.h"
#include "tools/profile/profile_verbs.h"

#include <CLI/CLI.hpp>

namespace kvtier {

void add_profile(CLI::App& app, ExitCode& exit_code) {
  CLI::App* profile = app.add_subcommand("profile", "Measure what a model's heads need");
  profile->require_subcommand(1);
  profile->footer(
      "Examples:\n"
      "  kvtier profile heads tests/traces/smollm2-8k-demo\n"
      "  kvtier profile heads tests/traces/smollm2-8k-demo --output heads.json");
  add_profile_heads(*profile, exit_code);
}

}  // namespace kvtier
