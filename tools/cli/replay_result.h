#pragma once

#include "memory/status.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kvtier {

/// What one run of a replay result holds, for a summary. Ratios are none where the run had no
/// answer.
struct ReplayRunSummary {
  std::string selector;
  std::string budget;
  std::optional<double> recall_mean;
  std::optional<double> recall_ratio;
  std::optional<double> output_error_max;
  std::uint64_t blocks_verified = 0;
  std::uint64_t blocks_mismatched = 0;
  std::uint64_t blocks_failed = 0;
  std::size_t layers = 0;
};

struct ReplayResultSummary {
  static constexpr std::string_view kSchema = "kvtier.replay-result";
  static constexpr std::uint32_t kVersion = 1;

  std::vector<ReplayRunSummary> runs;

  /// Checks that `document` is a well-formed replay result: every field of every run there, of its
  /// type, within its range, and no tier over its capacity. `file` names it in errors. Fails with
  /// `corrupt`.
  static Result<ReplayResultSummary> check(const nlohmann::json& document, const std::string& file);
};

}  // namespace kvtier
