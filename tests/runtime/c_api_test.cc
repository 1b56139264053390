// The C ABI as an engine sees it: only kvtier.h, through the shared library.

#include "runtime/kvtier.h"
#include "tests/runtime/c_api_calls.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

using namespace c_api_calls;
using testing::HasSubstr;

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
