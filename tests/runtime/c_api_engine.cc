#include "tests/runtime/c_api_engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace kvtier::testing {
namespace {

// Between -1 and 1, the same everywhere (splitmix64).
float noise(std::uint64_t key) {
  key += 0x9E3779B97F4A7C15u;
  key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9u;
  key = (key ^ (key >> 27)) * 0x94D049BB133111EBu;
  key ^= key >> 31;
  return static_cast<float>(static_cast<double>(key >> 11) * 0x1p-52 - 1.0);
}

}  // namespace

float content(std::uint32_t layer, std::uint32_t head, std::uint32_t position,
              std::uint32_t element, bool value) {
  return noise((((std::uint64_t{position} * 64 + layer) * 64 + head) * 1024 + element) * 2 +
               (value ? 1 : 0));
}

kvtier_options small_options() {
  kvtier_options options;
  EXPECT_EQ(KVTIER_OPTIONS_INIT(&options), KVTIER_OK);
  options.dtype = KVTIER_F32;
  options.layers = 2;
  options.query_heads = 4;
  options.kv_heads = 2;
  options.head_dim = 16;
  options.tokens_per_block = 4;
  options.extent_bytes = 8192;
  options.window = 16;
  options.tokens_max = 256;
  options.sequences_max = 2;
  options.threads = 1;
  options.device_capacity_bytes = 4 << 20;
  options.host_capacity_bytes = 4 << 20;
  return options;
}

kvtier_status refused_open(const kvtier_options& options) {
  auto* runtime = reinterpret_cast<kvtier_runtime*>(std::uintptr_t{1});
  const kvtier_status status = kvtier_runtime_open(&options, &runtime);
  EXPECT_EQ(runtime, nullptr);
  return status;
}

Engine::Engine(const kvtier_options& given) : options(given) {
  const kvtier_status status = kvtier_runtime_open(&given, &runtime);
  EXPECT_EQ(status, KVTIER_OK) << kvtier_last_error();
}

Engine::~Engine() { EXPECT_EQ(kvtier_runtime_close(runtime), KVTIER_OK) << kvtier_last_error(); }

kvtier_sequence Engine::create() {
  kvtier_sequence sequence = 0;
  EXPECT_EQ(kvtier_sequence_create(runtime, &sequence), KVTIER_OK) << kvtier_last_error();
  EXPECT_NE(sequence, 0u);
  return sequence;
}

void Engine::append(kvtier_sequence sequence, std::uint32_t first, std::uint32_t tokens) {
  for (std::uint32_t layer = 0; layer < options.layers; ++layer) {
    ASSERT_EQ(append_layer(sequence, layer, first, tokens), KVTIER_OK) << kvtier_last_error();
  }
}

kvtier_status Engine::append_layer(kvtier_sequence sequence, std::uint32_t layer,
                                   std::uint32_t first, std::uint32_t tokens) {
  const std::size_t row = std::size_t{options.kv_heads} * options.head_dim;
  std::vector<float> keys(tokens * row);
  std::vector<float> values(tokens * row);
  for (std::uint32_t t = 0; t < tokens; ++t) {
    for (std::uint32_t i = 0; i < row; ++i) {
      const std::uint32_t head = i / options.head_dim;
      keys[t * row + i] = content(layer, head, first + t, i % options.head_dim, false);
      values[t * row + i] = content(layer, head, first + t, i % options.head_dim, true);
    }
  }
  kvtier_rows rows;
  EXPECT_EQ(KVTIER_ROWS_INIT(&rows), KVTIER_OK);
  rows.keys = keys.data();
  rows.values = values.data();
  rows.key_token_stride = rows.value_token_stride = row * sizeof(float);
  rows.key_head_stride = rows.value_head_stride = options.head_dim * sizeof(float);
  rows.tokens = tokens;
  return kvtier_append(runtime, sequence, layer, &rows);
}

kvtier_query Engine::ask(std::uint32_t layer, std::uint32_t query_count, std::uint32_t budget) {
  const std::size_t rows = std::size_t{query_count} * options.query_heads;
  queries_.resize(rows * options.head_dim);
  for (float& element : queries_) element = 2.0f * noise(0xABCDEF0000u + asked_++);
  out_.assign(rows * options.head_dim, 0.0f);
  lse_.assign(rows, 0.0f);
  kvtier_query query;
  EXPECT_EQ(KVTIER_QUERY_INIT(&query), KVTIER_OK);
  query.layer = layer;
  query.query_count = query_count;
  query.queries = queries_.data();
  query.out = out_.data();
  query.lse = lse_.data();
  query.budget_tokens = budget;
  return query;
}

std::vector<double> Engine::exact_reference(std::uint32_t layer, std::uint32_t tokens) const {
  const std::uint32_t dim = options.head_dim;
  const auto count = static_cast<std::uint32_t>(lse_.size() / options.query_heads);
  const double scale = 1.0 / std::sqrt(static_cast<double>(dim));
  std::vector<double> expected(out_.size(), 0.0);
  for (std::uint32_t row = 0; row < lse_.size(); ++row) {
    const std::uint32_t head = row % options.query_heads / (options.query_heads / options.kv_heads);
    const std::uint32_t visible = tokens - count + row / options.query_heads + 1;
    std::vector<double> logits(visible, 0.0);
    for (std::uint32_t t = 0; t < visible; ++t) {
      for (std::uint32_t e = 0; e < dim; ++e) {
        logits[t] += scale * static_cast<double>(queries_[std::size_t{row} * dim + e]) *
                     static_cast<double>(content(layer, head, t, e, false));
      }
    }
    const double top = *std::max_element(logits.begin(), logits.end());
    double sum = 0.0;
    for (double& logit : logits) sum += logit = std::exp(logit - top);
    for (std::uint32_t t = 0; t < visible; ++t) {
      for (std::uint32_t e = 0; e < dim; ++e) {
        expected[std::size_t{row} * dim + e] +=
            logits[t] / sum * static_cast<double>(content(layer, head, t, e, true));
      }
    }
  }
  return expected;
}

double distance(const std::vector<float>& found, const std::vector<double>& expected) {
  if (found.size() != expected.size()) return std::numeric_limits<double>::infinity();
  double largest = 0.0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (std::isnan(found[i])) return std::numeric_limits<double>::infinity();
    largest = std::max(largest, std::abs(static_cast<double>(found[i]) - expected[i]));
  }
  return largest;
}

bool all_nan(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float value) { return std::isnan(value); });
}

}  // namespace kvtier::testing
