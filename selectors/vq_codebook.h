#pragma once

#include "kernels/code_scores.h"
#include "kernels/worker_pool.h"
#include "selectors/selector_state.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// The codebook of one KV head under the query-aware error of A2ATS: a key k that a centroid c
/// stands for costs (k - c)' H (k - c), with H = sum of q q' over queries. With H = L L' that is
/// the squared distance between L'k and L'c, so keys are multiplied by L', queries by the inverse
/// of L, and products stay what they were. Plain squared distances in parts then add up to the
/// cost, which lets a row be cut into parts (a product code) without losing the aim.
///
/// One thread at a time. Allocates when made.
class VqCodebook {
 public:
  VqCodebook(std::uint32_t dim, std::uint32_t parts);

  /// Takes the sum of q q' over `queries` queries, lower triangle of [dim, dim], scaled to a mean
  /// diagonal of 1. The identity counts as `dim` more queries: fewer than that cannot say that
  /// nobody will ever look in the other directions. No queries, or a sum that is not finite:
  /// the identity, that is plain k-means.
  void set_metric(std::span<const float> sum_of_squares, std::uint64_t queries);

  /// Scratch that the codebooks of a layer share.
  struct Scratch {
    Scratch(std::uint32_t dim, std::uint32_t parts);
    FixedArray<float> rows;             ///< [kSampleMax, dim]
    FixedArray<std::uint8_t> codes;     ///< [kSampleMax, parts]
    FixedArray<float> sums;             ///< Shaped like the centroids.
    FixedArray<std::uint32_t> members;  ///< [parts, 256]
  };
  static constexpr std::uint32_t kSampleMax = 4096;  ///< 16 rows for each centroid.
  static constexpr std::uint32_t kIterations = 6;

  /// Lloyd's k-means on the first `count` (1 to kSampleMax) of `scratch.rows`, in metric space: a
  /// fixed number of iterations from evenly spread rows (A2ATS starts from k-means++, which takes a
  /// pass over the rows per centroid). With fewer rows than centroids each row is one. A centroid
  /// that loses all rows stays where it is.
  void train(Scratch& scratch, std::uint32_t count, WorkerPool& pool);

  /// Into metric space: `target` may not be `source`.
  void transform_key(const float* source, float* target) const;
  void transform_query(const float* source, float* target) const;

  CodebookView view() const { return {centroids_.data(), half_norms_.data(), dim_, parts_}; }
  /// Centroids, their half norms, and the metric where there is one.
  std::size_t bytes() const {
    return (centroids_.size() + half_norms_.size() + (plain_ ? 0 : metric_.size())) * sizeof(float);
  }

  void save(StateWriter& writer) const;
  Status restore(StateReader& reader);

 private:
  void update(const Scratch& scratch);
  void set_norms(std::uint32_t used);

  std::uint32_t dim_;
  std::uint32_t parts_;
  bool plain_ = true;          ///< The metric is the identity.
  std::vector<float> metric_;  ///< L: lower triangle of [dim, dim].
  std::vector<float> centroids_;
  std::vector<float> half_norms_;
};

}  // namespace kvtier
