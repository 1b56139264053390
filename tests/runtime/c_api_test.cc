// The C ABI as an engine sees it: only kvtier.h, through the shared library.

#include "runtime/kvtier.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace {

using testing::HasSubstr;

constexpr uint32_t kHeads = 4;
constexpr uint32_t kKvHeads = 2;
constexpr uint32_t kDim = 16;

kvtier_options small_options() {
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

float element(uint32_t layer, uint32_t token, uint32_t head, uint32_t i, uint32_t salt) {
  const uint32_t mixed =
      (layer * 7919u + token * 104729u + head * 1299709u + i * 15485863u + salt) * 2654435761u;
  return static_cast<float>(mixed >> 8) * 0x1p-23f - 1.0f;
}

kvtier_status append(kvtier_runtime* runtime, kvtier_sequence sequence, uint32_t layer,
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

void append_all(kvtier_runtime* runtime, kvtier_sequence sequence, uint32_t first, uint32_t tokens,
                uint32_t salt = 0) {
  for (uint32_t layer = 0; layer < 2; ++layer) {
    ASSERT_EQ(append(runtime, sequence, layer, first, tokens, salt), KVTIER_OK)
        << kvtier_last_error();
  }
}

std::vector<float> make_queries(uint32_t count) {
  std::vector<float> queries;
  for (uint32_t i = 0; i < count * kHeads * kDim; ++i) queries.push_back(element(9, i, 3, 5, 77));
  return queries;
}

/// Attention over all tokens, head by head, in double.
std::vector<float> reference(uint32_t layer, uint32_t tokens, const std::vector<float>& queries) {
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

void expect_near(const std::vector<float>& found, const std::vector<float>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) ASSERT_NEAR(found[i], expected[i], 1e-5) << i;
}

TEST(CApi, LibrarySaysWhatItIs) {
  int major = 0;
  int minor = 0;
  int patch = 0;
  ASSERT_EQ(std::sscanf(kvtier_version_string(), "%d.%d.%d", &major, &minor, &patch), 3);
  EXPECT_EQ(kvtier_version(), static_cast<uint32_t>(10000 * major + 100 * minor + patch));
  EXPECT_EQ(kvtier_has_feature("fork"), 1);
  EXPECT_EQ(kvtier_has_feature("time-travel"), 0);
  EXPECT_EQ(kvtier_struct_size("kvtier_options"), sizeof(kvtier_options));
  EXPECT_EQ(kvtier_struct_size("kvtier_nothing"), 0u);
  EXPECT_STREQ(kvtier_status_name(KVTIER_CORRUPT), "corrupt");
  EXPECT_STREQ(kvtier_status_name(static_cast<kvtier_status>(99)), "unknown");
}

TEST(CApi, SelectorsAreListedInMemoryOfTheCallers) {
  size_t needed = 0;
  ASSERT_EQ(kvtier_list_selectors(nullptr, 0, &needed), KVTIER_OK);
  std::string text(needed, 'x');
  EXPECT_EQ(kvtier_list_selectors(text.data(), needed - 1, &needed), KVTIER_NO_SPACE);
  EXPECT_EQ(text[0], 'x');
  ASSERT_EQ(kvtier_list_selectors(text.data(), text.size(), &needed), KVTIER_OK);
  EXPECT_EQ(text.back(), '\0');
  EXPECT_THAT(text, HasSubstr("\"scan\""));
}

TEST(CApi, StepsAndExactAttentionAnswerLikeAReference) {
  const Engine engine(small_options());
  kvtier_sequence sequence = 0;
  ASSERT_EQ(kvtier_sequence_create(engine.get(), &sequence), KVTIER_OK);
  append_all(engine.get(), sequence, 0, 200);
  const auto queries = make_queries(3);
  for (uint32_t layer = 0; layer < 2; ++layer) {
    const Asked step = ask(kvtier_step, engine, sequence, layer, queries, 300);
    ASSERT_EQ(step.status, KVTIER_OK) << kvtier_last_error();
    expect_near(step.out, reference(layer, 200, queries));
    EXPECT_EQ(step.report.attended_tokens_max, 200u);
    const Asked exact = ask(kvtier_attend_exact, engine, sequence, layer, queries, 0);
    ASSERT_EQ(exact.status, KVTIER_OK) << kvtier_last_error();
    expect_near(exact.out, reference(layer, 200, queries));
  }
  const Asked small = ask(kvtier_step, engine, sequence, 0, queries, 32);
  ASSERT_EQ(small.status, KVTIER_OK);
  EXPECT_LE(small.report.attended_tokens_max, 32u);
  uint32_t ranges = 0;
  ASSERT_EQ(kvtier_attended(engine.get(), nullptr, 0, &ranges), KVTIER_OK);
  EXPECT_GT(ranges, 0u);
  std::vector<kvtier_range> attended(ranges);
  ASSERT_EQ(kvtier_attended(engine.get(), attended.data(), ranges, &ranges), KVTIER_OK);
  uint32_t tokens = 0;
  for (const kvtier_range& range : attended) tokens += range.tokens;
  EXPECT_EQ(tokens, small.report.attended_tokens_total);
}

TEST(CApi, HalfPrecisionComesAndGoes) {
  kvtier_options options = small_options();
  options.dtype = KVTIER_BF16;
  const Engine engine(options);
  kvtier_sequence sequence = 0;
  ASSERT_EQ(kvtier_sequence_create(engine.get(), &sequence), KVTIER_OK);
  // One token: attention over it is its value, whatever the query.
  std::vector<uint16_t> row(kKvHeads * kDim, 0x3F80);  // 1.0
  kvtier_rows rows;
  KVTIER_ROWS_INIT(&rows);
  rows.keys = rows.values = row.data();
  rows.key_token_stride = rows.value_token_stride = row.size() * 2;
  rows.key_head_stride = rows.value_head_stride = kDim * 2;
  rows.tokens = 1;
  ASSERT_EQ(kvtier_append(engine.get(), sequence, 0, &rows), KVTIER_OK);
  const std::vector<uint16_t> queries(kHeads * kDim, 0x3C00);  // 1.0 in float16
  std::vector<uint16_t> out(kHeads * kDim);
  kvtier_query query;
  KVTIER_QUERY_INIT(&query);
  query.queries = queries.data();
  query.out = out.data();
  query.dtype = KVTIER_F16;
  query.budget_tokens = 64;
  ASSERT_EQ(kvtier_step(engine.get(), sequence, &query, nullptr), KVTIER_OK) << kvtier_last_error();
  EXPECT_THAT(out, testing::Each(0x3C00));
}

TEST(CApi, ForksShareAndPart) {
  const Engine engine(small_options());
  kvtier_sequence parent = 0;
  kvtier_sequence child = 0;
  ASSERT_EQ(kvtier_sequence_create(engine.get(), &parent), KVTIER_OK);
  append_all(engine.get(), parent, 0, 200);
  ASSERT_EQ(kvtier_sequence_fork(engine.get(), parent, 150, &child), KVTIER_OK)
      << kvtier_last_error();
  append_all(engine.get(), child, 150, 50);
  append_all(engine.get(), parent, 200, 5, 1000);
  const auto queries = make_queries(1);
  const Asked asked = ask(kvtier_step, engine, child, 1, queries, 300);
  ASSERT_EQ(asked.status, KVTIER_OK) << kvtier_last_error();
  expect_near(asked.out, reference(1, 200, queries));
  kvtier_sequence_stats stats{};
  stats.struct_size = sizeof(stats);
  ASSERT_EQ(kvtier_get_sequence_stats(engine.get(), child, &stats), KVTIER_OK);
  EXPECT_GT(stats.shared_bytes, 0u);
  ASSERT_EQ(kvtier_sequence_free(engine.get(), parent), KVTIER_OK);
  expect_near(ask(kvtier_step, engine, child, 0, queries, 300).out, reference(0, 200, queries));
}

TEST(CApi, TruncationTakesADraftBack) {
  const Engine engine(small_options());
  kvtier_sequence sequence = 0;
  ASSERT_EQ(kvtier_sequence_create(engine.get(), &sequence), KVTIER_OK);
  append_all(engine.get(), sequence, 0, 100);
  append_all(engine.get(), sequence, 100, 7, 999);
  ASSERT_EQ(kvtier_truncate(engine.get(), sequence, 100), KVTIER_OK) << kvtier_last_error();
  append_all(engine.get(), sequence, 100, 3);
  uint32_t tokens = 0;
  ASSERT_EQ(kvtier_sequence_tokens(engine.get(), sequence, 1, &tokens), KVTIER_OK);
  EXPECT_EQ(tokens, 103u);
  const auto queries = make_queries(2);
  expect_near(ask(kvtier_step, engine, sequence, 0, queries, 300).out, reference(0, 103, queries));
}

TEST(CApi, FreedAndForeignSequencesAreTold) {
  const Engine engine(small_options());
  kvtier_sequence first = 0;
  ASSERT_EQ(kvtier_sequence_create(engine.get(), &first), KVTIER_OK);
  ASSERT_EQ(kvtier_sequence_free(engine.get(), first), KVTIER_OK);
  kvtier_sequence second = 0;
  ASSERT_EQ(kvtier_sequence_create(engine.get(), &second), KVTIER_OK);
  EXPECT_NE(first, second);
  EXPECT_EQ(append(engine.get(), first, 0, 0, 1), KVTIER_INVALID_ARGUMENT);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("was freed"));
  kvtier_sequence child = 7;
  EXPECT_EQ(kvtier_sequence_fork(engine.get(), first, 0, &child), KVTIER_INVALID_ARGUMENT);
  EXPECT_EQ(child, 0u);
  EXPECT_EQ(kvtier_truncate(engine.get(), 12345, 0), KVTIER_INVALID_ARGUMENT);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("none of this runtime"));
  EXPECT_EQ(kvtier_sequence_free(engine.get(), first), KVTIER_INVALID_ARGUMENT);
  EXPECT_EQ(kvtier_sequence_free(engine.get(), 0), KVTIER_OK);
}

TEST(CApi, AsManySequencesAsWereSaid) {
  const Engine engine(small_options());
  kvtier_sequence sequence = 0;
  for (int i = 0; i < 3; ++i) {
    ASSERT_EQ(kvtier_sequence_create(engine.get(), &sequence), KVTIER_OK);
  }
  EXPECT_EQ(kvtier_sequence_create(engine.get(), &sequence), KVTIER_NO_SPACE);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("sequences_max"));
  EXPECT_EQ(sequence, 0u);
}

TEST(CApi, WrongArgumentsAreNamed) {
  const Engine engine(small_options());
  kvtier_sequence sequence = 0;
  ASSERT_EQ(kvtier_sequence_create(engine.get(), &sequence), KVTIER_OK);
  const auto queries = make_queries(1);
  // A step before anything was appended.
  EXPECT_EQ(ask(kvtier_step, engine, sequence, 0, queries, 64).status, KVTIER_INVALID_ARGUMENT);
  append_all(engine.get(), sequence, 0, 20);
  EXPECT_EQ(ask(kvtier_step, engine, sequence, 5, queries, 64).status, KVTIER_INVALID_ARGUMENT);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("layer is 5"));
  EXPECT_EQ(ask(kvtier_step, engine, sequence, 0, queries, 1).status, KVTIER_INVALID_ARGUMENT);
  auto spoilt = queries;
  spoilt[3] = NAN;
  EXPECT_EQ(ask(kvtier_step, engine, sequence, 0, spoilt, 64).status, KVTIER_INVALID_ARGUMENT);
  EXPECT_EQ(ask(kvtier_step, engine, sequence, 0, make_queries(21), 64).status,
            KVTIER_INVALID_ARGUMENT);
  EXPECT_EQ(kvtier_step(engine.get(), sequence, nullptr, nullptr), KVTIER_INVALID_ARGUMENT);
  EXPECT_EQ(kvtier_step(nullptr, sequence, nullptr, nullptr), KVTIER_INVALID_ARGUMENT);
  kvtier_query query;
  KVTIER_QUERY_INIT(&query);
  EXPECT_EQ(kvtier_step(engine.get(), sequence, &query, nullptr), KVTIER_INVALID_ARGUMENT);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("NULL"));
  float out[kHeads * kDim];
  query.queries = queries.data();
  query.out = out;
  query.dtype = static_cast<kvtier_dtype>(17);
  EXPECT_EQ(kvtier_step(engine.get(), sequence, &query, nullptr), KVTIER_INVALID_ARGUMENT);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("query.dtype is 17"));
  query.dtype = KVTIER_F32;
  query.stream = &query;
  EXPECT_EQ(kvtier_step(engine.get(), sequence, &query, nullptr), KVTIER_UNSUPPORTED);
  EXPECT_EQ(append(engine.get(), sequence, 0, 20, 493), KVTIER_INVALID_ARGUMENT);
}

TEST(CApi, OptionsThatMakeNoSenseAreRefusedBeforeAnythingIsTaken) {
  kvtier_runtime* runtime = nullptr;
  const auto refused = [&](auto change, kvtier_status status, const char* words) {
    kvtier_options options = small_options();
    change(options);
    EXPECT_EQ(kvtier_runtime_open(&options, &runtime), status) << words;
    EXPECT_THAT(kvtier_last_error(), HasSubstr(words));
    EXPECT_EQ(runtime, nullptr);
  };
  using Options = kvtier_options;
  refused([](Options& o) { o.query_heads = 3; }, KVTIER_INVALID_ARGUMENT, "query_heads is 3");
  refused([](Options& o) { o.dtype = static_cast<kvtier_dtype>(-1); }, KVTIER_INVALID_ARGUMENT,
          "dtype");
  refused([](Options& o) { o.selector = "crystal-ball"; }, KVTIER_INVALID_ARGUMENT, "crystal-ball");
  refused([](Options& o) { o.eviction = "dice"; }, KVTIER_INVALID_ARGUMENT, "dice");
  refused([](Options& o) { o.device_capacity_bytes = 4096; }, KVTIER_INVALID_ARGUMENT, "4096");
  refused([](Options& o) { o.disk_capacity_bytes = 1 << 20; }, KVTIER_INVALID_ARGUMENT,
          "disk_path");
  refused(
      [](Options& o) {
        o.disk_capacity_bytes = 1 << 20;
        o.disk_path = "/no/such/folder";
      },
      KVTIER_NOT_FOUND, "/no/such/folder");
  refused([](Options& o) { o.struct_size = 0; }, KVTIER_INVALID_ARGUMENT, "struct_size");
  EXPECT_EQ(kvtier_runtime_open(nullptr, &runtime), KVTIER_INVALID_ARGUMENT);
  EXPECT_EQ(kvtier_runtime_close(nullptr), KVTIER_OK);
}

TEST(CApi, StructsOfOtherVersionsAreReadAsFarAsTheyGo) {
  kvtier_options options = small_options();
  // An older caller: it ends before the hooks.
  options.struct_size = offsetof(kvtier_options, device_allocator);
  std::memset(reinterpret_cast<char*>(&options) + options.struct_size, 0xAB,
              sizeof(options) - options.struct_size);
  const Engine engine(options);

  struct Newer {
    kvtier_options options;
    uint64_t tail;
  } newer{small_options(), 0};
  newer.options.struct_size = sizeof(newer);
  kvtier_runtime* runtime = nullptr;
  ASSERT_EQ(kvtier_runtime_open(&newer.options, &runtime), KVTIER_OK) << kvtier_last_error();
  EXPECT_EQ(kvtier_runtime_close(runtime), KVTIER_OK);
  newer.tail = 1;
  EXPECT_EQ(kvtier_runtime_open(&newer.options, &runtime), KVTIER_UNSUPPORTED);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("does not know"));

  // A shorter target keeps what is behind its end.
  kvtier_stats stats;
  std::memset(&stats, 0x5A, sizeof(stats));
  stats.struct_size = offsetof(kvtier_stats, host);
  ASSERT_EQ(kvtier_get_stats(engine.get(), &stats), KVTIER_OK);
  EXPECT_EQ(stats.device.capacity_bytes, options.device_capacity_bytes);
  EXPECT_EQ(stats.steps, 0x5A5A5A5A5A5A5A5Au);
}

TEST(CApi, ASecondCallMeanwhileIsBusy) {
  const Engine engine(small_options());
  kvtier_sequence sequence = 0;
  ASSERT_EQ(kvtier_sequence_create(engine.get(), &sequence), KVTIER_OK);
  append_all(engine.get(), sequence, 0, 400);
  const auto queries = make_queries(300);
  std::vector<float> out(queries.size());
  kvtier_query query;
  KVTIER_QUERY_INIT(&query);
  query.query_count = 300;
  query.queries = queries.data();
  query.out = out.data();
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> refused{0};
  std::thread other([&] {
    while (!stop) {
      uint32_t tokens = 0;
      const kvtier_status status = kvtier_sequence_tokens(engine.get(), sequence, 0, &tokens);
      if (status == KVTIER_BUSY) ++refused;
      if (status == KVTIER_OK) {
        EXPECT_EQ(tokens, 400u);
      }
    }
  });
  // Until the two have met; every call of this thread either runs or is told.
  for (int i = 0; i < 10000 && refused == 0; ++i) {
    const kvtier_status status = kvtier_attend_exact(engine.get(), sequence, &query, nullptr);
    EXPECT_TRUE(status == KVTIER_OK || status == KVTIER_BUSY) << kvtier_last_error();
    if (status != KVTIER_OK && status != KVTIER_BUSY) break;
  }
  stop = true;
  other.join();
  EXPECT_GT(refused, 0u);
}

TEST(CApi, MemoryOfTheTiersMayBeTheEngines) {
  struct Count {
    size_t taken = 0;
    size_t returned = 0;
  } slab, frames;
  const auto allocate = [](void* context, size_t bytes) -> void* {
    static_cast<Count*>(context)->taken += bytes;
    return std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  };
  const auto release = [](void* context, void* memory, size_t bytes) {
    static_cast<Count*>(context)->returned += bytes;
    std::free(memory);
  };
  const kvtier_allocator of_slab{allocate, release, &slab};
  const kvtier_allocator of_frames{allocate, release, &frames};
  kvtier_options options = small_options();
  options.device_allocator = &of_slab;
  options.host_allocator = &of_frames;
  {
    const Engine engine(options);
    EXPECT_GT(slab.taken, 0u);
    EXPECT_GT(frames.taken, 0u);
    EXPECT_EQ(slab.returned + frames.returned, 0u);
  }
  EXPECT_EQ(slab.taken, slab.returned);
  EXPECT_EQ(frames.taken, frames.returned);

  const kvtier_allocator empty{[](void*, size_t) -> void* { return nullptr; }, release, &slab};
  options.device_allocator = &empty;
  kvtier_runtime* runtime = nullptr;
  EXPECT_EQ(kvtier_runtime_open(&options, &runtime), KVTIER_NO_SPACE);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("allocator has not"));
}

TEST(CApi, ResolvedSlotsHoldWhatAStepAttends) {
  const Engine engine(small_options());
  kvtier_sequence sequence = 0;
  ASSERT_EQ(kvtier_sequence_create(engine.get(), &sequence), KVTIER_OK);
  append_all(engine.get(), sequence, 0, 120);
  const auto queries = make_queries(1);
  kvtier_query query;
  KVTIER_QUERY_INIT(&query);
  query.layer = 1;
  query.queries = queries.data();
  query.budget_tokens = 40;
  kvtier_slots slots{};
  slots.struct_size = sizeof(slots);
  ASSERT_EQ(kvtier_resolve(engine.get(), sequence, &query, &slots), KVTIER_OK)
      << kvtier_last_error();
  ASSERT_GT(slots.range_count, 0u);
  uint32_t tokens[kKvHeads] = {};
  for (uint32_t r = 0; r < slots.range_count; ++r) {
    const kvtier_range& range = slots.ranges[r];
    tokens[range.head_group] += range.tokens;
    const auto* block = static_cast<const char*>(slots.slab) + range.slot * slots.slot_stride;
    for (uint32_t t = range.first_token; t < range.first_token + range.tokens; ++t) {
      const uint32_t position = range.block * 4 + t;
      float key = 0;
      float value = 0;
      std::memcpy(&key, block + t * kDim * sizeof(float), sizeof(key));
      std::memcpy(&value, block + slots.values_offset + t * kDim * sizeof(float), sizeof(value));
      EXPECT_EQ(key, element(1, position, range.head_group, 0, 0));
      EXPECT_EQ(value, element(1, position, range.head_group, 0, 1));
    }
  }
  for (const uint32_t count : tokens) {
    EXPECT_LE(count, 40u);
    EXPECT_GE(count, 37u);
  }
}

TEST(CApi, StatisticsAndTimelines) {
  kvtier_options options = small_options();
  options.timeline_events = 1000;
  const Engine engine(options);
  kvtier_sequence sequence = 0;
  ASSERT_EQ(kvtier_sequence_create(engine.get(), &sequence), KVTIER_OK);
  append_all(engine.get(), sequence, 0, 100);
  ASSERT_EQ(ask(kvtier_step, engine, sequence, 0, make_queries(1), 40).status, KVTIER_OK);
  kvtier_stats stats{};
  stats.struct_size = sizeof(stats);
  ASSERT_EQ(kvtier_get_stats(engine.get(), &stats), KVTIER_OK);
  EXPECT_EQ(stats.steps, 1u);
  EXPECT_GT(stats.device.hits + stats.device.held_hits, 0u);
  size_t needed = 0;
  ASSERT_EQ(kvtier_get_stats_json(engine.get(), nullptr, 0, &needed), KVTIER_OK);
  std::string text(needed, '\0');
  ASSERT_EQ(kvtier_get_stats_json(engine.get(), text.data(), needed, &needed), KVTIER_OK);
  EXPECT_THAT(text, HasSubstr("\"kvtier.runtime-stats\""));
  const std::string path = testing::TempDir() + "/kvtier-timeline.json";
  EXPECT_EQ(kvtier_write_timeline(engine.get(), path.c_str()), KVTIER_OK);
  EXPECT_EQ(kvtier_write_timeline(engine.get(), "/no/such/folder/t"), KVTIER_IO_ERROR);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("/no/such/folder/t"));
  std::remove(path.c_str());
}

}  // namespace
