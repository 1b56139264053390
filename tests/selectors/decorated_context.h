#pragma once

#include "selectors/registry.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace kvtier::testing {

// What the tests of decorators have in common.

inline constexpr std::uint32_t kDecoratedTokens = 240;

inline SelectorShape decorated_shape(std::uint32_t tokens_per_block = 8) {
  SelectorShape shape;
  shape.kv_heads = 4;
  shape.queries_per_kv_head = 2;
  shape.tokens_per_block = tokens_per_block;
  shape.sinks = 4;
  shape.window = 16;
  shape.softmax.scale = 0.2f;
  shape.tokens_max = kDecoratedTokens;
  return shape;
}

inline std::unique_ptr<Selector> filled(const std::string& name, const SelectorShape& shape,
                                        const Context& context,
                                        std::uint32_t tokens = kDecoratedTokens) {
  auto selector = make(name, shape);
  selector->append(context.keys(0, tokens));
  return selector;
}

inline void expect_same_answers(const std::vector<GroupSelection>& a,
                                const std::vector<GroupSelection>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].ranked, b[i].ranked) << i;
    EXPECT_EQ(a[i].chosen, b[i].chosen) << i;
    EXPECT_EQ(a[i].held, b[i].held) << i;
    EXPECT_EQ(a[i].mass, b[i].mass) << i;
  }
}

inline std::vector<SelectedUnit> chosen_of(const GroupSelection& group) {
  return {group.ranked.begin(), group.ranked.begin() + group.chosen};
}

inline std::uint32_t chosen_tokens(const GroupSelection& group) {
  std::uint32_t tokens = 0;
  for (const SelectedUnit& unit : chosen_of(group)) tokens += unit.tokens;
  return tokens;
}

/// A step per token from `first`, each with another of the context's queries.
inline SelectRequest step_at(const Context& context, std::uint32_t position, std::uint32_t budget,
                             std::uint32_t band = 0) {
  SelectRequest request = context.request(position, budget, 1, band);
  request.queries += position % 8 * request.query_stride;
  return request;
}

}  // namespace kvtier::testing
