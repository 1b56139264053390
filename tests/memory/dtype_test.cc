#include "memory/dtype.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace kvtier {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Ties, both sides of every tie, and the edges of normal, subnormal and infinite values.
std::vector<float> rounding_cases(float unit, float smallest_normal, float largest) {
  std::vector<float> cases = {0.0f,
                              1.0f,
                              1.0f + unit / 2,
                              1.0f + 3 * unit / 2,
                              largest,
                              smallest_normal,
                              smallest_normal / 2,
                              smallest_normal * 0.75f,
                              smallest_normal * unit,
                              smallest_normal * unit / 2,
                              smallest_normal * unit * 1.5f,
                              FLT_MIN,
                              FLT_TRUE_MIN,
                              FLT_MAX,
                              65504.0f,
                              65519.0f,
                              65520.0f,
                              65536.0f,
                              kInfinity};
  const std::size_t plain = cases.size();
  for (std::size_t i = 0; i < plain; ++i) {
    cases.push_back(std::nextafterf(cases[i], kInfinity));
    cases.push_back(std::nextafterf(cases[i], -kInfinity));
  }
  const std::size_t positive = cases.size();
  for (std::size_t i = 0; i < positive; ++i) cases.push_back(-cases[i]);
  std::mt19937 random(7);
  for (int i = 0; i < 200'000; ++i) {
    const float value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (!std::isnan(value)) cases.push_back(value);
  }
  // Random bits are seldom in the small range of float16: here every case is.
  std::uniform_real_distribution<float> exponent(-26.0f, 17.0f);
  for (int i = 0; i < 200'000; ++i) cases.push_back(std::exp2(exponent(random)));
  return cases;
}

TEST(DType, EveryF16SurvivesTheRoundTrip) {
  for (std::uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const float value = f16_to_f32(static_cast<std::uint16_t>(bits));
    const std::uint16_t back = f32_to_f16(value);
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(f16_to_f32(back))) << bits;
      ASSERT_EQ(bits & 0x8000u, back & 0x8000u) << bits;
    } else {
      ASSERT_EQ(bits, back);
    }
  }
}

TEST(DType, EveryBF16SurvivesTheRoundTrip) {
  for (std::uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const float value = bf16_to_f32(static_cast<std::uint16_t>(bits));
    const std::uint16_t back = f32_to_bf16(value);
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(bf16_to_f32(back))) << bits;
    } else {
      ASSERT_EQ(bits, back);
    }
  }
}

TEST(DType, KnownF16Values) {
  EXPECT_EQ(f16_to_f32(0x3C00), 1.0f);
  EXPECT_EQ(f16_to_f32(0xC000), -2.0f);
  EXPECT_EQ(f16_to_f32(0x7BFF), 65504.0f);
  EXPECT_EQ(f16_to_f32(0x0400), 0x1p-14f);
  EXPECT_EQ(f16_to_f32(0x0001), 0x1p-24f);
  EXPECT_EQ(f16_to_f32(0x7C00), kInfinity);
  EXPECT_EQ(f16_to_f32(0xFC00), -kInfinity);
  EXPECT_TRUE(std::signbit(f16_to_f32(0x8000)));
  EXPECT_EQ(f32_to_f16(65519.996f), 0x7BFF);
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7C00);
  EXPECT_EQ(f32_to_f16(0x1p-25f), 0x0000);  // Halfway to the smallest: to even.
  EXPECT_EQ(f32_to_f16(std::nextafterf(0x1p-25f, 1.0f)), 0x0001);
  EXPECT_EQ(f32_to_f16(1.0f + 0x1p-11f), 0x3C00);  // Tie to even, down and up.
  EXPECT_EQ(f32_to_f16(1.0f + 3 * 0x1p-11f), 0x3C02);
  EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(kNan))));
  // A NaN whose payload lies in the bits that are cut off must not turn into infinity.
  EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(std::bit_cast<float>(0x7F800001u)))));
}

TEST(DType, KnownBF16Values) {
  EXPECT_EQ(bf16_to_f32(0x3F80), 1.0f);
  EXPECT_EQ(f32_to_bf16(1.0f + 0x1p-8f), 0x3F80);  // Tie to even, down and up.
  EXPECT_EQ(f32_to_bf16(1.0f + 3 * 0x1p-8f), 0x3F82);
  EXPECT_EQ(f32_to_bf16(FLT_MAX), 0x7F80);
  EXPECT_EQ(f32_to_bf16(-kInfinity), 0xFF80);
  EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(std::bit_cast<float>(0x7F800001u)))));
}

// Clang before 15 knows the limits of _Float16 on x86, but not the type.
#if defined(__FLT16_MAX__) && (!defined(__clang__) || __clang_major__ >= 15)
TEST(DType, F16RoundsAsTheCompilerDoes) {
  for (float value : rounding_cases(0x1p-10f, 0x1p-14f, 65504.0f)) {
    const auto expected = std::bit_cast<std::uint16_t>(static_cast<_Float16>(value));
    ASSERT_EQ(f32_to_f16(value), expected) << value;
  }
}
#endif

// Nearest means: of the two neighbours no other is closer, and of two as close the even one wins.
TEST(DType, BF16RoundsToTheNearest) {
  for (float value : rounding_cases(0x1p-7f, FLT_MIN, 0x1.FEp127f)) {
    if (std::isinf(value)) continue;
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const auto below = static_cast<std::uint16_t>(bits >> 16);  // Towards zero.
    const auto above = static_cast<std::uint16_t>(below + 1);
    const std::uint16_t got = f32_to_bf16(value);
    // As if the exponent had no end: the value beyond the largest is where infinity stands.
    const double high = (above & 0x7FFFu) == 0x7F80u ? std::copysign(0x1p128, value)
                                                     : static_cast<double>(bf16_to_f32(above));
    const double to_below = std::abs(value - static_cast<double>(bf16_to_f32(below)));
    const double to_above = std::abs(high - value);
    if (to_below == to_above) {
      ASSERT_EQ(got, below % 2 == 0 ? below : above) << value;
    } else {
      ASSERT_EQ(got, to_below < to_above ? below : above) << value;
    }
  }
}

TEST(DType, ElementsAtAnyAddress) {
  for (DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    std::array<std::byte, 64> memory{};
    std::byte* row = memory.data() + 1;
    for (std::size_t i = 0; i < 8; ++i) store_element(row, dtype, i, 0.5f * static_cast<float>(i));
    for (std::size_t i = 0; i < 8; ++i) {
      EXPECT_EQ(load_element(row, dtype, i), 0.5f * static_cast<float>(i)) << to_string(dtype);
    }
    EXPECT_EQ(memory[0], std::byte{0});
    for (std::size_t i = 1 + 8 * size_of(dtype); i < memory.size(); ++i) {
      EXPECT_EQ(memory[i], std::byte{0}) << "written past the row at " << i;
    }
  }
}

TEST(DType, NamesGoBothWays) {
  for (DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    const auto parsed = parse_dtype(to_string(dtype));
    ASSERT_TRUE(parsed.ok());
    EXPECT_EQ(parsed.value(), dtype);
  }
  EXPECT_EQ(parse_dtype("F16").value(), DType::kF16);
  EXPECT_EQ(parse_dtype("BF16").value(), DType::kBF16);
  EXPECT_EQ(parse_dtype("F32").value(), DType::kF32);
  for (const char* name : {"", "float64", "F8_E4M3", "Float16", "float16 "}) {
    const auto parsed = parse_dtype(name);
    ASSERT_FALSE(parsed.ok()) << name;
    EXPECT_EQ(parsed.status().code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(parsed.status().message(), testing::HasSubstr("float16, bfloat16, float32"));
  }
}

}  // namespace
}  // namespace kvtier
