#include "tools/simulate/request_trace.h"

#include <limits>
#include <numeric>
#include <utility>

namespace kvtier {
namespace {

constexpr std::uint64_t kTokensMax = std::numeric_limits<std::uint32_t>::max();
// In a trie a block's number is the scope of the next; roots lie beyond all numbers.
constexpr std::uint32_t kRootScope = std::uint32_t{1} << 31;

}  // namespace

Status RequestTraceBuilder::set_block_tokens(std::uint64_t tokens) {
  if (tokens == 0 || tokens > kTokensMax) {
    return corrupt(fmt::format("found {}, expected tokens of a block from 1", tokens));
  }
  if (trace_.block_tokens_ != 0 && trace_.block_tokens_ != tokens) {
    return corrupt(fmt::format("found {}, expected {} as before: one block size in a trace", tokens,
                               trace_.block_tokens_));
  }
  trace_.block_tokens_ = static_cast<std::uint32_t>(tokens);
  return {};
}

std::uint32_t RequestTraceBuilder::scope_of(const Arrival& arrival) {
  if (!rules_.separate_models) return arrival.session;
  const auto next = static_cast<std::uint32_t>(scopes_.size());
  return scopes_.try_emplace({arrival.session, arrival.model}, next).first->second;
}

Status RequestTraceBuilder::begin_request(const Arrival& arrival) {
  if (arrival.input_tokens > kTokensMax || arrival.output_tokens > kTokensMax) {
    return corrupt(fmt::format("found {} and {} tokens, expected at most {}", arrival.input_tokens,
                               arrival.output_tokens, kTokensMax));
  }
  trace_.requests_.push_back({.arrival_us = arrival.arrival_us,
                              .input_tokens = static_cast<std::uint32_t>(arrival.input_tokens),
                              .output_tokens = static_cast<std::uint32_t>(arrival.output_tokens),
                              .first = static_cast<std::uint32_t>(trace_.references_.size()),
                              .blocks = 0});
  scope_ = scope_of(arrival);
  if (trace_.identity_ == TraceIdentity::kTrie) scope_ |= kRootScope;
  return {};
}

Status RequestTraceBuilder::add_block(std::uint64_t id) {
  if (trace_.references_.size() >= kReferencesMax || ids_.size() >= kBlocksMax) {
    return unsupported(
        fmt::format("found more than {} block references or {} blocks, expected "
                    "fewer: numbers have 32 bits",
                    kReferencesMax, kBlocksMax));
  }
  const BlockNumber block = ids_.intern(scope_, id);
  if (trace_.identity_ == TraceIdentity::kTrie) scope_ = block;
  trace_.references_.push_back(block);
  ++trace_.requests_.back().blocks;
  return {};
}

Status RequestTraceBuilder::add_blocks(std::span<const std::uint64_t> ids) {
  const std::uint64_t tokens = trace_.requests_.back().input_tokens;
  std::size_t count = ids.size();
  if (rules_.drop_partial_blocks) {
    count = std::min<std::size_t>(count, tokens / trace_.block_tokens_);
  }
  for (const std::uint64_t id : ids.first(count)) KVTIER_RETURN_IF_ERROR(add_block(id));
  return {};
}

Status RequestTraceBuilder::add_part(std::uint64_t id, std::uint32_t tokens) {
  KVTIER_RETURN_IF_ERROR(add_block(id));
  if (ids_.size() > trace_.part_tokens_.size()) trace_.part_tokens_.push_back(tokens);
  return {};
}

void RequestTraceBuilder::sort_by_arrival() {
  const auto earlier = [](const TraceRequest& a, const TraceRequest& b) {
    return a.arrival_us < b.arrival_us;
  };
  if (std::ranges::is_sorted(trace_.requests_, earlier)) return;
  std::ranges::stable_sort(trace_.requests_, earlier);
  std::vector<BlockNumber> sorted;
  sorted.reserve(trace_.references_.size());
  for (TraceRequest& request : trace_.requests_) {
    const auto blocks = trace_.blocks_of(request);
    request.first = static_cast<std::uint32_t>(sorted.size());
    sorted.insert(sorted.end(), blocks.begin(), blocks.end());
  }
  trace_.references_ = std::move(sorted);
}

Result<RequestTrace> RequestTraceBuilder::finish(std::string name, std::string digest) && {
  if (trace_.requests_.empty()) return corrupt("found no request, expected at least one");
  trace_.name_ = std::move(name);
  trace_.digest_ = std::move(digest);
  trace_.unique_blocks_ = ids_.size();
  ids_ = BlockIds();
  if (rules_.order == RequestOrder::kTime) sort_by_arrival();
  trace_.requests_.shrink_to_fit();
  return std::move(trace_);
}

const char* to_string(TraceIdentity identity) {
  switch (identity) {
    case TraceIdentity::kNone: return "none";
    case TraceIdentity::kChained: return "chained";
    case TraceIdentity::kTrie: return "trie";
    case TraceIdentity::kRaw: return "raw";
    case TraceIdentity::kPrefixLengths: return "prefix-lengths";
  }
  return "?";
}

const char* to_string(RequestOrder order) { return order == RequestOrder::kTime ? "time" : "file"; }

}  // namespace kvtier
