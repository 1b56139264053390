#pragma once

#include "selectors/activation_stats.h"
#include "selectors/key_frame.h"
#include "selectors/question_log.h"
#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// One query for all queries of a step, each weighted by how unusual it is for this sequence and
/// layer (ActQKV's probe). One query is its own probe, to the bit.
///
/// What is usual: windows of 256 observed prompt positions (or what was observed of each), then one
/// window per step. The statistics before each of the last nine steps are kept, so that a cut goes
/// back to them; a deeper one goes back to the prompt's. A cut does not take the prompt's back.
/// Prompt queries observed after a step (another turn) start from what the steps have taught.
///
/// Allocates when made. One thread at a time.
class ProbeQuery {
 public:
  /// `channels`: elements of all query heads of a position.
  explicit ProbeQuery(std::size_t channels);

  void observe(const PromptQueries& queries, KeyFrame& frame);
  /// The probe of a step, in `frame`: valid until the next call. Learns nothing from a guess.
  std::span<const float> make(const SelectRequest& request, KeyFrame& frame, bool learns);
  /// What `make` returned last.
  std::span<const float> query() const { return probe_; }
  void drop_from(std::uint32_t position) { steps_.drop_from(position); }

  void save(StateWriter& writer) const;
  Status restore(StateReader& reader);
  std::size_t bytes() const {
    return steps_.bytes() + channels_ * (2 * sizeof(float) + 2 * sizeof(double));
  }

 private:
  void load_stats();

  std::size_t channels_;
  ActivationStats prompt_;
  ActivationWindow window_;
  std::uint32_t window_index_ = 0;
  ActivationStats stats_;  ///< Scratch: what is known before the step.
  QuestionLog steps_;      ///< [mean, variance] after each step; the number counts windows.
  std::vector<float> turned_;
  std::vector<float> probe_;
  std::vector<float> mean_;
  std::vector<float> variance_;
};

}  // namespace kvtier
