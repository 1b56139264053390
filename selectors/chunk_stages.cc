#include "selectors/chunk_stages.h"

#include "kernels/score_rows.h"
#include "kernels/top_k.h"
#include "selectors/group_scores.h"

#include <fmt/format.h>

#include <algorithm>

namespace kvtier {
namespace {

/// Budgets that grow with the context grow slowly; a result should do for those of its time.
std::uint32_t with_slack(std::uint32_t tokens) { return tokens + std::max(tokens / 16, 16u); }

}  // namespace

ChunkStages::ChunkStages(const SelectorShape& shape, std::span<const ChunkStage> stages)
    : shape_(shape), stages_(stages.begin(), stages.end()) {
  const std::size_t most = chunks_max(stages_.size() - 1);
  chunks_.reserve(most);
  for (auto* array : {&left_, &ends_, &middle_, &order_}) array->resize(most);
  for (auto* array : {&left_scores_, &scores_, &head_scores_}) array->resize(most);
}

std::size_t ChunkStages::chunks_max(std::size_t stage) const {
  return shape_.tokens_max / stages_[stage].chunk_tokens + 2;
}

StageResults ChunkStages::blank() const {
  StageResults results;
  results.stages.resize(stages_.size());
  reserve(results);
  return results;
}

void ChunkStages::reserve(StageResults& results) const {
  for (std::size_t s = 0; s < stages_.size(); ++s) results.stages[s].chunks.reserve(chunks_max(s));
  results.stages.back().scores.reserve(chunks_max(stages_.size() - 1));
}

Status ChunkStages::run(std::span<const RowsView> keys, const Question& question,
                        StageResults& results, bool& changed) {
  changed = false;
  rows_ = std::size_t{question.request.query_count} * shape_.queries_per_kv_head;
  if (rows_ > rows_max_) {
    questions_.resize(rows_ * shape_.head_dim);
    logits_.resize(shape_.heads_per_group * rows_ * chunks_max(stages_.size() - 1));
    rows_max_ = rows_;
  }
  const std::uint32_t position = question.request.first_position;
  for (std::size_t s = 0; s < stages_.size(); ++s) {
    StageResults::Stage& result = results.stages[s];
    const bool holds = !changed && result.enough_for > 0 && result.position <= position &&
                       position - result.position < stages_[s].refresh &&
                       result.region_end <= question.region.end &&
                       result.enough_for >= question.wanted_tokens;
    if (holds) continue;
    changed = true;
    list_candidates(question, results, s);
    KVTIER_RETURN_IF_ERROR(score_candidates(keys, question, stages_[s].chunk_tokens));
    keep_best(question, s, result);
  }
  return {};
}

/// Chunks of the stage's size in what survived the stage before, and of what has come into the
/// region since.
void ChunkStages::list_candidates(const Question& question, const StageResults& results,
                                  std::size_t stage) {
  const std::uint32_t size = stages_[stage].chunk_tokens;
  const std::uint32_t first = question.region.begin / size;
  const std::uint32_t end = (question.region.end - 1) / size + 1;
  chunks_.clear();
  std::uint32_t unseen = first;
  if (stage > 0) {
    const StageResults::Stage& before = results.stages[stage - 1];
    unseen = before.region_end == question.region.end ? end : before.region_end / size;
    const std::uint32_t parts = stages_[stage - 1].chunk_tokens / size;
    for (std::uint32_t chunk : before.chunks) {
      for (std::uint32_t part = chunk * parts; part < (chunk + 1) * parts; ++part) {
        if (part >= first && part < unseen) chunks_.push_back(part);
      }
    }
  }
  for (std::uint32_t chunk = std::max(first, unseen); chunk < end; ++chunk) {
    chunks_.push_back(chunk);
  }
}

Status ChunkStages::score_candidates(std::span<const RowsView> keys, const Question& question,
                                     std::uint32_t chunk_tokens) {
  for (std::size_t head = 0; head < shape_.heads_per_group; ++head) {
    KVTIER_RETURN_IF_ERROR(descend(keys[head], question, head, chunk_tokens));
  }
  const GroupLogits logits = {.logits = logits_.data(),
                              .head_stride = rows_ * chunks_max(stages_.size() - 1),
                              .row_stride = chunks_max(stages_.size() - 1),
                              .query_count = question.request.query_count,
                              .left_out = {},
                              .first = 0};
  if (reduce_logits(shape_, logits, head_scores_, std::span(scores_.data(), chunks_.size()))) {
    return {};
  }
  return invalid_argument(
      fmt::format("hierarchical: scores of head group {} at position {} overflow float32",
                  question.head_group, question.request.first_position));
}

/// Leaves the logits of each candidate's key for one KV head.
Status ChunkStages::descend(const RowsView& keys, const Question& question, std::size_t head,
                            std::uint32_t chunk_tokens) {
  const std::size_t count = chunks_.size();
  const std::size_t stride = chunks_max(stages_.size() - 1);
  const auto largest = [&](std::size_t i) {
    const float* column = logits_of(head) + i;
    float most = column[0];
    for (std::size_t row = 1; row < rows_; ++row) most = std::max(most, column[row * stride]);
    return most;
  };
  for (std::size_t i = 0; i < count; ++i) {
    left_[i] = std::max(chunks_[i] * chunk_tokens, question.region.begin);
    ends_[i] = std::min((chunks_[i] + 1) * chunk_tokens, question.region.end);
  }
  KVTIER_RETURN_IF_ERROR(look_at(keys, question, head, std::span(left_.data(), count)));
  if (chunk_tokens == 1) return {};
  for (std::size_t i = 0; i < count; ++i) left_scores_[i] = largest(i);
  for (std::uint32_t size = chunk_tokens; size > 1; size = (size + 1) / 2) {
    for (std::size_t i = 0; i < count; ++i) {
      middle_[i] = left_[i] + (ends_[i] - left_[i] + 1) / 2;
      // One token left: it is compared with itself.
      if (middle_[i] >= ends_[i]) middle_[i] = left_[i];
    }
    KVTIER_RETURN_IF_ERROR(look_at(keys, question, head, std::span(middle_.data(), count)));
    for (std::size_t i = 0; i < count; ++i) {
      const float score = largest(i);
      if (score > left_scores_[i]) {
        left_[i] = middle_[i];
        left_scores_[i] = score;
      } else if (middle_[i] > left_[i]) {
        ends_[i] = middle_[i];
      }
    }
  }
  return look_at(keys, question, head, std::span(left_.data(), count));
}

/// Logits of the listed tokens' keys for every query of the KV head.
Status ChunkStages::look_at(const RowsView& keys, const Question& question, std::size_t head,
                            std::span<const std::uint32_t> tokens) {
  const std::size_t dim = shape_.head_dim;
  const std::size_t per_query = shape_.queries_per_kv_head * dim;
  const std::size_t first_head = std::size_t{question.head_group} * shape_.heads_per_group + head;
  for (std::uint32_t q = 0; q < question.request.query_count; ++q) {
    std::copy_n(
        question.request.queries + q * question.request.query_stride + first_head * per_query,
        per_query, questions_.data() + q * per_query);
  }
  if (tokens.empty()) return {};
  return score_rows(shape_.softmax, {.rows = keys,
                                     .queries = questions_.data(),
                                     .query_stride = dim,
                                     .query_count = static_cast<std::uint32_t>(rows_),
                                     .logits = logits_of(head),
                                     .logit_stride = chunks_max(stages_.size() - 1),
                                     .listed = tokens});
}

void ChunkStages::keep_best(const Question& question, std::size_t stage,
                            StageResults::Stage& result) {
  const std::uint32_t size = stages_[stage].chunk_tokens;
  const bool last = stage + 1 == stages_.size();
  const std::uint32_t wanted = with_slack(question.wanted_tokens);
  result.position = question.request.first_position;
  result.region_end = question.region.end;
  result.enough_for = wanted;
  if (last) {
    result.chunks.assign(chunks_.begin(), chunks_.end());
    result.scores.assign(scores_.begin(),
                         scores_.begin() + static_cast<std::ptrdiff_t>(chunks_.size()));
    return;
  }
  // Two chunks may be cut by the region's edges.
  const std::size_t keep = std::max(stages_[stage].keep_tokens, wanted) / size + 3;
  const std::span scores(scores_.data(), chunks_.size());
  result.chunks.clear();
  for (std::uint32_t i : top_k(scores, keep, order_)) result.chunks.push_back(chunks_[i]);
  std::ranges::sort(result.chunks);
}

}  // namespace kvtier
