#include "tests/selectors/reference_weights.h"

#include "selectors/rank_blocks.h"

#include <algorithm>
#include <cmath>

namespace kvtier::testing {

ReferenceWeights::ReferenceWeights(const Context& context, const SelectorShape& shape,
                                   const SelectRequest& request)
    : ReferenceWeights(context, shape, request,
                       [&](std::uint32_t query, std::uint32_t head, std::uint32_t token) {
                         double dot = 0.0;
                         for (std::uint32_t i = 0; i < shape.head_dim; ++i) {
                           dot += double{context.query(query, head, i)} *
                                  double{context.key(token, head / shape.queries_per_kv_head, i)};
                         }
                         return double{shape.softmax.scale} * dot;
                       }) {}

ReferenceWeights::ReferenceWeights(const Context& context, const SelectorShape& shape,
                                   const SelectRequest& request, const Logit& logit)
    : context_(context),
      shape_(shape),
      region_(FarRegion::of(shape, request.first_position)),
      queries_(request.query_count),
      tokens_(request.first_position + request.query_count) {
  for (std::uint32_t q = 0; q < queries_; ++q) {
    for (std::uint32_t head = 0; head < shape.query_heads(); ++head) {
      std::vector<double> weights(tokens_, 0.0);
      double sum = 0.0;
      for (std::uint32_t t = 0; t < request.first_position + q + 1; ++t) {
        weights[t] = std::exp(logit(q, head, t));
        sum += weights[t];
      }
      for (double& weight : weights) weight /= sum;
      weights_.push_back(weights);
      lse_.push_back(std::log(sum));
    }
  }
}

double ReferenceWeights::block_score(std::uint32_t group, std::uint32_t block) const {
  const std::uint32_t begin = std::max(block * shape_.tokens_per_block, region_.begin);
  const std::uint32_t end = std::min((block + 1) * shape_.tokens_per_block, region_.end);
  const std::uint32_t heads = shape_.heads_per_group * shape_.queries_per_kv_head;
  double score = 0.0;
  for (std::uint32_t head = group * heads; head < (group + 1) * heads; ++head) {
    double of_head = 0.0;
    for (std::uint32_t q = 0; q < queries_; ++q) {
      for (std::uint32_t t = begin; t < end; ++t) of_head += weight(q, head, t);
    }
    score = shape_.reduction == GroupReduction::kMax ? std::max(score, of_head) : score + of_head;
  }
  return score;
}

std::vector<bool> ReferenceWeights::chosen(const GroupSelection& selection) const {
  std::vector<bool> chosen(tokens_, false);
  for (std::uint32_t i = 0; i < selection.chosen; ++i) {
    const SelectedUnit& unit = selection.ranked[i];
    for (std::uint32_t t = 0; t < unit.tokens; ++t) {
      chosen[unit.block.value * shape_.tokens_per_block + unit.first_token + t] = true;
    }
  }
  return chosen;
}

double ReferenceWeights::found(std::uint32_t group, const GroupSelection& selection) const {
  const std::vector<bool> is_chosen = chosen(selection);
  const std::uint32_t heads = shape_.heads_per_group * shape_.queries_per_kv_head;
  double sum = 0.0;
  for (std::uint32_t head = group * heads; head < (group + 1) * heads; ++head) {
    for (std::uint32_t q = 0; q < queries_; ++q) {
      for (std::uint32_t t = 0; t < tokens_; ++t) sum += is_chosen[t] ? weight(q, head, t) : 0.0;
    }
  }
  return sum;
}

ReferenceWeights::State ReferenceWeights::rest(std::uint32_t query, std::uint32_t head,
                                               const GroupSelection& selection,
                                               std::uint32_t value_tokens) const {
  const std::vector<bool> is_chosen = chosen(selection);
  const std::uint32_t kv_head = head / shape_.queries_per_kv_head;
  State state{std::vector<double>(shape_.value_dim, 0.0), 0.0};
  double sum = 0.0;
  for (std::uint32_t t = region_.begin; t < region_.end; ++t) {
    if (is_chosen[t]) continue;
    // Complete groups are averaged whole, without sinks; the open one as far as it is ranked.
    const std::uint32_t begin = std::max(t / value_tokens * value_tokens, shape_.sinks);
    std::uint32_t end = (t / value_tokens + 1) * value_tokens;
    if (end > tokens_) end = region_.end;
    for (std::uint32_t i = 0; i < shape_.value_dim; ++i) {
      double mean = 0.0;
      for (std::uint32_t k = begin; k < end; ++k) mean += double{context_.value(k, kv_head, i)};
      state.out[i] += weight(query, head, t) * mean / (end - begin);
    }
    sum += weight(query, head, t);
  }
  for (double& element : state.out) element /= sum;
  state.lse = lse(query, head) + std::log(sum);
  return state;
}

ReferenceWeights::State ReferenceWeights::state_of(
    std::uint32_t query, std::uint32_t head,
    const std::function<bool(std::uint32_t)>& takes) const {
  State state{std::vector<double>(shape_.value_dim, 0.0), 0.0};
  double sum = 0.0;
  for (std::uint32_t t = 0; t < tokens_; ++t) {
    if (!takes(t)) continue;
    for (std::uint32_t i = 0; i < shape_.value_dim; ++i) {
      state.out[i] +=
          weight(query, head, t) * double{context_.value(t, head / shape_.queries_per_kv_head, i)};
    }
    sum += weight(query, head, t);
  }
  for (double& element : state.out) element /= sum;
  state.lse = lse(query, head) + std::log(sum);
  return state;
}

ReferenceWeights::State ReferenceWeights::attended(std::uint32_t query, std::uint32_t head,
                                                   const GroupSelection& selection) const {
  const std::vector<bool> is_chosen = chosen(selection);
  return state_of(query, head, [&](std::uint32_t t) {
    return t < region_.begin || t >= region_.end || is_chosen[t];
  });
}

ReferenceWeights::State ReferenceWeights::everything(std::uint32_t query,
                                                     std::uint32_t head) const {
  return state_of(query, head, [](std::uint32_t) { return true; });
}

void make_codes_exact(Context& context, const SelectorShape& shape) {
  std::mt19937_64 random(17);
  for (std::uint32_t t = 0; t < context.tokens(); ++t) {
    for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
      for (std::uint32_t i = 0; i < shape.head_dim; ++i) {
        float key = static_cast<float>(random() % 16);
        if (t % 64 == 62) key = 0.0f;
        if (t % 64 == 63) key = 15.0f;
        context.set_key(t, head, i, key);
      }
    }
  }
  for (float& element : context.queries()) element = std::round(element * 8.0f) / 8.0f;
  // Scoring rounds a query to 127 steps of its largest element: here to eighths.
  const std::size_t stride = context.request(0, 0).query_stride;
  for (std::size_t q = 0; (q + 1) * stride <= context.queries().size(); ++q) {
    for (std::uint32_t head = 0; head < shape.query_heads(); ++head) {
      context.queries()[q * stride + std::size_t{head} * shape.head_dim] = 127.0f / 8.0f;
    }
  }
}

}  // namespace kvtier::testing
