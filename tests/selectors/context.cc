#include "tests/selectors/context.h"

#include "selectors/registry.h"

#include <gtest/gtest.h>

namespace kvtier::testing {

Context::Context(const SelectorShape& shape, std::uint32_t tokens, std::uint64_t seed)
    : shape_(shape),
      tokens_(tokens),
      keys_(std::size_t{tokens} * shape.kv_heads * row_bytes()),
      query_stride_(std::size_t{shape.query_heads()} * shape.head_dim + 5) {
  std::mt19937_64 random(seed);
  // Not std::normal_distribution: its values differ between libraries.
  const auto uniform = [&random] { return static_cast<float>(random() >> 40) * 0x1p-23f - 1.0f; };
  queries_.resize(8 * query_stride_);
  for (float& value : queries_) value = 2.0f * uniform();
  std::vector<float> state(std::size_t{shape.kv_heads} * shape.head_dim);
  for (float& value : state) value = uniform();
  for (std::uint32_t t = 0; t < tokens; ++t) {
    const bool stranger = random() % 37 == 0;
    for (std::size_t i = 0; i < state.size(); ++i) {
      state[i] = 0.9f * state[i] + 0.4f * uniform();
      const float value = stranger ? 2.0f * uniform() : state[i];
      set_key(t, static_cast<std::uint32_t>(i / shape.head_dim),
              static_cast<std::uint32_t>(i % shape.head_dim), value);
    }
  }
}

TokenKeys Context::keys(std::uint32_t first, std::uint32_t count) const {
  return {.data = keys_.data() + std::size_t{first} * shape_.kv_heads * row_bytes(),
          .first_position = first,
          .tokens = count,
          .token_stride_bytes = shape_.kv_heads * row_bytes(),
          .head_stride_bytes = row_bytes()};
}

float Context::key(std::uint32_t token, std::uint32_t head, std::uint32_t element) const {
  return load_element(keys_.data() + (std::size_t{token} * shape_.kv_heads + head) * row_bytes(),
                      shape_.dtype, element);
}

void Context::set_key(std::uint32_t token, std::uint32_t head, std::uint32_t element, float value) {
  store_element(keys_.data() + (std::size_t{token} * shape_.kv_heads + head) * row_bytes(),
                shape_.dtype, element, value);
}

float Context::query(std::uint32_t index, std::uint32_t head, std::uint32_t element) const {
  return queries_[index * query_stride_ + std::size_t{head} * shape_.head_dim + element];
}

SelectRequest Context::request(std::uint32_t position, std::uint32_t budget, std::uint32_t queries,
                               std::uint32_t band) const {
  return {.queries = queries_.data(),
          .query_stride = query_stride_,
          .query_count = queries,
          .first_position = position,
          .budget_tokens = budget,
          .band_tokens = band};
}

std::unique_ptr<Selector> make(std::string_view name, const SelectorShape& shape,
                               LayerIndex layer) {
  auto factory = make_selector_factory(name);
  EXPECT_TRUE(factory.ok()) << factory.status().to_string();
  auto selector = factory.value()(shape, layer);
  EXPECT_TRUE(selector.ok()) << selector.status().to_string();
  return std::move(selector).value();
}

std::vector<GroupSelection> select(Selector& selector, const SelectorShape& shape,
                                   const SelectRequest& request, unsigned threads) {
  WorkerPool pool(threads);
  std::vector<GroupSelection> selection(shape.head_groups());
  const Status status = selector.select(request, selection, pool);
  EXPECT_TRUE(status.ok()) << status.to_string();
  return selection;
}

void cut(Selector& selector, const Context& context, std::uint32_t position) {
  const std::uint32_t floor = selector.truncate_floor(position);
  ASSERT_LE(floor, position);
  selector.truncate(floor);
  if (floor < position) selector.append(context.keys(floor, position - floor));
}

}  // namespace kvtier::testing
