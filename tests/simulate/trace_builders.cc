#include "tests/simulate/trace_builders.h"

namespace kvtier {

RequestTrace make_request_trace(const std::vector<DraftRequest>& requests,
                                std::uint32_t block_tokens) {
  RequestTraceBuilder builder("draft", TraceIdentity::kChained, {});
  KVTIER_CHECK(builder.set_block_tokens(block_tokens).ok(), "{} tokens", block_tokens);
  for (const DraftRequest& request : requests) {
    const std::uint64_t tokens =
        request.input_tokens > 0 ? request.input_tokens : request.ids.size() * block_tokens;
    RequestTraceBuilder::Arrival arrival;
    arrival.arrival_us = request.arrival_us;
    arrival.input_tokens = tokens;
    arrival.output_tokens = 1;
    KVTIER_CHECK(builder.begin_request(arrival).ok() && builder.add_blocks(request.ids).ok(),
                 "a draft that cannot be built");
  }
  return std::move(builder).finish("draft", "none").value();
}

std::vector<DraftRequest> random_chained(std::mt19937_64& random, std::size_t requests,
                                         std::uint64_t depth_max, std::uint64_t branches) {
  std::vector<DraftRequest> drafts;
  for (std::size_t r = 0; r < requests; ++r) {
    DraftRequest draft{.arrival_us = static_cast<std::int64_t>(r) * 1'000'000};
    const std::uint64_t depth = 1 + random() % depth_max;
    std::uint64_t node = 0;
    for (std::uint64_t i = 0; i < depth; ++i) {
      node = node * branches + 1 + random() % branches;
      draft.ids.push_back(node);
    }
    drafts.push_back(std::move(draft));
  }
  return drafts;
}

std::vector<DraftRequest> random_unchained(std::mt19937_64& random, std::size_t requests,
                                           std::uint64_t blocks_max, std::uint64_t unique) {
  std::vector<DraftRequest> drafts;
  for (std::size_t r = 0; r < requests; ++r) {
    DraftRequest draft{.arrival_us = static_cast<std::int64_t>(r) * 1'000'000};
    const std::uint64_t blocks = random() % (blocks_max + 1);
    std::uint64_t id = random() % unique;
    for (std::uint64_t i = 0; i < blocks; ++i) {
      // Runs of ids as well as jumps, forwards and backwards.
      const std::uint64_t step = random() % 8;
      id = step < 5    ? (id + 1) % unique
           : step == 5 ? (id + unique - 1) % unique
                       : random() % unique;
      draft.ids.push_back(id);
    }
    if (!draft.ids.empty()) draft.input_tokens = draft.ids.size() * 4 - random() % 4;
    drafts.push_back(std::move(draft));
  }
  return drafts;
}

}  // namespace kvtier
