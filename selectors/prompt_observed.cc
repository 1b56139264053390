#include "selectors/families.h"
#include "selectors/prompt_scores.h"
#include "selectors/rank_blocks.h"
#include "selectors/seen_tokens.h"
#include "selectors/step_logits.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

namespace kvtier {
namespace {

/// What the end of the prompt looked at, once and for all: scores per token from the last observed
/// prompt queries, made at the first step after them. Meant for the first placement (winners on the
/// device, losers demoted, nothing lost); as a selector it is the line that every query-aware
/// family must beat. A block's score is the sum of its tokens'.
///
/// - `snapkv` (SnapKV, 2404.14469 [A][K]): attention weights of the last `queries` prompt queries,
///   added, max-pooled over `kernel` tokens, per query head; then reduced over the heads.
/// - `ems` (EMS, 2412.08521 [A]): accumulated and recent-window attention, each normalised to a sum
///   of 1 and added. A reconstruction: how they are combined was not obtained, and "accumulated"
///   goes over the last 4 * `queries` observed queries.
/// - `kvcrush` (KVCrush, 2503.00022 [A][K]): SnapKV's ranking, but every fourth place goes to a
///   representative of a group of blocks that the heads treat alike: a block's signature has a bit
///   for each query head of the layer (its score is above that head's mean), groups are those at
///   one Hamming distance from the majority's signature, and groups take turns, best block first. A
///   reconstruction: the paper splits the budget, a fixed ranking has none to split; the anchor is
///   one of several it names.
///
/// The last `queries` tokens of the observed prompt and all that follow come before every scored
/// block, the newest first: those methods keep all of them. In a long answer that makes them
/// `recency`, which is what such methods are.
///
/// The keys are held until the first step after an observation, which closes the prompt: later
/// observations (another turn) are not taken, and the answer of a step thus depends on whether one
/// came before the prompt was over. A cut before that is exact as long as no more than as many
/// queries as the scores need are cut; behind it, what cut queries have said of the tokens that
/// stay is not taken back.
class PromptObserved final : public Selector {
 public:
  PromptObserved(const SelectorShape& shape, PromptScoreOptions options)
      : shape_(shape),
        options_(options),
        tokens_(shape.tokens_max),
        row_bytes_(shape.head_dim * size_of(shape.dtype)),
        keys_(std::size_t{shape.kv_heads} * shape.tokens_max * row_bytes_),
        query_elements_(std::size_t{shape.query_heads()} * shape.head_dim),
        observed_(2 * wanted_queries() * query_elements_),
        scores_(std::size_t{shape.head_groups()} * blocks_max()),
        block_scores_(blocks_max()),
        order_(blocks_max()) {
    positions_.reserve(2 * wanted_queries());
  }

  void append(const NewTokens& tokens) override;
  void observe_prompt(const PromptQueries& queries) override;
  void truncate(std::uint32_t position) override;

  Status select(const SelectRequest& request, std::span<GroupSelection> selection,
                WorkerPool& pool) override {
    KVTIER_RETURN_IF_ERROR(rank(request, selection, pool));
    // The question's tokens are the last of the prompt.
    if (!closed_ && !positions_.empty()) {
      closed_ = true;
      keys_ = {};
      observed_ = {};
      positions_.clear();
    }
    return {};
  }
  Status hint(const SelectRequest& request, std::span<GroupSelection> selection,
              WorkerPool& pool) override {
    return rank(request, selection, pool);
  }

  std::unique_ptr<Selector> fork() const override {
    auto copy = std::make_unique<PromptObserved>(*this);
    copy->positions_.reserve(2 * wanted_queries());
    return copy;
  }
  void save(StateWriter& writer) const override;
  Status restore(StateReader& reader) override;

  /// The scores. Keys and queries of a prompt that is not over are left out: whoever runs the
  /// prompt has them.
  std::size_t metadata_bytes() const override {
    return std::size_t{shape_.head_groups()} * (tokens_.count() / shape_.tokens_per_block) *
           sizeof(float);
  }

 private:
  std::size_t blocks_max() const { return shape_.tokens_max / shape_.tokens_per_block + 1; }
  std::uint32_t wanted_queries() const { return options_.wanted_queries(); }
  Status rank(const SelectRequest& request, std::span<GroupSelection> selection, WorkerPool& pool);
  Status score_prompt(WorkerPool& pool);

  SelectorShape shape_;
  PromptScoreOptions options_;
  SeenTokens tokens_;
  std::size_t row_bytes_;
  FixedArray<std::byte> keys_;  ///< [KV heads, tokens_max, head_dim]; empty when closed.
  std::size_t query_elements_;
  /// The newest observed queries, as many as are wanted and as many to go back by.
  FixedArray<float> observed_;
  std::vector<std::uint32_t> positions_;
  bool closed_ = false;
  bool scored_ = true;               ///< `scores_` says what the observed queries do.
  std::uint32_t scored_blocks_ = 0;  ///< Blocks that have a score; the others are newer.
  FixedArray<float> scores_;         ///< [head groups, blocks], 1 is the best.
  std::vector<float> block_scores_;
  std::vector<std::uint32_t> order_;
};

void PromptObserved::append(const NewTokens& tokens) {
  tokens_.append(tokens);
  if (closed_) return;
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    const std::byte* source = tokens.keys + head * tokens.key_head_stride;
    std::byte* target =
        keys_.data() + (std::size_t{head} * shape_.tokens_max + tokens.first_position) * row_bytes_;
    for (std::uint32_t t = 0; t < tokens.tokens; ++t) {
      std::memcpy(target + t * row_bytes_, source + t * tokens.key_token_stride, row_bytes_);
    }
  }
}

void PromptObserved::observe_prompt(const PromptQueries& queries) {
  if (closed_) return;
  const std::size_t most = 2 * std::size_t{wanted_queries()};
  for (std::size_t q = 0; q < queries.positions.size(); ++q) {
    const std::uint32_t position = queries.positions[q];
    KVTIER_CHECK(position < tokens_.count() && (positions_.empty() || position > positions_.back()),
                 "a query of token {} of {}, behind {} others", position, tokens_.count(),
                 positions_.size());
    if (positions_.size() == most) {
      // The older half is wanted no more, whatever is cut of the newer.
      std::memmove(observed_.data(), observed_.data() + query_elements_,
                   (most - 1) * query_elements_ * sizeof(float));
      positions_.erase(positions_.begin());
    }
    std::copy_n(queries.queries + q * queries.query_stride, query_elements_,
                observed_.data() + positions_.size() * query_elements_);
    positions_.push_back(position);
    scored_ = false;
  }
}

void PromptObserved::truncate(std::uint32_t position) {
  tokens_.truncate(position);
  scored_blocks_ = std::min(scored_blocks_, position / shape_.tokens_per_block);
  while (!positions_.empty() && positions_.back() >= position) {
    positions_.pop_back();
    scored_ = false;
  }
}

Status PromptObserved::rank(const SelectRequest& request, std::span<GroupSelection> selection,
                            WorkerPool& pool) {
  KVTIER_RETURN_IF_ERROR(check_request(shape_, request));
  reserve_selection(shape_, selection);
  const FarRegion region = FarRegion::of(shape_, request.first_position);
  tokens_.check_covers(region);
  if (!scored_) KVTIER_RETURN_IF_ERROR(score_prompt(pool));
  const std::span scores(block_scores_.data(), block_count(region, shape_.tokens_per_block));
  const std::uint32_t first_block = region.begin / shape_.tokens_per_block;
  for (std::size_t group = 0; group < selection.size(); ++group) {
    for (std::uint32_t i = 0; i < scores.size(); ++i) {
      const std::uint32_t block = first_block + i;
      // Scores end at 1; block numbers stay below 2^24, so float holds each of them.
      scores[i] = block < scored_blocks_ ? scores_[group * blocks_max() + block]
                                         : 1.0f + static_cast<float>(block);
    }
    rank_blocks({.scores = scores,
                 .always = {},
                 .region = region,
                 .tokens_per_block = shape_.tokens_per_block,
                 .far_budget_tokens = far_budget_tokens(shape_, request),
                 .band_tokens = request.band_tokens},
                order_, selection[group]);
  }
  return {};
}

/// From the observed queries to a score per block. Allocates; it happens once per prompt.
Status PromptObserved::score_prompt(WorkerPool& pool) {
  scored_blocks_ = 0;
  if (!positions_.empty()) {
    const std::uint32_t end = positions_.back() + 1;
    scored_blocks_ = (end - std::min(end, options_.queries)) / shape_.tokens_per_block;
  }
  if (scored_blocks_ > 0) {
    PromptScores scores(shape_, options_, scored_blocks_);
    KVTIER_RETURN_IF_ERROR(scores.compute({.keys = keys_.data(),
                                           .head_stride = shape_.tokens_max * row_bytes_,
                                           .queries = observed_.data(),
                                           .query_stride = query_elements_,
                                           .positions = positions_},
                                          pool));
    for (std::uint32_t group = 0; group < shape_.head_groups(); ++group) {
      std::ranges::copy(scores.of_group(group), scores_.data() + group * blocks_max());
    }
  }
  scored_ = true;
  return {};
}

void PromptObserved::save(StateWriter& writer) const {
  tokens_.save(writer);
  writer.put(static_cast<std::uint8_t>(closed_));
  writer.put(static_cast<std::uint8_t>(scored_));
  writer.put(scored_blocks_);
  for (std::size_t group = 0; group < shape_.head_groups(); ++group) {
    writer.put_array(scores_.part(group * blocks_max(), scored_blocks_));
  }
  if (closed_) return;
  writer.put_array(std::span(positions_));
  writer.put_array(observed_.part(0, positions_.size() * query_elements_));
  for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
    writer.put_array(
        keys_.part(head * shape_.tokens_max * row_bytes_, tokens_.count() * row_bytes_));
  }
}

Status PromptObserved::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(tokens_.restore(reader));
  std::uint8_t closed = 0;
  std::uint8_t scored = 0;
  KVTIER_RETURN_IF_ERROR(reader.get(closed));
  KVTIER_RETURN_IF_ERROR(reader.get(scored));
  KVTIER_RETURN_IF_ERROR(reader.get(scored_blocks_));
  if (closed > 1 || scored > 1 || (closed == 1 && scored == 0) ||
      scored_blocks_ > tokens_.count() / shape_.tokens_per_block) {
    return corrupt(fmt::format("selector state: found {} scored blocks of {} tokens, flags {} {}",
                               scored_blocks_, tokens_.count(), closed, scored));
  }
  closed_ = closed == 1;
  scored_ = scored == 1;
  for (std::size_t group = 0; group < shape_.head_groups(); ++group) {
    const std::span<float> scores = scores_.part(group * blocks_max(), scored_blocks_);
    KVTIER_RETURN_IF_ERROR(reader.get_exactly(scores));
    if (!all_finite(scores)) return corrupt("selector state: a score is not a finite number");
  }
  if (closed_) {
    keys_ = {};
    observed_ = {};
    return {};
  }
  KVTIER_RETURN_IF_ERROR(reader.get_vector(positions_, 2 * std::size_t{wanted_queries()}));
  positions_.reserve(2 * std::size_t{wanted_queries()});
  if (std::ranges::adjacent_find(positions_, std::greater_equal()) != positions_.end() ||
      (!positions_.empty() && positions_.back() >= tokens_.count())) {
    return corrupt("selector state: observed positions do not ascend within the tokens");
  }
  KVTIER_RETURN_IF_ERROR(
      reader.get_exactly(observed_.part(0, positions_.size() * query_elements_)));
  for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
    KVTIER_RETURN_IF_ERROR(reader.get_exactly(
        keys_.part(head * shape_.tokens_max * row_bytes_, tokens_.count() * row_bytes_)));
  }
  return {};
}

Status make_prompt_observed(const SelectorRecipe& recipe, SelectorFactory& factory) {
  static constexpr std::string_view kScores[] = {"snapkv", "ems", "kvcrush"};
  PromptScoreOptions options;
  KVTIER_ASSIGN_OR_RETURN(const std::size_t score,
                          recipe.parameters.choice("score", "snapkv", kScores));
  options.score = static_cast<PromptScore>(score);
  KVTIER_ASSIGN_OR_RETURN(options.queries,
                          recipe.parameters.integer("queries", options.queries, 1, 256));
  KVTIER_ASSIGN_OR_RETURN(options.kernel,
                          recipe.parameters.integer("kernel", options.kernel, 1, 63));
  factory.make = [options](const SelectorShape& shape, LayerIndex) {
    return Result<std::unique_ptr<Selector>>(std::make_unique<PromptObserved>(shape, options));
  };
  return {};
}

}  // namespace

const SelectorFamily& prompt_observed_family() {
  static constexpr std::string_view kParameters[] = {"score", "queries", "kernel"};
  static const SelectorFamily kFamily = {
      .name = "prompt-observed",
      .summary = "what the end of the prompt attended, once and for all: a first placement",
      .source = "SnapKV, 2404.14469; EMS, 2412.08521; KVCrush, 2503.00022",
      .parameters = kParameters,
      .remembers = true,
      .needs = {.prompt_queries = true},
      .metadata = "4 B per block; all keys until the first step",
      .build_cost = "O(queries * head_dim) per query head, once",
      .step_cost = "O(blocks)",
      .make = make_prompt_observed};
  return kFamily;
}

}  // namespace kvtier
