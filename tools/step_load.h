#pragma once

#include "memory/block_layout.h"
#include "runtime/device_step.h"
#include "tools/bench_gpu.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace kvtier {

/// One row's shape: bfloat16, 8 KV heads of 128, 32 query heads.
struct StepCase {
  std::uint32_t sequences = 1;
  std::uint32_t context = 0;  ///< Tokens of each sequence; a multiple of 1,024.
  std::uint32_t budget = 0;   ///< Tokens that a KV head attends, sinks and window included.
  std::uint32_t tokens_per_block = 8;

  static constexpr std::uint32_t kKvHeads = 8;
  static constexpr std::uint32_t kGroup = 4;
  static constexpr std::uint32_t kDim = 128;
  static constexpr std::uint32_t kSinks = 16;
  static constexpr std::uint32_t kWindow = 64;  ///< One run.

  std::uint32_t lists() const { return sequences * kKvHeads; }
  std::uint32_t blocks_per_list() const { return context / tokens_per_block; }
  std::uint32_t near_blocks() const { return (kSinks + kWindow) / tokens_per_block; }
  std::uint32_t chosen() const { return budget / tokens_per_block - near_blocks(); }
  std::size_t block_bytes() const { return std::size_t{tokens_per_block} * kDim * 4; }
  std::size_t host_bytes() const { return lists() * (std::size_t{context} * kDim * 4); }
  DeviceStepShape shape() const;
};

/// The tables of a step over random keys and values in page-locked memory: extents at random places
/// of it, codes made on the GPU from the same bytes, and a cache of four times the budget.
class StepLoad {
 public:
  /// `host` holds `c.host_bytes()` at least, filled with bfloat16 numbers.
  static Result<std::unique_ptr<StepLoad>> make(const GpuBench& bench, const StepCase& c,
                                                std::span<const std::byte> host);

  const DeviceStepTables& tables() const { return tables_; }
  const FetchReport& report() const { return *tables_.report; }

  /// After a step that fetched everything: lets `percent` of the chosen blocks of every list stay,
  /// fills all other slots with blocks that were not chosen, and keeps this state for `restore`.
  Status force_hits(const DeviceStep& step, unsigned percent);
  /// Enqueues that state again, as often as wanted.
  Status restore() const;
  Result<std::vector<float>> out() const;

 private:
  StepLoad(const GpuBench& bench, const StepCase& c, std::span<const std::byte> host)
      : bench_(bench), case_(c), host_(host) {}
  Status fill();
  Status fill_places();
  Status fill_map();
  Status fill_near();
  Status make_codes();
  std::uint32_t cache_slots() const { return 4 * case_.lists() * case_.chosen(); }
  std::uint32_t slots() const { return cache_slots() + case_.lists() * case_.near_blocks(); }
  std::uint32_t blocks() const { return case_.lists() * case_.blocks_per_list(); }
  /// The place of a block in host memory, counted in blocks.
  std::size_t place(std::uint32_t block) const {
    return std::size_t{frames_[block / blocks_per_extent_]} * blocks_per_extent_ +
           block % blocks_per_extent_;
  }
  Status allocate(std::size_t bytes, std::optional<DeviceBuffer>& buffer) const;
  Status upload(std::span<const std::byte> bytes, std::optional<DeviceBuffer>& buffer) const;
  template <typename T>
  Status upload(const std::vector<T>& values, std::optional<DeviceBuffer>& buffer) const {
    return upload(std::as_bytes(std::span(values)), buffer);
  }

  const GpuBench& bench_;
  StepCase case_;
  std::span<const std::byte> host_;
  std::uint32_t blocks_per_extent_ = 0;
  std::vector<std::uint32_t> frames_;
  DeviceStepTables tables_;
  std::optional<PinnedRegion> status_;
  std::optional<DeviceBuffer> extents_, device_frames_, generations_, seeds_, sums_, entries_,
      residents_, marks_, owners_, clock_, saved_entries_, saved_residents_, saved_marks_, slab_,
      out_, queries_, run_counts_, near_ranges_, near_offsets_, codes_, means_;
};

}  // namespace kvtier
