// kvtier profile: what a machine gives, what a model asks of it, and what its heads need.

#include "tools/cli/verbs.h"
#include "tools/profile/profile_verbs.h"

#include <CLI/CLI.hpp>

namespace kvtier {

void add_profile(CLI::App& app, ExitCode& exit_code) {
  CLI::App* profile = app.add_subcommand(
      "profile", "Measure a machine or a model's heads, or plan a model's memory");
  profile->require_subcommand(1);
  profile->footer(
      "Examples:\n"
      "  kvtier profile machine --output machine.json\n"
      "  kvtier profile budget --model tools/profiles/llama-3.1-8b.config.json \\\n"
      "    --machine tools/profiles/h100.json --context 131072 --sequences 8");
  add_profile_budget(*profile, exit_code);
  add_profile_heads(*profile, exit_code);
  add_profile_machine(*profile, exit_code);
}

}  // namespace kvtier
