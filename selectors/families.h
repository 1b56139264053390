#pragma once

#include "selectors/registry.h"

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvtier {

/// The parameters of one name, `key=value`, read by the family they belong to.
/// Every failure is `invalid_argument` and names the family, the parameter and what it accepts.
class SelectorParameters {
 public:
  /// Refuses keys outside `known` and keys given twice.
  static Result<SelectorParameters> make(SelectorName name,
                                         std::span<const std::string_view> known);

  Result<std::uint32_t> integer(std::string_view key, std::uint32_t fallback, std::uint32_t least,
                                std::uint32_t most) const;
  Result<double> fraction(std::string_view key, double fallback) const;

 private:
  explicit SelectorParameters(SelectorName name) : name_(std::move(name)) {}
  const std::string* find(std::string_view key) const;

  SelectorName name_;
};

/// What a selector's file tells the registry about itself.
struct SelectorFamily {
  std::string_view name;
  std::string_view summary;
  std::span<const std::string_view> parameters;
  Result<SelectorFactory> (*make)(const SelectorParameters& parameters);
};

/// One per file; the list in registry.cc is the only place that names them all.
const SelectorFamily& landmark_family();
const SelectorFamily& oracle_family();
const SelectorFamily& recency_family();
const SelectorFamily& random_family();

}  // namespace kvtier
