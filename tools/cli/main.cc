// The kvtier command: chooses a verb, and turns its outcome into an exit code.

#include "tools/cli/exit_codes.h"
#include "tools/cli/verbs.h"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <csignal>
#include <string>

namespace {

using kvtier::ExitCode;

// The verb that was chosen, for the hint: its own help says more than the program's.
std::string chosen_command(const CLI::App& app) {
  std::string command = "kvtier";
  const CLI::App* current = &app;
  while (!current->get_subcommands().empty()) {
    current = current->get_subcommands().front();
    command += " " + current->get_name();
  }
  return command;
}

ExitCode refuse_usage(const CLI::App& app, const CLI::ParseError& error) {
  std::string message = error.what();
  std::replace(message.begin(), message.end(), '\n', ' ');
  return fail(ExitCode::kUsage, kvtier::invalid_argument(fmt::format("{} (see {} --help)", message,
                                                                     chosen_command(app))));
}

ExitCode run(int argc, char** argv) {
  CLI::App app("kvtier: tiered KV cache for decoding under per-step selection", "kvtier");
  app.set_version_flag("--version", "kvtier " KVTIER_VERSION);
  app.require_subcommand(1);
  app.footer(
      "Examples:\n"
      "  kvtier inspect tests/traces/smollm2-8k-demo\n"
      "  kvtier replay tests/traces/smollm2-8k-demo --budget 2%\n\n"
      "Exit codes: 0 done and verified, 1 runtime failure, 2 wrong usage, 3 invalid input,\n"
      "4 a requirement or verification failed, 5 required hardware missing.");
  ExitCode exit_code = ExitCode::kDone;
  add_inspect(app, exit_code);
  add_replay(app, exit_code);
  add_selectors(app, exit_code);
  add_simulate(app, exit_code);
  add_sweep(app, exit_code);
  add_profile(app, exit_code);
  add_bench(app, exit_code);
  add_fsck(app, exit_code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help_or_version) {
    return static_cast<ExitCode>(app.exit(help_or_version));
  } catch (const CLI::ParseError& error) {
    return refuse_usage(app, error);
  }
  return exit_code;
}

}  // namespace

int main(int argc, char** argv) {
  // A reader that closes the pipe early is an error of the write, not a death by signal.
  std::signal(SIGPIPE, SIG_IGN);
  return static_cast<int>(run(argc, argv));
}
