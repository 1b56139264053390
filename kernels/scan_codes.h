#pragma once

#include "kernels/code_runs.h"
#include "kernels/gpu.h"
#include "kernels/kv_view.h"
#include "memory/status.h"
#include "memory/stream_ref.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// What `scan` finds out about one step: the attention weight of every token from coded keys, on
/// the GPU. Device memory; each array is written by one launcher and read by those behind it.
///
/// A cell is `tokens_per_cell` consecutive tokens, the candidates of a choice; `cells_max =
/// runs_max * 64 / tokens_per_cell`. G query heads share a list. Weight of a cell for a query:
///   cells[..][cell] * 2^(tops[..][run] - lse2[..]).
/// "2" marks logarithms to base 2.
struct ScanWeights {
  float* cells = nullptr;           ///< [lists, G, cells_max]
  float* tops = nullptr;            ///< [lists, runs_max, G]: log base 2.
  float* sums = nullptr;            ///< [lists, runs_max, G]: of the run's cells.
  float* part_lse2 = nullptr;       ///< [lists, parts, G]
  float* lse2 = nullptr;            ///< [lists, G]: over all tokens, near ones included.
  float* scores = nullptr;          ///< [lists, cells_max]: negative for a cell that is chosen.
  std::uint32_t* bins = nullptr;    ///< [lists, kScoreBins]: how many candidates by first digit.
  std::uint8_t* touched = nullptr;  ///< [lists, runs_max]: 1 if a cell of the run is chosen.
  float* rest = nullptr;  ///< [lists, rest_parts, G, value_dim + 4]: sums, then their weight.
};
/// First digits of scores: radix_cut.cuh.
inline constexpr std::uint32_t kScoreBins = 2048;

struct ScanParams {
  DeviceCodes codes;
  const std::byte* runs = nullptr;         ///< [lists, runs_max, run_bytes], 16-byte aligned.
  const std::byte* value_means = nullptr;  ///< [lists, runs_max, value_dim]
  std::uint32_t value_dim = 128;           ///< 64 or 128.
  std::uint32_t lists = 0;                 ///< Up to 65,535: sequence * lists_per_sequence + head.
  std::uint32_t lists_per_sequence = 1;
  std::uint32_t runs_max = 0;
  /// [sequences]: complete runs that lie before the window. What is behind them is near: attended
  /// exactly, by somebody else.
  const std::uint32_t* run_counts = nullptr;
  std::uint32_t sinks = 0;            ///< Up to 64, a multiple of tokens_per_cell: near as well.
  std::uint32_t tokens_per_cell = 8;  ///< 1, 4 or 8.
  std::uint32_t group = 4;            ///< G: query heads per KV head, 1 to 8.
  const void* queries = nullptr;      ///< [lists, G, dim] of the codes' type, 16-byte aligned.
  SoftmaxOptions softmax;
  /// [lists, G], natural log: of the near tokens, attended exactly. None: there are none.
  const float* near_lse = nullptr;
  ScanWeights weights;

  std::size_t cells_max() const { return std::size_t{runs_max} * 64 / tokens_per_cell; }
};

/// CTAs of one list: of the scan, and of the estimate.
std::uint32_t scan_parts(const Gpu& gpu, const ScanParams& params);
std::uint32_t rest_parts(const Gpu& gpu, const ScanParams& params);

// Each enqueues kernels and returns; nothing is allocated and nothing waited for, so they can be
// captured, `run_counts` and all contents changing between replays. Deterministic.
// `unsupported`: shapes other than those named above.

/// Reads every code once: cells, tops, sums, part_lse2; clears bins and touched. Products of codes
/// and steps times query are exact to 2^-22 of each, so a logit is that of `score_codes_reference`
/// within  scale * 2^-21 * sum |q s code|  and float32 rounding. Steps beyond 1,023 (keys that span
/// 15,000) overflow: not-a-number, as keys that are not finite, in lse2 and all that follows.
Status scan_codes(const Gpu& gpu, const ScanParams& params, StreamRef stream);

/// lse2 over all tokens, and every cell's weight added over the query heads: scores and bins.
Status pool_scan(const Gpu& gpu, const ScanParams& params, StreamRef stream);

/// Attention over the far tokens that are not chosen, each with the mean value of its run: out
/// [lists, G, value_dim] and lse [lists, G] (natural). Behind the choice (choose_cells.h).
/// `rows` [lists, G], optional: 0 where nothing is to be estimated, which gives `kEmptyLse`; what
/// is not a number stays so.
struct ScanRestParams {
  const std::uint8_t* rows = nullptr;
  float* out = nullptr;
  float* lse = nullptr;
};
Status estimate_rest(const Gpu& gpu, const ScanParams& params, const ScanRestParams& rest,
                     StreamRef stream);

/// Obvious float64 loops over one list on the host, for tests. `logits` are [G, tokens] as
/// `score_codes_reference` makes them, of the run_count * 64 tokens; `chosen` are cells.
struct ScanReference {
  std::uint32_t group = 1;
  std::uint32_t tokens_per_cell = 8;
  std::uint32_t sinks = 0;
  std::uint32_t value_dim = 0;
  std::span<const float> logits;
  std::span<const float> near_lse;     ///< [G], or empty.
  std::span<const float> value_means;  ///< [runs, value_dim]
  std::span<const std::uint32_t> chosen;
  std::span<float> scores;  ///< [cells]; -1 for sinks.
  std::span<float> out;     ///< [G, value_dim]
  std::span<float> lse;     ///< [G]
};
void scan_reference(const ScanReference& task);

}  // namespace kvtier
