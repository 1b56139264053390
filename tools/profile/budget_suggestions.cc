#include "tools/profile/budget_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace kvtier {

namespace {

std::string in_words(const BudgetPlan& plan) {
  if (!plan.step) return plan.passed() ? "fits" : "does not fit";
  return fmt::format("{}: {:.3g} ms per token", plan.passed() ? "PASS" : "FAIL", plan.ms());
}

/// The answer to a changed question; none where it cannot be given.
class Asker {
 public:
  explicit Asker(const BudgetInputs& inputs) : inputs_(inputs) {}

  bool passes(const BudgetOptions& changed) const {
    const auto plan = plan_budget(inputs_, changed);
    return plan.ok() && plan->passed();
  }

  /// Adds the question where it passes.
  bool offer(const BudgetOptions& changed, const std::string& what,
             std::vector<Suggestion>& suggestions) const {
    const auto plan = plan_budget(inputs_, changed);
    if (!plan.ok() || !plan->passed()) return false;
    suggestions.push_back({budget_command(changed), what + ": " + in_words(*plan)});
    return true;
  }

  /// The largest value up to `most` with which the question passes, given that `low` does. Whether
  /// a question passes falls once with sequences and with context.
  template <typename Change>
  std::uint64_t largest(std::uint64_t low, std::uint64_t most, const Change& change) const {
    std::uint64_t high = low;
    while (high < most) {
      high = std::min(most, 2 * high);
      if (!passes(change(high))) break;
      low = high;
    }
    while (high - low > 1) {
      const std::uint64_t middle = low + (high - low) / 2;
      (passes(change(middle)) ? low : high) = middle;
    }
    return low;
  }

 private:
  const BudgetInputs& inputs_;
};

BudgetOptions with_sequences(BudgetOptions options, std::uint64_t sequences) {
  options.sequences = sequences;
  return options;
}

void suggest_less(const Asker& asker, const BudgetOptions& options,
                  std::vector<Suggestion>& suggestions) {
  BudgetOptions changed = options;
  for (const char* type : {"fp8", "int4"}) {
    changed.kv_type = KvType::parse(type).value();
    if (changed.kv_type.bytes >= options.kv_type.bytes) continue;
    if (asker.offer(changed, fmt::format("KV in {}", type), suggestions)) break;
  }
  changed = options;
  const std::uint64_t budget = options.budget.tokens(options.context_tokens);
  for (const std::uint64_t tokens : {budget / 2, budget / 4}) {
    if (tokens < 128) break;
    changed.budget = Budget::parse(fmt::format("{}", tokens)).value();
    if (asker.offer(changed, fmt::format("{} tokens attended", tokens), suggestions)) break;
  }
  changed = options;
  for (std::uint32_t gpus = 2 * options.gpus; gpus <= 16 * options.gpus && gpus <= 1024;
       gpus *= 2) {
    changed.gpus = gpus;
    if (asker.offer(changed, fmt::format("{} GPUs", gpus), suggestions)) break;
  }
  changed = with_sequences(options, 1);
  if (options.sequences > 1 && asker.passes(changed)) {
    const auto most = asker.largest(1, options.sequences, [&](std::uint64_t sequences) {
      return with_sequences(options, sequences);
    });
    asker.offer(with_sequences(options, most), fmt::format("{} sequences", most), suggestions);
  }
}

void suggest_memory(const Asker& asker, const BudgetOptions& options, const BudgetPlan& plan,
                    std::vector<Suggestion>& suggestions) {
  BudgetOptions changed = options;
  const std::uint64_t gib = std::uint64_t{1} << 30;
  for (std::uint64_t more = 16; more <= 4096; more *= 2) {
    changed.host_memory = (static_cast<std::uint64_t>(plan.capacities.host) / gib + more) * gib;
    if (asker.offer(changed, fmt::format("{} GiB more of host memory", more), suggestions)) return;
  }
}

void suggest_more(const Asker& asker, const ModelDescription& model, const BudgetOptions& options,
                  std::vector<Suggestion>& suggestions) {
  const auto sequences = asker.largest(options.sequences, std::uint64_t{1} << 20,
                                       [&](auto value) { return with_sequences(options, value); });
  if (sequences > options.sequences) {
    asker.offer(with_sequences(options, sequences), "as many sequences as pass", suggestions);
  }
  const auto with_context = [&](std::uint64_t tokens) {
    BudgetOptions changed = options;
    changed.context_tokens = tokens;
    return changed;
  };
  const std::uint64_t most =
      std::max(options.context_tokens, model.max_positions.value_or(std::uint64_t{1} << 26));
  const auto context = asker.largest(options.context_tokens, most, with_context);
  if (context > options.context_tokens) {
    asker.offer(with_context(context), "as long a context as passes", suggestions);
  }
}

}  // namespace

std::vector<Suggestion> suggest(const BudgetInputs& inputs, const BudgetOptions& options,
                                const BudgetPlan& plan) {
  std::vector<Suggestion> suggestions;
  const Asker asker(inputs);
  if (!inputs.machine) {
    suggestions.push_back({"kvtier profile machine --output machine.json",
                           "measures this machine; then add --machine machine.json"});
  }
  if (plan.capacities_known && !plan.passed()) {
    suggest_less(asker, options, suggestions);
    suggest_memory(asker, options, plan, suggestions);
  } else if (plan.capacities_known) {
    suggest_more(asker, inputs.model, options, suggestions);
  }
  if (!options.trace_path.empty() && plan.fit.device_share > 0 && plan.fit.device_share < 1) {
    suggestions.push_back(
        {fmt::format("kvtier replay {} --selector {} --budget {} --device-capacity {:.1f}%",
                     shell_word(options.trace_path), shell_word(options.selector),
                     options.budget.text(), 100 * plan.fit.device_share),
         "the same share of the device, live, with recall and output error"});
  }
  return suggestions;
}

}  // namespace kvtier
