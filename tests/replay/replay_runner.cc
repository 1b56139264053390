#include "tests/replay/replay_runner.h"

#include <gtest/gtest.h>

namespace kvtier {

std::string shipped_trace() { return KVTIER_SOURCE_DIR "/tests/traces/smollm2-8k-demo"; }

MakeTraceOptions replayable_trace() {
  MakeTraceOptions options;
  options.tokens = 700;
  options.steps = 12;
  options.query_heads = 4;
  options.kv_heads = 2;
  options.head_dim = 64;
  options.value_dim = 64;
  options.prompt_queries = 0;
  options.evidence = {{100, 108}, {300, 308}};
  return options;
}

nlohmann::json replay_json(const std::string& trace, std::vector<std::string> arguments,
                           int exit_code) {
  arguments.insert(arguments.begin(), {"replay", trace, "--format", "json"});
  const Outcome outcome = run_kvtier(arguments);
  EXPECT_EQ(outcome.exit_code, exit_code) << outcome.errors << outcome.output;
  nlohmann::json result = nlohmann::json::parse(outcome.output, nullptr, false);
  EXPECT_TRUE(result.is_object()) << outcome.output;
  return result;
}

std::string repeatable_part(nlohmann::json result) {
  result.erase("machine");
  for (auto& run : result["runs"]) run.erase("timing");
  return result.dump(1);
}

}  // namespace kvtier
