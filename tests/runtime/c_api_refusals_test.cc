// Calls through the C ABI that are refused: which message, and that nothing has changed.

#include "runtime/kvtier.h"
#include "tests/runtime/c_api_calls.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using namespace c_api_calls;
using testing::HasSubstr;

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

}  // namespace
