#include "selectors/decorated.h"
#include "selectors/families.h"
#include "selectors/rank_blocks.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace kvtier {
namespace {

enum class Rule : unsigned char { kTopP, kZipVl, kEntropy };

struct AdaptiveOptions {
  Rule rule = Rule::kTopP;
  double p = 0.95;
  /// Whether what one part does not need may go to another: between the head groups of a layer
  /// (top-p), or between layers (entropy). A group may then be answered with more than the
  /// request's budget, which is for callers whose budget is a total.
  bool pool_layer = false;
};

/// Chooses less than the budget where less will do:
///
/// - `top-p` (Twilight, 2502.02770): per head group the smallest set whose estimated mass reaches
///   the share `p` of the far mass. Twilight counts all tokens; here sinks and window are attended
///   anyway, so p is a share of what lies between them.
/// - `zipvl` (ZipVL, 2410.08584 [A]): the same number of tokens for all head groups of the layer,
///   the fewest whose mean share of mass reaches `p`.
/// - `entropy` (ActQKV, 2502.13542 [C]): the layer's part of the budget of all layers, in
/// proportion
///   to the entropy of its scores over the logarithm of their number. Layers tell their entropy by
///   `demand`, and the caller hands all of them to the next step as `layer_demands`. As in the
///   paper's code a layer gets at least 32/46 and at most twice the plain budget. The paper
///   averages 100 steps' entropies and deals layer by layer; here the last step's count and all
///   layers at once, so that nothing has to be remembered or undone.
///
/// The first two need an inner selector whose scores estimate mass, the third one such or one that
/// has a demand of its own; without, the whole budget is used.
///
/// `pool=head` (default) never chooses more for a group than the request allows. `pool=layer` lets
/// top-p hand what some groups leave to groups that want more, in proportion to what they lack,
/// within groups x budget; and entropy give a layer more than its even part.
class AdaptiveBudget final : public Decorated {
 public:
  AdaptiveBudget(const SelectorShape& shape, std::unique_ptr<Selector> inner,
                 AdaptiveOptions options)
      : Decorated(shape, std::move(inner)), options_(options), limits_(shape.head_groups()) {}

  Status select(const SelectRequest& request, std::span<GroupSelection> selection,
                WorkerPool& pool) override {
    KVTIER_RETURN_IF_ERROR(check_request(shape(), request));
    KVTIER_RETURN_IF_ERROR(inner().select(longer(request), selection, pool));
    if (options_.rule == Rule::kEntropy) demand_ = entropy_of(request, selection);
    adapt(request, selection);
    return {};
  }
  Status hint(const SelectRequest& request, std::span<GroupSelection> selection,
              WorkerPool& pool) override {
    KVTIER_RETURN_IF_ERROR(check_request(shape(), request));
    KVTIER_RETURN_IF_ERROR(inner().hint(longer(request), selection, pool));
    adapt(request, selection);
    return {};
  }

  float demand() const override {
    const float own = inner().demand();
    return std::isfinite(own) ? own : demand_;
  }

  std::unique_ptr<Selector> fork() const override {
    return std::make_unique<AdaptiveBudget>(*this);
  }
  void save(StateWriter& writer) const override {
    Decorated::save(writer);
    writer.put(demand_);
  }
  Status restore(StateReader& reader) override {
    KVTIER_RETURN_IF_ERROR(Decorated::restore(reader));
    return reader.get(demand_);
  }

 private:
  SelectRequest longer(const SelectRequest& request) const;
  void adapt(const SelectRequest& request, std::span<GroupSelection> selection);
  void top_p(std::uint64_t budget, std::span<const GroupSelection> selection);
  void zipvl(std::uint32_t budget, std::span<const GroupSelection> selection);
  std::uint64_t layer_budget(const SelectRequest& request, std::uint32_t budget) const;
  float entropy_of(const SelectRequest& request, std::span<const GroupSelection> selection) const;

  AdaptiveOptions options_;
  std::vector<std::uint32_t> limits_;  ///< Far tokens per head group in this step.
  float demand_ = std::numeric_limits<float>::quiet_NaN();
};

/// ActQKV's clamp around its 46 blocks per layer.
constexpr double kLeastPart = 32.0 / 46.0;
constexpr double kMostPart = 2.0;

std::uint32_t at_most_u32(std::uint64_t value) {
  return static_cast<std::uint32_t>(
      std::min<std::uint64_t>(value, std::numeric_limits<std::uint32_t>::max()));
}

/// Tokens of the shortest beginning of the ranking that holds `share` of the mass; all of it when
/// none does. A selector without mass has no such beginning: everything.
std::uint32_t tokens_for_share(const GroupSelection& group, double share) {
  std::uint64_t tokens = 0;
  double mass = 0.0;
  const double wanted = share * double{group.mass};
  for (const SelectedUnit& unit : group.ranked) {
    if (group.mass > 0.0f && mass >= wanted) break;
    mass += double{unit.score};
    tokens += unit.tokens;
  }
  return at_most_u32(tokens);
}

/// Share of the mass in the units that fit into `tokens`.
double share_within(const GroupSelection& group, std::uint32_t tokens) {
  std::uint64_t taken = 0;
  double mass = 0.0;
  for (const SelectedUnit& unit : group.ranked) {
    taken += unit.tokens;
    if (taken > tokens) break;
    mass += double{unit.score};
  }
  return mass / double{group.mass};
}

/// The inner selector is asked for as long a ranking as could be chosen of.
SelectRequest AdaptiveBudget::longer(const SelectRequest& request) const {
  if (!options_.pool_layer) return request;
  SelectRequest more = request;
  const std::uint64_t others = options_.rule == Rule::kTopP ? shape().head_groups() - 1 : 1;
  more.band_tokens = at_most_u32(std::uint64_t{request.band_tokens} +
                                 others * far_budget_tokens(shape(), request));
  return more;
}

void AdaptiveBudget::adapt(const SelectRequest& request, std::span<GroupSelection> selection) {
  const std::uint32_t budget = far_budget_tokens(shape(), request);
  std::ranges::fill(limits_, budget);
  switch (options_.rule) {
    case Rule::kTopP: top_p(budget, selection); break;
    case Rule::kZipVl: zipvl(budget, selection); break;
    case Rule::kEntropy:
      std::ranges::fill(limits_, at_most_u32(layer_budget(request, budget)));
      break;
  }
  for (std::size_t i = 0; i < selection.size(); ++i) {
    shorten_selection(limits_[i], request.band_tokens, selection[i]);
  }
}

void AdaptiveBudget::top_p(std::uint64_t budget, std::span<const GroupSelection> selection) {
  std::uint64_t spare = 0;
  std::uint64_t lacking = 0;
  for (std::size_t i = 0; i < selection.size(); ++i) {
    const std::uint64_t wanted = tokens_for_share(selection[i], options_.p);
    limits_[i] = at_most_u32(wanted);
    (wanted < budget ? spare : lacking) += wanted < budget ? budget - wanted : wanted - budget;
  }
  for (std::uint32_t& limit : limits_) {
    if (limit <= budget) continue;
    const std::uint64_t lacks = limit - budget;
    const std::uint64_t more =
        options_.pool_layer ? std::min(lacks, spare * lacks / lacking) : std::uint64_t{0};
    limit = at_most_u32(budget + more);
  }
}

void AdaptiveBudget::zipvl(std::uint32_t budget, std::span<const GroupSelection> selection) {
  const auto groups_with_mass =
      std::ranges::count_if(selection, [](const GroupSelection& g) { return g.mass > 0.0f; });
  if (groups_with_mass == 0) return;
  const double wanted = options_.p * static_cast<double>(groups_with_mass);
  const auto reaches = [&](std::uint32_t tokens) {
    double share = 0.0;
    for (const GroupSelection& group : selection) {
      if (group.mass > 0.0f) share += share_within(group, tokens);
    }
    return share >= wanted;
  };
  // The share only grows with the tokens: the fewest are found by halving.
  std::uint32_t least = 0;
  std::uint32_t most = budget;
  while (least < most) {
    const std::uint32_t middle = least + (most - least) / 2;
    if (reaches(middle)) {
      most = middle;
    } else {
      least = middle + 1;
    }
  }
  std::ranges::fill(limits_, most);
}

std::uint64_t AdaptiveBudget::layer_budget(const SelectRequest& request,
                                           std::uint32_t budget) const {
  double total = 0.0;
  for (float demand : request.layer_demands) total += double{demand};
  if (request.layer >= request.layer_demands.size() || !(total > 0.0) || !std::isfinite(total)) {
    return budget;
  }
  const double part = double{request.layer_demands[request.layer]} *
                      static_cast<double>(request.layer_demands.size()) / total;
  const double most = options_.pool_layer ? kMostPart : 1.0;
  return static_cast<std::uint64_t>(
      std::llround(std::clamp(part, kLeastPart, most) * static_cast<double>(budget)));
}

/// Entropy of the scores over the logarithm of their number, mean over the groups: 0 when one unit
/// has all the mass, 1 when it lies evenly. The mass of what is not ranked is taken to lie evenly
/// over as many units of a block, which is the most it can be.
float AdaptiveBudget::entropy_of(const SelectRequest& request,
                                 std::span<const GroupSelection> selection) const {
  const FarRegion region = FarRegion::of(shape(), request.first_position);
  double sum = 0.0;
  std::size_t counted = 0;
  for (const GroupSelection& group : selection) {
    if (!(group.mass > 0.0f)) continue;
    double entropy = 0.0;
    double rest = 1.0;
    std::uint64_t tokens = 0;
    for (const SelectedUnit& unit : group.ranked) {
      const double part = double{unit.score} / double{group.mass};
      if (part > 0.0) entropy -= part * std::log(part);
      rest -= part;
      tokens += unit.tokens;
    }
    const double others = std::ceil(static_cast<double>(region.tokens() - tokens) /
                                    static_cast<double>(shape().tokens_per_block));
    if (rest > 0.0 && others >= 1.0) entropy -= rest * std::log(rest / others);
    const double units = static_cast<double>(group.ranked.size()) + others;
    if (units < 2.0) continue;
    sum += entropy / std::log(units);
    ++counted;
  }
  return counted == 0 ? std::numeric_limits<float>::quiet_NaN()
                      : static_cast<float>(sum / static_cast<double>(counted));
}

Status make_adaptive_budget(const SelectorRecipe& recipe, SelectorFactory& factory) {
  static constexpr std::string_view kRules[] = {"top-p", "zipvl", "entropy"};
  static constexpr std::string_view kPools[] = {"head", "layer"};
  AdaptiveOptions options;
  KVTIER_ASSIGN_OR_RETURN(const std::size_t rule,
                          recipe.parameters.choice("rule", "top-p", kRules));
  options.rule = static_cast<Rule>(rule);
  KVTIER_ASSIGN_OR_RETURN(options.p, recipe.parameters.fraction("p", options.p));
  KVTIER_ASSIGN_OR_RETURN(const std::size_t pool, recipe.parameters.choice("pool", "head", kPools));
  options.pool_layer = pool == 1;
  if (options.rule == Rule::kZipVl && options.pool_layer) {
    return invalid_argument(
        "selector 'adaptive-budget': pool=layer: rule=zipvl gives all head groups the same, so "
        "there is nothing to hand on");
  }
  factory.make = [options, inner = *recipe.inner](
                     const SelectorShape& shape,
                     LayerIndex layer) -> Result<std::unique_ptr<Selector>> {
    KVTIER_ASSIGN_OR_RETURN(std::unique_ptr<Selector> selector, inner(shape, layer));
    return Result<std::unique_ptr<Selector>>(
        std::make_unique<AdaptiveBudget>(shape, std::move(selector), options));
  };
  return {};
}

}  // namespace

const SelectorFamily& adaptive_budget_family() {
  static constexpr std::string_view kParameters[] = {"rule", "p", "pool"};
  static const SelectorFamily kFamily = {
      .name = "adaptive-budget",
      .summary = "less than the budget where less will do: top-p, ZipVL's or ActQKV's rule",
      .source = "Twilight, 2502.02770; ZipVL, 2410.08584; ActQKV, 2502.13542",
      .parameters = kParameters,
      .decorates = true,
      .metadata = "the inner selector's",
      .build_cost = "the inner selector's",
      .step_cost = "the inner selector's, and O(units)",
      .make = make_adaptive_budget};
  return kFamily;
}

}  // namespace kvtier
