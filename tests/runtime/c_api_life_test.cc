// The life of a sequence through the C ABI: every answer against plain float64 attention.

#include "tests/runtime/c_api_engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>

namespace kvtier::testing {
namespace {

using ::testing::HasSubstr;

std::string text_of(const std::function<kvtier_status(char*, std::size_t, std::size_t*)>& call) {
  std::size_t needed = 0;
  EXPECT_EQ(call(nullptr, 0, &needed), KVTIER_OK) << kvtier_last_error();
  std::string text(needed, '?');
  EXPECT_EQ(call(text.data(), needed - 1, &needed), KVTIER_NO_SPACE);
  EXPECT_EQ(text, std::string(needed, '?')) << "written although it does not fit";
  EXPECT_EQ(call(text.data(), text.size(), &needed), KVTIER_OK) << kvtier_last_error();
  EXPECT_EQ(text.back(), '\0');
  text.pop_back();
  EXPECT_EQ(text.find('\0'), std::string::npos);
  return text;
}

TEST(CApi, SelectorsAreListed) {
  const auto list = nlohmann::json::parse(text_of(kvtier_list_selectors));
  ASSERT_GT(list.size(), 10u);
  for (const auto& each : list) {
    for (const char* key : {"name", "summary", "source", "needs", "parameters", "decorates"}) {
      EXPECT_TRUE(each.contains(key)) << each;
    }
  }
}

TEST(CApi, PromptInChunksThenSteps) {
  Engine engine(small_options());
  const kvtier_sequence sequence = engine.create();
  std::uint32_t tokens = 0;
  for (const std::uint32_t chunk : {1u, 30u, 69u}) {
    engine.append(sequence, tokens, chunk);
    tokens += chunk;
    for (std::uint32_t layer = 0; layer < 2; ++layer) {
      const kvtier_query query = engine.ask(layer, chunk, 0);
      ASSERT_EQ(kvtier_attend_exact(engine.runtime, sequence, &query, nullptr), KVTIER_OK)
          << kvtier_last_error();
      EXPECT_LT(distance(engine.out(), engine.exact_reference(layer, tokens)), kTolerance);
    }
  }
  for (; tokens < 120; ++tokens) {
    engine.append(sequence, tokens, 1);
    // A budget of everything leaves nothing to estimate.
    const kvtier_query query = engine.ask(tokens % 2, 1, 256);
    kvtier_report report = {};
    report.struct_size = sizeof report;
    ASSERT_EQ(kvtier_step(engine.runtime, sequence, &query, &report), KVTIER_OK)
        << kvtier_last_error();
    EXPECT_LT(distance(engine.out(), engine.exact_reference(tokens % 2, tokens + 1)), kTolerance);
    EXPECT_EQ(report.attended_tokens_max, tokens + 1);
    EXPECT_EQ(report.attended_tokens_total, 2 * (tokens + 1));
    EXPECT_EQ(report.failures, 0u);
    EXPECT_GT(report.total_s, 0.0);
  }
  std::uint32_t counted = 0;
  EXPECT_EQ(kvtier_sequence_tokens(engine.runtime, sequence, 1, &counted), KVTIER_OK);
  EXPECT_EQ(counted, 120u);
}

TEST(CApi, RowsMayBeStrided) {
  Engine engine(small_options());
  const kvtier_sequence sequence = engine.create();
  const std::uint32_t tokens = 21;
  // Heads outside, tokens inside, a gap behind every row; keys and values in one array.
  const std::size_t row = 20;
  std::vector<float> memory(2 * 2 * tokens * row, -7.0f);
  for (std::uint32_t layer = 0; layer < 2; ++layer) {
    for (std::uint32_t i = 0; i < 2 * tokens * 16; ++i) {
      const std::uint32_t head = i / (tokens * 16);
      const std::uint32_t t = i / 16 % tokens;
      memory[(head * tokens + t) * row + i % 16] = content(layer, head, t, i % 16, false);
      memory[((2 + head) * tokens + t) * row + i % 16] = content(layer, head, t, i % 16, true);
    }
    kvtier_rows rows;
    ASSERT_EQ(KVTIER_ROWS_INIT(&rows), KVTIER_OK);
    rows.keys = memory.data();
    rows.values = memory.data() + 2 * tokens * row;
    rows.key_token_stride = rows.value_token_stride = row * sizeof(float);
    rows.key_head_stride = rows.value_head_stride = tokens * row * sizeof(float);
    rows.tokens = tokens;
    ASSERT_EQ(kvtier_append(engine.runtime, sequence, layer, &rows), KVTIER_OK);
  }
  const kvtier_query query = engine.ask(1, 3, 0);
  ASSERT_EQ(kvtier_attend_exact(engine.runtime, sequence, &query, nullptr), KVTIER_OK);
  EXPECT_LT(distance(engine.out(), engine.exact_reference(1, tokens)), kTolerance);
}

TEST(CApi, AttendedRangesAreTheBudget) {
  Engine engine(small_options());
  const kvtier_sequence sequence = engine.create();
  engine.append(sequence, 0, 200);
  const kvtier_query query = engine.ask(0, 1, 60);
  kvtier_report report = {};
  report.struct_size = sizeof report;
  ASSERT_EQ(kvtier_step(engine.runtime, sequence, &query, &report), KVTIER_OK);
  EXPECT_LE(report.attended_tokens_max, 60u);
  std::uint32_t count = 0;
  ASSERT_EQ(kvtier_attended(engine.runtime, nullptr, 0, &count), KVTIER_OK);
  ASSERT_GT(count, 2u);
  std::vector<kvtier_range> ranges(count);
  ASSERT_EQ(kvtier_attended(engine.runtime, ranges.data(), count, &count), KVTIER_OK);
  std::uint64_t total = 0;
  for (const kvtier_range& range : ranges) {
    EXPECT_LT(range.head_group, 2u);
    EXPECT_LE(range.first_token + range.tokens, 4u);
    EXPECT_LT(range.block * 4 + range.first_token, 200u);
    EXPECT_EQ(range.query, UINT32_MAX);
    total += range.tokens;
  }
  EXPECT_EQ(total, report.attended_tokens_total);
  // Statistics may be asked for in between, and whatever changes something ends it.
  kvtier_stats stats = {};
  stats.struct_size = sizeof stats;
  ASSERT_EQ(kvtier_get_stats(engine.runtime, &stats), KVTIER_OK);
  ASSERT_EQ(kvtier_attended(engine.runtime, nullptr, 0, &count), KVTIER_OK);
  EXPECT_EQ(count, ranges.size());
  engine.append(sequence, 200, 1);
  ASSERT_EQ(kvtier_attended(engine.runtime, nullptr, 0, &count), KVTIER_OK);
  EXPECT_EQ(count, 0u);
}

TEST(CApi, StatisticsSayTheSameInBothForms) {
  kvtier_options options = small_options();
  kvtier_needs needs = {};
  needs.struct_size = sizeof needs;
  ASSERT_EQ(kvtier_runtime_needs(&options, &needs), KVTIER_OK);
  options.device_capacity_bytes = needs.device_bytes;
  Engine engine(options);
  const kvtier_sequence sequence = engine.create();
  engine.append(sequence, 0, 200);
  for (int step = 0; step < 3; ++step) {
    const kvtier_query query = engine.ask(0, 1, 100);
    ASSERT_EQ(kvtier_step(engine.runtime, sequence, &query, nullptr), KVTIER_OK);
  }
  const kvtier_query query = engine.ask(0, 5, 0);
  ASSERT_EQ(kvtier_attend_exact(engine.runtime, sequence, &query, nullptr), KVTIER_OK);
  EXPECT_LT(distance(engine.out(), engine.exact_reference(0, 200)), kTolerance);
  kvtier_stats stats = {};
  stats.struct_size = sizeof stats;
  ASSERT_EQ(kvtier_get_stats(engine.runtime, &stats), KVTIER_OK);
  const auto json =
      nlohmann::json::parse(text_of([&](char* text, std::size_t room, std::size_t* n) {
        return kvtier_get_stats_json(engine.runtime, text, room, n);
      }));
  EXPECT_EQ(stats.steps, 3u);
  EXPECT_EQ(json["steps"], stats.steps);
  EXPECT_EQ(stats.exact_steps, 1u);
  EXPECT_EQ(json["exact_steps"], stats.exact_steps);
  EXPECT_EQ(stats.device.capacity_bytes, needs.device_bytes);
  EXPECT_LE(stats.device.peak_bytes, stats.device.capacity_bytes);
  EXPECT_EQ(json["tiers"]["device"]["hits"], stats.device.hits);
  EXPECT_EQ(json["tiers"]["host"]["used_bytes"], stats.host.used_bytes);
  // A device tier of one step's needs cannot hold 200 tokens.
  EXPECT_GT(stats.host.hits, 0u);
  EXPECT_GT(stats.host_to_device_bytes, 0u);

  kvtier_sequence_stats own = {};
  own.struct_size = sizeof own;
  ASSERT_EQ(kvtier_get_sequence_stats(engine.runtime, sequence, &own), KVTIER_OK);
  EXPECT_EQ(own.blocks, 2u * 2 * 50);
  EXPECT_LT(own.blocks_resident, own.blocks);
  EXPECT_EQ(own.shared_bytes, 0u);
}

TEST(CApi, TimelinesAreTraceEvents) {
  kvtier_options options = small_options();
  options.timeline_events = 1000;
  Engine engine(options);
  const kvtier_sequence sequence = engine.create();
  engine.append(sequence, 0, 40);
  const std::string path = (std::filesystem::temp_directory_path() /
                            ("kvtier_timeline_" + std::to_string(::getpid()) + ".json"))
                               .string();
  ASSERT_EQ(kvtier_write_timeline(engine.runtime, path.c_str()), KVTIER_OK) << kvtier_last_error();
  std::ifstream file(path);
  const auto json = nlohmann::json::parse(file);
  std::filesystem::remove(path);
  EXPECT_GT(json["traceEvents"].size(), 2u);
  EXPECT_EQ(kvtier_write_timeline(engine.runtime, "/nowhere/at/all.json"), KVTIER_IO_ERROR);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("/nowhere/at/all.json"));
}

TEST(CApi, DiskTierBehindAPath) {
  kvtier_options options = small_options();
  kvtier_needs needs = {};
  needs.struct_size = sizeof needs;
  ASSERT_EQ(kvtier_runtime_needs(&options, &needs), KVTIER_OK);
  options.device_capacity_bytes = needs.device_bytes;
  options.host_capacity_bytes = needs.host_bytes;
  options.disk_capacity_bytes = needs.extent_bytes_total;
  const std::string folder = std::filesystem::temp_directory_path().string();
  options.disk_path = folder.c_str();
  options.look_ahead_bytes = 1 << 16;
  Engine engine(options);
  const kvtier_sequence sequence = engine.create();
  engine.append(sequence, 0, 250);
  const kvtier_query guess = engine.ask(1, 1, 100);
  EXPECT_EQ(kvtier_hint(engine.runtime, sequence, &guess), KVTIER_OK) << kvtier_last_error();
  const kvtier_query query = engine.ask(1, 1, 256);
  ASSERT_EQ(kvtier_step(engine.runtime, sequence, &query, nullptr), KVTIER_OK)
      << kvtier_last_error();
  EXPECT_LT(distance(engine.out(), engine.exact_reference(1, 250)), kTolerance);
  kvtier_stats stats = {};
  stats.struct_size = sizeof stats;
  ASSERT_EQ(kvtier_get_stats(engine.runtime, &stats), KVTIER_OK);
  EXPECT_GT(stats.host_to_disk_bytes, 0u);
}

}  // namespace
}  // namespace kvtier::testing
