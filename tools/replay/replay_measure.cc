#include "tools/replay/replay_measure.h"

#include "tools/replay/best_choice.h"
#include "tools/replay/kept_keys.h"
#include "tools/replay/quality_sums.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

namespace kvtier {
namespace {

/// Mass of one head on the parts of `spans` inside [begin, end).
double mass_within(const ExactAttention& exact, std::uint32_t head,
                   std::span<const TokenSpan> spans, std::uint32_t begin, std::uint32_t end) {
  double mass = 0;
  for (const TokenSpan& span : spans) {
    const std::uint32_t first = std::max(span.begin, begin);
    const std::uint32_t last = std::min(span.end, end);
    if (first < last) mass += exact.mass(head, first, last);
  }
  return mass;
}

/// The evidence that a step's answer rests on; none outside of answers.
std::span<const TokenSpan> evidence_of(const AttentionTrace& trace, std::uint32_t position) {
  // The query of the question's last token predicts the answer's first.
  for (const TraceTurn& turn : trace.manifest().turns) {
    if (position + 1 >= turn.answer_start && position + 1 < turn.end) return turn.evidence;
  }
  return {};
}

class Measurement {
 public:
  Measurement(const AttentionTrace& trace, const SelectorShape& shape,
              std::span<const RunRecord> runs, std::span<const Budget> budgets, WorkerPool& pool)
      : trace_(trace),
        shape_(shape),
        runs_(runs),
        budgets_(budgets),
        pool_(pool),
        exact_(trace, pool),
        best_(shape),
        kept_(trace, shape, runs),
        heads_(trace.manifest().model.query_heads),
        samples_(runs.size() * heads_),
        overall_(runs.size()),
        layers_(runs.size(), std::vector<QualitySums>(trace.layers().size())) {}

  Status measure(Progress& progress) {
    const std::size_t steps = trace_.query_positions().size();
    for (std::size_t layer = 0; layer < trace_.layers().size(); ++layer) {
      exact_.move_to_layer(layer);
      KVTIER_RETURN_IF_ERROR(kept_.move_to_layer(static_cast<std::uint32_t>(layer)));
      for (std::uint32_t step = 0; step < steps; ++step) {
        KVTIER_RETURN_IF_ERROR(exact_.move_to_step(step));
        kept_.move_to_step(exact_.visible());
        measure_step(layer, step);
        progress.show("measuring", layer * steps + step, trace_.layers().size() * steps);
      }
    }
    return {};
  }

  std::vector<RunQuality> results() const {
    std::vector<RunQuality> results;
    for (std::size_t run = 0; run < runs_.size(); ++run) {
      RunQuality quality{.overall = overall_[run].figures(), .layers = {}};
      for (const QualitySums& sums : layers_[run]) quality.layers.push_back(sums.figures());
      results.push_back(std::move(quality));
    }
    return results;
  }

 private:
  /// Runs with one budget share one best choice.
  void choose_best() {
    best_spans_.clear();
    for (const Budget& budget : budgets_) {
      const auto tokens = static_cast<std::uint32_t>(budget.tokens(exact_.visible()));
      if (!best_spans_.contains(tokens)) best_spans_[tokens] = best_.choose(exact_, tokens);
    }
  }

  void measure_step(std::size_t layer, std::uint32_t step) {
    choose_best();
    const std::size_t index = step * trace_.layers().size() + layer;
    pool_.run(samples_.size(), [&](std::size_t i) {
      const std::size_t run = i / heads_;
      if (runs_[run].failed[index] != 0) return;
      samples_[i] = sample(run, static_cast<std::uint32_t>(i % heads_), index);
    });
    // In one order, whoever computed the samples.
    for (std::size_t run = 0; run < runs_.size(); ++run) {
      for (QualitySums* sums : {&overall_[run], &layers_[run][layer]}) {
        if (runs_[run].failed[index] != 0) {
          sums->add_failed_step();
          continue;
        }
        sums->add_step(runs_[run].tokens_attended[index], shape_.head_groups());
        for (std::size_t head = 0; head < heads_; ++head) sums->add(samples_[run * heads_ + head]);
      }
    }
  }

  HeadSample sample(std::size_t run, std::uint32_t head, std::size_t index) const {
    const std::uint32_t groups = shape_.head_groups();
    const std::uint32_t group = head / (shape_.queries_per_kv_head * shape_.heads_per_group);
    const std::span<const TokenSpan> attended = runs_[run].attended.spans(index * groups + group);
    const std::uint32_t visible = exact_.visible();
    const auto budget = static_cast<std::uint32_t>(budgets_[run].tokens(visible));
    const std::span<const TokenSpan> best = best_spans_.at(budget)[group];
    const FarRegion far = FarRegion::of(shape_, visible - 1);

    HeadSample sample;
    const double total = exact_.mass(head, 0, visible);
    sample.recall = mass_within(exact_, head, attended, 0, visible) / total;
    sample.best_recall = mass_within(exact_, head, best, 0, visible) / total;
    sample.far_found = mass_within(exact_, head, attended, far.begin, far.end);
    sample.best_far_found = mass_within(exact_, head, best, far.begin, far.end);
    sample.far_mass = exact_.mass(head, far.begin, far.end);
    for (const TokenSpan& span : evidence_of(trace_, visible - 1)) {
      const std::uint32_t end = std::min(span.end, visible);
      if (span.begin >= end) continue;
      sample.evidence_mass += exact_.mass(head, span.begin, end);
      sample.evidence_found += mass_within(exact_, head, attended, span.begin, end);
    }
    measure_errors(run, head, index, index * groups + group, sample);
    return sample;
  }

  bool attend(std::size_t run, std::uint32_t head, std::size_t set, std::span<float> out) const {
    const std::span<const TokenSpan> attended = runs_[run].attended.spans(set);
    const std::span<const TokenSpan> kept = runs_[run].attended.kept_spans(set);
    if (kept.empty()) return exact_.attend(head, attended, out);
    return exact_.attend_weighted(head, attended, kept_.weights(exact_, run, head, attended, kept),
                                  out);
  }

  void measure_errors(std::size_t run, std::uint32_t head, std::size_t index, std::size_t set,
                      HeadSample& sample) const {
    const std::size_t dim = trace_.manifest().model.value_dim;
    const std::span<const float> out =
        std::span(runs_[run].outs).subspan((index * heads_ + head) * dim, dim);
    std::vector<float> reference(dim);
    exact_.exact_out(head, reference);
    sample.output_error = relative_error(out, reference);
    if (attend(run, head, set, reference)) {
      const std::vector<float>& alone =
          runs_[run].attended_outs.empty() ? runs_[run].outs : runs_[run].attended_outs;
      sample.attended_error =
          relative_error(std::span(alone).subspan((index * heads_ + head) * dim, dim), reference);
    }
  }

  const AttentionTrace& trace_;
  const SelectorShape shape_;
  std::span<const RunRecord> runs_;
  std::span<const Budget> budgets_;
  WorkerPool& pool_;
  ExactAttention exact_;
  BestChoice best_;
  KeptKeys kept_;
  std::size_t heads_;
  std::map<std::uint32_t, std::vector<std::vector<TokenSpan>>> best_spans_;
  std::vector<HeadSample> samples_;  ///< [runs, query heads] of the current step.
  std::vector<QualitySums> overall_;
  std::vector<std::vector<QualitySums>> layers_;
};

}  // namespace

Result<std::vector<RunQuality>> measure_runs(const AttentionTrace& trace,
                                             const SelectorShape& shape,
                                             std::span<const RunRecord> runs,
                                             std::span<const Budget> budgets, WorkerPool& pool,
                                             Progress& progress) {
  Measurement measurement(trace, shape, runs, budgets, pool);
  KVTIER_RETURN_IF_ERROR(measurement.measure(progress));
  return measurement.results();
}

}  // namespace kvtier
