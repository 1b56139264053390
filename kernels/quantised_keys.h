#pragma once

#include "kernels/kv_view.h"
#include "memory/status.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// What coded keys are stored in: a cache line, so that a vector load never crosses two.
struct alignas(64) CodeLine {
  std::byte bytes[64];
};

/// Keys of one KV head as small integers, for scoring every token of a long context.
///
/// A run is 64 consecutive tokens. Within a run each channel has its own smallest key m and step s,
/// and a key is m + s * code with a code of `bits` bits, rounded to nearest:
///   |key - (m + s * code)| <= s / 2 (1 + 2^-16), s <= (largest - smallest) / (2^bits - 1), rounded
///   up.
/// Channels, because after RoPE the channels of a key differ far more in size than the tokens of a
/// run do; a smallest value and not a symmetric range, because many channels keep their sign over a
/// whole run, and half of a symmetric range would then code nothing. The price is one number per
/// query and run (q.m), computed while the steps are folded into the query.
/// m and s are of the keys' type: m is one of the keys, so it is exact; s is rounded up, so that
/// the range is covered. Keys closer together than 2^-120 are taken as equal.
///
/// Layout of a run, in lines of 64 bytes: four tiles of 16 tokens, then [dim] steps, then [dim]
/// smallest keys. A line of a tile is 16 words of 32 bits, one per token, and holds 8 channels (16
/// with 2 bits). The channels of a token are dim / 4 fours: four n has channels n, n + dim / 4,
/// n + dim / 2 and n + 3 dim / 4, one in each byte of a word, and the fours of a line lie in its
/// words from the low end of each byte up. So a mask and a shift give a four of 16 tokens as bytes,
/// in the order in which multiply-adds of bytes take them; a query is brought into that order
/// without shuffling; lanes are tokens, so sums need none at the end; and single tiles can be
/// scored.
/// This is a layout for CPUs; a GPU wants its own, in the order of its matrix fragments.
struct KeyCodes {
  std::uint32_t bits = 4;  ///< 4 or 2.
  std::uint32_t dim = 0;   ///< A multiple of 8 up to `kDimMax`.
  DType dtype = DType::kF16;

  static constexpr std::uint32_t kDimMax = 576;
  static constexpr std::uint32_t kRunTokens = 64;
  static constexpr std::uint32_t kTileTokens = 16;
  static constexpr std::uint32_t kRunTiles = kRunTokens / kTileTokens;

  std::uint32_t channels_per_line() const { return 32 / bits; }
  std::size_t tile_lines() const { return (dim + channels_per_line() - 1) / channels_per_line(); }
  std::size_t scale_lines() const { return (2 * dim * size_of(dtype) + 63) / 64; }
  std::size_t run_lines() const { return kRunTiles * tile_lines() + scale_lines(); }
};

/// `unsupported` unless the kernels below take these codes.
Status check_codes(const KeyCodes& codes);

/// Codes 64 keys into `codes.run_lines()` lines. The first `skip` keys (sinks, which are unlike all
/// other keys and would widen every range) take no part and get the code 0. A channel with a key
/// that is not finite scores as not-a-number. Allocates nothing.
void quantise_run(const KeyCodes& codes, const RowsView& keys, std::uint32_t skip,
                  CodeLine* target);

/// The key that a code stands for: [dim]. For tests; `read_coded_keys` is for attention.
void read_coded_key(const KeyCodes& codes, const CodeLine* run, std::uint32_t token, float* target);

/// The same of tokens [first, first + count) of a run, rounded to nearest in the keys' own type:
/// token i at `target + i * stride_bytes`, aligned as the type. The same bytes on every instruction
/// set, but for float32 keys, which may differ by a rounding. Allocates nothing.
void read_coded_keys(const KeyCodes& codes, const CodeLine* run, std::uint32_t first,
                     std::uint32_t count, std::byte* target, std::size_t stride_bytes);

/// Scores the tokens of consecutive runs of one KV head.
struct CodedTask {
  KeyCodes codes;
  const CodeLine* runs = nullptr;
  std::size_t run_count = 0;
  /// Bit t of tiles[r]: score tile t of run r; the logits of other tiles are left alone. Null: all.
  const std::uint8_t* tiles = nullptr;
  const float* queries = nullptr;  ///< [queries, dim]
  std::size_t query_stride = 0;    ///< Elements from one query to the next.
  std::uint32_t query_count = 0;
  float* logits = nullptr;       ///< [queries, 64 * run_count]
  std::size_t logit_stride = 0;  ///< Elements from one query's logits to the next's.
  /// Whether the run behind these will be scored next, so that it is fetched in time.
  bool goes_on = false;
};

/// logits[q][t] = cap(scale * dot(queries[q], key[t])) with the key that the codes stand for.
/// Once per run the steps are folded into the query, f = q * s, which is rounded to 7 bits and a
/// sign relative to the largest |f|; integers from there on, with codes counted from the middle of
/// their range. So besides float32 rounding a logit is off by at most
///   scale * dim * (2^bits - 1) * largest |f| / 500  before the cap.
/// That is when every rounding errs the same way. As they fall, with 4 bits, a channel is off by
/// 0.011 of the largest |f|, where the code itself puts it off by 0.29 of its own |f| (root mean
/// squares; a quarter of it with 2 bits).
/// The same bits on every instruction set but for the fold.
/// Serial: the caller splits. Allocates nothing.
void score_codes(const SoftmaxOptions& softmax, const CodedTask& task);

/// Obvious float64 loops, without rounding the query; for tests.
void score_codes_reference(const SoftmaxOptions& softmax, const CodedTask& task);

}  // namespace kvtier
