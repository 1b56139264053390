#include "tools/simulate/csv_records.h"

#include "tools/cli/parse.h"
#include "tools/trace/json_document.h"

#include <algorithm>

namespace kvtier {

Status CsvRecords::split(const TextLine& line) {
  line_ = line.number;
  cells_.assign(1, {});
  bool quoted = false;
  for (std::size_t i = 0; i < line.text.size(); ++i) {
    const char character = line.text[i];
    if (character == '"') {
      // Two quotes inside a quoted cell are one that belongs to it.
      if (quoted && i + 1 < line.text.size() && line.text[i + 1] == '"')
        cells_.back() += line.text[++i];
      else
        quoted = !quoted;
    } else if (character == ',' && !quoted) {
      cells_.emplace_back();
    } else {
      cells_.back() += character;
    }
  }
  if (!quoted) return {};
  return input_error(fmt::format("{}:{}", file_, line_), "row", "an open quote", "closed quotes");
}

Status CsvRecords::read_header(const TextLine& line, std::vector<std::string> columns) {
  KVTIER_RETURN_IF_ERROR(split(line));
  columns_ = std::move(columns);
  width_ = cells_.size();
  for (const std::string& column : columns_) {
    const auto found = std::ranges::find(cells_, column);
    if (found == cells_.end()) {
      return input_error(fmt::format("{}:{}", file_, line_), column, "no such column",
                         "the column");
    }
    places_.push_back(static_cast<std::size_t>(found - cells_.begin()));
  }
  return {};
}

Status CsvRecords::read_row(const TextLine& line) {
  KVTIER_RETURN_IF_ERROR(split(line));
  if (cells_.size() == width_) return {};
  return input_error(fmt::format("{}:{}", file_, line_), "row",
                     fmt::format("{} cells", cells_.size()), fmt::format("{}", width_));
}

Result<std::uint64_t> CsvRecords::count(std::size_t column) const {
  const Result<std::uint64_t> value = parse_count(cell(column));
  if (value.ok()) return value;
  return mismatch(column, "a whole number");
}

Result<double> CsvRecords::number(std::size_t column) const {
  const Result<double> value = parse_number(cell(column));
  if (value.ok() && *value >= 0) return value;
  return mismatch(column, "a number from 0");
}

Status CsvRecords::mismatch(std::size_t column, std::string_view expected) const {
  return input_error(fmt::format("{}:{}", file_, line_), columns_[column],
                     fmt::format("'{}'", cell(column)), expected);
}

}  // namespace kvtier
