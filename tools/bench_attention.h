#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kvtier {

/// How fast partial attention runs over resident blocks, against what the machine's memory gives.
struct BenchAttentionOptions {
  /// "table" or "json".
  std::string format = "table";
  /// Python interpreter that may have PyTorch to compare with; empty: do not compare.
  std::string python = "python3";
  /// Every figure is the median of as many interleaved repetitions.
  unsigned repetitions = 7;
  std::vector<unsigned> threads = {1, 2};
  /// Memory that blocks lie in, in order and at random places. Larger than the last-level cache for
  /// cold figures.
  std::size_t region_bytes = std::size_t{1} << 30;
  /// Bytes that one repetition reads at least, spread over the region.
  std::size_t bytes_per_repetition = std::size_t{192} << 20;
};

/// Measures and prints to standard output; progress and warnings go to standard error.
/// Returns the process's exit code: 0, 1 when memory is short, 2 for options that make no sense,
/// 4 when a result differs from the reference.
int run_bench_attention(const BenchAttentionOptions& options);

}  // namespace kvtier
