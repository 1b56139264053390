#include "tools/profile/head_profile.h"

#include "tools/replay/exact_attention.h"
#include "tools/trace/head_classes.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <span>

namespace kvtier {
namespace {

/// The evidence of the question that the query at `position` answers; none outside of answers.
std::span<const TokenSpan> evidence_at(const AttentionTrace& trace, std::uint32_t position) {
  // The query of a question's last token predicts the answer's first.
  const TraceTurn* turn = trace.turn_at(position + 1);
  if (turn == nullptr || position + 1 < turn->answer_start) return {};
  return turn->evidence;
}

/// What one query head did, step by step.
struct QueryHead {
  std::vector<double> far;
  std::vector<double> evidence;
};

double mean_of(std::span<const double> values) {
  double sum = 0.0;
  for (double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

/// The smallest value that at most one in twenty exceeds.
double high_of(std::vector<double> values) {
  const std::size_t rank = values.size() - 1 - values.size() / 20;
  std::ranges::nth_element(values, values.begin() + static_cast<std::ptrdiff_t>(rank));
  return values[rank];
}

HeadFigures figures_of(std::span<const QueryHead> heads, const HeadProfileOptions& options) {
  HeadFigures figures;
  for (const QueryHead& head : heads) {
    figures.far_mass = std::max(figures.far_mass, mean_of(head.far));
    figures.far_mass_high = std::max(figures.far_mass_high, high_of(head.far));
    if (head.evidence.empty()) continue;
    figures.evidence_mass = std::max(figures.evidence_mass.value_or(0.0), mean_of(head.evidence));
  }
  const bool by_evidence = options.rule == HeadProfileOptions::Rule::kEvidence;
  const double mass = by_evidence ? figures.evidence_mass.value_or(0.0) : figures.far_mass;
  figures.retrieval = mass >= options.threshold;
  return figures;
}

void add_step(const AttentionTrace& trace, const ExactAttention& exact, std::uint32_t position,
              const SelectorShape& held, std::span<QueryHead> heads) {
  const FarRegion far = FarRegion::of(held, position);
  const std::span<const TokenSpan> evidence = evidence_at(trace, position);
  for (std::uint32_t head = 0; head < heads.size(); ++head) {
    heads[head].far.push_back(exact.mass(head, far.begin, far.end));
    if (evidence.empty()) continue;
    double mass = 0.0;
    for (const TokenSpan& span : evidence) mass += exact.mass(head, span.begin, span.end);
    heads[head].evidence.push_back(mass);
  }
}

}  // namespace

Result<HeadProfile> profile_heads(const AttentionTrace& trace, const HeadProfileOptions& options,
                                  WorkerPool& pool, Progress& progress) {
  const TraceModel& model = trace.manifest().model;
  SelectorShape held;
  held.sinks = options.sinks;
  held.window = options.window;
  const auto& positions = trace.query_positions();
  if (options.rule == HeadProfileOptions::Rule::kEvidence &&
      std::ranges::none_of(positions, [&trace](std::uint32_t position) {
        return !evidence_at(trace, position).empty();
      })) {
    return invalid_argument(trace.manifest_path() +
                            ": names no evidence for the steps of its answers; tell heads apart by "
                            "far mass instead");
  }
  ExactAttention exact(trace, pool);
  HeadProfile profile;
  for (std::size_t layer = 0; layer < trace.layers().size(); ++layer) {
    exact.move_to_layer(layer);
    std::vector<QueryHead> heads(model.query_heads);
    for (std::uint32_t step = 0; step < positions.size(); ++step) {
      KVTIER_RETURN_IF_ERROR(exact.move_to_step(step));
      add_step(trace, exact, positions[step], held, heads);
      progress.show("measuring", layer * positions.size() + step,
                    trace.layers().size() * positions.size());
    }
    profile.layers.push_back(trace.layers()[layer].number);
    profile.heads.emplace_back();
    const std::uint32_t per_head = model.query_heads / model.kv_heads;
    for (std::uint32_t head = 0; head < model.kv_heads; ++head) {
      profile.heads.back().push_back(
          figures_of(std::span(heads).subspan(std::size_t{head} * per_head, per_head), options));
    }
  }
  return profile;
}

std::string_view rule_name(HeadProfileOptions::Rule rule) {
  return rule == HeadProfileOptions::Rule::kFarMass ? "far-mass" : "evidence";
}

std::string head_classes_json(const HeadProfile& profile, const HeadProfileOptions& options,
                              const AttentionTrace& trace) {
  nlohmann::ordered_json json = {{"schema", kHeadClassesSchema},
                                 {"version", 1},
                                 {"model", trace.manifest().model.name},
                                 {"trace", trace.digest()},
                                 {"sinks", options.sinks},
                                 {"window", options.window},
                                 {"by", rule_name(options.rule)},
                                 {"threshold", options.threshold},
                                 {"layers", profile.layers},
                                 {"retrieval", nlohmann::ordered_json::array()}};
  for (const std::vector<HeadFigures>& layer : profile.heads) {
    std::vector<bool> retrieval;
    for (const HeadFigures& head : layer) retrieval.push_back(head.retrieval);
    json["retrieval"].push_back(retrieval);
  }
  return json.dump(1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace kvtier
