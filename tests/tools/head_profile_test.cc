// kvtier profile heads: figures against obvious loops, and the file that replays read.

#include "tools/profile/head_profile.h"

#include "tests/tools/make_trace.h"
#include "tests/tools/run_kvtier.h"
#include "tools/replay/exact_attention.h"
#include "tools/trace/head_classes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

namespace kvtier {
namespace {

using nlohmann::ordered_json;
using ::testing::HasSubstr;

/// Attention of one query head on every token it sees, from the recorded tensors in float64.
std::vector<double> plain_weights(const AttentionTrace& trace, std::size_t layer,
                                  std::uint32_t step, std::uint32_t head) {
  const TraceManifest& manifest = trace.manifest();
  const std::uint32_t dim = manifest.model.head_dim;
  const std::uint32_t kv_head = head / (manifest.model.query_heads / manifest.model.kv_heads);
  const TraceLayer& source = trace.layers()[layer];
  std::vector<double> weights;
  double sum = 0.0;
  for (std::uint32_t t = 0; t <= trace.query_positions()[step]; ++t) {
    double logit = 0.0;
    for (std::uint32_t i = 0; i < dim; ++i) {
      logit += double{load_element(source.queries.data(), manifest.dtype,
                                   (step * manifest.model.query_heads + head) * dim + i)} *
               double{load_element(source.keys.data(), manifest.dtype,
                                   (t * manifest.model.kv_heads + kv_head) * dim + i)};
    }
    weights.push_back(std::exp(manifest.softmax_scale * logit));
    sum += weights.back();
  }
  for (double& weight : weights) weight /= sum;
  return weights;
}

TEST(HeadProfile, FiguresAreThoseOfPlainAttention) {
  const ScratchFolder folder;
  write_trace(make_trace({.tokens = 60, .steps = 21, .evidence = {{12, 20}}}), folder.path());
  const auto trace = AttentionTrace::open(folder.path());
  ASSERT_TRUE(trace.ok()) << trace.status().to_string();
  const HeadProfileOptions options{.sinks = 3, .window = 10, .threshold = 0.4};
  Progress progress;
  WorkerPool pool(2);
  const auto profile = profile_heads(*trace, options, pool, progress);
  ASSERT_TRUE(profile.ok()) << profile.status().to_string();
  ASSERT_EQ(profile->layers, (std::vector<std::uint32_t>{1, 3}));
  ASSERT_EQ(profile->heads.size(), 2u);
  for (std::size_t layer = 0; layer < 2; ++layer) {
    ASSERT_EQ(profile->heads[layer].size(), 2u);
    for (std::uint32_t kv_head = 0; kv_head < 2; ++kv_head) {
      double most = 0.0;
      double high = 0.0;
      double evidence = 0.0;
      for (std::uint32_t head = 2 * kv_head; head < 2 * kv_head + 2; ++head) {
        std::vector<double> far;
        double seen = 0.0;
        double answers = 0.0;
        for (std::uint32_t step = 0; step < 21; ++step) {
          const auto weights = plain_weights(*trace, layer, step, head);
          double mass = 0.0;
          for (std::size_t t = 3; t + 10 < weights.size(); ++t) mass += weights[t];
          far.push_back(mass);
          const std::uint32_t next = trace->query_positions()[step] + 1;
          for (const TraceTurn& turn : trace->manifest().turns) {
            if (next < turn.answer_start || next >= turn.end) continue;
            ++answers;
            for (const TokenSpan& span : turn.evidence) {
              for (std::uint32_t t = span.begin; t < span.end; ++t) seen += weights[t];
            }
          }
        }
        double sum = 0.0;
        for (double mass : far) sum += mass / 21;
        most = std::max(most, sum);
        // One step of 21 may be above it.
        std::ranges::sort(far);
        high = std::max(high, far[19]);
        ASSERT_GT(answers, 0.0);
        evidence = std::max(evidence, seen / answers);
      }
      const HeadFigures& figures = profile->heads[layer][kv_head];
      EXPECT_NEAR(figures.far_mass, most, 1e-5);
      EXPECT_NEAR(figures.far_mass_high, high, 1e-5);
      ASSERT_TRUE(figures.evidence_mass.has_value());
      EXPECT_NEAR(*figures.evidence_mass, evidence, 1e-5);
      EXPECT_EQ(figures.retrieval, most >= 0.4);
    }
  }
}

TEST(HeadProfile, TheFileIsWhatHeadClassReads) {
  const ScratchFolder folder;
  const std::string trace = folder.path() / "trace";
  write_trace(make_trace({.tokens = 60, .steps = 6}), trace);
  const std::string file = folder.path() / "heads.json";
  // Everything looks far enough for a threshold of nothing, and nothing for one of everything.
  for (const bool all : {true, false}) {
    const Outcome outcome =
        run_kvtier({"profile", "heads", trace, "--sinks", "2", "--window", "8", "--threshold",
                    all ? "0" : "1", "--output", file, "--format", "json"});
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_EQ(outcome.errors, "");
    const ordered_json json = ordered_json::parse(outcome.output);
    EXPECT_EQ(json["schema"], "kvtier.head-profile");
    EXPECT_EQ(json["version"], 1);
    EXPECT_EQ(json["retrieval_heads"], all ? 4 : 0);
    EXPECT_EQ(json["heads"].size(), 4u);
    EXPECT_THAT(json["digest"].get<std::string>(), ::testing::StartsWith("sha256:"));
    const auto classes = read_head_classes(file);
    ASSERT_TRUE(classes.ok()) << classes.status().to_string();
    EXPECT_EQ(classes->retrieval, std::vector<std::vector<bool>>(2, std::vector<bool>(2, all)));
  }
  const Outcome replayed = run_kvtier({"replay", trace, "--sinks", "2", "--window", "8", "--budget",
                                       "20", "--selector", "head-class(file=" + file + ")/scan",
                                       "--device-capacity", "100%", "--host-capacity", "8MiB"});
  EXPECT_EQ(replayed.exit_code, 0) << replayed.errors;
}

TEST(HeadProfile, TheTableSaysWhatWasFoundAndTheSameEveryTime) {
  const ScratchFolder folder;
  write_trace(make_trace({.tokens = 60, .steps = 6}), folder.path());
  const std::vector<std::string> arguments = {"profile", "heads", folder.path(), "--threads"};
  std::vector<std::string> one = arguments;
  one.push_back("1");
  std::vector<std::string> two = arguments;
  two.push_back("2");
  const Outcome outcome = run_kvtier(one);
  EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_THAT(outcome.output, HasSubstr("of 4 KV heads"));
  EXPECT_THAT(outcome.output, HasSubstr("retrieval from far-mass of 0.1"));
  EXPECT_EQ(run_kvtier(two).output, outcome.output);
}

TEST(HeadProfile, RefusesWhatItCannotUse) {
  const ScratchFolder folder;
  const std::string trace = folder.path() / "trace";
  write_trace(make_trace({}), trace);
  const struct {
    std::vector<std::string> arguments;
    int exit_code;
    const char* says;
  } kCases[] = {
      {{"profile"}, 2, "kvtier profile --help"},
      {{"profile", "heads"}, 2, "kvtier profile heads --help"},
      {{"profile", "heads", trace, "--threshold", "1.5"}, 2, "from 0 to 1"},
      {{"profile", "heads", trace, "--by", "taste"}, 2, "far-mass or evidence"},
      {{"profile", "heads", trace, "--window", "-1"}, 2, "--window"},
      {{"profile", "heads", trace, "--output", folder.path() / "no" / "f.json"}, 2, "--output"},
      {{"profile", "heads", folder.path() / "nowhere"}, 3, "nowhere"},
  };
  for (const auto& each : kCases) {
    const Outcome outcome = run_kvtier(each.arguments);
    EXPECT_EQ(outcome.exit_code, each.exit_code) << each.says;
    EXPECT_THAT(outcome.errors, HasSubstr(each.says));
    EXPECT_EQ(outcome.output, "");
  }
  const Outcome help = run_kvtier({"profile", "heads", "--help"});
  EXPECT_EQ(help.exit_code, 0);
  EXPECT_THAT(help.output, HasSubstr("Examples:"));
}

TEST(HeadProfile, ByEvidenceNeedsSome) {
  const ScratchFolder folder;
  TraceDraft draft = make_trace({.tokens = 60, .steps = 6});
  for (auto& turn : draft.manifest["turns"]) turn["evidence"] = ordered_json::array();
  write_trace(draft, folder.path());
  const Outcome outcome = run_kvtier({"profile", "heads", folder.path(), "--by", "evidence"});
  EXPECT_EQ(outcome.exit_code, 3);
  EXPECT_THAT(outcome.errors, HasSubstr("names no evidence"));
}

}  // namespace
}  // namespace kvtier
