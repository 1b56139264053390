#pragma once

#include "memory/region.h"
#include "memory/status.h"
#include "tools/bench_disk.h"
#include "transfer/file.h"

#include <cstdint>
#include <vector>

namespace kvtier {

/// The unit that is verified: each page of the file has content and a checksum of its own.
inline constexpr std::size_t kDiskPageBytes = 4096;

/// Made-up content of a page, a function of its number.
void fill_page(std::uint64_t number, std::byte* page);

/// What one measurement did.
struct DiskRun {
  std::uint64_t bytes = 0;
  double seconds = 0;
  double cpu_seconds = 0;  ///< Of all threads of this process.
  std::uint64_t pages_wrong = 0;

  double bytes_per_second() const { return static_cast<double>(bytes) / seconds; }
};

/// Drives one file at a fixed depth and knows what every page of it must hold.
///
/// Everything happens in the first half of the file; the second is for a peer that writes what it
/// likes. A finished read is replaced by the next one
/// before it is hashed, so that hashing costs the drive no time. One thread.
class DiskLoad {
 public:
  /// Operations verified while others are under way.
  static constexpr std::uint32_t kSpare = 16;

  /// Buffers for `depth_max` operations of `io_bytes_max`, announced to the file.
  static Result<DiskLoad> make(File& file, std::size_t io_bytes_max, std::uint32_t depth_max);

  /// Writes all of the file.
  Status fill();
  /// Reads or writes for about `seconds`. Fails with the first operation that fails; wrong pages
  /// are counted.
  Result<DiskRun> run(DiskPattern pattern, std::size_t io_bytes, std::uint32_t depth,
                      double seconds, bool verify);
  /// Reads the half that we write once from end to end and counts the pages that are wrong.
  Result<std::uint64_t> verify_written();

  std::uint64_t half_bytes() const;

 private:
  DiskLoad(File& file, Region buffers, std::size_t io_bytes_max, std::uint32_t depth_max);

  /// What the operations of one run are: the next place, and what is done with a finished one.
  struct Task {
    DiskPattern pattern;
    std::size_t io_bytes = 0;
    std::uint64_t places = 0;  ///< Of `io_bytes` each.
    bool verify = false;
    std::uint64_t next = 0;
  };
  void prepare(FileOperation& operation, Task& task);
  Status finish(const FileOperation& operation, const Task& task, DiskRun& run);
  Status submit(std::vector<FileOperation*>& ready);
  Status drain();
  std::uint64_t next_random();

  File* file_;
  Region buffers_;
  std::size_t io_bytes_max_;
  std::uint32_t depth_max_;
  std::vector<FileOperation> operations_;
  std::vector<FileOperation*> accepted_;
  /// Checksums of pages by number of their content; which content each page of the file holds.
  std::vector<std::uint64_t> sums_;
  std::vector<std::uint32_t> content_;
  std::vector<std::uint8_t> busy_;  ///< Places with an operation under way, in its size.
  std::uint64_t random_ = 0x9E3779B97F4A7C15u;
  std::uint64_t sum_of_sums_ = 0;
};

}  // namespace kvtier
