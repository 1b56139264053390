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

struct RefreshOptions {
  /// Tokens from one refresh to the next. The paper's number could not be obtained; 4 is argued:
  /// selections of neighbouring steps overlap by 60 to 94 % (RetroInfer's and ArkVale's hit
  /// ratios).
  std::uint32_t interval = 4;
  /// A refresh comes early when the step's queries are less like the last refresh's than this
  /// cosine; 0 is off. TokenSelect reuses at 0.9 and above.
  double similarity = 0.0;
};

/// Asks the inner selector every `interval` tokens, or when the queries turn away, and answers with
/// the last set in between (Recycled Attention, 2411.05787 [A], where the set is the largest
/// weights of a step of full attention; here it is whatever the inner selector finds).
///
/// The interval counts positions and not calls, so that it is a function of the context and a
/// rejected draft leaves no trace in it. A refresh is also due when what is kept does not fill the
/// budget to within a block: after the budget was raised, or the context cut. Between refreshes the
/// kept ranking is cut to the step's region and budget; tokens that have left the window since are
/// not in it (the paper attends the new ones too: they are the window here).
///
/// Scores, mass and demand stay those of the last refresh. The rest is not estimated unless every
/// step is a refresh: the inner selector was not asked about the queries in between, and an
/// estimate with other queries would be wrong in silence.
///
/// Remembers the refreshes of at least the last 8 tokens. A cut forgets the refreshes that asked
/// for tokens behind it, wholly or in part, and the next step goes on from the one before.
class Refresh final : public Decorated {
 public:
  Refresh(const SelectorShape& shape, std::unique_ptr<Selector> inner, RefreshOptions options,
          bool partial_blocks)
      : Decorated(shape, std::move(inner)), options_(options), partial_blocks_(partial_blocks) {
    if (always()) return;
    const std::uint32_t back =
        similarity_matters() ? 8 : (8 + options.interval - 1) / options.interval;
    // One more to go back to, and one to be filled.
    kept_.resize(back + 2);
    for (Kept& kept : kept_) {
      kept.groups.resize(shape.head_groups());
      kept.full.resize(shape.head_groups());
      if (similarity_matters()) kept.query.resize(query_elements());
    }
    query_.resize(similarity_matters() ? query_elements() : 0);
  }

  void truncate(std::uint32_t position) override {
    Decorated::truncate(position);
    while (live_ > 0 && kept_[live_ - 1].end > position) --live_;
  }

  Status select(const SelectRequest& request, std::span<GroupSelection> selection,
                WorkerPool& pool) override;
  Status hint(const SelectRequest& request, std::span<GroupSelection> selection,
              WorkerPool& pool) override {
    if (always()) return inner().hint(request, selection, pool);
    KVTIER_RETURN_IF_ERROR(check_request(shape(), request));
    if (reuse(request, selection)) return {};
    return inner().hint(request, selection, pool);
  }

  bool estimates_rest() const override { return always() && inner().estimates_rest(); }
  Status estimate_rest(const SelectRequest& request, std::span<const GroupSelection> selection,
                       StatesView target, WorkerPool& pool) override {
    if (!always()) return Selector::estimate_rest(request, selection, target, pool);
    return inner().estimate_rest(request, selection, target, pool);
  }

  std::unique_ptr<Selector> fork() const override { return std::make_unique<Refresh>(*this); }
  void save(StateWriter& writer) const override;
  Status restore(StateReader& reader) override;
  /// Without the kept rankings: they are answers, as large as those that the caller holds.
  std::size_t metadata_bytes() const override {
    return Decorated::metadata_bytes() + kept_.size() * query_.size() * sizeof(float);
  }

 private:
  /// A refresh: what was asked, and the answer. `full` says which groups used their budget; the
  /// others chose less by their own will.
  struct Kept {
    std::uint32_t position = 0;  ///< Of the first query.
    std::uint32_t end = 0;       ///< Behind the last query.
    std::vector<GroupSelection> groups;
    std::vector<std::uint8_t> full;
    std::vector<float> query;  ///< Mean of the step's queries; empty when nobody compares it.
  };

  bool similarity_matters() const { return options_.similarity > 0.0 && options_.interval > 1; }
  bool always() const { return options_.interval == 1; }
  std::size_t query_elements() const {
    return std::size_t{shape().query_heads()} * shape().head_dim;
  }
  bool reuse(const SelectRequest& request, std::span<GroupSelection> selection);
  bool alike(const SelectRequest& request, const Kept& kept);
  void mean_query(const SelectRequest& request, std::span<float> target) const;
  void keep(const SelectRequest& request, Kept& kept);
  bool answer(const Kept& kept, const SelectRequest& request,
              std::span<GroupSelection> selection) const;
  Status restore_group(StateReader& reader, GroupSelection& group) const;

  RefreshOptions options_;
  bool partial_blocks_;
  /// [0, live_) in order of position; the rest is room, so that a step allocates nothing.
  std::vector<Kept> kept_;
  std::size_t live_ = 0;
  std::vector<float> query_;  ///< Scratch.
};

std::uint32_t chosen_tokens_of(const GroupSelection& group) {
  std::uint32_t tokens = 0;
  for (std::uint32_t i = 0; i < group.chosen; ++i) tokens += group.ranked[i].tokens;
  return tokens;
}

Status Refresh::select(const SelectRequest& request, std::span<GroupSelection> selection,
                       WorkerPool& pool) {
  if (always()) return inner().select(request, selection, pool);
  KVTIER_RETURN_IF_ERROR(check_request(shape(), request));
  if (reuse(request, selection)) return {};
  if (live_ == kept_.size() - 1) {
    std::rotate(kept_.begin(), kept_.begin() + 1, kept_.end());
    --live_;
  }
  // A little more than was asked for: while the region grows, its last block does, and then the
  // worst of the chosen must make room without leaving a block of the budget unused.
  SelectRequest more = request;
  const std::uint32_t slack = 2 * shape().tokens_per_block;
  more.band_tokens += std::min(slack, std::numeric_limits<std::uint32_t>::max() - more.band_tokens);
  Kept& kept = kept_[live_];
  KVTIER_RETURN_IF_ERROR(inner().select(more, kept.groups, pool));
  keep(request, kept);
  ++live_;
  answer(kept_[live_ - 1], request, selection);
  return {};
}

/// Takes down what a refresh asked; later refreshes are of an abandoned future when it went back.
void Refresh::keep(const SelectRequest& request, Kept& kept) {
  const std::uint32_t budget = far_budget_tokens(shape(), request);
  kept.position = request.first_position;
  kept.end = request.first_position + request.query_count;
  if (similarity_matters()) mean_query(request, kept.query);
  for (std::size_t i = 0; i < kept.groups.size(); ++i) {
    kept.full[i] = static_cast<std::uint8_t>(
        chosen_tokens_of(kept.groups[i]) + shape().tokens_per_block > budget);
    for (Kept& other : kept_) {
      other.groups[i].ranked.reserve(kept.groups[i].ranked.capacity());
    }
  }
  const auto stale = std::find_if(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(live_),
                                  [&](const Kept& k) { return k.position >= kept.position; });
  const auto place = static_cast<std::size_t>(stale - kept_.begin());
  if (place < live_) {
    std::swap(kept_[place], kept_[live_]);
    live_ = place;
  }
}

/// Answers from the last refresh if that is allowed and enough.
bool Refresh::reuse(const SelectRequest& request, std::span<GroupSelection> selection) {
  if (live_ == 0) return false;
  const Kept& last = kept_[live_ - 1];
  if (request.first_position < last.position ||
      request.first_position - last.position >= options_.interval) {
    return false;
  }
  return alike(request, last) && answer(last, request, selection);
}

bool Refresh::alike(const SelectRequest& request, const Kept& kept) {
  if (!similarity_matters()) return true;
  mean_query(request, query_);
  double ab = 0.0;
  double aa = 0.0;
  double bb = 0.0;
  for (std::size_t i = 0; i < query_.size(); ++i) {
    ab += double{query_[i]} * double{kept.query[i]};
    aa += double{query_[i]} * double{query_[i]};
    bb += double{kept.query[i]} * double{kept.query[i]};
  }
  return ab >= options_.similarity * std::sqrt(aa) * std::sqrt(bb);
}

void Refresh::mean_query(const SelectRequest& request, std::span<float> target) const {
  std::ranges::fill(target, 0.0f);
  const float share = 1.0f / static_cast<float>(request.query_count);
  for (std::uint32_t q = 0; q < request.query_count; ++q) {
    const float* query = request.queries + q * request.query_stride;
    for (std::size_t i = 0; i < target.size(); ++i) target[i] += share * query[i];
  }
}

/// The kept ranking, cut to the region and the budget. False when it is not enough.
bool Refresh::answer(const Kept& kept, const SelectRequest& request,
                     std::span<GroupSelection> selection) const {
  const FarRegion region = FarRegion::of(shape(), request.first_position);
  const std::uint32_t budget = far_budget_tokens(shape(), request);
  const std::uint32_t per_block = shape().tokens_per_block;
  bool enough = true;
  for (std::size_t i = 0; i < selection.size(); ++i) {
    GroupSelection& group = selection[i];
    const GroupSelection& from = kept.groups[i];
    group.ranked.reserve(from.ranked.capacity());
    group.ranked.assign(from.ranked.begin(), from.ranked.end());
    group.held = from.held;
    group.mass = from.mass;
    if (!partial_blocks_) {
      // The block that the region's end cuts has grown with it.
      for (SelectedUnit& unit : group.ranked) {
        const std::uint32_t start = unit.block.value * per_block + unit.first_token;
        const std::uint32_t next = (unit.block.value + 1) * per_block;
        unit.tokens = std::min(next, region.end) - start;
      }
    }
    std::uint32_t most = budget;
    if (kept.full[i] == 0) {
      group.chosen = from.chosen;
      most = std::min(most, chosen_tokens_of(group));
    }
    const std::uint32_t taken = shorten_selection(most, request.band_tokens, group);
    // `budget` is at most what the region holds; then nothing may be missing.
    const bool everything = budget == region.tokens();
    if (kept.full[i] != 0 && taken + (everything ? 1 : per_block) <= budget) enough = false;
  }
  return enough;
}

void Refresh::save(StateWriter& writer) const {
  Decorated::save(writer);
  writer.put(static_cast<std::uint32_t>(live_));
  for (std::size_t k = 0; k < live_; ++k) {
    const Kept& kept = kept_[k];
    writer.put(kept.position);
    writer.put(kept.end);
    writer.put_array(std::span(kept.full));
    writer.put_array(std::span(kept.query));
    for (const GroupSelection& group : kept.groups) {
      writer.put(group.chosen);
      writer.put(group.held);
      writer.put(group.mass);
      writer.put_array(std::span(group.ranked));
    }
  }
}

Status Refresh::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(Decorated::restore(reader));
  std::uint32_t live = 0;
  KVTIER_RETURN_IF_ERROR(reader.get(live));
  if (live > 0 && live >= kept_.size()) {
    return corrupt(fmt::format("selector state: found {} refreshes, expected less than {}", live,
                               kept_.size()));
  }
  std::uint32_t before = 0;
  for (std::uint32_t k = 0; k < live; ++k) {
    Kept& kept = kept_[k];
    KVTIER_RETURN_IF_ERROR(reader.get(kept.position));
    KVTIER_RETURN_IF_ERROR(reader.get(kept.end));
    if (kept.end <= kept.position || kept.end > shape().tokens_max || kept.position < before) {
      return corrupt(fmt::format("selector state: found a refresh at [{}, {}) behind {}",
                                 kept.position, kept.end, before));
    }
    before = kept.position;
    KVTIER_RETURN_IF_ERROR(reader.get_exactly(std::span(kept.full)));
    KVTIER_RETURN_IF_ERROR(reader.get_exactly(std::span(kept.query)));
    for (GroupSelection& group : kept.groups) {
      KVTIER_RETURN_IF_ERROR(restore_group(reader, group));
      // What was far is judged by the position that was asked about.
      const FarRegion region = FarRegion::of(shape(), kept.position);
      for (const SelectedUnit& unit : group.ranked) {
        const std::uint64_t begin =
            std::uint64_t{unit.block.value} * shape().tokens_per_block + unit.first_token;
        if (unit.tokens == 0 || begin < region.begin || begin + unit.tokens > region.end ||
            std::uint64_t{unit.first_token} + unit.tokens > shape().tokens_per_block) {
          return corrupt(fmt::format("selector state: found tokens [{}, {}) kept of [{}, {})",
                                     begin, begin + unit.tokens, region.begin, region.end));
        }
      }
    }
  }
  live_ = live;
  return {};
}

Status Refresh::restore_group(StateReader& reader, GroupSelection& group) const {
  KVTIER_RETURN_IF_ERROR(reader.get(group.chosen));
  KVTIER_RETURN_IF_ERROR(reader.get(group.held));
  KVTIER_RETURN_IF_ERROR(reader.get(group.mass));
  KVTIER_RETURN_IF_ERROR(reader.get_vector(group.ranked, shape().tokens_max));
  if (group.held <= group.chosen && group.chosen <= group.ranked.size()) return {};
  return corrupt(fmt::format("selector state: found {} held of {} chosen of {} units", group.held,
                             group.chosen, group.ranked.size()));
}

}  // namespace

const SelectorFamily& refresh_family() {
  static constexpr std::string_view kParameters[] = {"interval", "similarity"};
  static const SelectorFamily kFamily = {
      .name = "refresh",
      .summary = "selects every `interval` tokens, or when queries turn away; reuses in between",
      .source = "Recycled Attention, 2411.05787",
      .parameters = kParameters,
      .decorates = true,
      .remembers = true,
      .metadata = "the inner selector's; and the last answers",
      .build_cost = "the inner selector's",
      .step_cost = "the inner selector's / interval",
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        RefreshOptions options;
        KVTIER_ASSIGN_OR_RETURN(options.interval,
                                recipe.parameters.integer("interval", options.interval, 1, 65536));
        KVTIER_ASSIGN_OR_RETURN(options.similarity,
                                recipe.parameters.fraction("similarity", options.similarity));
        // Refreshing always is the inner selector itself.
        if (options.interval == 1) factory.remembers = recipe.inner->remembers;
        factory.make = [options, inner = *recipe.inner](
                           const SelectorShape& shape,
                           LayerIndex layer) -> Result<std::unique_ptr<Selector>> {
          KVTIER_ASSIGN_OR_RETURN(std::unique_ptr<Selector> selector, inner(shape, layer));
          return Result<std::unique_ptr<Selector>>(
              std::make_unique<Refresh>(shape, std::move(selector), options, inner.partial_blocks));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
