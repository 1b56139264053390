#pragma once

#include "memory/status.h"
#include "transfer/open_file.h"

#include <cstdint>
#include <string>
#include <vector>

namespace kvtier {

/// What one row of `kvtier bench disk` does to the file.
struct DiskPattern {
  bool write = false;
  bool random = true;
};
/// "random_read", "sequential_read", "random_write", "sequential_write".
Result<DiskPattern> parse_disk_pattern(std::string_view text);
std::string to_string(DiskPattern pattern);

struct BenchDiskOptions {
  std::string directory;
  /// "table" or "json".
  std::string format = "table";
  std::vector<DiskPattern> patterns = {{.write = false, .random = true},
                                       {.write = true, .random = false}};
  std::vector<std::size_t> io_bytes = {64 << 10, 256 << 10, 1 << 20};
  std::vector<std::uint32_t> depths = {1, 16, 64};
  FileBackend backend = FileBackend::kAuto;
  std::uint64_t file_bytes = std::uint64_t{2} << 30;
  /// How long one measurement lasts, and how often each is taken; figures are medians.
  double seconds = 1.0;
  unsigned repetitions = 5;
  /// The program that is run in turns with ours; empty for none.
  std::string fio = "fio";
};

/// Reads and writes a scratch file in a directory through the library's own `File`, every page
/// verified by a checksum of its own, in turns with the same without verification and with fio on
/// the same file. Prints the table, or JSON of schema "kvtier.bench-disk".
///
/// What is written goes to the first half of the file and is read back and verified at the end; fio
/// writes the second half. Returns the exit code: 0, 1 when the disk fails, 2 for a directory or
/// sizes that make no sense, 4 when a page was wrong.
int run_bench_disk(const BenchDiskOptions& options);

}  // namespace kvtier
