#include "tests/runtime/harness.h"

#include "kernels/quantised_keys.h"
#include "memory/check.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <utility>

// What the harness's steps should have answered: obvious loops in float64, from contents.

namespace kvtier::testing {
namespace {

// Attention of one query head over (logit, position) pairs.
void attend_one(const std::vector<std::pair<double, std::uint32_t>>& logits,
                const std::function<double(std::uint32_t, std::uint32_t)>& value,
                std::uint32_t value_dim, const float* sink, double* out, double* lse) {
  double largest = sink != nullptr ? double{*sink} : -HUGE_VAL;
  for (const auto& [logit, position] : logits) largest = std::max(largest, logit);
  double sum = sink != nullptr ? std::exp(double{*sink} - largest) : 0.0;
  for (const auto& [logit, position] : logits) {
    const double weight = std::exp(logit - largest);
    sum += weight;
    for (std::uint32_t e = 0; e < value_dim; ++e) out[e] += weight * value(position, e);
  }
  for (std::uint32_t e = 0; e < value_dim; ++e) out[e] /= sum;
  *lse = largest + std::log(sum);
}

}  // namespace

std::vector<double> Harness::reference_out() const { return reference_over(report_.attended); }

std::vector<double> Harness::exact_reference() const {
  std::vector<AttendedRange> all;
  const BlockLayout& layout = runtime_->layout();
  for (std::uint32_t group = 0; group < layout.head_groups(); ++group) {
    for (std::uint32_t first = 0; first < tokens(); first += layout.tokens_per_block()) {
      all.push_back({.head_group = HeadGroup{group},
                     .block = layout.block_of_token(first),
                     .tokens = std::min(layout.tokens_per_block(), tokens() - first)});
    }
  }
  return reference_over(all);
}

// Of the whole run of 64 tokens that a position lies in: as it stands where the run is open, as its
// codes give it back where it is complete. [64, head_dim]
std::vector<float> Harness::kept_run(std::uint32_t head, std::uint32_t run) const {
  constexpr std::uint32_t kRun = KeyCodes::kRunTokens;
  const std::uint32_t begin = run * kRun;
  const std::uint32_t dim = setup_.block.head_dim;
  std::vector<float> keys(std::size_t{kRun} * dim);
  for (std::uint32_t t = 0; t < std::min(kRun, tokens() - begin); ++t) {
    for (std::uint32_t e = 0; e < dim; ++e) {
      keys[t * dim + e] =
          content_.key(last_layer_, head, begin + t, branch().versions[begin + t], e);
    }
  }
  if (begin + kRun > tokens()) return keys;
  const std::uint32_t sinks = std::min(kRun, setup_.sinks - std::min(setup_.sinks, begin));
  const KeyCodes codes{.bits = setup_.selector.find("bits=2") == std::string::npos ? 4u : 2u,
                       .dim = dim,
                       .dtype = DType::kF32};
  std::vector<CodeLine> lines(codes.run_lines());
  quantise_run(codes,
               {reinterpret_cast<const std::byte*>(keys.data()), kRun, dim, dim * sizeof(float),
                DType::kF32},
               sinks, lines.data());
  for (std::uint32_t t = sinks; t < kRun; ++t) {
    read_coded_key(codes, lines.data(), t, keys.data() + t * dim);
  }
  return keys;
}

std::vector<double> Harness::reference_over(std::span<const AttendedRange> ranges) const {
  const BlockShape& shape = setup_.block;
  const std::uint32_t heads = options_.query_heads;
  std::vector<double> out(out_.size(), 0.0);
  std::map<std::pair<std::uint32_t, std::uint32_t>, std::vector<float>> runs;
  const auto kept = [&](std::uint32_t head, std::uint32_t position) {
    const std::uint32_t run = position / KeyCodes::kRunTokens;
    std::vector<float>& keys = runs[{head, run}];
    if (keys.empty()) keys = kept_run(head, run);
    return keys.data() + position % KeyCodes::kRunTokens * std::size_t{shape.head_dim};
  };
  for (std::uint32_t row = 0; row < last_query_count_ * heads; ++row) {
    const std::uint32_t query = row / heads;
    const std::uint32_t kv_head = row % heads / setup_.queries_per_kv_head;
    const std::uint32_t own = tokens() - last_query_count_ + query;
    std::vector<std::pair<double, std::uint32_t>> logits;
    for (const AttendedRange& range : ranges) {
      if (range.head_group.value != kv_head / shape.kv_heads_per_block) continue;
      for (std::uint32_t i = 0; i < range.tokens; ++i) {
        const std::uint32_t position =
            range.block.value * shape.tokens_per_block + range.first_token + i;
        if (position > own) continue;
        double dot = 0.0;
        for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
          dot += double{queries_[std::size_t{row} * shape.head_dim + e]} *
                 (range.kept_keys ? double{kept(kv_head, position)[e]}
                                  : double{content_.key(last_layer_, kv_head, position,
                                                        branch().versions[position], e)});
        }
        double logit = dot * options_.softmax.scale;
        if (options_.softmax.logit_cap > 0) {
          logit = options_.softmax.logit_cap * std::tanh(logit / options_.softmax.logit_cap);
        }
        logits.emplace_back(logit, position);
      }
    }
    const float* sink = options_.sink_logits.empty()
                            ? nullptr
                            : &options_.sink_logits[last_layer_ * heads + row % heads];
    double lse = 0.0;
    attend_one(
        logits,
        [&](std::uint32_t position, std::uint32_t e) {
          return double{
              content_.value(last_layer_, kv_head, position, branch().versions[position], e)};
        },
        shape.value_dim, sink, &out[std::size_t{row} * shape.value_dim], &lse);
  }
  return out;
}

double max_difference(const std::vector<float>& a, const std::vector<double>& b) {
  KVTIER_CHECK(a.size() == b.size(), "{} and {} elements", a.size(), b.size());
  double largest = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(double{a[i]} - b[i]);
    if (!(difference <= largest)) largest = difference;  // NaN counts as different.
  }
  return largest;
}

}  // namespace kvtier::testing
