#include "memory/block_layout.h"

namespace kvtier {
namespace {

constexpr std::size_t align_up(std::size_t bytes, std::size_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

Status check_range(const char* field, std::size_t value, std::size_t low, std::size_t high) {
  if (value >= low && value <= high) return {};
  return invalid_argument(fmt::format("{} is {}, expected {} to {}", field, value, low, high));
}

// FNV-1a over 64-bit words: stable across machines and good enough to tell layouts apart.
class Fingerprint {
 public:
  void add(std::uint64_t word) {
    for (int shift = 0; shift < 64; shift += 8) {
      hash_ = (hash_ ^ ((word >> shift) & 0xFF)) * 0x100000001B3ull;
    }
  }
  std::uint64_t value() const { return hash_; }

 private:
  std::uint64_t hash_ = 0xCBF29CE484222325ull;
};

std::uint32_t blocks_that_fit(std::size_t extent_bytes, std::size_t block_bytes) {
  std::size_t blocks = extent_bytes / block_bytes;
  while (blocks > 0) {
    const std::size_t header = align_up(
        BlockLayout::kExtentHeaderFixedBytes + blocks * BlockLayout::kExtentHeaderEntryBytes,
        BlockLayout::kPageBytes);
    if (header + blocks * block_bytes <= extent_bytes) break;
    --blocks;
  }
  return static_cast<std::uint32_t>(blocks);
}

}  // namespace

Result<BlockLayout> BlockLayout::make(const BlockShape& shape) {
  KVTIER_RETURN_IF_ERROR(check_range("head_dim", shape.head_dim, 1, 1024));
  KVTIER_RETURN_IF_ERROR(check_range("value_dim", shape.value_dim, 1, 1024));
  KVTIER_RETURN_IF_ERROR(check_range("kv_heads", shape.kv_heads, 1, 1024));
  KVTIER_RETURN_IF_ERROR(check_range("tokens_per_block", shape.tokens_per_block, 1, 64));
  KVTIER_RETURN_IF_ERROR(
      check_range("kv_heads_per_block", shape.kv_heads_per_block, 1, shape.kv_heads));
  if (shape.kv_heads % shape.kv_heads_per_block != 0) {
    return invalid_argument(
        fmt::format("kv_heads_per_block is {}, expected a divisor of kv_heads {}",
                    shape.kv_heads_per_block, shape.kv_heads));
  }
  KVTIER_RETURN_IF_ERROR(
      check_range("extent_bytes", shape.extent_bytes, 2 * kPageBytes, std::size_t{64} << 20));
  if (shape.extent_bytes % kPageBytes != 0) {
    return invalid_argument(fmt::format("extent_bytes is {}, expected a multiple of {}",
                                        shape.extent_bytes, kPageBytes));
  }

  BlockLayout layout;
  layout.shape_ = shape;
  const std::size_t rows = std::size_t{shape.kv_heads_per_block} * shape.tokens_per_block;
  layout.values_offset_ = rows * layout.key_row_bytes();
  layout.payload_bytes_ = rows * layout.token_head_bytes();
  layout.block_bytes_ = align_up(layout.payload_bytes_, kBlockAlignment);
  layout.blocks_per_extent_ = blocks_that_fit(shape.extent_bytes, layout.block_bytes_);
  if (layout.blocks_per_extent_ == 0) {
    return invalid_argument(
        fmt::format("extent_bytes is {}, but one block of {} B with its header page needs {}",
                    shape.extent_bytes, layout.block_bytes_,
                    align_up(layout.block_bytes_ + kPageBytes, kPageBytes)));
  }
  layout.extent_header_bytes_ = align_up(
      kExtentHeaderFixedBytes + layout.blocks_per_extent_ * kExtentHeaderEntryBytes, kPageBytes);

  Fingerprint fingerprint;
  for (std::uint64_t word :
       {std::uint64_t{static_cast<unsigned char>(shape.dtype)}, std::uint64_t{shape.head_dim},
        std::uint64_t{shape.value_dim}, std::uint64_t{shape.kv_heads},
        std::uint64_t{shape.kv_heads_per_block}, std::uint64_t{shape.tokens_per_block},
        std::uint64_t{shape.extent_bytes}, std::uint64_t{layout.block_bytes_}}) {
    fingerprint.add(word);
  }
  layout.fingerprint_ = fingerprint.value();
  return layout;
}

std::string BlockLayout::describe() const {
  return fmt::format("{} token{} x {} head{} x ({} + {}) {} = {} B; {} blocks in {} B",
                     tokens_per_block(), tokens_per_block() == 1 ? "" : "s", heads_per_block(),
                     heads_per_block() == 1 ? "" : "s", head_dim(), value_dim(),
                     kvtier::to_string(dtype()), block_bytes_, blocks_per_extent_, extent_bytes());
}

}  // namespace kvtier
