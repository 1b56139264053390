#include "tools/replay/quality_sums.h"

#include "tools/replay/samples.h"

#include <algorithm>

namespace kvtier {
namespace {

std::optional<double> quotient(double part, double whole) {
  if (!(whole > 0)) return std::nullopt;
  return part / whole;
}

std::optional<ErrorSummary> summarise_errors(const std::vector<double>& samples) {
  if (samples.empty()) return std::nullopt;
  return ErrorSummary{.mean = *mean_of(samples), .max = *std::ranges::max_element(samples)};
}

}  // namespace

void QualitySums::add(const HeadSample& sample) {
  recalls_.push_back(sample.recall);
  best_recalls_.push_back(sample.best_recall);
  output_errors_.push_back(sample.output_error);
  if (sample.attended_error) attended_errors_.push_back(*sample.attended_error);
  far_found_ += sample.far_found;
  best_far_found_ += sample.best_far_found;
  far_mass_ += sample.far_mass;
  evidence_found_ += sample.evidence_found;
  evidence_mass_ += sample.evidence_mass;
}

void QualitySums::add_step(std::uint64_t tokens_attended, std::uint32_t head_groups) {
  tokens_ += tokens_attended;
  groups_ += head_groups;
}

QualityFigures QualitySums::figures() const {
  QualityFigures figures;
  figures.failed_steps = failed_steps_;
  figures.tokens_attended_mean =
      quotient(static_cast<double>(tokens_), static_cast<double>(groups_));
  if (!recalls_.empty()) {
    std::vector<double> sorted = recalls_;
    std::ranges::sort(sorted);
    figures.recall = ShareSummary{
        .mean = *mean_of(recalls_), .p5 = *quantile_of_sorted(sorted, 0.05), .min = sorted.front()};
    figures.recall_ratio = quotient(figures.recall->mean, *mean_of(best_recalls_));
  }
  figures.recall_long_range = quotient(far_found_, far_mass_);
  if (figures.recall_long_range) {
    figures.recall_long_range_ratio =
        quotient(*figures.recall_long_range, best_far_found_ / far_mass_);
  }
  figures.evidence_recall = quotient(evidence_found_, evidence_mass_);
  figures.output_error = summarise_errors(output_errors_);
  figures.attended_error = summarise_errors(attended_errors_);
  return figures;
}

}  // namespace kvtier
