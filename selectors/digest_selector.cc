#include "selectors/digest_selector.h"

#include "selectors/far_selector.h"
#include "selectors/group_scores.h"
#include "selectors/recent_keys.h"
#include "selectors/step_logits.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace kvtier {
namespace {

/// A shape whose heads are as long as the digest's rows: what `StepLogits` sees.
SelectorShape with_head_dim(SelectorShape shape, std::uint32_t dim) {
  shape.head_dim = dim;
  return shape;
}

class DigestSelector final : public FarSelector {
 public:
  DigestSelector(const SelectorShape& shape, std::uint32_t group_tokens,
                 std::unique_ptr<GroupDigest> digest)
      : FarSelector(shape),
        row_dim_(digest->row_dim()),
        row_bytes_(row_dim_ * size_of(shape.dtype)),
        digest_(std::move(digest)),
        recent_(shape, group_tokens),
        rows_(std::size_t{shape.kv_heads} * recent_.groups_max() * row_bytes_),
        logits_(with_head_dim(shape, row_dim_), shape.kv_heads, recent_.groups_max()),
        views_(shape.kv_heads),
        groups_(shape.head_groups()) {
    const std::size_t blocks_max = shape.tokens_max / shape.tokens_per_block + 1;
    for (Group& group : groups_) {
      group.scores.resize(recent_.groups_max());
      group.head_scores.resize(recent_.groups_max());
      group.block_scores.resize(blocks_max);
      group.order.resize(blocks_max);
    }
  }
  DigestSelector(const DigestSelector& other)
      : FarSelector(other),
        row_dim_(other.row_dim_),
        row_bytes_(other.row_bytes_),
        digest_(other.digest_->clone()),
        recent_(other.recent_),
        rows_(other.rows_),
        logits_(other.logits_),
        views_(other.views_),
        questions_(other.questions_),
        groups_(other.groups_) {}

  void append(const NewTokens& tokens) override {
    recent_.append(tokens, [this](std::uint32_t group) { digest_group(group); });
  }
  void truncate(std::uint32_t position) override { recent_.truncate(position); }
  std::uint32_t truncate_floor(std::uint32_t position) const override {
    return recent_.truncate_floor(position);
  }

  std::unique_ptr<Selector> fork() const override {
    return std::make_unique<DigestSelector>(*this);
  }
  void save(StateWriter& writer) const override {
    recent_.save(writer);
    for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
      writer.put_array(rows_.part(offset(head, 0), recent_.closed() * row_bytes_));
    }
  }
  Status restore(StateReader& reader) override {
    KVTIER_RETURN_IF_ERROR(recent_.restore(reader));
    for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
      KVTIER_RETURN_IF_ERROR(
          reader.get_exactly(rows_.part(offset(head, 0), recent_.closed() * row_bytes_)));
    }
    return {};
  }
  std::size_t metadata_bytes() const override {
    return std::size_t{recent_.closed()} * shape().kv_heads * row_bytes_ + recent_.metadata_bytes();
  }

 private:
  /// Scratch of one head group.
  struct Group {
    std::vector<float> scores;
    std::vector<float> head_scores;
    std::vector<float> block_scores;
    std::vector<std::uint32_t> order;
    bool finite = true;
  };
  /// What the workers share in one call of `select`.
  struct Step {
    const SelectRequest& request;
    std::span<GroupSelection> selection;
    FarRegion region;
    std::uint32_t first_group = 0;
    std::uint32_t groups = 0;
  };

  std::uint32_t tokens_seen() const override { return recent_.tokens(); }
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override;

  std::size_t offset(std::uint32_t head, std::uint32_t group) const {
    return (std::size_t{head} * recent_.groups_max() + group) * row_bytes_;
  }
  void digest_group(std::uint32_t group);
  SelectRequest questions_of(const SelectRequest& request);
  void select_group(const Step& step, std::uint32_t head_group);
  void score_blocks(const Step& step, Group& group, std::span<float> blocks) const;

  std::uint32_t row_dim_;
  std::size_t row_bytes_;
  std::unique_ptr<GroupDigest> digest_;
  RecentKeys recent_;
  FixedArray<std::byte> rows_;  ///< [KV heads, groups_max, row_dim]
  StepLogits logits_;
  std::vector<RowsView> views_;
  std::vector<float> questions_;  ///< [queries, query heads, row_dim]
  std::vector<Group> groups_;
};

void DigestSelector::digest_group(std::uint32_t group) {
  for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
    const RowsView keys = recent_.keys_of(head, group);
    std::byte* row = rows_.data() + offset(head, group);
    if (keys.rows == 0) {
      std::memset(row, 0, row_bytes_);  // Sinks only: never ranked.
    } else {
      digest_->write_row(keys, recent_.first_token(group), row);
    }
  }
}

SelectRequest DigestSelector::questions_of(const SelectRequest& request) {
  const std::size_t stride = std::size_t{shape().query_heads()} * row_dim_;
  if (questions_.size() < request.query_count * stride) {
    questions_.resize(request.query_count * stride);
  }
  for (std::uint32_t q = 0; q < request.query_count; ++q) {
    for (std::uint32_t head = 0; head < shape().query_heads(); ++head) {
      const std::span query(
          request.queries + q * request.query_stride + std::size_t{head} * shape().head_dim,
          shape().head_dim);
      digest_->write_question(query, request.first_position + q,
                              questions_.data() + q * stride + std::size_t{head} * row_dim_);
    }
  }
  SelectRequest asked = request;
  asked.queries = questions_.data();
  asked.query_stride = stride;
  return asked;
}

Status DigestSelector::answer(const Question& question, std::span<GroupSelection> selection,
                              WorkerPool& pool) {
  const auto& [request, region, learns] = question;
  const std::uint32_t per_group = recent_.group_tokens();
  const std::uint32_t first = region.begin / per_group;
  const std::uint32_t end = (region.end - 1) / per_group + 1;
  Step step{request, selection, region, first, end - first};
  if (end > recent_.closed()) digest_group(recent_.closed());
  for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
    views_[head] = {rows_.data() + offset(head, first), step.groups, row_dim_, row_bytes_,
                    shape().dtype};
  }
  KVTIER_RETURN_IF_ERROR(logits_.compute(questions_of(request), 0, views_, pool));
  pool.run(groups_.size(),
           [this, &step](std::size_t i) { select_group(step, static_cast<std::uint32_t>(i)); });
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    if (groups_[i].finite) continue;
    return invalid_argument(
        fmt::format("landmarks: scores of head group {} at position {} overflow float32", i,
                    request.first_position));
  }
  return {};
}

void DigestSelector::select_group(const Step& step, std::uint32_t head_group) {
  Group& group = groups_[head_group];
  const GroupLogits logits = {
      .logits = logits_.all_rows(std::size_t{head_group} * shape().heads_per_group).data(),
      .head_stride = logits_.head_stride(),
      .row_stride = logits_.row_stride(),
      .query_count = step.request.query_count,
      .left_out = {},
      .first = 0};
  group.finite = reduce_logits(shape(), logits, group.head_scores,
                               std::span(group.scores.data(), step.groups));
  if (!group.finite) return;
  const std::span blocks(group.block_scores.data(),
                         block_count(step.region, shape().tokens_per_block));
  score_blocks(step, group, blocks);
  rank_blocks({.scores = blocks,
               .always = {},
               .region = step.region,
               .tokens_per_block = shape().tokens_per_block,
               .far_budget_tokens = far_budget_tokens(shape(), step.request),
               .band_tokens = step.request.band_tokens},
              group.order, step.selection[head_group]);
}

void DigestSelector::score_blocks(const Step& step, Group& group, std::span<float> blocks) const {
  const std::uint32_t per_group = recent_.group_tokens();
  const std::uint32_t per_block = shape().tokens_per_block;
  // Both ends walk along the context: a division per block would cost more than the rest.
  const float* best = group.scores.data();
  std::uint32_t group_end = (step.first_group + 1) * per_group;
  std::uint32_t block_end = (step.region.begin / per_block + 1) * per_block;
  for (float& score : blocks) {
    const std::uint32_t end = std::min(block_end, step.region.end);
    score = *best;
    for (; group_end < end; group_end += per_group) score = std::max(score, *++best);
    if (group_end == end) {
      group_end += per_group;
      ++best;
    }
    block_end += per_block;
  }
}

}  // namespace

std::unique_ptr<Selector> make_digest_selector(const SelectorShape& shape,
                                               std::uint32_t group_tokens,
                                               std::unique_ptr<GroupDigest> digest) {
  return std::make_unique<DigestSelector>(shape, group_tokens, std::move(digest));
}

}  // namespace kvtier
