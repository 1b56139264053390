#pragma once

#include "kernels/kv_view.h"
#include "kernels/worker_pool.h"

#include <cstddef>
#include <span>

namespace kvtier {

// Plain reads of memory, without arithmetic: what the speed of a kernel is compared with. Every
// worker reads its own part; each returns the seconds that all took.

/// Every line once, in address order: the best that the machine's memory gives.
double read_stream_seconds(std::span<const std::byte> bytes, WorkerPool& pool);

/// Every line of every block, in the order of the list, prefetched `ahead` blocks before; 0 leaves
/// prefetching to the hardware. Which is fastest depends on the machine and on the list's order.
double read_blocks_seconds(std::span<const BlockRange> blocks, std::size_t block_bytes,
                           std::size_t ahead, WorkerPool& pool);

/// The fastest `ahead` for blocks like these, found by trying.
std::size_t best_read_ahead(std::span<const BlockRange> blocks, std::size_t block_bytes,
                            WorkerPool& pool);

}  // namespace kvtier
