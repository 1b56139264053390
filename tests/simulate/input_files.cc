#include "tests/simulate/input_files.h"

#include <fstream>

namespace kvtier {

InputFolder::InputFolder(const InputFiles& files) {
  for (const auto& [name, text] : files) {
    std::ofstream(scratch_.path() / name, std::ios::binary) << text;
  }
}

std::string InputFolder::path(const std::string& name) const {
  return name.empty() ? scratch_.path().string() : (scratch_.path() / name).string();
}

Result<RequestTrace> open_text(const std::string& text, const TraceRules& rules,
                               const std::string& name, std::optional<TraceFormat> format) {
  const InputFolder folder(InputFiles{{name, text}});
  return open_request_trace(folder.path(name), format, rules);
}

InputFiles ragpulse_files() {
  return {{"0_trace.jsonl",
           "{\"timestamp\": \"90\", \"input_length\": 30, \"output_length\": 1, \"hash_ids\": "
           "{\"sys_prompt\": [1], \"passages_ids\": [5, 6], \"history\": [], \"web_search\": [], "
           "\"user_input\": [9]}, \"session_id\": \"s\"}\n\n"
           "{\"timestamp\": \"8.5\", \"input_length\": 31, \"output_length\": 1, \"hash_ids\": "
           "{\"sys_prompt\": [1], \"passages_ids\": [6, 5], \"history\": [], \"web_search\": [], "
           "\"user_input\": [9]}, \"session_id\": \"s\"}\n"},
          {"1_sys_prompt.jsonl", "{\"sys_prompt_id\": 1, \"token_length\": 10}\n"},
          {"2_passages.jsonl",
           "{\"passage_id\": 5, \"token_length\": 3}\n{\"passage_id\": 6, \"token_length\": 4}\n"},
          {"3_history.jsonl", ""},
          {"4_user_input.jsonl", "{\"user_input_id\": 9, \"token_length\": 2}\n"},
          {"5_web_search.jsonl", ""}};
}

}  // namespace kvtier
