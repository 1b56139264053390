#pragma once

#include "memory/status.h"

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace kvtier {

/// What distinguishes entries of one name: numbers ("block_bytes") and words ("place").
using ProfileParameter = std::variant<double, std::string>;
using ProfileParameters = std::map<std::string, ProfileParameter>;

/// One figure of a machine, or the reason why there is none.
struct ProfileEntry {
  std::string name;
  ProfileParameters parameters;
  /// "bytes_per_s", "flop_per_s", "head_tokens_per_s" or "s".
  std::string unit;

  double median = 0;
  double lowest = 0;
  double highest = 0;
  std::uint32_t repetitions = 0;
  /// Of single operations, where they were timed, in microseconds.
  std::optional<double> latency_us_p50;
  std::optional<double> latency_us_p99;
  /// How it was measured, where the name does not say it all.
  std::string note;

  /// Why there is no figure; empty when there is one.
  std::string waived;
  bool has_figure() const { return waived.empty(); }
};

struct NumaNodeDescription {
  std::uint32_t node = 0;
  std::uint64_t memory_bytes = 0;
  std::uint32_t cpus = 0;
};

/// A machine as `kvtier profile machine` found it, or as figures published elsewhere describe it:
/// JSON of schema "kvtier.machine-profile", version 1 (tools/README.md). Value type.
struct MachineProfile {
  std::string name;
  std::string source;  ///< "measured", or "published" for figures typed from documents.
  std::string provenance;

  std::string cpu;
  std::uint32_t threads = 0;
  std::string simd;
  std::string build;
  std::uint64_t host_memory_bytes = 0;
  std::vector<NumaNodeDescription> numa_nodes;
  std::string gpu;  ///< Empty: none.
  std::uint64_t gpu_memory_bytes = 0;
  std::uint64_t disk_free_bytes = 0;

  std::vector<ProfileEntry> entries;
  /// Command lines of other tools that measure the same.
  std::vector<std::string> equivalents;

  /// Fails with `not_found` or `io_error`, or with `corrupt` in the form of `input_error`: another
  /// schema or version, a missing field, a figure that is not positive, spread that does not hold
  /// its median, an entry that is neither a figure nor waived, or two of one name and parameters.
  static Result<MachineProfile> read(const std::string& path);
  static Result<MachineProfile> parse(std::string_view text, const std::string& file);
  std::string to_json() const;

  /// The entry with a figure whose parameters are nearest: words must be equal, numbers are
  /// compared by their ratio, and what the entry does not have is not compared. Null when there is
  /// none.
  const ProfileEntry* nearest(std::string_view name, const ProfileParameters& parameters) const;
  /// The median at `x` of one parameter, interpolated between entries of equal words over the
  /// logarithms of both, and beyond the ends the end's. None without an entry that has it.
  std::optional<double> interpolated(std::string_view name, const std::string& parameter, double x,
                                     const ProfileParameters& others = {}) const;
  /// Why `name` has no figure: the reason it was waived for, or that the profile lacks it.
  std::string why_none(std::string_view name) const;
};

}  // namespace kvtier
