#include "tests/selectors/context.h"

#include "selectors/registry.h"

#include <gtest/gtest.h>

namespace kvtier::testing {

Context::Context(const SelectorShape& shape, std::uint32_t tokens, std::uint64_t seed)
    : shape_(shape),
      tokens_(tokens),
      keys_(std::size_t{tokens} * shape.kv_heads * row_bytes()),
      values_(std::size_t{tokens} * shape.kv_heads * value_bytes()),
      marks_(tokens),
      external_(std::size_t{tokens} * shape.head_groups()),
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
  for (std::size_t i = 0; i < std::size_t{tokens} * shape.kv_heads * shape.value_dim; ++i) {
    store_element(values_.data(), shape.dtype, i, uniform());
  }
  for (std::uint8_t& mark : marks_) {
    mark = random() % 9 == 0 ? kEndsSentence : 0;
    if (random() % 16 == 0) mark |= kIsLandmark;
  }
  for (float& score : external_) score = uniform();
}

NewTokens Context::keys(std::uint32_t first, std::uint32_t count) const {
  return {.first_position = first,
          .tokens = count,
          .keys = keys_.data() + std::size_t{first} * shape_.kv_heads * row_bytes(),
          .key_token_stride = shape_.kv_heads * row_bytes(),
          .key_head_stride = row_bytes(),
          .values = values_.data() + std::size_t{first} * shape_.kv_heads * value_bytes(),
          .value_token_stride = shape_.kv_heads * value_bytes(),
          .value_head_stride = value_bytes(),
          .marks = marks_.data() + first};
}

void Context::observe(Selector& selector, std::uint32_t first, std::uint32_t count) const {
  // Eight different queries, over and over.
  for (std::uint32_t t = first; t < first + count; ++t) {
    selector.observe_prompt({.queries = queries_.data() + t % 8 * query_stride_,
                             .query_stride = query_stride_,
                             .positions = std::span(&t, 1)});
  }
}

float Context::value(std::uint32_t token, std::uint32_t head, std::uint32_t element) const {
  return load_element(
      values_.data() + (std::size_t{token} * shape_.kv_heads + head) * value_bytes(), shape_.dtype,
      element);
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
          .band_tokens = band,
          .external = {.scores = external_.data(), .group_stride = tokens_, .tokens = tokens_}};
}

SelectorResources resources() {
  // Every other head streams, in any layer.
  return {.head_classes = [](const std::string&) -> Result<HeadClasses> {
    return HeadClasses{{8, {true, false, true, false, true, false, true, false}}};
  }};
}

std::unique_ptr<Selector> make(std::string_view name, const SelectorShape& shape,
                               LayerIndex layer) {
  auto factory = make_selector_factory(name, resources());
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
