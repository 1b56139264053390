#include "selectors/chunk_stages.h"
#include "selectors/families.h"
#include "selectors/far_selector.h"
#include "selectors/kept_keys.h"
#include "selectors/question_history.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace kvtier {
namespace {

/// Hierarchical choice in stages (HiP, 2406.09827; InfiniteHiP, 2502.08910): chunks of 256 tokens,
/// of which 32K tokens go on, cut into chunks of 32, of which 8K go on, cut into chunks of 8, the
/// best of which are attended. Each chunk is scored by one key that binary descent finds in it
/// (`ChunkStages`). Stages are run again only every 32, 16 and 8 tokens; what was found is used in
/// between (mask caching). A stage keeps at least what the budget needs.
///
/// Keeps every key, as InfiniteHiP does in memory that the GPU shares with the host: the price is
/// memory and not reads, of which a run of all stages makes one for about 25 tokens, and one in
/// eight steps runs one.
///
/// Where it leaves the papers, whose code takes the largest raw logit over heads for a chunk, all
/// heads choosing together: here head groups choose as the shape says, by the softmax over the
/// chunks that are left. Ages are counted in tokens and not in steps. Which key stands for a half
/// during the descent is read as its first (a reconstruction). Tokens that come into the region
/// while results are used again join at the next stage that is run. Dense first layers are the
/// caller's choice.
class Hierarchical final : public FarSelector {
 public:
  Hierarchical(const SelectorShape& shape, std::span<const ChunkStage> stages)
      : FarSelector(shape),
        stages_(stages.begin(), stages.end()),
        keys_(shape),
        views_(shape.kv_heads) {
    make_groups();
    for (std::uint32_t i = 0; i < shape.head_groups(); ++i) {
      remembered_.emplace_back(kQuestionVersions, groups_[i].search.blank());
    }
    reserve();
  }

  void append(const NewTokens& tokens) override { keys_.append(tokens); }
  void truncate(std::uint32_t position) override {
    keys_.truncate(position);
    for (auto& history : remembered_) history.drop_from(position);
  }

  std::unique_ptr<Selector> fork() const override {
    auto copy = std::make_unique<Hierarchical>(*this);
    copy->make_groups();
    copy->reserve();
    return copy;
  }
  void save(StateWriter& writer) const override;
  Status restore(StateReader& reader) override;

  /// With the largest last stage that a question can leave; the versions for going back are left
  /// out.
  std::size_t metadata_bytes() const override {
    return keys_.bytes() + groups_.size() * (keys_.count() / stages_.back().chunk_tokens) *
                               (sizeof(std::uint32_t) + sizeof(float));
  }

 private:
  std::uint32_t tokens_seen() const override { return keys_.count(); }
  /// Works on a copy of what is remembered; only a step remembers the outcome.
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override {
    const auto& [request, region, learns] = question;
    for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
      views_[head] = keys_.rows(head, 0, keys_.count());
    }
    struct Step {
      const Question& question;
      std::span<GroupSelection> selection;
    } step{question, selection};
    pool.run(groups_.size(), [this, &step](std::size_t i) {
      select_group(step.question.request, step.question.region, static_cast<std::uint32_t>(i),
                   step.selection[i]);
    });
    for (const Group& group : groups_) KVTIER_RETURN_IF_ERROR(group.status);
    for (std::size_t i = 0; learns && i < groups_.size(); ++i) {
      if (groups_[i].changed) remembered_[i].add(request.first_position) = groups_[i].results;
    }
    return {};
  }

  /// Scratch of one head group.
  struct Group {
    ChunkStages search;
    StageResults results;
    bool changed = false;
    Status status;
    std::vector<float> block_scores;
    std::vector<std::uint32_t> order;
  };

  void make_groups() {
    const std::size_t blocks_max = shape().tokens_max / shape().tokens_per_block + 1;
    groups_.clear();
    for (std::uint32_t i = 0; i < shape().head_groups(); ++i) {
      Group group{.search = ChunkStages(shape(), stages_)};
      group.results = group.search.blank();
      group.block_scores.resize(blocks_max);
      group.order.resize(blocks_max);
      groups_.push_back(std::move(group));
    }
  }
  /// Copies have room for what they hold only.
  void reserve() {
    for (std::size_t i = 0; i < groups_.size(); ++i) {
      remembered_[i].for_each(
          [this, i](StageResults& results) { groups_[i].search.reserve(results); });
    }
  }
  void select_group(const SelectRequest& request, FarRegion region, std::uint32_t head_group,
                    GroupSelection& selection);
  void score_blocks(FarRegion region, const StageResults::Stage& found,
                    std::span<float> blocks) const;

  std::vector<ChunkStage> stages_;
  KeptKeys keys_;
  std::vector<RowsView> views_;
  std::vector<Group> groups_;
  std::vector<QuestionHistory<StageResults>> remembered_;
};

void Hierarchical::select_group(const SelectRequest& request, FarRegion region,
                                std::uint32_t head_group, GroupSelection& selection) {
  Group& group = groups_[head_group];
  const StageResults* newest = remembered_[head_group].newest();
  if (newest != nullptr) {
    group.results = *newest;
  } else {
    for (StageResults::Stage& stage : group.results.stages) stage.enough_for = 0;
  }
  const std::uint32_t budget = far_budget_tokens(shape(), request);
  group.status = group.search.run(
      std::span(views_).subspan(std::size_t{head_group} * shape().heads_per_group,
                                shape().heads_per_group),
      {.request = request, .region = region, .head_group = head_group, .wanted_tokens = budget},
      group.results, group.changed);
  if (!group.status.ok()) return;
  const std::span blocks(group.block_scores.data(), block_count(region, shape().tokens_per_block));
  score_blocks(region, group.results.stages.back(), blocks);
  rank_blocks({.scores = blocks,
               .always = {},
               .region = region,
               .tokens_per_block = shape().tokens_per_block,
               .far_budget_tokens = budget,
               .band_tokens = request.band_tokens},
              group.order, selection);
}

/// A block scores like the best chunk that it touches; blocks without one come last. Only a band
/// can reach them: what is chosen does not depend on its length, so stages keep what the budget
/// needs.
void Hierarchical::score_blocks(FarRegion region, const StageResults::Stage& found,
                                std::span<float> blocks) const {
  const std::uint32_t per_block = shape().tokens_per_block;
  const std::uint32_t per_chunk = stages_.back().chunk_tokens;
  const std::uint32_t first_block = region.begin / per_block;
  std::ranges::fill(blocks, std::numeric_limits<float>::lowest());
  for (std::size_t i = 0; i < found.chunks.size(); ++i) {
    const std::uint32_t begin = std::max(found.chunks[i] * per_chunk, region.begin);
    const std::uint32_t end = std::min((found.chunks[i] + 1) * per_chunk, found.region_end);
    for (std::uint32_t b = begin / per_block; begin < end && b <= (end - 1) / per_block; ++b) {
      float& score = blocks[b - first_block];
      score = std::max(score, found.scores[i]);
    }
  }
}

void Hierarchical::save(StateWriter& writer) const {
  keys_.save(writer);
  for (const auto& history : remembered_) {
    history.save(writer, [](StateWriter& to, const StageResults& results) {
      for (const StageResults::Stage& stage : results.stages) {
        to.put(stage.position);
        to.put(stage.region_end);
        to.put(stage.enough_for);
        to.put_array(std::span(stage.chunks));
        to.put_array(std::span(stage.scores));
      }
    });
  }
}

Status Hierarchical::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(keys_.restore(reader));
  const auto get_results = [this](StateReader& from, StageResults& results) -> Status {
    for (std::size_t s = 0; s < stages_.size(); ++s) {
      StageResults::Stage& stage = results.stages[s];
      const std::size_t most = groups_[0].search.chunks_max(s);
      KVTIER_RETURN_IF_ERROR(from.get(stage.position));
      KVTIER_RETURN_IF_ERROR(from.get(stage.region_end));
      KVTIER_RETURN_IF_ERROR(from.get(stage.enough_for));
      KVTIER_RETURN_IF_ERROR(from.get_vector(stage.chunks, most));
      KVTIER_RETURN_IF_ERROR(from.get_vector(stage.scores, most));
      const bool last = s + 1 == stages_.size();
      const bool ascend = std::ranges::is_sorted(stage.chunks, std::less_equal<>());
      const std::size_t inside = shape().tokens_max / stages_[s].chunk_tokens + 1;
      if (stage.region_end > shape().tokens_max || !ascend ||
          stage.scores.size() != (last ? stage.chunks.size() : 0) ||
          (!stage.chunks.empty() && stage.chunks.back() >= inside) ||
          std::ranges::any_of(stage.scores, [](float score) { return !std::isfinite(score); })) {
        return corrupt("selector state: chunks of a stage that cannot be");
      }
    }
    return {};
  };
  for (auto& history : remembered_) KVTIER_RETURN_IF_ERROR(history.restore(reader, get_results));
  return {};
}

/// "256:32:8": integers of at least 1.
Result<std::vector<std::uint32_t>> numbers_of(const SelectorParameters& parameters,
                                              std::string_view key, std::string_view fallback) {
  const std::string text = parameters.text(key).value_or(std::string(fallback));
  std::vector<std::uint32_t> numbers;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (true) {
    std::uint32_t number = 0;
    const auto [rest, error] = std::from_chars(at, end, number);
    const bool more = rest != end && *rest == ':';
    if (error != std::errc() || number == 0 || number > 1u << 30 || (rest != end && !more)) {
      return invalid_argument(fmt::format(
          "selector 'hierarchical': {}={}: expected positive integers like 256:32:8", key, text));
    }
    numbers.push_back(number);
    if (!more) return numbers;
    at = rest + 1;
  }
}

Result<std::vector<ChunkStage>> stages_of(const SelectorParameters& parameters) {
  // InfiniteHiP's.
  KVTIER_ASSIGN_OR_RETURN(const auto chunks, numbers_of(parameters, "chunks", "256:32:8"));
  KVTIER_ASSIGN_OR_RETURN(const auto keep, numbers_of(parameters, "keep", "32768:8192"));
  KVTIER_ASSIGN_OR_RETURN(const auto refresh, numbers_of(parameters, "refresh", "32:16:8"));
  std::vector<ChunkStage> stages;
  for (std::size_t s = 0; s < chunks.size(); ++s) {
    if (s > 0 && (chunks[s] >= chunks[s - 1] || chunks[s - 1] % chunks[s] != 0)) {
      return invalid_argument(fmt::format(
          "selector 'hierarchical': chunks of {} tokens do not divide those of {} before",
          chunks[s], chunks[s - 1]));
    }
    // Stages beyond a list's end go on as its last: fewer stages than the defaults need no lists.
    stages.push_back(
        {chunks[s], keep[std::min(s, keep.size() - 1)], refresh[std::min(s, refresh.size() - 1)]});
  }
  return stages;
}

}  // namespace

const SelectorFamily& hierarchical_family() {
  static constexpr std::string_view kParameters[] = {"chunks", "keep", "refresh"};
  static const SelectorFamily kFamily = {
      .name = "hierarchical",
      .summary =
          "chunks in stages, each by a key found in it; stages are used again for some steps",
      .source = "HiP, 2406.09827; InfiniteHiP, 2502.08910",
      .parameters = kParameters,
      .remembers = true,
      .metadata = "2 head_dim B: every key; and 1 B of results",
      .build_cost = "a copy",
      .step_cost =
          "O((context / 256 + keep / 32 + keep / 8) * log(chunk) * head_dim), every 8 to "
          "32 steps",
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        KVTIER_ASSIGN_OR_RETURN(const std::vector<ChunkStage> stages, stages_of(recipe.parameters));
        factory.make = [stages](const SelectorShape& shape, LayerIndex) {
          return Result<std::unique_ptr<Selector>>(std::make_unique<Hierarchical>(shape, stages));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
