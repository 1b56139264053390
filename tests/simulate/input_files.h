#pragma once

#include "tests/tools/make_trace.h"
#include "tools/simulate/open_request_trace.h"

#include <map>
#include <optional>
#include <string>

namespace kvtier {

/// Texts of files by their names.
using InputFiles = std::map<std::string, std::string>;

/// These files in a scratch folder.
class InputFolder {
 public:
  explicit InputFolder(const InputFiles& files);
  /// Of a file, or of the folder.
  std::string path(const std::string& name = "") const;

 private:
  ScratchFolder scratch_;
};

/// Opens a file of this text and name.
Result<RequestTrace> open_text(const std::string& text, const TraceRules& rules = {},
                               const std::string& name = "trace.jsonl",
                               std::optional<TraceFormat> format = std::nullopt);

/// A small sound folder of RAGPulse: two requests, out of order.
InputFiles ragpulse_files();

}  // namespace kvtier
