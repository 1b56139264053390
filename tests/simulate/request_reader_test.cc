// Every format, sound and damaged.

#include "tests/simulate/input_files.h"
#include "tools/simulate/hex_id.h"
#include "tools/simulate/open_request_trace.h"
#include "tools/simulate/request_readers.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zstd.h>

namespace kvtier {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::vector<BlockNumber> blocks_of(const RequestTrace& trace, std::size_t request) {
  const auto blocks = trace.blocks_of(trace.requests()[request]);
  return {blocks.begin(), blocks.end()};
}

constexpr const char* kMooncakeLines =
    "{\"timestamp\": 3000, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [7, 8]}\n"
    "\n"
    "{\"timestamp\": 0, \"input_length\": 1024, \"output_length\": 6, \"hash_ids\": [7, 9]}\r\n"
    "{\"hash_ids\": [7, 8, 10], \"x\": {\"y\": [1]}, \"timestamp\": 3000, \"input_length\": 1200}";

TEST(RequestReaders, MooncakeIsSortedStably) {
  const auto trace = open_text(kMooncakeLines);
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->format(), "mooncake");
  EXPECT_EQ(trace->block_tokens(), 512u);
  ASSERT_EQ(trace->requests().size(), 3u);
  EXPECT_EQ(trace->requests()[0].arrival_us, 0);
  EXPECT_EQ(trace->requests()[1].arrival_us, 3'000'000);
  EXPECT_EQ(trace->requests()[1].output_tokens, 5u);
  EXPECT_THAT(blocks_of(*trace, 0), ElementsAre(0, 2));
  EXPECT_THAT(blocks_of(*trace, 1), ElementsAre(0, 1));
  EXPECT_THAT(blocks_of(*trace, 2), ElementsAre(0, 1, 3));
  EXPECT_EQ(trace->tokens_at(trace->requests()[1], 1), 88u);
  EXPECT_EQ(trace->tokens_of_first(trace->requests()[1], 2), 600u);
  EXPECT_EQ(trace->unique_blocks(), 4u);
}

TEST(RequestReaders, OtherConventionsOfOrderAndPartialBlocks) {
  const auto trace =
      open_text(kMooncakeLines, {.order = RequestOrder::kFile, .drop_partial_blocks = true});
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->requests()[0].arrival_us, 3'000'000);
  EXPECT_THAT(blocks_of(*trace, 0), ElementsAre(0));
  EXPECT_THAT(blocks_of(*trace, 1), ElementsAre(0, 1));
  EXPECT_THAT(blocks_of(*trace, 2), ElementsAre(0, 2));
}

TEST(RequestReaders, CompressedReadsAsPlainAndKeepsItsOwnDigest) {
  const std::string text = kMooncakeLines;
  std::string packed(ZSTD_compressBound(text.size()), '\0');
  packed.resize(ZSTD_compress(packed.data(), packed.size(), text.data(), text.size(), 3));
  const auto plain = open_text(text);
  const auto zst = open_text(packed, {}, "trace.jsonl.zst");
  // Frames may follow each other.
  const auto twice = open_text(packed + packed, {}, "trace.jsonl.zst");
  ASSERT_TRUE(plain.ok() && zst.ok()) << zst.status().message();
  EXPECT_EQ(blocks_of(*zst, 2), blocks_of(*plain, 2));
  EXPECT_NE(zst->digest(), plain->digest());
  EXPECT_EQ(plain->digest(), "sha256:" + sha256_hex(std::as_bytes(std::span(text))));
  // The last line has no newline, so the second frame continues it.
  EXPECT_FALSE(twice.ok());
  const auto cut = open_text(packed.substr(0, packed.size() - 3), {}, "trace.jsonl.zst");
  EXPECT_THAT(cut.status().message(), HasSubstr("zstd: found the end of the file inside a frame"));
  const auto noise = open_text("no zstd at all", {}, "trace.jsonl.zst");
  EXPECT_EQ(noise.status().code(), StatusCode::kCorrupt);
}

TEST(RequestReaders, LinesLongerThanABufferAreWhole) {
  std::string line = "{\"timestamp\": 1, \"input_length\": 102400000, \"hash_ids\": [";
  for (int id = 0; id < 200'000; ++id) line += fmt::format("{}{}", id > 0 ? "," : "", id + 1000000);
  const auto trace = open_text(line + "]}\n" + line + "]}\n");
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->unique_blocks(), 200'000u);
  EXPECT_EQ(trace->references().size(), 400'000u);
}

constexpr const char* kSessionLine =
    "{\"id\":\"a\",\"block_size\":64,\"hash_id_scope\":\"local\",\"requests\":["
    "{\"t\":0.0,\"type\":\"n\",\"model\":\"m\",\"in\":130,\"out\":1,\"hash_ids\":[1,2]},"
    "{\"type\":\"subagent\",\"requests\":["
    "{\"t\":0.25,\"type\":\"s\",\"model\":\"n\",\"in\":64,\"out\":2,\"hash_ids\":[1]}],\"t\":1.5},"
    "{\"t\":1.6,\"type\":\"n\",\"model\":\"m\",\"in\":63,\"out\":3,\"hash_ids\":[]}]}\n";

TEST(RequestReaders, AgentSessionsHaveIdsOfTheirOwnAndSubAgentsShareThem) {
  const auto trace = open_text(std::string(kSessionLine) + kSessionLine);
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->format(), "agent-sessions");
  ASSERT_EQ(trace->requests().size(), 6u);
  EXPECT_EQ(trace->requests()[1].arrival_us, 1'600'000);
  EXPECT_EQ(trace->requests()[2].arrival_us, 1'750'000);
  EXPECT_EQ(trace->requests()[3].arrival_us, 60'000'000);
  EXPECT_THAT(blocks_of(*trace, 0), ElementsAre(0, 1));
  EXPECT_THAT(blocks_of(*trace, 1), ElementsAre());
  EXPECT_THAT(blocks_of(*trace, 2), ElementsAre(0));
  EXPECT_THAT(blocks_of(*trace, 3), ElementsAre(2, 3));
  EXPECT_EQ(trace->unique_blocks(), 4u);
}

TEST(RequestReaders, ModelsCanBeKeptApartAndSessionsSpread) {
  const auto trace = open_text(std::string(kSessionLine) + kSessionLine,
                               {.separate_models = true, .session_start_gap_us = 1'000'000});
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->unique_blocks(), 6u);
  EXPECT_EQ(trace->requests()[1].arrival_us, 1'000'000);
}

TEST(RequestReaders, AFolderOfSessionsIsReadByName) {
  const std::string line = kSessionLine;
  std::string pretty = line;  // A document of several lines.
  for (std::size_t at = pretty.find(','); at != std::string::npos; at = pretty.find(',', at + 2)) {
    pretty.insert(at + 1, "\n");
  }
  const InputFolder folder(
      InputFiles{{"b.json", line}, {"a.json", pretty}, {"notes.txt", "not a trace"}});
  const auto trace = open_request_trace(folder.path(), std::nullopt, {});
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->requests().size(), 6u);
  EXPECT_EQ(trace->unique_blocks(), 4u);
  const auto alone = open_request_trace(folder.path("a.json"), std::nullopt, {});
  ASSERT_TRUE(alone.ok()) << alone.status().message();
  EXPECT_EQ(alone->requests().size(), 3u);
}

TEST(RequestReaders, RagpulsePartsAreChainedThroughATrie) {
  const InputFolder folder(ragpulse_files());
  const auto trie = open_request_trace(folder.path(), std::nullopt, {});
  ASSERT_TRUE(trie.ok()) << trie.status().message();
  EXPECT_EQ(trie->identity(), TraceIdentity::kTrie);
  EXPECT_EQ(trie->block_tokens(), 0u);
  EXPECT_EQ(trie->unique_blocks(), 7u);
  EXPECT_EQ(trie->requests()[0].arrival_us, 8'500'000);
  EXPECT_EQ(trie->tokens_at(trie->requests()[0], 1), 4u);
  EXPECT_EQ(trie->tokens_of_first(trie->requests()[0], 3), 17u);
  const auto raw = open_request_trace(folder.path("0_trace.jsonl"), std::nullopt,
                                      {.identity = TraceIdentity::kRaw});
  ASSERT_TRUE(raw.ok()) << raw.status().message();
  EXPECT_EQ(raw->unique_blocks(), 4u);
}

TEST(RequestReaders, BailianIdsKeepTheirLowBitsAndAreRekeyed) {
  // Two hashes that are one number as doubles; the same content behind other content is another.
  const auto trace = open_text(
      "{\"chat_id\": 1, \"parent_chat_id\": -1, \"timestamp\": 61.114, \"input_length\": 33, "
      "\"output_length\": 9, \"type\": \"text\", \"turn\": 1, "
      "\"hash_ids\": [9223372036854775809, 9223372036854775810]}\n"
      "{\"chat_id\": 2, \"parent_chat_id\": 1, \"timestamp\": 61.2, \"input_length\": 48, "
      "\"output_length\": 9, \"type\": \"text\", \"turn\": 2, "
      "\"hash_ids\": [9223372036854775809, 9223372036854775811, 9223372036854775810]}\n");
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->format(), "bailian");
  EXPECT_EQ(trace->identity(), TraceIdentity::kTrie);
  EXPECT_EQ(trace->block_tokens(), 16u);
  EXPECT_EQ(trace->requests()[0].arrival_us, 61'114'000);
  EXPECT_THAT(blocks_of(*trace, 0), ElementsAre(0, 1));
  EXPECT_THAT(blocks_of(*trace, 1), ElementsAre(0, 2, 3));
}

TEST(RequestReaders, LmcacheHashesAreHexadecimal) {
  const std::string line =
      "{{\"timestamp\": {}, \"request_id\": \"r\", \"model_name\": \"{}\", \"chunk_size\": 256, "
      "\"seq_len\": 600, \"dtypes\": [\"bf16\"], \"shapes\": [[1]], \"chunk_hashes\": [{}]}}\n";
  const std::string wide(64, 'a');
  const auto text =
      fmt::format(fmt::runtime(line), 1.5, "m", "\"0x8000000000000001\", \"" + wide + "\"") +
      fmt::format(fmt::runtime(line), 2.5, "n",
                  "\"8000000000000002\", \"b" + wide.substr(1) + "\"") +
      fmt::format(fmt::runtime(line), 3.5, "n", "\"8000000000000001\", \"" + wide + "\"");
  const auto trace = open_text(text);
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_EQ(trace->format(), "lmcache");
  EXPECT_EQ(trace->block_tokens(), 256u);
  EXPECT_EQ(trace->unique_blocks(), 4u);
  EXPECT_EQ(blocks_of(*trace, 2), blocks_of(*trace, 0));
  const auto apart = open_text(text, {.separate_models = true});
  ASSERT_TRUE(apart.ok()) << apart.status().message();
  EXPECT_EQ(apart->unique_blocks(), 6u);
}

TEST(RequestReaders, HexIds) {
  EXPECT_EQ(parse_hex_id("ff"), 255u);
  EXPECT_EQ(parse_hex_id("0xFFFFFFFFFFFFFFFF"), ~std::uint64_t{0});
  EXPECT_TRUE(parse_hex_id("1ffffffffffffffff").has_value());
  for (const char* text : {"", "0x", "12g", "-1", " 1"}) {
    EXPECT_FALSE(parse_hex_id(text).has_value()) << text;
  }
}

TEST(RequestReaders, LengthsHaveNoIdentity) {
  const auto azure = open_text(
      "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
      "2023-11-16 18:17:03.9799601,31,8",
      {}, "azure.csv");
  ASSERT_TRUE(azure.ok()) << azure.status().message();
  EXPECT_EQ(azure->identity(), TraceIdentity::kNone);
  EXPECT_EQ(azure->requests()[0].arrival_us % 1'000'000, 979'960);
  EXPECT_EQ(azure->requests()[0].input_tokens, 4808u);
  const auto burst = open_text(
      "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log "
      "Type\n5,1,2.5,\"Chat, GPT\",472,18,490,Conversation log\n",
      {}, "burst.csv");
  ASSERT_TRUE(burst.ok()) << burst.status().message();
  EXPECT_EQ(burst->format(), "burstgpt");
  EXPECT_EQ(burst->requests()[0].arrival_us, 5'000'000);
  EXPECT_EQ(burst->requests()[0].output_tokens, 18u);
}

std::string tracelab_round(int second, int prefix, int input) {
  return fmt::format(
      "{{\"session_id\":\"s\",\"round_index\":0,\"model\":\"m\",\"input_tokens_total\":{},"
      "\"prefix_tokens\":{},\"output_tokens\":5,\"timing_events\":[{{\"timestamp\":"
      "\"2026-06-01T05:40:{:02}.500Z\"}},{{\"timestamp\":\"2026-06-01T05:40:59.000Z\"}}]}}\n",
      input, prefix, second);
}

TEST(RequestReaders, TracelabSharesWhatItSaysOnlyWhenAsked) {
  const std::string text =
      tracelab_round(1, 0, 200) + tracelab_round(2, 150, 300) + tracelab_round(3, 300, 300);
  const auto silent = open_text(text);
  ASSERT_TRUE(silent.ok()) << silent.status().message();
  EXPECT_EQ(silent->identity(), TraceIdentity::kNone);
  EXPECT_EQ(silent->references().size(), 0u);
  const auto trace = open_text(text, {.identity = TraceIdentity::kPrefixLengths});
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_THAT(blocks_of(*trace, 0), ElementsAre(0, 1, 2));
  EXPECT_THAT(blocks_of(*trace, 1), ElementsAre(0, 1, 3, 4));
  EXPECT_THAT(blocks_of(*trace, 2), ElementsAre(0, 1, 3, 4));
  const auto replay = open_text(
      "session_id,round_idx,prefix_len,input_len,output_len,tool_wait_after_ms\n"
      "a,0,0,128,10,250.5\nb,0,0,64,10,0\na,1,128,64,10,0\n",
      {.identity = TraceIdentity::kPrefixLengths}, "replay.csv");
  ASSERT_TRUE(replay.ok()) << replay.status().message();
  EXPECT_EQ(replay->format(), "tracelab-replay");
  EXPECT_EQ(replay->requests()[1].arrival_us, 250'500);
  EXPECT_THAT(blocks_of(*replay, 1), ElementsAre(0, 1, 3));
}

TEST(RequestReaders, Times) {
  EXPECT_EQ(parse_time_us("1970-01-02 00:00:01"), 86'401'000'000);
  EXPECT_EQ(parse_time_us("2026-06-01T05:40:20.151Z"), 1'780'292'420'151'000);
  for (const char* text : {"", "yesterday", "2023-13-01 00:00:00", "2023-02-30 00:00:00",
                           "2023-11-16 25:00:00", "2023-11-16 18:17:03.", "2023-11-16 18:17:03x",
                           "2023/11/16 18:17:03", "2023-11-16 18:17:03.12345678901"}) {
    EXPECT_FALSE(parse_time_us(text).has_value()) << text;
  }
}

TEST(RequestReaders, ForcedFormatsAndIdentitiesMustFit) {
  const auto forced = open_text(kMooncakeLines, {}, "trace.jsonl", TraceFormat::kAgentSessions);
  EXPECT_THAT(forced.status().message(), HasSubstr("requests: found nothing"));
  const auto bailian =
      open_text(kMooncakeLines, {.block_tokens = 512}, "trace.jsonl", TraceFormat::kBailian);
  ASSERT_TRUE(bailian.ok()) << bailian.status().message();
  EXPECT_EQ(bailian->identity(), TraceIdentity::kTrie);
  const auto lengths = open_text(kMooncakeLines, {.identity = TraceIdentity::kPrefixLengths});
  EXPECT_EQ(lengths.status().code(), StatusCode::kInvalidArgument);
  const auto azure = open_text("TIMESTAMP,ContextTokens,GeneratedTokens\n",
                               {.identity = TraceIdentity::kRaw}, "a.csv");
  EXPECT_EQ(azure.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(parse_trace_format("lcs").status().message(), HasSubstr("libCacheSim is not read"));
  EXPECT_EQ(parse_trace_format("nonsense").status().code(), StatusCode::kInvalidArgument);
  for (const std::string_view name : known_trace_formats()) {
    EXPECT_EQ(to_string(parse_trace_format(name).value()), name);
  }
}

TEST(RequestReaders, FoldersThatHoldNothingAreRefused) {
  const InputFolder empty(InputFiles{});
  EXPECT_THAT(open_request_trace(empty.path(), std::nullopt, {}).status().message(),
              HasSubstr("neither 0_trace.jsonl nor .json files"));
  const InputFolder attention(InputFiles{{"manifest.json", "{}"}});
  EXPECT_THAT(open_request_trace(attention.path(), std::nullopt, {}).status().message(),
              HasSubstr("found an attention trace, expected a request trace"));
  const auto missing = open_request_trace(empty.path("missing"), std::nullopt, {});
  EXPECT_EQ(missing.status().code(), StatusCode::kNotFound);
}

}  // namespace
}  // namespace kvtier
