#pragma once

#include "selectors/families.h"
#include "selectors/far_selector.h"
#include "selectors/seen_tokens.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace kvtier {

/// A selector that knows where blocks lie and nothing of what is in them: the baselines. Keeps no
/// byte per token.
///
/// `Score` is copyable and has
///   `void operator()(const SelectRequest&, std::size_t head_group, std::uint32_t first_block,
///                    std::span<float> scores) const`,
/// which gives every block of the far region a score, larger being better.
template <class Score>
class PlaceScores final : public FarSelector {
 public:
  PlaceScores(const SelectorShape& shape, Score score)
      : FarSelector(shape),
        score_(std::move(score)),
        tokens_(shape.tokens_max),
        scores_(shape.tokens_max / shape.tokens_per_block + 1),
        order_(scores_.size()) {}

  void append(const NewTokens& tokens) override { tokens_.append(tokens); }
  void truncate(std::uint32_t position) override { tokens_.truncate(position); }

  std::unique_ptr<Selector> fork() const override { return std::make_unique<PlaceScores>(*this); }
  void save(StateWriter& writer) const override { tokens_.save(writer); }
  Status restore(StateReader& reader) override { return tokens_.restore(reader); }
  std::size_t metadata_bytes() const override { return 0; }

 private:
  std::uint32_t tokens_seen() const override { return tokens_.count(); }
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool&) override {
    const std::uint32_t per_block = shape().tokens_per_block;
    const std::span scores(scores_.data(), block_count(question.region, per_block));
    for (std::size_t group = 0; group < selection.size(); ++group) {
      score_(question.request, group, question.region.begin / per_block, scores);
      rank_blocks({.scores = scores,
                   .always = {},
                   .region = question.region,
                   .tokens_per_block = per_block,
                   .far_budget_tokens = far_budget_tokens(shape(), question.request),
                   .band_tokens = question.request.band_tokens},
                  order_, selection[group]);
    }
    return {};
  }

  Score score_;
  SeenTokens tokens_;
  std::vector<float> scores_;
  std::vector<std::uint32_t> order_;
};

/// The family's `make` for a score that needs nothing but the block's number.
template <class Score>
Status make_place_scores(const SelectorRecipe&, SelectorFactory& factory) {
  factory.make = [](const SelectorShape& shape, LayerIndex) {
    return Result<std::unique_ptr<Selector>>(std::make_unique<PlaceScores<Score>>(shape, Score()));
  };
  return {};
}

}  // namespace kvtier
