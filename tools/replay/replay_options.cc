#include "tools/replay/replay_options.h"

#include "selectors/eviction_policy.h"
#include "selectors/registry.h"
#include "tools/cli/options.h"
#include "tools/trace/head_classes.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <span>
#include <string_view>
#include <system_error>
#include <utility>

namespace kvtier {
namespace {

template <typename T>
using Choices = std::span<const std::pair<std::string_view, T>>;

constexpr std::pair<std::string_view, GroupReduction> kReductions[] = {
    {"max", GroupReduction::kMax}, {"sum", GroupReduction::kSum}, {"mean", GroupReduction::kMean}};
// No tool offers to switch verification off.
constexpr std::pair<std::string_view, VerifyMode> kVerifyModes[] = {
    {"arrivals", VerifyMode::kArrivals}, {"all", VerifyMode::kAll}};
constexpr std::pair<std::string_view, EstimateRest> kEstimates[] = {
    {"measured", EstimateRest::kMeasured},
    {"always", EstimateRest::kAlways},
    {"never", EstimateRest::kNever}};
constexpr std::pair<std::string_view, ResultFormat> kFormats[] = {
    {"table", ResultFormat::kTable}, {"json", ResultFormat::kJson}, {"csv", ResultFormat::kCsv}};
constexpr std::pair<std::string_view, FileBackend> kBackends[] = {
    {"auto", FileBackend::kAuto},
    {"io_uring", FileBackend::kIoUring},
    {"posix", FileBackend::kPosix}};

/// A parser of one of a few words.
template <typename T>
auto one_of(Choices<T> choices) {
  return [choices](std::string_view text) -> Result<T> {
    std::vector<std::string_view> known;
    for (const auto& [name, value] : choices) {
      if (name == text) return value;
      known.push_back(name);
    }
    return invalid_argument(
        fmt::format("found '{}', expected one of {}", text, fmt::join(known, ", ")));
  };
}

/// A parser of whole numbers from `least` to `most`.
template <typename T>
auto whole_number(T least, T most) {
  return [least, most](std::string_view text) -> Result<T> {
    const Result<std::uint64_t> value = parse_count(text);
    if (!value.ok() || *value < least || *value > most) {
      return invalid_argument(
          fmt::format("found '{}', expected a whole number from {} to {}", text, least, most));
    }
    return static_cast<T>(*value);
  };
}

Result<std::string> parse_selector(std::string_view text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  if (text == kAllSelectors) return std::string(text);
  auto factory = make_selector_factory(text, selector_resources());
  if (!factory.ok()) return factory.status();
  return std::string(text);
}

Result<std::string> parse_eviction(std::string_view text) {
  const auto known = known_eviction_policies();
  if (std::ranges::find(known, text) != known.end()) return std::string(text);
  return invalid_argument(
      fmt::format("found '{}', expected one of {}", text, fmt::join(known, ", ")));
}

Result<std::string> parse_path(std::string_view text) {
  if (text.empty()) return invalid_argument("found nothing, expected a path");
  return std::string(text);
}

Result<std::optional<FaultPlan>> parse_inject(std::string_view text) {
  KVTIER_ASSIGN_OR_RETURN(FaultPlan plan, FaultPlan::parse(text));
  return std::optional<FaultPlan>(plan);
}

Result<std::optional<Capacity>> parse_disk_capacity(std::string_view text) {
  KVTIER_ASSIGN_OR_RETURN(Capacity capacity, Capacity::parse(text));
  return std::optional<Capacity>(std::move(capacity));
}

Result<double> parse_rate(std::string_view text) {
  const Result<double> value = parse_number(text);
  if (value.ok() && *value > 0) return value;
  return invalid_argument(fmt::format("found '{}', expected a number above 0", text));
}

/// Whether two paths name one file, which need not exist yet.
bool is_same_file(const std::string& a, const std::string& b) {
  const auto whole = [](const std::string& path) {
    std::error_code ignored;
    return std::filesystem::weakly_canonical(std::filesystem::absolute(path, ignored), ignored);
  };
  return whole(a) == whole(b);
}

constexpr std::uint32_t kCountMax = 1U << 30;

void bind_selection(CLI::App& verb, ReplayOptions& options) {
  add_values(verb, "--selector", options.selectors, parse_selector,
             "Selectors to run, as listed by `kvtier selectors`: mean, mean(tokens=16), "
             "refresh(interval=4)/mean; or all that the trace can feed",
             std::string(kDefaultSelector));
  add_values(verb, "--budget", options.budgets, Budget::parse,
             "Tokens attended per KV head and step, sinks and window included: 2% of the visible "
             "ones, or 512",
             "5%");
  add_values(verb, "--only-layers", options.only_layers, whole_number<std::uint32_t>(0, kCountMax),
             "Layers of the model to replay", "all kept");
  add_value(verb, "--block-tokens", options.block_tokens, whole_number<std::uint32_t>(1, 64),
            "Tokens of a block: what is selected and moved", "8");
  add_value(verb, "--extent-bytes", options.extent_bytes, parse_bytes,
            "Bytes of a disk read or write", "128KiB");
  add_value(verb, "--sinks", options.sinks, whole_number<std::uint32_t>(0, kCountMax),
            "First tokens, always attended and held on the device", "4");
  add_value(verb, "--window", options.window, whole_number<std::uint32_t>(1, kCountMax),
            "Last tokens, likewise", "64");
  add_value(verb, "--group-reduction", options.reduction,
            one_of(Choices<GroupReduction>(kReductions)),
            "How query heads that share a KV head become one score: max, sum, mean", "sum");
  add_value(verb, "--estimate-rest", options.estimate_rest,
            one_of(Choices<EstimateRest>(kEstimates)),
            "What is not attended, where the selector can estimate it: measured (where that is "
            "seen to help), always, never",
            "measured");
}

void bind_movement(CLI::App& verb, ReplayOptions& options) {
  add_value(verb, "--eviction", options.eviction, parse_eviction,
            fmt::format("What leaves a full tier: {}", fmt::join(known_eviction_policies(), ", ")),
            options.eviction);
  add_value(verb, "--look-ahead", options.look_ahead_bytes, parse_bytes,
            "Bytes per step that may be promoted from disk to host ahead of need", "512KiB");
  add_value(verb, "--look-ahead-device", options.look_ahead_device_bytes, parse_bytes,
            "Bytes per step that may be promoted from host to device ahead of need", "0");
  add_value(verb, "--device-capacity", options.device_capacity, Capacity::parse,
            "Device tier: bytes, or a share of the trace's KV bytes", "10%");
  add_value(verb, "--host-capacity", options.host_capacity, Capacity::parse, "Host tier, likewise",
            "40%");
  add_value(verb, "--disk-capacity", options.disk_capacity, parse_disk_capacity,
            "Disk tier, likewise; 0 is none", "what the trace needs");
  add_value(verb, "--disk-path", options.disk_path, parse_path,
            "Directory of the disk tier's nameless file", "TMPDIR or /tmp");
  add_value(verb, "--file-backend", options.file_backend, one_of(Choices<FileBackend>(kBackends)),
            "auto, io_uring, posix", "auto");
  add_value(verb, "--emulate-disk-gbps", options.emulate_disk_gbps, parse_rate,
            "Slows the disk tier down to a drive of so many GB/s (10^9 bytes)", "as fast as it is");
  add_value(verb, "--emulate-disk-latency-us", options.emulate_disk_latency_us,
            whole_number<std::uint32_t>(0, 10'000'000),
            "Of that drive, beside the time of its bytes", "100");
  add_value(verb, "--layer-compute-us", options.layer_compute_us,
            whole_number<std::uint32_t>(0, 10'000'000),
            "Stands in for the engine's other work after each layer's step: the thread sleeps so "
            "long. Each run is then made without look-ahead too, to tell what look-ahead hides",
            "0");
  add_value(verb, "--verify", options.verify, one_of(Choices<VerifyMode>(kVerifyModes)),
            "Check blocks that come from disk (arrivals), or after every hop (all)", "arrivals");
  add_value(verb, "--inject", options.inject, parse_inject,
            "Faults to inject, as kind[:target]:rate,... and seed=N: "
            "bitflip:disk:1e-3,shortread:1e-3,eio:1e-4,seed=7",
            "");
  verb.add_flag("--deterministic", options.deterministic,
                "Attend and merge in one order whatever is resident: equal results bit for bit");
  add_value(verb, "--seed", options.seed,
            whole_number<std::uint64_t>(0, std::numeric_limits<std::uint64_t>::max()),
            "Of selectors that draw", "0");
  add_value(verb, "--threads", options.threads, whole_number<unsigned>(1, 4096),
            "Threads that select and attend", "all");
}

}  // namespace

const char* to_string(GroupReduction reduction) {
  switch (reduction) {
    case GroupReduction::kMax: return "max";
    case GroupReduction::kSum: return "sum";
    case GroupReduction::kMean: return "mean";
  }
  return "?";
}

const char* to_string(VerifyMode mode) {
  switch (mode) {
    case VerifyMode::kArrivals: return "arrivals";
    case VerifyMode::kAll: return "all";
    case VerifyMode::kNone: return "none";
  }
  return "?";
}

const char* to_string(EstimateRest estimate) {
  switch (estimate) {
    case EstimateRest::kMeasured: return "measured";
    case EstimateRest::kAlways: return "always";
    case EstimateRest::kNever: return "never";
  }
  return "?";
}

ReplayOptions::ReplayOptions()
    : selectors{std::string(kDefaultSelector)},
      budgets{Budget::parse("5%").value()},
      eviction("lrfu"),
      device_capacity(Capacity::parse("10%").value()),
      host_capacity(Capacity::parse("40%").value()) {}

void bind_replay_options(CLI::App& verb, ReplayOptions& options) {
  verb.add_option("TRACE", options.trace_path, "Folder of an attention trace, or its manifest.json")
      ->required()
      ->type_name("");
  bind_selection(verb, options);
  bind_movement(verb, options);
  add_value(verb, "--format", options.format, one_of(Choices<ResultFormat>(kFormats)),
            "Of the result: table, json, csv", "table");
  add_value(verb, "--output", options.output_path, parse_path,
            "File for the result; written whole or not at all", "stdout");
  add_value(verb, "--timeline", options.timeline_path, parse_path,
            "File for Chrome trace events, one track per link and stage (opens in Perfetto)", "");
}

Status check_replay_options(const ReplayOptions& options) {
  if (options.inject && options.inject->link_bitflip_rate > 0 &&
      options.verify != VerifyMode::kAll) {
    return invalid_argument(
        "--inject: found faults on the link with --verify arrivals, expected --verify all: nothing "
        "else would notice them");
  }
  if (!options.output_path.empty() && !options.timeline_path.empty() &&
      is_same_file(options.output_path, options.timeline_path)) {
    return invalid_argument(fmt::format(
        "--timeline: found '{}', expected another file than --output", options.timeline_path));
  }
  return {};
}

}  // namespace kvtier
