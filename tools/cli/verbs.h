#pragma once

#include "tools/cli/exit_codes.h"

namespace CLI {
class App;
}

namespace kvtier {

// Each adds one verb to `app`. When it is chosen, parsing runs it and leaves how it ended in
// `exit_code`; both outlive the parsing. Wrong option values are `CLI::ParseError`s, which `main`
// turns into exit code 2.

void add_inspect(CLI::App& app, ExitCode& exit_code);
void add_replay(CLI::App& app, ExitCode& exit_code);
void add_simulate(CLI::App& app, ExitCode& exit_code);
void add_sweep(CLI::App& app, ExitCode& exit_code);
void add_profile(CLI::App& app, ExitCode& exit_code);
void add_bench(CLI::App& app, ExitCode& exit_code);
void add_fsck(CLI::App& app, ExitCode& exit_code);
void add_selectors(CLI::App& app, ExitCode& exit_code);

}  // namespace kvtier
