#include "selectors/registry.h"

#include "selectors/families.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstddef>

namespace kvtier {
namespace {

std::span<const SelectorFamily* const> families() {
  static const SelectorFamily* const kFamilies[] = {&landmark_family(), &oracle_family(),
                                                    &recency_family(), &random_family()};
  return kFamilies;
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

Result<std::vector<std::string_view>> split_outside_parentheses(std::string_view text) {
  std::vector<std::string_view> parts;
  std::size_t begin = 0;
  int depth = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '(') ++depth;
    if (text[i] == ')') --depth;
    if (depth < 0) break;
    if (text[i] == ',' && depth == 0) {
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
  const std::string* text = find(key);
  if (text == nullptr) return fallback;
  double value = 0;
  const char* end = text->data() + text->size();
  const auto [rest, error] = std::from_chars(text->data(), end, value);
  if (error != std::errc() || rest != end || !(value >= 0.0 && value <= 1.0)) {
    return invalid_argument(fmt::format("selector '{}': {}={}: expected a number from 0 to 1",
                                        name_.family, key, *text));
  }
  return value;
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
  KVTIER_ASSIGN_OR_RETURN(const auto parts, split_outside_parentheses(inside));
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

Result<SelectorFactory> make_selector_factory(std::string_view text) {
  KVTIER_ASSIGN_OR_RETURN(SelectorName name, SelectorName::parse(text));
  for (const SelectorFamily* family : families()) {
    if (family->name != name.family) continue;
    KVTIER_ASSIGN_OR_RETURN(const SelectorParameters parameters,
                            SelectorParameters::make(std::move(name), family->parameters));
    KVTIER_ASSIGN_OR_RETURN(SelectorFactory make, family->make(parameters));
    return SelectorFactory(
        [make = std::move(make)](const SelectorShape& shape,
                                 LayerIndex layer) -> Result<std::unique_ptr<Selector>> {
          KVTIER_RETURN_IF_ERROR(check_shape(shape));
          return make(shape, layer);
        });
  }
  std::vector<std::string_view> known;
  for (const SelectorFamily* family : families()) known.push_back(family->name);
  return invalid_argument(
      fmt::format("unknown selector '{}' (known: {})", name.family, joined(known)));
}

std::vector<SelectorListing> known_selectors() {
  std::vector<SelectorListing> listings;
  for (const SelectorFamily* family : families()) {
    listings.push_back({std::string(family->name), std::string(family->summary)});
  }
  return listings;
}

Result<std::vector<std::string>> split_names(std::string_view list) {
  KVTIER_ASSIGN_OR_RETURN(const auto parts, split_outside_parentheses(list));
  std::vector<std::string> names;
  for (std::string_view part : parts) {
    if (part.empty()) return invalid_argument(fmt::format("'{}': an empty name in the list", list));
    names.emplace_back(part);
  }
  return names;
}

}  // namespace kvtier
