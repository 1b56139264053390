#include "kernels/partial_attention.h"

#include "memory/dtype.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace kvtier {
namespace {

/// One token of one KV head as the reference sees it.
struct Token {
  const std::byte* key;
  const std::byte* value;
  std::uint32_t position;
};

std::vector<Token> list_tokens(const BlockLayout& layout, const AttentionTask& task,
                               std::uint32_t head) {
  std::vector<Token> tokens;
  for (const BlockRange& range : task.blocks) {
    for (std::uint32_t i = 0; i < range.tokens; ++i) {
      const std::uint32_t token = range.first_token + i;
      tokens.push_back({range.keys_begin() + layout.key_offset(head, token),
                        range.block + layout.value_offset(head, token), range.position + i});
    }
  }
  return tokens;
}

double logit_of(const SoftmaxOptions& softmax, const BlockLayout& layout, const float* query,
                const Token& token) {
  double dot = 0.0;
  for (std::uint32_t i = 0; i < layout.head_dim(); ++i) {
    dot += double{query[i]} * double{load_element(token.key, layout.dtype(), i)};
  }
  const double logit = double{softmax.scale} * dot;
  const double cap = double{softmax.logit_cap};
  return cap > 0.0 ? cap * std::tanh(logit / cap) : logit;
}

void attend_row(const AttentionParams& params, std::span<const Token> tokens, const float* query,
                std::uint32_t last_position, float* out, float& lse) {
  const BlockLayout& layout = *params.layout;
  std::vector<double> logits;
  double top = -std::numeric_limits<double>::infinity();
  for (const Token& token : tokens) {
    const bool masked = token.position > last_position;
    logits.push_back(masked ? -std::numeric_limits<double>::infinity()
                            : logit_of(params.softmax, layout, query, token));
    top = std::max(top, logits.back());
  }
  std::fill_n(out, layout.value_dim(), 0.0f);
  lse = kEmptyLse;
  if (std::isinf(top)) return;
  double sum = 0.0;
  std::vector<double> weighted(layout.value_dim(), 0.0);
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    if (std::isinf(logits[t])) continue;
    const double weight = std::exp(logits[t] - top);
    sum += weight;
    for (std::uint32_t i = 0; i < layout.value_dim(); ++i) {
      weighted[i] += weight * double{load_element(tokens[t].value, layout.dtype(), i)};
    }
  }
  for (std::uint32_t i = 0; i < layout.value_dim(); ++i) {
    out[i] = static_cast<float>(weighted[i] / sum);
  }
  lse = static_cast<float>(top + std::log(sum));
}

}  // namespace

void partial_attention_reference(const AttentionParams& params, const AttentionTask& task) {
  const BlockLayout& layout = *params.layout;
  const std::uint32_t group = params.queries_per_kv_head;
  for (std::uint32_t kv_head = 0; kv_head < layout.heads_per_block(); ++kv_head) {
    const std::vector<Token> tokens = list_tokens(layout, task, kv_head);
    for (std::uint32_t q = 0; q < task.query_count; ++q) {
      // Without positions every token is behind every query.
      const std::uint32_t last_position = task.query_positions.empty()
                                              ? std::numeric_limits<std::uint32_t>::max()
                                              : task.query_positions[q];
      for (std::uint32_t g = 0; g < group; ++g) {
        const std::size_t head = std::size_t{kv_head} * group + g;
        attend_row(params, tokens, task.queries + q * task.query_stride + head * layout.head_dim(),
                   last_position, task.out + q * task.out_stride + head * layout.value_dim(),
                   task.lse[q * task.lse_stride + head]);
      }
    }
  }
}

}  // namespace kvtier
