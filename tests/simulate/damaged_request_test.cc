// Damaged request traces, of every format: one line that names file, line and field.

#include "tests/simulate/input_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace kvtier {
namespace {

using testing::HasSubstr;

TEST(DamagedRequests, RagpulseNamesTheTable) {
  const std::pair<std::pair<const char*, const char*>, const char*> cases[] = {
      {{"2_passages.jsonl", "{\"passage_id\": 5, \"token_length\": 3}\n"},
       "0_trace.jsonl:1: hash_ids.passages_ids: found id 6, expected an id of 2_passages.jsonl"},
      {{"2_passages.jsonl", "{\"passage_id\": 5, \"token_length\": -3}\n"},
       "2_passages.jsonl:1: token_length: found -3, expected a whole number"},
      {{"2_passages.jsonl",
        "{\"passage_id\": 5, \"token_length\": 3}\n{\"passage_id\": 5, \"token_length\": 4}\n"},
       "2_passages.jsonl:2: token_length: found 4 for id 5, expected 3 as before"},
      {{"1_sys_prompt.jsonl", "{\"token_length\": 3}\n"},
       "1_sys_prompt.jsonl:1: sys_prompt_id: found nothing, expected the field"},
      {{"0_trace.jsonl", "{\"timestamp\": \"soon\", \"input_length\": 1, \"hash_ids\": {}}\n"},
       "0_trace.jsonl:1: timestamp: found soon, expected seconds from the start, in quotes"},
      {{"0_trace.jsonl",
        "{\"timestamp\": \"1\", \"input_length\": 1, \"hash_ids\": {\"images\": [1]}}\n"},
       "0_trace.jsonl:1: hash_ids.images: found an unknown kind of part"},
  };
  for (const auto& [damage, message] : cases) {
    auto files = ragpulse_files();
    files[damage.first] = damage.second;
    const InputFolder folder(files);
    const auto trace = open_request_trace(folder.path(), std::nullopt, {});
    EXPECT_EQ(trace.status().code(), StatusCode::kCorrupt);
    EXPECT_THAT(trace.status().message(), HasSubstr(message));
  }
}

struct DamagedInput {
  const char* name;
  std::string text;
  const char* message;
};

const std::string kGood = "{\"timestamp\": 0, \"input_length\": 512, \"hash_ids\": [1]}\n";
const std::string kSession = "{\"block_size\": 64, \"requests\": [";
const DamagedInput kDamaged[] = {
    {"e.jsonl", "", "e.jsonl: content: found an empty file, expected a request trace"},
    {"e.jsonl", "\n \n", "e.jsonl: content: found an empty file"},
    {"a.jsonl", kGood + "{\"timestamp\": 0, \"input_length\": 512}\n",
     "a.jsonl:2: hash_ids: found nothing, expected the field"},
    {"a.jsonl", kGood + "\n{\"input_length\": 512, \"hash_ids\": [1]}\n",
     "a.jsonl:3: timestamp: found nothing, expected the field"},
    {"a.jsonl", kGood + "{\"timestamp\": 0, \"input_length\": -5, \"hash_ids\": [1]}\n",
     "a.jsonl:2: input_length: found -5, expected a whole number"},
    {"a.jsonl", kGood + "{\"timestamp\": 0, \"input_length\": 5.5, \"hash_ids\": [1]}\n",
     "a.jsonl:2: input_length: found 5.5, expected a whole number"},
    {"a.jsonl", kGood + "{\"timestamp\": \"0\", \"input_length\": 5, \"hash_ids\": [1]}\n",
     "a.jsonl:2: timestamp: found \"0\", expected a number from 0"},
    {"a.jsonl", kGood + "{\"timestamp\": 0, \"input_length\": 9, \"hash_ids\": [true]}\n",
     "a.jsonl:2: hash_ids[0]: found true, expected a block id"},
    {"a.jsonl", kGood + "{\"timestamp\": 0, \"input_length\": 900, \"hash_ids\": [1, \"q\"]}\n",
     "a.jsonl:2: hash_ids[1]: found \"q\", expected a block id"},
    {"a.jsonl",
     kGood + "{\"timestamp\": 0, \"input_length\": 9, \"hash_ids\": [36893488147419103232]}\n",
     "a.jsonl:2: hash_ids[0]: found 36893488147419103232, expected a block id"},
    {"a.jsonl", kGood + "{\"timestamp\": 0, \"input_length\": 9, \"hash_ids\": 7}\n",
     "a.jsonl:2: hash_ids: found 7, expected an array"},
    {"a.jsonl", kGood + "{\"timestamp\": 0, \"input_length\": 1025, \"hash_ids\": [1]}\n",
     "a.jsonl:2: hash_ids: found 1 ids, expected 2 or 3: 1025 tokens in blocks of 512"},
    {"a.jsonl", kGood + "{\"timestamp\": 0, \"input_length\": 512, \"hash_ids\": [1, 2]}\n",
     "a.jsonl:2: hash_ids: found 2 ids, expected 1: 512 tokens in blocks of 512"},
    {"a.jsonl", kGood + "{\"timestamp\": 0, \"timestamp\": 1}\n",
     "a.jsonl:2: timestamp: found the key twice, expected every key once per object"},
    {"a.jsonl", kGood + "{\"timestamp\": 0, \"input_length\": 512, \"hash_ids\": [1]} {}\n",
     "a.jsonl:2: record: found something behind it, expected one object per line"},
    {"a.jsonl", kGood + "{\"timestamp\": 0, \"input_length\n",
     "a.jsonl:2: record: found a syntax error, expected a JSON object"},
    {"a.jsonl", kGood + "[1, 2]\n", "a.jsonl:2: record: found an array, expected an object"},
    {"a.jsonl",
     kGood + "{\"timestamp\": 0, \"input_length\": 5000000000, \"block_size\": 5000000000, "
             "\"hash_ids\": [1]}\n",
     "a.jsonl:2: block_size: found 5000000000, expected"},
    {"a.jsonl",
     kGood + "{\"timestamp\": 0, \"input_length\": 64, \"block_size\": 64, \"hash_ids\": [1]}\n",
     "a.jsonl:2: block_size: found 64, expected 512 as before"},
    {"a.jsonl", "{\"prompt\": \"hello\"}\n",
     "a.jsonl:1: format: found an object with prompt, expected hash_ids"},
    {"a.csv", "when,what\n1,2\n", "a.csv:1: format: found 'when,what', expected the first line"},
    {"a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,many,1\n",
     "a.csv:2: ContextTokens: found 'many', expected a whole number"},
    {"a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1\n",
     "a.csv:2: row: found 2 cells, expected 3"},
    {"a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nlater,1,1\n",
     "a.csv:2: TIMESTAMP: found 'later', expected a date and time"},
    {"a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n\"open,1,1\n",
     "a.csv:2: row: found an open quote"},
    {"a.csv", "Timestamp,Request tokens,Response tokens\n-1,1,1\n",
     "a.csv:2: Timestamp: found '-1', expected a number from 0"},
    {"a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "a.csv: content: found no request"},
    {"s.json", kSession + "{\"t\": 0, \"in\": 64}]}",
     "s.json:1: requests[0].hash_ids: found nothing, expected the field"},
    {"s.json", kSession + "{\"t\": 0, \"in\": 64, \"hash_ids\": [1]}, {\"in\": 1}]}",
     "s.json:1: requests[1].t: found nothing, expected the field"},
    {"s.json", kSession + "{\"t\": 0, \"in\": 200, \"hash_ids\": [1]}]}",
     "s.json:1: hash_ids: found 1 ids, expected 3: 200 tokens in blocks of 64"},
    {"s.json", kSession + "{\"t\": 0, \"type\": \"subagent\", \"requests\": [{\"t\": \"x\"}]}]}",
     "s.json:1: requests[0].requests[0].t: found \"x\", expected a number"},
    {"s.json", "{\"requests\": []}", "s.json:1: block_size: found nothing, expected the field"},
    {"s.json", "{\"block_size\": 0, \"requests\": []}", "s.json:1: block_size: found 0"},
    {"s.json", "{\"block_size\": 64, \"hash_id_scope\": \"galaxy\", \"requests\": []}",
     "s.json:1: hash_id_scope: found galaxy, expected local or global"},
    {"t.jsonl",
     "{\"round_index\":0,\"prefix_tokens\":9,\"session_id\":\"s\","
     "\"input_tokens_total\":5,\"timing_events\":[{\"timestamp\":\"2026-06-01T05:40:20Z\"}]}\n",
     "t.jsonl:1: prefix_tokens: found 9, expected at most input_tokens_total, 5"},
    {"t.jsonl",
     "{\"round_index\":0,\"prefix_tokens\":1,\"session_id\":\"s\","
     "\"input_tokens_total\":5,\"timing_events\":[{\"timestamp\":\"noon\"}]}\n",
     "t.jsonl:1: timing_events[0].timestamp: found noon, expected a date and time"},
    {"x.lcs", "anything", "x.lcs: format: found a libCacheSim trace, expected one of mooncake"},
};

TEST(DamagedRequests, AreOneLineThatSaysWhere) {
  for (const DamagedInput& damaged : kDamaged) {
    SCOPED_TRACE(damaged.text);
    const auto trace = open_text(damaged.text, {}, damaged.name);
    ASSERT_FALSE(trace.ok());
    EXPECT_EQ(trace.status().code(), StatusCode::kCorrupt);
    EXPECT_THAT(trace.status().message(), HasSubstr(damaged.message));
    EXPECT_EQ(trace.status().message().find('\n'), std::string::npos);
  }
}

TEST(DamagedRequests, NestingWithoutEndIsRefused) {
  std::string text = "{\"block_size\": 64, \"requests\": [";
  for (int depth = 0; depth < 40; ++depth) {
    text += "{\"t\": 0, \"type\": \"subagent\", \"requests\": [";
  }
  for (int depth = 0; depth < 40; ++depth) text += "]}";
  const auto trace = open_text(text + "]}", {}, "s.json");
  EXPECT_THAT(trace.status().message(), HasSubstr("found deeper nesting"));
}

}  // namespace
}  // namespace kvtier
