#pragma once

#include "selectors/registry.h"
#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string_view>
#include <vector>

namespace kvtier::testing {

/// Keys and queries of a made-up context: the same for the same shape and seed. Keys wander slowly,
/// so that neighbours resemble each other, with a stranger now and then: landmarks have something
/// to find and something to get wrong.
class Context {
 public:
  Context(const SelectorShape& shape, std::uint32_t tokens, std::uint64_t seed);

  std::uint32_t tokens() const { return tokens_; }
  /// Keys, values and marks of [first, first + count). A sentence ends every few tokens.
  NewTokens keys(std::uint32_t first, std::uint32_t count) const;
  float value(std::uint32_t token, std::uint32_t head, std::uint32_t element) const;
  std::uint8_t mark(std::uint32_t token) const { return marks_[token]; }
  /// What the prompt tokens [first, first + count) looked for.
  void observe(Selector& selector, std::uint32_t first, std::uint32_t count) const;
  /// As stored, that is rounded to the shape's type.
  float key(std::uint32_t token, std::uint32_t head, std::uint32_t element) const;
  void set_key(std::uint32_t token, std::uint32_t head, std::uint32_t element, float value);
  float query(std::uint32_t index, std::uint32_t head, std::uint32_t element) const;

  /// `queries` queries, the first at `position`; the budget is in tokens.
  SelectRequest request(std::uint32_t position, std::uint32_t budget, std::uint32_t queries = 1,
                        std::uint32_t band = 0) const;
  std::vector<float>& queries() { return queries_; }

 private:
  std::size_t row_bytes() const { return shape_.head_dim * size_of(shape_.dtype); }
  std::size_t value_bytes() const { return shape_.value_dim * size_of(shape_.dtype); }

  SelectorShape shape_;
  std::uint32_t tokens_;
  std::vector<std::byte> keys_;    ///< [tokens, KV heads, head_dim]
  std::vector<std::byte> values_;  ///< [tokens, KV heads, value_dim]
  std::vector<std::uint8_t> marks_;
  std::vector<float> external_;  ///< [head groups, tokens]
  std::vector<float> queries_;   ///< [8, query heads, head_dim], with a gap between queries
  std::size_t query_stride_;
};

/// Needs that the contexts of these tests meet: all of them.
SelectorResources resources();
/// A selector from the registry; fails the test when the name is refused.
std::unique_ptr<Selector> make(std::string_view name, const SelectorShape& shape,
                               LayerIndex layer = LayerIndex(0));
/// One select call that must succeed.
std::vector<GroupSelection> select(Selector& selector, const SelectorShape& shape,
                                   const SelectRequest& request, unsigned threads = 1);
/// Cuts at `position` as callers do: where the selector can, with the keys before it given again.
void cut(Selector& selector, const Context& context, std::uint32_t position);

}  // namespace kvtier::testing
