#include "selectors/registry.h"

#include "selectors/families.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <optional>

namespace kvtier {
namespace {

std::span<const SelectorFamily* const> families() {
  static const SelectorFamily* const kFamilies[] = {
      // Every token on small codes.
      &scan_family(), &two_stage_family(), &int4_family(), &vq_family(), &soft_vote_family(),
      // Landmarks.
      &mean_family(), &minmax_family(), &mean_minmax_family(), &chunk_tree_family(),
      &hierarchical_family(), &chunk_summary_family(), &landmark_token_family(),
      // Units of other shapes, and other questions.
      &cluster_family(), &sentence_family(), &probe_family(), &prompt_observed_family(),
      // Handed over.
      &external_family(),
      // Baselines.
      &full_family(), &oracle_family(), &recency_family(), &random_family(),
      // Decorators.
      &refresh_family(), &head_class_family(), &adaptive_budget_family()};
  return kFamilies;
}

const SelectorFamily* find_family(std::string_view name) {
  for (const SelectorFamily* family : families()) {
    if (family->name == name || (!family->alias.empty() && family->alias == name)) return family;
  }
  return nullptr;
}

std::string joined(std::span<const std::string_view> names) {
  std::string text;
  for (std::string_view name : names) {
    if (!text.empty()) text += ", ";
    text += name;
  }
  return text;
}

std::string_view trimmed(std::string_view text) {
  const auto first = text.find_first_not_of(" \t");
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

Result<std::vector<std::string_view>> split_outside_parentheses(std::string_view text,
                                                                char separator) {
  std::vector<std::string_view> parts;
  std::size_t begin = 0;
  int depth = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '(') ++depth;
    if (text[i] == ')') --depth;
    if (depth < 0) break;
    if (text[i] == separator && depth == 0) {
      parts.push_back(trimmed(text.substr(begin, i - begin)));
      begin = i + 1;
    }
  }
  if (depth != 0) return invalid_argument(fmt::format("'{}': unbalanced parentheses", text));
  parts.push_back(trimmed(text.substr(begin)));
  return parts;
}

bool is_name(std::string_view text) {
  return !text.empty() && std::ranges::all_of(text, [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_';
  });
}

Status check_shape(const SelectorShape& shape) {
  if (shape.kv_heads == 0 || shape.heads_per_group == 0 ||
      shape.kv_heads % shape.heads_per_group != 0) {
    return invalid_argument(fmt::format("selector: {} KV heads do not divide into groups of {}",
                                        shape.kv_heads, shape.heads_per_group));
  }
  if (shape.queries_per_kv_head == 0 || shape.head_dim == 0 || shape.tokens_per_block == 0 ||
      shape.tokens_max == 0) {
    return invalid_argument(fmt::format(
        "selector: {} queries per KV head, head dim {}, {} tokens per block, at most "
        "{} tokens: each must be at least 1",
        shape.queries_per_kv_head, shape.head_dim, shape.tokens_per_block, shape.tokens_max));
  }
  return {};
}

}  // namespace

Result<SelectorParameters> SelectorParameters::make(SelectorName name,
                                                    std::span<const std::string_view> known) {
  for (std::size_t i = 0; i < name.parameters.size(); ++i) {
    const std::string& key = name.parameters[i].first;
    if (std::ranges::find(known, key) == known.end()) {
      return invalid_argument(fmt::format("selector '{}': unknown parameter '{}' (known: {})",
                                          name.family, key,
                                          known.empty() ? "none" : joined(known)));
    }
    for (std::size_t j = 0; j < i; ++j) {
      if (name.parameters[j].first == key) {
        return invalid_argument(
            fmt::format("selector '{}': parameter '{}' is given twice", name.family, key));
      }
    }
  }
  return SelectorParameters(std::move(name));
}

const std::string* SelectorParameters::find(std::string_view key) const {
  for (const auto& [name, value] : name_.parameters) {
    if (name == key) return &value;
  }
  return nullptr;
}

Result<std::uint32_t> SelectorParameters::integer(std::string_view key, std::uint32_t fallback,
                                                  std::uint32_t least, std::uint32_t most) const {
  const std::string* text = find(key);
  if (text == nullptr) return fallback;
  std::uint32_t value = 0;
  const char* end = text->data() + text->size();
  const auto [rest, error] = std::from_chars(text->data(), end, value);
  if (error != std::errc() || rest != end || value < least || value > most) {
    return invalid_argument(fmt::format("selector '{}': {}={}: expected an integer from {} to {}",
                                        name_.family, key, *text, least, most));
  }
  return value;
}

Result<double> SelectorParameters::fraction(std::string_view key, double fallback) const {
  return number(key, fallback, 0.0, 1.0);
}

Result<double> SelectorParameters::number(std::string_view key, double fallback, double least,
                                          double most) const {
  const std::string* text = find(key);
  if (text == nullptr) return fallback;
  double value = 0;
  const char* end = text->data() + text->size();
  const auto [rest, error] = std::from_chars(text->data(), end, value);
  if (error != std::errc() || rest != end || !(value >= least && value <= most)) {
    return invalid_argument(fmt::format("selector '{}': {}={}: expected a number from {} to {}",
                                        name_.family, key, *text, least, most));
  }
  return value;
}

Result<std::size_t> SelectorParameters::choice(std::string_view key, std::string_view fallback,
                                               std::span<const std::string_view> choices) const {
  const std::string* text = find(key);
  const std::string_view value = text == nullptr ? fallback : std::string_view(*text);
  const auto found = std::ranges::find(choices, value);
  if (found != choices.end()) return static_cast<std::size_t>(found - choices.begin());
  return invalid_argument(fmt::format("selector '{}': {}={}: expected one of {}", name_.family, key,
                                      value, joined(choices)));
}

std::optional<std::string> SelectorParameters::text(std::string_view key) const {
  const std::string* text = find(key);
  return text == nullptr ? std::nullopt : std::optional(*text);
}

Result<SelectorName> SelectorName::parse(std::string_view text) {
  const std::string_view whole = trimmed(text);
  const auto malformed = [&](std::string_view what) {
    return invalid_argument(
        fmt::format("selector '{}': {}; expected name or name(key=value,...)", text, what));
  };
  SelectorName name;
  const auto open = whole.find('(');
  name.family = trimmed(whole.substr(0, open));
  if (!is_name(name.family)) return malformed("no valid name");
  if (open == std::string_view::npos) return name;
  if (whole.back() != ')') return malformed("no closing parenthesis at its end");
  const std::string_view inside = whole.substr(open + 1, whole.size() - open - 2);
  if (trimmed(inside).empty()) return name;
  KVTIER_ASSIGN_OR_RETURN(const auto parts, split_outside_parentheses(inside, ','));
  for (std::string_view part : parts) {
    const auto equals = part.find('=');
    if (equals == std::string_view::npos) return malformed(fmt::format("'{}' has no '='", part));
    const std::string_view key = trimmed(part.substr(0, equals));
    const std::string_view value = trimmed(part.substr(equals + 1));
    if (!is_name(key) || value.empty()) return malformed(fmt::format("'{}' is incomplete", part));
    name.parameters.emplace_back(key, value);
  }
  return name;
}

namespace {

constexpr std::string_view kReductionKey = "reduction";

/// Takes `reduction=...` out of the parameters, since all families share it.
Result<std::optional<GroupReduction>> take_reduction(SelectorName& name) {
  static constexpr std::string_view kChoices[] = {"max", "sum", "mean"};
  std::optional<GroupReduction> reduction;
  for (auto at = name.parameters.begin(); at != name.parameters.end();) {
    if (at->first != kReductionKey) {
      ++at;
      continue;
    }
    if (reduction) {
      return invalid_argument(
          fmt::format("selector '{}': parameter '{}' is given twice", name.family, kReductionKey));
    }
    const auto found = std::ranges::find(kChoices, std::string_view(at->second));
    if (found == std::end(kChoices)) {
      return invalid_argument(fmt::format("selector '{}': {}={}: expected one of {}", name.family,
                                          kReductionKey, at->second, joined(kChoices)));
    }
    reduction = static_cast<GroupReduction>(found - std::begin(kChoices));
    at = name.parameters.erase(at);
  }
  return reduction;
}

/// One part of a composition; `inner` is what stands behind it, if anything does.
Result<SelectorFactory> make_part(std::string_view text, const SelectorResources& resources,
                                  const SelectorFactory* inner) {
  KVTIER_ASSIGN_OR_RETURN(SelectorName name, SelectorName::parse(text));
  const SelectorFamily* family = find_family(name.family);
  if (family == nullptr) {
    std::vector<std::string_view> known;
    for (const SelectorFamily* each : families()) known.push_back(each->name);
    return invalid_argument(
        fmt::format("unknown selector '{}' (known: {})", name.family, joined(known)));
  }
  if (family->decorates && inner == nullptr) {
    return invalid_argument(
        fmt::format("selector '{0}': it decorates another; expected {0}/name", name.family));
  }
  if (!family->decorates && inner != nullptr) {
    return invalid_argument(fmt::format(
        "selector '{}': only the last part of a composition selects, and this is not a decorator",
        name.family));
  }
  std::optional<GroupReduction> reduction;
  std::vector<std::string_view> keys(family->parameters.begin(), family->parameters.end());
  if (!family->decorates) {
    KVTIER_ASSIGN_OR_RETURN(reduction, take_reduction(name));
    keys.push_back(kReductionKey);
  }
  KVTIER_ASSIGN_OR_RETURN(const SelectorParameters parameters,
                          SelectorParameters::make(std::move(name), keys));
  SelectorFactory factory;
  factory.needs = inner != nullptr ? inner->needs : family->needs;
  factory.remembers = family->remembers || (inner != nullptr && inner->remembers);
  factory.partial_blocks = family->partial_blocks || (inner != nullptr && inner->partial_blocks);
  KVTIER_RETURN_IF_ERROR(family->make({parameters, resources, inner}, factory));
  factory.make = [make = std::move(factory.make), reduction](
                     SelectorShape shape, LayerIndex layer) -> Result<std::unique_ptr<Selector>> {
    KVTIER_RETURN_IF_ERROR(check_shape(shape));
    if (reduction) shape.reduction = *reduction;
    return make(shape, layer);
  };
  return factory;
}

}  // namespace

Result<SelectorFactory> make_selector_factory(std::string_view text,
                                              const SelectorResources& resources) {
  KVTIER_ASSIGN_OR_RETURN(const auto parts, split_outside_parentheses(trimmed(text), '/'));
  SelectorFactory factory;
  for (std::size_t i = parts.size(); i-- > 0;) {
    const SelectorFactory* inner = i + 1 < parts.size() ? &factory : nullptr;
    KVTIER_ASSIGN_OR_RETURN(SelectorFactory outer, make_part(parts[i], resources, inner));
    factory = std::move(outer);
  }
  factory.name = text;
  return factory;
}

std::vector<SelectorListing> known_selectors() {
  std::vector<SelectorListing> listings;
  for (const SelectorFamily* family : families()) {
    listings.push_back({.name = std::string(family->name),
                        .alias = std::string(family->alias),
                        .summary = std::string(family->summary),
                        .source = std::string(family->source),
                        .parameters = joined(family->parameters),
                        .decorates = family->decorates,
                        .needs = family->needs,
                        .metadata = std::string(family->metadata),
                        .build_cost = std::string(family->build_cost),
                        .step_cost = std::string(family->step_cost)});
  }
  return listings;
}

std::string missing_needs(const SelectorNeeds& needed, const SelectorNeeds& present) {
  std::vector<std::string_view> missing;
  const auto check = [&missing](bool need, bool have, std::string_view name) {
    if (need && !have) missing.push_back(name);
  };
  check(needed.values, present.values, "values");
  check(needed.prompt_queries, present.prompt_queries, "prompt queries");
  check(needed.sentence_ends, present.sentence_ends, "sentence ends");
  check(needed.landmark_tokens, present.landmark_tokens, "landmark tokens");
  check(needed.rope, present.rope, "the base of the rotary embedding (rope theta)");
  check(needed.external_scores, present.external_scores, "external scores");
  return joined(missing);
}

Result<std::vector<std::string>> split_names(std::string_view list) {
  KVTIER_ASSIGN_OR_RETURN(const auto parts, split_outside_parentheses(list, ','));
  std::vector<std::string> names;
  for (std::string_view part : parts) {
    if (part.empty()) return invalid_argument(fmt::format("'{}': an empty name in the list", list));
    names.emplace_back(part);
  }
  return names;
}

}  // namespace kvtier
