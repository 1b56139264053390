#include "tools/profile/selector_bytes.h"

#include "memory/dtype.h"
#include "selectors/registry.h"

#include <fmt/format.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

namespace kvtier {
namespace {

// Beyond the lengths below which some families still keep every key.
constexpr std::uint32_t kFirstLength = 8192;
constexpr std::uint32_t kSecondLength = 16384;
constexpr std::uint32_t kRowsMadeUp = 2048;
constexpr std::uint32_t kSentenceTokens = 25;

}  // namespace

Result<SelectorBytes> measure_selector_bytes(const std::string& selector, std::uint32_t head_dim,
                                             std::uint32_t value_dim, std::uint32_t block_tokens) {
  KVTIER_ASSIGN_OR_RETURN(const SelectorFactory factory, make_selector_factory(selector));
  if (head_dim % 8 != 0 || value_dim % 8 != 0) {
    return unsupported(fmt::format("{}: found dims of {} and {}, expected multiples of 8", selector,
                                   head_dim, value_dim));
  }
  SelectorShape shape;
  shape.head_dim = head_dim;
  shape.value_dim = value_dim;
  shape.tokens_per_block = block_tokens;
  shape.softmax.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  shape.rope.theta = 500000.0;
  shape.tokens_max = kSecondLength;
  KVTIER_ASSIGN_OR_RETURN(const std::unique_ptr<Selector> made, factory(shape, LayerIndex{0}));

  const std::size_t row = (head_dim + value_dim) * size_of(shape.dtype);
  std::vector<std::byte> rows(kRowsMadeUp * row);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < rows.size() / 2; ++i) {
    store_element(rows.data(), shape.dtype, i, normal(random));
  }
  std::vector<std::uint8_t> marks(kRowsMadeUp, 0);
  for (std::uint32_t t = kSentenceTokens - 1; t < kRowsMadeUp; t += kSentenceTokens) {
    marks[t] = kEndsSentence | kIsLandmark;
  }
  double kept[2] = {};
  for (std::uint32_t t = 0; t < kSecondLength; t += kRowsMadeUp) {
    made->append({.first_position = t,
                  .tokens = kRowsMadeUp,
                  .keys = rows.data(),
                  .key_token_stride = row,
                  .key_head_stride = row,
                  .values = rows.data() + head_dim * size_of(shape.dtype),
                  .value_token_stride = row,
                  .value_head_stride = row,
                  .marks = marks.data()});
    if (t + kRowsMadeUp == kFirstLength) kept[0] = static_cast<double>(made->metadata_bytes());
  }
  kept[1] = static_cast<double>(made->metadata_bytes());
  SelectorBytes bytes;
  bytes.per_token = (kept[1] - kept[0]) / (kSecondLength - kFirstLength);
  bytes.fixed = kept[1] - bytes.per_token * kSecondLength;
  return bytes;
}

}  // namespace kvtier
