#include "selectors/box_search.h"

#include "kernels/partial_attention.h"
#include "kernels/score_bounds.h"
#include "kernels/score_rows.h"
#include "selectors/step_logits.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace kvtier {
namespace {

/// Boxes scored at once: their logits stay in the cache.
constexpr std::size_t kBoxBatch = 256;
/// Nodes of the coarse tiling that a search without a frontier begins with: few against the leaves
/// of a long context, enough to tell heads of unlike scale apart.
constexpr std::uint32_t kCoarseNodes = 64;

}  // namespace

BoxSearch::BoxSearch(const SelectorShape& shape, const BoxTree& tree, Options options)
    : shape_(shape), options_(options) {
  const std::size_t rows_max = std::size_t{kMaxStepQueries} * shape.queries_per_kv_head;
  const std::size_t heads = shape.heads_per_group;
  questions_.resize(heads * rows_max * 2 * shape.head_dim);
  logits_.resize(heads * rows_max * kBoxBatch);
  offsets_.resize(heads * rows_max);
  bounds_.resize(kBoxBatch);
  begins_.resize(tree.leaves_max() / 64 + 1);
  tile_at_.resize(tree.leaves_max() + 1);
  nodes_.reserve(tree.leaves_max());
  heap_.reserve(tree.nodes_max());
  taken_.reserve(tree.nodes_max());
  best_.reserve(tree.leaves_max() + 1);
  next_.chunks.reserve(tree.leaves_max());
}

/// Order of the heap. Among equals an inner node goes first, so that a leaf inside it still finds
/// its place, then the earlier one.
bool BoxSearch::worse(const Item& a, const Item& b) {
  if (a.score != b.score) return a.score < b.score;
  if (a.level != b.level) return a.level < b.level;
  return a.first_leaf > b.first_leaf;
}

Status BoxSearch::run(const BoxTree& tree, const Question& question, const Frontier* start) {
  best_.clear();
  heap_.clear();
  taken_.clear();
  next_.chunks.clear();
  found_tokens_ = 0;
  touched_ = 0;
  stopped_early_ = false;
  ask(question);
  const auto overflow = [&question] {
    return invalid_argument(
        fmt::format("chunk-tree: bounds of head group {} at position {} overflow float32",
                    question.head_group, question.request.first_position));
  };
  // What may be looked at for so many tokens.
  const auto limit_for = [&](std::size_t tokens) {
    const std::size_t wanted = (tokens + tree.leaf_tokens() - 1) / tree.leaf_tokens();
    return options_.effort == 0 ? std::numeric_limits<std::size_t>::max()
                                : std::max<std::size_t>(options_.least, options_.effort * wanted);
  };
  leaves_ = std::min((question.region.end - 1) / tree.leaf_tokens() + 1, tree.closed_leaves());
  top_level_ = 0;
  while (leaves_ >> 2 * top_level_ > kCoarseNodes) ++top_level_;
  tree.tile(0, leaves_, top_level_, nodes_);
  if (!look_at(tree, nodes_)) return overflow();
  begin(tree, start);
  if (!push(tree, nodes_, std::numeric_limits<float>::infinity())) return overflow();
  for (std::size_t i = 0; i < next_.chunks.size(); ++i) heap_[i].idle = next_.chunks[i].idle + 1;
  const BoxTree::Node open_leaf = tree.node(0, tree.closed_leaves());
  if (question.region.end > tree.closed_leaves() * tree.leaf_tokens() &&
      !push(tree, std::span(&open_leaf, 1), std::numeric_limits<float>::infinity())) {
    return overflow();
  }
  next_.chunks.clear();
  std::ranges::make_heap(heap_, worse);
  const std::size_t wanted = question.wanted_tokens;
  const std::size_t all = wanted + question.band_tokens;
  if (!search(tree, question, wanted, limit_for(wanted)) ||
      !search(tree, question, all, limit_for(all))) {
    return overflow();
  }
  leave_frontier(tree, limit_for(wanted) / 2);
  return {};
}

/// Takes leaves, best first, until so many tokens are found. False when a bound overflows.
bool BoxSearch::search(const BoxTree& tree, const Question& question, std::uint64_t tokens,
                       std::size_t limit) {
  while (!stopped_early_ && !heap_.empty() && found_tokens_ < tokens) {
    if (heap_.front().level > 0 && touched_ + BoxTree::kChildren > limit) {
      stopped_early_ = true;
      break;
    }
    std::ranges::pop_heap(heap_, worse);
    const Item item = heap_.back();
    heap_.pop_back();
    if (item.level == 0) {
      take(tree, question, item);
    } else if (!open(tree, item)) {
      return false;
    }
  }
  if (stopped_early_) take_what_was_found(tree, question, tokens);
  return true;
}

/// Packs the questions of the group's heads, each split by sign.
void BoxSearch::ask(const Question& question) {
  const std::size_t dim = shape_.head_dim;
  first_head_ = question.head_group * shape_.heads_per_group;
  rows_ = std::size_t{question.request.query_count} * shape_.queries_per_kv_head;
  float* target = questions_.data();
  for (std::size_t head = 0; head < shape_.heads_per_group; ++head) {
    for (std::uint32_t q = 0; q < question.request.query_count; ++q) {
      const float* source = question.request.queries + q * question.request.query_stride +
                            (first_head_ + head) * shape_.queries_per_kv_head * dim;
      for (std::uint32_t h = 0; h < shape_.queries_per_kv_head; ++h) {
        split_by_sign(std::span(source + h * dim, dim), 1.0f, target);
        target += 2 * dim;
      }
    }
  }
}

/// Leaves the tiling to begin with in `next_` and its nodes in `nodes_`.
void BoxSearch::begin(const BoxTree& tree, const Frontier* start) {
  set_offsets(tree);
  if (start != nullptr && start->leaves <= leaves_ && leaves_ - start->leaves <= kCoarseNodes) {
    next_.chunks.assign(start->chunks.begin(), start->chunks.end());
    for (std::uint32_t leaf = start->leaves; leaf < leaves_; ++leaf) {
      if (!tree.empty(tree.node(0, leaf))) next_.chunks.push_back({tree.node(0, leaf), 0});
    }
    nodes_.clear();
    for (const Frontier::Chunk& chunk : next_.chunks) nodes_.push_back(chunk.node);
  } else {
    for (BoxTree::Node node : nodes_) next_.chunks.push_back({node, 0});
  }
}

/// offsets = log sum over the coarse tiling of tokens * exp(bound): at least the log of the mass.
void BoxSearch::set_offsets(const BoxTree& tree) {
  const std::size_t rows = rows_ * shape_.heads_per_group;
  std::fill_n(offsets_.begin(), rows, 0.0f);
  if (shape_.reduction == GroupReduction::kMean || nodes_.empty()) return;
  for (std::size_t row = 0; row < rows; ++row) {
    const float* bounds = logits_.data() + row * kBoxBatch;
    double top = -std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < nodes_.size(); ++i) top = std::max(top, double{bounds[i]});
    double sum = 0.0;
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      const std::uint32_t leaves = tree.end_leaf(nodes_[i]) - tree.first_leaf(nodes_[i]);
      sum += static_cast<double>(leaves) * std::exp(double{bounds[i]} - top);
    }
    offsets_[row] = static_cast<float>(top + std::log(sum * tree.leaf_tokens()));
  }
}

/// Bounds of up to `kBoxBatch` nodes for every query of the group into `logits_`.
bool BoxSearch::look_at(const BoxTree& tree, std::span<const BoxTree::Node> nodes) {
  if (nodes.empty()) return true;
  KVTIER_CHECK(nodes.size() <= kBoxBatch, "{} boxes at once", nodes.size());
  touched_ += nodes.size();
  bool finite = true;
  for (std::size_t head = 0; head < shape_.heads_per_group; ++head) {
    float* logits = logits_.data() + head * rows_ * kBoxBatch;
    const ScoreTask task = {.rows = tree.boxes(first_head_ + static_cast<std::uint32_t>(head)),
                            .queries = questions_.data() + head * rows_ * 2 * shape_.head_dim,
                            .query_stride = std::size_t{2} * shape_.head_dim,
                            .query_count = static_cast<std::uint32_t>(rows_),
                            .logits = logits,
                            .logit_stride = kBoxBatch,
                            .listed = nodes};
    const Status status = score_rows(shape_.softmax, task);
    KVTIER_CHECK(status.ok(), "{}", status.to_string());
    for (std::size_t row = 0; row < rows_; ++row) {
      finite = all_finite({logits + row * kBoxBatch, nodes.size()}) && finite;
    }
  }
  return finite;
}

/// One bound for each of the first columns of `logits_`.
void BoxSearch::reduce_bounds(std::size_t columns) {
  const std::size_t rows = rows_ * shape_.heads_per_group;
  const std::span bounds(bounds_.data(), columns);
  if (shape_.reduction == GroupReduction::kSum) {
    return log_sum_exp_columns(logits_.data(), kBoxBatch, std::span(offsets_).first(rows), bounds);
  }
  for (std::size_t column = 0; column < columns; ++column) {
    double top = -std::numeric_limits<double>::infinity();
    double sum = 0.0;
    for (std::size_t row = 0; row < rows; ++row) {
      const double bound = double{logits_[row * kBoxBatch + column]} - double{offsets_[row]};
      top = std::max(top, bound);
      sum += bound;
    }
    bounds[column] = static_cast<float>(
        shape_.reduction == GroupReduction::kMax ? top : sum / static_cast<double>(rows));
  }
}

/// Scores nodes and puts them behind the heap's array, in order.
bool BoxSearch::push(const BoxTree& tree, std::span<const BoxTree::Node> nodes, float at_most) {
  while (!nodes.empty()) {
    const std::span batch = nodes.first(std::min(nodes.size(), kBoxBatch));
    if (!look_at(tree, batch)) return false;
    reduce_bounds(batch.size());
    for (std::size_t i = 0; i < batch.size(); ++i) {
      // Dots are monotone to the bit; exp() and log() are so only nearly.
      const float score = std::min(bounds_[i], at_most);
      if (!std::isfinite(score)) return false;
      heap_.push_back({score, batch[i], tree.level_of(batch[i]), tree.first_leaf(batch[i]), 0});
    }
    nodes = nodes.subspan(batch.size());
  }
  return true;
}

bool BoxSearch::open(const BoxTree& tree, const Item& item) {
  BoxTree::Node children[BoxTree::kChildren];
  std::size_t count = 0;
  const std::uint32_t first = tree.index_of(item.node) * BoxTree::kChildren;
  for (std::uint32_t i = 0; i < BoxTree::kChildren; ++i) {
    const BoxTree::Node child = tree.node(item.level - 1, first + i);
    if (!tree.empty(child)) children[count++] = child;
  }
  const std::size_t before = heap_.size();
  if (!push(tree, std::span(children, count), item.score)) return false;
  for (std::size_t size = before + 1; size <= heap_.size(); ++size) {
    std::push_heap(heap_.begin(), heap_.begin() + static_cast<std::ptrdiff_t>(size), worse);
  }
  return true;
}

/// Its tokens in the region come next in the answer.
void BoxSearch::take(const BoxTree& tree, const Question& question, const Item& item) {
  const std::uint32_t per_leaf = tree.leaf_tokens();
  const std::uint32_t begin = std::max(item.first_leaf * per_leaf, question.region.begin);
  const std::uint32_t end = std::min(tree.end_leaf(item.node) * per_leaf, question.region.end);
  if (begin < end) {
    const float last = best_.empty() ? item.score : best_.back().score;
    best_.push_back({begin, end, std::min(item.score, last)});
    found_tokens_ += end - begin;
  }
  taken_.push_back(item);
  if (item.level == 0) taken_.back().idle = 0;
}

/// The limit is reached: leaves that were looked at come before chunks that were not opened, since
/// a large box's bound says the least.
void BoxSearch::take_what_was_found(const BoxTree& tree, const Question& question,
                                    std::uint64_t tokens) {
  const auto later = [](const Item& a, const Item& b) {
    const bool a_leaf = a.level == 0;
    const bool b_leaf = b.level == 0;
    return a_leaf != b_leaf ? b_leaf : worse(a, b);
  };
  std::ranges::make_heap(heap_, later);
  while (!heap_.empty() && found_tokens_ < tokens) {
    std::ranges::pop_heap(heap_, later);
    take(tree, question, heap_.back());
    heap_.pop_back();
  }
}

/// What was chosen and what is left in the heap tile the context.
void BoxSearch::leave_frontier(const BoxTree& tree, std::size_t limit) {
  heap_.insert(heap_.end(), taken_.begin(), taken_.end());
  // From left to right without sorting: a bit for every leaf that a tile begins at.
  std::ranges::fill(begins_, 0);
  for (std::uint32_t i = 0; i < heap_.size(); ++i) {
    const std::uint32_t leaf = heap_[i].first_leaf;
    // The open leaf joins the tiling when it closes.
    if (leaf >= leaves_) continue;
    begins_[leaf / 64] |= std::uint64_t{1} << leaf % 64;
    tile_at_[leaf] = i;
  }
  for (std::uint32_t word = 0; word < begins_.size(); ++word) {
    for (std::uint64_t left = begins_[word]; left != 0; left &= left - 1) {
      const std::uint32_t leaf = word * 64 + static_cast<std::uint32_t>(std::countr_zero(left));
      const Item& item = heap_[tile_at_[leaf]];
      next_.chunks.push_back({item.node, item.idle});
    }
  }
  next_.leaves = leaves_;
  merge_siblings(tree, options_.merge_after);
  // A tiling as large as the limit would leave nothing to look at anything else.
  for (std::uint32_t idle : {1u, 0u}) {
    while (next_.chunks.size() > limit && merge_siblings(tree, idle)) {
    }
  }
}

/// Puts parents in the place of siblings of which each has been idle so long. False if none were.
bool BoxSearch::merge_siblings(const BoxTree& tree, std::uint32_t idle) {
  std::vector<Frontier::Chunk>& chunks = next_.chunks;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < chunks.size();) {
    const BoxTree::Node node = chunks[i].node;
    const std::uint32_t level = tree.level_of(node);
    const std::uint32_t index = tree.index_of(node);
    bool merges = level < top_level_ && index % BoxTree::kChildren == 0 &&
                  i + BoxTree::kChildren <= chunks.size();
    for (std::uint32_t j = 0; merges && j < BoxTree::kChildren; ++j) {
      merges = chunks[i + j].node == node + j && chunks[i + j].idle >= idle;
    }
    chunks[kept++] =
        merges ? Frontier::Chunk{tree.node(level + 1, index / BoxTree::kChildren), 0} : chunks[i];
    i += merges ? BoxTree::kChildren : 1;
  }
  const bool merged = kept < chunks.size();
  chunks.resize(kept);
  return merged;
}

}  // namespace kvtier
