#include "tools/profile/budget_plan.h"

#include "tools/cli/parse.h"
#include "tools/profile/model_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace kvtier {

namespace {

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

std::string gib(double bytes) { return fmt::format("{:.2f} GiB", bytes / kGiB); }

void find_capacities(const BudgetInputs& inputs, const BudgetOptions& options, BudgetPlan& plan) {
  Capacities& found = plan.capacities;
  const MachineProfile* machine = inputs.machine ? &*inputs.machine : nullptr;
  if (machine != nullptr) {
    found.device = static_cast<double>(machine->gpu_memory_bytes);
    found.host = static_cast<double>(machine->host_memory_bytes);
    found.disk = static_cast<double>(machine->disk_free_bytes);
    if (machine->gpu.empty() && !options.device_memory) {
      // Both tiers are ordinary memory then, and neither may count it twice.
      found.device = found.host = found.host / 2;
      plan.assumptions.push_back(
          "no GPU in the profile: the device tier is ordinary memory, half of the host's unless "
          "--device-memory says otherwise");
    } else if (machine->gpu.empty()) {
      found.host = std::max(0.0, found.host - static_cast<double>(*options.device_memory));
    }
  }
  if (options.device_memory) found.device = static_cast<double>(*options.device_memory);
  if (options.host_memory) found.host = static_cast<double>(*options.host_memory);
  if (options.disk_space) found.disk = static_cast<double>(*options.disk_space);
  plan.capacities_known = found.device > 0;
  if (!plan.capacities_known) {
    plan.unanswered.push_back(
        "what fits, and how fast: give --machine, or --device-memory, --host-memory and "
        "--disk-space");
  }
}

Status find_weights(const BudgetInputs& inputs, const BudgetOptions& options, BudgetPlan& plan) {
  if (options.weight_bytes) {
    plan.weight_bytes = static_cast<double>(*options.weight_bytes);
    return {};
  }
  if (!inputs.model.parameters) {
    return unsupported(
        fmt::format("{}: the weights cannot be estimated from it; --weight-bytes takes their size",
                    options.model_path));
  }
  plan.weight_bytes = inputs.model.parameters->total * inputs.model.weight_bytes_per_parameter;
  plan.assumptions.push_back(
      fmt::format("weights: {:.3g} parameters by the config's shapes at {} bytes ({})",
                  inputs.model.parameters->total, inputs.model.weight_bytes_per_parameter,
                  inputs.model.weight_type));
  return {};
}

ReuseCurve reuse_of(const BudgetInputs& inputs, const BudgetOptions& options) {
  if (inputs.measured_reuse) return *inputs.measured_reuse;
  const auto attended = static_cast<double>(options.budget.tokens(options.context_tokens));
  return ReuseCurve::standard(attended / static_cast<double>(options.context_tokens),
                              options.reuse);
}

/// Milliseconds with these shares resident.
class StepClock {
 public:
  StepClock(const BudgetInputs& inputs, const BudgetOptions& options, const MachineRates& rates,
            double weight_bytes)
      : inputs_(inputs),
        options_(options),
        rates_(rates),
        reuse_(reuse_of(inputs, options)),
        weight_bytes_(weight_bytes) {}

  StepTime at(double device_share, double host_share) const {
    return selected_step(inputs_.model, options_, rates_, inputs_.selectors, reuse_, weight_bytes_,
                         device_share, host_share);
  }
  double ms(double device_share, double host_share) const {
    return at(device_share, host_share).total() * 1e3;
  }

 private:
  const BudgetInputs& inputs_;
  const BudgetOptions& options_;
  const MachineRates& rates_;
  ReuseCurve reuse_;
  double weight_bytes_;
};

void draw_curve(const BudgetOptions& options, const StepClock& clock, BudgetPlan& plan) {
  const auto sequences = static_cast<double>(options.sequences);
  const double device = sequences * plan.bytes.growing;
  const double homes = sequences * plan.bytes.home;
  if (device <= 0) return;
  for (const double on_device : {0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0}) {
    if (on_device < plan.bytes.held / plan.bytes.growing) continue;
    for (const double in_host : {0.25, 0.5, 1.0}) {
      plan.curve.push_back(
          {on_device, on_device * device, in_host, in_host * homes, clock.ms(on_device, in_host)});
    }
  }
}

void value_memory(const BudgetOptions& options, const StepClock& clock, BudgetPlan& plan) {
  const auto sequences = static_cast<double>(options.sequences);
  const double now = clock.ms(plan.fit.device_share, plan.fit.host_share);
  const double device = sequences * plan.bytes.growing;
  const double homes = sequences * plan.bytes.home;
  if (device <= 0) {
    plan.ms_per_device_gib = plan.ms_per_host_gib = 0;
    return;
  }
  const double more_device = std::min(1.0, plan.fit.device_share + kGiB / device);
  const double more_host = std::min(1.0, plan.fit.host_share + kGiB / homes);
  plan.ms_per_device_gib = now - clock.ms(more_device, plan.fit.host_share);
  plan.ms_per_host_gib = now - clock.ms(plan.fit.device_share, more_host);
}

/// The least number of tokens from which on `load` stays no slower than computing, by halving the
/// last interval of a doubling search in which that changes.
template <typename Load>
std::optional<std::uint64_t> first_faster(const BudgetOptions& options,
                                          const Load& load_is_faster) {
  const std::uint64_t most = options.context_tokens;
  if (!load_is_faster(most)) return std::nullopt;
  std::uint64_t high = most;
  while (high > options.block_tokens && load_is_faster(high / 2)) high /= 2;
  if (high <= options.block_tokens) return std::uint64_t{0};
  std::uint64_t low = high / 2;
  while (high - low > 1) {
    const std::uint64_t middle = low + (high - low) / 2;
    (load_is_faster(middle) ? high : low) = middle;
  }
  return high;
}

void answer_prefix(const BudgetInputs& inputs, const BudgetOptions& options,
                   const MachineRates& rates, BudgetPlan& plan) {
  plan.prefix_tokens = options.prefix_tokens > 0 ? options.prefix_tokens : options.context_tokens;
  const auto time = [&](std::uint64_t tokens) {
    return prefix_time(inputs.model, options, rates, plan.weight_bytes, tokens);
  };
  const PrefixTime asked = time(plan.prefix_tokens);
  plan.recompute_s = asked.recompute;
  if (!asked.recompute) {
    plan.unanswered.push_back(
        "break-even between loading and recomputing: " +
        (rates.gemm ? std::string("the config lacks what its parameters are estimated from")
                    : rates.no_gemm));
  }
  BreakEven host{std::nullopt, asked.from_host};
  if (asked.recompute) {
    host.tokens = first_faster(options, [&](std::uint64_t tokens) {
      const PrefixTime at = time(tokens);
      return at.from_host <= *at.recompute;
    });
  }
  plan.from_host = host;
  if (!asked.from_disk) {
    plan.unanswered.push_back("times of the disk: disk.random_read has no figure (" +
                              rates.no_disk + ")");
    return;
  }
  BreakEven disk{std::nullopt, *asked.from_disk};
  if (asked.recompute) {
    disk.tokens = first_faster(options, [&](std::uint64_t tokens) {
      const PrefixTime at = time(tokens);
      return *at.from_disk <= *at.recompute;
    });
  }
  plan.from_disk = disk;
}

void answer_wear(const BudgetOptions& options, BudgetPlan& plan) {
  DiskWear wear;
  if (options.tokens_per_day) {
    wear.tokens_per_day = static_cast<double>(*options.tokens_per_day);
  } else if (plan.step) {
    wear.assumed = true;
    wear.tokens_per_day = static_cast<double>(options.sequences) * 86400 / plan.step->total();
  } else {
    plan.unanswered.push_back("disk wear: give --tokens-per-day");
    return;
  }
  wear.bytes_per_day = wear.tokens_per_day * plan.bytes.home_per_token;
  if (plan.capacities.disk > 0) {
    wear.drive_writes_per_day = wear.bytes_per_day / plan.capacities.disk;
  }
  plan.wear = wear;
}

void judge(const BudgetOptions& options, BudgetPlan& plan) {
  if (!plan.capacities_known) return;
  const MemoryFit& fit = plan.fit;
  const auto sequences = static_cast<double>(options.sequences);
  plan.requirements.push_back({"weights", fit.weights_fit,
                               fmt::format("{} of weights on each GPU, {} usable", gib(fit.weights),
                                           gib(fit.device_usable))});
  if (fit.weights_fit) {
    plan.requirements.push_back(
        {"device", fit.device_fits,
         fmt::format("{} for windows, states and metadata, and at least {} of slots; {} beside the "
                     "weights",
                     gib(sequences * plan.bytes.pinned()), gib(sequences * plan.bytes.held),
                     gib(fit.device_usable - fit.weights))});
    plan.requirements.push_back(
        {"homes", fit.homes_fit,
         fmt::format("{} of KV; {} in host memory and {} on disk", gib(sequences * plan.bytes.home),
                     gib(fit.host_usable), gib(plan.capacities.disk))});
  }
  if (!options.target_ms) return;
  const bool fast = plan.step && fit.fits() && plan.ms() <= *options.target_ms;
  plan.requirements.push_back(
      {"target", fast,
       fit.fits()
           ? fmt::format("{:.3g} ms per token, at most {:g} asked", plan.ms(), *options.target_ms)
           : fmt::format("{:g} ms per token asked of what does not fit", *options.target_ms)});
}

void state_assumptions(const BudgetInputs& inputs, const BudgetOptions& options, BudgetPlan& plan) {
  auto& lines = plan.assumptions;
  lines.insert(lines.end(), inputs.model.assumptions.begin(), inputs.model.assumptions.end());
  lines.push_back(
      fmt::format("KV in {}, {:g} bytes per element; scales of quantised types, block "
                  "checksums and tails that are not full are not counted",
                  options.kv_type.name, options.kv_type.bytes));
  lines.push_back(fmt::format("{:g}% of device and host memory is left to everything else",
                              100 * options.reserve.fraction()));
  if (options.gpus > 1) {
    lines.push_back(
        "KV heads are divided among GPUs, rounded up; MLA's vector and an indexer's keys are whole "
        "on each; host and disk keep one copy; each GPU has its own link, and talking to others "
        "takes no time");
  }
  lines.push_back("reuse: " + reuse_of(inputs, options).described());
  lines.push_back(
      fmt::format("blocks of {} tokens, extents of {}; a block missed in host memory "
                  "reads an extent of its own, without look-ahead",
                  options.block_tokens, format_bytes(options.extent_bytes)));
  if (inputs.model.max_positions && *inputs.model.max_positions < options.context_tokens) {
    lines.push_back(fmt::format("WARNING: the model was made for {} positions, not for {}",
                                *inputs.model.max_positions, options.context_tokens));
  }
}

}  // namespace

bool BudgetPlan::passed() const {
  return std::ranges::all_of(requirements, [](const Requirement& each) { return each.passed; });
}

Result<BudgetInputs> read_budget_inputs(const BudgetOptions& options) {
  BudgetInputs inputs;
  KVTIER_ASSIGN_OR_RETURN(inputs.model, read_model_config(options.model_path, options.read_as));
  if (!options.machine_path.empty()) {
    KVTIER_ASSIGN_OR_RETURN(inputs.machine, MachineProfile::read(options.machine_path));
  }
  for (const LayerDescription& layer : inputs.model.layers) {
    if (!layer.grows() || layer.kind == LayerKind::kMlaIndexed) continue;
    const auto dims = std::pair(layer.key_dim, layer.value_dim);
    if (inputs.selectors.contains(dims)) continue;
    KVTIER_ASSIGN_OR_RETURN(inputs.selectors[dims],
                            measure_selector_bytes(options.selector, layer.key_dim, layer.value_dim,
                                                   options.block_tokens));
  }
  if (!options.trace_path.empty()) {
    Progress progress;
    KVTIER_ASSIGN_OR_RETURN(inputs.measured_reuse,
                            ReuseCurve::from_trace(options.trace_path, options.selector,
                                                   options.budget, options.block_tokens, progress));
  }
  return inputs;
}

Result<BudgetPlan> plan_budget(const BudgetInputs& inputs, const BudgetOptions& options) {
  BudgetPlan plan;
  plan.bytes = sequence_bytes(inputs.model, options, inputs.selectors);
  KVTIER_RETURN_IF_ERROR(find_weights(inputs, options, plan));
  find_capacities(inputs, options, plan);
  state_assumptions(inputs, options, plan);
  if (plan.capacities_known) {
    plan.fit = fit_memory(plan.bytes, plan.weight_bytes, plan.capacities, options);
  }
  if (inputs.machine) {
    KVTIER_ASSIGN_OR_RETURN(const MachineRates rates, MachineRates::of(*inputs.machine, options));
    plan.assumptions.insert(plan.assumptions.end(), rates.assumptions.begin(),
                            rates.assumptions.end());
    const StepClock clock(inputs, options, rates, plan.weight_bytes);
    plan.full = full_step(inputs.model, options, rates, plan.weight_bytes);
    if (plan.capacities_known && plan.fit.fits()) {
      // Where all of it is resident nothing has to be chosen, and the faster of the two is taken.
      plan.step = clock.at(plan.fit.device_share, plan.fit.host_share);
      if (plan.fit.device_share >= 1 && plan.full->total() < plan.step->total()) {
        plan.step = plan.full;
      }
      value_memory(options, clock, plan);
    } else if (plan.capacities_known) {
      plan.unanswered.push_back("the time of a step, and what memory is worth: it does not fit");
    }
    draw_curve(options, clock, plan);
    answer_prefix(inputs, options, rates, plan);
  } else {
    plan.unanswered.push_back("times: give --machine");
  }
  answer_wear(options, plan);
  judge(options, plan);
  return plan;
}

}  // namespace kvtier
