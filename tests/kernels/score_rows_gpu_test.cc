#include "kernels/score_rows.h"
#include "memory/dtype.h"
#include "tests/kernels/gpu_fixture.h"

#include <cmath>

namespace kvtier {
namespace {

struct ScoreGpuShape {
  std::uint32_t dim = 128;
  std::uint32_t tasks = 3;
  std::uint32_t rows = 100;
  std::uint32_t queries = 4;
  std::size_t gap = 0;  ///< Bytes between rows.
  float cap = 0.0f;
};

class ScoreRowsGpu : public GpuTest {
 protected:
  static std::vector<std::byte> random_elements(std::size_t count, DType dtype, float most,
                                                std::uint32_t seed) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(-most, most);
    std::vector<std::byte> bytes(count * 2);
    for (std::size_t i = 0; i < count; ++i) store_element(bytes.data(), dtype, i, uniform(random));
    return bytes;
  }

  void expect_near(const ScoreGpuShape& shape, DType dtype) {
    const std::size_t row_bytes = shape.dim * 2 + shape.gap;
    const std::size_t task_bytes = shape.rows * row_bytes + 32;
    const auto rows = random_elements(shape.tasks * task_bytes / 2, dtype, 1.0f, shape.rows);
    const auto queries =
        random_elements(std::size_t{shape.tasks} * shape.queries * shape.dim, dtype, 3.0f, 2);
    std::vector<std::uint32_t> counts;
    for (std::uint32_t t = 0; t < shape.tasks; ++t) counts.push_back(t == 1 ? 0 : shape.rows - t);
    const std::size_t stride = shape.rows + 5;
    std::vector<float> expected(shape.tasks * shape.queries * stride, 1e30f);
    const SoftmaxOptions softmax{1.0f / std::sqrt(float(shape.dim)), shape.cap};
    for (std::uint32_t t = 0; t < shape.tasks; ++t) {
      std::vector<float> of_task(shape.queries * shape.dim);
      for (std::size_t i = 0; i < of_task.size(); ++i) {
        of_task[i] = load_element(queries.data(), dtype, t * of_task.size() + i);
      }
      ScoreTask task{{rows.data() + t * task_bytes, counts[t], shape.dim, row_bytes, dtype},
                     of_task.data(),
                     shape.dim,
                     shape.queries,
                     expected.data() + t * shape.queries * stride,
                     stride};
      score_rows_reference(softmax, task);
    }
    const DeviceBuffer device_rows = to_device(rows);
    const DeviceBuffer device_queries = to_device(queries);
    const DeviceBuffer device_counts = to_device(counts);
    const DeviceBuffer logits = to_device(std::vector<float>(expected.size(), 1e30f));
    const ScoreRowsParams params{.rows = device_rows.data(),
                                 .task_stride_bytes = task_bytes,
                                 .row_stride_bytes = row_bytes,
                                 .dtype = dtype,
                                 .dim = shape.dim,
                                 .tasks = shape.tasks,
                                 .counts = device_counts.as<std::uint32_t>(),
                                 .rows_max = shape.rows,
                                 .queries = device_queries.data(),
                                 .query_count = shape.queries,
                                 .softmax = softmax,
                                 .logits = logits.as<float>(),
                                 .logit_stride = stride};
    ASSERT_TRUE(score_rows(gpu(), params, stream()).ok());
    const auto actual = to_host<float>(logits);
    // Roundings of a dot add like a random walk, u = 2^-23 each on logits of about 1 to 3; eight
    // standard deviations, and a few units for scale and tanh.
    const float tolerance = 0x1p-23f * (24.0f * std::sqrt(float(shape.dim)) + 8.0f * shape.cap);
    for (std::size_t i = 0; i < actual.size(); ++i) {
      ASSERT_NEAR(actual[i], expected[i], tolerance) << i << " of dim " << shape.dim;
    }
  }
};

TEST_F(ScoreRowsGpu, AgreesWithTheReferenceOnEveryShapeAndType) {
  std::vector<ScoreGpuShape> shapes;
  for (const std::uint32_t dim : {64u, 96u, 128u, 256u}) {
    for (const std::uint32_t rows : {3u, 8u, 31u, 32u, 33u, 5000u}) {
      shapes.push_back({.dim = dim, .rows = rows});
    }
    shapes.push_back({.dim = dim, .tasks = 1, .rows = 70, .gap = 48, .cap = 2.0f});
  }
  for (std::uint32_t queries = 1; queries <= 16; ++queries) shapes.push_back({.queries = queries});
  shapes.push_back({.tasks = 300, .rows = 500});
  shapes.push_back({.tasks = 3, .rows = 200000, .queries = 1});
  for (const ScoreGpuShape& shape : shapes) {
    for (const DType dtype : {DType::kF16, DType::kBF16}) expect_near(shape, dtype);
    if (HasFatalFailure()) return;
  }
}

TEST_F(ScoreRowsGpu, NothingIsSuccessAndOtherShapesAreRefused) {
  ScoreRowsParams params{.dim = 128, .query_count = 4};
  EXPECT_TRUE(score_rows(gpu(), params, stream()).ok());
  params.dim = 80;
  EXPECT_EQ(score_rows(gpu(), params, stream()).code(), StatusCode::kUnsupported);
  params.dim = 128;
  params.query_count = 17;
  EXPECT_EQ(score_rows(gpu(), params, stream()).code(), StatusCode::kUnsupported);
  params.query_count = 1;
  params.dtype = DType::kF32;
  EXPECT_EQ(score_rows(gpu(), params, stream()).code(), StatusCode::kUnsupported);
  wait();
}

}  // namespace
}  // namespace kvtier
