#include "selectors/rank_blocks.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>
#include <vector>

namespace kvtier {
namespace {

using testing::Context;
using testing::make;
using testing::select;

/// True mass of every block under the reduction, in float64; index is the block's number.
std::vector<double> true_mass(const SelectorShape& shape, const Context& context,
                              std::uint32_t group, std::uint32_t position, std::uint32_t queries) {
  const FarRegion region = FarRegion::of(shape, position);
  std::vector<double> mass(context.tokens() / shape.tokens_per_block + 1);
  for (std::uint32_t i = 0; i < shape.heads_per_group; ++i) {
    const std::uint32_t kv_head = group * shape.heads_per_group + i;
    for (std::uint32_t h = 0; h < shape.queries_per_kv_head; ++h) {
      std::vector<double> of_head(mass.size());
      for (std::uint32_t q = 0; q < queries; ++q) {
        std::vector<double> weights(position + q + 1);
        double total = 0;
        for (std::uint32_t t = 0; t < weights.size(); ++t) {
          double dot = 0;
          for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
            dot += double{context.key(t, kv_head, e)} *
                   double{context.query(q, kv_head * shape.queries_per_kv_head + h, e)};
          }
          total += weights[t] = std::exp(dot * double{shape.softmax.scale});
        }
        for (std::uint32_t t = region.begin; t < region.end; ++t) {
          of_head[t / shape.tokens_per_block] += weights[t] / total;
        }
      }
      for (std::size_t b = 0; b < mass.size(); ++b) {
        mass[b] = shape.reduction == GroupReduction::kMax ? std::max(mass[b], of_head[b])
                                                          : mass[b] + of_head[b];
      }
    }
  }
  return mass;
}

double found(const GroupSelection& group, const std::vector<double>& mass) {
  double sum = 0;
  for (std::uint32_t i = 0; i < group.chosen; ++i) sum += mass[group.ranked[i].block.value];
  return sum;
}

SelectorShape shape_with(GroupReduction reduction, DType dtype = DType::kF32) {
  SelectorShape shape;
  shape.dtype = dtype;
  shape.kv_heads = 4;
  shape.heads_per_group = 2;
  shape.queries_per_kv_head = 2;
  shape.head_dim = 32;
  shape.tokens_per_block = 4;
  shape.sinks = 4;
  shape.window = 8;
  shape.softmax.scale = 0.4f;
  shape.reduction = reduction;
  shape.tokens_max = 300;
  return shape;
}

constexpr GroupReduction kReductions[] = {GroupReduction::kMax, GroupReduction::kSum,
                                          GroupReduction::kMean};

TEST(Oracle, EqualsTheBestOfAllChoices) {
  for (GroupReduction reduction : kReductions) {
    for (std::uint32_t queries : {1u, 3u}) {
      const SelectorShape shape = shape_with(reduction);
      const Context context(shape, 60, 3);
      auto selector = make("oracle", shape);
      selector->append(context.keys(0, 60));
      // 12 tokens and one per further query are attended anyway. Blocks 1 to 11 lie whole in the
      // region: any five of them make a choice of 20 tokens.
      const std::uint32_t position = 55;
      const auto selection =
          select(*selector, shape, context.request(position, 31 + queries, queries));
      for (std::uint32_t group = 0; group < 2; ++group) {
        const auto mass = true_mass(shape, context, group, position, queries);
        double best = 0;
        for (std::uint32_t choice = 0; choice < 1u << 11; ++choice) {
          if (std::popcount(choice) != 5) continue;
          double sum = 0;
          for (std::uint32_t b = 0; b < 11; ++b) {
            if ((choice >> b & 1u) != 0) sum += mass[b + 1];
          }
          best = std::max(best, sum);
        }
        ASSERT_EQ(selection[group].chosen, 5u);
        // Float32 against float64: two choices this close are equally good.
        EXPECT_NEAR(found(selection[group], mass), best, 1e-5);
        for (const SelectedUnit& unit : selection[group].ranked) {
          EXPECT_NEAR(double{unit.score}, mass[unit.block.value], 1e-5);
        }
      }
    }
  }
}

TEST(Oracle, BeatsTheOthersOnItsOwnMeasure) {
  for (GroupReduction reduction : kReductions) {
    const SelectorShape shape = shape_with(reduction, DType::kF16);
    const Context context(shape, 300, 4);
    for (std::uint32_t position : {299u, 211u}) {
      const auto masses = [&](const std::string& name) {
        auto selector = make(name, shape);
        selector->append(context.keys(0, 300));
        const auto selection = select(*selector, shape, context.request(position, 12 + 60));
        double sum = 0;
        for (std::uint32_t group = 0; group < 2; ++group) {
          sum += found(selection[group], true_mass(shape, context, group, position, 1));
        }
        return sum;
      };
      const double best = masses("oracle");
      const double landmark = masses("landmark(tokens=4)");
      EXPECT_GT(best, landmark);
      EXPECT_GT(best, masses("recency"));
      EXPECT_GT(landmark, masses("random"));
    }
  }
}

TEST(Oracle, KeepsEveryKey) {
  const SelectorShape shape = shape_with(GroupReduction::kSum, DType::kBF16);
  const Context context(shape, 300, 4);
  auto selector = make("oracle", shape);
  EXPECT_EQ(selector->metadata_bytes(), 0u);
  selector->append(context.keys(0, 300));
  EXPECT_EQ(selector->metadata_bytes(), 300u * 4 * 32 * 2);
  selector->truncate(10);
  EXPECT_EQ(selector->metadata_bytes(), 10u * 4 * 32 * 2);
}

}  // namespace
}  // namespace kvtier
