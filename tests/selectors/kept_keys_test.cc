#include "kernels/quantised_keys.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

// Keys that selectors keep of what they choose: their codes, read back.

namespace kvtier::testing {
namespace {

constexpr std::uint32_t kTokens = 300;
constexpr std::uint32_t kRun = KeyCodes::kRunTokens;

SelectorShape kept_shape(DType dtype) {
  SelectorShape shape;
  shape.dtype = dtype;
  shape.kv_heads = 4;
  shape.heads_per_group = 2;
  shape.queries_per_kv_head = 2;
  shape.head_dim = 24;
  shape.value_dim = 8;
  shape.tokens_per_block = 5;
  shape.window = 16;
  shape.tokens_max = kTokens + 1;
  return shape;
}

/// What is kept of a token: the key itself in the sinks and the open run, or what the codes of its
/// run stand for.
std::vector<std::byte> expected_key(const Context& context, const SelectorShape& shape,
                                    std::uint32_t bits, std::uint32_t tokens, std::uint32_t token,
                                    std::uint32_t head) {
  const std::size_t row_bytes = shape.head_dim * size_of(shape.dtype);
  const std::uint32_t begin = token / kRun * kRun;
  std::vector<std::byte> run(kRun * row_bytes);
  for (std::uint32_t t = begin; t < std::min(begin + kRun, tokens); ++t) {
    for (std::uint32_t i = 0; i < shape.head_dim; ++i) {
      store_element(run.data() + (t - begin) * row_bytes, shape.dtype, i, context.key(t, head, i));
    }
  }
  const std::byte* own = run.data() + (token - begin) * row_bytes;
  if (token < shape.sinks || begin + kRun > tokens) return {own, own + row_bytes};
  const KeyCodes codes{bits, shape.head_dim, shape.dtype};
  std::vector<CodeLine> lines(codes.run_lines());
  quantise_run(codes, {run.data(), kRun, shape.head_dim, row_bytes, shape.dtype},
               begin == 0 ? shape.sinks : 0, lines.data());
  std::vector<float> key(shape.head_dim);
  read_coded_key(codes, lines.data(), token - begin, key.data());
  std::vector<std::byte> row(row_bytes);
  for (std::uint32_t i = 0; i < shape.head_dim; ++i) {
    store_element(row.data(), shape.dtype, i, key[i]);
  }
  return row;
}

void expect_kept(const Selector& selector, const Context& context, const SelectorShape& shape,
                 std::uint32_t bits, std::uint32_t tokens) {
  const std::size_t row_bytes = shape.head_dim * size_of(shape.dtype);
  const std::uint32_t per_block = shape.tokens_per_block;
  for (std::uint32_t group = 0; group < shape.head_groups(); ++group) {
    for (std::uint32_t block = 0; block < tokens / per_block; ++block) {
      // A part of the block; rows of its other tokens stay as they are.
      const std::uint32_t first = block % per_block;
      std::vector<std::byte> keys(shape.heads_per_group * per_block * row_bytes, std::byte{0x5A});
      std::vector<std::byte> expected = keys;
      selector.read_keys({.head_group = group,
                          .block = BlockIndex{block},
                          .first_token = first,
                          .tokens = per_block - first,
                          .target = keys.data()});
      for (std::uint32_t i = 0; i < shape.heads_per_group; ++i) {
        for (std::uint32_t t = first; t < per_block; ++t) {
          std::ranges::copy(expected_key(context, shape, bits, tokens, block * per_block + t,
                                         group * shape.heads_per_group + i),
                            expected.data() + (i * per_block + t) * row_bytes);
        }
      }
      ASSERT_EQ(keys, expected) << "block " << block << ", group " << group;
    }
  }
}

TEST(KeptKeys, AreWhatTheCodesStandFor) {
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const std::uint32_t bits : {4u, 2u}) {
      for (const std::string family : {"scan", "two-stage", "refresh(interval=3)/scan"}) {
        const SelectorShape shape = kept_shape(dtype);
        const Context context(shape, kTokens, 7);
        const std::string name = family + "(fetch=values,bits=" + std::to_string(bits) + ")";
        SCOPED_TRACE(name);
        const auto selector = make(name, shape);
        ASSERT_TRUE(selector->keeps_keys());
        selector->append(context.keys(0, 130));
        expect_kept(*selector, context, shape, bits, 130);
        selector->append(context.keys(130, kTokens - 130));
        expect_kept(*selector, context, shape, bits, kTokens);
        cut(*selector, context, 150);
        expect_kept(*selector, context, shape, bits, 150);
        const auto other = selector->fork();
        selector->append(context.keys(150, 100));
        expect_kept(*selector, context, shape, bits, 250);
        expect_kept(*other, context, shape, bits, 150);
      }
    }
  }
}

TEST(KeptKeys, AreAskedForByName) {
  const SelectorShape shape = kept_shape(DType::kF16);
  for (const char* name : {"scan", "scan(fetch=both)", "two-stage", "mean", "refresh/scan"}) {
    EXPECT_FALSE(make(name, shape)->keeps_keys()) << name;
  }
  EXPECT_EQ(make_selector_factory("scan(fetch=keys)").status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(make_selector_factory("mean(fetch=values)").status().code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvtier::testing
