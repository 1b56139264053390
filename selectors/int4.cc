#include "kernels/int4_rows.h"
#include "memory/dtype.h"
#include "selectors/families.h"
#include "selectors/far_selector.h"
#include "selectors/seen_tokens.h"
#include "selectors/token_scores.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

namespace kvtier {
namespace {

struct Int4Options {
  /// SALE's tau: a block is wanted if one of its tokens gets at least this part of what sinks and
  /// window get together. 0 wants the whole budget, which is the default: SALE calibrates tau per
  /// head offline (from 0.008 down) on prompts made for it, and without that the budget says more.
  double threshold = 0.0;
};

/// Every token scored on 4-bit keys (SALE, 2505.24179, paper and code; made for prefill, its use in
/// a decode step is a reconstruction).
///
/// Keys lose their mean per KV head and channel, then become 4-bit integers with one scale per
/// token and KV head (`Int4Rows` states the error). SALE also groups keys whose rows share a thread
/// of a tensor core; that saves 1.75 of 66 bytes and has no other meaning here. Its queries are
/// 4-bit as well, with a correction for their mean; here they are 16-bit, which needs none.
///
/// SALE's mean is that of the whole prompt. Ours is that of the first `kMeanTokens` tokens behind
/// the sinks, so that a token's code does not change as the context grows: what the mean takes away
/// is the large constant part of some channels, which is there from the start, and any mean gives
/// the same logits but for the codes' error. A shorter context takes the mean of what it has, and
/// its keys are coded again at each step. The first keys are kept as they came for that.
///
/// The relative threshold compares a token's weight with those of sinks and window, as SALE does;
/// SALE computes these exactly, here they are read from codes like all others. What passes is
/// capped by the budget, best first. `kMean` has no weights and knows no threshold.
class Int4Keys final : public FarSelector, private TokenLogits {
 public:
  Int4Keys(const SelectorShape& shape, Int4Options options)
      : FarSelector(shape),
        threshold_(shape.reduction == GroupReduction::kMean
                       ? 0.0f
                       : static_cast<float>(options.threshold)),
        tokens_(shape.tokens_max),
        row_bytes_(shape.head_dim * size_of(shape.dtype)),
        tile_lines_(int4_tile_lines(shape.head_dim)),
        tiles_max_(shape.tokens_max / Int4Rows::kTileRows + 1),
        first_tokens_(shape.sinks + kMeanTokens),
        first_keys_(std::size_t{shape.kv_heads} * first_tokens_ * row_bytes_),
        means_(std::size_t{shape.kv_heads} * shape.head_dim),
        tiles_(std::size_t{shape.kv_heads} * tiles_max_ * tile_lines_),
        scales_(std::size_t{shape.kv_heads} * shape.tokens_max),
        row_(shape.head_dim),
        scores_(shape, {.threshold = threshold_}) {}

  void append(const NewTokens& tokens) override {
    const std::uint32_t before = tokens_.count();
    tokens_.append(tokens);
    provisional_ = 0;
    for (std::uint32_t t = before; t < std::min(tokens_.count(), first_tokens_); ++t) {
      for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
        std::memcpy(first_key(head, t), source(tokens, head, t), row_bytes_);
      }
    }
    if (tokens_.count() < first_tokens_) return;
    if (before < first_tokens_) code_first();
    for (std::uint32_t t = std::max(before, first_tokens_); t < tokens_.count(); ++t) {
      for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
        code(head, t, source(tokens, head, t));
      }
    }
  }

  void truncate(std::uint32_t position) override {
    tokens_.truncate(position);
    provisional_ = 0;
  }

  std::unique_ptr<Selector> fork() const override { return std::make_unique<Int4Keys>(*this); }

  void save(StateWriter& writer) const override {
    tokens_.save(writer);
    for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
      writer.put_array(first_keys_.part(std::size_t{head} * first_tokens_ * row_bytes_,
                                        first_count() * row_bytes_));
      writer.put_array(tiles_.part(tile(head, 0), coded() / kTile * tile_lines_));
      for (std::size_t t = coded() / kTile * kTile; t < coded(); ++t) {
        for (std::size_t line = 0; line < tile_lines_; ++line) {
          std::uint32_t word;
          std::memcpy(&word, word_at(head, t, line), sizeof(word));
          writer.put(word);
        }
      }
      writer.put_array(scales_.part(row(head, 0), coded()));
    }
  }

  Status restore(StateReader& reader) override {
    KVTIER_RETURN_IF_ERROR(tokens_.restore(reader));
    for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
      KVTIER_RETURN_IF_ERROR(reader.get_exactly(first_keys_.part(
          std::size_t{head} * first_tokens_ * row_bytes_, first_count() * row_bytes_)));
      KVTIER_RETURN_IF_ERROR(
          reader.get_exactly(tiles_.part(tile(head, 0), coded() / kTile * tile_lines_)));
      for (std::size_t t = coded() / kTile * kTile; t < coded(); ++t) {
        for (std::size_t line = 0; line < tile_lines_; ++line) {
          std::uint32_t word = 0;
          KVTIER_RETURN_IF_ERROR(reader.get(word));
          std::memcpy(tiles_.data()[tile(head, t) + line].bytes + t % kTile * sizeof(word), &word,
                      sizeof(word));
        }
      }
      KVTIER_RETURN_IF_ERROR(reader.get_exactly(scales_.part(row(head, 0), coded())));
    }
    if (coded() > 0) average();
    return {};
  }

  /// Codes and scales of the tokens, the means, and the first keys.
  std::size_t metadata_bytes() const override {
    return std::size_t{shape().kv_heads} *
           (tokens_.count() * (shape().head_dim / 2 + sizeof(std::uint16_t)) +
            shape().head_dim * sizeof(float) + first_count() * row_bytes_);
  }

 private:
  std::uint32_t tokens_seen() const override { return tokens_.count(); }
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override {
    if (tokens_.count() < first_tokens_ && provisional_ != tokens_.count()) {
      code_first();
      provisional_ = tokens_.count();
    }
    KVTIER_RETURN_IF_ERROR(scores_.compute(question.request, tokens_.count(), *this, pool));
    return scores_.rank(question.request, selection, pool);
  }

  static constexpr std::uint32_t kMeanTokens = 256;
  static constexpr std::uint32_t kTile = Int4Rows::kTileRows;

  /// Where the tile of a token begins, its part of a line, and its scale.
  std::size_t tile(std::uint32_t head, std::size_t token) const {
    return (std::size_t{head} * tiles_max_ + token / kTile) * tile_lines_;
  }
  const std::byte* word_at(std::uint32_t head, std::size_t token, std::size_t line) const {
    return tiles_.data()[tile(head, token) + line].bytes + token % kTile * sizeof(std::uint32_t);
  }
  std::size_t row(std::uint32_t head, std::uint32_t token) const {
    return std::size_t{head} * shape().tokens_max + token;
  }
  std::byte* first_key(std::uint32_t head, std::uint32_t token) {
    return first_keys_.data() + (std::size_t{head} * first_tokens_ + token) * row_bytes_;
  }
  const std::byte* source(const NewTokens& tokens, std::uint32_t head, std::uint32_t token) const {
    return tokens.keys + head * tokens.key_head_stride +
           (token - tokens.first_position) * tokens.key_token_stride;
  }
  std::uint32_t first_count() const { return std::min(tokens_.count(), first_tokens_); }
  /// Tokens whose codes are final: none before the mean is.
  std::size_t coded() const { return tokens_.count() < first_tokens_ ? 0 : tokens_.count(); }

  /// The mean over the first keys that are there, sinks left out: they are unlike all others.
  void average() {
    std::ranges::fill(means_, 0.0f);
    const std::uint32_t count = first_count();
    if (count <= shape().sinks) return;
    const float share = 1.0f / static_cast<float>(count - shape().sinks);
    for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
      float* mean = means_.data() + std::size_t{head} * shape().head_dim;
      for (std::uint32_t t = shape().sinks; t < count; ++t) {
        const std::byte* key = first_key(head, t);
        for (std::uint32_t i = 0; i < shape().head_dim; ++i) {
          mean[i] += load_element(key, shape().dtype, i) * share;
        }
      }
    }
  }
  void code_first() {
    average();
    for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
      for (std::uint32_t t = 0; t < first_count(); ++t) code(head, t, first_key(head, t));
    }
  }
  void code(std::uint32_t head, std::uint32_t token, const std::byte* key) {
    const float* mean = means_.data() + std::size_t{head} * shape().head_dim;
    for (std::uint32_t i = 0; i < shape().head_dim; ++i) {
      row_[i] = load_element(key, shape().dtype, i) - mean[i];
    }
    quantise_int4(row_, token % kTile, tiles_.data() + tile(head, token),
                  scales_[row(head, token)]);
  }

  /// What the mean takes from every token of a head, per query.
  Status prepare(const SelectRequest&, const float* queries, std::uint32_t rows, std::uint32_t,
                 WorkerPool&) override {
    rows_ = rows;
    const std::size_t dim = shape().head_dim;
    offsets_.resize(std::max<std::size_t>(offsets_.size(), std::size_t{shape().kv_heads} * rows));
    for (std::size_t i = 0; i < std::size_t{shape().kv_heads} * rows; ++i) {
      const float* mean = means_.data() + i / rows * dim;
      offsets_[i] = std::inner_product(mean, mean + dim, queries + i * dim, 0.0f);
    }
    return {};
  }
  void fill(const TokenPiece& piece) override {
    score_int4(shape().softmax,
               {.rows = {tiles_.data() + tile(piece.head, piece.first_token),
                         scales_.data() + row(piece.head, piece.first_token),
                         piece.end_token - piece.first_token, shape().head_dim},
                .queries = piece.queries,
                .query_stride = shape().head_dim,
                .query_count = piece.rows,
                .offsets = offsets_.data() + std::size_t{piece.head} * rows_ + piece.first_row,
                .logits = piece.logits,
                .logit_stride = kCellRowTokens});
  }

  float threshold_;
  SeenTokens tokens_;
  std::size_t row_bytes_;
  std::size_t tile_lines_;
  std::size_t tiles_max_;
  std::uint32_t first_tokens_;
  FixedArray<std::byte> first_keys_;  ///< [KV heads, first_tokens, head_dim]
  std::vector<float> means_;          ///< [KV heads, head_dim]
  FixedArray<CodeLine> tiles_;        ///< [KV heads, tiles_max, tile_lines]
  FixedArray<std::uint16_t> scales_;  ///< [KV heads, tokens_max]
  /// Tokens that were coded with a mean that is not final yet; 0: none.
  std::uint32_t provisional_ = 0;
  std::vector<float> row_;
  std::vector<float> offsets_;  ///< [KV heads, rows]
  std::uint32_t rows_ = 0;
  TokenScores scores_;
};

}  // namespace

const SelectorFamily& int4_family() {
  static constexpr std::string_view kParameters[] = {"threshold"};
  static const SelectorFamily kFamily = {
      .name = "int4",
      .summary = "every token on 4-bit keys, a scale per token",
      .source = "SALE, 2505.24179 (decode: reconstruction)",
      .parameters = kParameters,
      .metadata = "head_dim / 2 + 2 B, and the first 256 keys",
      .build_cost = "O(head_dim)",
      .step_cost = "O(context * head_dim) on 4-bit integers",
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        Int4Options options;
        KVTIER_ASSIGN_OR_RETURN(options.threshold,
                                recipe.parameters.fraction("threshold", options.threshold));
        factory.make = [options](const SelectorShape& shape,
                                 LayerIndex) -> Result<std::unique_ptr<Selector>> {
          if (shape.head_dim % 8 != 0 || shape.head_dim > 576) {
            return invalid_argument(
                fmt::format("selector 'int4': head dim {}, expected a multiple of 8 up to 576",
                            shape.head_dim));
          }
          return Result<std::unique_ptr<Selector>>(std::make_unique<Int4Keys>(shape, options));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
