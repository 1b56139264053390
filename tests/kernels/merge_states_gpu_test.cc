#include "kernels/kv_view.h"
#include "kernels/merge_states.h"
#include "memory/dtype.h"
#include "tests/kernels/gpu_fixture.h"

#include <cmath>

namespace kvtier {
namespace {

struct Part {
  std::vector<float> out;
  std::vector<float> lse;
};

class MergeStatesGpu : public GpuTest {
 protected:
  static constexpr std::size_t kRows = 61;

  /// Rows whose lse lie apart by anything up to more than float32's exponent range; some are empty.
  static Part random_part(std::uint32_t dim, std::uint32_t seed) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    Part part;
    for (std::size_t row = 0; row < kRows; ++row) {
      const float spread = row % 3 == 0 ? 1.0f : row % 3 == 1 ? 20.0f : 400.0f;
      part.lse.push_back(random() % 5 == 0 ? kEmptyLse : spread * uniform(random));
      for (std::uint32_t i = 0; i < dim; ++i) {
        part.out.push_back(part.lse.back() == kEmptyLse ? 0.0f : uniform(random));
      }
    }
    return part;
  }

  Part merge(const std::vector<Part>& parts, std::uint32_t dim, DType dtype,
             const std::vector<float>& sinks) {
    std::vector<DeviceBuffer> buffers;
    MergeStatesParams params;
    for (const Part& part : parts) {
      buffers.push_back(to_device(part.out));
      buffers.push_back(to_device(part.lse));
      params.parts[params.part_count++] = {buffers[buffers.size() - 2].as<float>(),
                                           buffers.back().as<float>()};
    }
    const DeviceBuffer sink_buffer = to_device(sinks);
    const DeviceBuffer out = device_bytes(kRows * dim * size_of(dtype));
    const DeviceBuffer lse = device_bytes(kRows * 4);
    EXPECT_TRUE(out.fill(0x7F).ok() && lse.fill(0x7F).ok());
    params.rows = kRows;
    params.value_dim = dim;
    params.sink_logits = sinks.empty() ? nullptr : sink_buffer.as<float>();
    params.sink_heads = static_cast<std::uint32_t>(sinks.size());
    params.out = out.data();
    params.out_dtype = dtype;
    params.lse = lse.as<float>();
    EXPECT_TRUE(merge_states(gpu(), params, stream()).ok());
    const std::vector<std::byte> bytes = to_host<std::byte>(out);
    Part result;
    for (std::size_t i = 0; i < kRows * dim; ++i) {
      result.out.push_back(load_element(bytes.data(), dtype, i));
    }
    result.lse = to_host<float>(lse);
    return result;
  }
};

TEST_F(MergeStatesGpu, AgreesWithTheReference) {
  for (const std::uint32_t dim : {64u, 128u, 512u}) {
    for (std::uint32_t count = 1; count <= kMaxMergeParts; ++count) {
      for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
        for (const bool with_sinks : {false, true}) {
          std::vector<Part> parts;
          for (std::uint32_t p = 0; p < count; ++p) parts.push_back(random_part(dim, p + dim));
          const std::vector<float> sinks = with_sinks
                                               ? std::vector<float>{0.5f, -3.0f, 200.0f, kEmptyLse}
                                               : std::vector<float>{};
          Part expected = parts[0];
          for (std::uint32_t p = 1; p < count; ++p) {
            merge_states_reference({expected.out.data(), expected.lse.data()},
                                   {parts[p].out.data(), parts[p].lse.data()}, kRows, dim);
          }
          if (with_sinks) {
            std::vector<float> per_row;
            for (std::size_t r = 0; r < kRows; ++r) per_row.push_back(sinks[r % sinks.size()]);
            apply_sink_logits_reference({expected.out.data(), expected.lse.data()}, per_row, dim);
          }
          const Part actual = merge(parts, dim, dtype, sinks);
          // lse up to 512 have neighbours 2^-15 apart, and exp turns a difference's error into a
          // share's; four parts, and the reference rounds after each; then the output's own type.
          const float type = dtype == DType::kF32   ? 0.0f
                             : dtype == DType::kF16 ? 0x1p-11f
                                                    : 0x1p-8f;
          for (std::size_t i = 0; i < actual.out.size(); ++i) {
            ASSERT_NEAR(actual.out[i], expected.out[i], 4 * 0x1p-15f + type) << i;
          }
          for (std::size_t i = 0; i < kRows; ++i) {
            if (actual.lse[i] == expected.lse[i]) continue;
            ASSERT_NEAR(actual.lse[i], expected.lse[i], 4 * 0x1p-15f) << i;
          }
        }
      }
    }
  }
}

TEST_F(MergeStatesGpu, OnePartComesThroughAndNaNIsNotOverlooked) {
  Part part = random_part(64, 9);
  const Part same = merge({part}, 64, DType::kF32, {});
  EXPECT_EQ(same.out, part.out);
  Part other = random_part(64, 10);
  other.lse[5] = std::nanf("");
  for (const auto& parts :
       {std::vector<Part>{part, other}, std::vector<Part>{other, part}, std::vector<Part>{other}}) {
    const Part result = merge(parts, 64, DType::kBF16, {});
    for (std::size_t r = 0; r < kRows; ++r) {
      EXPECT_EQ(std::isnan(result.lse[r]), r == 5) << r;
      EXPECT_EQ(std::isnan(result.out[r * 64 + 63]), r == 5) << r;
    }
  }
}

TEST_F(MergeStatesGpu, NoRowsIsSuccessAndOddDimsAreRefused) {
  MergeStatesParams params;
  params.value_dim = 64;
  EXPECT_TRUE(merge_states(gpu(), params, stream()).ok());
  params.value_dim = 66;
  EXPECT_EQ(merge_states(gpu(), params, stream()).code(), StatusCode::kUnsupported);
}

}  // namespace
}  // namespace kvtier
