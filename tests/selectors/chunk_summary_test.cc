#include "selectors/rank_blocks.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

constexpr std::uint32_t kSummarisedTokens = 170;
constexpr std::uint32_t kChunk = 16;

/// One query head per KV head and mean reduction: a unit's score is its chunk's logit.
SelectorShape summary_shape() {
  SelectorShape shape;
  shape.dtype = DType::kF32;
  shape.kv_heads = 2;
  shape.head_dim = 64;
  shape.tokens_per_block = 8;
  shape.sinks = 3;
  shape.window = 10;
  shape.softmax.scale = 0.1f;
  shape.reduction = GroupReduction::kMean;
  shape.tokens_max = kSummarisedTokens;
  return shape;
}

using Vector = std::vector<double>;

double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (std::size_t e = 0; e < a.size(); ++e) sum += a[e] * b[e];
  return sum;
}

/// Attention of a query over rows, returning rows.
Vector attend_rows(const Vector& query, std::span<const Vector> rows, double scale) {
  Vector out(query.size());
  double total = 0;
  for (const Vector& row : rows) total += std::exp(scale * dot(query, row));
  for (const Vector& row : rows) {
    const double weight = std::exp(scale * dot(query, row)) / total;
    for (std::size_t e = 0; e < out.size(); ++e) out[e] += weight * row[e];
  }
  return out;
}

Vector plain_summary(const std::vector<Vector>& keys, double scale) {
  Vector mean(keys[0].size());
  for (std::size_t t = 0; t < keys.size(); ++t) {
    const Vector out = attend_rows(keys[t], std::span(keys).first(t + 1), scale);
    for (std::size_t e = 0; e < mean.size(); ++e) mean[e] += out[e] / double(keys.size());
  }
  return attend_rows(mean, keys, scale);
}

TEST(ChunkSummary, ScoresAreThoseOfTheDefinition) {
  const SelectorShape shape = summary_shape();
  const Context context(shape, kSummarisedTokens, 12);
  const auto selector = make("chunk-summary(tokens=16)", shape);
  selector->append(context.keys(0, kSummarisedTokens));
  const auto answer =
      select(*selector, shape, context.request(kSummarisedTokens - 1, kSummarisedTokens));
  for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
    Vector query;
    for (std::uint32_t e = 0; e < shape.head_dim; ++e) query.push_back(context.query(0, head, e));
    ASSERT_EQ(answer[head].ranked.size(), 20u);
    for (const SelectedUnit& unit : answer[head].ranked) {
      const std::uint32_t chunk = unit.block.value / 2;
      std::vector<Vector> keys;
      const std::uint32_t end = std::min((chunk + 1) * kChunk, kSummarisedTokens);
      for (std::uint32_t t = std::max(chunk * kChunk, shape.sinks); t < end; ++t) {
        keys.emplace_back();
        for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
          keys.back().push_back(double{context.key(t, head, e)});
        }
      }
      const double scale = double{shape.softmax.scale};
      EXPECT_NEAR(double{unit.score}, scale * dot(query, plain_summary(keys, scale)), 1e-4);
    }
  }
}

/// Rotates every key and the first query of a context as a model would, in float64.
void rotate(const SelectorShape& shape, std::uint32_t position, Context& context) {
  const std::uint32_t half = shape.rope.rotated_dims / 2;
  const auto turned = [&](std::uint32_t at, std::uint32_t i, double low, double high) {
    const double angle = at * std::pow(shape.rope.theta, -double(i) / half);
    return std::pair(static_cast<float>(low * std::cos(angle) - high * std::sin(angle)),
                     static_cast<float>(high * std::cos(angle) + low * std::sin(angle)));
  };
  for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
    for (std::uint32_t i = 0; i < half; ++i) {
      for (std::uint32_t t = 0; t < context.tokens(); ++t) {
        const auto [low, high] =
            turned(t, i, double{context.key(t, head, i)}, double{context.key(t, head, i + half)});
        context.set_key(t, head, i, low);
        context.set_key(t, head, i + half, high);
      }
      float* query = context.queries().data() + std::size_t{head} * shape.head_dim;
      const auto [low, high] = turned(position, i, double{query[i]}, double{query[i + half]});
      query[i] = low;
      query[i + half] = high;
    }
  }
}

TEST(ChunkSummary, TheUnrotatedFrameTakesTheRotationOut) {
  SelectorShape shape = summary_shape();
  shape.rope = {.theta = 10000.0, .rotated_dims = 48};
  Context context(shape, kSummarisedTokens, 13);
  const SelectRequest request = context.request(kSummarisedTokens - 1, kSummarisedTokens);
  const auto ask = [&](const char* name) {
    const auto selector = make(name, shape);
    selector->append(context.keys(0, kSummarisedTokens));
    return select(*selector, shape, request);
  };
  const auto plain = ask("chunk-summary(tokens=16,frame=rotated)");
  rotate(shape, kSummarisedTokens - 1, context);
  const auto unrotated = ask("chunk-summary(tokens=16,frame=unrotated)");
  const auto rotated = ask("chunk-summary(tokens=16,frame=rotated)");
  double difference = 0;
  for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
    for (std::size_t i = 0; i < plain[head].ranked.size(); ++i) {
      EXPECT_EQ(unrotated[head].ranked[i].block, plain[head].ranked[i].block);
      EXPECT_NEAR(unrotated[head].ranked[i].score, plain[head].ranked[i].score, 1e-4);
      difference += std::abs(rotated[head].ranked[i].score - plain[head].ranked[i].score);
    }
  }
  EXPECT_GT(difference, 1.0) << "the rotation makes no difference";
}

TEST(ChunkSummary, SaysWhatItNeedsToUnrotate) {
  const auto factory = make_selector_factory("chunk-summary(frame=unrotated)");
  ASSERT_TRUE(factory.ok());
  EXPECT_EQ(missing_needs(factory->needs, {}), "the base of the rotary embedding (rope theta)");
  EXPECT_EQ((*factory)(summary_shape(), LayerIndex(0)).status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_FALSE(make_selector_factory("chunk-summary")->needs.rope);
}

}  // namespace
}  // namespace kvtier
