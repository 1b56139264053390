#pragma once

#include "memory/status.h"

#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <string>

namespace kvtier {

/// How a region's memory was obtained, for statistics and for people.
struct RegionStats {
  std::size_t bytes = 0;
  /// NUMA node the pages were bound to; none where the system refused to bind.
  std::optional<unsigned> numa_node;
  /// Bytes that the kernel backs with huge pages right now.
  std::size_t huge_page_bytes = 0;
  bool page_locked = false;
  /// One line on what was asked for and refused; empty when nothing was refused.
  std::string note;
};

struct RegionOptions {
  std::size_t bytes = 0;
  /// Node to bind to; by default that of the calling thread (hwloc's view of where it runs).
  std::optional<unsigned> numa_node = std::nullopt;
  /// Ask the kernel for huge pages (`madvise`); a system that has none is no error.
  bool huge_pages = true;
  /// Lock the pages where the limit on locked memory allows; where it does not, the note says so.
  bool page_lock = false;
};

/// One range of memory with a known place: page-aligned, zeroed, touched, NUMA-bound. Owns it.
///
/// Move-only. Allocation touches every page, so that the steady state takes no page faults; the
/// cost is about 0.3 s per GiB. Reading and writing the memory is the holder's affair.
class Region {
 public:
  /// `no_space` when the system has not that much memory.
  static Result<Region> allocate(const RegionOptions& options);
  /// Memory of somebody else's, page-aligned, handed back through `release` in the end. Neither
  /// zeroed nor bound.
  static Region adopt(std::span<std::byte> memory, std::function<void()> release);

  Region(Region&& other) noexcept;
  Region& operator=(Region&& other) noexcept;
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  ~Region();

  std::span<std::byte> bytes() const { return {data_, stats_.bytes}; }
  const RegionStats& stats() const { return stats_; }

 private:
  Region() = default;
  void release() noexcept;

  std::byte* data_ = nullptr;
  std::size_t mapped_bytes_ = 0;
  std::function<void()> release_;  ///< Set for adopted memory.
  RegionStats stats_;
};

}  // namespace kvtier
