#pragma once

#include "memory/region.h"
#include "tools/bench_attention.h"

#include <optional>
#include <string>
#include <vector>

namespace kvtier {

/// One decode step's attention: what a model of this shape asks of the kernel per layer.
struct BenchShape {
  std::uint32_t head_dim;
  std::uint32_t group;     ///< Query heads per KV head.
  std::uint32_t kv_heads;  ///< One task and one list of blocks each.
  std::uint32_t tokens;    ///< Per KV head.

  std::size_t bytes() const { return std::size_t{kv_heads} * tokens * 2 * head_dim * 2; }
};

/// A figure's median over the repetitions, and the lowest and highest.
struct Spread {
  double median = 0;
  double lowest = 0;
  double highest = 0;

  /// `values` holds at least one.
  static Spread of(std::vector<double> values);
};

/// What was measured of one shape, number of threads and placement. Shares and ratios are of
/// figures of the same repetition, so that a machine that slows down slows both.
struct BenchRow {
  BenchShape shape;
  unsigned threads = 0;
  std::string placement;
  std::size_t bytes = 0;  ///< Read per repetition.
  Spread attention_gbps;
  Spread stream_gbps;
  Spread blocks_gbps;
  Spread share_of_stream;
  Spread share_of_blocks;
  std::optional<Spread> torch_gbps;
  std::optional<Spread> ratio_to_torch;
  std::size_t read_ahead = 0;  ///< Blocks that the plain read prefetches ahead.
  float difference = 0;        ///< From the float64 reference.
};

struct BenchReport {
  BenchAttentionOptions options;
  RegionStats region;
  std::optional<std::string> torch_version;
  std::vector<BenchRow> rows;
};

/// To standard output. The JSON's schema is "kvtier.bench-attention", version 2.
void print_table(const BenchReport& report);
void print_json(const BenchReport& report);

}  // namespace kvtier
