#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kvtier {

/// How fast a chunk of a prompt is attended: many queries of one sequence over all its tokens.
struct BenchPrefillOptions {
  /// Python interpreter that may have PyTorch to compare with; empty: do not compare.
  std::string python = "python3";
  /// Every figure is the median of as many interleaved repetitions.
  unsigned repetitions = 5;
  std::vector<unsigned> threads = {1, 2};
  std::uint32_t queries = 1024;
  std::uint32_t tokens = 8192;  ///< The queries' own included.
};

/// Measures and prints a table to standard output. Returns the process's exit code: 0, 1 when
/// memory is short, 2 for options that make no sense, 4 when a result differs from the reference.
int run_bench_prefill(const BenchPrefillOptions& options);

}  // namespace kvtier
