#pragma once

#include "runtime/kvtier.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

// A small engine that sees nothing but kvtier.h, and what attention over its content comes to.

namespace c_api_calls {

inline constexpr uint32_t kHeads = 4;
inline constexpr uint32_t kKvHeads = 2;
inline constexpr uint32_t kDim = 16;

inline kvtier_options small_options() {
  kvtier_options options;
  EXPECT_EQ(KVTIER_OPTIONS_INIT(&options), KVTIER_OK);
  options.dtype = KVTIER_F32;
  options.layers = 2;
  options.query_heads = kHeads;
  options.kv_heads = kKvHeads;
  options.head_dim = kDim;
  options.tokens_per_block = 4;
  options.extent_bytes = 16 << 10;
  options.sinks = 2;
  options.window = 8;
  options.threads = 1;
  options.tokens_max = 512;
  options.sequences_max = 3;
  kvtier_needs needs;
  needs.struct_size = sizeof(needs);
  EXPECT_EQ(kvtier_runtime_needs(&options, &needs), KVTIER_OK) << kvtier_last_error();
  options.device_capacity_bytes = needs.device_bytes_all;
  options.host_capacity_bytes = needs.extent_bytes_total + needs.host_bytes;
  return options;
}

/// A runtime that is closed whatever a test does.
class Engine {
 public:
  explicit Engine(const kvtier_options& options) {
    EXPECT_EQ(kvtier_runtime_open(&options, &runtime_), KVTIER_OK) << kvtier_last_error();
  }
  ~Engine() { EXPECT_EQ(kvtier_runtime_close(runtime_), KVTIER_OK) << kvtier_last_error(); }
  kvtier_runtime* get() const { return runtime_; }

 private:
  kvtier_runtime* runtime_ = nullptr;
};

inline float element(uint32_t layer, uint32_t token, uint32_t head, uint32_t i, uint32_t salt) {
  const uint32_t mixed =
      (layer * 7919u + token * 104729u + head * 1299709u + i * 15485863u + salt) * 2654435761u;
  return static_cast<float>(mixed >> 8) * 0x1p-23f - 1.0f;
}

inline kvtier_status append(kvtier_runtime* runtime, kvtier_sequence sequence, uint32_t layer,
                            uint32_t first, uint32_t tokens, uint32_t salt = 0) {
  std::vector<float> keys;
  std::vector<float> values;
  for (uint32_t t = first; t < first + tokens; ++t) {
    for (uint32_t head = 0; head < kKvHeads; ++head) {
      for (uint32_t i = 0; i < kDim; ++i) {
        keys.push_back(element(layer, t, head, i, salt));
        values.push_back(element(layer, t, head, i, salt + 1));
      }
    }
  }
  kvtier_rows rows;
  KVTIER_ROWS_INIT(&rows);
  rows.keys = keys.data();
  rows.values = values.data();
  rows.key_token_stride = rows.value_token_stride = kKvHeads * kDim * sizeof(float);
  rows.key_head_stride = rows.value_head_stride = kDim * sizeof(float);
  rows.tokens = tokens;
  return kvtier_append(runtime, sequence, layer, &rows);
}

inline void append_all(kvtier_runtime* runtime, kvtier_sequence sequence, uint32_t first,
                       uint32_t tokens, uint32_t salt = 0) {
  for (uint32_t layer = 0; layer < 2; ++layer) {
    ASSERT_EQ(append(runtime, sequence, layer, first, tokens, salt), KVTIER_OK)
        << kvtier_last_error();
  }
}

inline std::vector<float> make_queries(uint32_t count) {
  std::vector<float> queries;
  for (uint32_t i = 0; i < count * kHeads * kDim; ++i) queries.push_back(element(9, i, 3, 5, 77));
  return queries;
}

/// Attention over all tokens, head by head, in double.
inline std::vector<float> reference(uint32_t layer, uint32_t tokens,
                                    const std::vector<float>& queries) {
  const uint32_t count = static_cast<uint32_t>(queries.size()) / (kHeads * kDim);
  std::vector<float> out;
  for (uint32_t q = 0; q < count; ++q) {
    const uint32_t visible = tokens - count + q + 1;
    for (uint32_t head = 0; head < kHeads; ++head) {
      const uint32_t kv = head / (kHeads / kKvHeads);
      std::vector<double> sum(kDim);
      double weights = 0;
      for (uint32_t t = 0; t < visible; ++t) {
        double logit = 0;
        for (uint32_t i = 0; i < kDim; ++i) {
          logit += double{queries[(q * kHeads + head) * kDim + i]} * element(layer, t, kv, i, 0);
        }
        const double weight = std::exp(logit / 4.0);  // 1 / sqrt(16)
        weights += weight;
        for (uint32_t i = 0; i < kDim; ++i) sum[i] += weight * element(layer, t, kv, i, 1);
      }
      for (const double value : sum) out.push_back(static_cast<float>(value / weights));
    }
  }
  return out;
}

struct Asked {
  kvtier_status status;
  std::vector<float> out;
  kvtier_report report;
};

template <typename Call>
Asked ask(Call call, const Engine& engine, kvtier_sequence sequence, uint32_t layer,
          const std::vector<float>& queries, uint32_t budget) {
  kvtier_query query;
  KVTIER_QUERY_INIT(&query);
  query.layer = layer;
  query.query_count = static_cast<uint32_t>(queries.size()) / (kHeads * kDim);
  query.queries = queries.data();
  Asked asked{};
  asked.out.resize(queries.size());
  query.out = asked.out.data();
  query.budget_tokens = budget;
  asked.report.struct_size = sizeof(asked.report);
  asked.status = call(engine.get(), sequence, &query, &asked.report);
  return asked;
}

inline void expect_near(const std::vector<float>& found, const std::vector<float>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) ASSERT_NEAR(found[i], expected[i], 1e-5) << i;
}

}  // namespace c_api_calls
