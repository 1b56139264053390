// Models' configs against arithmetic by hand, spelled out, and against the totals of a published
// catalogue.

#include "tools/profile/model_config.h"

#include "tests/tools/profile_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace kvtier {
namespace {

using testing::HasSubstr;

constexpr KvTypes kBf16{};  // 2 bytes, and 4 for recurrent states.

struct Totals {
  double per_token = 0;
  double index_per_token = 0;
  double fixed = 0;
};

Totals totals(const ModelDescription& model, std::uint32_t gpus = 1) {
  Totals sum;
  for (const LayerDescription& layer : model.layers) {
    const LayerBytes bytes = layer_bytes(layer, kBf16, gpus);
    sum.per_token += bytes.per_token;
    sum.index_per_token += bytes.index_per_token;
    sum.fixed += bytes.fixed;
  }
  return sum;
}

void expect_totals(const std::string& name, double per_token, double fixed, double index = 0) {
  SCOPED_TRACE(name);
  const Result<ModelDescription> model = read_model_config(config_path(name));
  ASSERT_TRUE(model.ok()) << model.status().to_string();
  const Totals sum = totals(*model);
  EXPECT_EQ(sum.per_token, per_token);
  EXPECT_EQ(sum.index_per_token, index);
  EXPECT_EQ(sum.fixed, fixed);
}

TEST(ModelConfig, FullAttention) {
  // layers x KV heads x (key + value) x 2 bytes.
  expect_totals("llama-2-7b", 32.0 * 32 * (128 + 128) * 2, 0);    // 524288
  expect_totals("llama-3.1-8b", 32.0 * 8 * (128 + 128) * 2, 0);   // 131072
  expect_totals("qwen2.5-7b", 28.0 * 4 * (128 + 128) * 2, 0);     // 57344
  expect_totals("qwen3-30b-a3b", 48.0 * 4 * (128 + 128) * 2, 0);  // 98304
  expect_totals("phi-4", 40.0 * 10 * (128 + 128) * 2, 0);         // 204800
  expect_totals("glm-4-9b", 40.0 * 2 * (128 + 128) * 2, 0);       // 40960
}

TEST(ModelConfig, EveryLayerSlides) {
  // Nothing grows: 32 layers keep 4096 tokens of 8 heads x 256 elements x 2 bytes.
  expect_totals("mistral-7b-v0.1", 0, 32.0 * 4096 * 8 * 256 * 2);
}

TEST(ModelConfig, LocalAndGlobalLayers) {
  // Layers 2, 4, .. 42 are global: 21 of 42, each 8 heads x (256 + 256) x 2 bytes = 8192.
  expect_totals("gemma-2-9b", 21.0 * 8192, 21.0 * 4096 * 8192);
  // Nothing but sizes is in this config: 4 KV heads of 256 by the class. Layers 6, 12, .. 30 of 34
  // are global: 5, and 29 keep 1024 tokens.
  expect_totals("gemma-3-4b", 5.0 * 4 * 512 * 2, 29.0 * 1024 * 4 * 512 * 2);
  // Global layers have 4 heads of 512, local ones 16 of 256; keys and values are kept apart
  // although one projection makes both.
  expect_totals("gemma-4-31b", 10.0 * 4 * (512 + 512) * 2, 50.0 * 1024 * 16 * (256 + 256) * 2);
  // The last 20 of 35 layers keep nothing: of the first 15, layers 5, 10 and 15 are global.
  expect_totals("gemma-4-e2b", 3.0 * 1 * (512 + 512) * 2, 12.0 * 512 * 1 * (256 + 256) * 2);
  expect_totals("gpt-oss-20b", 12.0 * 8 * (64 + 64) * 2, 12.0 * 128 * 8 * (64 + 64) * 2);
  expect_totals("command-r7b", 8.0 * 8 * 256 * 2, 24.0 * 4096 * 8 * 256 * 2);
  // Three of four layers attend within chunks of 8192, the fourth has no rope and attends all.
  expect_totals("llama-4-scout", 12.0 * 8 * 256 * 2, 36.0 * 8192 * 8 * 256 * 2);
}

TEST(ModelConfig, LinearAndFullLayers) {
  // 36 of 48 layers: a state of 32 heads x 128 x 128 in float32, and three inputs before the
  // present one of 2 x 16 x 128 + 32 x 128 channels in bfloat16.
  expect_totals("qwen3-next-80b-a3b", 12.0 * 2 * (256 + 256) * 2,
                36.0 * (32 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 32 * 128) * 2));
  expect_totals("qwen3.5-27b", 16.0 * 4 * (256 + 256) * 2,
                48.0 * (48 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 48 * 128) * 2));
  // Keys of 96, values of 192.
  expect_totals("olmo-hybrid-7b", 8.0 * 30 * (128 + 128) * 2,
                24.0 * (30 * 96 * 192 * 4 + 3 * (2 * 30 * 96 + 30 * 192) * 2));
  // Layers 4, 8, .. 24 and 27, counted from one, are MLA; the other 20 have 32 heads of 128.
  expect_totals("kimi-linear-48b", 7.0 * (512 + 64) * 2,
                20.0 * (32 * 128 * 128 * 4 + 3 * (3 * 32 * 128) * 2));
}

TEST(ModelConfig, CompressedAndIndexed) {
  // One vector of 512 + 64 for all heads.
  expect_totals("deepseek-v2-lite", 27.0 * 576 * 2, 0);  // 31104
  expect_totals("deepseek-v3", 61.0 * 576 * 2, 0);       // 70272
  expect_totals("kimi-k2", 61.0 * 576 * 2, 0);
  // And a key of 128 per token for the indexer.
  expect_totals("deepseek-v3.2", 61.0 * 576 * 2, 0, 61.0 * 128 * 2);
  expect_totals("glm-5", 78.0 * 576 * 2, 0, 78.0 * 128 * 2);
}

TEST(ModelConfig, ParametersAreThosePublished) {
  const std::pair<const char*, double> published[] = {
      {"llama-2-7b", 6.74e9},      {"llama-3.1-8b", 8.03e9},     {"llama-4-scout", 109e9},
      {"qwen2.5-7b", 7.62e9},      {"qwen3-30b-a3b", 30.5e9},    {"mistral-7b-v0.1", 7.24e9},
      {"phi-4", 14.7e9},           {"glm-4-9b", 9.4e9},          {"gemma-2-9b", 9.24e9},
      {"gpt-oss-20b", 20.9e9},     {"qwen3-next-80b-a3b", 80e9}, {"kimi-linear-48b", 48e9},
      {"deepseek-v3", 671e9},      {"kimi-k2", 1.03e12},         {"glm-5", 744e9},
      {"deepseek-v2-lite", 15.7e9}};
  for (const auto& [name, parameters] : published) {
    const Result<ModelDescription> model = read_model_config(config_path(name));
    ASSERT_TRUE(model.ok()) << model.status().to_string();
    ASSERT_TRUE(model->parameters.has_value()) << name;
    EXPECT_NEAR(model->parameters->total / parameters, 1, 0.03) << name;
  }
  // 37 billion of DeepSeek V3's are said to be active.
  const auto v3 = read_model_config(config_path("deepseek-v3"));
  EXPECT_NEAR(v3->parameters->active() / 37e9, 1, 0.03);
  // Two tokens take up to twice the experts, many take all.
  EXPECT_LT(v3->parameters->read(2), 2 * v3->parameters->active());
  EXPECT_NEAR(v3->parameters->read(1e6), v3->parameters->total - v3->parameters->embedding, 1e6);
}

TEST(ModelConfig, HeadsAreSharedAmongGpus) {
  const auto model = read_model_config(config_path("llama-3.1-8b"));
  EXPECT_EQ(totals(*model, 4).per_token, 32.0 * 2 * 256 * 2);
  // 8 heads over 3 GPUs: one of them has 3. More GPUs than heads: each keeps one.
  EXPECT_EQ(totals(*model, 3).per_token, 32.0 * 3 * 256 * 2);
  EXPECT_EQ(totals(*model, 16).per_token, 32.0 * 1 * 256 * 2);
  const auto mla = read_model_config(config_path("deepseek-v3"));
  EXPECT_EQ(totals(*mla, 8).per_token, totals(*mla, 1).per_token);
}

TEST(ModelConfig, WindowsAreNotFullBeforeTheyAre) {
  const auto model = read_model_config(config_path("mistral-7b-v0.1"));
  const LayerDescription& layer = model->layers.front();
  EXPECT_EQ(layer_bytes_at(layer, kBf16, 1, 100), 100.0 * 8 * 256 * 2);
  EXPECT_EQ(layer_bytes_at(layer, kBf16, 1, 1u << 20), 4096.0 * 8 * 256 * 2);
}

// Bytes of a sequence as the catalogue of the package kvcache-simulator 0.1.3 has them for models
// that both know (bfloat16, indexer in bfloat16, recurrent states in float32).
TEST(ModelConfig, AgreesWithThePublishedCatalogue) {
  struct Row {
    const char* name;
    std::uint64_t tokens;
    double bytes;
  };
  const Row rows[] = {
      {"llama-3.1-8b", 131072, 17179869184}, {"qwen2.5-7b", 131072, 7516192768},
      {"qwen3-30b-a3b", 1024, 100663296},    {"deepseek-v3", 131072, 9210691584},
      {"kimi-k2", 131072, 9210691584},       {"deepseek-v3.2", 131072, 11257511936},
      {"glm-5", 131072, 14394851328},        {"qwen3.5-27b", 131072, 8743878656},
      {"gemma-4-31b", 131072, 11576279040},  {"gemma-4-e2b", 131072, 811597824},
      {"command-r7b", 131072, 4697620480},
  };
  for (const Row& row : rows) {
    const auto model = read_model_config(config_path(row.name));
    double bytes = 0;
    for (const LayerDescription& layer : model->layers) {
      bytes += layer_bytes_at(layer, kBf16, 1, row.tokens);
    }
    EXPECT_EQ(bytes, row.bytes) << row.name;
  }
}

TEST(ModelConfig, BothSpellingsOfRope) {
  const char* const spellings[] = {
      R"("rope_theta": 10000.0, "rope_scaling": {"type": "yarn", "factor": 40})",
      R"("rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40})"};
  for (const char* spelling : spellings) {
    const auto model = parse_config_text(with_keys("llama-2-7b", spelling));
    ASSERT_TRUE(model.ok()) << model.status().to_string();
    EXPECT_EQ(model->rope.theta, 10000.0);
    EXPECT_EQ(model->rope.scaling, "yarn");
    EXPECT_EQ(model->rope.factor, 40.0);
  }
  const auto per_kind = read_model_config(config_path("gemma-4-e2b"));
  EXPECT_EQ(per_kind->rope.theta, 1e6);
  EXPECT_EQ(per_kind->rope.local_theta, 1e4);
  EXPECT_EQ(per_kind->rope.scaling, "proportional");
}

TEST(ModelConfig, ListsPerLayerAreHonoured) {
  std::string words;
  for (int i = 0; i < 28; ++i) words += i == 3 ? ",\"full_attention\"" : ",\"sliding_attention\"";
  const auto model = parse_config_text(with_keys(
      "qwen2.5-7b", R"("layer_types": [)" + words.substr(1) + R"(], "sliding_window": 512)"));
  ASSERT_TRUE(model.ok()) << model.status().to_string();
  EXPECT_EQ(model->layers[3].kind, LayerKind::kFull);
  EXPECT_EQ(model->layers[4].kind, LayerKind::kSliding);
  EXPECT_EQ(model->layers[4].window_tokens, 512u);

  // One indexer for four layers, as from GLM-5.2 on: layers 0 to 2, then every fourth: 21 of 78.
  const auto shared =
      parse_config_text(with_keys("glm-5", R"("index_topk_freq": 4, "index_skip_topk_offset": 3)"));
  ASSERT_TRUE(shared.ok()) << shared.status().to_string();
  EXPECT_EQ(totals(*shared).index_per_token, 21.0 * 128 * 2);

  const auto tail = parse_config_text(
      with_keys("qwen2.5-7b", R"("use_sliding_window": true, "max_window_layers": 20,
                                 "sliding_window": 4096)"));
  ASSERT_TRUE(tail.ok()) << tail.status().to_string();
  EXPECT_EQ(totals(*tail).per_token, 20.0 * 4 * 256 * 2);
}

TEST(ModelConfig, WhatIsTakenForGrantedIsSaid) {
  const auto model = read_model_config(config_path("gemma-3-4b"));
  EXPECT_THAT(model->assumptions, testing::Contains(HasSubstr("num_key_value_heads")));
  EXPECT_THAT(model->assumptions, testing::Contains(HasSubstr("sliding_window_pattern")));
  const auto quantised = read_model_config(config_path("deepseek-v3"));
  EXPECT_EQ(quantised->weight_bytes_per_parameter, 1.0);
  EXPECT_THAT(quantised->assumptions, testing::Contains(HasSubstr("num_nextn_predict_layers")));
}

TEST(ModelConfig, DamageIsNamed) {
  const std::pair<std::string, const char*> cases[] = {
      {"[]", "expected an object"},
      {"{", "syntax error"},
      {R"({"hidden_size": 8})", "model_type: found nothing"},
      {R"({"model_type": "rwkv", "hidden_size": 8})",
       "num_hidden_layers, num_attention_heads, num_key_value_heads"},
      {R"({"model_type": "rwkv", "hidden_size": 8})", "--read-as"},
      {R"({"model_type": "rwkv"})", "expected one of cohere"},
      {with_keys("llama-3.1-8b", R"("num_hidden_layers": null)"), "num_hidden_layers: found null"},
      {with_keys("llama-3.1-8b", R"("num_hidden_layers": -1)"), "num_hidden_layers: found -1"},
      {with_keys("llama-3.1-8b", R"("num_key_value_heads": 5)"), "a divisor of the 32"},
      {with_keys("llama-3.1-8b", R"("num_attention_heads": 33, "num_key_value_heads": 33)"),
       "head_dim: found nothing"},
      {with_keys("llama-3.1-8b", R"("layer_types": ["full_attention"])"),
       "layer_types: found 1 elements, expected one per layer, 32"},
      {with_keys("qwen2.5-7b", R"("num_hidden_layers": 1, "layer_types": ["mamba"])"),
       "layer_types[0]: found mamba"},
      {with_keys("qwen3-30b-a3b", R"("use_sliding_window": true)"), "layer_types: found nothing"},
      {with_keys("deepseek-v3", R"("kv_lora_rank": null)"), "kv_lora_rank: found null"},
      {with_keys("deepseek-v3.2", R"("index_head_dim": 0)"), "index_head_dim: found 0"},
      {with_keys("kimi-linear-48b", R"("linear_attn_config": null)"), "linear_attn_config"},
      {with_keys("kimi-linear-48b",
                 R"("linear_attn_config": {"num_heads": 2, "head_dim": 8,
                    "short_conv_kernel_size": 4, "full_attn_layers": [28]})"),
       "found 28, expected layers from 1 to 27"},
      {with_keys("qwen3-30b-a3b", R"("num_experts_per_tok": 129)"), "at most the 128 experts"},
      {R"({"model_type": "gemma4", "text_config": {"num_hidden_layers": 2, "hidden_size": 64,
          "num_kv_shared_layers": 2}})",
       "text_config.num_kv_shared_layers: found 2"},
      {with_keys("gpt-oss-20b", R"("layer_types": null, "sliding_window_pattern": 0)"),
       "sliding_window_pattern: found 0"},
  };
  for (const auto& [text, expected] : cases) {
    const auto model = parse_config_text(text);
    ASSERT_FALSE(model.ok()) << text;
    EXPECT_THAT(model.status().message(), HasSubstr(expected)) << text;
    EXPECT_EQ(model.status().code(), StatusCode::kCorrupt);
  }
}

TEST(ModelConfig, AnUnknownFamilyCanBeReadAsAnother) {
  const std::string text = with_keys("llama-3.1-8b", R"("model_type": "novel")");
  EXPECT_FALSE(parse_config_text(text).ok());
  const auto model = parse_config_text(text, "llama");
  ASSERT_TRUE(model.ok()) << model.status().to_string();
  EXPECT_EQ(totals(*model).per_token, 131072);
}

}  // namespace
}  // namespace kvtier
