#include "tools/replay/replay_plan.h"

#include "kernels/kv_view.h"
#include "kernels/partial_attention.h"
#include "memory/available_memory.h"
#include "runtime/runtime.h"
#include "selectors/registry.h"
#include "tools/replay/trace_feed.h"
#include "tools/trace/head_classes.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace kvtier {
namespace {

std::uint64_t round_down(std::uint64_t value, std::uint64_t unit) { return value / unit * unit; }

/// "2.26%", rounded up, so that typing it is enough.
std::string share_text(std::uint64_t part, std::uint64_t whole) {
  const std::uint64_t hundredths = (part * 10'000 + whole - 1) / whole;
  return fmt::format("{}.{:02}%", hundredths / 100, hundredths % 100);
}

Status check_shape(const TraceModel& model) {
  constexpr std::uint32_t kStep = 8;
  for (const std::uint32_t dim : {model.head_dim, model.value_dim}) {
    if (dim % kStep == 0 && dim <= kMaxAttentionDim) continue;
    return unsupported(
        fmt::format("found head and value dims {} and {}, expected multiples of {} "
                    "up to {}",
                    model.head_dim, model.value_dim, kStep, kMaxAttentionDim));
  }
  const std::uint32_t group = model.query_heads / model.kv_heads;
  if (group <= kMaxGroupQueries) return {};
  return unsupported(fmt::format("found {} query heads per KV head, expected at most {}", group,
                                 kMaxGroupQueries));
}

RuntimeOptions runtime_options(const ReplayOptions& options, const AttentionTrace& trace) {
  const TraceManifest& manifest = trace.manifest();
  const TraceModel& model = manifest.model;
  RuntimeOptions runtime;
  runtime.block = {.dtype = manifest.dtype,
                   .head_dim = model.head_dim,
                   .value_dim = model.value_dim,
                   .kv_heads = model.kv_heads,
                   .kv_heads_per_block = 1,
                   .tokens_per_block = options.block_tokens,
                   .extent_bytes = options.extent_bytes};
  runtime.layers = static_cast<std::uint32_t>(trace.layers().size());
  runtime.query_heads = model.query_heads;
  runtime.softmax = {.scale = static_cast<float>(manifest.softmax_scale),
                     .logit_cap = static_cast<float>(manifest.logit_cap)};
  const bool has_sink_logits = std::ranges::any_of(
      trace.layers(), [](const TraceLayer& layer) { return !layer.sink_logits.empty(); });
  for (const TraceLayer& layer : trace.layers()) {
    if (!has_sink_logits) break;
    // A layer without them gets sinks that take no weight.
    const std::vector<float> none(model.query_heads, kEmptyLse);
    const auto logits =
        layer.sink_logits.empty() ? std::span<const float>(none) : layer.sink_logits;
    runtime.sink_logits.insert(runtime.sink_logits.end(), logits.begin(), logits.end());
  }
  runtime.rope = {.theta = manifest.rope_theta};
  runtime.reduction = options.reduction;
  runtime.estimate_rest = options.estimate_rest;
  runtime.sinks = options.sinks;
  runtime.window = options.window;
  runtime.eviction = options.eviction;
  runtime.look_ahead_bytes = options.look_ahead_bytes;
  runtime.look_ahead_device_bytes = options.look_ahead_device_bytes;
  runtime.verify = options.verify;
  runtime.deterministic = options.deterministic;
  runtime.seed = options.seed;
  runtime.tokens_max = manifest.tokens;
  return runtime;
}

Status check_capacity(const char* option, const Capacity& capacity, std::uint64_t found,
                      std::uint64_t least, std::uint64_t kv_bytes) {
  if (found >= least) return {};
  return invalid_argument(fmt::format(
      "{}: found {} ({} B), expected at least {} B, {} of the trace's {} KV bytes: one step "
      "needs that much",
      option, capacity.text(), found, least, share_text(least, kv_bytes), kv_bytes));
}

Status plan_capacities(const ReplayOptions& options, std::uint64_t kv_bytes, ReplayPlan& plan) {
  RuntimeOptions& runtime = plan.runtime;
  runtime.device_capacity_bytes = options.device_capacity.bytes(kv_bytes);
  runtime.host_capacity_bytes = options.host_capacity.bytes(kv_bytes);
  const std::uint64_t extent = options.extent_bytes;
  const std::uint64_t total = plan.needs.extent_bytes_total;
  runtime.disk_capacity_bytes =
      options.disk_capacity ? round_down(options.disk_capacity->bytes(kv_bytes), extent) : total;
  KVTIER_RETURN_IF_ERROR(check_capacity("--device-capacity", options.device_capacity,
                                        runtime.device_capacity_bytes, plan.needs.device_bytes,
                                        kv_bytes));
  KVTIER_RETURN_IF_ERROR(check_capacity("--host-capacity", options.host_capacity,
                                        runtime.host_capacity_bytes, plan.needs.host_bytes,
                                        kv_bytes));
  const std::uint64_t reserve = runtime.disk_capacity_bytes > 0 ? plan.needs.host_reserve_bytes : 0;
  const std::uint64_t in_host = round_down(runtime.host_capacity_bytes, extent) - reserve;
  if (options.disk_capacity && in_host < total && runtime.disk_capacity_bytes < total - in_host) {
    const std::uint64_t usable =
        round_down(runtime.host_capacity_bytes, extent) - plan.needs.host_reserve_bytes;
    return invalid_argument(fmt::format(
        "--disk-capacity: found {} ({} B), expected at least {} B beside {} B of host tier, of "
        "which {} B are kept to read into: the trace fills {} B of extents",
        options.disk_capacity->text(), runtime.disk_capacity_bytes, total - usable,
        runtime.host_capacity_bytes, plan.needs.host_reserve_bytes, total));
  }
  return {};
}

/// More than the machine has would fail later, when a run has begun.
Status check_memory(const RuntimeOptions& runtime) {
  const std::uint64_t available = available_memory_bytes();
  if (runtime.device_capacity_bytes <= available &&
      runtime.host_capacity_bytes <= available - runtime.device_capacity_bytes) {
    return {};
  }
  return invalid_argument(fmt::format(
      "--device-capacity, --host-capacity: found {} B and {} B, expected at most {} B together: "
      "this build keeps both in memory, and no more is available",
      runtime.device_capacity_bytes, runtime.host_capacity_bytes, available));
}

Status check_budget(const Budget& budget, const ReplayOptions& options,
                    const AttentionTrace& trace) {
  for (std::size_t step = 0; step < trace.query_positions().size(); ++step) {
    const std::uint32_t visible = trace.query_positions()[step] + 1;
    const std::uint64_t least =
        std::min<std::uint64_t>(visible, std::uint64_t{options.sinks} + options.window);
    const std::uint64_t found = budget.tokens(visible);
    if (found >= least) continue;
    return invalid_argument(fmt::format(
        "--budget: found {} ({} of {} visible tokens at step {}), expected at least {} ({} tokens) "
        "to cover {} sinks and a window of {}",
        budget.text(), found, visible, step, share_text(least, visible), least, options.sinks,
        options.window));
  }
  return {};
}

/// `names` with "all" replaced by what it stands for.
std::vector<std::string> selectors_of(const std::vector<std::string>& names) {
  std::vector<std::string> selectors;
  for (const std::string& name : names) {
    if (name != kAllSelectors) {
      selectors.push_back(name);
      continue;
    }
    for (const SelectorListing& listing : known_selectors()) {
      if (!listing.decorates) selectors.push_back(listing.name);
    }
  }
  return selectors;
}

Status plan_runs(const ReplayOptions& options, const AttentionTrace& trace, ReplayPlan& plan) {
  for (const Budget& budget : options.budgets) {
    KVTIER_RETURN_IF_ERROR(check_budget(budget, options, trace));
  }
  const SelectorNeeds present = needs_met_by(trace);
  for (const std::string& name : selectors_of(options.selectors)) {
    auto factory = make_selector_factory(name, selector_resources());
    if (!factory.ok()) return invalid_argument("--selector: " + factory.status().message());
    const std::string lacks = missing_needs(factory->needs, present);
    if (!lacks.empty() && std::ranges::find(options.selectors, name) != options.selectors.end()) {
      return unsupported(fmt::format("{}: selector '{}' needs {}, which the trace lacks",
                                     trace.manifest_path(), name, lacks));
    }
    if (!lacks.empty()) {
      plan.left_out.push_back({name, lacks});
      continue;
    }
    for (const Budget& budget : options.budgets) plan.runs.push_back({name, *factory, budget});
  }
  return {};
}

/// TMPDIR as other programs understand it. The environment is read in tools only.
std::string temporary_directory() {
  const char* directory = std::getenv("TMPDIR");
  return directory != nullptr && *directory != '\0' ? directory : "/tmp";
}

}  // namespace

SelectorShape ReplayPlan::selector_shape() const {
  return {.dtype = runtime.block.dtype,
          .kv_heads = runtime.block.kv_heads,
          .heads_per_group = runtime.block.kv_heads_per_block,
          .queries_per_kv_head = runtime.query_heads / runtime.block.kv_heads,
          .head_dim = runtime.block.head_dim,
          .value_dim = runtime.block.value_dim,
          .tokens_per_block = runtime.block.tokens_per_block,
          .sinks = runtime.sinks,
          .window = runtime.window,
          .softmax = runtime.softmax,
          .rope = runtime.rope,
          .reduction = runtime.reduction,
          .seed = runtime.seed,
          .layers = runtime.layers,
          .tokens_max = runtime.tokens_max};
}

Result<ReplayPlan> ReplayPlan::make(const ReplayOptions& options, const AttentionTrace& trace) {
  KVTIER_RETURN_IF_ERROR(check_shape(trace.manifest().model));
  ReplayPlan plan;
  plan.runtime = runtime_options(options, trace);
  if (auto layout = BlockLayout::make(plan.runtime.block); !layout.ok()) {
    return invalid_argument(fmt::format("--block-tokens {}, --extent-bytes {}: {}",
                                        options.block_tokens, options.extent_bytes,
                                        layout.status().message()));
  }
  KVTIER_RETURN_IF_ERROR(plan_runs(options, trace, plan));
  plan.runtime.selector = plan.runs.front().factory;
  KVTIER_ASSIGN_OR_RETURN(plan.needs, Runtime::needs(plan.runtime));
  KVTIER_RETURN_IF_ERROR(plan_capacities(options, trace.kv_bytes(), plan));
  KVTIER_RETURN_IF_ERROR(check_memory(plan.runtime));
  plan.disk.directory = options.disk_path.empty() ? temporary_directory() : options.disk_path;
  plan.disk.bytes = plan.runtime.disk_capacity_bytes;
  plan.disk.backend = options.file_backend;
  plan.layer_compute = std::chrono::microseconds(options.layer_compute_us);
  plan.disk_pace = {.bytes_per_second = options.emulate_disk_gbps * 1e9,
                    .latency = std::chrono::microseconds(options.emulate_disk_latency_us)};
  return plan;
}

}  // namespace kvtier
