#include "tools/cli/options.h"
#include "tools/profile/measure.h"
#include "tools/profile/profile_verbs.h"
#include "tools/replay/output_file.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <memory>
#include <optional>
#include <string>

namespace kvtier {
namespace {

Result<double> parse_seconds(std::string_view text) {
  const auto seconds = parse_number(text);
  if (seconds.ok() && *seconds >= 0.5 && *seconds <= 3600) return *seconds;
  return invalid_argument(fmt::format("found '{}', expected seconds from 0.5 to 3600", text));
}

Result<unsigned> parse_thread_count(std::string_view text) {
  const auto count = parse_count(text);
  if (count.ok() && *count > 0 && *count <= 4096) return static_cast<unsigned>(*count);
  return invalid_argument(fmt::format("found '{}', expected a whole number from 1 to 4096", text));
}

ExitCode profile_machine(const MachineOptions& options) {
  std::optional<OutputFile> output;
  if (!options.output_path.empty()) {
    auto file = OutputFile::open(options.output_path);
    if (!file.ok()) {
      return fail(ExitCode::kUsage, invalid_argument("--output: " + file.status().message()));
    }
    output = std::move(*file);
  }
#ifndef __OPTIMIZE__
  fmt::print(stderr, "warning: built without optimisation; the figures mean nothing\n");
#endif
  const auto profile = measure_machine(options);
  if (!profile.ok()) {
    const bool wrong = profile.status().code() == StatusCode::kCorrupt;
    return fail(wrong ? ExitCode::kRequirementFailed : ExitCode::kFailed, profile.status());
  }
  if (output) {
    const Status written = output->write(profile->to_json());
    if (!written.ok()) return fail(ExitCode::kFailed, written);
  }
  return print_result(options.format == "json" ? profile->to_json() : machine_table(*profile),
                      ExitCode::kDone);
}

}  // namespace

void add_profile_machine(CLI::App& profile, ExitCode& exit_code) {
  CLI::App* verb = profile.add_subcommand(
      "machine", "Measure memory, copies, disk and kernels; verify the data; write a profile");
  auto options = std::make_shared<MachineOptions>();
  verb->add_option("--output", options->output_path,
                   "File for the profile (JSON), beside what is shown")
      ->type_name("");
  verb->add_option("--name", options->name, "What the profile calls the machine")
      ->capture_default_str()
      ->type_name("");
  verb->add_option("--disk", options->disk_path,
                   "Directory on the disk (default: that of temporary files)")
      ->type_name("");
  add_value(*verb, "--seconds", options->seconds, parse_seconds, "Time to measure for", "60");
  add_value(*verb, "--threads", options->threads, parse_thread_count, "Threads",
            "all that the process may use");
  verb->add_option("--format", options->format, "table or json (default: table)")
      ->check(CLI::IsMember({"table", "json"}))
      ->type_name("");
  verb->footer(
      "What the machine lacks is waived, with the reason. Exit code 4 when data comes back "
      "wrong.\n\n"
      "Examples:\n"
      "  kvtier profile machine --output machine.json\n"
      "  kvtier profile machine --disk /var/tmp --seconds 20");
  verb->callback([options, &exit_code] { exit_code = profile_machine(*options); });
}

}  // namespace kvtier
