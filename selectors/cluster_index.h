#pragma once

#include "kernels/kv_view.h"
#include "selectors/seen_tokens.h"
#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

struct ClusterIndexOptions {
  std::uint32_t cluster_tokens = 16;    ///< Tokens per centroid, on average.
  std::uint32_t segment_tokens = 1024;  ///< Tokens that are clustered among themselves.
  std::uint32_t iterations = 10;
  bool values = false;  ///< Keep the mean value of each cluster.
};

/// The clusters of one layer. Segment i holds the tokens [i * segment, (i+1) * segment) without the
/// sinks; when its last token arrives, its keys are clustered by spherical k-means with the
/// segment's mean key removed, and what is kept of them is each cluster's members, mean key and
/// (optionally) mean value, rounded to the shape's type. KV heads of one head group are clustered
/// together: their keys are one long vector, so that a cluster is the same tokens for all of them.
///
/// Invariants. A segment has `clusters_per_segment` clusters, some of them empty when it has few
/// tokens or a centroid wins none. Every token of a closed segment behind the sinks is a member of
/// exactly one cluster per head group; members ascend. The keys (and values) of the open segment,
/// and of closed ones back to at least a window before it, are kept as they came: the former are
/// ranked one by one, the latter make cuts within the window exact. All of it is a function of the
/// tokens alone, however they were chunked.
///
/// Everything is allocated when made. One thread at a time. `append` costs, for the token that
/// closes a segment, iterations * segment * clusters_per_segment * head_dim multiply-adds per head.
class ClusterIndex {
 public:
  ClusterIndex(const SelectorShape& shape, ClusterIndexOptions options);

  void append(const NewTokens& tokens);
  void truncate(std::uint32_t position);
  std::uint32_t truncate_floor(std::uint32_t position) const;
  void save(StateWriter& writer) const;
  Status restore(StateReader& reader);

  std::uint32_t tokens() const { return tokens_.count(); }
  std::uint32_t segment_tokens() const { return options_.segment_tokens; }
  std::uint32_t clusters_per_segment() const { return clusters_; }
  std::uint32_t clusters_max() const { return segments_max_ * clusters_; }
  std::uint32_t closed_segments() const { return closed_; }
  /// First token of the open segment.
  std::uint32_t open_begin() const { return closed_ * options_.segment_tokens; }

  /// Members of a cluster (counted over all closed segments), relative to the begin of its segment.
  std::span<const std::uint16_t> members(std::uint32_t head_group, std::uint32_t cluster) const;
  std::uint32_t segment_begin(std::uint32_t cluster) const {
    return cluster / clusters_ * options_.segment_tokens;
  }
  /// The first `clusters` mean keys and mean values of a KV head.
  RowsView centroids(std::uint32_t head, std::uint32_t clusters) const;
  RowsView value_means(std::uint32_t head, std::uint32_t clusters) const;
  /// Keys and values of tokens of the open segment.
  RowsView open_keys(std::uint32_t head, std::uint32_t begin, std::uint32_t end) const;
  RowsView open_values(std::uint32_t head, std::uint32_t begin, std::uint32_t end) const;

  /// Clusters of the closed segments, and the room for the newest tokens.
  std::size_t metadata_bytes() const;

 private:
  /// Rows of one kind, keys or values: means per cluster and the newest tokens as they came, each
  /// row one head group's.
  struct Rows {
    std::uint32_t dim = 0;         ///< Of one KV head.
    std::size_t head_bytes = 0;    ///< Of one KV head's row.
    std::size_t group_bytes = 0;   ///< Of one head group's row.
    FixedArray<std::byte> means;   ///< [head groups, clusters_max]
    FixedArray<std::byte> recent;  ///< [head groups, recent_capacity]
  };

  void keep(Rows& rows, const std::byte* from, std::size_t token_stride, std::size_t head_stride,
            std::uint32_t first, std::uint32_t count);
  void drop_oldest(Rows& rows, std::uint32_t dropped);
  void close_segment();
  void cluster_group(std::uint32_t group, std::uint32_t first, std::uint32_t end);
  void place_first_centroids(const RowsView& keys);
  void place_centroid(std::uint32_t cluster, std::span<float> direction);
  void move_centroids(const RowsView& keys);
  void list_members(std::uint32_t group, std::uint32_t first);
  void store_means(Rows& rows, const RowsView& tokens, std::uint32_t group);
  RowsView group_rows(const Rows& rows, std::uint32_t group, std::uint32_t first,
                      std::uint32_t end) const;
  RowsView head_rows(const Rows& rows, std::uint32_t head, std::uint32_t first,
                     std::uint32_t end) const;
  RowsView head_means(const Rows& rows, std::uint32_t head, std::uint32_t clusters) const;
  std::size_t ends_offset(std::uint32_t group, std::uint32_t segment) const {
    return (std::size_t{group} * segments_max_ + segment) * clusters_;
  }
  std::size_t members_offset(std::uint32_t group, std::uint32_t segment) const {
    return (std::size_t{group} * segments_max_ + segment) * options_.segment_tokens;
  }
  void save_rows(StateWriter& writer, const Rows& rows) const;
  Status restore_rows(StateReader& reader, Rows& rows);
  Status check_members(std::uint32_t group, std::uint32_t segment) const;

  SelectorShape shape_;
  ClusterIndexOptions options_;
  std::uint32_t clusters_;  ///< Per segment.
  std::uint32_t segments_max_;
  SeenTokens tokens_;
  std::uint32_t closed_ = 0;
  std::uint32_t recent_keep_;
  std::uint32_t recent_capacity_;
  std::uint32_t recent_begin_ = 0;  ///< A multiple of the segment.
  Rows keys_;
  Rows values_;
  FixedArray<std::uint16_t> ends_;  ///< [head groups, segments, clusters]: behind the last member.
  FixedArray<std::uint16_t> members_;  ///< [head groups, segments, segment_tokens], by cluster.

  // Scratch of `close_segment`.
  std::size_t table_stride_;
  std::vector<float> table_;  ///< [group's dim, table_stride_]: unit vectors, for `assign_rows`.
  std::vector<float> bias_;   ///< [table_stride_]: minus the dot with the mean key.
  std::vector<float> sums_;   ///< [clusters_, group's dim]
  std::vector<float> mean_;   ///< [group's dim]
  std::vector<std::uint16_t> labels_;
  std::vector<std::uint16_t> labels_before_;
  std::vector<std::uint32_t> counts_;
};

}  // namespace kvtier
