// What a caller can get wrong through the C ABI ends in a status and a message, never in a crash,
// and leaves what was there as it was.

#include "tests/runtime/c_api_engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <thread>

namespace kvtier::testing {
namespace {

using ::testing::HasSubstr;

TEST(CApiMisuse, OpenNamesTheWrongOption) {
  struct Case {
    const char* named;
    std::function<void(kvtier_options&)> spoil;
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Case cases[] = {
      {"dtype", [](kvtier_options& o) { o.dtype = static_cast<kvtier_dtype>(7); }},
      {"layers", [](kvtier_options& o) { o.layers = 0; }},
      {"kv_heads", [](kvtier_options& o) { o.kv_heads = 0; }},
      {"query_heads", [](kvtier_options& o) { o.query_heads = 5; }},
      {"query_heads", [](kvtier_options& o) { o.query_heads = 0; }},
      {"head_dim", [](kvtier_options& o) { o.head_dim = 0; }},
      {"softmax_scale", [=](kvtier_options& o) { o.softmax_scale = nan; }},
      {"logit_cap", [=](kvtier_options& o) { o.logit_cap = nan; }},
      {"tokens_per_block", [](kvtier_options& o) { o.tokens_per_block = 65; }},
      {"kv_heads_per_block", [](kvtier_options& o) { o.kv_heads_per_block = 3; }},
      {"extent", [](kvtier_options& o) { o.extent_bytes = 1000; }},
      {"sacn", [](kvtier_options& o) { o.selector = "sacn"; }},
      {"reduction", [](kvtier_options& o) { o.reduction = static_cast<kvtier_reduction>(-1); }},
      {"rest", [](kvtier_options& o) { o.rest = static_cast<kvtier_rest>(9); }},
      {"verify", [](kvtier_options& o) { o.verify = static_cast<kvtier_verify>(2); }},
      {"fifo2", [](kvtier_options& o) { o.eviction = "fifo2"; }},
      {"threads", [](kvtier_options& o) { o.threads = 1u << 30; }},
      {"tokens_max", [](kvtier_options& o) { o.tokens_max = 0; }},
      {"sequences_max", [](kvtier_options& o) { o.sequences_max = 0; }},
      {"disk_path", [](kvtier_options& o) { o.disk_capacity_bytes = 1 << 20; }},
      {"device capacity", [](kvtier_options& o) { o.device_capacity_bytes = 1; }},
      {"host capacity", [](kvtier_options& o) { o.host_capacity_bytes = 1; }},
  };
  for (const Case& each : cases) {
    kvtier_options options = small_options();
    each.spoil(options);
    EXPECT_EQ(refused_open(options), kInvalid) << each.named;
    EXPECT_THAT(kvtier_last_error(), HasSubstr(each.named));
  }
}

TEST(CApiMisuse, NullPointers) {
  Engine engine(small_options());
  kvtier_runtime* const runtime = engine.runtime;
  const kvtier_sequence sequence = engine.create();
  engine.append(sequence, 0, 40);
  const kvtier_query query = engine.ask(0, 1, 40);
  kvtier_stats stats = {};
  stats.struct_size = sizeof stats;
  kvtier_rows rows;
  ASSERT_EQ(KVTIER_ROWS_INIT(&rows), KVTIER_OK);
  rows.tokens = 1;
  kvtier_query no_queries = query;
  no_queries.queries = nullptr;
  kvtier_query no_out = query;
  no_out.out = nullptr;
  const std::uint32_t position = 0;
  std::uint32_t number = 0;
  kvtier_sequence other = 0;
  kvtier_slots slots = {};
  slots.struct_size = sizeof slots;
  const std::pair<const char*, kvtier_status> refused[] = {
      {"options_init", kvtier_options_init(nullptr, sizeof(kvtier_options))},
      {"query_init", kvtier_query_init(nullptr, sizeof(kvtier_query))},
      {"rows_init", kvtier_rows_init(nullptr, sizeof(kvtier_rows))},
      {"list_selectors", kvtier_list_selectors(nullptr, 0, nullptr)},
      {"list_selectors with room", kvtier_list_selectors(nullptr, 10, nullptr)},
      {"needs", kvtier_runtime_needs(&engine.options, nullptr)},
      {"needs of none", kvtier_runtime_needs(nullptr, nullptr)},
      {"open", kvtier_runtime_open(&engine.options, nullptr)},
      {"open with none", kvtier_runtime_open(nullptr, nullptr)},
      {"create", kvtier_sequence_create(runtime, nullptr)},
      {"create in none", kvtier_sequence_create(nullptr, &other)},
      {"fork", kvtier_sequence_fork(runtime, sequence, 1, nullptr)},
      {"fork in none", kvtier_sequence_fork(nullptr, sequence, 1, &other)},
      {"tokens", kvtier_sequence_tokens(runtime, sequence, 0, nullptr)},
      {"append", kvtier_append(runtime, sequence, 0, nullptr)},
      {"append of none", kvtier_append(runtime, sequence, 0, &rows)},
      {"append in none", kvtier_append(nullptr, sequence, 0, &rows)},
      {"truncate in none", kvtier_truncate(nullptr, sequence, 0)},
      {"observe", kvtier_observe_prompt(runtime, sequence, 0, nullptr, &position, 1)},
      {"observe nowhere",
       kvtier_observe_prompt(runtime, sequence, 0, engine.queries().data(), nullptr, 1)},
      {"step", kvtier_step(runtime, sequence, nullptr, nullptr)},
      {"step without queries", kvtier_step(runtime, sequence, &no_queries, nullptr)},
      {"step without out", kvtier_step(runtime, sequence, &no_out, nullptr)},
      {"step in none", kvtier_step(nullptr, sequence, &query, nullptr)},
      {"exact without out", kvtier_attend_exact(runtime, sequence, &no_out, nullptr)},
      {"hint", kvtier_hint(runtime, sequence, nullptr)},
      {"resolve", kvtier_resolve(runtime, sequence, &query, nullptr)},
      {"resolve of none", kvtier_resolve(runtime, sequence, nullptr, &slots)},
      {"attended", kvtier_attended(runtime, nullptr, 0, nullptr)},
      {"attended with room", kvtier_attended(runtime, nullptr, 1, &number)},
      {"stats", kvtier_get_stats(runtime, nullptr)},
      {"stats of none", kvtier_get_stats(nullptr, &stats)},
      {"json", kvtier_get_stats_json(runtime, nullptr, 0, nullptr)},
      {"sequence stats", kvtier_get_sequence_stats(runtime, sequence, nullptr)},
      {"timeline", kvtier_write_timeline(runtime, nullptr)},
  };
  for (const auto& [what, status] : refused) EXPECT_EQ(status, kInvalid) << what;
  EXPECT_EQ(kvtier_runtime_close(nullptr), KVTIER_OK);
  EXPECT_EQ(kvtier_sequence_free(runtime, 0), KVTIER_OK);
  EXPECT_EQ(kvtier_failure_text(nullptr, 0), nullptr);
  EXPECT_EQ(kvtier_failure_text(runtime, 0), nullptr);
  // lse and the report are optional, and nothing above has spoiled anything.
  kvtier_query question = engine.ask(0, 1, 256);
  question.lse = nullptr;
  ASSERT_EQ(kvtier_step(runtime, sequence, &question, nullptr), KVTIER_OK) << kvtier_last_error();
  EXPECT_LT(distance(engine.out(), engine.exact_reference(0, 40)), kTolerance);
}

// --- Sequences.

TEST(CApiMisuse, AFreedSequenceIsNeverAnother) {
  Engine engine(small_options());
  const kvtier_sequence freed = engine.create();
  engine.append(freed, 0, 40);
  ASSERT_EQ(kvtier_sequence_free(engine.runtime, freed), KVTIER_OK);
  // Takes the place of the one before.
  const kvtier_sequence later = engine.create();
  EXPECT_NE(freed, later);
  engine.append(later, 0, 40);
  const kvtier_query query = engine.ask(0, 1, 40);
  kvtier_sequence fork = 77;
  std::uint32_t tokens = 0;
  kvtier_sequence_stats stats = {};
  stats.struct_size = sizeof stats;
  const std::pair<const char*, kvtier_status> refused[] = {
      {"append", engine.append_layer(freed, 0, 40, 1)},
      {"truncate", kvtier_truncate(engine.runtime, freed, 10)},
      {"tokens", kvtier_sequence_tokens(engine.runtime, freed, 0, &tokens)},
      {"step", kvtier_step(engine.runtime, freed, &query, nullptr)},
      {"exact", kvtier_attend_exact(engine.runtime, freed, &query, nullptr)},
      {"hint", kvtier_hint(engine.runtime, freed, &query)},
      {"fork", kvtier_sequence_fork(engine.runtime, freed, 1, &fork)},
      {"stats", kvtier_get_sequence_stats(engine.runtime, freed, &stats)},
      {"free", kvtier_sequence_free(engine.runtime, freed)},
  };
  for (const auto& [what, status] : refused) EXPECT_EQ(status, kInvalid) << what;
  EXPECT_THAT(kvtier_last_error(), HasSubstr("freed"));
  EXPECT_EQ(fork, 0u);
  ASSERT_EQ(kvtier_sequence_tokens(engine.runtime, later, 0, &tokens), KVTIER_OK);
  EXPECT_EQ(tokens, 40u);
}

TEST(CApiMisuse, ASequenceOfAnotherRuntime) {
  Engine one(small_options());
  Engine two(small_options());
  const kvtier_sequence of_one = one.create();
  const kvtier_sequence of_two = two.create();
  EXPECT_NE(of_one, of_two);
  EXPECT_EQ(kvtier_truncate(two.runtime, of_one, 0), kInvalid);
  EXPECT_EQ(kvtier_sequence_free(one.runtime, of_two), kInvalid);
  EXPECT_EQ(kvtier_truncate(one.runtime, UINT64_MAX, 0), kInvalid);
  EXPECT_EQ(kvtier_truncate(one.runtime, of_one, 0), KVTIER_OK);
}

TEST(CApiMisuse, BoundsOfSequences) {
  Engine engine(small_options());
  const kvtier_sequence first = engine.create();
  engine.append(first, 0, 100);
  const kvtier_sequence second = engine.create();
  kvtier_sequence third = 77;
  EXPECT_EQ(kvtier_sequence_create(engine.runtime, &third), KVTIER_NO_SPACE);
  EXPECT_EQ(third, 0u);
  EXPECT_EQ(kvtier_sequence_fork(engine.runtime, first, 10, &third), KVTIER_NO_SPACE);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("2"));
  ASSERT_EQ(kvtier_sequence_free(engine.runtime, second), KVTIER_OK);
  EXPECT_EQ(kvtier_sequence_fork(engine.runtime, first, 101, &third), kInvalid);
  EXPECT_EQ(engine.append_layer(first, 0, 100, 157), kInvalid);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("256"));
  EXPECT_EQ(engine.append_layer(first, 2, 100, 1), kInvalid);
  EXPECT_EQ(engine.append_layer(first, UINT32_MAX, 100, 1), kInvalid);
  EXPECT_EQ(engine.append_layer(first, 0, 100, 156), KVTIER_OK) << kvtier_last_error();
}

TEST(CApiMisuse, CloseFreesWhatIsOpen) {
  kvtier_options options = small_options();
  kvtier_runtime* runtime = nullptr;
  ASSERT_EQ(kvtier_runtime_open(&options, &runtime), KVTIER_OK);
  kvtier_sequence sequence = 0;
  ASSERT_EQ(kvtier_sequence_create(runtime, &sequence), KVTIER_OK);
  EXPECT_EQ(kvtier_runtime_close(runtime), KVTIER_OK);
}

// --- Questions.

TEST(CApiMisuse, StepBeforeAppend) {
  Engine engine(small_options());
  const kvtier_sequence sequence = engine.create();
  const kvtier_query query = engine.ask(0, 1, 100);
  EXPECT_EQ(kvtier_step(engine.runtime, sequence, &query, nullptr), kInvalid);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("0 tokens"));
  EXPECT_TRUE(all_nan(engine.out()));
  EXPECT_EQ(kvtier_attend_exact(engine.runtime, sequence, &query, nullptr), kInvalid);
  engine.append(sequence, 0, 1);
  EXPECT_EQ(kvtier_step(engine.runtime, sequence, &query, nullptr), KVTIER_OK)
      << kvtier_last_error();
}

TEST(CApiMisuse, WrongQuestions) {
  Engine engine(small_options());
  const kvtier_sequence sequence = engine.create();
  engine.append(sequence, 0, 100);
  struct Case {
    const char* named;
    kvtier_status status;
    std::function<void(kvtier_query&)> spoil;
  };
  static int somewhere = 0;
  const Case cases[] = {
      {"layer", kInvalid, [](kvtier_query& q) { q.layer = 2; }},
      {"query_count", kInvalid, [](kvtier_query& q) { q.query_count = 0; }},
      {"dtype", kInvalid, [](kvtier_query& q) { q.dtype = static_cast<kvtier_dtype>(3); }},
      {"budget", kInvalid, [](kvtier_query& q) { q.budget_tokens = 19; }},
      {"memory", kInvalid, [](kvtier_query& q) { q.memory = static_cast<kvtier_memory>(2); }},
      {"device", KVTIER_UNSUPPORTED, [](kvtier_query& q) { q.memory = KVTIER_MEMORY_DEVICE; }},
      {"stream", KVTIER_UNSUPPORTED, [](kvtier_query& q) { q.stream = &somewhere; }},
  };
  for (const Case& each : cases) {
    kvtier_query query = engine.ask(0, 1, 100);
    each.spoil(query);
    EXPECT_EQ(kvtier_step(engine.runtime, sequence, &query, nullptr), each.status) << each.named;
    EXPECT_THAT(kvtier_last_error(), HasSubstr(each.named));
  }
  kvtier_query query = engine.ask(0, 101, 256);
  EXPECT_EQ(kvtier_step(engine.runtime, sequence, &query, nullptr), kInvalid);
  EXPECT_EQ(kvtier_attend_exact(engine.runtime, sequence, &query, nullptr), kInvalid);
  EXPECT_TRUE(all_nan(engine.out()));
}

// Whatever the type of the answer, a refused question leaves no number behind that could be taken
// for one: not of this step, and not of the step before.
TEST(CApiMisuse, NoNumbersAfterARefusal) {
  Engine engine(small_options());
  const kvtier_sequence sequence = engine.create();
  engine.append(sequence, 0, 100);
  std::vector<std::uint16_t> queries(64, 0x3C00);  // Ones, as float16.
  std::vector<std::uint16_t> out(64, 0);
  kvtier_query query = engine.ask(0, 1, 100);
  query.queries = queries.data();
  query.out = out.data();
  query.dtype = KVTIER_F16;
  ASSERT_EQ(kvtier_step(engine.runtime, sequence, &query, nullptr), KVTIER_OK);
  queries[5] = 0x7C00;  // Infinity.
  out.assign(64, 0);
  EXPECT_EQ(kvtier_step(engine.runtime, sequence, &query, nullptr), kInvalid);
  for (const std::uint16_t value : out) EXPECT_GT(value & 0x7FFF, 0x7C00) << "not NaN";
  EXPECT_TRUE(all_nan(engine.lse()));
}

TEST(CApiMisuse, WrongRows) {
  Engine engine(small_options());
  const kvtier_sequence sequence = engine.create();
  std::vector<float> memory(64, 1.0f);
  kvtier_rows rows;
  ASSERT_EQ(KVTIER_ROWS_INIT(&rows), KVTIER_OK);
  rows.keys = rows.values = memory.data();
  rows.tokens = 1;
  rows.key_head_stride = rows.value_head_stride = 64;
  kvtier_rows wrong = rows;
  wrong.memory = KVTIER_MEMORY_DEVICE;
  EXPECT_EQ(kvtier_append(engine.runtime, sequence, 0, &wrong), KVTIER_UNSUPPORTED);
  EXPECT_THAT(kvtier_last_error(), HasSubstr("device"));
  wrong = rows;
  wrong.stream = memory.data();
  EXPECT_EQ(kvtier_append(engine.runtime, sequence, 0, &wrong), KVTIER_UNSUPPORTED);
  wrong = rows;
  wrong.reserved = 1;
  EXPECT_EQ(kvtier_append(engine.runtime, sequence, 0, &wrong), kInvalid);
  std::uint32_t tokens = 7;
  ASSERT_EQ(kvtier_sequence_tokens(engine.runtime, sequence, 0, &tokens), KVTIER_OK);
  EXPECT_EQ(tokens, 0u);
}

TEST(CApiMisuse, PromptQueriesOfTokensThatAreNotThere) {
  Engine engine(small_options());
  const kvtier_sequence sequence = engine.create();
  engine.append(sequence, 0, 10);
  static_cast<void>(engine.ask(0, 2, 10));
  const std::uint32_t behind[] = {3, 10};
  const std::uint32_t descending[] = {3, 3};
  const std::uint32_t right[] = {3, 9};
  const float* queries = engine.queries().data();
  EXPECT_EQ(kvtier_observe_prompt(engine.runtime, sequence, 0, queries, behind, 2), kInvalid);
  EXPECT_EQ(kvtier_observe_prompt(engine.runtime, sequence, 0, queries, descending, 2), kInvalid);
  EXPECT_EQ(kvtier_observe_prompt(engine.runtime, sequence, 2, queries, right, 2), kInvalid);
  EXPECT_EQ(kvtier_observe_prompt(engine.runtime, sequence, 0, queries, right, 2), KVTIER_OK);
}

// Every selector by its name alone: it opens and answers, or says what it lacks.
TEST(CApiMisuse, EverySelectorAnswersOrSaysWhyNot) {
  std::size_t needed = 0;
  ASSERT_EQ(kvtier_list_selectors(nullptr, 0, &needed), KVTIER_OK);
  std::string list(needed, ' ');
  ASSERT_EQ(kvtier_list_selectors(list.data(), needed, &needed), KVTIER_OK);
  std::size_t answered = 0;
  for (std::size_t at = list.find("\"name\": \""); at != std::string::npos;
       at = list.find("\"name\": \"", at + 1)) {
    const std::size_t begin = at + 9;
    const std::string name = list.substr(begin, list.find('"', begin) - begin);
    kvtier_options options = small_options();
    options.selector = name.c_str();
    kvtier_runtime* runtime = nullptr;
    if (kvtier_runtime_open(&options, &runtime) != KVTIER_OK) {
      EXPECT_STRNE(kvtier_last_error(), "") << name;
      continue;
    }
    ASSERT_EQ(kvtier_runtime_close(runtime), KVTIER_OK);
    Engine engine(options);
    kvtier_sequence sequence = 0;
    if (kvtier_sequence_create(engine.runtime, &sequence) != KVTIER_OK) {
      EXPECT_STRNE(kvtier_last_error(), "") << name;
      continue;
    }
    engine.append(sequence, 0, 150);
    const kvtier_query query = engine.ask(1, 1, 60);
    const kvtier_status status = kvtier_step(engine.runtime, sequence, &query, nullptr);
    if (status == KVTIER_OK) ++answered;
    EXPECT_THAT(status, ::testing::AnyOf(KVTIER_OK, kInvalid, KVTIER_UNSUPPORTED)) << name;
    EXPECT_EQ(status != KVTIER_OK, all_nan(engine.out())) << name;
  }
  EXPECT_GT(answered, 10u);
}

// --- Threads.

TEST(CApiMisuse, MessagesBelongToTheirThread) {
  EXPECT_EQ(kvtier_options_init(nullptr, 8), kInvalid);
  EXPECT_STRNE(kvtier_last_error(), "");
  std::thread([] { EXPECT_STREQ(kvtier_last_error(), ""); }).join();
  kvtier_options options;
  EXPECT_EQ(KVTIER_OPTIONS_INIT(&options), KVTIER_OK);
  EXPECT_STRNE(kvtier_last_error(), "") << "of the last failure, whatever succeeded since";
}

}  // namespace
}  // namespace kvtier::testing
