#pragma once

#include "kernels/kv_view.h"
#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace kvtier {

/// What a family of landmarks keeps of a group of consecutive tokens, and how it asks: a row and a
/// question such that their dot product, scaled and capped like a logit, is the group's score for
/// one query. Scratch memory is its own; one thread at a time.
class GroupDigest {
 public:
  virtual ~GroupDigest() = default;

  /// Elements of a row, a multiple of 8; rows are of the keys' type.
  virtual std::uint32_t row_dim() const = 0;
  /// `keys`: at least one, of tokens from `position` on.
  virtual void write_row(const RowsView& keys, std::uint32_t position, std::byte* row) = 0;
  /// `question` is [row_dim()].
  virtual void write_question(std::span<const float> query, std::uint32_t position,
                              float* question) = 0;
  virtual std::unique_ptr<GroupDigest> clone() const = 0;
};

/// The selector of such a family: one digest per `group_tokens` tokens and KV head, scored all of
/// them at every step.
///
/// The group reduction is that of `reduce_logits`: the softmax over the groups of the far region
/// per query head, then the heads; under `kMean` the mean raw score. A block's score is that of the
/// best group it touches: what bounds, or stands for, every token of a group says the same of any
/// part of it, and of blocks of several groups it can say no more than the best of them.
///
/// Groups leave the sinks out. The open last group is digested as far as it has come whenever some
/// of its tokens are ranked (a window smaller than a group). Answers depend on the tokens alone.
std::unique_ptr<Selector> make_digest_selector(const SelectorShape& shape,
                                               std::uint32_t group_tokens,
                                               std::unique_ptr<GroupDigest> digest);

}  // namespace kvtier
