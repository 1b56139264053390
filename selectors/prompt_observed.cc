#include "kernels/partial_attention.h"
#include "kernels/score_rows.h"
#include "selectors/families.h"
#include "selectors/rank_blocks.h"
#include "selectors/seen_tokens.h"
#include "selectors/step_logits.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

namespace kvtier {
namespace {

enum class PromptScore : unsigned char { kSnapKv, kEms, kKvCrush };

struct PromptObservedOptions {
  PromptScore score = PromptScore::kSnapKv;
  std::uint32_t queries = 32;  ///< SnapKV's observation window: 16 to 64 queries.
  std::uint32_t kernel = 7;    ///< Of the max-pooling along tokens: 5 to 7.
};
/// EMS's accumulated attention goes back further than its recent-window attention, here by this
/// factor: every query of the prompt would cost as much as the prompt itself.
constexpr std::uint32_t kEmsGlobal = 4;
/// Of every so many places in KVCrush's ranking, one goes to a representative.
constexpr std::uint32_t kCrushShare = 4;

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
  PromptObserved(const SelectorShape& shape, PromptObservedOptions options)
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
  using HeadScores = std::vector<std::vector<float>>;  ///< [query heads][blocks]

  std::size_t blocks_max() const { return shape_.tokens_max / shape_.tokens_per_block + 1; }
  std::uint32_t wanted_queries() const {
    return options_.queries * (options_.score == PromptScore::kEms ? kEmsGlobal : 1);
  }
  Status rank(const SelectRequest& request, std::span<GroupSelection> selection, WorkerPool& pool);
  Status score_prompt(WorkerPool& pool);
  Status weigh_tokens(std::uint32_t head, std::size_t first_query, HeadScores& target,
                      WorkerPool& pool);
  void sum_blocks(std::span<const float> weights, std::span<float> blocks) const;
  void reduce_heads(std::uint32_t group, const HeadScores& heads);
  void crush(const HeadScores& heads);
  void crush_group(std::span<const std::uint32_t> distance, std::span<float> scores) const;

  SelectorShape shape_;
  PromptObservedOptions options_;
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
  const std::size_t wanted = std::min<std::size_t>(positions_.size(), wanted_queries());
  if (wanted > 0) {
    const std::uint32_t end = positions_.back() + 1;
    scored_blocks_ = (end - std::min(end, options_.queries)) / shape_.tokens_per_block;
  }
  if (scored_blocks_ > 0) {
    HeadScores heads(shape_.query_heads(), std::vector<float>(scored_blocks_));
    for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
      KVTIER_RETURN_IF_ERROR(weigh_tokens(head, positions_.size() - wanted, heads, pool));
    }
    for (std::uint32_t group = 0; group < shape_.head_groups(); ++group) {
      reduce_heads(group, heads);
    }
    if (options_.score == PromptScore::kKvCrush) crush(heads);
  }
  scored_ = true;
  return {};
}

/// The scores of the query heads of one KV head, from the observed queries [first_query, all).
Status PromptObserved::weigh_tokens(std::uint32_t head, std::size_t first_query, HeadScores& target,
                                    WorkerPool& pool) {
  const std::size_t per_head = shape_.queries_per_kv_head;
  const std::size_t all = positions_.size();
  const std::size_t local_begin = all - std::min<std::size_t>(all, options_.queries);
  const std::uint32_t tokens = positions_.back() + 1;
  const RowsView rows{keys_.data() + std::size_t{head} * shape_.tokens_max * row_bytes_, tokens,
                      shape_.head_dim, row_bytes_, shape_.dtype};
  StepLogits logits(shape_, 1, tokens);
  // Two sums per query head: over the recent queries, and over those before them (EMS).
  std::vector<std::vector<float>> recent(per_head, std::vector<float>(tokens));
  std::vector<std::vector<float>> before(per_head, std::vector<float>(tokens));
  for (std::size_t q = first_query; q < all; q += kMaxStepQueries) {
    const std::size_t count = std::min<std::size_t>(kMaxStepQueries, all - q);
    const SelectRequest request{.queries = observed_.data() + q * query_elements_,
                                .query_stride = query_elements_,
                                .query_count = static_cast<std::uint32_t>(count)};
    KVTIER_RETURN_IF_ERROR(logits.compute(request, head, std::span(&rows, 1), pool));
    for (std::size_t row = 0; row < count * per_head; ++row) {
      const std::size_t query = q + row / per_head;
      const std::span<float> weights =
          logits.row(0, static_cast<std::uint32_t>(row), positions_[query] + 1);
      if (!all_finite(weights)) {
        return invalid_argument(
            fmt::format("prompt-observed: logits of KV head {}, prompt query at {}, overflow "
                        "float32 or the query is not finite",
                        head, positions_[query]));
      }
      softmax_row(weights);
      auto& sums = query >= local_begin ? recent[row % per_head] : before[row % per_head];
      for (std::size_t t = 0; t < weights.size(); ++t) sums[t] += weights[t];
    }
  }
  for (std::size_t h = 0; h < per_head; ++h) {
    if (options_.score == PromptScore::kEms) {
      const auto local = static_cast<float>(all - local_begin);
      const auto global = static_cast<float>(all - first_query);
      for (std::size_t t = 0; t < tokens; ++t) {
        recent[h][t] = recent[h][t] / local + (recent[h][t] + before[h][t]) / global;
      }
    }
    sum_blocks(recent[h], target[head * per_head + h]);
  }
  return {};
}

/// Sums per block, without the sinks; pooled but for EMS.
void PromptObserved::sum_blocks(std::span<const float> weights, std::span<float> blocks) const {
  const std::uint32_t reach = options_.score == PromptScore::kEms ? 0 : options_.kernel / 2;
  for (std::uint32_t b = 0; b < blocks.size(); ++b) {
    const std::uint32_t end = (b + 1) * shape_.tokens_per_block;
    float sum = 0.0f;
    for (std::uint32_t t = std::max(b * shape_.tokens_per_block, shape_.sinks); t < end; ++t) {
      const std::size_t first = t - std::min(t, reach);
      const std::size_t last = std::min<std::size_t>(weights.size(), std::size_t{t} + reach + 1);
      sum += *std::max_element(weights.begin() + static_cast<std::ptrdiff_t>(first),
                               weights.begin() + static_cast<std::ptrdiff_t>(last));
    }
    blocks[b] = sum;
  }
}

void PromptObserved::reduce_heads(std::uint32_t group, const HeadScores& heads) {
  const std::size_t count = std::size_t{shape_.heads_per_group} * shape_.queries_per_kv_head;
  const std::span<float> scores = scores_.part(group * blocks_max(), scored_blocks_);
  std::ranges::fill(scores, 0.0f);
  for (std::size_t i = 0; i < count; ++i) {
    const std::vector<float>& head = heads[group * count + i];
    for (std::size_t b = 0; b < scores.size(); ++b) {
      scores[b] = shape_.reduction == GroupReduction::kMax ? std::max(scores[b], head[b])
                                                           : scores[b] + head[b];
    }
  }
  const float best = *std::ranges::max_element(scores);
  for (float& score : scores) score = best > 0.0f ? score / best : 0.0f;
}

/// How far each block's signature is from the majority's; then places by turns.
void PromptObserved::crush(const HeadScores& heads) {
  std::vector<std::uint32_t> distance(scored_blocks_);
  std::vector<std::uint8_t> bits(scored_blocks_);
  for (const std::vector<float>& head : heads) {
    const double mean = std::accumulate(head.begin(), head.end(), 0.0) / scored_blocks_;
    std::size_t ones = 0;
    for (std::size_t b = 0; b < bits.size(); ++b) {
      bits[b] = static_cast<std::uint8_t>(double{head[b]} > mean);
      ones += bits[b];
    }
    const std::uint8_t majority = 2 * ones > bits.size() ? 1 : 0;
    for (std::size_t b = 0; b < bits.size(); ++b) distance[b] += bits[b] != majority ? 1u : 0u;
  }
  for (std::size_t group = 0; group < shape_.head_groups(); ++group) {
    crush_group(distance, scores_.part(group * blocks_max(), scored_blocks_));
  }
}

/// Replaces scores by places: winners in order, and in every fourth place the best block that is
/// left in the next bucket.
void PromptObserved::crush_group(std::span<const std::uint32_t> distance,
                                 std::span<float> scores) const {
  std::vector<std::uint32_t> winners(scores.size());
  std::iota(winners.begin(), winners.end(), 0u);
  std::ranges::stable_sort(winners, std::greater(), [&](std::uint32_t b) { return scores[b]; });
  std::vector<std::vector<std::uint32_t>> buckets(shape_.query_heads() + 1);
  for (const std::uint32_t b : winners) buckets[distance[b]].push_back(b);
  std::vector<std::size_t> next(buckets.size());
  std::vector<bool> taken(scores.size());
  std::size_t winner = 0;
  std::size_t bucket = 0;
  for (std::size_t place = 0; place < scores.size(); ++place) {
    const auto first_free = [&](const std::vector<std::uint32_t>& list, std::size_t& at) {
      while (at < list.size() && taken[list[at]]) ++at;
      return at < list.size();
    };
    std::uint32_t block = 0;
    if (place % kCrushShare == kCrushShare - 1) {
      while (!first_free(buckets[bucket], next[bucket])) bucket = (bucket + 1) % buckets.size();
      block = buckets[bucket][next[bucket]];
      bucket = (bucket + 1) % buckets.size();
    } else {
      first_free(winners, winner);
      block = winners[winner];
    }
    taken[block] = true;
    scores[block] = 1.0f - static_cast<float>(place) / static_cast<float>(scores.size());
  }
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
  PromptObservedOptions options;
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
