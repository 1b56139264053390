#include "tools/simulate/open_request_trace.h"

#include "tools/simulate/line_reader.h"
#include "tools/simulate/request_readers.h"
#include "tools/trace/json_document.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <span>
#include <utility>
#include <vector>

namespace kvtier {
namespace {

namespace fs = std::filesystem;

constexpr const char* kRagpulseRequests = "0_trace.jsonl";

bool is_json_document(const fs::path& path) {
  const std::string name = path.filename().string();
  return name.ends_with(".json") || name.ends_with(".json.zst");
}

// The file itself, or its compressed twin.
fs::path plain_or_zst(const fs::path& path) {
  std::error_code ignored;
  if (fs::exists(path, ignored)) return path;
  const fs::path compressed = path.string() + ".zst";
  return fs::exists(compressed, ignored) ? compressed : path;
}

std::string digest_of_files(const std::vector<std::pair<std::string, std::string>>& digests) {
  std::string lines;
  for (const auto& [name, digest] : digests) lines += fmt::format("{} {}\n", name, digest);
  return "sha256:" + sha256_hex(std::as_bytes(std::span(lines)));
}

std::string name_of_path(const std::string& path) {
  fs::path normal = fs::path(path).lexically_normal();
  if (!normal.has_filename()) normal = normal.parent_path();
  return normal.filename().string();
}

Result<RequestTraceBuilder> make_builder(TraceFormat format, const TraceRules& rules) {
  KVTIER_ASSIGN_OR_RETURN(const TraceIdentity identity, resolve_identity(format, rules));
  return RequestTraceBuilder(to_string(format), identity, rules);
}

Result<RequestTrace> finish(RequestTraceBuilder builder, const std::string& path,
                            std::string digest) {
  auto trace = std::move(builder).finish(name_of_path(path), std::move(digest));
  if (trace.ok()) return trace;
  return input_error(path, "content", "no request", "at least one");
}

Result<RequestTrace> read_ragpulse_folder(const fs::path& requests, const std::string& path,
                                          const TraceRules& rules) {
  KVTIER_ASSIGN_OR_RETURN(RequestTraceBuilder builder, make_builder(TraceFormat::kRagpulse, rules));
  std::vector<std::pair<std::string, std::string>> digests;
  RagpulseLengths lengths;
  for (std::size_t part = 0; part < kRagpulseParts.size(); ++part) {
    const fs::path table = plain_or_zst(requests.parent_path() / kRagpulseParts[part].table);
    KVTIER_ASSIGN_OR_RETURN(InputStream input, InputStream::open(table.string()));
    LineReader lines(std::move(input));
    KVTIER_RETURN_IF_ERROR(read_ragpulse_table(lines, part, lengths));
    digests.emplace_back(table.filename().string(), lines.digest());
  }
  KVTIER_ASSIGN_OR_RETURN(InputStream input, InputStream::open(requests.string()));
  LineReader lines(std::move(input));
  KVTIER_RETURN_IF_ERROR(read_ragpulse(lines, lengths, builder));
  digests.emplace_back(requests.filename().string(), lines.digest());
  std::ranges::sort(digests);
  return finish(std::move(builder), path, digest_of_files(digests));
}

Result<RequestTrace> read_session_folder(const std::vector<fs::path>& files,
                                         const std::string& path, const TraceRules& rules) {
  KVTIER_ASSIGN_OR_RETURN(RequestTraceBuilder builder,
                          make_builder(TraceFormat::kAgentSessions, rules));
  std::vector<std::pair<std::string, std::string>> digests;
  std::uint32_t session = 0;
  for (const fs::path& file : files) {
    KVTIER_ASSIGN_OR_RETURN(InputStream input, InputStream::open(file.string()));
    LineReader lines(std::move(input));
    KVTIER_RETURN_IF_ERROR(read_agent_sessions(lines, true, session, builder));
    digests.emplace_back(file.filename().string(), lines.digest());
  }
  return finish(std::move(builder), path, digest_of_files(digests));
}

Result<RequestTrace> read_folder(const std::string& path, std::optional<TraceFormat> format,
                                 const TraceRules& rules) {
  std::error_code error;
  if (fs::exists(fs::path(path) / "manifest.json", error)) {
    return input_error(path, "format", "an attention trace", "a request trace",
                       "kvtier replay runs attention traces");
  }
  std::vector<fs::path> sessions;
  for (const auto& entry : fs::directory_iterator(path, error)) {
    if (is_json_document(entry.path())) sessions.push_back(entry.path());
  }
  if (error) return input_error(path, "folder", error.message(), "a readable folder");
  std::ranges::sort(sessions);
  const fs::path requests = plain_or_zst(fs::path(path) / kRagpulseRequests);
  const bool is_ragpulse = fs::exists(requests, error);
  if (is_ragpulse && format.value_or(TraceFormat::kRagpulse) == TraceFormat::kRagpulse) {
    return read_ragpulse_folder(requests, path, rules);
  }
  if (!sessions.empty() &&
      format.value_or(TraceFormat::kAgentSessions) == TraceFormat::kAgentSessions) {
    return read_session_folder(sessions, path, rules);
  }
  return input_error(path, "format",
                     format ? fmt::format("a folder that does not hold {}", to_string(*format))
                            : "a folder with neither 0_trace.jsonl nor .json files",
                     "a folder of ragpulse or agent-sessions, or one file",
                     "of other traces, name the file");
}

Status read_file(TraceFormat format, LineReader& lines, bool is_document,
                 RequestTraceBuilder& builder) {
  switch (format) {
    case TraceFormat::kMooncake:
    case TraceFormat::kBailian:
    case TraceFormat::kLmcache: return read_hash_id_lines(format, lines, builder);
    case TraceFormat::kAgentSessions: {
      std::uint32_t session = 0;
      return read_agent_sessions(lines, is_document, session, builder);
    }
    case TraceFormat::kTracelab: return read_tracelab(lines, builder);
    case TraceFormat::kTracelabReplay: return read_tracelab_replay(lines, builder);
    case TraceFormat::kAzure:
    case TraceFormat::kBurstgpt: return read_length_rows(format, lines, builder);
    case TraceFormat::kRagpulse: break;
  }
  KVTIER_CHECK(false, "{} is read with its tables", to_string(format));
}

}  // namespace

Result<RequestTrace> open_request_trace(const std::string& path, std::optional<TraceFormat> format,
                                        const TraceRules& rules) {
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) return read_folder(path, format, rules);
  if (!format) KVTIER_RETURN_IF_ERROR(refuse_libcachesim(path));
  KVTIER_ASSIGN_OR_RETURN(InputStream input, InputStream::open(path));
  LineReader lines(std::move(input));
  // A document may be spread over many lines; only agent sessions come as documents.
  const bool is_document = is_json_document(path);
  if (!format && is_document) format = TraceFormat::kAgentSessions;
  if (!format) {
    KVTIER_ASSIGN_OR_RETURN(const std::optional<TextLine> first, lines.peek());
    if (!first) return input_error(path, "content", "an empty file", "a request trace");
    KVTIER_ASSIGN_OR_RETURN(format, detect_trace_format(path, *first));
  }
  if (*format == TraceFormat::kRagpulse) return read_ragpulse_folder(path, path, rules);
  KVTIER_ASSIGN_OR_RETURN(RequestTraceBuilder builder, make_builder(*format, rules));
  KVTIER_RETURN_IF_ERROR(read_file(*format, lines, is_document, builder));
  return finish(std::move(builder), path, lines.digest());
}

}  // namespace kvtier
