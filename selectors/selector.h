#pragma once

#include "kernels/kv_view.h"
#include "kernels/merge_states.h"
#include "kernels/worker_pool.h"
#include "memory/ids.h"
#include "memory/status.h"
#include "selectors/selector_state.h"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <vector>

namespace kvtier {

/// How the query heads that share a KV head (and the queries of one step) become one score.
enum class GroupReduction : unsigned char {
  kMax,   ///< Largest softmax weight over the heads (ShadowKV).
  kSum,   ///< Sum of softmax weights (RetroInfer, TokenSelect): the mass that all heads put there.
  kMean,  ///< Mean of raw logits, no softmax (ArkVale).
};

/// How positions are rotated into the keys and queries that a selector sees: pair (i, i + dim/2) of
/// the first `rotated_dims` elements by position * theta^(-2i / rotated_dims), in radians.
struct RopeOptions {
  double theta = 0.0;              ///< 0: not known, so keys cannot be un-rotated.
  std::uint32_t rotated_dims = 0;  ///< 0: the whole head.
  bool known() const { return theta > 0.0; }
};

/// What a selector must know of the layer it selects for.
struct SelectorShape {
  DType dtype = DType::kF16;
  std::uint32_t kv_heads = 1;
  /// KV heads that share one selection: `BlockLayout::heads_per_block`.
  std::uint32_t heads_per_group = 1;
  std::uint32_t queries_per_kv_head = 1;
  std::uint32_t head_dim = 64;
  std::uint32_t value_dim = 64;
  std::uint32_t tokens_per_block = 8;
  /// First and last tokens of the context that are always attended; never selected, never ranked.
  std::uint32_t sinks = 4;
  std::uint32_t window = 64;
  SoftmaxOptions softmax;
  RopeOptions rope;
  GroupReduction reduction = GroupReduction::kSum;
  std::uint64_t seed = 0;
  /// Layers of the sequence that are selected for, this one included.
  std::uint32_t layers = 1;
  /// Most tokens the context can grow to: what `open` reserves for, so that steps allocate nothing.
  std::uint32_t tokens_max = 0;

  std::uint32_t head_groups() const { return kv_heads / heads_per_group; }
  std::uint32_t query_heads() const { return kv_heads * queries_per_kv_head; }
  friend bool operator==(const SelectorShape&, const SelectorShape&) = default;
};

/// What a selector needs beside the keys of all tokens. Whoever feeds it has that, or says by name
/// what is missing and does not start.
struct SelectorNeeds {
  bool values = false;           ///< `NewTokens::values`.
  bool prompt_queries = false;   ///< `observe_prompt`, before the first step.
  bool sentence_ends = false;    ///< Marks in `NewTokens::marks`.
  bool landmark_tokens = false;  ///< Marks of trained landmark tokens.
  bool rope = false;             ///< `SelectorShape::rope`, to un-rotate keys and queries.
  bool external_scores = false;  ///< `SelectRequest::external`.
};

/// What is known of a token besides its keys and values; bits of `NewTokens::marks`.
inline constexpr std::uint8_t kEndsSentence = 1;
inline constexpr std::uint8_t kIsLandmark = 2;

/// Consecutive new tokens of one layer, as the model attends them (keys after RoPE). View.
struct NewTokens {
  std::uint32_t first_position = 0;
  std::uint32_t tokens = 0;
  /// Key of token t, KV head h: keys + t * key_token_stride + h * key_head_stride (bytes).
  const std::byte* keys = nullptr;
  std::size_t key_token_stride = 0;
  std::size_t key_head_stride = 0;
  /// Likewise; null for selectors that do not need values.
  const std::byte* values = nullptr;
  std::size_t value_token_stride = 0;
  std::size_t value_head_stride = 0;
  /// [tokens], or null: no token has a mark.
  const std::uint8_t* marks = nullptr;
};

/// Queries of prompt tokens. View; queries are float32 after RoPE, positions ascend.
struct PromptQueries {
  const float* queries = nullptr;  ///< [positions.size(), query_heads, head_dim]
  std::size_t query_stride = 0;    ///< Elements from one query to the next.
  std::span<const std::uint32_t> positions;
};

/// Scores that somebody else has computed (an indexer of the model, a draft's attention).
struct ExternalScores {
  /// [head groups, tokens]: score of each token from position 0; larger is better. Null: none.
  const float* scores = nullptr;
  std::size_t group_stride = 0;  ///< 0 when all head groups share one row.
  std::uint32_t tokens = 0;      ///< Tokens behind it score lowest.
};

/// One step's question.
struct SelectRequest {
  /// [query_count, query_heads, head_dim], float32, after RoPE.
  const float* queries = nullptr;
  std::size_t query_stride = 0;  ///< Elements from one query to the next.
  std::uint32_t query_count = 1;
  /// Position of the first query; the others follow it token by token.
  std::uint32_t first_position = 0;
  /// Tokens attended per head group, sinks and window included.
  std::uint32_t budget_tokens = 0;
  /// How many tokens beyond the budget the ranking goes on: candidates for look-ahead.
  std::uint32_t band_tokens = 0;
  ExternalScores external;
  /// What the selectors of all layers of this sequence last answered to `demand`, this layer's
  /// included, in order of layer; empty when the caller does not share a budget between layers.
  /// All layers of one token are given the same. A selector that shares may then take up to twice
  /// `budget_tokens` in one layer, as long as the layers together keep to the sum of theirs.
  std::span<const float> layer_demands;
  std::uint32_t layer = 0;  ///< Index into `layer_demands`.
};

/// The tokens that are ranked: behind the sinks, before the window of the step's first query.
/// A block that straddles an edge takes part with the tokens inside.
struct FarRegion {
  std::uint32_t begin = 0;
  std::uint32_t end = 0;  ///< At least `begin`.

  static FarRegion of(const SelectorShape& shape, std::uint32_t first_position);
  std::uint32_t tokens() const { return end - begin; }
};

/// A selected piece: tokens of one block.
struct SelectedUnit {
  BlockIndex block;
  std::uint32_t first_token = 0;  ///< Within the block.
  std::uint32_t tokens = 0;
  float score = 0.0f;

  friend bool operator==(const SelectedUnit&, const SelectedUnit&) = default;
};

/// The answer for one head group: units best first, each token at most once (each block at most
/// once, but for families that say `partial_blocks`).
struct GroupSelection {
  std::vector<SelectedUnit> ranked;
  /// ranked[0, chosen) are within the budget; the rest is the band below the cut.
  std::uint32_t chosen = 0;
  /// ranked[0, held) are wanted at every step and stay on the device (outliers).
  std::uint32_t held = 0;
  /// When scores estimate attention mass: the sum of the scores of all far blocks, ranked or not.
  /// 0 when they are something else (a bound, a cosine, a position).
  float mass = 0.0f;
};

/// Keys of tokens of one block, and where they are wanted.
struct WantedKeys {
  std::uint32_t head_group = 0;
  BlockIndex block;
  std::uint32_t first_token = 0;  ///< Within the block.
  std::uint32_t tokens = 0;
  /// Laid out as the keys of a block: [heads_per_group, tokens_per_block, head_dim] in the shape's
  /// type; rows of other tokens are left alone.
  std::byte* target = nullptr;
};

/// Decides which blocks one layer of one sequence must attend. Decisions only: no I/O, no clock;
/// the same calls give the same answers.
///
/// One selector per (sequence, layer); one thread at a time. `append` may allocate until
/// `SelectorShape::tokens_max` is reached if the implementation says so; `select` allocates in its
/// first call, and when a step has more queries than any step before.
class Selector {
 public:
  virtual ~Selector() = default;

  // --- What the context is.

  /// Takes note of new tokens. `first_position` is the number of tokens seen so far.
  /// Any chunking of the same tokens leads to the same state.
  virtual void append(const NewTokens& tokens) = 0;

  /// Takes note of what prompt tokens looked for: all queries of a position at once, positions
  /// ascending over the calls, each after its token was appended. Optional for every selector that
  /// does not list `prompt_queries` among its needs.
  virtual void observe_prompt(const PromptQueries& queries) { (void)queries; }

  /// Forgets every token at or behind `position`, as if never appended (nor asked about, for
  /// selectors that learn from questions). `position` is one that `truncate_floor` returns
  /// unchanged.
  virtual void truncate(std::uint32_t position) = 0;

  /// Where a cut at `position` must really be made, at or before it: a selector that keeps one
  /// vector for several tokens cannot take some of them back. The caller truncates there and
  /// appends the tokens [floor, position) again, which it has in its blocks:
  ///   `floor = s.truncate_floor(p); s.truncate(floor); if (floor < p) s.append([floor, p));`
  /// The newest tokens are kept as they came, so that a rejected draft needs none again: after a
  /// window of appends, the floor of a cut within the window is `position` itself.
  virtual std::uint32_t truncate_floor(std::uint32_t position) const { return position; }

  // --- What a step needs.

  /// Ranks blocks for the step's queries into `selection`, one entry per head group. Never chooses
  /// more tokens of a group than the budget leaves beside sinks and the windows of all queries;
  /// chooses to within one block of it when enough tokens are there. `invalid_argument` when a
  /// query is not finite or the budget does not cover sinks and window.
  virtual Status select(const SelectRequest& request, std::span<GroupSelection> selection,
                        WorkerPool& pool) = 0;

  /// Ranks for queries that are only guessed, for look-ahead: like `select`, but what a selector
  /// learns from questions stays as it was, and `estimate_rest` must not follow it.
  virtual Status hint(const SelectRequest& request, std::span<GroupSelection> selection,
                      WorkerPool& pool) {
    return select(request, selection, pool);
  }

  /// Whether `estimate_rest` knows anything.
  virtual bool estimates_rest() const { return false; }

  /// Attention of the step's queries over the far tokens that `selection` does not choose,
  /// estimated from what is kept of them: `target` is [query_count * query_heads] rows, a partial
  /// state to be merged with attention over the chosen tokens. Follows the `select` that answered
  /// `request` with `selection`. Writes empty states when nothing is left over.
  virtual Status estimate_rest(const SelectRequest& request,
                               std::span<const GroupSelection> selection, StatesView target,
                               WorkerPool& pool);

  /// Whether the keys of what is chosen are to be read from what is kept of them (`read_keys`), so
  /// that of the chosen blocks only the values need to move.
  virtual bool keeps_keys() const { return false; }

  /// Writes the keys of tokens that were appended as they are kept: near the appended ones, and a
  /// function of the tokens alone. Only of a selector that `keeps_keys`. Several threads may read
  /// at once, into different targets.
  virtual void read_keys(const WantedKeys& wanted) const;

  /// How much of a shared budget this layer would like, after the last `select`: relative to the
  /// other layers, larger is more; not a number for selectors that have no opinion.
  virtual float demand() const { return std::numeric_limits<float>::quiet_NaN(); }

  // --- The whole state.

  /// An independent selector in the same state: another beam, another continuation.
  virtual std::unique_ptr<Selector> fork() const = 0;

  /// Everything a selector of the same name and shape needs to go on as this one would.
  /// `restore` is called on a fresh selector; `corrupt` when the bytes are not such a state, after
  /// which the selector must be thrown away.
  virtual void save(StateWriter& writer) const = 0;
  virtual Status restore(StateReader& reader) = 0;

  /// Bytes of what is kept for the tokens seen, and of fixed state: what a GPU would have to hold.
  virtual std::size_t metadata_bytes() const = 0;
};

/// After a beam step: beam i goes on where beam `parents[i]` stood. Moves where a parent has one
/// child, forks where it has more.
void reorder_selectors(std::vector<std::unique_ptr<Selector>>& beams,
                       std::span<const std::uint32_t> parents);

}  // namespace kvtier
