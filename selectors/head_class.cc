#include "selectors/decorated.h"
#include "selectors/families.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace kvtier {
namespace {

/// Head groups that need no far tokens get none: "streaming" heads hold sinks and window only,
/// while "retrieval" heads are served by the inner selector (DuoAttention, 2410.10819 [A][C];
/// RazorAttention, 2407.15891 [A]). Which head is which is measured outside, once per model, and
/// read from a file; a group of several KV heads is a retrieval group if one of them is a retrieval
/// head.
///
/// DuoAttention's sizes of sinks and window (64 and 256) belong to the shape here, and are those of
/// all heads. RazorAttention gives streaming heads a compensation token, the mean key and value of
/// what they drop; here an inner selector that estimates does so for them as for every other head,
/// from more than one mean.
///
/// The inner selector still scores all heads, so that the answers for retrieval heads are the very
/// ones it would give alone; what is saved is the tokens of streaming heads, which stay where they
/// are.
class HeadClass final : public Decorated {
 public:
  HeadClass(const SelectorShape& shape, std::unique_ptr<Selector> inner,
            std::vector<bool> retrieval_groups)
      : Decorated(shape, std::move(inner)), retrieval_(std::move(retrieval_groups)) {}

  Status select(const SelectRequest& request, std::span<GroupSelection> selection,
                WorkerPool& pool) override {
    KVTIER_RETURN_IF_ERROR(inner().select(request, selection, pool));
    clear_streaming(selection);
    return {};
  }
  Status hint(const SelectRequest& request, std::span<GroupSelection> selection,
              WorkerPool& pool) override {
    KVTIER_RETURN_IF_ERROR(inner().hint(request, selection, pool));
    clear_streaming(selection);
    return {};
  }
  std::unique_ptr<Selector> fork() const override { return std::make_unique<HeadClass>(*this); }

 private:
  void clear_streaming(std::span<GroupSelection> selection) const {
    for (std::size_t i = 0; i < selection.size(); ++i) {
      if (retrieval_[i]) continue;
      selection[i].ranked.clear();
      selection[i].chosen = 0;
      selection[i].held = 0;
      selection[i].mass = 0.0f;
    }
  }

  std::vector<bool> retrieval_;  ///< [head groups]
};

Result<std::vector<bool>> retrieval_groups(const HeadClasses& classes, const SelectorShape& shape,
                                           LayerIndex layer) {
  if (layer.value >= classes.retrieval.size()) {
    return invalid_argument(
        fmt::format("head-class: the file has {} layers, layer {} is selected "
                    "for",
                    classes.retrieval.size(), layer.value));
  }
  const std::vector<bool>& heads = classes.retrieval[layer.value];
  if (heads.size() < shape.kv_heads) {
    return invalid_argument(fmt::format("head-class: layer {} has {} KV heads in the file, {} here",
                                        layer.value, heads.size(), shape.kv_heads));
  }
  std::vector<bool> groups(shape.head_groups());
  for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
    if (heads[head]) groups[head / shape.heads_per_group] = true;
  }
  return groups;
}

Status make_head_class(const SelectorRecipe& recipe, SelectorFactory& factory) {
  if (!recipe.resources.head_classes) {
    return invalid_argument("head-class: nobody here reads files of head classes");
  }
  const std::string file = recipe.parameters.text("file").value_or("");
  KVTIER_ASSIGN_OR_RETURN(HeadClasses read, recipe.resources.head_classes(file));
  const auto classes = std::make_shared<const HeadClasses>(std::move(read));
  factory.make = [classes, inner = *recipe.inner](
                     const SelectorShape& shape,
                     LayerIndex layer) -> Result<std::unique_ptr<Selector>> {
    KVTIER_ASSIGN_OR_RETURN(std::vector<bool> groups, retrieval_groups(*classes, shape, layer));
    KVTIER_ASSIGN_OR_RETURN(std::unique_ptr<Selector> selector, inner(shape, layer));
    return Result<std::unique_ptr<Selector>>(
        std::make_unique<HeadClass>(shape, std::move(selector), std::move(groups)));
  };
  return {};
}

}  // namespace

const SelectorFamily& head_class_family() {
  static constexpr std::string_view kParameters[] = {"file"};
  static const SelectorFamily kFamily = {
      .name = "head-class",
      .summary = "streaming heads hold sinks and window only; classes from `file`, or the caller's",
      .source = "DuoAttention, 2410.10819; RazorAttention, 2407.15891",
      .parameters = kParameters,
      .decorates = true,
      .metadata = "the inner selector's",
      .build_cost = "the inner selector's",
      .step_cost = "the inner selector's",
      .make = make_head_class};
  return kFamily;
}

}  // namespace kvtier
