#include "selectors/vq_codebook.h"

#include "kernels/lower_triangle.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace kvtier {
namespace {

/// Sample rows that one worker assigns at a time.
constexpr std::uint32_t kAssignSlice = 256;

}  // namespace

VqCodebook::Scratch::Scratch(std::uint32_t dim, std::uint32_t parts)
    : rows(std::size_t{kSampleMax} * dim),
      codes(std::size_t{kSampleMax} * parts),
      sums(std::size_t{dim} * kCodeCentroids),
      members(std::size_t{parts} * kCodeCentroids) {}

VqCodebook::VqCodebook(std::uint32_t dim, std::uint32_t parts)
    : dim_(dim),
      parts_(parts),
      metric_(std::size_t{dim} * dim),
      centroids_(std::size_t{dim} * kCodeCentroids),
      half_norms_(std::size_t{parts} * kCodeCentroids) {}

void VqCodebook::set_metric(std::span<const float> sum_of_squares, std::uint64_t queries) {
  plain_ = true;
  double trace = 0.0;
  for (std::size_t i = 0; i < dim_; ++i) trace += double{sum_of_squares[i * dim_ + i]};
  if (queries == 0 || !std::isfinite(trace) || trace <= 0.0) return;
  const auto count = static_cast<double>(queries);
  const double share = count / (count + dim_);
  const double scale = share * dim_ / trace;
  // Cholesky by rows: row i of L needs the rows before it.
  for (std::size_t i = 0; i < dim_; ++i) {
    for (std::size_t j = 0; j <= i; ++j) {
      double sum = scale * double{sum_of_squares[i * dim_ + j]} + (i == j ? 1.0 - share : 0.0);
      for (std::size_t k = 0; k < j; ++k) {
        sum -= double{metric_[i * dim_ + k]} * double{metric_[j * dim_ + k]};
      }
      if (i == j && !(sum > 0.0)) return;
      metric_[i * dim_ + j] =
          static_cast<float>(i == j ? std::sqrt(sum) : sum / double{metric_[j * dim_ + j]});
    }
  }
  plain_ = false;
}

void VqCodebook::transform_key(const float* source, float* target) const {
  if (plain_) {
    std::copy_n(source, dim_, target);
    return;
  }
  multiply_transposed(metric_.data(), dim_, source, target);
}

void VqCodebook::transform_query(const float* source, float* target) const {
  if (plain_) {
    std::copy_n(source, dim_, target);
    return;
  }
  for (std::size_t i = 0; i < dim_; ++i) {
    const float* row = metric_.data() + i * dim_;
    double rest = double{source[i]};
    for (std::size_t j = 0; j < i; ++j) rest -= double{row[j]} * double{target[j]};
    target[i] = static_cast<float>(rest / double{row[i]});
  }
}

void VqCodebook::train(Scratch& scratch, std::uint32_t count, WorkerPool& pool) {
  KVTIER_CHECK(count > 0 && count <= kSampleMax, "a sample of {} rows, at most {}", count,
               kSampleMax);
  const auto used = std::min<std::uint32_t>(count, kCodeCentroids);
  std::ranges::fill(centroids_, 0.0f);
  for (std::size_t c = 0; c < used; ++c) {
    const float* row = scratch.rows.data() + c * count / used * dim_;
    for (std::size_t i = 0; i < dim_; ++i) centroids_[i * kCodeCentroids + c] = row[i];
  }
  set_norms(used);
  if (used == count) return;  // Every row is a centroid.
  struct Assignment {
    VqCodebook& codebook;
    Scratch& scratch;
    std::uint32_t count;
  } assignment{*this, scratch, count};
  for (std::uint32_t iteration = 0; iteration < kIterations; ++iteration) {
    pool.run((count + kAssignSlice - 1) / kAssignSlice, [&assignment](std::size_t slice) {
      const std::size_t first = slice * kAssignSlice;
      const VqCodebook& codebook = assignment.codebook;
      nearest_codes(codebook.view(), assignment.scratch.rows.data() + first * codebook.dim_,
                    std::min<std::size_t>(kAssignSlice, assignment.count - first),
                    assignment.scratch.codes.data() + first * codebook.parts_);
    });
    std::fill_n(scratch.sums.data(), scratch.sums.size(), 0.0f);
    std::fill_n(scratch.members.data(), scratch.members.size(), 0u);
    const std::size_t part_dim = dim_ / parts_;
    for (std::size_t r = 0; r < count; ++r) {
      for (std::size_t p = 0; p < parts_; ++p) {
        const std::uint8_t code = scratch.codes[r * parts_ + p];
        ++scratch.members[p * kCodeCentroids + code];
        for (std::size_t i = p * part_dim; i < (p + 1) * part_dim; ++i) {
          scratch.sums[i * kCodeCentroids + code] += scratch.rows[r * dim_ + i];
        }
      }
    }
    update(scratch);
    set_norms(used);
  }
}

void VqCodebook::update(const Scratch& scratch) {
  for (std::size_t i = 0; i < dim_; ++i) {
    const std::size_t part = i / (dim_ / parts_);
    for (std::size_t c = 0; c < kCodeCentroids; ++c) {
      const std::uint32_t members = scratch.members[part * kCodeCentroids + c];
      if (members == 0) continue;
      centroids_[i * kCodeCentroids + c] =
          scratch.sums[i * kCodeCentroids + c] / static_cast<float>(members);
    }
  }
}

void VqCodebook::set_norms(std::uint32_t used) {
  std::ranges::fill(half_norms_, 0.0f);
  for (std::size_t i = 0; i < dim_; ++i) {
    float* norms = half_norms_.data() + i / (dim_ / parts_) * kCodeCentroids;
    for (std::size_t c = 0; c < kCodeCentroids; ++c) {
      const float element = centroids_[i * kCodeCentroids + c];
      norms[c] += 0.5f * element * element;
    }
  }
  for (std::size_t p = 0; p < parts_; ++p) {
    std::fill(half_norms_.begin() + static_cast<std::ptrdiff_t>(p * kCodeCentroids + used),
              half_norms_.begin() + static_cast<std::ptrdiff_t>((p + 1) * kCodeCentroids),
              std::numeric_limits<float>::infinity());
  }
}

void VqCodebook::save(StateWriter& writer) const {
  writer.put(static_cast<std::uint8_t>(plain_));
  if (!plain_) writer.put_array(std::span(metric_));
  writer.put_array(std::span(centroids_));
  writer.put_array(std::span(half_norms_));
}

Status VqCodebook::restore(StateReader& reader) {
  std::uint8_t plain = 0;
  KVTIER_RETURN_IF_ERROR(reader.get(plain));
  plain_ = plain != 0;
  if (!plain_) KVTIER_RETURN_IF_ERROR(reader.get_exactly(std::span(metric_)));
  KVTIER_RETURN_IF_ERROR(reader.get_exactly(std::span(centroids_)));
  return reader.get_exactly(std::span(half_norms_));
}

}  // namespace kvtier
