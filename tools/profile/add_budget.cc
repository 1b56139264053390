#include "tools/profile/budget_report.h"
#include "tools/profile/profile_verbs.h"
#include "tools/replay/output_file.h"

#include <CLI/CLI.hpp>

#include <memory>
#include <optional>
#include <string>

namespace kvtier {
namespace {

ExitCode input_code(const Status& status) {
  return status.code() == StatusCode::kInvalidArgument ? ExitCode::kUsage
         : status.code() == StatusCode::kNoSpace       ? ExitCode::kFailed
                                                       : ExitCode::kBadInput;
}

ExitCode profile_budget(const BudgetOptions& options) {
  const Status consistent = check_budget_options(options);
  if (!consistent.ok()) return fail(ExitCode::kUsage, consistent);
  std::optional<OutputFile> output;
  if (!options.output_path.empty()) {
    auto file = OutputFile::open(options.output_path);
    if (!file.ok()) {
      return fail(ExitCode::kUsage, invalid_argument("--output: " + file.status().message()));
    }
    output = std::move(*file);
  }
  const auto inputs = read_budget_inputs(options);
  if (!inputs.ok()) return fail(input_code(inputs.status()), inputs.status());
  const auto plan = plan_budget(*inputs, options);
  if (!plan.ok()) return fail(input_code(plan.status()), plan.status());
  const BudgetReport report{&options, &*inputs, &*plan, suggest(*inputs, options, *plan)};
  const std::string text = options.format == "json" ? budget_json(report) : budget_table(report);
  const ExitCode verdict = plan->passed() ? ExitCode::kDone : ExitCode::kRequirementFailed;
  if (!output) return print_result(text, verdict);
  const Status written = output->write(text);
  return written.ok() ? verdict : fail(ExitCode::kFailed, written);
}

}  // namespace

void add_profile_budget(CLI::App& profile, ExitCode& exit_code) {
  CLI::App* verb = profile.add_subcommand(
      "budget", "What a model's context takes, where it fits, and what memory buys in ms");
  auto options = std::make_shared<BudgetOptions>();
  bind_budget_options(*verb, *options);
  verb->footer(
      "Exit code 4 when it does not fit or misses --target-ms.\n\n"
      "Examples:\n"
      "  kvtier profile budget --model tools/profiles/llama-3.1-8b.config.json --context 32768\n"
      "  kvtier profile budget --model tools/profiles/llama-3.1-8b.config.json \\\n"
      "    --machine tools/profiles/h100.json --sequences 8 --target-ms 40");
  verb->callback([options, &exit_code] { exit_code = profile_budget(*options); });
}

}  // namespace kvtier
