#include "tools/replay/replay_report.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>

namespace kvtier {
namespace {

/// Quoted where a comma or a quote would end the cell: selectors have parameters.
std::string cell(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"') quoted += '"';
    quoted += c;
  }
  return quoted + "\"";
}

std::string cell(std::optional<double> value) {
  return value && std::isfinite(*value) ? fmt::format("{}", *value) : "";
}

template <typename T, typename Member>
std::string cell_of(const std::optional<T>& summary, Member member) {
  return summary ? cell(std::optional<double>((*summary).*member)) : "";
}

std::vector<std::string> quality_cells(const QualityFigures& figures) {
  return {cell(figures.tokens_attended_mean),
          cell_of(figures.recall, &ShareSummary::mean),
          cell_of(figures.recall, &ShareSummary::p5),
          cell_of(figures.recall, &ShareSummary::min),
          cell(figures.recall_ratio),
          cell(figures.recall_long_range),
          cell(figures.recall_long_range_ratio),
          cell(figures.evidence_recall),
          cell_of(figures.output_error, &ErrorSummary::mean),
          cell_of(figures.output_error, &ErrorSummary::max),
          cell_of(figures.attended_error, &ErrorSummary::max),
          fmt::format("{}", figures.failed_steps)};
}

void append_row(std::string& text, const RunRecord& run, const std::string& layer,
                const QualityFigures& figures, const LayerTraffic& traffic,
                const std::array<TierStats, kTierCount>* tiers) {
  std::vector<std::string> cells = {cell(run.selector), cell(run.budget), layer};
  for (std::string& value : quality_cells(figures)) cells.push_back(std::move(value));
  for (const std::uint64_t count : traffic.hits) cells.push_back(fmt::format("{}", count));
  for (const std::uint64_t bytes : traffic.bytes) cells.push_back(fmt::format("{}", bytes));
  for (const std::uint64_t value :
       {traffic.prefetch.useful_bytes, traffic.prefetch.wasted_bytes, traffic.prefetch.late,
        traffic.verification.verified, traffic.verification.mismatched,
        traffic.verification.recovered, traffic.verification.failed, traffic.metadata_bytes}) {
    cells.push_back(fmt::format("{}", value));
  }
  // Layers share the tiers: only the run as a whole has a peak.
  for (std::size_t tier = 0; tier < kTierCount; ++tier) {
    cells.push_back(tiers != nullptr ? fmt::format("{}", (*tiers)[tier].peak_bytes) : "");
  }
  text += fmt::format("{}\n", fmt::join(cells, ","));
}

constexpr const char* kHeader =
    "selector,budget,layer,tokens_attended_mean,recall_mean,recall_p5,recall_min,recall_ratio,"
    "recall_long_range,recall_long_range_ratio,evidence_recall,output_error_mean,output_error_max,"
    "attended_error_max,failed_steps,hits_device,hits_host,hits_disk,disk_to_host_bytes,"
    "host_to_device_bytes,device_to_host_bytes,host_to_disk_bytes,prefetch_useful_bytes,"
    "prefetch_wasted_bytes,prefetch_late,blocks_verified,blocks_mismatched,blocks_recovered,"
    "blocks_failed,metadata_bytes,device_peak_bytes,host_peak_bytes,disk_peak_bytes\n";

}  // namespace

std::string report_csv(const ReplayReport& report) {
  std::string text = kHeader;
  for (std::size_t index = 0; index < report.runs.size(); ++index) {
    const RunRecord& run = report.runs[index];
    const RunQuality& quality = report.qualities[index];
    LayerTraffic all;
    for (std::size_t tier = 0; tier < kTierCount; ++tier) {
      all.hits[tier] = run.stats.tiers[tier].hits;
    }
    for (std::size_t route = 0; route < kRouteCount; ++route) {
      all.bytes[route] = run.stats.routes[route].submitted_bytes;
    }
    all.prefetch = run.stats.prefetch;
    all.verification = run.stats.verification;
    all.metadata_bytes = run.stats.metadata_bytes;
    append_row(text, run, "all", quality.overall, all, &run.stats.tiers);
    for (std::size_t layer = 0; layer < quality.layers.size(); ++layer) {
      append_row(text, run, fmt::format("{}", report.trace->layers()[layer].number),
                 quality.layers[layer], run.layers[layer], nullptr);
    }
  }
  return text;
}

}  // namespace kvtier
