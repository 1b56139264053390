#pragma once

#include "kernels/kv_view.h"
#include "selectors/digest_selector.h"
#include "selectors/families.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace kvtier {

/// The box around a group's keys, and on request their mean before it: what `minmax` and
/// `mean-minmax` keep. A row is [mean,] [largest key, smallest key] per channel, and a question
/// such that one dot product is the upper bound of the group's logits, or the average of that and
/// the mean key's logit. Means are rounded to the keys' type, corners are exact.
class BoxDigest final : public GroupDigest {
 public:
  BoxDigest(const SelectorShape& shape, bool with_mean)
      : head_dim_(shape.head_dim),
        vector_bytes_(shape.head_dim * size_of(shape.dtype)),
        with_mean_(with_mean) {}

  std::uint32_t row_dim() const override { return (with_mean_ ? 3 : 2) * head_dim_; }
  void write_row(const RowsView& keys, std::uint32_t position, std::byte* row) override;
  void write_question(std::span<const float> query, std::uint32_t position,
                      float* question) override;
  std::unique_ptr<GroupDigest> clone() const override { return std::make_unique<BoxDigest>(*this); }

  /// A family's `make`: `tokens` per group, Quest's page by default.
  template <bool kWithMean>
  static Status make(const SelectorRecipe& recipe, SelectorFactory& factory) {
    KVTIER_ASSIGN_OR_RETURN(const std::uint32_t tokens,
                            recipe.parameters.integer("tokens", 16, 1, 1024));
    factory.make = [tokens](const SelectorShape& shape, LayerIndex) {
      return Result<std::unique_ptr<Selector>>(
          make_digest_selector(shape, tokens, std::make_unique<BoxDigest>(shape, kWithMean)));
    };
    return {};
  }

 private:
  std::uint32_t head_dim_;
  std::size_t vector_bytes_;
  bool with_mean_;
};

}  // namespace kvtier
