#include "selectors/key_frame.h"

#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;

std::vector<float> random_row(std::uint32_t dim, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> row(dim);
  for (float& value : row) value = static_cast<float>(random() >> 8) * 0x1p-23f - 1.0f;
  return row;
}

TEST(RopeTurn, TurnsPairsByPositionTimesFrequency) {
  // theta 100 over 4 elements: pair (0, 2) turns by 1 per position, pair (1, 3) by 1/10.
  RopeTurn turn({.theta = 100.0, .rotated_dims = 4}, 6);
  turn.set(3.0);
  std::vector<float> row = {1, 2, 0, 5, 7, 8};
  turn.apply(row.data());
  EXPECT_NEAR(row[0], std::cos(3.0), 1e-6);
  EXPECT_NEAR(row[2], std::sin(3.0), 1e-6);
  EXPECT_NEAR(row[1], 2 * std::cos(0.3) - 5 * std::sin(0.3), 1e-6);
  EXPECT_NEAR(row[3], 5 * std::cos(0.3) + 2 * std::sin(0.3), 1e-6);
  EXPECT_EQ(row[4], 7.0f);
  EXPECT_EQ(row[5], 8.0f);
}

TEST(RopeTurn, ThereAndBackIsOffByAtMostTheStatedError) {
  for (const std::uint32_t rotated : {0u, 64u}) {
    RopeTurn turn({.theta = 1e6, .rotated_dims = rotated}, 128);
    const std::uint32_t half = (rotated == 0 ? 128 : rotated) / 2;
    for (const double position : {1.0, 77.0, 4095.0, 131071.0, 1e6}) {
      const std::vector<float> row = random_row(128, static_cast<std::uint32_t>(position));
      std::vector<float> turned = row;
      turn.set(position);
      turn.apply(turned.data());
      double moved = 0.0;
      for (std::size_t i = 0; i < row.size(); ++i) moved += std::abs(turned[i] - row[i]);
      EXPECT_GT(moved, 0.5) << position;
      turn.set(-position);
      turn.apply(turned.data());
      for (std::uint32_t i = 0; i < half; ++i) {
        const double length = std::hypot(row[i], row[i + half]);
        EXPECT_NEAR(turned[i], row[i], 8 * 0x1p-24 * length) << position << ", " << i;
        EXPECT_NEAR(turned[i + half], row[i + half], 8 * 0x1p-24 * length) << position << ", " << i;
      }
    }
  }
}

// What un-rotating is for: a query at one distance sees the content of every key as if it stood
// there, whatever the true positions.
TEST(KeyFrame, UnrotatedProductsDependOnContentAlone) {
  SelectorShape shape;
  shape.dtype = DType::kF16;
  shape.kv_heads = 2;
  shape.head_dim = 64;
  shape.tokens_max = 200;
  shape.rope = {.theta = 10000.0};
  constexpr std::uint32_t kDistance = 40;
  Context context(shape, 200, 3);
  // The same content at every position, rotated as a model would.
  const std::vector<float> content = random_row(64, 1);
  RopeTurn turn(shape.rope, 64);
  for (std::uint32_t t = 0; t < 200; ++t) {
    for (std::uint32_t head = 0; head < 2; ++head) {
      std::vector<float> key = content;
      turn.set(t);
      turn.apply(key.data());
      for (std::uint32_t i = 0; i < 64; ++i) context.set_key(t, head, i, key[i]);
    }
  }
  const std::vector<float> asked = random_row(64, 2);
  std::vector<float> at_distance = asked;
  turn.set(kDistance);
  turn.apply(at_distance.data());
  double expected = 0.0;
  for (std::size_t i = 0; i < 64; ++i) expected += double{at_distance[i]} * double{content[i]};

  KeyFrame frame(shape, true, kDistance);
  const std::uint32_t position = 150;
  std::vector<float> queries(2 * 64);
  turn.set(position);
  for (std::size_t head = 0; head < 2; ++head) {
    std::vector<float> query = asked;
    turn.apply(query.data());
    std::copy(query.begin(), query.end(), queries.begin() + static_cast<std::ptrdiff_t>(head * 64));
  }
  std::vector<float> turned(queries.size());
  frame.turn_query(queries.data(), position, turned.data());
  std::uint32_t seen = 0;
  frame.feed(context.keys(0, 200), [&](const NewTokens& piece) {
    EXPECT_EQ(piece.first_position, seen);
    for (std::uint32_t t = 0; t < piece.tokens; ++t, ++seen) {
      for (std::uint32_t head = 0; head < 2; ++head) {
        const std::byte* key =
            piece.keys + t * piece.key_token_stride + head * piece.key_head_stride;
        double dot = 0.0;
        double length = 0.0;
        for (std::size_t i = 0; i < 64; ++i) {
          const double k = double{load_element(key, shape.dtype, i)};
          dot += k * double{turned[head * 64 + i]};
          length += std::abs(k * double{turned[head * 64 + i]});
        }
        // Rounded to float16 twice, rotated and not; a pair's two errors can meet in one element.
        EXPECT_NEAR(dot, expected, 4 * 0x1p-11 * length) << t;
      }
    }
  });
  EXPECT_EQ(seen, 200u);
}

TEST(KeyFrame, RefusesWhatCannotBeUnrotated) {
  SelectorShape shape;
  EXPECT_EQ(KeyFrame::check(shape, "probe").code(), StatusCode::kInvalidArgument);
  shape.rope = {.theta = 10000.0, .rotated_dims = 66};
  EXPECT_EQ(KeyFrame::check(shape, "probe").code(), StatusCode::kInvalidArgument);
  shape.rope.rotated_dims = 32;
  EXPECT_TRUE(KeyFrame::check(shape, "probe").ok());
  const auto factory = make_selector_factory("soft-vote(frame=unrotated)");
  ASSERT_TRUE(factory.ok());
  EXPECT_EQ(missing_needs(factory->needs, {}), "the base of the rotary embedding (rope theta)");
  EXPECT_TRUE((*factory)(shape, LayerIndex(0)).status().code() == StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvtier
