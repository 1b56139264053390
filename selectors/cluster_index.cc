#include "selectors/cluster_index.h"

#include "kernels/cluster_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace kvtier {

ClusterIndex::ClusterIndex(const SelectorShape& shape, ClusterIndexOptions options)
    : shape_(shape),
      options_(options),
      clusters_((options.segment_tokens + options.cluster_tokens - 1) / options.cluster_tokens),
      segments_max_(shape.tokens_max / options.segment_tokens),
      tokens_(shape.tokens_max),
      recent_keep_((shape.window + options.segment_tokens - 1) / options.segment_tokens *
                   options.segment_tokens),
      recent_capacity_(recent_keep_ + options.segment_tokens),
      ends_(std::size_t{shape.head_groups()} * segments_max_ * clusters_),
      members_(std::size_t{shape.head_groups()} * segments_max_ * options.segment_tokens),
      table_stride_((clusters_ + kCentroidMultiple - 1) / kCentroidMultiple * kCentroidMultiple) {
  const auto make_rows = [&](Rows& rows, std::uint32_t dim) {
    rows.dim = dim;
    rows.head_bytes = dim * size_of(shape.dtype);
    rows.group_bytes = shape.heads_per_group * rows.head_bytes;
    rows.means =
        FixedArray<std::byte>(std::size_t{shape.head_groups()} * clusters_max() * rows.group_bytes);
    rows.recent = FixedArray<std::byte>(std::size_t{shape.head_groups()} * recent_capacity_ *
                                        rows.group_bytes);
  };
  make_rows(keys_, shape.head_dim);
  if (options.values) make_rows(values_, shape.value_dim);
  const std::size_t key_dim = std::size_t{shape.heads_per_group} * shape.head_dim;
  const std::size_t value_dim = std::size_t{shape.heads_per_group} * shape.value_dim;
  table_.resize(key_dim * table_stride_);
  bias_.resize(table_stride_);
  sums_.resize(clusters_ * std::max(key_dim, options.values ? value_dim : 0));
  mean_.resize(key_dim);
  labels_.resize(options.segment_tokens);
  labels_before_.resize(options.segment_tokens);
  counts_.resize(clusters_);
}

void ClusterIndex::append(const NewTokens& tokens) {
  tokens_.append(tokens);
  const std::uint32_t end = tokens_.count();
  // In pieces that end where a segment does, so that it closes at the same moment whatever the
  // chunking, and its keys are then all there.
  for (std::uint32_t t = tokens.first_position; t < end;) {
    const std::uint32_t piece = std::min(end, open_begin() + options_.segment_tokens) - t;
    const std::size_t row = t - tokens.first_position;
    keep(keys_, tokens.keys + row * tokens.key_token_stride, tokens.key_token_stride,
         tokens.key_head_stride, t, piece);
    if (options_.values) {
      KVTIER_CHECK(tokens.values != nullptr, "tokens from {} without values",
                   tokens.first_position);
      keep(values_, tokens.values + row * tokens.value_token_stride, tokens.value_token_stride,
           tokens.value_head_stride, t, piece);
    }
    t += piece;
    if (t == open_begin() + options_.segment_tokens) close_segment();
  }
}

void ClusterIndex::keep(Rows& rows, const std::byte* from, std::size_t token_stride,
                        std::size_t head_stride, std::uint32_t first, std::uint32_t count) {
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    const std::uint32_t group = head / shape_.heads_per_group;
    const std::byte* source = from + head * head_stride;
    std::byte* target =
        rows.recent.data() +
        (std::size_t{group} * recent_capacity_ + (first - recent_begin_)) * rows.group_bytes +
        head % shape_.heads_per_group * rows.head_bytes;
    for (std::uint32_t t = 0; t < count; ++t) {
      std::memcpy(target + t * rows.group_bytes, source + t * token_stride, rows.head_bytes);
    }
  }
}

void ClusterIndex::drop_oldest(Rows& rows, std::uint32_t dropped) {
  if (rows.recent.size() == 0) return;
  const std::size_t kept = open_begin() - recent_begin_ - dropped;
  for (std::uint32_t group = 0; group < shape_.head_groups(); ++group) {
    std::byte* first =
        rows.recent.data() + std::size_t{group} * recent_capacity_ * rows.group_bytes;
    std::memmove(first, first + dropped * rows.group_bytes, kept * rows.group_bytes);
  }
}

void ClusterIndex::close_segment() {
  const std::uint32_t begin = open_begin();
  const std::uint32_t end = begin + options_.segment_tokens;
  const std::uint32_t first = std::clamp(shape_.sinks, begin, end);
  for (std::uint32_t group = 0; group < shape_.head_groups(); ++group) {
    cluster_group(group, first, end);
  }
  ++closed_;
  const std::uint32_t keep_from = end - std::min(end, recent_keep_);
  if (keep_from > recent_begin_) {
    drop_oldest(keys_, keep_from - recent_begin_);
    drop_oldest(values_, keep_from - recent_begin_);
    recent_begin_ = keep_from;
  }
}

void ClusterIndex::cluster_group(std::uint32_t group, std::uint32_t first, std::uint32_t end) {
  const RowsView keys = group_rows(keys_, group, first, end);
  const std::span labels(labels_.data(), keys.rows);
  const std::span before(labels_before_.data(), keys.rows);
  place_first_centroids(keys);
  const auto used = static_cast<std::uint32_t>((keys.rows + options_.cluster_tokens - 1) /
                                               options_.cluster_tokens);
  for (std::uint32_t i = 0; i < options_.iterations; ++i) {
    if (i > 0) move_centroids(keys);
    std::ranges::copy(labels, before.begin());
    assign_rows(keys, {table_.data(), bias_.data(), used, table_stride_}, labels);
    // The same clusters have the same centroids: nothing would ever change again.
    if (i > 0 && std::ranges::equal(labels, before)) break;
  }
  list_members(group, first);
  store_means(keys_, keys, group);
  if (options_.values) store_means(values_, group_rows(values_, group, first, end), group);
}

/// Centroids start at evenly spaced tokens (as RetroInfer's do).
void ClusterIndex::place_first_centroids(const RowsView& keys) {
  const std::size_t dim = mean_.size();
  std::ranges::fill(labels_, std::uint16_t{0});
  std::ranges::fill(mean_, 0.0f);
  add_rows_by_label(keys, labels_, mean_.data());
  for (float& value : mean_) value /= static_cast<float>(std::max<std::size_t>(1, keys.rows));
  std::ranges::fill(table_, 0.0f);
  std::ranges::fill(bias_, std::numeric_limits<float>::lowest());
  const std::size_t used = (keys.rows + options_.cluster_tokens - 1) / options_.cluster_tokens;
  for (std::size_t c = 0; c < used; ++c) {
    const std::byte* key = keys.row(c * keys.rows / used);
    const std::span direction(sums_.data() + c * dim, dim);
    for (std::size_t i = 0; i < dim; ++i) {
      direction[i] = load_element(key, keys.dtype, i) - mean_[i];
    }
    place_centroid(static_cast<std::uint32_t>(c), direction);
  }
}

/// The unit vector of `direction` into the table. Keys stay as they are: k . c - mean . c is what
/// (k - mean) . c would be.
void ClusterIndex::place_centroid(std::uint32_t cluster, std::span<float> direction) {
  double square = 0.0;
  for (float value : direction) square += double{value} * double{value};
  const double norm = std::sqrt(square);
  const auto share = norm > 0.0 ? static_cast<float>(1.0 / norm) : 0.0f;
  double bias = 0.0;
  for (std::size_t i = 0; i < direction.size(); ++i) {
    const float value = direction[i] * share;
    table_[i * table_stride_ + cluster] = value;
    bias -= double{value} * double{mean_[i]};
  }
  bias_[cluster] = static_cast<float>(bias);
}

/// Every centroid to the mean direction of its members; one without members stays where it is.
void ClusterIndex::move_centroids(const RowsView& keys) {
  const std::size_t dim = mean_.size();
  std::ranges::fill(sums_, 0.0f);
  std::ranges::fill(counts_, 0u);
  add_rows_by_label(keys, labels_, sums_.data());
  for (std::size_t r = 0; r < keys.rows; ++r) ++counts_[labels_[r]];
  for (std::uint32_t c = 0; c < clusters_; ++c) {
    if (counts_[c] == 0) continue;
    const std::span direction(sums_.data() + c * dim, dim);
    const auto share = 1.0f / static_cast<float>(counts_[c]);
    for (std::size_t i = 0; i < dim; ++i) direction[i] = direction[i] * share - mean_[i];
    place_centroid(c, direction);
  }
}

/// From a label per token to tokens per label, in order.
void ClusterIndex::list_members(std::uint32_t group, std::uint32_t first) {
  const std::uint32_t skipped = first - open_begin();
  const std::uint32_t count = options_.segment_tokens - skipped;
  std::uint16_t* ends = ends_.data() + ends_offset(group, closed_);
  std::uint16_t* members = members_.data() + members_offset(group, closed_);
  std::ranges::fill(counts_, 0u);
  for (std::uint32_t t = 0; t < count; ++t) ++counts_[labels_[t]];
  std::uint32_t end = 0;
  for (std::uint32_t c = 0; c < clusters_; ++c) {
    const std::uint32_t begin = end;
    end += counts_[c];
    ends[c] = static_cast<std::uint16_t>(end);
    counts_[c] = begin;
  }
  for (std::uint32_t t = 0; t < count; ++t) {
    members[counts_[labels_[t]]++] = static_cast<std::uint16_t>(skipped + t);
  }
  // Sinks are nobody's members; a saved state has no bytes that mean nothing.
  std::fill_n(members + count, skipped, std::uint16_t{0});
}

/// Plain means of the members, as they were, not of unit length; zeros for nobody.
void ClusterIndex::store_means(Rows& rows, const RowsView& tokens, std::uint32_t group) {
  const std::size_t dim = std::size_t{shape_.heads_per_group} * rows.dim;
  std::fill_n(sums_.begin(), clusters_ * dim, 0.0f);
  add_rows_by_label(tokens, labels_, sums_.data());
  const std::uint16_t* ends = ends_.data() + ends_offset(group, closed_);
  std::byte* target =
      rows.means.data() +
      (std::size_t{group} * clusters_max() + closed_ * clusters_) * rows.group_bytes;
  for (std::uint32_t c = 0; c < clusters_; ++c) {
    const std::uint32_t size = ends[c] - (c == 0 ? 0u : ends[c - 1]);
    const float share = size == 0 ? 0.0f : 1.0f / static_cast<float>(size);
    for (std::size_t i = 0; i < dim; ++i) {
      store_element(target + c * rows.group_bytes, shape_.dtype, i, sums_[c * dim + i] * share);
    }
  }
}

void ClusterIndex::truncate(std::uint32_t position) {
  KVTIER_CHECK(truncate_floor(position) == position,
               "a cut at {} needs keys that are gone: cut at {} and append the rest again",
               position, truncate_floor(position));
  tokens_.truncate(position);
  closed_ = std::min(closed_, position / options_.segment_tokens);
  recent_begin_ = std::min(recent_begin_, open_begin());
}

std::uint32_t ClusterIndex::truncate_floor(std::uint32_t position) const {
  const std::uint32_t begin = position / options_.segment_tokens * options_.segment_tokens;
  return begin >= recent_begin_ ? position : begin;
}

std::span<const std::uint16_t> ClusterIndex::members(std::uint32_t head_group,
                                                     std::uint32_t cluster) const {
  const std::uint32_t segment = cluster / clusters_;
  const std::uint16_t* ends = ends_.data() + ends_offset(head_group, segment);
  const std::uint32_t c = cluster % clusters_;
  const std::uint32_t begin = c == 0 ? 0u : ends[c - 1];
  return members_.part(members_offset(head_group, segment) + begin, ends[c] - begin);
}

RowsView ClusterIndex::group_rows(const Rows& rows, std::uint32_t group, std::uint32_t first,
                                  std::uint32_t end) const {
  const std::size_t row = std::size_t{group} * recent_capacity_ + (first - recent_begin_);
  return {rows.recent.data() + row * rows.group_bytes, end - first,
          shape_.heads_per_group * rows.dim, rows.group_bytes, shape_.dtype};
}

RowsView ClusterIndex::head_rows(const Rows& rows, std::uint32_t head, std::uint32_t first,
                                 std::uint32_t end) const {
  RowsView view = group_rows(rows, head / shape_.heads_per_group, first, end);
  view.data += head % shape_.heads_per_group * rows.head_bytes;
  view.dim = rows.dim;
  return view;
}

RowsView ClusterIndex::head_means(const Rows& rows, std::uint32_t head,
                                  std::uint32_t clusters) const {
  const std::size_t group = head / shape_.heads_per_group;
  return {rows.means.data() + group * clusters_max() * rows.group_bytes +
              head % shape_.heads_per_group * rows.head_bytes,
          clusters, rows.dim, rows.group_bytes, shape_.dtype};
}

RowsView ClusterIndex::centroids(std::uint32_t head, std::uint32_t clusters) const {
  return head_means(keys_, head, clusters);
}
RowsView ClusterIndex::value_means(std::uint32_t head, std::uint32_t clusters) const {
  return head_means(values_, head, clusters);
}
RowsView ClusterIndex::open_keys(std::uint32_t head, std::uint32_t begin, std::uint32_t end) const {
  return head_rows(keys_, head, begin, end);
}
RowsView ClusterIndex::open_values(std::uint32_t head, std::uint32_t begin,
                                   std::uint32_t end) const {
  return head_rows(values_, head, begin, end);
}

void ClusterIndex::save(StateWriter& writer) const {
  tokens_.save(writer);
  writer.put(closed_);
  writer.put(recent_begin_);
  for (std::uint32_t group = 0; group < shape_.head_groups(); ++group) {
    writer.put_array(ends_.part(ends_offset(group, 0), std::size_t{closed_} * clusters_));
    writer.put_array(
        members_.part(members_offset(group, 0), std::size_t{closed_} * options_.segment_tokens));
  }
  save_rows(writer, keys_);
  if (options_.values) save_rows(writer, values_);
}

void ClusterIndex::save_rows(StateWriter& writer, const Rows& rows) const {
  const std::size_t recent = tokens_.count() - recent_begin_;
  for (std::size_t group = 0; group < shape_.head_groups(); ++group) {
    writer.put_array(rows.means.part(group * clusters_max() * rows.group_bytes,
                                     std::size_t{closed_} * clusters_ * rows.group_bytes));
    writer.put_array(
        rows.recent.part(group * recent_capacity_ * rows.group_bytes, recent * rows.group_bytes));
  }
}

Status ClusterIndex::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(tokens_.restore(reader));
  KVTIER_RETURN_IF_ERROR(reader.get(closed_));
  KVTIER_RETURN_IF_ERROR(reader.get(recent_begin_));
  const std::uint32_t count = tokens_.count();
  if (closed_ != count / options_.segment_tokens || recent_begin_ > open_begin() ||
      recent_begin_ % options_.segment_tokens != 0 || count - recent_begin_ > recent_capacity_) {
    return corrupt(fmt::format("selector state: found {} segments and keys from {} of {} tokens",
                               closed_, recent_begin_, count));
  }
  for (std::uint32_t group = 0; group < shape_.head_groups(); ++group) {
    KVTIER_RETURN_IF_ERROR(
        reader.get_exactly(ends_.part(ends_offset(group, 0), std::size_t{closed_} * clusters_)));
    KVTIER_RETURN_IF_ERROR(reader.get_exactly(
        members_.part(members_offset(group, 0), std::size_t{closed_} * options_.segment_tokens)));
    for (std::uint32_t s = 0; s < closed_; ++s) KVTIER_RETURN_IF_ERROR(check_members(group, s));
  }
  KVTIER_RETURN_IF_ERROR(restore_rows(reader, keys_));
  return options_.values ? restore_rows(reader, values_) : Status();
}

Status ClusterIndex::restore_rows(StateReader& reader, Rows& rows) {
  const std::size_t recent = tokens_.count() - recent_begin_;
  for (std::size_t group = 0; group < shape_.head_groups(); ++group) {
    KVTIER_RETURN_IF_ERROR(
        reader.get_exactly(rows.means.part(group * clusters_max() * rows.group_bytes,
                                           std::size_t{closed_} * clusters_ * rows.group_bytes)));
    KVTIER_RETURN_IF_ERROR(reader.get_exactly(
        rows.recent.part(group * recent_capacity_ * rows.group_bytes, recent * rows.group_bytes)));
  }
  return {};
}

/// Cluster ends ascend to the segment's tokens, members ascend within a cluster, none comes twice.
Status ClusterIndex::check_members(std::uint32_t group, std::uint32_t segment) const {
  const std::uint32_t begin = segment * options_.segment_tokens;
  const std::uint32_t skipped =
      std::clamp(shape_.sinks, begin, begin + options_.segment_tokens) - begin;
  const std::uint32_t count = options_.segment_tokens - skipped;
  const std::uint16_t* ends = ends_.data() + ends_offset(group, segment);
  const std::uint16_t* members = members_.data() + members_offset(group, segment);
  bool sound = std::is_sorted(ends, ends + clusters_) && ends[clusters_ - 1] == count;
  std::vector<bool> seen(options_.segment_tokens);
  for (std::uint32_t c = 0, i = 0; sound && c < clusters_; ++c) {
    for (const std::uint32_t first = i; sound && i < ends[c]; ++i) {
      sound = members[i] >= skipped && members[i] < options_.segment_tokens && !seen[members[i]] &&
              (i == first || members[i] > members[i - 1]);
      if (sound) seen[members[i]] = true;
    }
  }
  if (sound) return {};
  return corrupt(
      fmt::format("selector state: the clusters of segment {} are no partition of it", segment));
}

std::size_t ClusterIndex::metadata_bytes() const {
  const std::size_t groups = shape_.head_groups();
  const std::size_t clusters = groups * closed_ * clusters_;
  return clusters * (keys_.group_bytes + values_.group_bytes + sizeof(std::uint16_t)) +
         groups * closed_ * options_.segment_tokens * sizeof(std::uint16_t) +
         groups * recent_capacity_ * (keys_.group_bytes + values_.group_bytes);
}

}  // namespace kvtier
