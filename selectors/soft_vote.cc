#include "kernels/score_rows.h"
#include "selectors/families.h"
#include "selectors/far_selector.h"
#include "selectors/kept_keys.h"
#include "selectors/key_frame.h"
#include "selectors/question_log.h"
#include "selectors/rank_blocks.h"
#include "selectors/token_scores.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

namespace kvtier {
namespace {

struct SoftVoteOptions {
  /// TokenSelect compares un-rotated keys with a query at one distance, because it also attends
  /// that way, beyond the length that a model was trained for. Here the model attends at the true
  /// positions, so these logits are the ones that count, and they are the default.
  bool unrotated = false;
  /// One set for all KV heads, as TokenSelect has it. Here what is fetched are blocks of a head
  /// group, so a set per group costs no more and moves nothing that only other heads want.
  bool share_layer = false;
  /// TokenSelect's reuse threshold; above 1 nothing is reused.
  double similarity = 0.9;
  /// Width of the max-pool over neighbouring tokens; TokenSelect's is optional, 1 is none.
  std::uint32_t pool = 1;
};

/// Where `frame=unrotated` puts the query: TokenSelect's local window.
constexpr std::uint32_t kSoftVoteDistance = 512;
/// Refreshes that a cut can go back by: more than the queries of a draft.
constexpr std::uint32_t kSoftVoteRefreshes = 9;

/// Soft votes of all heads for single tokens, reused while the query stays the same (TokenSelect,
/// 2411.02886, code): softmax of the logits over the far tokens per query head, added over the
/// heads of the group, an optional max-pool. A block's score adds those of its tokens.
///
/// The votes are cached. A step whose mean query (over the step's queries, all heads in one vector)
/// has a cosine of at least `similarity` with the query they were counted for ranks the old votes;
/// tokens that have left the window since come last, until votes are counted again. Several
/// queries of a step decide by their mean, as TokenSelect's chunks do.
///
/// Keeps every key: it saves no memory, its worth is the reuse. What is remembered of questions is
/// the query of each of the last refreshes; votes are counted again from it after a cut.
class SoftVote final : public FarSelector, private TokenLogits {
 public:
  SoftVote(const SelectorShape& shape, SoftVoteOptions options)
      : FarSelector(shape),
        groups_(options.share_layer ? 1 : shape.head_groups()),
        options_(options),
        frame_(shape, options.unrotated, kSoftVoteDistance),
        keys_(shape),
        asked_(std::size_t{shape.query_heads()} * shape.head_dim),
        turned_(asked_.size()),
        pooled_(options.pool > 1 ? shape.tokens_max : 0),
        refreshes_(kSoftVoteRefreshes, asked_.size()),
        scores_(voting_shape(shape, options), {.everyone = false}),
        votes_(std::size_t{groups_} * shape.tokens_max),
        block_scores_(std::size_t{groups_} * blocks_max()),
        order_(block_scores_.size()) {}

  void append(const NewTokens& tokens) override {
    frame_.feed(tokens, [this](const NewTokens& piece) { keys_.append(piece); });
  }

  void truncate(std::uint32_t position) override {
    keys_.truncate(position);
    forget_from(position);
  }

  std::unique_ptr<Selector> fork() const override { return std::make_unique<SoftVote>(*this); }

  void save(StateWriter& writer) const override {
    keys_.save(writer);
    refreshes_.save(writer);
  }
  Status restore(StateReader& reader) override {
    KVTIER_RETURN_IF_ERROR(keys_.restore(reader));
    KVTIER_RETURN_IF_ERROR(refreshes_.restore(reader));
    counted_ = false;
    if (refreshes_.empty() || covered(refreshes_.position())) return {};
    return corrupt(fmt::format("selector state: found votes at {} of {} tokens",
                               refreshes_.position(), keys_.count()));
  }

  std::size_t metadata_bytes() const override {
    return keys_.bytes() + std::size_t{keys_.count()} * groups_ * sizeof(float) +
           refreshes_.bytes();
  }

 private:
  /// Votes are of single tokens, and of the whole layer where it shares one set.
  static SelectorShape voting_shape(SelectorShape shape, const SoftVoteOptions& options) {
    shape.tokens_per_block = 1;
    if (options.share_layer) shape.heads_per_group = shape.kv_heads;
    return shape;
  }
  std::uint32_t blocks_max() const { return shape().tokens_max / shape().tokens_per_block + 1; }
  std::span<float> votes(std::size_t group) {
    return votes_.part(group * shape().tokens_max, shape().tokens_max);
  }
  bool covered(std::uint32_t position) const {
    return FarRegion::of(shape(), position).end <= keys_.count();
  }
  void forget_from(std::uint32_t position) {
    const std::uint32_t before = refreshes_.count();
    refreshes_.drop_from(position);
    if (refreshes_.count() != before) counted_ = false;
  }

  std::uint32_t tokens_seen() const override { return keys_.count(); }
  /// A guess uses the cached votes if it is near enough; else they are counted for it, and again at
  /// the next step.
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override;
  void average_queries(const SelectRequest& request);
  double similarity() const;
  Status count_votes(std::span<const float> query, std::uint32_t position, WorkerPool& pool);
  void pool_votes(std::span<float> votes);
  void rank(const Question& question, std::uint32_t group, GroupSelection& result);

  Status prepare(const SelectRequest&, const float*, std::uint32_t rows, std::uint32_t,
                 WorkerPool&) override {
    // No rows: whether there could be some.
    return score_rows(shape().softmax, {.rows = keys_.rows(0, 0, 0), .query_count = rows});
  }
  void fill(const TokenPiece& piece) override {
    const Status status = score_rows(
        shape().softmax, {.rows = keys_.rows(piece.head, piece.first_token, piece.end_token),
                          .queries = piece.queries,
                          .query_stride = shape().head_dim,
                          .query_count = piece.rows,
                          .logits = piece.logits,
                          .logit_stride = kCellRowTokens});
    KVTIER_CHECK(status.ok(), "{}", status.to_string());
  }

  std::uint32_t groups_;  ///< That vote apart.
  SoftVoteOptions options_;
  KeyFrame frame_;
  KeptKeys keys_;             ///< In `frame_`.
  std::vector<float> asked_;  ///< The step's mean query.
  std::vector<float> turned_;
  FixedArray<float> pooled_;
  QuestionLog refreshes_;  ///< Mean queries that votes were counted for.
  TokenScores scores_;
  FixedArray<float> votes_;          ///< [groups, tokens_max]
  std::vector<float> block_scores_;  ///< [groups, blocks_max]
  std::vector<std::uint32_t> order_;
  bool counted_ = false;           ///< `votes_` are those of the newest refresh,
  std::uint32_t counted_end_ = 0;  ///< for the far tokens to here.
};

Status SoftVote::answer(const Question& question, std::span<GroupSelection> selection,
                        WorkerPool& pool) {
  const auto& [request, region, learns] = question;
  average_queries(request);
  if (learns) forget_from(request.first_position);
  // Votes from behind a guess's place are for tokens that it must not rank.
  const bool near = !refreshes_.empty() && refreshes_.position() <= request.first_position &&
                    similarity() >= options_.similarity;
  if (near) {
    if (!counted_) {
      KVTIER_RETURN_IF_ERROR(count_votes(refreshes_.row(), refreshes_.position(), pool));
      counted_ = true;
    }
  } else {
    counted_ = false;
    KVTIER_RETURN_IF_ERROR(count_votes(asked_, request.first_position, pool));
    if (learns) {
      std::ranges::copy(asked_, refreshes_.add(request.first_position, 0).begin());
      counted_ = true;
    }
  }
  // Nobody voted for those that have left the window since. Logits can be negative, weights cannot.
  const bool mean = shape().reduction == GroupReduction::kMean;
  for (std::uint32_t group = 0; group < groups_; ++group) {
    const std::span<float> all = votes(group);
    std::fill(all.begin() + std::min(counted_end_, region.end), all.begin() + region.end,
              mean ? -1e30f : 0.0f);
  }
  struct Call {
    SoftVote& self;
    const Question& question;
    std::span<GroupSelection> selection;
  } call{*this, question, selection};
  pool.run(groups_, [&call](std::size_t group) {
    call.self.rank(call.question, static_cast<std::uint32_t>(group), call.selection[group]);
  });
  if (!options_.share_layer) return {};
  for (GroupSelection& group : selection.subspan(1)) {
    // Assigned part by part, so that the room of `ranked` stays.
    group.ranked.assign(selection[0].ranked.begin(), selection[0].ranked.end());
    group.chosen = selection[0].chosen;
    group.mass = selection[0].mass;
  }
  return {};
}

void SoftVote::average_queries(const SelectRequest& request) {
  std::ranges::fill(asked_, 0.0f);
  const float share = 1.0f / static_cast<float>(request.query_count);
  for (std::uint32_t q = 0; q < request.query_count; ++q) {
    frame_.turn_query(request.queries + q * request.query_stride, request.first_position + q,
                      turned_.data());
    for (std::size_t i = 0; i < asked_.size(); ++i) asked_[i] += turned_[i] * share;
  }
}

double SoftVote::similarity() const {
  double dot = 0.0, asked = 0.0, known = 0.0;
  const std::span<const float> row = refreshes_.row();
  for (std::size_t i = 0; i < asked_.size(); ++i) {
    dot += double{asked_[i]} * double{row[i]};
    asked += double{asked_[i]} * double{asked_[i]};
    known += double{row[i]} * double{row[i]};
  }
  const double norm = std::sqrt(asked) * std::sqrt(known);
  return norm > 0.0 ? dot / norm : 0.0;
}

Status SoftVote::count_votes(std::span<const float> query, std::uint32_t position,
                             WorkerPool& pool) {
  const SelectRequest request{
      .queries = query.data(), .query_stride = query.size(), .first_position = position};
  KVTIER_RETURN_IF_ERROR(scores_.compute(request, keys_.count(), *this, pool));
  counted_end_ = FarRegion::of(shape(), position).end;
  pool.run(groups_, [this](std::size_t group) {
    const std::span<const float> scores = scores_.score_group(static_cast<std::uint32_t>(group));
    const std::span<float> target =
        votes(group).subspan(counted_end_ - scores.size(), scores.size());
    std::ranges::copy(scores, target.begin());
  });
  if (options_.pool == 1) return {};
  const FarRegion region = FarRegion::of(shape(), position);
  for (std::uint32_t group = 0; group < groups_; ++group) {
    pool_votes(votes(group).subspan(region.begin, region.tokens()));
  }
  return {};
}

void SoftVote::rank(const Question& question, std::uint32_t group, GroupSelection& result) {
  const FarRegion region = question.region;
  const std::uint32_t per_block = shape().tokens_per_block;
  const bool mean = shape().reduction == GroupReduction::kMean;
  const std::size_t scratch = std::size_t{group} * blocks_max();
  const std::span scores(block_scores_.data() + scratch, block_count(region, per_block));
  const float* of_tokens = votes(group).data();
  double mass = 0.0;
  std::uint32_t begin = region.begin;
  for (float& score : scores) {
    const std::uint32_t end = std::min((begin / per_block + 1) * per_block, region.end);
    score = std::accumulate(of_tokens + begin, of_tokens + end, 0.0f);
    mass += double{score};
    if (mean) score /= static_cast<float>(end - begin);
    begin = end;
  }
  rank_blocks({.scores = scores,
               .always = {},
               .region = region,
               .tokens_per_block = per_block,
               .far_budget_tokens = far_budget_tokens(shape(), question.request),
               .band_tokens = question.request.band_tokens},
              std::span(order_).subspan(scratch, scores.size()), result);
  if (!mean) result.mass = static_cast<float>(mass);
}

/// Each vote becomes the largest of those around it.
void SoftVote::pool_votes(std::span<float> votes) {
  const std::size_t reach = options_.pool / 2;
  for (std::size_t t = 0; t < votes.size(); ++t) {
    const std::size_t first = t - std::min(t, reach);
    const std::size_t last = std::min(votes.size(), t + reach + 1);
    pooled_[t] = *std::max_element(votes.data() + first, votes.data() + last);
  }
  std::copy_n(pooled_.data(), votes.size(), votes.begin());
}

}  // namespace

const SelectorFamily& soft_vote_family() {
  static constexpr std::string_view kParameters[] = {"frame", "share", "similarity", "pool"};
  static const SelectorFamily kFamily = {
      .name = "soft-vote",
      .summary = "votes of all heads for single tokens, reused while the query stays alike",
      .source = "TokenSelect, 2411.02886",
      .parameters = kParameters,
      .remembers = true,
      .metadata = "2 head_dim + 4 B: every key and a vote; nine queries",
      .build_cost = "a copy (un-rotated: O(head_dim))",
      .step_cost = "O(context * head_dim), exact logits, when not reused; O(context) when reused",
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        static constexpr std::string_view kShares[] = {"group", "layer"};
        SoftVoteOptions options;
        KVTIER_ASSIGN_OR_RETURN(
            const std::size_t frame,
            recipe.parameters.choice("frame", KeyFrame::kChoices[0], KeyFrame::kChoices));
        KVTIER_ASSIGN_OR_RETURN(const std::size_t share,
                                recipe.parameters.choice("share", kShares[0], kShares));
        KVTIER_ASSIGN_OR_RETURN(
            options.similarity,
            recipe.parameters.number("similarity", options.similarity, -1.0, 2.0));
        KVTIER_ASSIGN_OR_RETURN(options.pool,
                                recipe.parameters.integer("pool", options.pool, 1, 63));
        options.unrotated = frame == 1;
        options.share_layer = share == 1;
        factory.needs.rope = options.unrotated;
        factory.make = [options](const SelectorShape& shape,
                                 LayerIndex) -> Result<std::unique_ptr<Selector>> {
          if (options.unrotated) KVTIER_RETURN_IF_ERROR(KeyFrame::check(shape, "soft-vote"));
          return Result<std::unique_ptr<Selector>>(std::make_unique<SoftVote>(shape, options));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
