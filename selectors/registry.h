#pragma once

#include "selectors/selector.h"

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvtier {

/// A selector as it was asked for: makes one per (sequence, layer), and says what those need.
struct SelectorFactory {
  std::string name;  ///< As typed.
  SelectorNeeds needs;
  /// Answers depend on the questions asked before, and not on the tokens alone.
  bool remembers = false;
  /// Units need not be whole blocks: several may be parts of one.
  bool partial_blocks = false;
  std::function<Result<std::unique_ptr<Selector>>(const SelectorShape& shape, LayerIndex layer)>
      make;

  explicit operator bool() const { return make != nullptr; }
  Result<std::unique_ptr<Selector>> operator()(const SelectorShape& shape, LayerIndex layer) const {
    return make(shape, layer);
  }
};

/// One name with its parameters: "mean", "mean(tokens=16,outliers=0)".
struct SelectorName {
  std::string family;
  std::vector<std::pair<std::string, std::string>> parameters;

  static Result<SelectorName> parse(std::string_view text);
};

/// Which KV heads need the whole context: [layers][KV heads], by the runtime's layers.
struct HeadClasses {
  std::vector<std::vector<bool>> retrieval;
};

/// What selectors ask of the outside: this folder reads no files.
struct SelectorResources {
  /// Reads a file of head classes; unset where there are no files.
  std::function<Result<HeadClasses>(const std::string& path)> head_classes;
};

/// Understands names as users type them, decorators first: "scan(bits=2)",
/// "refresh(interval=4)/head-class(file=f.json)/minmax". Every family but decorators also takes
/// `reduction=max|sum|mean`, which replaces the shape's.
/// `invalid_argument` names an unknown family (listing the known ones), an unknown or malformed
/// parameter (listing the family's), a decorator without a selector behind it, or a selector that
/// stands where a decorator must.
Result<SelectorFactory> make_selector_factory(std::string_view name,
                                              const SelectorResources& resources = {});

/// What a runtime selects with when nobody says otherwise, and why: README.md.
inline constexpr std::string_view kDefaultSelector = "scan";

/// Families in the order they are shown, with what a user chooses by.
struct SelectorListing {
  std::string name;
  std::string alias;
  std::string summary;
  std::string source;  ///< Paper, or empty.
  std::string parameters;
  bool decorates = false;
  SelectorNeeds needs;
  std::string metadata;    ///< Bytes kept per token and KV head.
  std::string build_cost;  ///< Work per appended token and KV head.
  std::string step_cost;   ///< Work per step and KV head.
};
std::vector<SelectorListing> known_selectors();

/// What is needed that is not there, in words: "sentence ends, prompt queries"; empty if nothing.
std::string missing_needs(const SelectorNeeds& needed, const SelectorNeeds& present);

/// Splits "a,b(c=1,d=2),e" at commas outside parentheses; empty parts are an error.
Result<std::vector<std::string>> split_names(std::string_view list);

/// A selector's state with what it must match: the name it was made by and its shape.
/// `restore_selector` makes the selector and gives it the state; `invalid_argument` when the bytes
/// are of another selector or shape, `corrupt` when they are damaged.
std::vector<std::byte> save_selector(const Selector& selector, std::string_view name,
                                     const SelectorShape& shape);
Result<std::unique_ptr<Selector>> restore_selector(std::span<const std::byte> bytes,
                                                   const SelectorFactory& factory,
                                                   const SelectorShape& shape, LayerIndex layer);

}  // namespace kvtier
