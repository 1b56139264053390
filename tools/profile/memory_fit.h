#pragma once

#include "tools/profile/budget_options.h"
#include "tools/profile/model_description.h"
#include "tools/profile/selector_bytes.h"

#include <cstdint>
#include <map>
#include <optional>
#include <utility>

namespace kvtier {

/// What selectors keep per KV head, by (key dim, value dim).
using SelectorTable = std::map<std::pair<std::uint32_t, std::uint32_t>, SelectorBytes>;

/// Bytes of one sequence of the asked context on one GPU.
struct SequenceBytes {
  double growing_per_token = 0;  ///< Keys and values of the layers that keep every token.
  double home_per_token = 0;     ///< The same, each kept once for all GPUs: what host or disk hold.
  double growing = 0;            ///< Of the whole context.
  double home = 0;
  double fixed = 0;     ///< Windows and states: always on the device.
  double index = 0;     ///< The model's own indexer: always on the device.
  double selector = 0;  ///< The selector's metadata, of layers without an indexer: likewise.
  double held = 0;      ///< Slots that a step needs at least: what it attends, and open blocks.

  /// What is on the device whatever the size of the cache there.
  double pinned() const { return fixed + index + selector; }
};

/// Tokens that a step attends of a layer that keeps every one.
std::uint64_t attended_tokens(const LayerDescription& layer, const BudgetOptions& options);

SequenceBytes sequence_bytes(const ModelDescription& model, const BudgetOptions& options,
                             const SelectorTable& selectors);

/// What there is to put it in. Bytes.
struct Capacities {
  double device = 0;  ///< Per GPU.
  double host = 0;
  double disk = 0;
};

/// What lies where, and how many sequences fit.
struct MemoryFit {
  double weights = 0;  ///< Per GPU.
  double device_usable = 0;
  double host_usable = 0;
  /// Of the KV of all sequences: resident on the device, at home in host memory, at home on disk.
  double device_share = 0;
  double host_share = 0;
  double disk_share = 0;
  /// Left for slots on each GPU; negative when weights and what is pinned do not fit.
  double device_cache = 0;
  bool weights_fit = false;
  bool device_fits = false;  ///< Room for what is pinned and for the slots of a step.
  bool homes_fit = false;    ///< Or everything is resident.

  /// Sequences of this context: with full attention and everything on the device; with homes in
  /// host memory; with homes in host memory and on disk.
  std::uint64_t sequences_on_device = 0;
  std::uint64_t sequences_with_host = 0;
  std::uint64_t sequences_with_disk = 0;

  bool fits() const { return weights_fit && device_fits && homes_fit; }
};

/// `weight_bytes` is of all GPUs together.
MemoryFit fit_memory(const SequenceBytes& bytes, double weight_bytes, const Capacities& capacities,
                     const BudgetOptions& options);

}  // namespace kvtier
