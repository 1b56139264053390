#include "runtime/rest_choice.h"
#include "tests/runtime/harness.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <vector>

namespace kvtier::testing {
namespace {

/// Chooses as `random` does, and answers for the rest with exact attention (from all keys and
/// values, which it keeps) or with nonsense.
class KnowingSelector final : public Selector {
 public:
  KnowingSelector(const SelectorShape& shape, std::unique_ptr<Selector> inner, bool sensible)
      : shape_(shape), inner_(std::move(inner)), sensible_(sensible) {}

  void append(const NewTokens& tokens) override {
    inner_->append(tokens);
    keep(tokens.keys, tokens.key_token_stride, tokens.key_head_stride, shape_.head_dim,
         tokens.tokens, keys_);
    keep(tokens.values, tokens.value_token_stride, tokens.value_head_stride, shape_.value_dim,
         tokens.tokens, values_);
  }
  void truncate(std::uint32_t position) override {
    inner_->truncate(position);
    keys_.resize(std::size_t{position} * shape_.kv_heads * shape_.head_dim);
    values_.resize(std::size_t{position} * shape_.kv_heads * shape_.value_dim);
  }
  Status select(const SelectRequest& request, std::span<GroupSelection> selection,
                WorkerPool& pool) override {
    return inner_->select(request, selection, pool);
  }
  bool estimates_rest() const override { return true; }
  Status estimate_rest(const SelectRequest& request, std::span<const GroupSelection> selection,
                       StatesView target, WorkerPool&) override {
    const FarRegion region = FarRegion::of(shape_, request.first_position);
    for (std::uint32_t query = 0; query < request.query_count; ++query) {
      for (std::uint32_t head = 0; head < shape_.query_heads(); ++head) {
        const std::uint32_t kv_head = head / shape_.queries_per_kv_head;
        std::vector<bool> left(region.end, true);
        for (std::uint32_t i = 0; i < selection[kv_head / shape_.heads_per_group].chosen; ++i) {
          const SelectedUnit& unit = selection[kv_head / shape_.heads_per_group].ranked[i];
          const std::uint32_t begin = unit.block.value * shape_.tokens_per_block + unit.first_token;
          for (std::uint32_t t = begin; t < begin + unit.tokens; ++t) left[t] = false;
        }
        const std::size_t row = query * shape_.query_heads() + head;
        attend(request.queries + query * request.query_stride + head * shape_.head_dim, kv_head,
               region, left, target.out + row * shape_.value_dim, target.lse[row]);
      }
    }
    return {};
  }
  std::unique_ptr<Selector> fork() const override { return nullptr; }
  void save(StateWriter&) const override {}
  Status restore(StateReader&) override { return {}; }
  std::size_t metadata_bytes() const override { return 0; }

 private:
  void keep(const std::byte* rows, std::size_t token_stride, std::size_t head_stride,
            std::uint32_t dim, std::uint32_t tokens, std::vector<float>& target) {
    for (std::uint32_t t = 0; t < tokens; ++t) {
      for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
        for (std::uint32_t i = 0; i < dim; ++i) {
          target.push_back(
              load_element(rows + t * token_stride + head * head_stride, shape_.dtype, i));
        }
      }
    }
  }

  void attend(const float* query, std::uint32_t kv_head, FarRegion region,
              const std::vector<bool>& left, float* out, float& lse) const {
    std::vector<double> sum(shape_.value_dim);
    double weights = 0;
    for (std::uint32_t t = region.begin; t < region.end; ++t) {
      if (!left[t]) continue;
      const std::size_t row = std::size_t{t} * shape_.kv_heads + kv_head;
      double dot = 0;
      for (std::uint32_t i = 0; i < shape_.head_dim; ++i) {
        dot += double{query[i]} * double{keys_[row * shape_.head_dim + i]};
      }
      const double weight = std::exp(dot * double{shape_.softmax.scale});
      weights += weight;
      for (std::uint32_t i = 0; i < shape_.value_dim; ++i) {
        const double value = double{values_[row * shape_.value_dim + i]};
        sum[i] += weight * (sensible_ ? value : 5.0);
      }
    }
    lse = weights > 0 ? static_cast<float>(std::log(weights)) : kEmptyLse;
    for (std::uint32_t i = 0; i < shape_.value_dim; ++i) {
      out[i] = weights > 0 ? static_cast<float>(sum[i] / weights) : 0.0f;
    }
  }

  SelectorShape shape_;
  std::unique_ptr<Selector> inner_;
  bool sensible_;
  std::vector<float> keys_;
  std::vector<float> values_;
};

SelectorFactory knowing(bool sensible) {
  SelectorFactory factory;
  factory.make = [sensible](const SelectorShape& shape,
                            LayerIndex layer) -> Result<std::unique_ptr<Selector>> {
    KVTIER_ASSIGN_OR_RETURN(auto inner, make_selector_factory("random").value()(shape, layer));
    return std::unique_ptr<Selector>(
        std::make_unique<KnowingSelector>(shape, std::move(inner), sensible));
  };
  return factory;
}

std::vector<double> doubles(const std::vector<float>& values) {
  return {values.begin(), values.end()};
}

/// What full attention answers to the same question.
std::vector<float> full_answer(HarnessOptions options, std::uint32_t tokens,
                               std::uint32_t queries = 1) {
  options.factory = {};
  options.selector = "oracle";
  Harness harness(options);
  EXPECT_TRUE(harness.append(tokens).ok());
  EXPECT_TRUE(harness.step(1, tokens, queries).ok());
  return harness.out();
}

TEST(Rest, AnEstimateThatHelpsIsTaken) {
  for (const bool deterministic : {false, true}) {
    for (const std::vector<float>& sinks : {std::vector<float>{}, std::vector<float>(8, 0.5f)}) {
      HarnessOptions options;
      options.factory = knowing(true);
      options.deterministic = deterministic;
      options.sink_logits = sinks;
      Harness harness(options);
      ASSERT_TRUE(harness.append(600).ok());
      for (std::uint32_t queries : {1u, 3u}) {
        ASSERT_TRUE(harness.step(1, 100, queries).ok());
        EXPECT_EQ(harness.report().rows_estimated, 4 * queries);
        EXPECT_LE(max_difference(harness.out(), doubles(full_answer(options, 600, queries))), 1e-5);
        // What was attended is still told apart, and no more than the budget.
        EXPECT_LE(harness.report().attended_tokens_max, 100u);
        const std::vector<float> alone(harness.report().attended_out,
                                       harness.report().attended_out + harness.out().size());
        EXPECT_LE(max_difference(alone, harness.reference_out()), 1e-5);
        EXPECT_GT(max_difference(alone, doubles(harness.out())), 1e-3);
      }
    }
  }
}

TEST(Rest, AnEstimateThatHarmsIsLeftOut) {
  HarnessOptions options;
  options.factory = knowing(false);
  Harness harness(options);
  ASSERT_TRUE(harness.append(600).ok());
  ASSERT_TRUE(harness.step(1, 100).ok());
  EXPECT_TRUE(harness.report().measured_rest);
  EXPECT_EQ(harness.report().rows_estimated, 0u);
  EXPECT_LE(max_difference(harness.out(), harness.reference_out()), 1e-5);
  EXPECT_EQ(harness.report().attended_out, harness.out().data());
}

TEST(Rest, ItCanBeSwitchedOffAndOn) {
  HarnessOptions options;
  options.factory = knowing(true);
  options.estimate_rest = EstimateRest::kNever;
  Harness never(options);
  ASSERT_TRUE(never.append(600).ok());
  ASSERT_TRUE(never.step(1, 100).ok());
  EXPECT_EQ(never.report().rows_estimated, 0u);
  EXPECT_EQ(never.runtime().stats().steps_measured, 0u);
  options.factory = knowing(false);
  options.estimate_rest = EstimateRest::kAlways;
  Harness always(options);
  ASSERT_TRUE(always.append(600).ok());
  ASSERT_TRUE(always.step(1, 100).ok());
  EXPECT_EQ(always.report().rows_estimated, 4u);
  EXPECT_EQ(always.runtime().stats().steps_measured, 0u);
}

TEST(Rest, MeasuringCountsItsBytesAndLeavesHitsAlone) {
  HarnessOptions options;
  options.factory = knowing(true);
  Harness measured(options);
  options.estimate_rest = EstimateRest::kNever;
  Harness plain(options);
  for (Harness* harness : {&measured, &plain}) {
    ASSERT_TRUE(harness->append(600).ok());
    ASSERT_TRUE(harness->step(1, 100).ok());
  }
  const RuntimeStats with = measured.runtime().stats();
  const RuntimeStats without = plain.runtime().stats();
  EXPECT_EQ(with.steps_measured, 1u);
  for (std::size_t tier = 0; tier < kTierCount; ++tier) {
    EXPECT_EQ(with.tiers[tier].hits, without.tiers[tier].hits) << tier;
  }
  const auto route = static_cast<std::size_t>(Route::kHostToDevice);
  EXPECT_GT(with.routes[route].submitted_bytes, without.routes[route].submitted_bytes);
  EXPECT_EQ(measured.device().wrong_blocks(), 0u);
}

// A long context is sampled: the verdict is the same, at a part of the bytes.
TEST(Rest, ASampleOfALongContextTellsTheSame) {
  for (const bool sensible : {true, false}) {
    HarnessOptions options;
    options.factory = knowing(sensible);
    options.tokens_max = 12'000;
    options.estimate_rest = EstimateRest::kNever;
    Harness plain(options);
    options.estimate_rest = EstimateRest::kMeasured;
    Harness measured(options);
    for (Harness* harness : {&plain, &measured}) {
      ASSERT_TRUE(harness->append(12'000).ok());
      ASSERT_TRUE(harness->step(1, 200).ok());
    }
    EXPECT_EQ(measured.report().rows_estimated, sensible ? 4u : 0u);
    const auto route = static_cast<std::size_t>(Route::kHostToDevice);
    const std::uint64_t extra = measured.runtime().stats().routes[route].submitted_bytes -
                                plain.runtime().stats().routes[route].submitted_bytes;
    const std::uint64_t token_bytes = measured.runtime().layout().block_bytes() / 4;
    EXPECT_GE(extra, 2 * 2000 * token_bytes);
    EXPECT_LE(extra, 2 * 2600 * token_bytes);
  }
}

TEST(RestChoice, MeasuresAtGrowingDistances) {
  RestChoice choice(1, 32);
  std::vector<int> measured;
  for (int step = 0; step < 120; ++step) {
    if (choice.begin_step()) measured.push_back(step);
  }
  EXPECT_EQ(measured, (std::vector<int>{0, 8, 24, 56, 88}));
}

TEST(RestChoice, FollowsWhatWasMeasuredLast) {
  RestChoice choice(2, 8);
  EXPECT_FALSE(choice.takes_estimate(0));
  choice.learn(std::vector<double>{1.0, 1.0}, std::vector<double>{0.5, 2.0});
  EXPECT_TRUE(choice.takes_estimate(0));
  EXPECT_FALSE(choice.takes_estimate(1));
  // One measurement against does not outweigh itself; two do.
  choice.learn(std::vector<double>{1.0, 1.0}, std::vector<double>{1.2, 0.1});
  EXPECT_TRUE(choice.takes_estimate(0));
  EXPECT_TRUE(choice.takes_estimate(1));
  choice.learn(std::vector<double>{1.0, 1.0}, std::vector<double>{1.4, 0.1});
  EXPECT_FALSE(choice.takes_estimate(0));
}

TEST(OwnSelection, EachQueryIsAnsweredAsIfAskedAlone) {
  HarnessOptions options;
  options.selector = "oracle";
  options.deterministic = true;
  Harness together(options);
  ASSERT_TRUE(together.append(503).ok());
  ASSERT_TRUE(together.step(1, 90, 3, QuerySelection::kOwn).ok());
  const std::vector<float> answers = together.out();
  EXPECT_LE(together.report().attended_tokens_max, 90u);
  std::vector<std::uint32_t> queries;
  for (const AttendedRange& range : together.report().attended) {
    if (queries.empty() || queries.back() != range.query) queries.push_back(range.query);
  }
  EXPECT_EQ(queries, (std::vector<std::uint32_t>{0, 1, 2}));
  const std::vector<float> asked(together.queries());
  const std::size_t heads = 4;
  for (std::uint32_t query = 0; query < 3; ++query) {
    Harness alone(options);
    ASSERT_TRUE(alone.append(501 + query).ok());
    const std::span<const float> one = std::span(asked).subspan(
        query * heads * options.block.head_dim, heads * options.block.head_dim);
    ASSERT_TRUE(alone.step_with(1, 90, one).ok());
    const std::size_t size = heads * options.block.value_dim;
    const std::vector<float> part(
        answers.begin() + static_cast<std::ptrdiff_t>(query * size),
        answers.begin() + static_cast<std::ptrdiff_t>((query + 1) * size));
    EXPECT_EQ(part, alone.out()) << query;
  }
}

}  // namespace
}  // namespace kvtier::testing
