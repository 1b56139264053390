#pragma once

#include "selectors/box_tree.h"
#include "selectors/rank_blocks.h"
#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

/// A tiling of the context by nodes of a `BoxTree`, left to right: where a search begins, and what
/// it leaves for the next.
struct Frontier {
  struct Chunk {
    BoxTree::Node node = 0;
    std::uint32_t idle = 0;  ///< Questions since it was split off or chosen.
    friend bool operator==(const Chunk&, const Chunk&) = default;
  };
  std::vector<Chunk> chunks;  ///< Without nodes of sinks only.
  std::uint32_t leaves = 0;   ///< Tiled are leaves [0, leaves).
};

/// Finds the chunks with the largest bounds for one head group's queries, best first, looking at
/// few boxes: a node is opened when no other has a larger bound, and since children's bounds are
/// never larger than their parent's, leaves come out in the order of their bounds.
///
/// The bound of a node for a step is made of its bounds for each query and query head of the group.
/// Heads have unlike scales, so each is taken relative to a constant of the step: the log of the
/// mass that the coarse tiling of the context could have at most. Then, in logs (bounds are loose,
/// and their exponentials overflow): the largest under `kMax`, the log of the sum under `kSum`, and
/// under `kMean` the mean raw bound. Each grows with every single bound, so all are monotone.
///
/// Scratch memory is allocated when made. One thread at a time.
class BoxSearch {
 public:
  struct Options {
    /// Boxes that a question may look at, per leaf it wants; 0: no limit.
    std::uint32_t effort = 16;
    /// Boxes that every question may look at, however little it wants: as many as a flat pass over
    /// the leaves of 32K tokens, below which there is little to save.
    std::uint32_t least = 2048;
    /// Questions after which siblings that were not used become their parent again.
    std::uint32_t merge_after = 8;
  };
  struct Question {
    const SelectRequest& request;
    FarRegion region;
    std::uint32_t head_group = 0;
    std::uint32_t wanted_tokens = 0;
    /// Tokens to go on for behind them; what is wanted is found as if nothing more were asked for.
    std::uint32_t band_tokens = 0;
  };

  BoxSearch(const SelectorShape& shape, const BoxTree& tree, Options options);

  /// `start` may be null: the search then begins with a coarse tiling. `invalid_argument` when a
  /// bound overflows. The open leaf's box must have been written if the region reaches into it.
  Status run(const BoxTree& tree, const Question& question, const Frontier* start);

  /// Disjoint, best first, at least the tokens asked for (or all of the region); scores never rise.
  std::span<const RankedRange> best() const { return best_; }
  /// Where the next search may begin.
  const Frontier& frontier() const { return next_; }
  /// Boxes looked at, each once for all heads of the group.
  std::size_t touched() const { return touched_; }
  /// Whether the limit ended the search before the bounds did.
  bool stopped_early() const { return stopped_early_; }

 private:
  struct Item {
    float score = 0.0f;
    BoxTree::Node node = 0;
    std::uint32_t level = 0;
    std::uint32_t first_leaf = 0;
    std::uint32_t idle = 0;
  };
  static bool worse(const Item& a, const Item& b);

  void ask(const Question& question);
  void begin(const BoxTree& tree, const Frontier* start);
  void set_offsets(const BoxTree& tree);
  bool look_at(const BoxTree& tree, std::span<const BoxTree::Node> nodes);
  void reduce_bounds(std::size_t columns);
  bool search(const BoxTree& tree, const Question& question, std::uint64_t tokens,
              std::size_t limit);
  bool open(const BoxTree& tree, const Item& item);
  bool push(const BoxTree& tree, std::span<const BoxTree::Node> nodes, float at_most);
  void take(const BoxTree& tree, const Question& question, const Item& item);
  void take_what_was_found(const BoxTree& tree, const Question& question, std::uint64_t tokens);
  void leave_frontier(const BoxTree& tree, std::size_t limit);
  bool merge_siblings(const BoxTree& tree, std::uint32_t idle);

  SelectorShape shape_;
  Options options_;
  std::size_t rows_ = 0;  ///< Queries times query heads per KV head.
  std::uint32_t first_head_ = 0;
  std::vector<float> questions_;  ///< [KV heads of the group, rows, 2 head_dim]
  std::vector<float> logits_;     ///< [KV heads of the group, rows, batch]
  std::vector<float> offsets_;    ///< [KV heads of the group, rows]
  std::vector<float> bounds_;     ///< [batch]: of the nodes last looked at, reduced over the rows.
  std::vector<BoxTree::Node> nodes_;
  std::vector<Item> heap_;
  std::vector<Item> taken_;  ///< From the heap into the answer.
  /// To put tiles in order: a bit where one begins, and which it is.
  std::vector<std::uint64_t> begins_;
  std::vector<std::uint32_t> tile_at_;
  std::vector<RankedRange> best_;
  Frontier next_;
  std::uint32_t leaves_ = 0;  ///< Tiled ones of this question.
  std::uint32_t top_level_ = 0;
  std::uint64_t found_tokens_ = 0;
  std::size_t touched_ = 0;
  bool stopped_early_ = false;
};

}  // namespace kvtier
