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
                const RuntimeStats* stats) {
  std::vector<std::string> cells = {cell(run.selector), cell(run.budget), layer};
  for (std::string& value : quality_cells(figures)) cells.push_back(std::move(value));
  for (const std::uint64_t count : traffic.hits) cells.push_back(fmt::format("{}", count));
  for (const std::uint64_t bytes : traffic.bytes) cells.push_back(fmt::format("{}", bytes));
  // The tables and the look-ahead serve all layers: only the run as a whole has these.
  const auto total = [&](std::uint64_t value) {
    cells.push_back(stats != nullptr ? fmt::format("{}", value) : "");
  };
  const RuntimeStats none{};
  const RuntimeStats& all = stats != nullptr ? *stats : none;
  for (const std::uint64_t value :
       {all.prefetch.useful_bytes, all.prefetch.wasted_bytes, all.prefetch.late,
        all.verification.verified, all.verification.mismatched, all.verification.recovered,
        all.verification.failed, all.metadata_bytes, all.tiers[0].peak_bytes,
        all.tiers[1].peak_bytes, all.tiers[2].peak_bytes}) {
    total(value);
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
    append_row(text, run, "all", quality.overall, all, &run.stats);
    for (std::size_t layer = 0; layer < quality.layers.size(); ++layer) {
      append_row(text, run, fmt::format("{}", report.trace->layers()[layer].number),
                 quality.layers[layer], run.layers[layer], nullptr);
    }
  }
  return text;
}

}  // namespace kvtier
