#pragma once

#include "memory/dtype.h"
#include "memory/ids.h"
#include "memory/status.h"

#include <cstddef>
#include <cstdint>
#include <string>

namespace kvtier {

/// What the engine and the user choose about blocks; `BlockLayout` derives the rest.
struct BlockShape {
  DType dtype = DType::kF16;
  std::uint32_t head_dim = 128;
  std::uint32_t value_dim = 128;
  /// KV heads of one layer in the model.
  std::uint32_t kv_heads = 8;
  /// KV heads that are selected, moved and stored together: 1, or a divisor of `kv_heads`.
  std::uint32_t kv_heads_per_block = 1;
  /// 1 to 64; small, because a fine selection over the link beats a coarse one (README,
  /// "Decisions").
  std::uint32_t tokens_per_block = 8;
  /// What one disk read or write moves; a multiple of 4 KiB, header included.
  std::size_t extent_bytes = 128 * 1024;
};

/// The one place where sizes, strides and disk padding are computed.
///
/// A block is `[K: heads, tokens, head_dim][V: heads, tokens, value_dim]`, contiguous, padded to
/// `kBlockAlignment`. An extent is one header (padded to `kPageBytes`) and `blocks_per_extent`
/// blocks of consecutive tokens of one head group; it looks the same in a host frame and on disk.
///
/// Immutable value; safe to share between threads.
class BlockLayout {
 public:
  static constexpr std::size_t kPageBytes = 4096;
  static constexpr std::size_t kBlockAlignment = 64;
  /// Fixed part of an extent's header and one entry per block; spelled out in transfer/README.md.
  static constexpr std::size_t kExtentHeaderFixedBytes = 64;
  static constexpr std::size_t kExtentHeaderEntryBytes = 40;

  /// Fails with `invalid_argument`, naming the field and what would be accepted.
  static Result<BlockLayout> make(const BlockShape& shape);

  const BlockShape& shape() const { return shape_; }
  DType dtype() const { return shape_.dtype; }
  std::uint32_t head_dim() const { return shape_.head_dim; }
  std::uint32_t value_dim() const { return shape_.value_dim; }
  std::uint32_t kv_heads() const { return shape_.kv_heads; }
  std::uint32_t heads_per_block() const { return shape_.kv_heads_per_block; }
  std::uint32_t head_groups() const { return shape_.kv_heads / shape_.kv_heads_per_block; }
  std::uint32_t tokens_per_block() const { return shape_.tokens_per_block; }

  std::size_t key_row_bytes() const { return shape_.head_dim * size_of(shape_.dtype); }
  std::size_t value_row_bytes() const { return shape_.value_dim * size_of(shape_.dtype); }
  /// K and V of one token in one KV head.
  std::size_t token_head_bytes() const { return key_row_bytes() + value_row_bytes(); }
  /// Bytes of a full block without padding, and with it.
  std::size_t payload_bytes() const { return payload_bytes_; }
  std::size_t block_bytes() const { return block_bytes_; }

  /// Bytes of a block's keys, which come first; its values are the rest of the payload.
  std::size_t key_bytes() const { return values_offset_; }

  /// Offsets inside a block. `head` counts within the block.
  std::size_t key_offset(std::uint32_t head, std::uint32_t token) const {
    return (std::size_t{head} * shape_.tokens_per_block + token) * key_row_bytes();
  }
  std::size_t value_offset(std::uint32_t head, std::uint32_t token) const {
    return values_offset_ +
           (std::size_t{head} * shape_.tokens_per_block + token) * value_row_bytes();
  }

  std::size_t extent_bytes() const { return shape_.extent_bytes; }
  std::size_t extent_header_bytes() const { return extent_header_bytes_; }
  std::uint32_t blocks_per_extent() const { return blocks_per_extent_; }
  std::uint32_t tokens_per_extent() const { return blocks_per_extent_ * shape_.tokens_per_block; }
  /// Offset of block `place` (0 .. blocks_per_extent-1) inside its extent.
  std::size_t block_offset(std::uint32_t place) const {
    return extent_header_bytes_ + place * block_bytes_;
  }

  BlockIndex block_of_token(std::uint32_t position) const {
    return BlockIndex{position / shape_.tokens_per_block};
  }
  std::uint32_t first_token(BlockIndex index) const {
    return index.value * shape_.tokens_per_block;
  }

  /// Block ids: an extent's blocks are numbered consecutively.
  BlockId block_id(ExtentId extent, std::uint32_t place) const {
    return BlockId{std::uint64_t{extent.value} * blocks_per_extent_ + place};
  }
  ExtentId extent_of(BlockId id) const {
    return ExtentId{static_cast<std::uint32_t>(id.value / blocks_per_extent_)};
  }
  std::uint32_t place_of(BlockId id) const {
    return static_cast<std::uint32_t>(id.value % blocks_per_extent_);
  }

  /// 64-bit digest of everything above; equal layouts have equal fingerprints on every machine.
  std::uint64_t fingerprint() const { return fingerprint_; }
  /// "8 tokens x 1 head x (64 + 64) float16 = 2048 B; 62 blocks in 131072 B".
  std::string describe() const;

 private:
  BlockLayout() = default;

  BlockShape shape_;
  std::size_t values_offset_ = 0;
  std::size_t payload_bytes_ = 0;
  std::size_t block_bytes_ = 0;
  std::size_t extent_header_bytes_ = 0;
  std::uint32_t blocks_per_extent_ = 0;
  std::uint64_t fingerprint_ = 0;
};

}  // namespace kvtier
