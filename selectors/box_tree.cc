#include "selectors/box_tree.h"

#include "kernels/score_bounds.h"
#include "memory/dtype.h"

#include <limits>

namespace kvtier {
namespace {

/// Where each level's nodes begin, and their number at the end.
std::vector<BoxTree::Node> level_starts(std::uint32_t leaves_max) {
  std::vector<BoxTree::Node> starts = {0};
  for (std::uint32_t nodes = leaves_max; nodes > 0; nodes /= BoxTree::kChildren) {
    starts.push_back(starts.back() + nodes);
  }
  return starts;
}

}  // namespace

BoxTree::BoxTree(const SelectorShape& shape, std::uint32_t leaf_tokens)
    : shape_(shape),
      box_bytes_(2 * shape.head_dim * size_of(shape.dtype)),
      recent_(shape, leaf_tokens),
      first_of_level_(level_starts(recent_.groups_max())),
      boxes_(std::size_t{shape.kv_heads} * nodes_max() * box_bytes_) {}

void BoxTree::append(const NewTokens& tokens) {
  recent_.append(tokens, [this](std::uint32_t leaf) { close_leaf(leaf); });
}

void BoxTree::box_leaf(std::uint32_t head, std::uint32_t leaf) {
  const RowsView keys = recent_.keys_of(head, leaf);
  std::byte* box = boxes_.data() + offset(head, leaf);
  if (keys.rows > 0) return box_rows(keys, static_cast<std::uint32_t>(keys.rows), box);
  // Sinks only: the box of nothing, which adds nothing to its parent's.
  for (std::uint32_t i = 0; i < shape_.head_dim; ++i) {
    store_element(box, shape_.dtype, i, -std::numeric_limits<float>::infinity());
    store_element(box, shape_.dtype, shape_.head_dim + i, std::numeric_limits<float>::infinity());
  }
}

void BoxTree::close_leaf(std::uint32_t leaf) {
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    box_leaf(head, leaf);
    std::uint32_t nodes = leaf + 1;
    for (std::uint32_t level = 1; nodes % kChildren == 0; ++level) {
      const Node first_child = node(level - 1, nodes - kChildren);
      nodes /= kChildren;
      join_boxes({boxes_.data() + offset(head, first_child), kChildren, 2 * shape_.head_dim,
                  box_bytes_, shape_.dtype},
                 boxes_.data() + offset(head, node(level, nodes - 1)));
    }
  }
}

void BoxTree::box_open_leaf() {
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) box_leaf(head, closed_leaves());
}

std::uint32_t BoxTree::level_of(Node node) const {
  std::uint32_t level = 0;
  while (node >= first_of_level_[level + 1]) ++level;
  return level;
}

void BoxTree::tile(std::uint32_t begin, std::uint32_t end, std::uint32_t level,
                   std::vector<Node>& nodes) const {
  nodes.clear();
  while (begin < end) {
    std::uint32_t l = level;
    while (l > 0 && (begin % (1u << 2 * l) != 0 || begin + (1u << 2 * l) > end)) --l;
    const Node next = node(l, begin >> 2 * l);
    if (!empty(next)) nodes.push_back(next);
    begin += 1u << 2 * l;
  }
}

RowsView BoxTree::boxes(std::uint32_t head) const {
  return {boxes_.data() + offset(head, 0), nodes_max(), 2 * shape_.head_dim, box_bytes_,
          shape_.dtype};
}

void BoxTree::save(StateWriter& writer) const {
  recent_.save(writer);
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    for (std::uint32_t level = 0; level < levels(); ++level) {
      writer.put_array(
          boxes_.part(offset(head, node(level, 0)), (closed_leaves() >> 2 * level) * box_bytes_));
    }
  }
}

Status BoxTree::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(recent_.restore(reader));
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    for (std::uint32_t level = 0; level < levels(); ++level) {
      KVTIER_RETURN_IF_ERROR(reader.get_exactly(
          boxes_.part(offset(head, node(level, 0)), (closed_leaves() >> 2 * level) * box_bytes_)));
    }
  }
  return {};
}

std::size_t BoxTree::metadata_bytes() const {
  std::size_t nodes = 0;
  for (std::uint32_t level = 0; level < levels(); ++level) nodes += closed_leaves() >> 2 * level;
  return nodes * shape_.kv_heads * box_bytes_ + recent_.metadata_bytes();
}

}  // namespace kvtier
