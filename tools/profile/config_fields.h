#pragma once

#include "tools/trace/json_document.h"

#include <fmt/format.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvtier {

/// The keys of a model's config, as its family reads them: typed, bounded, and with every value
/// that was not there but taken for granted noted once. View of the document.
class ConfigFields {
 public:
  /// Above any model there is, and small enough that products of three stay within 64 bits.
  static constexpr std::uint64_t kCountMax = 1u << 20;

  ConfigFields(JsonField text, std::vector<std::string>& assumptions)
      : text_(std::move(text)), assumptions_(&assumptions) {}

  const JsonField& text() const { return text_; }

  bool has(std::string_view key) const {
    const auto field = text_.optional_member(key);
    return field.ok() && field->has_value();
  }
  /// A whole number from 1; failing where it is absent.
  Result<std::uint64_t> count(std::string_view key) const {
    KVTIER_ASSIGN_OR_RETURN(const JsonField field, text_.member(key));
    return field.as_count(1, kCountMax);
  }
  /// The same, or `fallback`, which is noted as the family's default.
  Result<std::uint64_t> count_or(std::string_view key, std::uint64_t fallback) const {
    KVTIER_ASSIGN_OR_RETURN(const auto field, text_.optional_member(key));
    if (field) return field->as_count(0, kCountMax);
    assume(fmt::format("{} is not given: {}, as the family's class has it", key, fallback));
    return fallback;
  }
  /// The same without a note: absent and 0 mean the same.
  Result<std::uint64_t> count_or_zero(std::string_view key, std::uint64_t most = kCountMax) const {
    KVTIER_ASSIGN_OR_RETURN(const auto field, text_.optional_member(key));
    return field ? field->as_count(0, most) : Result<std::uint64_t>(std::uint64_t{0});
  }
  Result<bool> flag_or(std::string_view key, bool fallback) const {
    KVTIER_ASSIGN_OR_RETURN(const auto field, text_.optional_member(key));
    return field ? field->as_bool() : Result<bool>(fallback);
  }
  Result<double> number_or(std::string_view key, double fallback) const {
    KVTIER_ASSIGN_OR_RETURN(const auto field, text_.optional_member(key));
    return field ? field->as_number() : Result<double>(fallback);
  }
  Result<std::string> string_or(std::string_view key, std::string fallback) const {
    KVTIER_ASSIGN_OR_RETURN(const auto field, text_.optional_member(key));
    return field ? field->as_string() : Result<std::string>(std::move(fallback));
  }
  /// A list of words with one per layer; none where it is absent.
  Result<std::optional<std::vector<std::string>>> words(std::string_view key,
                                                        std::size_t layers) const;
  /// Layer numbers, or anything else that is a list of whole numbers; none where it is absent.
  Result<std::optional<std::vector<std::uint64_t>>> numbers(std::string_view key) const;

  void assume(std::string line) const { assumptions_->push_back(std::move(line)); }
  Status error(std::string_view key, std::string_view found, std::string_view expected) const {
    const std::string path =
        text_.path().empty() ? std::string(key) : fmt::format("{}.{}", text_.path(), key);
    return input_error(text_.file(), path, found, expected);
  }

 private:
  JsonField text_;
  std::vector<std::string>* assumptions_;
};

}  // namespace kvtier
