#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kvtier {

/// What choosing costs, against attending everything: every selector over one made-up context.
struct BenchSelectOptions {
  /// "table" or "json".
  std::string format = "table";
  /// Names as users type them; "all" is every family at its defaults.
  std::vector<std::string> selectors = {"all"};
  std::vector<std::uint32_t> tokens = {131072};
  std::uint32_t kv_heads = 8;
  std::uint32_t queries_per_kv_head = 4;
  std::uint32_t head_dim = 128;
  std::uint32_t block_tokens = 8;
  double budget = 0.02;  ///< Share of the tokens,
  /// unless a number of tokens is given: what grows with the budget and what with the context.
  std::uint32_t budget_tokens = 0;
  unsigned threads = 2;
  /// Steps measured after one that is not; figures are medians.
  unsigned steps = 7;
};

/// Measures and prints to standard output. Keys of the context wander slowly, as neighbours of a
/// text do; figures of selectors that depend on how attention is spread (chunk-tree) are of this
/// context. Returns the process's exit code: 0, 1 when a selector fails or memory is short, 2 for
/// options that make no sense.
int run_bench_select(const BenchSelectOptions& options);

}  // namespace kvtier
