#pragma once

#include "kernels/attend_slots.h"
#include "kernels/gpu.h"
#include "kernels/quantised_keys.h"
#include "memory/dtype.h"
#include "memory/status.h"
#include "memory/stream_ref.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// 4-bit keys of one KV head in the order in which a tensor core takes them: the same codes, steps
/// and smallest keys as `KeyCodes` (quantised_keys.h), at other places.
///
/// A run of 64 tokens is `run_bytes()` long, a multiple of 16. First the codes: four tiles, each
/// `dim / 64` times 32 lanes times 16 bytes, then [dim] steps, then [dim] smallest keys. Lane
/// 4 g + c holds the channels [c dim / 4, (c + 1) dim / 4), four to a word of 32 bits, and of tile
/// i the tokens 8 g + 2 i and 8 g + 2 i + 1, so that over the tiles it has eight tokens in a row,
/// and the weights of a block of tokens are summed without looking at other lanes. In a word,
/// channel 0 to 3 of the first token lie at bits 0, 16, 4 and 20, of the second 8 bits higher: two
/// masks and one shift give the four registers of a product, the codes being 16-bit numbers too
/// small to be normal, which a tensor core multiplies like all others.
struct DeviceCodes {
  std::uint32_t dim = 128;  ///< 64 or 128.
  DType dtype = DType::kBF16;

  static constexpr std::uint32_t kRunTokens = KeyCodes::kRunTokens;

  std::size_t scales_offset() const { return std::size_t{kRunTokens} * dim / 2; }
  std::size_t run_bytes() const { return scales_offset() + 2 * std::size_t{dim} * size_of(dtype); }
};

/// One run to be coded: number `run` of list `list`, a list being one KV head of one sequence.
struct CodeRunJob {
  std::uint32_t list = 0;
  std::uint32_t run = 0;
};

/// Codes of keys and means of values, made on the GPU from the blocks as their last token comes.
struct CodeRunsParams {
  KvSlab slab;  ///< Blocks of one KV head; f16 or bf16, head and value dim 64 or 128.
  const CodeRunJob* jobs = nullptr;      ///< [job_count]
  const std::uint32_t* slots = nullptr;  ///< [job_count, 64 / tokens_per_block]: the run's blocks.
  std::uint32_t job_count = 0;
  /// The first tokens of every list, up to 64, which take no part in ranges and means: they are
  /// always attended, and unlike all others.
  std::uint32_t sinks = 0;
  std::uint32_t lists = 0;
  std::uint32_t runs_max = 0;
  std::byte* codes = nullptr;        ///< [lists, runs_max, run_bytes], 16-byte aligned.
  std::byte* value_means = nullptr;  ///< [lists, runs_max, value_dim] of the slab's type.

  DeviceCodes layout() const { return {slab.head_dim, slab.dtype}; }
};

/// Enqueues the coding: one kernel, a CTA a run. Byte for byte what `quantise_run` makes of the
/// same keys, in the layout above. A slot outside the slab gives a run that scores as not-a-number,
/// as does a key that is not finite; a job outside lists and runs is left out. All pointers are
/// device-reachable and alive until the stream is past them. Allocates nothing, waits for nothing.
///
/// `unsupported`: float32, other dims, several KV heads a block, blocks that do not divide 64.
Status code_runs(const Gpu& gpu, const CodeRunsParams& params, StreamRef stream);

/// The run as `quantise_run` made it, in the layout above; for tests. `target` is run_bytes() long.
void reorder_run(const KeyCodes& codes, const CodeLine* run, std::span<std::byte> target);

}  // namespace kvtier
