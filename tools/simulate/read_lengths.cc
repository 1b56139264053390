// Azure and BurstGPT: arrivals and lengths, and nothing by which a prompt could be found again.

#include "tools/simulate/csv_records.h"
#include "tools/simulate/request_readers.h"

#include <fmt/format.h>

#include <chrono>
#include <cmath>

namespace kvtier {
namespace {

// Two digits and more, as a number; none when one is missing.
std::optional<int> digits_at(std::string_view text, std::size_t place, std::size_t count) {
  if (place + count > text.size()) return std::nullopt;
  int value = 0;
  for (const char digit : text.substr(place, count)) {
    if (digit < '0' || digit > '9') return std::nullopt;
    value = 10 * value + (digit - '0');
  }
  return value;
}

enum Columns : std::size_t { kTimestamp, kInput, kOutput };

}  // namespace

std::optional<std::int64_t> parse_time_us(std::string_view text) {
  if (text.ends_with('Z')) text.remove_suffix(1);
  const auto year = digits_at(text, 0, 4);
  const auto month = digits_at(text, 5, 2);
  const auto day = digits_at(text, 8, 2);
  const auto hour = digits_at(text, 11, 2);
  const auto minute = digits_at(text, 14, 2);
  const auto second = digits_at(text, 17, 2);
  if (!year || !month || !day || !hour || !minute || !second) return std::nullopt;
  const bool is_punctuated = text[4] == '-' && text[7] == '-' && text[13] == ':' &&
                             text[16] == ':' && (text[10] == ' ' || text[10] == 'T');
  const std::chrono::year_month_day date(std::chrono::year(*year),
                                         std::chrono::month(static_cast<unsigned>(*month)),
                                         std::chrono::day(static_cast<unsigned>(*day)));
  if (!is_punctuated || !date.ok() || *hour > 23 || *minute > 59 || *second > 60) {
    return std::nullopt;
  }
  std::int64_t microseconds = 0;
  if (text.size() > 19) {
    const std::size_t decimals = text.size() - 20;
    if (text[19] != '.' || decimals == 0 ||
        !digits_at(text, 20, std::min<std::size_t>(decimals, 9)) || decimals > 9) {
      return std::nullopt;
    }
    for (std::size_t i = 0; i < 6; ++i) {
      microseconds = 10 * microseconds + (i < decimals ? text[20 + i] - '0' : 0);
    }
  }
  const auto days = std::chrono::sys_days(date).time_since_epoch().count();
  const std::int64_t seconds = ((std::int64_t{days} * 24 + *hour) * 60 + *minute) * 60 + *second;
  return seconds * 1'000'000 + microseconds;
}

Status read_length_rows(TraceFormat format, LineReader& lines, RequestTraceBuilder& builder) {
  CsvRecords csv(lines.path());
  KVTIER_ASSIGN_OR_RETURN(std::optional<TextLine> line, lines.next());
  if (!line) return {};
  const bool is_azure = format == TraceFormat::kAzure;
  KVTIER_RETURN_IF_ERROR(csv.read_header(
      *line, is_azure
                 ? std::vector<std::string>{"TIMESTAMP", "ContextTokens", "GeneratedTokens"}
                 : std::vector<std::string>{"Timestamp", "Request tokens", "Response tokens"}));
  while (true) {
    KVTIER_ASSIGN_OR_RETURN(line, lines.next());
    if (!line) return {};
    KVTIER_RETURN_IF_ERROR(csv.read_row(*line));
    RequestTraceBuilder::Arrival arrival;
    if (is_azure) {
      const auto time = parse_time_us(csv.cell(kTimestamp));
      if (!time) return csv.mismatch(kTimestamp, "a date and time");
      arrival.arrival_us = *time;
    } else {
      KVTIER_ASSIGN_OR_RETURN(const double seconds, csv.number(kTimestamp));
      arrival.arrival_us = std::llrint(std::min(seconds, 9e12) * 1e6);
    }
    KVTIER_ASSIGN_OR_RETURN(arrival.input_tokens, csv.count(kInput));
    KVTIER_ASSIGN_OR_RETURN(arrival.output_tokens, csv.count(kOutput));
    KVTIER_RETURN_IF_ERROR(located(lines, line->number, "tokens", builder.begin_request(arrival)));
  }
}

}  // namespace kvtier
