#include "selectors/coded_keys.h"
#include "selectors/families.h"
#include "selectors/group_rows.h"
#include "selectors/rank_blocks.h"
#include "selectors/token_scores.h"

#include <algorithm>
#include <memory>
#include <optional>

namespace kvtier {
namespace {

struct ScanOptions {
  /// Of a code. Four lose hardly anything against the keys themselves; two halve the bytes.
  std::uint32_t bits = 4;
  /// Tokens whose values are averaged for the estimate of the rest: 64 tokens cost a quarter of
  /// the bytes of 16.
  std::uint32_t value_tokens = 64;
  /// Whether the rest is estimated, and means of values are kept for it.
  bool tail = true;
};

/// Scores every token on small codes of its key and chooses small blocks; from the same scores and
/// mean values of groups of tokens it estimates attention over everything that it did not choose.
/// Ours; the parts are known: low-bit keys for scoring (SALE, Twilight), an estimate for what is
/// not retrieved (RetroInfer, there from cluster centres).
///
/// A block's score is its estimated attention mass: softmax weights over all visible tokens, per
/// query and query head, added over the queries, reduced over the heads; under `kMean` the mean
/// logit. How keys are coded: quantised_keys.h; what is scored how: token_scores.h.
///
/// A cut within the window, or within the open run, is exact; a deeper one is made where a run
/// begins (or a group of values, if that is larger).
class Scan final : public Selector {
 public:
  Scan(const SelectorShape& shape, const ScanOptions& options)
      : shape_(shape),
        keys_(shape, options.bits),
        scores_(shape, keys_.runs_max(), options.tail ? options.value_tokens : 0) {
    if (options.tail) {
      values_.emplace(shape, GroupRows::Options{options.value_tokens, /*of_values=*/true});
    }
  }

  void append(const NewTokens& tokens) override {
    keys_.append(tokens);
    if (values_) {
      KVTIER_CHECK(tokens.values != nullptr || tokens.tokens == 0,
                   "tokens from position {} come without values", tokens.first_position);
      values_->append(tokens);
    }
  }

  void truncate(std::uint32_t position) override {
    keys_.truncate(position);
    if (values_) values_->truncate(position);
  }

  std::uint32_t truncate_floor(std::uint32_t position) const override {
    for (std::uint32_t floor = position;; position = floor) {
      floor = keys_.truncate_floor(position);
      if (values_) floor = values_->truncate_floor(floor);
      if (floor == position) return floor;
    }
  }

  Status select(const SelectRequest& request, std::span<GroupSelection> selection,
                WorkerPool& pool) override {
    KVTIER_RETURN_IF_ERROR(check_request(shape_, request));
    reserve_selection(shape_, selection);
    if (FarRegion::of(shape_, request.first_position).tokens() == 0) return {};
    KVTIER_RETURN_IF_ERROR(scores_.compute(request, keys_, nullptr, pool));
    return scores_.rank(request, selection, pool);
  }

  bool estimates_rest() const override { return values_.has_value(); }
  Status estimate_rest(const SelectRequest& request, std::span<const GroupSelection> selection,
                       StatesView target, WorkerPool& pool) override {
    if (!values_) return Selector::estimate_rest(request, selection, target, pool);
    scores_.estimate_rest(request, selection, *values_, target, pool);
    return {};
  }

  std::unique_ptr<Selector> fork() const override { return std::make_unique<Scan>(*this); }
  void save(StateWriter& writer) const override {
    keys_.save(writer);
    if (values_) values_->save(writer);
  }
  Status restore(StateReader& reader) override {
    KVTIER_RETURN_IF_ERROR(keys_.restore(reader));
    if (values_) KVTIER_RETURN_IF_ERROR(values_->restore(reader));
    return {};
  }

  std::size_t metadata_bytes() const override {
    return keys_.metadata_bytes() + (values_ ? values_->metadata_bytes() : 0);
  }

 private:
  SelectorShape shape_;
  CodedKeys keys_;
  std::optional<GroupRows> values_;
  TokenScores scores_;
};

}  // namespace

const SelectorFamily& scan_family() {
  static constexpr std::string_view kParameters[] = {"bits", "values", "tail"};
  static constexpr std::string_view kBits[] = {"4", "2"};
  static constexpr std::string_view kValues[] = {"8", "16", "32", "64", "128"};
  static constexpr std::string_view kTail[] = {"on", "off"};
  static const SelectorFamily kFamily = {
      .name = "scan",
      .summary = "every token on 4-bit keys, the rest estimated from the same scores",
      .source = "",
      .parameters = kParameters,
      .needs = {.values = true},
      .metadata =
          "head_dim bits / 8 + head_dim / 16 + 2 value_dim / values B, and the newest 192+ "
          "tokens",
      .build_cost = "O(head_dim + value_dim)",
      .step_cost = "O(context * head_dim) on codes",
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        ScanOptions options;
        KVTIER_ASSIGN_OR_RETURN(const std::size_t bits,
                                recipe.parameters.choice("bits", "4", kBits));
        KVTIER_ASSIGN_OR_RETURN(const std::size_t values,
                                recipe.parameters.choice("values", "64", kValues));
        KVTIER_ASSIGN_OR_RETURN(const std::size_t tail,
                                recipe.parameters.choice("tail", "on", kTail));
        options.bits = bits == 0 ? 4 : 2;
        options.value_tokens = 8u << values;
        options.tail = tail == 0;
        factory.needs.values = options.tail;
        factory.make = [options](const SelectorShape& shape,
                                 LayerIndex) -> Result<std::unique_ptr<Selector>> {
          KVTIER_RETURN_IF_ERROR(
              check_codes({.bits = options.bits, .dim = shape.head_dim, .dtype = shape.dtype}));
          return std::unique_ptr<Selector>(std::make_unique<Scan>(shape, options));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
