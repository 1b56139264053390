#include "kernels/top_k.h"
#include "selectors/families.h"
#include "selectors/far_selector.h"
#include "selectors/group_scores.h"
#include "selectors/seen_tokens.h"
#include "selectors/step_logits.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

namespace kvtier {
namespace {

/// Trained landmark tokens (Landmark Attention, 2305.16300): the tokens marked `kIsLandmark` each
/// close a block that begins behind the landmark before, and a landmark's key stands for its block.
/// A block's score is the first factor of the grouped softmax: the weight of its landmark among all
/// landmarks. Works as published only for models trained with such tokens.
///
/// Where it leaves the paper. There the tokens of the query's own block share the softmax with the
/// landmarks; they scale all weights of a query head alike and are left out. The paper's finest
/// choice is per query head, here the heads that share a KV head choose together, as the shape's
/// reduction says. Keys are compared as they come, after RoPE at true positions, where the paper
/// gives all blocks but the last few one position ("stingy" positions). What is attended is
/// attended with the plain softmax, landmarks included.
///
/// The query's own block, which has no landmark that the query sees, is always attended in the
/// paper. Its far tokens, if the window is shorter than the block, come first here, newest first,
/// with the best landmark's score.
class LandmarkTokens final : public FarSelector {
 public:
  explicit LandmarkTokens(const SelectorShape& shape)
      : FarSelector(shape),
        row_bytes_(shape.head_dim * size_of(shape.dtype)),
        tokens_(shape.tokens_max),
        logits_(shape, shape.kv_heads, 0),
        views_(shape.kv_heads),
        groups_(shape.head_groups()) {
    // The paper has a landmark behind every 50 tokens. Where there are more, `append` makes room.
    reserve(shape.tokens_max / 8 + 16);
  }

  void append(const NewTokens& tokens) override {
    tokens_.append(tokens);
    if (tokens.marks == nullptr) return;
    for (std::uint32_t t = 0; t < tokens.tokens; ++t) {
      if ((tokens.marks[t] & kIsLandmark) == 0) continue;
      if (ends_.size() == capacity_) reserve(2 * capacity_);
      ends_.push_back(tokens.first_position + t + 1);
      for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
        const std::byte* key =
            tokens.keys + t * tokens.key_token_stride + head * tokens.key_head_stride;
        keys_.insert(keys_.end(), key, key + row_bytes_);
      }
    }
  }

  void truncate(std::uint32_t position) override {
    tokens_.truncate(position);
    while (!ends_.empty() && ends_.back() > position) ends_.pop_back();
    keys_.resize(ends_.size() * landmark_bytes());
  }

  std::unique_ptr<Selector> fork() const override {
    auto copy = std::make_unique<LandmarkTokens>(*this);
    copy->reserve(capacity_);
    return copy;
  }
  void save(StateWriter& writer) const override {
    tokens_.save(writer);
    writer.put_array(std::span(ends_));
    writer.put_array(std::span(keys_));
  }
  Status restore(StateReader& reader) override {
    KVTIER_RETURN_IF_ERROR(tokens_.restore(reader));
    KVTIER_RETURN_IF_ERROR(reader.get_vector(ends_, tokens_.count()));
    KVTIER_RETURN_IF_ERROR(reader.get_vector(keys_, ends_.size() * landmark_bytes()));
    std::uint32_t last = 0;
    for (std::uint32_t end : ends_) {
      if (end <= last || end > tokens_.count()) {
        return corrupt(fmt::format("selector state: found a landmark's block [{}, {}) of {} tokens",
                                   last, end, tokens_.count()));
      }
      last = end;
    }
    if (keys_.size() != ends_.size() * landmark_bytes()) {
      return corrupt(fmt::format("selector state: found {} bytes of keys for {} landmarks",
                                 keys_.size(), ends_.size()));
    }
    reserve(std::max(capacity_, ends_.size()));
    return {};
  }

  std::size_t metadata_bytes() const override {
    return ends_.size() * (landmark_bytes() + sizeof(std::uint32_t));
  }

 private:
  std::uint32_t tokens_seen() const override { return tokens_.count(); }
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override;

  /// Scratch of one head group.
  struct Group {
    std::vector<float> scores;
    std::vector<float> head_scores;
    std::vector<std::uint32_t> order;
    std::vector<RankedRange> ranges;
    bool finite = true;
  };
  /// What the workers share in one call of `select`.
  struct Step {
    const SelectRequest& request;
    std::span<GroupSelection> selection;
    FarRegion region;
    std::size_t first = 0;  ///< Landmarks [first, first + count) have blocks in the region.
    std::size_t count = 0;
    std::uint32_t own_begin = 0;  ///< Far tokens from here on have no landmark.
  };

  std::size_t landmark_bytes() const { return shape().kv_heads * row_bytes_; }
  std::uint32_t begin_of(std::size_t landmark) const {
    return landmark == 0 ? 0 : ends_[landmark - 1];
  }
  void reserve(std::size_t landmarks);
  void select_group(const Step& step, std::uint32_t head_group);

  std::size_t row_bytes_;
  SeenTokens tokens_;
  std::size_t capacity_ = 0;
  std::vector<std::uint32_t> ends_;  ///< Behind each landmark, ascending.
  std::vector<std::byte> keys_;      ///< [landmarks, KV heads, head_dim]
  StepLogits logits_;
  std::vector<RowsView> views_;
  std::vector<Group> groups_;
};

void LandmarkTokens::reserve(std::size_t landmarks) {
  capacity_ = landmarks;
  // A landmark's block begins and ends a piece at most.
  set_units_max(shape().tokens_max / shape().tokens_per_block + 2 * capacity_ + 4);
  ends_.reserve(landmarks);
  keys_.reserve(landmarks * landmark_bytes());
  logits_ = StepLogits(shape(), shape().kv_heads, static_cast<std::uint32_t>(landmarks));
  for (Group& group : groups_) {
    group.scores.resize(landmarks);
    group.head_scores.resize(landmarks);
    group.order.resize(landmarks);
    group.ranges.reserve(landmarks + shape().tokens_max / shape().tokens_per_block + 2);
  }
}

Status LandmarkTokens::answer(const Question& question, std::span<GroupSelection> selection,
                              WorkerPool& pool) {
  const auto& [request, region, learns] = question;
  const auto first = std::ranges::upper_bound(ends_, region.begin);
  // Landmarks that the first query sees; of those, the last whose block is still far.
  auto end = std::ranges::upper_bound(ends_, request.first_position + 1);
  while (end > first && begin_of(static_cast<std::size_t>(end - ends_.begin()) - 1) >= region.end) {
    --end;
  }
  Step step{.request = request,
            .selection = selection,
            .region = region,
            .first = static_cast<std::size_t>(first - ends_.begin()),
            .count = end > first ? static_cast<std::size_t>(end - first) : 0};
  step.own_begin = step.count == 0 ? region.begin : std::min(*(end - 1), region.end);
  for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
    views_[head] = {keys_.data() + step.first * landmark_bytes() + head * row_bytes_, step.count,
                    shape().head_dim, landmark_bytes(), shape().dtype};
  }
  KVTIER_RETURN_IF_ERROR(logits_.compute(request, 0, views_, pool));
  pool.run(groups_.size(),
           [this, &step](std::size_t i) { select_group(step, static_cast<std::uint32_t>(i)); });
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    if (groups_[i].finite) continue;
    return invalid_argument(
        fmt::format("landmark-token: scores of head group {} at position {} overflow float32", i,
                    request.first_position));
  }
  return {};
}

void LandmarkTokens::select_group(const Step& step, std::uint32_t head_group) {
  Group& group = groups_[head_group];
  const std::span scores(group.scores.data(), step.count);
  const GroupLogits logits = {
      .logits = logits_.all_rows(std::size_t{head_group} * shape().heads_per_group).data(),
      .head_stride = logits_.head_stride(),
      .row_stride = logits_.row_stride(),
      .query_count = step.request.query_count,
      .left_out = {},
      .first = 0};
  group.finite = reduce_logits(shape(), logits, group.head_scores, scores);
  if (!group.finite) return;
  const std::span<const std::uint32_t> order = top_k(scores, scores.size(), group.order);
  group.ranges.clear();
  const float best = order.empty() ? 0.0f : scores[order[0]];
  for (std::uint32_t end = step.region.end; end > step.own_begin;) {
    const std::uint32_t block_begin =
        (end - 1) / shape().tokens_per_block * shape().tokens_per_block;
    const std::uint32_t begin = std::max(block_begin, step.own_begin);
    group.ranges.push_back({begin, end, best});
    end = begin;
  }
  for (std::uint32_t i : order) {
    const std::size_t landmark = step.first + i;
    group.ranges.push_back({std::max(begin_of(landmark), step.region.begin),
                            std::min(ends_[landmark], step.region.end), scores[i]});
  }
  rank_ranges(group.ranges, shape().tokens_per_block, far_budget_tokens(shape(), step.request),
              step.request.band_tokens, step.selection[head_group]);
}

}  // namespace

const SelectorFamily& landmark_token_family() {
  static const SelectorFamily kFamily = {
      .name = "landmark-token",
      .summary = "blocks that trained landmark tokens close, by the landmarks' softmax",
      .source = "Landmark Attention, 2305.16300",
      .partial_blocks = true,
      .needs = {.landmark_tokens = true},
      .metadata = "2 head_dim B per landmark",
      .build_cost = "a copy of the landmarks' keys",
      .step_cost = "O(landmarks * head_dim)",
      .make = [](const SelectorRecipe&, SelectorFactory& factory) -> Status {
        factory.make = [](const SelectorShape& shape, LayerIndex) {
          return Result<std::unique_ptr<Selector>>(std::make_unique<LandmarkTokens>(shape));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
