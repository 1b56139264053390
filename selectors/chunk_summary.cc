#include "kernels/score_rows.h"
#include "memory/dtype.h"
#include "selectors/digest_selector.h"
#include "selectors/families.h"
#include "selectors/key_frame.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

namespace kvtier {
namespace {

/// Chunk summaries (LongHeads, 2402.10685): o is the mean, over a chunk's tokens, of their
/// attention outputs within the chunk, and the summary is the attention of o over the chunk's keys,
/// returning keys: a mean of those keys that the chunk itself looks at.
///
/// Where it leaves the paper. LongHeads takes the outputs of the chunk's own queries, kept until
/// the chunk is complete. A selector sees the queries of some prompt tokens at best, and long after
/// their keys, so here keys stand for queries, and for values too, which puts o among the keys it
/// is compared with: a reconstruction, and the summary becomes a function of the keys alone. Heads
/// choose together, as the shape's reduction says. The first chunk and the last one or two, which
/// LongHeads always attends, are the shape's sinks and window. `frame=unrotated` is the paper's
/// frame: summaries of keys before RoPE, and the query turned back likewise.
class ChunkSummaryDigest final : public GroupDigest {
 public:
  ChunkSummaryDigest(const SelectorShape& shape, std::uint32_t chunk_tokens, bool unrotated)
      : dim_(shape.head_dim),
        scale_(shape.softmax.scale),
        dtype_(shape.dtype),
        unrotated_(unrotated),
        turn_(unrotated ? shape.rope : RopeOptions{1.0, 0}, shape.head_dim),
        keys_(std::size_t{chunk_tokens} * shape.head_dim),
        logits_(std::size_t{kQueriesAtOnce} * chunk_tokens),
        weights_(chunk_tokens),
        output_(shape.head_dim) {}

  std::uint32_t row_dim() const override { return dim_; }

  void write_row(const RowsView& keys, std::uint32_t position, std::byte* row) override {
    for (std::size_t t = 0; t < keys.rows; ++t) {
      float* key = keys_.data() + t * dim_;
      for (std::uint32_t e = 0; e < dim_; ++e) key[e] = load_element(keys.row(t), keys.dtype, e);
      if (unrotated_) turn_back(position + static_cast<std::uint32_t>(t), key);
    }
    weigh_by_all(keys.rows);
    average(keys.rows);
    score(keys.rows, output_.data(), 1);
    std::copy_n(logits_.begin(), keys.rows, weights_.begin());
    softmax_row(std::span(weights_.data(), keys.rows));
    average(keys.rows);
    for (std::uint32_t e = 0; e < dim_; ++e) store_element(row, dtype_, e, output_[e]);
  }

  void write_question(std::span<const float> query, std::uint32_t position,
                      float* question) override {
    std::ranges::copy(query, question);
    if (unrotated_) turn_back(position, question);
  }

  std::unique_ptr<GroupDigest> clone() const override {
    return std::make_unique<ChunkSummaryDigest>(*this);
  }

 private:
  static constexpr std::uint32_t kQueriesAtOnce = 128;

  /// Takes the rotation of `position` out of a row.
  void turn_back(std::uint32_t position, float* row) {
    turn_.set(-static_cast<double>(position));
    turn_.apply(row);
  }

  /// Logits of some of the keys, or of o, against all keys of the chunk.
  void score(std::size_t tokens, const float* queries, std::uint32_t count) {
    const Status status = score_rows({.scale = scale_, .logit_cap = 0.0f},
                                     {.rows = {reinterpret_cast<const std::byte*>(keys_.data()),
                                               tokens, dim_, dim_ * sizeof(float), DType::kF32},
                                      .queries = queries,
                                      .query_stride = dim_,
                                      .query_count = count,
                                      .logits = logits_.data(),
                                      .logit_stride = tokens});
    KVTIER_CHECK(status.ok(), "{}", status.to_string());
  }

  /// weights[j]: how much of all tokens' attention key j gets, each token seeing those before it.
  void weigh_by_all(std::size_t tokens) {
    std::ranges::fill(weights_, 0.0f);
    for (std::size_t first = 0; first < tokens; first += kQueriesAtOnce) {
      const std::size_t count = std::min<std::size_t>(kQueriesAtOnce, tokens - first);
      score(tokens, keys_.data() + first * dim_, static_cast<std::uint32_t>(count));
      for (std::size_t q = 0; q < count; ++q) {
        const std::span seen(logits_.data() + q * tokens, first + q + 1);
        softmax_row(seen);
        for (std::size_t j = 0; j < seen.size(); ++j) {
          weights_[j] += seen[j] / static_cast<float>(tokens);
        }
      }
    }
  }

  /// output = sum of weights times keys.
  void average(std::size_t tokens) {
    std::ranges::fill(output_, 0.0f);
    for (std::size_t j = 0; j < tokens; ++j) {
      const float* key = keys_.data() + j * dim_;
      for (std::uint32_t e = 0; e < dim_; ++e) output_[e] += weights_[j] * key[e];
    }
  }

  std::uint32_t dim_;
  float scale_;
  DType dtype_;
  bool unrotated_;
  RopeTurn turn_;
  std::vector<float> keys_;     ///< [chunk tokens, head_dim]
  std::vector<float> logits_;   ///< [kQueriesAtOnce, chunk tokens]
  std::vector<float> weights_;  ///< [chunk tokens]
  std::vector<float> output_;   ///< [head_dim]
};

}  // namespace

const SelectorFamily& chunk_summary_family() {
  static constexpr std::string_view kParameters[] = {"tokens", "frame"};
  static const SelectorFamily kFamily = {
      .name = "chunk-summary",
      .summary = "a chunk's attention over its own keys as its one key",
      .source = "LongHeads, 2402.10685 (keys stand for queries)",
      .parameters = kParameters,
      .metadata = "2 head_dim / tokens B, and the keys of the window and four chunks",
      .build_cost = "O(tokens * head_dim)",
      .step_cost = "O(context / tokens * head_dim)",
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        static constexpr std::string_view kFrames[] = {"rotated", "unrotated"};
        // The paper's chunk.
        KVTIER_ASSIGN_OR_RETURN(const std::uint32_t tokens,
                                recipe.parameters.integer("tokens", 256, 1, 1024));
        KVTIER_ASSIGN_OR_RETURN(const std::size_t frame,
                                recipe.parameters.choice("frame", "rotated", kFrames));
        const bool unrotated = frame == 1;
        factory.needs.rope = unrotated;
        factory.make = [tokens, unrotated](const SelectorShape& shape,
                                           LayerIndex) -> Result<std::unique_ptr<Selector>> {
          if (unrotated) KVTIER_RETURN_IF_ERROR(KeyFrame::check(shape, "chunk-summary"));
          return make_digest_selector(
              shape, tokens, std::make_unique<ChunkSummaryDigest>(shape, tokens, unrotated));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
