#pragma once

#include "kernels/worker_pool.h"
#include "memory/status.h"
#include "tools/profile/machine_profile.h"
#include "tools/replay/progress.h"

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace kvtier {

/// What `kvtier profile machine` was asked for.
struct MachineOptions {
  std::string name = "this machine";
  std::string disk_path;  ///< Directory; empty: the system's for temporary files.
  double seconds = 60;    ///< Of measuring, shared by all points; setting up comes on top.
  unsigned threads = 0;   ///< 0: all that the process may use.
  std::string format = "table";
  std::string output_path;
};

/// Points are measured in turns of this many repetitions; figures are their median.
inline constexpr std::uint32_t kProfileRepetitions = 5;

/// Collects entries, and says how long each may take. Not thread-safe.
class ProfileRun {
 public:
  ProfileRun(const MachineOptions& options, MachineProfile& profile, WorkerPool& pool)
      : options_(options), profile_(profile), pool_(pool) {}

  const MachineOptions& options() const { return options_; }
  MachineProfile& profile() { return profile_; }
  WorkerPool& pool() { return pool_; }

  /// Seconds of one repetition of one point.
  double slice() const { return options_.seconds / kPoints / kProfileRepetitions; }
  /// Bytes that measurements of memory use: many times a last-level cache for the usual length of
  /// a run, less for a short one.
  std::size_t memory_bytes() const;

  /// Measures one point: calls `body` over and over, each call doing `work` (bytes, operations),
  /// and adds an entry with the rates of the repetitions. The first call is not counted.
  template <typename Body>
  void rate(ProfileEntry entry, double work, const Body& body) {
    show(entry.name);
    body();
    std::vector<double> rates;
    for (std::uint32_t i = 0; i < kProfileRepetitions; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      double elapsed = 0;
      double done = 0;
      do {
        body();
        done += work;
        elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      } while (elapsed < slice());
      rates.push_back(done / elapsed);
    }
    add(std::move(entry), std::move(rates));
  }

  /// Adds an entry with the spread of `figures`, which are not empty.
  void add(ProfileEntry entry, std::vector<double> figures);
  void waive(const std::string& name, ProfileParameters parameters, const std::string& reason);
  void show(const std::string& what);
  void clear() { progress_.clear(); }

 private:
  /// About as many points as there are.
  static constexpr double kPoints = 52;

  const MachineOptions& options_;
  MachineProfile& profile_;
  WorkerPool& pool_;
  Progress progress_;
};

// Each adds its entries. They fail when data that was moved or computed is not what it must be
// (`corrupt`); what the machine lacks or refuses is waived.

/// memory.read per NUMA node, host.copy, page_lock.
Status measure_memory(ProfileRun& run);
/// kernel.checksum, kernel.attention, kernel.select, gemm.
Status measure_kernels(ProfileRun& run);
/// disk.random_read, disk.sequential_read, disk.sequential_write.
Status measure_disk(ProfileRun& run);

/// Everything, with the machine's description. Prints nothing but progress on a terminal.
Result<MachineProfile> measure_machine(const MachineOptions& options);

/// For people.
std::string machine_table(const MachineProfile& profile);

}  // namespace kvtier
