#include "tools/profile/step_time.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace kvtier {

namespace {

// Sinks and window of the runtime's defaults: attended at every step, and never missed.
constexpr std::uint64_t kHeldTokens = 68;
// Of a layer: projections, selection, attention, feed-forward; what a captured graph still costs.
constexpr double kLaunchesPerLayer = 8;
constexpr double kDiskDepth = 32;

KvTypes types_of(const BudgetOptions& options) {
  return {.kv_bytes = options.kv_type.bytes, .index_bytes = options.kv_type.bytes};
}

double weights_read(const ModelDescription& model, double weight_bytes, double tokens) {
  if (!model.parameters || model.parameters->total <= 0) return weight_bytes;
  return weight_bytes * model.parameters->read(tokens) / model.parameters->total;
}

/// What takes the same time however the KV is held.
StepTime common_step(const ModelDescription& model, const BudgetOptions& options,
                     const MachineRates& rates, double weight_bytes) {
  const auto sequences = static_cast<double>(options.sequences);
  StepTime step;
  step.overlaps = rates.has_gpu;
  step.weights = weights_read(model, weight_bytes, sequences) / options.gpus / rates.device_read;
  step.launch = rates.launch_s * kLaunchesPerLayer * static_cast<double>(model.layers.size());
  for (const LayerDescription& layer : model.layers) {
    if (layer.kind != LayerKind::kLinear) continue;
    const double bytes = layer_bytes(layer, types_of(options), options.gpus).fixed;
    step.state += 2 * sequences * bytes / rates.device_read;
  }
  return step;
}

/// Bytes per token that attention reads in a layer, whoever keeps them.
double attended_bytes_per_token(const LayerDescription& layer, const BudgetOptions& options) {
  LayerDescription as_full = layer;
  as_full.kind = layer.is_mla() ? LayerKind::kMla : LayerKind::kFull;
  as_full.stores_kv = true;
  return layer_bytes(as_full, types_of(options), options.gpus).per_token;
}

double block_bytes(const LayerDescription& layer, const BudgetOptions& options) {
  const double elements = layer.is_mla() ? layer.key_dim : layer.key_dim + layer.value_dim;
  return elements * options.kv_type.bytes * options.block_tokens;
}

double select_seconds(const LayerDescription& layer, const BudgetOptions& options,
                      const MachineRates& rates, const SelectorTable& selectors) {
  const auto context = static_cast<double>(options.context_tokens);
  const auto sequences = static_cast<double>(options.sequences);
  if (layer.kind == LayerKind::kMlaIndexed) {
    const double bytes = layer_bytes(layer, types_of(options), options.gpus).index_per_token;
    return sequences * bytes * context / rates.device_read;
  }
  const double heads = layer.is_mla() ? 1 : std::ceil(double(layer.kv_heads) / options.gpus);
  if (const auto rate = rates.select_head_tokens(options.selector, context, layer.key_dim)) {
    return sequences * heads * context / *rate;
  }
  const auto found = selectors.find({layer.key_dim, layer.value_dim});
  if (found == selectors.end()) return 0;
  return sequences * heads * found->second.at(context) / rates.device_read;
}

/// The first entry of `names` that has a figure.
std::optional<double> first_rate(const MachineProfile& profile,
                                 std::initializer_list<const char*> names,
                                 const ProfileParameters& parameters,
                                 std::vector<std::string>& assumptions, const char* what) {
  for (const char* name : names) {
    const ProfileEntry* entry = profile.nearest(name, parameters);
    if (entry == nullptr) continue;
    assumptions.push_back(
        fmt::format("{}: {} at {:.4g} {}", what, entry->name, entry->median, entry->unit));
    return entry->median;
  }
  return std::nullopt;
}

}  // namespace

Result<MachineRates> MachineRates::of(const MachineProfile& profile, const BudgetOptions& options) {
  MachineRates rates;
  rates.profile = &profile;
  rates.has_gpu = !profile.gpu.empty();
  const double threads = std::max(1u, profile.threads);
  const char* memory = rates.has_gpu ? "device.read" : "memory.read";
  const auto read = first_rate(profile, {memory}, {{"threads", threads}}, rates.assumptions,
                               "reading weights and metadata");
  if (!read) {
    return unsupported(fmt::format("{}: {} has no figure ({}); without it no step can be computed",
                                   options.machine_path, memory, profile.why_none(memory)));
  }
  rates.device_read = *read;
  const char* link = rates.has_gpu ? "link.host_to_device" : "host.copy";
  const ProfileParameters large = rates.has_gpu
                                      ? ProfileParameters{{"method", std::string("large")}}
                                      : ProfileParameters{{"block_bytes", 1e9}};
  const auto copied =
      first_rate(profile, {link}, large, rates.assumptions, "loading from host memory");
  if (!copied) {
    return unsupported(fmt::format("{}: {} has no figure ({}); without it no step can be computed",
                                   options.machine_path, link, profile.why_none(link)));
  }
  rates.link_large = *copied;
  const ProfileParameters extents = {{"block_bytes", static_cast<double>(options.extent_bytes)},
                                     {"depth", kDiskDepth}};
  rates.disk_read =
      first_rate(profile, {"disk.random_read"}, extents, rates.assumptions, "extents from disk");
  if (!rates.disk_read) rates.no_disk = profile.why_none("disk.random_read");
  rates.disk_sequential = first_rate(profile, {"disk.sequential_read", "disk.random_read"},
                                     {{"block_bytes", 1048576.0}, {"depth", kDiskDepth}},
                                     rates.assumptions, "a prefix from disk");
  if (options.gemm_flops) {
    rates.gemm = options.gemm_flops;
    rates.assumptions.push_back(
        fmt::format("computing a prefix: --gemm-flops {:.4g} per GPU", *options.gemm_flops));
  } else {
    rates.gemm = first_rate(profile, {"gemm"}, {}, rates.assumptions, "computing a prefix");
    if (!rates.gemm) {
      rates.no_gemm =
          fmt::format("gemm has no figure ({}); --gemm-flops gives one", profile.why_none("gemm"));
    }
  }
  const ProfileEntry* launch = profile.nearest("kernel.launch", {});
  if (launch != nullptr) {
    rates.launch_s = launch->median;
    rates.assumptions.push_back(fmt::format("{} launches per layer of {:.3g} us each",
                                            kLaunchesPerLayer, launch->median * 1e6));
  }
  if (!profile.interpolated("kernel.attention", "call_bytes", 1)) {
    rates.assumptions.push_back("attention reads as fast as memory: the profile has no figure");
  }
  if (!rates.select_head_tokens(options.selector, double(options.context_tokens), 128)) {
    rates.assumptions.push_back(fmt::format(
        "choosing takes as long as reading what {} keeps: the profile has no figure for it",
        options.selector));
  }
  return rates;
}

double MachineRates::attention(double bytes) const {
  return profile->interpolated("kernel.attention", "call_bytes", bytes).value_or(device_read);
}

double MachineRates::gather(double bytes) const {
  const auto rate =
      has_gpu ? profile->interpolated("link.host_to_device", "block_bytes", bytes,
                                      {{"method", std::string("gather")}})
              : profile->interpolated("host.copy", "block_bytes", bytes,
                                      {{"threads", double(std::max(1u, profile->threads))}});
  return rate.value_or(link_large);
}

std::optional<double> MachineRates::select_head_tokens(const std::string& selector, double tokens,
                                                       std::uint32_t head_dim) const {
  const ProfileEntry* entry =
      profile->nearest("kernel.select", {{"selector", selector},
                                         {"tokens", tokens},
                                         {"head_dim", double(head_dim)},
                                         {"threads", double(std::max(1u, profile->threads))}});
  if (entry == nullptr) return std::nullopt;
  return entry->median;
}

StepTime selected_step(const ModelDescription& model, const BudgetOptions& options,
                       const MachineRates& rates, const SelectorTable& selectors,
                       const ReuseCurve& reuse, double weight_bytes, double device_share,
                       double host_share) {
  const auto sequences = static_cast<double>(options.sequences);
  StepTime step = common_step(model, options, rates, weight_bytes);
  const double missed = reuse.missed(device_share);
  // The host's frames hold the device's blocks too, so what it reaches is the larger of the two.
  const double off_host = host_share >= 1 ? 0 : reuse.missed(std::max(device_share, host_share));
  for (const LayerDescription& layer : model.layers) {
    if (layer.kind == LayerKind::kLinear) continue;
    const double per_token = attended_bytes_per_token(layer, options);
    const bool slides = layer.kind == LayerKind::kSliding;
    const std::uint64_t attended = slides ? std::min(layer.window_tokens, options.context_tokens)
                                          : attended_tokens(layer, options);
    const double bytes = sequences * static_cast<double>(attended) * per_token;
    step.attend += bytes / rates.attention(bytes);
    if (slides || !layer.stores_kv) continue;
    step.select += select_seconds(layer, options, rates, selectors);
    const double far = attended > kHeldTokens ? double(attended - kHeldTokens) : 0;
    step.link += sequences * far * missed * per_token / rates.gather(block_bytes(layer, options));
    if (off_host <= 0 || !rates.disk_read) continue;
    // Neighbours in an extent are seldom missed together: each missed block reads one.
    const double home = layer_bytes(layer, types_of(options), 1).per_token;
    const double extents =
        std::max(1.0, static_cast<double>(options.extent_bytes) / block_bytes(layer, options));
    const double asked = sequences * far * std::min(missed, off_host) * home * extents;
    const double there = sequences * static_cast<double>(options.context_tokens) * home *
                         (1.0 - std::min(1.0, host_share));
    step.disk += std::min(asked, there) / *rates.disk_read;
  }
  return step;
}

StepTime full_step(const ModelDescription& model, const BudgetOptions& options,
                   const MachineRates& rates, double weight_bytes) {
  StepTime step = common_step(model, options, rates, weight_bytes);
  for (const LayerDescription& layer : model.layers) {
    if (layer.kind == LayerKind::kLinear) continue;
    std::uint64_t tokens = options.context_tokens;
    if (layer.kind == LayerKind::kSliding) tokens = std::min(tokens, layer.window_tokens);
    // A model with an indexer never attends more than that has chosen.
    if (layer.kind == LayerKind::kMlaIndexed) {
      tokens = attended_tokens(layer, options);
      step.select += select_seconds(layer, options, rates, {});
    }
    const double bytes = static_cast<double>(options.sequences) * static_cast<double>(tokens) *
                         attended_bytes_per_token(layer, options);
    step.attend += bytes / rates.attention(bytes);
  }
  return step;
}

PrefixTime prefix_time(const ModelDescription& model, const BudgetOptions& options,
                       const MachineRates& rates, double weight_bytes, std::uint64_t tokens) {
  const auto count = static_cast<double>(tokens);
  double own = 0;
  double homes = 0;
  double products = 0;
  for (const LayerDescription& layer : model.layers) {
    own += layer_bytes_at(layer, types_of(options), options.gpus, tokens);
    homes += layer_bytes_at(layer, types_of(options), 1, tokens);
    double attended = count / 2;
    if (layer.kind == LayerKind::kLinear) attended = 0;
    if (layer.kind == LayerKind::kSliding) {
      attended = std::min(attended, static_cast<double>(layer.window_tokens));
    }
    if (layer.kind == LayerKind::kMlaIndexed) {
      attended = std::min(attended, static_cast<double>(layer.index_top_k));
    }
    products += count * attended * layer.query_heads * layer.pair_products;
  }
  PrefixTime time;
  time.from_host = own / rates.link_large;
  if (rates.disk_sequential)
    time.from_disk = std::max(time.from_host, homes / *rates.disk_sequential);
  if (!rates.gemm || !model.parameters) return time;
  const double operations = 2 * (count * model.parameters->active() + products);
  const double pass = weights_read(model, weight_bytes, count) / options.gpus / rates.device_read;
  time.recompute = std::max(pass, operations / (*rates.gemm * options.gpus));
  return time;
}

}  // namespace kvtier
