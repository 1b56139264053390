#include "tools/cli/replay_result.h"

#include "memory/ids.h"
#include "tools/trace/json_document.h"

#include <limits>

namespace kvtier {
namespace {

constexpr std::uint64_t kAnyCount = std::numeric_limits<std::uint64_t>::max();
// Shares are sums of float32 weights and may pass 1 by their rounding.
constexpr double kLargestShare = 1.0 + 1e-4;

// Null is how a run says that the trace had no answer: the key must be there all the same.
Result<std::optional<double>> read_ratio(const JsonField& parent, std::string_view key,
                                         double most) {
  KVTIER_ASSIGN_OR_RETURN(const std::optional<JsonField> field, parent.optional_member(key));
  if (!field) {
    if (parent.value().contains(std::string(key))) return std::optional<double>();
    return parent.member(key).status();
  }
  KVTIER_ASSIGN_OR_RETURN(const double ratio, field->as_number());
  if (ratio < 0 || ratio > most) {
    return field->mismatch(most == kLargestShare ? "a share from 0 to 1" : "a number from 0");
  }
  return std::optional<double>(ratio);
}

Result<std::uint64_t> read_count(const JsonField& parent, std::string_view key) {
  KVTIER_ASSIGN_OR_RETURN(const JsonField field, parent.member(key));
  return field.as_count(0, kAnyCount);
}

Status check_quality(const JsonField& run, ReplayRunSummary& summary) {
  constexpr double kAny = std::numeric_limits<double>::max();
  KVTIER_RETURN_IF_ERROR(read_ratio(run, "tokens_attended_mean", kAny).status());
  KVTIER_ASSIGN_OR_RETURN(const JsonField recall, run.member("recall"));
  KVTIER_ASSIGN_OR_RETURN(summary.recall_mean, read_ratio(recall, "mean", kLargestShare));
  KVTIER_RETURN_IF_ERROR(read_ratio(recall, "p5", kLargestShare).status());
  KVTIER_RETURN_IF_ERROR(read_ratio(recall, "min", kLargestShare).status());
  KVTIER_ASSIGN_OR_RETURN(summary.recall_ratio, read_ratio(run, "recall_ratio", kAny));
  KVTIER_RETURN_IF_ERROR(read_ratio(run, "recall_long_range", kLargestShare).status());
  KVTIER_RETURN_IF_ERROR(read_ratio(run, "recall_long_range_ratio", kAny).status());
  KVTIER_RETURN_IF_ERROR(read_ratio(run, "evidence_recall", kLargestShare).status());
  KVTIER_ASSIGN_OR_RETURN(const std::optional<JsonField> error,
                          run.optional_member("output_error"));
  if (!error) return read_ratio(run, "output_error", kAny).status();
  KVTIER_RETURN_IF_ERROR(read_ratio(*error, "mean", kAny).status());
  KVTIER_ASSIGN_OR_RETURN(summary.output_error_max, read_ratio(*error, "max", kAny));
  return {};
}

Status check_tiers(const JsonField& run) {
  KVTIER_ASSIGN_OR_RETURN(const JsonField tiers, run.member("tiers"));
  for (const Tier tier : {Tier::kDevice, Tier::kHost, Tier::kDisk}) {
    KVTIER_ASSIGN_OR_RETURN(const JsonField field, tiers.member(to_string(tier)));
    KVTIER_ASSIGN_OR_RETURN(const std::uint64_t capacity, read_count(field, "capacity_bytes"));
    KVTIER_ASSIGN_OR_RETURN(const std::uint64_t peak, read_count(field, "peak_bytes"));
    KVTIER_RETURN_IF_ERROR(read_count(field, "hits").status());
    if (peak > capacity) {
      KVTIER_ASSIGN_OR_RETURN(const JsonField peak_field, field.member("peak_bytes"));
      return peak_field.mismatch(fmt::format("at most capacity_bytes, {}", capacity));
    }
  }
  return {};
}

Status check_traffic(const JsonField& run, ReplayRunSummary& summary) {
  KVTIER_ASSIGN_OR_RETURN(const JsonField blocks, run.member("blocks"));
  KVTIER_ASSIGN_OR_RETURN(summary.blocks_verified, read_count(blocks, "verified"));
  KVTIER_ASSIGN_OR_RETURN(summary.blocks_mismatched, read_count(blocks, "mismatched"));
  KVTIER_RETURN_IF_ERROR(read_count(blocks, "recovered").status());
  KVTIER_ASSIGN_OR_RETURN(summary.blocks_failed, read_count(blocks, "failed"));
  KVTIER_ASSIGN_OR_RETURN(const JsonField bytes, run.member("bytes"));
  for (const char* link : {"disk_to_host", "host_to_device", "device_to_host", "host_to_disk"}) {
    KVTIER_RETURN_IF_ERROR(read_count(bytes, link).status());
  }
  KVTIER_ASSIGN_OR_RETURN(const JsonField prefetch, run.member("prefetch"));
  for (const char* kind : {"useful_bytes", "wasted_bytes", "late"}) {
    KVTIER_RETURN_IF_ERROR(read_count(prefetch, kind).status());
  }
  return read_count(run, "metadata_bytes").status();
}

Result<ReplayRunSummary> check_run(const JsonField& run) {
  ReplayRunSummary summary;
  KVTIER_ASSIGN_OR_RETURN(const JsonField selector, run.member("selector"));
  KVTIER_ASSIGN_OR_RETURN(summary.selector, selector.as_string());
  KVTIER_ASSIGN_OR_RETURN(const JsonField budget, run.member("budget"));
  KVTIER_ASSIGN_OR_RETURN(summary.budget, budget.as_string());
  KVTIER_RETURN_IF_ERROR(check_quality(run, summary));
  KVTIER_RETURN_IF_ERROR(check_tiers(run));
  KVTIER_RETURN_IF_ERROR(check_traffic(run, summary));
  KVTIER_ASSIGN_OR_RETURN(const JsonField layers, run.member("layers"));
  KVTIER_ASSIGN_OR_RETURN(const std::vector<JsonField> per_layer, layers.elements());
  summary.layers = per_layer.size();
  return summary;
}

}  // namespace

Result<ReplayResultSummary> ReplayResultSummary::check(const nlohmann::json& document,
                                                       const std::string& file) {
  const JsonField root(document, file);
  KVTIER_ASSIGN_OR_RETURN(const JsonField schema, root.member("schema"));
  if (schema.value() != nlohmann::json(kSchema))
    return schema.mismatch(fmt::format("\"{}\"", kSchema));
  KVTIER_ASSIGN_OR_RETURN(const JsonField version, root.member("version"));
  if (version.value() != kVersion) {
    return version.mismatch(fmt::format("{}", kVersion), "written by another release");
  }
  for (const char* part : {"options", "trace", "machine"}) {
    KVTIER_ASSIGN_OR_RETURN(const JsonField field, root.member(part));
    if (!field.value().is_object()) return field.mismatch("an object");
  }
  KVTIER_ASSIGN_OR_RETURN(const JsonField runs, root.member("runs"));
  KVTIER_ASSIGN_OR_RETURN(const std::vector<JsonField> fields, runs.elements());
  if (fields.empty()) return runs.mismatch("at least one run");
  ReplayResultSummary result;
  for (const JsonField& field : fields) {
    KVTIER_ASSIGN_OR_RETURN(ReplayRunSummary run, check_run(field));
    result.runs.push_back(std::move(run));
  }
  return result;
}

}  // namespace kvtier
