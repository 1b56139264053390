#include "kernels/quantised_keys.h"
#include "selectors/rank_blocks.h"
#include "selectors/registry.h"
#include "tests/selectors/context.h"
#include "tests/selectors/reference_weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::make_codes_exact;
using testing::ReferenceWeights;
using testing::select;

SelectorShape scan_shape(std::uint32_t tokens_per_block = 4) {
  SelectorShape shape;
  shape.dtype = DType::kF32;
  shape.kv_heads = 2;
  shape.queries_per_kv_head = 3;
  shape.head_dim = 64;
  shape.value_dim = 24;
  shape.tokens_per_block = tokens_per_block;
  shape.sinks = 5;
  shape.window = 20;
  // Logits of integer keys are large; weights should spread.
  shape.softmax.scale = 0.01f;
  shape.tokens_max = 3000;
  return shape;
}

TEST(Scan, RanksAsTheOracleWhereCodesAreExact) {
  for (std::uint32_t per_block : {1u, 5u, 8u}) {
    for (GroupReduction reduction : {GroupReduction::kSum, GroupReduction::kMax}) {
      for (std::uint32_t heads_per_group : {1u, 2u}) {
        SelectorShape shape = scan_shape(per_block);
        shape.reduction = reduction;
        shape.heads_per_group = heads_per_group;
        Context context(shape, 1500, 3);
        make_codes_exact(context, shape);
        auto scan = make("scan", shape);
        scan->append(context.keys(0, 1500));
        // Positions with an open run, behind a slice's edge, and a draft.
        for (auto [position, queries] : {std::pair{1499u, 1u}, {1100u, 1u}, {1490u, 4u}}) {
          const SelectRequest request = context.request(position, 400, queries, 3000);
          const ReferenceWeights weights(context, shape, request);
          const auto selection = select(*scan, shape, request);
          for (std::uint32_t g = 0; g < selection.size(); ++g) {
            std::vector<double> best;
            const FarRegion region = FarRegion::of(shape, position);
            for (std::uint32_t b = region.begin / per_block; b * per_block < region.end; ++b) {
              best.push_back(weights.block_score(g, b));
            }
            std::ranges::sort(best, std::greater());
            ASSERT_EQ(selection[g].ranked.size(), best.size());
            double mass = 0.0;
            for (std::size_t i = 0; i < best.size(); ++i) {
              const SelectedUnit& unit = selection[g].ranked[i];
              // Dots of up to 64 * 15 * 2 are rounded, and so are exp and the sums.
              EXPECT_NEAR(double{unit.score}, best[i], 1e-5 * best[i]);
              EXPECT_NEAR(weights.block_score(g, unit.block.value), best[i], 1e-5 * best[i]);
              mass += best[i];
            }
            EXPECT_NEAR(double{selection[g].mass}, mass, 1e-5 * mass);
          }
        }
      }
    }
  }
}

TEST(Scan, UnderMeanABlockScoresItsMeanLogit) {
  SelectorShape shape = scan_shape(8);
  shape.reduction = GroupReduction::kMean;
  shape.heads_per_group = 2;
  Context context(shape, 700, 3);
  make_codes_exact(context, shape);
  auto scan = make("scan", shape);
  scan->append(context.keys(0, 700));
  const auto selection = select(*scan, shape, context.request(698, 100, 2));
  ASSERT_FALSE(selection[0].ranked.empty());
  for (const SelectedUnit& unit : selection[0].ranked) {
    double sum = 0.0;
    for (std::uint32_t t = 0; t < unit.tokens; ++t) {
      const std::uint32_t token = unit.block.value * 8 + unit.first_token + t;
      for (std::uint32_t q = 0; q < 2; ++q) {
        for (std::uint32_t head = 0; head < 6; ++head) {
          for (std::uint32_t i = 0; i < 64; ++i) {
            sum +=
                0.01 * double{context.query(q, head, i)} * double{context.key(token, head / 3, i)};
          }
        }
      }
    }
    EXPECT_NEAR(double{unit.score}, sum / (unit.tokens * 12.0), 1e-4);
  }
}

// A context that no run closes in has no codes: nothing is rounded, whatever the keys.
TEST(Scan, TheOpenRunIsExact) {
  SelectorShape shape = scan_shape(4);
  shape.softmax.scale = 0.3f;
  shape.window = 0;
  const Context context(shape, 63, 5);
  auto scan = make("scan(bits=2)", shape);
  scan->append(context.keys(0, 63));
  const SelectRequest request = context.request(62, 63);
  const ReferenceWeights weights(context, shape, request);
  const auto selection = select(*scan, shape, request);
  for (std::uint32_t g = 0; g < 2; ++g) {
    ASSERT_FALSE(selection[g].ranked.empty());
    for (const SelectedUnit& unit : selection[g].ranked) {
      const double expected = weights.block_score(g, unit.block.value);
      EXPECT_NEAR(double{unit.score}, expected, 1e-5 * expected);
    }
  }
}

struct Estimate {
  Estimate(Selector& selector, const SelectorShape& shape, const SelectRequest& request)
      : selection(select(selector, shape, request)),
        out(std::size_t{request.query_count} * shape.query_heads() * shape.value_dim, 77.0f),
        lse(std::size_t{request.query_count} * shape.query_heads(), 77.0f) {
    WorkerPool pool(2);
    EXPECT_TRUE(selector.estimate_rest(request, selection, {out.data(), lse.data()}, pool).ok());
  }
  std::vector<GroupSelection> selection;
  std::vector<float> out;
  std::vector<float> lse;
};

TEST(Scan, TheRestIsTheFormula) {
  for (std::uint32_t per_block : {1u, 5u, 64u}) {
    for (std::uint32_t values : {8u, 16u}) {
      SelectorShape shape = scan_shape(per_block);
      shape.heads_per_group = values == 16 ? 2 : 1;
      Context context(shape, 1100, 3);
      make_codes_exact(context, shape);
      auto scan = make("scan(values=" + std::to_string(values) + ")", shape);
      scan->append(context.keys(0, 1100));
      const SelectRequest request = context.request(1097, 300, 3);
      const Estimate estimate(*scan, shape, request);
      const ReferenceWeights weights(context, shape, request);
      for (std::uint32_t q = 0; q < 3; ++q) {
        for (std::uint32_t head = 0; head < 6; ++head) {
          const auto expected =
              weights.rest(q, head, estimate.selection[head / 3 / shape.heads_per_group], values);
          const std::size_t row = q * 6 + head;
          ASSERT_NEAR(double{estimate.lse[row]}, expected.lse, 1e-5);
          for (std::uint32_t i = 0; i < shape.value_dim; ++i) {
            ASSERT_NEAR(double{estimate.out[row * shape.value_dim + i]}, expected.out[i], 1e-5)
                << "blocks of " << per_block << ", values of " << values;
          }
        }
      }
    }
  }
}

/// Values that do not differ within groups of 16.
class FlatValues {
 public:
  FlatValues(const SelectorShape& shape, std::uint32_t tokens) : shape_(shape), values_() {
    values_.resize(std::size_t{tokens} * shape.kv_heads * shape.value_dim);
    for (std::size_t i = 0; i < values_.size(); ++i) {
      const std::size_t element = i % (shape.kv_heads * shape.value_dim);
      const std::size_t group = i / (shape.kv_heads * shape.value_dim) / 16;
      values_[i] = static_cast<float>((group * 31 + element * 7) % 23) / 23.0f - 0.5f;
    }
  }
  NewTokens into(NewTokens tokens) const {
    tokens.values = reinterpret_cast<const std::byte*>(values_.data());
    tokens.value_token_stride = sizeof(float) * shape_.kv_heads * shape_.value_dim;
    tokens.value_head_stride = sizeof(float) * shape_.value_dim;
    return tokens;
  }
  double value(std::uint32_t token, std::uint32_t head, std::uint32_t i) const {
    return double{values_[(std::size_t{token} * shape_.kv_heads + head) * shape_.value_dim + i]};
  }

 private:
  SelectorShape shape_;
  std::vector<float> values_;
};

TEST(Scan, EstimateAndExactAttentionMergeToTheWholeWhereValuesAreFlat) {
  SelectorShape shape = scan_shape(4);
  shape.sinks = 16;
  Context context(shape, 900, 3);
  make_codes_exact(context, shape);
  const FlatValues values(shape, 900);
  auto scan = make("scan(values=16)", shape);
  scan->append(values.into(context.keys(0, 900)));
  const SelectRequest request = context.request(899, 200);
  const Estimate estimate(*scan, shape, request);
  const ReferenceWeights weights(context, shape, request);
  const FarRegion region = FarRegion::of(shape, 899);
  for (std::uint32_t head = 0; head < 6; ++head) {
    std::vector<bool> attended(900, false);
    for (std::uint32_t t = 0; t < 900; ++t) attended[t] = t < region.begin || t >= region.end;
    const GroupSelection& group = estimate.selection[head / 3];
    ASSERT_GT(group.chosen, 10u);
    for (std::uint32_t i = 0; i < group.chosen; ++i) {
      const SelectedUnit& unit = group.ranked[i];
      const std::uint32_t begin = unit.block.value * 4 + unit.first_token;
      for (std::uint32_t t = begin; t < begin + unit.tokens; ++t) attended[t] = true;
    }
    const double rest = std::exp(double{estimate.lse[head]} - weights.lse(0, head));
    for (std::uint32_t i = 0; i < shape.value_dim; ++i) {
      double whole = 0.0;
      double merged = rest * double{estimate.out[head * shape.value_dim + i]};
      double share = rest;
      for (std::uint32_t t = 0; t < 900; ++t) {
        const double part = weights.weight(0, head, t) * values.value(t, head / 3, i);
        whole += part;
        if (!attended[t]) continue;
        merged += part;
        share += weights.weight(0, head, t);
      }
      EXPECT_NEAR(share, 1.0, 1e-5);
      EXPECT_NEAR(merged / share, whole, 1e-5);
    }
  }
}

TEST(Scan, FourBitsFindNearlyEverythingAndMoreThanTwo) {
  SelectorShape shape = scan_shape(4);
  shape.dtype = DType::kF16;
  shape.softmax.scale = 0.3f;
  double found[3] = {};
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    const Context context(shape, 1500, seed);
    const char* names[] = {"oracle", "scan(bits=4)", "scan(bits=2)"};
    for (std::size_t i = 0; i < 3; ++i) {
      auto selector = make(names[i], shape);
      selector->append(context.keys(0, 1500));
      for (std::uint32_t position : {1499u, 1200u}) {
        const SelectRequest request = context.request(position, 100);
        const ReferenceWeights weights(context, shape, request);
        const auto selection = select(*selector, shape, request);
        for (std::uint32_t g = 0; g < 2; ++g) found[i] += weights.found(g, selection[g]);
      }
    }
  }
  EXPECT_GT(found[1], 0.98 * found[0]);
  EXPECT_GT(found[2], 0.85 * found[0]);
  EXPECT_GT(found[1], found[2]);
}

TEST(Scan, SinksDoNotCoarsenTheFirstRun) {
  SelectorShape shape = scan_shape(4);
  shape.dtype = DType::kF16;
  shape.softmax.scale = 0.3f;
  Context context(shape, 400, 8);
  for (std::uint32_t t = 0; t < shape.sinks; ++t) {
    for (std::uint32_t i = 0; i < 64; ++i) {
      for (std::uint32_t head = 0; head < 2; ++head) context.set_key(t, head, i, i % 2 ? 90 : -90);
    }
  }
  // Sinks as large as these would take the softmax; here only the far ranking is of interest.
  for (std::size_t i = 0; i < context.queries().size(); ++i) {
    context.queries()[i] = std::abs(context.queries()[i]) * (i / 2 % 2 ? 1.0f : -1.0f);
  }
  auto scan = make("scan", shape);
  scan->append(context.keys(0, 400));
  const SelectRequest request = context.request(63 + shape.window, 45);
  const ReferenceWeights weights(context, shape, request);
  const auto selection = select(*scan, shape, request);
  auto oracle = make("oracle", shape);
  oracle->append(context.keys(0, 400));
  const auto best = select(*oracle, shape, request);
  for (std::uint32_t g = 0; g < 2; ++g) {
    EXPECT_GT(weights.found(g, selection[g]), 0.97 * weights.found(g, best[g]));
  }
}

TEST(Scan, KeepsWhatItSays) {
  SelectorShape shape = scan_shape(4);
  shape.dtype = DType::kF16;
  const Context context(shape, 3000, 1);
  const auto bytes = [&](const char* name, std::uint32_t tokens) {
    auto selector = make(name, shape);
    selector->append(context.keys(0, tokens));
    return selector->metadata_bytes();
  };
  // 31 more runs: codes, steps and smallest keys of 64 channels, for two heads.
  constexpr std::size_t kTokens = 31 * 64;
  EXPECT_EQ(bytes("scan(tail=off)", 64 + kTokens) - bytes("scan(tail=off)", 64),
            2 * kTokens * (64 / 2 + 64 * 4 / 64));
  EXPECT_EQ(bytes("scan(tail=off,bits=2)", 64 + kTokens) - bytes("scan(tail=off,bits=2)", 64),
            2 * kTokens * (64 / 4 + 64 * 4 / 64));
  EXPECT_EQ(bytes("scan(values=16)", 64 + kTokens) - bytes("scan(values=16)", 64),
            2 * kTokens * (64 / 2 + 64 * 4 / 64) + 2 * kTokens * 24 * 2 / 16);
}

TEST(Scan, CutsDeeperThanTheWindowAreMadeWhereARunBegins) {
  const SelectorShape shape = scan_shape(4);
  const Context context(shape, 1000, 1);
  auto scan = make("scan(values=16)", shape);
  scan->append(context.keys(0, 1000));
  EXPECT_EQ(scan->truncate_floor(980), 980u);
  EXPECT_EQ(scan->truncate_floor(500), 448u);
  EXPECT_EQ(scan->truncate_floor(448), 448u);
  auto wide = make("scan(values=128)", shape);
  wide->append(context.keys(0, 1000));
  EXPECT_EQ(wide->truncate_floor(500), 384u);
}

TEST(Scan, RefusesWhatItCannotDo) {
  EXPECT_EQ(make_selector_factory("scan(values=12)").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(make_selector_factory("scan(bits=3)").status().code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(make_selector_factory("scan").value().needs.values);
  EXPECT_FALSE(make_selector_factory("scan(tail=off)").value().needs.values);
  SelectorShape shape = scan_shape();
  shape.head_dim = 60;
  const auto factory = make_selector_factory("scan").value();
  EXPECT_EQ(factory(shape, LayerIndex(0)).status().code(), StatusCode::kUnsupported);
}

// Finite keys and queries whose products are not.
TEST(Scan, RefusesScoresThatOverflow) {
  SelectorShape shape = scan_shape();
  for (const char* name : {"scan", "two-stage"}) {
    Context context(shape, 300, 1);
    for (std::uint32_t i = 0; i < 64; ++i) context.set_key(77, 1, i, 1e38f);
    context.queries()[3 * 64] = 1e3f;
    auto selector = make(name, shape);
    selector->append(context.keys(0, 300));
    WorkerPool pool(1);
    std::vector<GroupSelection> selection(2);
    EXPECT_EQ(selector->select(context.request(299, 100), selection, pool).code(),
              StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace kvtier
