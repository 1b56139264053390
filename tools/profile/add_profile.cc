// kvtier profile: what a machine gives, and what a model asks of it.

#include "tools/cli/verbs.h"
#include "tools/profile/profile_verbs.h"

#include <CLI/CLI.hpp>

namespace kvtier {

void add_profile(CLI::App& app, ExitCode& exit_code) {
  CLI::App* profile =
      app.add_subcommand("profile", "Measure a machine, or plan a model's memory on one");
  profile->require_subcommand(1);
  profile->footer(
      "Examples:\n"
      "  kvtier profile machine --output machine.json\n"
      "  kvtier profile budget --model tools/profiles/llama-3.1-8b.config.json \\\n"
      "    --machine tools/profiles/h100.json --context 131072 --sequences 8");
  add_profile_budget(*profile, exit_code);
  add_profile_machine(*profile, exit_code);
}

}  // namespace kvtier
