#include "tools/profile/memory_fit.h"

#include <algorithm>
#include <cmath>

namespace kvtier {

namespace {

double kept_at(const LayerDescription& layer, const KvTypes& types, std::uint32_t gpus,
               std::uint64_t context) {
  return layer.grows() ? 0 : layer_bytes_at(layer, types, gpus, context);
}

/// Whole sequences of `each` bytes; as many as anybody asks for where one takes nothing.
std::uint64_t count_of(double room, double each) {
  constexpr double kMost = 1e15;
  if (room <= 0) return 0;
  return static_cast<std::uint64_t>(each > 0 ? std::min(std::floor(room / each), kMost) : kMost);
}

}  // namespace

std::uint64_t attended_tokens(const LayerDescription& layer, const BudgetOptions& options) {
  const std::uint64_t asked = layer.kind == LayerKind::kMlaIndexed
                                  ? layer.index_top_k
                                  : options.budget.tokens(options.context_tokens);
  return std::clamp<std::uint64_t>(asked, 1, options.context_tokens);
}

SequenceBytes sequence_bytes(const ModelDescription& model, const BudgetOptions& options,
                             const SelectorTable& selectors) {
  const KvTypes types{.kv_bytes = options.kv_type.bytes, .index_bytes = options.kv_type.bytes};
  const auto context = static_cast<double>(options.context_tokens);
  SequenceBytes bytes;
  for (const LayerDescription& layer : model.layers) {
    bytes.fixed += kept_at(layer, types, options.gpus, options.context_tokens);
    if (!layer.grows()) continue;
    const LayerBytes own = layer_bytes(layer, types, options.gpus);
    bytes.growing_per_token += own.per_token;
    bytes.home_per_token += layer_bytes(layer, types, 1).per_token;
    bytes.index += own.index_per_token * context;
    const auto attended = static_cast<double>(attended_tokens(layer, options));
    bytes.held +=
        own.per_token * std::min(attended + static_cast<double>(options.block_tokens), context);
    if (layer.kind == LayerKind::kMlaIndexed) continue;
    const auto found = selectors.find({layer.key_dim, layer.value_dim});
    if (found == selectors.end()) continue;
    const double heads = layer.is_mla() ? 1 : std::ceil(double(layer.kv_heads) / options.gpus);
    bytes.selector += heads * found->second.at(context);
  }
  bytes.growing = bytes.growing_per_token * context;
  bytes.home = bytes.home_per_token * context;
  return bytes;
}

MemoryFit fit_memory(const SequenceBytes& bytes, double weight_bytes, const Capacities& capacities,
                     const BudgetOptions& options) {
  const double left = 1.0 - options.reserve.fraction();
  const auto sequences = static_cast<double>(options.sequences);
  MemoryFit fit;
  fit.weights = weight_bytes / options.gpus;
  fit.device_usable = capacities.device * left;
  fit.host_usable = capacities.host * left;
  const double free = fit.device_usable - fit.weights;
  fit.weights_fit = free >= 0;
  const double whole = bytes.fixed + bytes.index + bytes.growing;
  fit.sequences_on_device = count_of(free, whole);
  // Without a choice to make there is nothing to keep for it.
  const bool resident = sequences * whole <= free;
  fit.device_cache = free - sequences * (resident ? bytes.fixed + bytes.index : bytes.pinned());
  fit.device_fits = fit.device_cache >= (resident ? 0 : sequences * bytes.held);
  const double all = sequences * bytes.growing;
  fit.device_share = all > 0 ? std::clamp(fit.device_cache / all, 0.0, 1.0) : 1.0;
  const double homes = sequences * bytes.home;
  fit.host_share = homes > 0 ? std::min(1.0, fit.host_usable / homes) : 1.0;
  const double rest = homes * (1.0 - fit.host_share);
  fit.disk_share = homes > 0 ? std::min(rest, capacities.disk) / homes : 0;
  fit.homes_fit = resident || rest <= capacities.disk;

  const std::uint64_t by_device = count_of(free, bytes.pinned() + bytes.held);
  fit.sequences_with_host = std::min(by_device, count_of(fit.host_usable, bytes.home));
  fit.sequences_with_disk =
      std::min(by_device, count_of(fit.host_usable + capacities.disk, bytes.home));
  return fit;
}

}  // namespace kvtier
