#include "tools/trace/attention_trace.h"

#include "tests/tools/make_trace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace kvtier {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr const char* kShipped = KVTIER_SOURCE_DIR "/tests/traces/smollm2-8k-demo";

class AttentionTraceTest : public testing::Test {
 protected:
  std::string write(const MakeTraceOptions& options) {
    write_trace(make_trace(options), scratch_.path() / options.name);
    return (scratch_.path() / options.name).string();
  }

  ScratchFolder scratch_;
};

TEST_F(AttentionTraceTest, OpensByFolderAndByManifest) {
  const std::string folder = write({});
  const Result<AttentionTrace> by_folder = AttentionTrace::open(folder);
  ASSERT_TRUE(by_folder.ok()) << by_folder.status().message();
  const Result<AttentionTrace> by_manifest = AttentionTrace::open(folder + "/manifest.json");
  ASSERT_TRUE(by_manifest.ok()) << by_manifest.status().message();
  EXPECT_EQ(by_folder->digest(), by_manifest->digest());
  EXPECT_EQ(by_folder->manifest_path(), by_manifest->manifest_path());
  EXPECT_EQ(by_folder->digest().size(), std::string("sha256:").size() + 64);
}

TEST_F(AttentionTraceTest, HoldsWhatWasWritten) {
  const MakeTraceOptions options = {.logit_cap = 30, .with_sink_logits = true};
  TraceDraft draft = make_trace(options);
  write_trace(draft, scratch_.path() / "t");
  const auto trace = AttentionTrace::open((scratch_.path() / "t").string());
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  const TraceManifest& manifest = trace->manifest();
  EXPECT_EQ(manifest.tokens, 40u);
  EXPECT_EQ(manifest.context_tokens, 34u);
  EXPECT_EQ(manifest.steps, 6u);
  EXPECT_EQ(manifest.logit_cap, 30);
  EXPECT_EQ(manifest.dtype, DType::kF16);
  ASSERT_EQ(manifest.turns.size(), 2u);
  EXPECT_EQ(manifest.turns[1].evidence.at(0).begin, 17u);
  EXPECT_EQ(manifest.turns[1].evidence.at(0).end, 20u);
  EXPECT_TRUE(manifest.turns[0].solved_by_full_attention);
  EXPECT_FALSE(manifest.turns[1].solved_by_full_attention);
  EXPECT_THAT(trace->query_positions(), ElementsAre(34, 35, 36, 37, 38, 39));
  EXPECT_THAT(trace->sentence_ends(), ElementsAre(8, 16, 24, 32, 40));
  EXPECT_EQ(trace->token_ids().size(), 40u);
  ASSERT_EQ(trace->layers().size(), 2u);
  EXPECT_EQ(trace->layers()[1].number, 3u);
  EXPECT_EQ(trace->kv_bytes(), 2u * 40 * 2 * (8 + 8) * 2);
  const TraceLayer& layer = trace->layers()[1];
  const auto written = [&](const char* name) {
    return draft.tensor("layer-003.safetensors", name).bytes;
  };
  EXPECT_TRUE(std::ranges::equal(layer.keys, written("keys")));
  EXPECT_TRUE(std::ranges::equal(layer.values, written("values")));
  EXPECT_TRUE(std::ranges::equal(layer.queries, written("queries")));
  EXPECT_TRUE(std::ranges::equal(layer.prompt_queries, written("prompt_queries")));
  EXPECT_THAT(layer.prompt_query_positions, ElementsAre(0, 6, 13, 20, 27));
  EXPECT_TRUE(std::ranges::equal(std::as_bytes(layer.out), written("out")));
  EXPECT_TRUE(std::ranges::equal(std::as_bytes(layer.lse), written("lse")));
  EXPECT_TRUE(std::ranges::equal(std::as_bytes(layer.sink_logits), written("sink_logits")));
}

TEST_F(AttentionTraceTest, OptionalPartsMayBeAbsent) {
  TraceDraft draft = make_trace({.prompt_queries = 0, .with_oracle = false});
  std::erase_if(draft.files.at("tokens.safetensors"),
                [](const TensorDraft& tensor) { return tensor.name == "sentence_ends"; });
  for (const char* key : {"turns", "rope", "description"}) draft.manifest.erase(key);
  write_trace(draft, scratch_.path() / "t");
  const auto trace = AttentionTrace::open((scratch_.path() / "t").string());
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  EXPECT_TRUE(trace->manifest().turns.empty());
  EXPECT_TRUE(trace->sentence_ends().empty());
  EXPECT_TRUE(trace->layers()[0].out.empty());
  EXPECT_TRUE(trace->layers()[0].lse.empty());
  EXPECT_TRUE(trace->layers()[0].prompt_queries.empty());
  EXPECT_TRUE(trace->layers()[0].prompt_query_positions.empty());
}

TEST_F(AttentionTraceTest, EveryDtypeOpens) {
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    const std::string name(to_string(dtype));
    const auto trace = AttentionTrace::open(write({.name = name, .dtype = dtype}));
    ASSERT_TRUE(trace.ok()) << trace.status().message();
    EXPECT_EQ(trace->manifest().dtype, dtype);
    EXPECT_EQ(trace->layers()[0].keys.size(), 40 * 2 * 8 * size_of(dtype));
  }
}

// A file that is not aligned is copied on reading, not refused, and holds the same numbers.
TEST_F(AttentionTraceTest, MisalignedFilesAreCopied) {
  const auto aligned = AttentionTrace::open(write({.name = "aligned"}));
  const auto misaligned = AttentionTrace::open(write({.name = "misaligned", .misalign_bytes = 1}));
  ASSERT_TRUE(aligned.ok()) << aligned.status().message();
  ASSERT_TRUE(misaligned.ok()) << misaligned.status().message();
  EXPECT_EQ(aligned->layer_file(0).copied_bytes(), 0u);
  EXPECT_GT(misaligned->layer_file(0).copied_bytes(), 0u);
  for (const TensorView& tensor : misaligned->layer_file(0).tensors()) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(tensor.bytes.data()) % tensor.element_bytes, 0u)
        << tensor.name;
    EXPECT_TRUE(std::ranges::equal(tensor.bytes, aligned->layer_file(0).find(tensor.name)->bytes))
        << tensor.name;
  }
  EXPECT_EQ(misaligned->token_ids(), aligned->token_ids());
}

// Only tensors that need it are copied: half a word off hurts 4-byte elements, not 2-byte ones.
TEST_F(AttentionTraceTest, OnlyMisalignedTensorsAreCopied) {
  const auto trace = AttentionTrace::open(write({.misalign_bytes = 2}));
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  std::size_t wide_bytes = 0;
  for (const TensorView& tensor : trace->layer_file(0).tensors()) {
    if (tensor.element_bytes > 2) wide_bytes += tensor.bytes.size();
  }
  EXPECT_EQ(trace->layer_file(0).copied_bytes(), wide_bytes);
}

TEST_F(AttentionTraceTest, ViewsStayValidWhenMoved) {
  auto opened = AttentionTrace::open(write({.misalign_bytes = 1}));
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  const std::byte* keys = opened->layers()[0].keys.data();
  const std::byte first = keys[0];
  const AttentionTrace trace = std::move(opened).value();
  EXPECT_EQ(trace.layers()[0].keys.data(), keys);
  EXPECT_EQ(trace.layers()[0].keys[0], first);
}

TEST_F(AttentionTraceTest, OnlyLayersLeavesTheOtherFilesAlone) {
  const std::string folder = write({});
  std::filesystem::remove(std::filesystem::path(folder) / "layer-001.safetensors");
  const auto trace = AttentionTrace::open(folder, {.only_layers = {3}});
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  ASSERT_EQ(trace->layers().size(), 1u);
  EXPECT_EQ(trace->layers()[0].number, 3u);
  EXPECT_EQ(trace->kv_bytes(), 40u * 2 * (8 + 8) * 2);
  EXPECT_NE(trace->tokens_file().find("token_ids"), nullptr);
}

TEST_F(AttentionTraceTest, OnlyLayersListsTheKnownOnes) {
  const auto trace = AttentionTrace::open(write({}), {.only_layers = {1, 2}});
  ASSERT_FALSE(trace.ok());
  EXPECT_EQ(trace.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(trace.status().message(), HasSubstr("found no layer 2, expected layers out of 1, 3"));
}

TEST_F(AttentionTraceTest, HashesAreComparedUnlessToldOtherwise) {
  const std::string folder = write({});
  const std::filesystem::path file = std::filesystem::path(folder) / "layer-003.safetensors";
  std::vector<std::byte> bytes = read_bytes(file);
  bytes.back() ^= std::byte{1};
  write_bytes(file, bytes);
  EXPECT_FALSE(AttentionTrace::open(folder).ok());
  const auto trace = AttentionTrace::open(folder, {.verify_sha256 = false});
  EXPECT_TRUE(trace.ok()) << trace.status().message();
}

TEST_F(AttentionTraceTest, KeysBeforeRopeAreOnlyForThoseWhoAsk) {
  TraceDraft draft = make_trace({});
  draft.manifest["rope"]["applied_to_keys"] = false;
  write_trace(draft, scratch_.path() / "t");
  const std::string folder = (scratch_.path() / "t").string();
  const auto refused = AttentionTrace::open(folder);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kUnsupported);
  EXPECT_THAT(refused.status().message(),
              HasSubstr("manifest.json: rope.applied_to_keys: found false, expected true"));
  EXPECT_TRUE(AttentionTrace::open(folder, {.accept_unrotated_keys = true}).ok());
}

TEST_F(AttentionTraceTest, MissingPathSaysSo) {
  const std::string path = (scratch_.path() / "nowhere").string();
  const auto trace = AttentionTrace::open(path);
  ASSERT_FALSE(trace.ok());
  EXPECT_EQ(trace.status().code(), StatusCode::kNotFound);
  EXPECT_EQ(trace.status().message(), path +
                                          ": file: found No such file or directory, expected a "
                                          "regular file that can be read");
}

// Recomputes one step's attention from the opened trace in the plainest way.
double recomputed_lse(const AttentionTrace& trace, std::size_t layer_index, std::uint32_t step,
                      std::uint32_t head) {
  const TraceManifest& manifest = trace.manifest();
  const TraceModel& model = manifest.model;
  const TraceLayer& layer = trace.layers()[layer_index];
  const std::size_t query = (std::size_t{step} * model.query_heads + head) * model.head_dim;
  const std::uint32_t kv_head = head / (model.query_heads / model.kv_heads);
  std::vector<double> logits;
  for (std::size_t token = 0; token <= trace.query_positions()[step]; ++token) {
    const std::size_t key = (token * model.kv_heads + kv_head) * model.head_dim;
    double dot = 0;
    for (std::uint32_t i = 0; i < model.head_dim; ++i) {
      dot += double{load_element(layer.queries.data(), manifest.dtype, query + i)} *
             double{load_element(layer.keys.data(), manifest.dtype, key + i)};
    }
    logits.push_back(dot * manifest.softmax_scale);
  }
  const double largest = *std::ranges::max_element(logits);
  double sum = 0;
  for (const double logit : logits) sum += std::exp(logit - largest);
  return largest + std::log(sum);
}

TEST_F(AttentionTraceTest, GeneratedOracleIsAttentionOverTheStoredNumbers) {
  const auto trace = AttentionTrace::open(write({}));
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  for (std::uint32_t step = 0; step < 6; ++step) {
    for (std::uint32_t head = 0; head < 4; ++head) {
      // Stored as float32: half a unit in the last place of a number below 32.
      EXPECT_NEAR(trace->layers()[1].lse[step * 4 + head], recomputed_lse(*trace, 1, step, head),
                  0x1p-20);
    }
  }
}

TEST(ShippedTrace, HasTheRecordedFigures) {
  const auto trace = AttentionTrace::open(kShipped);
  ASSERT_TRUE(trace.ok()) << trace.status().message();
  const TraceManifest& manifest = trace->manifest();
  EXPECT_EQ(manifest.name, "smollm2-8k-demo");
  EXPECT_EQ(manifest.model.name, "SmolLM2-135M-Instruct");
  EXPECT_EQ(manifest.model.license, "Apache-2.0");
  EXPECT_EQ(manifest.model.layers, 30u);
  EXPECT_EQ(manifest.model.query_heads, 9u);
  EXPECT_EQ(manifest.model.kv_heads, 3u);
  EXPECT_EQ(manifest.model.head_dim, 64u);
  EXPECT_EQ(manifest.model.value_dim, 64u);
  EXPECT_EQ(manifest.softmax_scale, 0.125);
  EXPECT_EQ(manifest.rope_theta, 100000.0);
  EXPECT_EQ(manifest.tokens, 7547u);
  EXPECT_EQ(manifest.steps, 169u);
  EXPECT_THAT(manifest.kept_layers, ElementsAre(7, 21));
  EXPECT_EQ(manifest.turns.size(), 4u);
  EXPECT_EQ(trace->query_positions().front(), 7378u);
  EXPECT_EQ(trace->query_positions().back(), 7546u);
  EXPECT_EQ(trace->sentence_ends().size(), 376u);
  EXPECT_EQ(trace->kv_bytes(), 2u * 7547 * 3 * 128 * 2);
  for (std::size_t i = 0; i < 2; ++i) {
    const TraceLayer& layer = trace->layers()[i];
    EXPECT_EQ(layer.out.size(), 169u * 9 * 64);
    EXPECT_EQ(layer.lse.size(), 169u * 9);
    EXPECT_EQ(layer.prompt_query_positions.size(), 512u);
    EXPECT_EQ(trace->layer_file(i).copied_bytes(), 0u);
  }
  ASSERT_NE(trace->turn_at(7400), nullptr);
  EXPECT_EQ(trace->turn_at(7400)->expected.at(0), "90157");
  EXPECT_EQ(trace->turn_at(100), nullptr);
  // float32 of a float64 sum; 9 is below 16.
  EXPECT_NEAR(trace->layers()[0].lse[3 * 9 + 5], recomputed_lse(*trace, 0, 3, 5), 1e-6);
}

}  // namespace
}  // namespace kvtier
