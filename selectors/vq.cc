#include "kernels/lower_triangle.h"
#include "memory/dtype.h"
#include "selectors/families.h"
#include "selectors/far_selector.h"
#include "selectors/key_frame.h"
#include "selectors/seen_tokens.h"
#include "selectors/token_scores.h"
#include "selectors/vq_codebook.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>

namespace kvtier {
namespace {

struct VqOptions {
  /// Bytes per token and KV head, each naming one of 256 centroids of a part. A2ATS has one
  /// codebook of 4096 whole keys, trained offline on 80K tokens; so many do not fit a prompt of 8K
  /// to 128K (two to thirty keys for each), and cost as much to score as 4096 tokens. Eight parts
  /// of 256 need 4096 sample keys, cost as much as 256 tokens, and tell 2^64 keys apart.
  std::uint32_t parts = 8;
  /// A2ATS's windowed position trick: keys un-rotated, every query at one distance. Its point is
  /// one codebook for every input; ours is trained on this input, at its positions, and needs none.
  bool windowed = false;
};

/// A2ATS's constant offset.
constexpr std::uint32_t kVqDistance = 2048;
/// Observed positions that the metric is made from; later ones add little and cost head_dim^2 each.
constexpr std::uint32_t kVqObserved = 2048;
/// Far tokens from which the codebook is final.
constexpr std::uint32_t kVqFinal = VqCodebook::kSampleMax;
constexpr std::uint32_t kVqCodeSlice = 256;
constexpr std::uint32_t kVqDimMax = 576;

/// Every token scored by a product code of its key (A2ATS, 2502.12665, code): query-aware
/// quantisation trained on the prompt itself, in time linear in it: a sample of at most 4096 keys,
/// evenly spread, six iterations, then one pass that codes all.
///
/// The metric comes from what prompt queries were observed (the first 2048 positions, all query
/// heads of a KV head); without any it is the identity. A cut does not take observed queries back:
/// they are a sample of what is looked for. A2ATS takes the union of each head's best tokens; here
/// heads vote (`TokenScores`), since a budget counts the union.
///
/// When it trains. At a question with at least `kVqFinal` far tokens it trains on these, for good,
/// and lets go of the keys; what comes later is coded as it comes. A smaller context keeps its
/// keys, and trains again whenever its far tokens have doubled. A cut at or behind the question
/// that the final codebook was made for keeps it; before it, everything starts over
/// (`truncate_floor` is 0). The keys of a long prompt are held until the first question.
class VqKeys final : public FarSelector, private TokenLogits {
 public:
  VqKeys(const SelectorShape& shape, VqOptions options)
      : FarSelector(shape),
        options_(options),
        tokens_(shape.tokens_max),
        frame_(shape, options.windowed, kVqDistance),
        row_bytes_(shape.head_dim * size_of(shape.dtype)),
        raw_(raw_size()),
        codes_(std::size_t{shape.kv_heads} * shape.tokens_max * options.parts),
        codebooks_(shape.kv_heads, VqCodebook(shape.head_dim, options.parts)),
        squares_(std::size_t{shape.kv_heads} * shape.head_dim * shape.head_dim),
        turned_(std::size_t{shape.query_heads()} * shape.head_dim),
        scratch_(shape.head_dim, options.parts),
        scores_(shape, {.everyone = !options.windowed}) {}

  void append(const NewTokens& tokens) override {
    tokens_.append(tokens);
    frame_.feed(tokens, [this](const NewTokens& piece) { keep(piece); });
  }
  void observe_prompt(const PromptQueries& queries) override;
  void truncate(std::uint32_t position) override;
  std::uint32_t truncate_floor(std::uint32_t position) const override {
    return final_ && position <= trained_at_ ? 0 : position;
  }

  std::unique_ptr<Selector> fork() const override { return std::make_unique<VqKeys>(*this); }
  void save(StateWriter& writer) const override;
  Status restore(StateReader& reader) override;

  /// Codes, codebooks and the sums that the metric comes from; the keys while they are kept.
  std::size_t metadata_bytes() const override {
    const std::size_t squares = observed_ > 0 ? squares_.size() * sizeof(float) : 0;
    const std::size_t keys =
        final_ ? 0 : std::size_t{tokens_.count()} * shape().kv_heads * row_bytes_;
    return std::size_t{tokens_.count()} * shape().kv_heads * options_.parts +
           shape().kv_heads * (std::size_t{shape().head_dim} + options_.parts) * kCodeCentroids *
               sizeof(float) +
           2 * squares + keys;
  }

 private:
  std::size_t raw_size() const {
    return std::size_t{shape().kv_heads} * shape().tokens_max * row_bytes_;
  }
  std::byte* raw(std::uint32_t head, std::uint32_t token) {
    return raw_.data() + (std::size_t{head} * shape().tokens_max + token) * row_bytes_;
  }
  std::uint8_t* code(std::uint32_t head, std::uint32_t token) {
    return codes_.data() + (std::size_t{head} * shape().tokens_max + token) * options_.parts;
  }
  void load_key(std::uint32_t head, const std::byte* key, float* target) const {
    float plain[kVqDimMax];
    for (std::uint32_t i = 0; i < shape().head_dim; ++i) {
      plain[i] = load_element(key, shape().dtype, i);
    }
    codebooks_[head].transform_key(plain, target);
  }

  void keep(const NewTokens& piece);
  void train(std::uint32_t end, WorkerPool& pool);
  void code_slice(std::uint32_t head, std::uint32_t first, std::uint32_t last);
  std::uint32_t tokens_seen() const override { return tokens_.count(); }
  /// A guess never makes the codebook final.
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override;
  SelectRequest turned(const SelectRequest& request);
  Status prepare(const SelectRequest& request, const float* queries, std::uint32_t rows,
                 std::uint32_t visible, WorkerPool& pool) override;
  void fill(const TokenPiece& piece) override;
  float* table(std::uint32_t head) {
    return tables_.data() + head * code_table_size(rows_, options_.parts);
  }

  VqOptions options_;
  SeenTokens tokens_;
  KeyFrame frame_;
  std::size_t row_bytes_;
  FixedArray<std::byte> raw_;  ///< [KV heads, tokens_max, head_dim] until the codebook is final.
  FixedArray<std::uint8_t> codes_;  ///< [KV heads, tokens_max, parts]
  std::vector<VqCodebook> codebooks_;
  std::vector<float> squares_;  ///< [KV heads, head_dim, head_dim]: lower triangles.
  std::uint32_t observed_ = 0;  ///< Positions in `squares_`.
  std::uint32_t trained_ = 0;   ///< Tokens before this one were trained on; 0: no codebook.
  bool final_ = false;
  std::uint32_t trained_at_ = 0;  ///< The question that made it final.
  std::vector<float> turned_;
  FixedArray<float> asked_;   ///< A step's queries in `frame_`.
  FixedArray<float> metric_;  ///< [KV heads, rows, head_dim]: in metric space.
  FixedArray<float> tables_;  ///< [KV heads, code_table_size(rows)]
  std::uint32_t rows_ = 0;
  VqCodebook::Scratch scratch_;
  TokenScores scores_;
};

void VqKeys::keep(const NewTokens& piece) {
  float row[kVqDimMax];
  for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
    for (std::uint32_t t = 0; t < piece.tokens; ++t) {
      const std::uint32_t token = piece.first_position + t;
      const std::byte* source =
          piece.keys + head * piece.key_head_stride + t * piece.key_token_stride;
      if (!final_) std::memcpy(raw(head, token), source, row_bytes_);
      if (trained_ == 0) continue;
      load_key(head, source, row);
      nearest_codes(codebooks_[head].view(), row, 1, code(head, token));
    }
  }
}

void VqKeys::observe_prompt(const PromptQueries& queries) {
  const std::size_t dim = shape().head_dim;
  for (std::size_t n = 0; n < queries.positions.size() && observed_ < kVqObserved; ++n) {
    frame_.turn_query(queries.queries + n * queries.query_stride, queries.positions[n],
                      turned_.data());
    for (std::size_t row = 0; row < shape().query_heads(); ++row) {
      const float* query = turned_.data() + row * dim;
      float* sum = squares_.data() + row / shape().queries_per_kv_head * dim * dim;
      add_outer_product(query, shape().head_dim, sum);
    }
    ++observed_;
    if (!final_) trained_ = 0;  // Under another metric.
  }
}

void VqKeys::truncate(std::uint32_t position) {
  KVTIER_CHECK(truncate_floor(position) == position,
               "a cut at {} needs keys that are gone: cut at {} and append the rest again",
               position, truncate_floor(position));
  tokens_.truncate(position);
  if (final_ && position <= trained_at_) {
    final_ = false;
    trained_ = 0;
    raw_ = FixedArray<std::byte>(raw_size());
  }
  if (trained_ > position) trained_ = 0;
}

/// Makes the codebooks from tokens before `end` and codes every token.
void VqKeys::train(std::uint32_t end, WorkerPool& pool) {
  // Sinks are unlike all other keys and never ranked.
  const std::uint32_t begin = shape().sinks < end ? shape().sinks : 0;
  const std::uint32_t count = std::min(end - begin, VqCodebook::kSampleMax);
  const std::size_t dim = shape().head_dim;
  for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
    codebooks_[head].set_metric(std::span(squares_).subspan(head * dim * dim, dim * dim),
                                std::uint64_t{observed_} * shape().queries_per_kv_head);
    for (std::uint32_t i = 0; i < count; ++i) {
      const auto token =
          static_cast<std::uint32_t>(begin + std::uint64_t{i} * (end - begin) / count);
      load_key(head, raw(head, token), scratch_.rows.data() + i * dim);
    }
    codebooks_[head].train(scratch_, count, pool);
    struct Coding {
      VqKeys& keys;
      std::uint32_t head;
    } coding{*this, head};
    pool.run((tokens_.count() + kVqCodeSlice - 1) / kVqCodeSlice, [&coding](std::size_t slice) {
      const std::uint32_t first = static_cast<std::uint32_t>(slice) * kVqCodeSlice;
      coding.keys.code_slice(coding.head, first,
                             std::min(first + kVqCodeSlice, coding.keys.tokens_.count()));
    });
  }
  trained_ = end;
}

void VqKeys::code_slice(std::uint32_t head, std::uint32_t first, std::uint32_t last) {
  float row[kVqDimMax];
  for (std::uint32_t t = first; t < last; ++t) {
    load_key(head, raw(head, t), row);
    nearest_codes(codebooks_[head].view(), row, 1, code(head, t));
  }
}

Status VqKeys::answer(const Question& question, std::span<GroupSelection> selection,
                      WorkerPool& pool) {
  const auto& [request, region, learns] = question;
  if (!final_) {
    const bool finishes = learns && region.tokens() >= kVqFinal;
    const std::uint32_t end = finishes ? region.end : std::bit_floor(region.end);
    if (trained_ != end) train(end, pool);
    if (finishes) {
      final_ = true;
      trained_at_ = request.first_position;
      raw_ = {};
    }
  }
  // At one distance from everything, sinks and window look like anything: they have no say then.
  KVTIER_RETURN_IF_ERROR(scores_.compute(turned(request), tokens_.count(), *this, pool));
  return scores_.rank(request, selection, pool);
}

SelectRequest VqKeys::turned(const SelectRequest& request) {
  const std::size_t query = turned_.size();
  if (asked_.size() < request.query_count * query) {
    asked_ = FixedArray<float>(request.query_count * query);
  }
  for (std::uint32_t q = 0; q < request.query_count; ++q) {
    frame_.turn_query(request.queries + q * request.query_stride, request.first_position + q,
                      asked_.data() + q * query);
  }
  SelectRequest turned = request;
  turned.queries = asked_.data();
  turned.query_stride = query;
  return turned;
}

/// A table of what each centroid is worth, per KV head.
Status VqKeys::prepare(const SelectRequest&, const float* queries, std::uint32_t rows,
                       std::uint32_t, WorkerPool& pool) {
  const std::size_t of_head = std::size_t{rows} * shape().head_dim;
  rows_ = rows;
  if (metric_.size() < shape().kv_heads * of_head) {
    metric_ = FixedArray<float>(shape().kv_heads * of_head);
    tables_ = FixedArray<float>(shape().kv_heads * code_table_size(rows, options_.parts));
  }
  struct Call {
    VqKeys& keys;
    const float* queries;
    std::size_t of_head;
  } call{*this, queries, of_head};
  pool.run(shape().kv_heads, [&call](std::size_t head) {
    VqKeys& keys = call.keys;
    const std::size_t dim = keys.shape().head_dim;
    float* metric = keys.metric_.data() + head * call.of_head;
    for (std::size_t i = 0; i < call.of_head; i += dim) {
      keys.codebooks_[head].transform_query(call.queries + head * call.of_head + i, metric + i);
    }
    fill_code_tables({.codebook = keys.codebooks_[head].view(),
                      .queries = metric,
                      .query_stride = dim,
                      .query_count = keys.rows_,
                      .tables = keys.table(static_cast<std::uint32_t>(head))});
  });
  return {};
}

void VqKeys::fill(const TokenPiece& piece) {
  // Tables are of four rows each, and so are the pieces.
  score_codes(shape().softmax,
              {.codes = code(piece.head, piece.first_token),
               .rows = piece.end_token - piece.first_token,
               .codebook = codebooks_[piece.head].view(),
               .query_count = piece.rows,
               .tables = table(piece.head) + code_table_size(piece.first_row, options_.parts),
               .logits = piece.logits,
               .logit_stride = kCellRowTokens});
}

void VqKeys::save(StateWriter& writer) const {
  tokens_.save(writer);
  writer.put(observed_);
  if (observed_ > 0) writer.put_array(std::span(squares_));
  writer.put(trained_);
  writer.put(static_cast<std::uint8_t>(final_));
  writer.put(trained_at_);
  const std::size_t count = tokens_.count();
  for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
    const std::size_t first = std::size_t{head} * shape().tokens_max;
    if (!final_) writer.put_array(raw_.part(first * row_bytes_, count * row_bytes_));
    if (trained_ == 0) continue;
    codebooks_[head].save(writer);
    writer.put_array(codes_.part(first * options_.parts, count * options_.parts));
  }
}

Status VqKeys::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(tokens_.restore(reader));
  KVTIER_RETURN_IF_ERROR(reader.get(observed_));
  if (observed_ > 0) KVTIER_RETURN_IF_ERROR(reader.get_exactly(std::span(squares_)));
  std::uint8_t is_final = 0;
  KVTIER_RETURN_IF_ERROR(reader.get(trained_));
  KVTIER_RETURN_IF_ERROR(reader.get(is_final));
  KVTIER_RETURN_IF_ERROR(reader.get(trained_at_));
  final_ = is_final != 0;
  const std::uint32_t count = tokens_.count();
  if (trained_ > count || (final_ && trained_ == 0)) {
    return corrupt(
        fmt::format("selector state: found a codebook of {} tokens for {}", trained_, count));
  }
  if (final_) raw_ = {};
  for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
    const std::size_t first = std::size_t{head} * shape().tokens_max;
    if (!final_) {
      KVTIER_RETURN_IF_ERROR(reader.get_exactly(raw_.part(first * row_bytes_, count * row_bytes_)));
    }
    if (trained_ == 0) continue;
    KVTIER_RETURN_IF_ERROR(codebooks_[head].restore(reader));
    KVTIER_RETURN_IF_ERROR(
        reader.get_exactly(codes_.part(first * options_.parts, count * options_.parts)));
  }
  return {};
}

}  // namespace

const SelectorFamily& vq_family() {
  static constexpr std::string_view kParameters[] = {"parts", "windowed"};
  static const SelectorFamily kFamily = {
      .name = "vq",
      .summary = "every token by a product code, trained on the prompt for its queries",
      .source = "A2ATS, 2502.12665",
      .parameters = kParameters,
      .remembers = true,
      .metadata = "parts B, and 1 KiB (head_dim + parts) of codebook; all keys below 4K tokens",
      .build_cost = "O(256 head_dim), with observed queries O(head_dim^2)",
      .step_cost = "O(context * parts) look-ups, O(256 head_dim) for the tables",
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        static constexpr std::string_view kSwitch[] = {"off", "on"};
        VqOptions options;
        KVTIER_ASSIGN_OR_RETURN(options.parts,
                                recipe.parameters.integer("parts", options.parts, 1, 64));
        KVTIER_ASSIGN_OR_RETURN(const std::size_t windowed,
                                recipe.parameters.choice("windowed", kSwitch[0], kSwitch));
        options.windowed = windowed == 1;
        factory.needs.rope = options.windowed;
        factory.make = [options](const SelectorShape& shape,
                                 LayerIndex) -> Result<std::unique_ptr<Selector>> {
          if (shape.head_dim % options.parts != 0 || shape.head_dim > kVqDimMax) {
            return invalid_argument(
                fmt::format("selector 'vq': head dim {} in {} parts, expected a multiple up to {}",
                            shape.head_dim, options.parts, kVqDimMax));
          }
          if (options.windowed) KVTIER_RETURN_IF_ERROR(KeyFrame::check(shape, "vq(windowed=on)"));
          return Result<std::unique_ptr<Selector>>(std::make_unique<VqKeys>(shape, options));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
