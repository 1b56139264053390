#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kvtier {

struct BenchStepOptions {
  /// "table" or "json".
  std::string format = "table";
  /// Python interpreter that may have PyTorch to compare with; empty: do not compare.
  std::string python = "python3";
  /// Every figure is the median of as many interleaved repetitions.
  unsigned repetitions = 15;
  std::vector<std::uint32_t> contexts = {32768, 131072, 524288, 1048576};
  std::vector<std::uint32_t> budgets = {640, 2048};
  std::vector<std::uint32_t> blocks = {8};        ///< Tokens per block: 1, 4 or 8.
  std::vector<std::uint32_t> hits = {95, 80, 0};  ///< Percent of the choice that is resident.
  std::uint32_t batch = 1;                        ///< Sequences of one step.
};

/// One layer's step with its keys and values in page-locked memory, against what its bytes take at
/// the rates of memory and link, and against PyTorch's attention over everything in GPU memory.
/// Returns the process's exit code.
int run_bench_step(const BenchStepOptions& options);

}  // namespace kvtier
