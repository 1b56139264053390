#include "selectors/code_selector.h"
#include "selectors/families.h"

#include <memory>

namespace kvtier {
namespace {

/// Scores every token on small codes of its key and chooses small blocks; from the same scores and
/// mean values of groups of tokens it estimates attention over everything that it did not choose.
/// Ours; the parts are known: low-bit keys for scoring (SALE, Twilight), an estimate for what is
/// not retrieved (RetroInfer, there from cluster centres).
///
/// A block's score is its estimated attention mass: softmax weights over all visible tokens, per
/// query and query head, added over the queries, reduced over the heads; under `kMean` the mean
/// logit. How keys are coded: quantised_keys.h; what is scored how: token_scores.h.
class Scan final : public CodeSelector {
 public:
  Scan(const SelectorShape& shape, const Options& options) : CodeSelector(shape, options) {}

  std::unique_ptr<Selector> fork() const override { return std::make_unique<Scan>(*this); }

 private:
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override {
    return rank(question, nullptr, selection, pool);
  }
};

}  // namespace

const SelectorFamily& scan_family() {
  static constexpr std::string_view kParameters[] = {"bits", "values", "tail", "fetch"};
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
        KVTIER_ASSIGN_OR_RETURN(const CodeSelector::Options options,
                                CodeSelector::Options::parse(recipe.parameters, factory.needs));
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
