#pragma once

#include "selectors/selector.h"

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace kvtier {

/// Makes one selector per (sequence, layer).
using SelectorFactory =
    std::function<Result<std::unique_ptr<Selector>>(const SelectorShape& shape, LayerIndex layer)>;

/// A name as users type it: "landmark", "landmark(tokens=16,outliers=0)".
struct SelectorName {
  std::string family;
  std::vector<std::pair<std::string, std::string>> parameters;

  static Result<SelectorName> parse(std::string_view text);
};

/// `invalid_argument` names an unknown family (listing the known ones) or an unknown or malformed
/// parameter (listing the family's).
Result<SelectorFactory> make_selector_factory(std::string_view name);

/// Families in the order they are shown, each with a line on what it does and its source.
struct SelectorListing {
  std::string name;
  std::string summary;
};
std::vector<SelectorListing> known_selectors();

/// Splits "a,b(c=1,d=2),e" at commas outside parentheses; empty parts are an error.
Result<std::vector<std::string>> split_names(std::string_view list);

}  // namespace kvtier
