#pragma once

#include "kernels/kv_view.h"
#include "selectors/recent_keys.h"
#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvtier {

/// The boxes around the keys of one layer's chunks, in a tree: leaves are groups of consecutive
/// tokens, a node of level l is the four nodes of level l - 1 below it, and its box (largest and
/// smallest element per channel, `score_bounds.h`) is the smallest around theirs. So no node's
/// bound is below that of a node inside it.
///
/// Boxes lie by themselves, all nodes of a KV head in one array, never among keys and values:
/// chunks on disk are judged without reading them. Only complete nodes exist; the open leaf's box
/// is written on request. Leaves leave the sinks out; nodes of sinks only are `empty` and must not
/// be scored.
///
/// Everything is allocated when made. One thread at a time; reading from several is fine.
class BoxTree {
 public:
  /// A node's number: the row of its box.
  using Node = std::uint32_t;
  static constexpr std::uint32_t kChildren = 4;

  BoxTree(const SelectorShape& shape, std::uint32_t leaf_tokens);

  void append(const NewTokens& tokens);
  void truncate(std::uint32_t position) { recent_.truncate(position); }
  std::uint32_t truncate_floor(std::uint32_t position) const {
    return recent_.truncate_floor(position);
  }
  void save(StateWriter& writer) const;
  Status restore(StateReader& reader);
  /// Writes the box of the open leaf as far as it has come, as node `leaf(closed_leaves())`.
  void box_open_leaf();

  std::uint32_t tokens() const { return recent_.tokens(); }
  std::uint32_t leaf_tokens() const { return recent_.group_tokens(); }
  std::uint32_t closed_leaves() const { return recent_.closed(); }
  std::uint32_t leaves_max() const { return recent_.groups_max(); }
  std::uint32_t nodes_max() const { return first_of_level_.back(); }
  std::uint32_t levels() const { return static_cast<std::uint32_t>(first_of_level_.size()) - 1; }

  Node node(std::uint32_t level, std::uint32_t index) const {
    return first_of_level_[level] + index;
  }
  std::uint32_t level_of(Node node) const;
  std::uint32_t index_of(Node node) const { return node - first_of_level_[level_of(node)]; }
  std::uint32_t first_leaf(Node node) const { return index_of(node) << 2 * level_of(node); }
  /// The first leaf behind the node.
  std::uint32_t end_leaf(Node node) const { return (index_of(node) + 1) << 2 * level_of(node); }
  bool empty(Node node) const {
    return std::uint64_t{end_leaf(node)} * leaf_tokens() <= shape_.sinks;
  }

  /// The nodes that tile leaves [begin, end), left to right, none above `level`; without empty
  /// ones.
  void tile(std::uint32_t begin, std::uint32_t end, std::uint32_t level,
            std::vector<Node>& nodes) const;

  /// Boxes of all nodes of a KV head, by node: rows of 2 head_dim.
  RowsView boxes(std::uint32_t head) const;
  std::size_t metadata_bytes() const;

 private:
  void close_leaf(std::uint32_t leaf);
  void box_leaf(std::uint32_t head, std::uint32_t leaf);
  std::size_t offset(std::uint32_t head, Node node) const {
    return (std::size_t{head} * nodes_max() + node) * box_bytes_;
  }

  SelectorShape shape_;
  std::size_t box_bytes_;
  RecentKeys recent_;
  std::vector<Node> first_of_level_;  ///< And the number of nodes at the end.
  FixedArray<std::byte> boxes_;       ///< [KV heads, nodes_max, 2 head_dim]
};

}  // namespace kvtier
