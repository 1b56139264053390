#include "kernels/quantised_keys.h"

#include "kernels/simd_targets.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace kvtier {
namespace {

constexpr std::uint32_t kRun = KeyCodes::kRunTokens;

/// Runs of keys whose channels differ in size and place, as those of real keys do, and their codes.
struct Coded {
  Coded(KeyCodes codes, std::size_t runs, std::uint32_t skip = 0)
      : codes(codes),
        row_bytes(codes.dim * size_of(codes.dtype)),
        keys(runs * kRun * row_bytes),
        lines(runs * codes.run_lines()) {
    std::mt19937 random(codes.dim + codes.bits);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    for (std::size_t t = 0; t < runs * kRun; ++t) {
      for (std::uint32_t i = 0; i < codes.dim; ++i) {
        const float size = i % 7 == 0 ? 20.0f : 0.5f;
        const float place = i % 5 == 0 ? -30.0f : 0.0f;
        store_element(keys.data() + t * row_bytes, codes.dtype, i, place + size * uniform(random));
      }
    }
    code(skip);
  }
  void code(std::uint32_t skip) {
    for (std::size_t run = 0; run * kRun * row_bytes < keys.size(); ++run) {
      quantise_run(codes, view(run), run == 0 ? skip : 0, run_lines(run));
    }
  }
  RowsView view(std::size_t run) const {
    return {keys.data() + run * kRun * row_bytes, kRun, codes.dim, row_bytes, codes.dtype};
  }
  CodeLine* run_lines(std::size_t run) { return lines.data() + run * codes.run_lines(); }
  float key(std::size_t token, std::uint32_t i) const {
    return load_element(keys.data() + token * row_bytes, codes.dtype, i);
  }
  float step(std::size_t run, std::uint32_t i) {
    return load_element(run_lines(run)[KeyCodes::kRunTiles * codes.tile_lines()].bytes, codes.dtype,
                        i);
  }

  KeyCodes codes;
  std::size_t row_bytes;
  std::vector<std::byte> keys;
  std::vector<CodeLine> lines;
};

std::vector<KeyCodes> all_codes() {
  std::vector<KeyCodes> all;
  for (std::uint32_t bits : {4u, 2u}) {
    for (std::uint32_t dim : {8u, 64u, 72u, 80u, 128u, 256u, 576u}) {
      for (DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
        all.push_back({bits, dim, dtype});
      }
    }
  }
  return all;
}

TEST(QuantisedKeys, KeepTheirStatedErrorOnEveryInstructionSet) {
  for (const std::string& target : simd_targets()) {
    const ScopedSimdTarget use(target);
    for (const KeyCodes& codes : all_codes()) {
      Coded coded(codes, 2);
      std::vector<float> read(codes.dim);
      const auto levels = static_cast<float>((1u << codes.bits) - 1);
      for (std::size_t t = 0; t < 2 * kRun; ++t) {
        const std::size_t run = t / kRun;
        read_coded_key(codes, coded.run_lines(run), t % kRun, read.data());
        for (std::uint32_t i = 0; i < codes.dim; ++i) {
          const float step = coded.step(run, i);
          // The step's half, and the rounding of the sum that the code stands for.
          ASSERT_LE(std::abs(read[i] - coded.key(t, i)),
                    step * 0.5f * (1.0f + 0x1p-16f) + 0x1p-23f * std::abs(read[i]))
              << t << ", " << i << " " << target;
          float least = coded.key(run * kRun, i);
          float most = least;
          for (std::size_t row = run * kRun; row < (run + 1) * kRun; ++row) {
            least = std::min(least, coded.key(row, i));
            most = std::max(most, coded.key(row, i));
          }
          // Rounded up by less than one unit of the type, bf16's being the largest.
          ASSERT_LE(step, (most - least) / levels * (1.0f + 0x1p-7f));
        }
      }
    }
  }
}

TEST(QuantisedKeys, ReadForAttentionTheyAreRoundedOnce) {
  for (const std::string& target : simd_targets()) {
    const ScopedSimdTarget use(target);
    for (const KeyCodes& codes : all_codes()) {
      Coded coded(codes, 2);
      std::vector<float> key(codes.dim);
      // Rows a little apart, and what lies between them stays as it is.
      const std::size_t stride = coded.row_bytes + 8;
      for (const auto& [first, count] : {std::pair{0u, 64u}, {13u, 8u}, {63u, 1u}, {64u, 0u}}) {
        std::vector<std::byte> read(64 * stride, std::byte{0xA5});
        std::vector<std::byte> expected = read;
        read_coded_keys(codes, coded.run_lines(1), first, count, read.data(), stride);
        for (std::uint32_t t = 0; t < count; ++t) {
          read_coded_key(codes, coded.run_lines(1), first + t, key.data());
          for (std::uint32_t i = 0; i < codes.dim; ++i) {
            std::byte* row = expected.data() + t * stride;
            store_element(row, codes.dtype, i, key[i]);
            if (codes.dtype != DType::kF32) continue;
            const float found = load_element(read.data() + t * stride, codes.dtype, i);
            ASSERT_LE(std::abs(found - key[i]), 0x1p-22f * 40.0f) << target;
            store_element(row, codes.dtype, i, found);
          }
        }
        ASSERT_EQ(std::memcmp(read.data(), expected.data(), read.size()), 0)
            << target << " " << codes.dim << " " << codes.bits << " " << first;
      }
    }
  }
}

TEST(QuantisedKeys, KeysOnTheGridAreExact) {
  for (std::uint32_t bits : {4u, 2u}) {
    const KeyCodes codes{bits, 64, DType::kF16};
    Coded coded(codes, 1);
    const std::uint32_t levels = 1u << bits;
    for (std::size_t t = 0; t < kRun; ++t) {
      for (std::uint32_t i = 0; i < 64; ++i) {
        const auto code = static_cast<float>((t + i) % levels);
        store_element(coded.keys.data() + t * coded.row_bytes, codes.dtype, i,
                      float(i) - 7.0f + code * 0.25f);
      }
    }
    coded.code(0);
    std::vector<float> read(64);
    for (std::uint32_t t = 0; t < kRun; ++t) {
      read_coded_key(codes, coded.lines.data(), t, read.data());
      for (std::uint32_t i = 0; i < 64; ++i) ASSERT_EQ(read[i], coded.key(t, i)) << t << ", " << i;
    }
  }
}

TEST(QuantisedKeys, SkippedKeysDoNotWidenTheRange) {
  const KeyCodes codes{4, 64, DType::kF16};
  Coded coded(codes, 1);
  const Coded plain(codes, 1);
  for (std::size_t t = 0; t < 3; ++t) {
    for (std::uint32_t i = 0; i < 64; ++i) {
      store_element(coded.keys.data() + t * coded.row_bytes, codes.dtype, i, 1000.0f);
    }
  }
  coded.code(3);
  std::vector<float> read(64);
  for (std::uint32_t t = 3; t < kRun; ++t) {
    read_coded_key(codes, coded.lines.data(), t, read.data());
    for (std::uint32_t i = 0; i < 64; ++i) {
      ASSERT_LE(std::abs(read[i] - plain.key(t, i)), 0.5f * 40.1f / 15.0f);
    }
  }
  // A run of nothing but sinks.
  coded.code(kRun);
  read_coded_key(codes, coded.lines.data(), 5, read.data());
  for (float value : read) EXPECT_EQ(value, 0.0f);
}

TEST(ScoreCodes, AgreesWithTheReferenceOnEveryShapeTypeAndInstructionSet) {
  std::mt19937 random(5);
  std::uniform_real_distribution<float> uniform(-3.0f, 3.0f);
  for (const KeyCodes& codes : all_codes()) {
    Coded coded(codes, 3);
    for (std::uint32_t queries : {1u, 3u, 4u, 7u, 16u}) {
      const float cap = queries == 3 ? 20.0f : 0.0f;
      const SoftmaxOptions softmax{1.0f / std::sqrt(float(codes.dim)), cap};
      const std::size_t query_stride = codes.dim + 5;
      const std::size_t stride = 3 * kRun + 7;
      std::vector<float> input(queries * query_stride);
      for (float& value : input) value = uniform(random);
      const std::uint8_t tiles[] = {15, 6, 9};
      std::vector<float> expected(queries * stride, 1e30f);
      CodedTask task{codes,        coded.lines.data(), 3,       queries == 7 ? tiles : nullptr,
                     input.data(), query_stride,       queries, expected.data(),
                     stride};
      score_codes_reference(softmax, task);
      for (const std::string& target : simd_targets()) {
        const ScopedSimdTarget use(target);
        std::vector<float> logits(expected.size(), 1e30f);
        task.logits = logits.data();
        score_codes(softmax, task);
        for (std::size_t i = 0; i < logits.size(); ++i) {
          const std::size_t q = i / stride;
          double bound = 0.0;
          double of_codes = 0.0;
          double of_floats = 0.0;
          if (i % stride < 3 * kRun) {
            double largest = 0.0;
            double size = 0.0;
            for (std::uint32_t c = 0; c < codes.dim; ++c) {
              const double query = double{input[q * query_stride + c]};
              const double step = double{coded.step(i % stride / kRun, c)};
              largest = std::max(largest, std::abs(query) * step);
              of_codes += double{softmax.scale} * std::abs(query) * step / 2.0;
              size += std::abs(query) * 51.0;
            }
            // The stated rounding of the folded query, and float32's of sums of products.
            bound = double{softmax.scale} * codes.dim * ((1u << codes.bits) - 1) * largest / 500.0;
            of_floats =
                double{softmax.scale} * size * codes.dim * 0x1p-24 + 8 * 0x1p-24 * double{cap};
          }
          // What is lost here is a part of what coding the keys may lose.
          ASSERT_LE(std::abs(double{logits[i]} - double{expected[i]}), of_codes / 2.0 + of_floats);
          ASSERT_LE(std::abs(double{logits[i]} - double{expected[i]}), bound + of_floats)
              << i << ", dim " << codes.dim << ", bits " << codes.bits << ", queries " << queries
              << " " << target;
        }
      }
    }
  }
}

// A query whose largest product is 127 is folded into integers as it is: nothing is rounded at all.
TEST(ScoreCodes, IntegersAreExact) {
  const KeyCodes codes{4, 128, DType::kBF16};
  Coded coded(codes, 1);
  std::vector<float> query(128);
  std::vector<float> expected(kRun, 0.0f);
  for (std::uint32_t i = 0; i < 128; ++i) query[i] = float(int(i * 37 % 255) - 127);
  for (std::size_t t = 0; t < kRun; ++t) {
    for (std::uint32_t i = 0; i < 128; ++i) {
      const auto key = static_cast<float>((t * 7 + i) % 16) - 5.0f;
      store_element(coded.keys.data() + t * coded.row_bytes, codes.dtype, i, key);
      expected[t] += key * query[i];
    }
  }
  coded.code(0);
  for (const std::string& target : simd_targets()) {
    const ScopedSimdTarget use(target);
    std::vector<float> logits(kRun);
    score_codes({},
                {codes, coded.lines.data(), 1, nullptr, query.data(), 128, 1, logits.data(), kRun});
    EXPECT_EQ(logits, expected) << target;
  }
}

TEST(ScoreCodes, WhatIsNotFiniteStaysSo) {
  for (DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    for (float bad :
         {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
          std::numeric_limits<float>::quiet_NaN()}) {
      const KeyCodes codes{4, 64, dtype};
      Coded coded(codes, 1);
      store_element(coded.keys.data() + 9 * coded.row_bytes, dtype, 3, bad);
      for (const std::string& target : simd_targets()) {
        // Without an instruction for it, Highway's conversion of float16 knows no infinity.
        const bool emulated = target == "SCALAR" || target == "EMU128" || target.starts_with("SSE");
        if (emulated && dtype == DType::kF16) continue;
        const ScopedSimdTarget use(target);
        coded.code(0);
        const std::vector<float> query(64, 1.0f);
        std::vector<float> logits(kRun);
        score_codes(
            {}, {codes, coded.lines.data(), 1, nullptr, query.data(), 64, 1, logits.data(), kRun});
        for (float logit : logits) EXPECT_FALSE(std::isfinite(logit)) << target;
      }
    }
  }
  // Finite, but not its product with a step.
  const KeyCodes codes{4, 64, DType::kF32};
  Coded coded(codes, 1);
  std::vector<float> query(64, 0.0f);
  query[7] = 3e38f;
  std::vector<float> logits(kRun);
  score_codes({},
              {codes, coded.lines.data(), 1, nullptr, query.data(), 64, 1, logits.data(), kRun});
  for (float logit : logits) EXPECT_FALSE(std::isfinite(logit));
}

TEST(QuantisedKeys, WideRangesAndUnknownCodes) {
  const KeyCodes codes{4, 8, DType::kF32};
  Coded coded(codes, 1);
  // The range overflows float32, its sixteenth does not.
  store_element(coded.keys.data(), DType::kF32, 0, 3e38f);
  store_element(coded.keys.data() + coded.row_bytes, DType::kF32, 0, -3e38f);
  coded.code(0);
  std::vector<float> read(8);
  read_coded_key(codes, coded.lines.data(), 0, read.data());
  EXPECT_NEAR(read[0] / 3e38f, 1.0f, 1e-5f);
  EXPECT_EQ(check_codes({4, 12, DType::kF16}).code(), StatusCode::kUnsupported);
  EXPECT_EQ(check_codes({4, 584, DType::kF16}).code(), StatusCode::kUnsupported);
  EXPECT_EQ(check_codes({3, 64, DType::kF16}).code(), StatusCode::kUnsupported);
  EXPECT_TRUE(check_codes({2, 576, DType::kBF16}).ok());
}

}  // namespace
}  // namespace kvtier
