#pragma once

#include "selectors/registry.h"

#include <cstdint>
#include <optional>
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
  Result<double> number(std::string_view key, double fallback, double least, double most) const;
  /// Index into `choices` of the value; `fallback` is one of them.
  Result<std::size_t> choice(std::string_view key, std::string_view fallback,
                             std::span<const std::string_view> choices) const;
  /// The value as typed, if given.
  std::optional<std::string> text(std::string_view key) const;

 private:
  explicit SelectorParameters(SelectorName name) : name_(std::move(name)) {}
  const std::string* find(std::string_view key) const;

  SelectorName name_;
};

/// What a family is made from.
struct SelectorRecipe {
  const SelectorParameters& parameters;
  const SelectorResources& resources;
  /// What a decorator decorates; null for every other family.
  const SelectorFactory* inner = nullptr;
};

/// What a selector's file tells the registry about itself. `make` fills in what a factory needs
/// beyond its name; the family's own needs and memory are already there, or the inner selector's
/// for a decorator, and `make` changes them where parameters do.
struct SelectorFamily {
  std::string_view name;
  std::string_view alias;  ///< A second name, or empty.
  std::string_view summary;
  std::string_view source;
  std::span<const std::string_view> parameters;
  bool decorates = false;
  bool remembers = false;       ///< See `SelectorFactory`.
  bool partial_blocks = false;  ///< Likewise.
  SelectorNeeds needs;
  std::string_view metadata;  ///< For `SelectorListing`, like the next two.
  std::string_view build_cost;
  std::string_view step_cost;
  Status (*make)(const SelectorRecipe& recipe, SelectorFactory& factory);
};

// One per file; the list in registry.cc is the only place that names them all.
const SelectorFamily& scan_family();
const SelectorFamily& two_stage_family();
const SelectorFamily& int4_family();
const SelectorFamily& vq_family();
const SelectorFamily& soft_vote_family();
const SelectorFamily& mean_family();
const SelectorFamily& minmax_family();
const SelectorFamily& mean_minmax_family();
const SelectorFamily& chunk_tree_family();
const SelectorFamily& hierarchical_family();
const SelectorFamily& chunk_summary_family();
const SelectorFamily& landmark_token_family();
const SelectorFamily& cluster_family();
const SelectorFamily& sentence_family();
const SelectorFamily& probe_family();
const SelectorFamily& prompt_observed_family();
const SelectorFamily& external_family();
const SelectorFamily& full_family();
const SelectorFamily& oracle_family();
const SelectorFamily& recency_family();
const SelectorFamily& random_family();
const SelectorFamily& refresh_family();
const SelectorFamily& head_class_family();
const SelectorFamily& adaptive_budget_family();

}  // namespace kvtier
