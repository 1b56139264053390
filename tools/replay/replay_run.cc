#include "tools/replay/replay_run.h"

#include "tools/replay/exact_attention.h"
#include "tools/replay/trace_feed.h"
#include "transfer/fault_plan.h"
#include "transfer/faulty_file.h"
#include "transfer/link.h"
#include "transfer/open_file.h"
#include "transfer/paced_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <thread>
#include <utility>

namespace kvtier {
namespace {

/// Tokens per append while the prompt goes in: large enough to be quick, small enough for progress.
constexpr std::uint32_t kPromptChunkTokens = 1024;
constexpr std::size_t kTimelineEvents = std::size_t{1} << 18;

/// The first 128 bits of the trace's digest: equal content has one name, other content another.
Origin origin_of(const AttentionTrace& trace) {
  const std::string& digest = trace.digest();
  const std::size_t colon = digest.find(':');
  const std::size_t start = colon == std::string::npos ? 0 : colon + 1;
  constexpr std::size_t kDigits = 16;
  const auto parse = [&](std::size_t from) {
    std::uint64_t value = 0;
    const std::string digits = digest.substr(std::min(from, digest.size()), kDigits);
    std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
    return value;
  };
  return {.high = parse(start), .low = parse(start + kDigits)};
}

/// Replays one trace into one sequence.
class Replayer {
 public:
  Replayer(const RunSetup& setup, const Clock& clock, Runtime& runtime, Sequence& sequence,
           Progress& progress, RunRecord& record)
      : plan_(*setup.plan),
        trace_(*setup.trace),
        run_(*setup.run),
        clock_(clock),
        runtime_(runtime),
        sequence_(sequence),
        progress_(progress),
        record_(record),
        feed_(*setup.trace),
        title_(fmt::format("{} at {}", run_.selector, run_.budget.text())),
        counted_(runtime.stats()) {
    const TraceModel& model = trace_.manifest().model;
    queries_.resize(std::size_t{model.query_heads} * model.head_dim);
    lse_.resize(model.query_heads);
    const std::size_t steps = trace_.query_positions().size();
    record_.outs.resize(steps * trace_.layers().size() * model.query_heads * model.value_dim);
    record_.layers.resize(trace_.layers().size());
  }

  Status replay() {
    for (std::uint32_t step = 0; step < trace_.query_positions().size(); ++step) {
      const Duration before = clock_.now();
      KVTIER_RETURN_IF_ERROR(append_up_to(trace_.query_positions()[step] + 1));
      const Duration appended = clock_.now();
      record_.tokens.emplace_back();
      for (std::uint32_t layer = 0; layer < trace_.layers().size(); ++layer) {
        KVTIER_RETURN_IF_ERROR(step_layer(step, layer));
        stand_in();
      }
      record_.append_time += appended - before;
      record_.step_time += clock_.now() - appended;
    }
    return {};
  }

 private:
  Status append_up_to(std::uint32_t tokens) {
    while (appended_ < tokens) {
      const std::uint32_t count = std::min(kPromptChunkTokens, tokens - appended_);
      for (std::uint32_t layer = 0; layer < trace_.layers().size(); ++layer) {
        const Status appended =
            sequence_.append(LayerIndex{layer}, feed_.rows(layer, appended_, count));
        count_traffic(layer);
        if (appended.ok()) continue;
        // Damage on the way down leaves the tokens appended and the block marked: whoever wants it
        // once the device has let it go will be told. Anything else ends the run.
        if (appended.code() != StatusCode::kCorrupt) return appended;
        if (record_.failures.size() < RunRecord::kFailuresKept) {
          record_.failures.push_back(fmt::format(
              "append, layer {}: {}", trace_.layers()[layer].number, appended.message()));
        }
      }
      for (std::uint32_t layer = 0; layer < trace_.layers().size(); ++layer) {
        KVTIER_RETURN_IF_ERROR(feed_.observe(sequence_, layer, appended_, count));
      }
      appended_ += count;
      progress_.show(title_, appended_, trace_.manifest().tokens);
    }
    return {};
  }

  // The engine's other work needs this thread no more than a GPU's would: transfers go on.
  void stand_in() {
    if (plan_.layer_compute == Duration::zero()) return;
    const Duration start = clock_.now();
    std::this_thread::sleep_for(plan_.layer_compute);
    record_.tokens.back().stand_in += clock_.now() - start;
  }

  Status step_layer(std::uint32_t step, std::uint32_t layer) {
    const TraceManifest& manifest = trace_.manifest();
    const TraceLayer& source = trace_.layers()[layer];
    const std::size_t query_bytes = queries_.size() * size_of(manifest.dtype);
    load_floats(source.queries.subspan(step * query_bytes, query_bytes), manifest.dtype, queries_);

    const std::size_t out_size = std::size_t{manifest.model.query_heads} * manifest.model.value_dim;
    StepRequest request;
    request.layer = LayerIndex{layer};
    request.queries = queries_.data();
    request.budget_tokens = static_cast<std::uint32_t>(run_.budget.tokens(appended_));
    request.out = record_.outs.data() + (step * trace_.layers().size() + layer) * out_size;
    request.lse = lse_.data();
    StepReport report;
    const Status status = sequence_.step(request, &report);
    // A block that could not be had fails this step alone; anything else ends the run.
    if (!status.ok() && report.failures.empty()) return status;
    count_token(report.timing);
    count_traffic(layer);
    record_.layers[layer].metadata_bytes =
        std::max(record_.layers[layer].metadata_bytes, report.metadata_bytes);
    keep_outputs(step, layer, report);
    keep(step, layer, request.budget_tokens, report, status.ok());
    return {};
  }

  // The output over the attended tokens alone is kept beside the step's answer from the first step
  // that differs: most selectors estimate nothing.
  void keep_outputs(std::uint32_t step, std::uint32_t layer, const StepReport& report) {
    LayerTraffic& traffic = record_.layers[layer];
    traffic.rows_estimated += report.rows_estimated;
    if (report.measured_rest) ++traffic.steps_measured;
    if (report.rows_estimated > 0 && record_.attended_outs.empty()) {
      record_.attended_outs = record_.outs;
    }
    if (record_.attended_outs.empty() || report.attended_out == nullptr) return;
    const std::size_t out_size =
        record_.attended_outs.size() / (trace_.query_positions().size() * trace_.layers().size());
    const std::size_t index = step * trace_.layers().size() + layer;
    std::copy_n(report.attended_out, out_size,
                record_.attended_outs.begin() + static_cast<std::ptrdiff_t>(index * out_size));
  }

  // Before `count_traffic`, which forgets what was counted before the step.
  void count_token(const StepTiming& timing) {
    const PrefetchStats& before = counted_.prefetch;
    const PrefetchStats after = runtime_.stats().prefetch;
    TokenTime& token = record_.tokens.back();
    token.disk_wait += timing.disk_wait;
    token.own += timing.total - timing.disk_wait;
    token.foreseen +=
        (after.useful_bytes - before.useful_bytes) / runtime_.layout().extent_bytes() +
        (after.late - before.late);
    token.unforeseen += after.unforeseen - before.unforeseen;
  }

  // What has been counted since the last call is this layer's doing.
  void count_traffic(std::uint32_t layer) {
    RuntimeStats after = runtime_.stats();
    const RuntimeStats& before = counted_;
    LayerTraffic& traffic = record_.layers[layer];
    for (std::size_t tier = 0; tier < kTierCount; ++tier) {
      traffic.hits[tier] += after.tiers[tier].hits - before.tiers[tier].hits;
      traffic.held_hits[tier] += after.tiers[tier].held_hits - before.tiers[tier].held_hits;
    }
    for (std::size_t route = 0; route < kRouteCount; ++route) {
      traffic.bytes[route] +=
          after.routes[route].submitted_bytes - before.routes[route].submitted_bytes;
    }
    const auto add = [&](auto& sum, auto counters, auto member) {
      sum.*member += (after.*counters).*member - (before.*counters).*member;
    };
    for (const auto member : {&VerificationStats::verified, &VerificationStats::mismatched,
                              &VerificationStats::recovered, &VerificationStats::failed}) {
      add(traffic.verification, &RuntimeStats::verification, member);
    }
    for (const auto member :
         {&PrefetchStats::issued_bytes, &PrefetchStats::useful_bytes, &PrefetchStats::wasted_bytes,
          &PrefetchStats::late, &PrefetchStats::unforeseen}) {
      add(traffic.prefetch, &RuntimeStats::prefetch, member);
    }
    counted_ = std::move(after);
  }

  void keep(std::uint32_t step, std::uint32_t layer, std::uint32_t budget, const StepReport& report,
            bool succeeded) {
    const std::uint32_t groups = runtime_.layout().head_groups();
    const auto tell = [&](std::vector<std::string>& list, const std::string& what) {
      if (list.size() == RunRecord::kFailuresKept) return;
      list.push_back(
          fmt::format("step {}, layer {}: {}", step, trace_.layers()[layer].number, what));
    };
    bool sound = succeeded;
    if (succeeded) {
      const AttendedLimits limits{.head_groups = groups,
                                  .tokens_per_block = runtime_.layout().tokens_per_block(),
                                  .visible = appended_,
                                  .budget = budget,
                                  .sinks = plan_.runtime.sinks,
                                  .window = plan_.runtime.window};
      const Status account = record_.attended.add(report.attended, limits);
      if (!account.ok()) tell(record_.problems, account.message());
      sound = account.ok();
    } else {
      record_.attended.add_nothing(groups);
      for (const BlockFailure& failure : report.failures) tell(record_.failures, failure.message);
    }
    if (!sound) ++record_.failed_steps;
    record_.failed.push_back(sound ? 0 : 1);
    record_.tokens_attended.push_back(sound ? report.attended_tokens_total : 0);
    record_.timings.push_back(report.timing);
  }

  const ReplayPlan& plan_;
  const AttentionTrace& trace_;
  const PlannedRun& run_;
  const Clock& clock_;
  Runtime& runtime_;
  Sequence& sequence_;
  Progress& progress_;
  RunRecord& record_;
  TraceFeed feed_;
  std::string title_;
  RuntimeStats counted_;
  std::uint32_t appended_ = 0;
  std::vector<float> queries_;
  std::vector<float> lse_;
};

/// The first failure of several steps that are all taken.
void keep_first(Status& first, Status next) {
  if (first.ok()) first = std::move(next);
}

Status replay_in(const RunSetup& setup, const Environment& environment, Progress& progress,
                 RunRecord& record) {
  RuntimeOptions options = setup.plan->runtime;
  options.selector = setup.run->factory;
  if (!setup.look_ahead) options.look_ahead_bytes = options.look_ahead_device_bytes = 0;
  KVTIER_ASSIGN_OR_RETURN(const std::unique_ptr<Runtime> runtime,
                          Runtime::open(options, environment));
  Status status;
  auto sequence = runtime->create_sequence(origin_of(*setup.trace));
  if (sequence.ok()) {
    Replayer replayer(setup, *environment.clock, *runtime, **sequence, progress, record);
    status = replayer.replay();
    keep_first(status, (*sequence)->close());
  } else {
    status = sequence.status();
  }
  const Status closed = runtime->close();
  // Blocks whose write failed stayed in host memory, so nothing attended was lost: a failure that
  // was asked for is a recovery, any other a disk that the user must hear of.
  if (!is_injected(closed)) keep_first(status, closed);
  // Counters are final only now, when every transfer has ended.
  record.stats = runtime->stats();
  return status;
}

}  // namespace

Result<std::unique_ptr<File>> open_disk(const ReplayPlan& plan) {
  if (plan.disk.bytes == 0) return std::unique_ptr<File>();
  return open_file(plan.disk);
}

Result<RunRecord> replay_run(RunSetup setup, Progress& progress) {
  RunRecord record;
  record.selector = setup.run->selector;
  record.budget = setup.run->budget.text();
  record.factory = setup.run->factory;
  FaultCounts faults;
  std::unique_ptr<Link> link = make_memory_link();
  if (setup.inject) {
    if (setup.disk) {
      setup.disk = std::make_unique<FaultyFile>(std::move(setup.disk), *setup.inject, &faults);
    }
    if (setup.inject->link_bitflip_rate > 0) {
      link = make_faulty_link(std::move(link), *setup.inject, &faults);
    }
  }
  const SteadyClock clock;
  if (setup.disk && setup.plan->disk_pace.bytes_per_second > 0) {
    setup.disk = std::make_unique<PacedFile>(std::move(setup.disk), setup.plan->disk_pace, clock);
  }
  std::optional<Timeline> timeline;
  if (setup.keep_timeline) timeline.emplace(kTimelineEvents);
  const Environment environment{.clock = &clock,
                                .device = setup.device,
                                .link = link.get(),
                                .disk = setup.disk.get(),
                                .timeline = timeline ? &*timeline : nullptr};
  Status status = replay_in(setup, environment, progress, record);
  if (setup.disk) {
    record.disk = setup.disk->traits();
    keep_first(status, setup.disk->close());
  }
  if (!status.ok()) {
    return Status(status.code(),
                  fmt::format("{} at {}: {}", record.selector, record.budget, status.message()));
  }
  for (int kind = 0; kind < kFaultKindCount; ++kind) {
    const std::size_t index = static_cast<std::size_t>(kind);
    record.faults_fired[index] = faults.fired[index].load();
  }
  if (timeline) {
    record.events.assign(timeline->events().begin(), timeline->events().end());
    record.events_dropped = timeline->dropped();
  }
  return record;
}

}  // namespace kvtier
