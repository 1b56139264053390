#pragma once

#include "tools/replay/replay_measure.h"

#include <cstdint>
#include <optional>
#include <vector>

namespace kvtier {

/// What one query head found at one step.
struct HeadSample {
  double recall = 0;
  double best_recall = 0;
  double far_found = 0;
  double best_far_found = 0;
  double far_mass = 0;
  double evidence_found = 0;
  double evidence_mass = 0;
  double output_error = 0;
  /// None when the attended mass was too small to tell.
  std::optional<double> attended_error;
};

/// Samples of a run on their way to figures. Adding in one order gives equal bits.
class QualitySums {
 public:
  void add(const HeadSample& sample);
  void add_step(std::uint64_t tokens_attended, std::uint32_t head_groups);
  void add_failed_step() { ++failed_steps_; }

  QualityFigures figures() const;

 private:
  std::uint64_t failed_steps_ = 0;
  std::uint64_t tokens_ = 0;
  std::uint64_t groups_ = 0;
  std::vector<double> recalls_;
  std::vector<double> best_recalls_;
  std::vector<double> output_errors_;
  std::vector<double> attended_errors_;
  double far_found_ = 0;
  double best_far_found_ = 0;
  double far_mass_ = 0;
  double evidence_found_ = 0;
  double evidence_mass_ = 0;
};

}  // namespace kvtier
