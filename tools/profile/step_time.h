#pragma once

#include "memory/status.h"
#include "tools/profile/budget_options.h"
#include "tools/profile/machine_profile.h"
#include "tools/profile/memory_fit.h"
#include "tools/profile/model_description.h"
#include "tools/profile/reuse_curve.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kvtier {

/// What computes, copies and reads how fast; bytes per second of one GPU, link or disk.
struct MachineRates {
  const MachineProfile* profile = nullptr;
  bool has_gpu = false;
  double device_read = 0;
  double link_large = 0;
  std::optional<double> disk_read;        ///< Whole extents at random places.
  std::optional<double> disk_sequential;  ///< A prefix.
  std::optional<double> gemm;             ///< Operations per second.
  double launch_s = 0;
  /// Which entries these are of, and what stands in for those that are missing, one line each.
  std::vector<std::string> assumptions;
  /// Why questions of disk or prefill get no answer.
  std::string no_disk;
  std::string no_gemm;

  /// Fails with `unsupported`, naming the entry, when the profile cannot tell how fast memory is
  /// read or how fast blocks reach the device.
  static Result<MachineRates> of(const MachineProfile& profile, const BudgetOptions& options);

  /// Of attention that reads `bytes` in one call; of missing blocks of `block_bytes` each.
  double attention(double bytes) const;
  double gather(double block_bytes) const;
  /// Of choosing among about `tokens` tokens of keys of `head_dim`, in tokens of a KV head; none
  /// where the profile has no figure for this selector.
  std::optional<double> select_head_tokens(const std::string& selector, double tokens,
                                           std::uint32_t head_dim) const;
};

/// One decode step of all sequences, in seconds.
struct StepTime {
  double weights = 0;  ///< Reading what the step multiplies with.
  double state = 0;    ///< Linear layers: their state is read and written.
  double select = 0;
  double attend = 0;
  double link = 0;  ///< Missed blocks, host to device.
  double disk = 0;  ///< Extents of those that are not in host memory either.
  double launch = 0;
  bool overlaps = false;  ///< Fetching runs beside attention of what is there.

  double total() const {
    return weights + state + select + launch + disk +
           (overlaps ? (attend > link ? attend : link) : attend + link);
  }
};

/// The step with this share of the KV on the device and in host memory.
StepTime selected_step(const ModelDescription& model, const BudgetOptions& options,
                       const MachineRates& rates, const SelectorTable& selectors,
                       const ReuseCurve& reuse, double weight_bytes, double device_share,
                       double host_share);

/// The same with full attention and everything on the device, whether it fits or not.
StepTime full_step(const ModelDescription& model, const BudgetOptions& options,
                   const MachineRates& rates, double weight_bytes);

/// Loading a prefix of `tokens` against computing it again, in seconds; none where a rate is
/// missing.
struct PrefixTime {
  double from_host = 0;
  std::optional<double> from_disk;
  std::optional<double> recompute;
};
PrefixTime prefix_time(const ModelDescription& model, const BudgetOptions& options,
                       const MachineRates& rates, double weight_bytes, std::uint64_t tokens);

}  // namespace kvtier
