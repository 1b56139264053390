#pragma once

#include "memory/status.h"
#include "tools/simulate/line_reader.h"

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kvtier {

/// Rows of a CSV file with a header line, by the names of its columns. Cells may stand in quotes;
/// a quoted cell does not go on in the next line.
class CsvRecords {
 public:
  explicit CsvRecords(std::string file) : file_(std::move(file)) {}

  /// Takes the header; fails when one of `columns` is missing. Later calls name columns by their
  /// place in `columns`.
  Status read_header(const TextLine& line, std::vector<std::string> columns);
  /// Takes a row; fails unless it has as many cells as the header.
  Status read_row(const TextLine& line);

  const std::string& cell(std::size_t column) const { return cells_[places_[column]]; }
  Result<std::uint64_t> count(std::size_t column) const;
  /// A finite number from 0.
  Result<double> number(std::size_t column) const;

  /// The failure that a cell is not `expected`.
  Status mismatch(std::size_t column, std::string_view expected) const;

 private:
  Status split(const TextLine& line);

  std::string file_;
  std::uint64_t line_ = 0;
  std::vector<std::string> columns_;  ///< As asked for.
  std::vector<std::size_t> places_;   ///< Of each of `columns_` in a row.
  std::size_t width_ = 0;             ///< Cells of the header.
  std::vector<std::string> cells_;
};

}  // namespace kvtier
