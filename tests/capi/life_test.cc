// The life of a sequence through the C ABI: every answer against plain float64 attention.

#include "tests/capi/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include <bit>
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

TEST(CApi, VersionsAgree) {
  const std::uint32_t version = kvtier_version();
  EXPECT_EQ(std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
                std::to_string(version % 100),
            kvtier_version_string());
}

TEST(CApi, FeaturesAreByName) {
  for (const char* name : {"disk", "exact-attention", "fork", "resolve"}) {
    EXPECT_EQ(kvtier_has_feature(name), 1) << name;
  }
  EXPECT_EQ(kvtier_has_feature("warp-drive"), 0);
  EXPECT_EQ(kvtier_has_feature(nullptr), 0);
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

// Queries and answers of another type: what comes out is the float32 answer to the rounded queries,
// rounded.
TEST(CApi, QueriesMayBeOfAnotherType) {
  Engine engine(small_options());
  const kvtier_sequence sequence = engine.create();
  engine.append(sequence, 0, 50);
  for (const kvtier_dtype dtype : {KVTIER_F16, KVTIER_BF16}) {
    kvtier_query query = engine.ask(0, 2, 256);
    std::vector<std::uint16_t> queries(engine.queries().size());
    std::vector<float> rounded(queries.size());
    for (std::size_t i = 0; i < queries.size(); ++i) {
      if (dtype == KVTIER_BF16) {
        queries[i] =
            static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(engine.queries()[i]) >> 16);
        rounded[i] = std::bit_cast<float>(std::uint32_t{queries[i]} << 16);
      } else {
        const _Float16 half = static_cast<_Float16>(engine.queries()[i]);
        queries[i] = std::bit_cast<std::uint16_t>(half);
        rounded[i] = static_cast<float>(half);
      }
    }
    query.queries = rounded.data();
    ASSERT_EQ(kvtier_step(engine.runtime, sequence, &query, nullptr), KVTIER_OK);
    const std::vector<float> expected = engine.out();
    std::vector<std::uint16_t> out(expected.size(), 0xFFFF);
    query.queries = queries.data();
    query.out = out.data();
    query.dtype = dtype;
    ASSERT_EQ(kvtier_step(engine.runtime, sequence, &query, nullptr), KVTIER_OK);
    for (std::size_t i = 0; i < out.size(); ++i) {
      const float found = dtype == KVTIER_BF16
                              ? std::bit_cast<float>(std::uint32_t{out[i]} << 16)
                              : static_cast<float>(std::bit_cast<_Float16>(out[i]));
      // Half a unit in the last of 8 or 11 bits, of numbers below 1, and the runtime's own
      // rounding.
      EXPECT_NEAR(found, expected[i], dtype == KVTIER_BF16 ? 0x1p-8 : 0x1p-11) << i;
    }
  }
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

TEST(CApi, DraftsAreTakenBackAndForksGoOn) {
  Engine engine(small_options());
  const kvtier_sequence first = engine.create();
  engine.append(first, 0, 90);
  // A rejected draft: other tokens, then the right ones at the same positions.
  engine.append(first, 1000, 5);
  ASSERT_EQ(kvtier_truncate(engine.runtime, first, 90), KVTIER_OK) << kvtier_last_error();
  engine.append(first, 90, 3);
  kvtier_sequence second = 0;
  ASSERT_EQ(kvtier_sequence_fork(engine.runtime, first, 70, &second), KVTIER_OK)
      << kvtier_last_error();
  EXPECT_NE(first, second);
  engine.append(second, 70, 30);
  kvtier_query query = engine.ask(0, 2, 256);
  ASSERT_EQ(kvtier_step(engine.runtime, first, &query, nullptr), KVTIER_OK);
  EXPECT_LT(distance(engine.out(), engine.exact_reference(0, 93)), kTolerance);
  // Each lives without the other.
  ASSERT_EQ(kvtier_sequence_free(engine.runtime, first), KVTIER_OK);
  query = engine.ask(1, 2, 256);
  ASSERT_EQ(kvtier_step(engine.runtime, second, &query, nullptr), KVTIER_OK);
  EXPECT_LT(distance(engine.out(), engine.exact_reference(1, 100)), kTolerance);
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

// What an engine with an attention of its own would read from the slots is what was appended.
TEST(CApi, ResolvedSlotsHoldTheTokens) {
  Engine engine(small_options());
  const kvtier_sequence sequence = engine.create();
  engine.append(sequence, 0, 200);
  const kvtier_query query = engine.ask(1, 1, 60);
  kvtier_slots slots = {};
  slots.struct_size = sizeof slots;
  const kvtier_status status = kvtier_resolve(engine.runtime, sequence, &query, &slots);
  ASSERT_EQ(status, KVTIER_OK) << kvtier_last_error();
  ASSERT_GT(slots.range_count, 0u);
  EXPECT_LE(slots.tokens_max, 60u);
  std::uint32_t tokens = 0;
  for (std::uint32_t i = 0; i < slots.range_count; ++i) {
    const kvtier_range& range = slots.ranges[i];
    const char* block = static_cast<const char*>(slots.slab) + range.slot * slots.slot_stride;
    const auto* keys = reinterpret_cast<const float*>(block);
    const auto* values = reinterpret_cast<const float*>(block + slots.values_offset);
    for (std::uint32_t t = range.first_token; t < range.first_token + range.tokens; ++t, ++tokens) {
      for (std::uint32_t e = 0; e < 16; ++e) {
        const std::uint32_t position = range.block * 4 + t;
        EXPECT_EQ(keys[t * 16 + e], content(1, range.head_group, position, e, false));
        EXPECT_EQ(values[t * 16 + e], content(1, range.head_group, position, e, true));
      }
    }
  }
  EXPECT_GE(tokens, slots.tokens_max);
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
