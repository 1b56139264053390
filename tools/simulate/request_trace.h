#pragma once

#include "memory/status.h"
#include "tools/simulate/block_ids.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace kvtier {

/// What the ids of a trace stand for.
enum class TraceIdentity : unsigned char {
  kNone,  ///< The trace has lengths only: there is nothing to find again.
  /// Equal ids stand for equal prefixes: the id of a block says what came before it.
  kChained,
  kTrie,  ///< Ids stand for contents; they are re-keyed by (block before, id) to become chained.
  kRaw,   ///< Ids stand for contents and are taken as if they were chained. Counts false hits.
  /// No ids, but each round of a session says how many tokens it shares with the one before.
  kPrefixLengths,
};

enum class RequestOrder : unsigned char {
  kTime,  ///< By arrival; of equal ones, as they stand in the input.
  kFile,  ///< As they stand in the input.
};

/// The conventions by which a trace becomes requests. The defaults are those of the published
/// reference numbers (README.md).
struct TraceRules {
  /// None: what suits the format.
  std::optional<TraceIdentity> identity;
  RequestOrder order = RequestOrder::kTime;
  /// A last block that is not full is left out: neither looked for nor kept.
  bool drop_partial_blocks = false;
  /// The same id under another model is another block.
  bool separate_models = false;
  /// Agent sessions carry no common clock: session i starts i times this later than the first.
  std::uint64_t session_start_gap_us = 60'000'000;
  /// Tokens of a block where the format does not say; 0 is the format's usual size.
  std::uint32_t block_tokens = 0;
};

/// One request: its prompt is a run of blocks in `RequestTrace::references()`.
struct TraceRequest {
  std::int64_t arrival_us = 0;
  std::uint32_t input_tokens = 0;
  std::uint32_t output_tokens = 0;
  std::uint32_t first = 0;  ///< Reference of its first block.
  std::uint32_t blocks = 0;
};

/// Requests over numbered blocks, in the order in which a cache sees them. Immutable; safe to share
/// between threads. Memory: 4 bytes per block reference and 24 per request, and while it is built
/// up to 12 per reference and 64 per distinct block.
class RequestTrace {
 public:
  const std::string& name() const { return name_; }
  const std::string& format() const { return format_; }
  const std::string& digest() const { return digest_; }
  TraceIdentity identity() const { return identity_; }

  std::span<const TraceRequest> requests() const { return requests_; }
  /// The blocks of all requests, one request behind the other.
  std::span<const BlockNumber> references() const { return references_; }
  std::span<const BlockNumber> blocks_of(const TraceRequest& request) const {
    return references().subspan(request.first, request.blocks);
  }
  std::uint32_t unique_blocks() const { return unique_blocks_; }

  /// Tokens of a full block; 0 when blocks differ (parts of a prompt).
  std::uint32_t block_tokens() const { return block_tokens_; }
  /// Tokens of the request's block number `i`: clamp(input_tokens - i * block_tokens, 0,
  /// block_tokens), or what the trace says of the part.
  std::uint32_t tokens_at(const TraceRequest& request, std::uint32_t i) const {
    if (block_tokens_ == 0) return part_tokens_[references_[request.first + i]];
    const std::uint64_t start = std::uint64_t{i} * block_tokens_;
    if (start >= request.input_tokens) return 0;
    return static_cast<std::uint32_t>(
        std::min<std::uint64_t>(block_tokens_, request.input_tokens - start));
  }
  /// Tokens of the request's first `count` blocks.
  std::uint64_t tokens_of_first(const TraceRequest& request, std::uint32_t count) const {
    if (block_tokens_ != 0) {
      return std::min<std::uint64_t>(request.input_tokens, std::uint64_t{count} * block_tokens_);
    }
    std::uint64_t tokens = 0;
    for (std::uint32_t i = 0; i < count; ++i) tokens += tokens_at(request, i);
    return tokens;
  }

 private:
  friend class RequestTraceBuilder;

  std::string name_;
  std::string format_;
  std::string digest_;
  TraceIdentity identity_ = TraceIdentity::kNone;
  std::vector<TraceRequest> requests_;
  std::vector<BlockNumber> references_;
  std::uint32_t unique_blocks_ = 0;
  std::uint32_t block_tokens_ = 0;
  std::vector<std::uint32_t> part_tokens_;  ///< Per block, when they differ.
};

/// Collects requests in the order of the input. A reader calls `begin_request`, then adds the
/// blocks of its prompt from the first on.
class RequestTraceBuilder {
 public:
  /// More distinct blocks or references than this are refused: numbers have 32 bits.
  static constexpr std::uint32_t kBlocksMax = (std::uint32_t{1} << 31) - 1;
  static constexpr std::uint64_t kReferencesMax = (std::uint64_t{1} << 32) - 2;

  RequestTraceBuilder(std::string format, TraceIdentity identity, const TraceRules& rules)
      : rules_(rules) {
    trace_.format_ = std::move(format);
    trace_.identity_ = identity;
  }

  const TraceRules& rules() const { return rules_; }
  TraceIdentity identity() const { return trace_.identity_; }

  /// Every block that follows has this many tokens unless it is the last. Fails with `corrupt` when
  /// another size was set before.
  Status set_block_tokens(std::uint64_t tokens);

  /// `model` matters where models are kept apart. Ids have their own meaning in each `session`.
  struct Arrival {
    std::int64_t arrival_us = 0;
    std::uint64_t input_tokens = 0;
    std::uint64_t output_tokens = 0;
    std::uint32_t session = 0;
    std::string model;
  };
  /// Fails with `corrupt` for lengths beyond 32 bits.
  Status begin_request(const Arrival& arrival);
  Status add_blocks(std::span<const std::uint64_t> ids);
  /// A block with a length of its own.
  Status add_part(std::uint64_t id, std::uint32_t tokens);

  /// Sorts, and hands the trace over. Fails with `corrupt` when there is no request.
  Result<RequestTrace> finish(std::string name, std::string digest) &&;

 private:
  Status add_block(std::uint64_t id);
  std::uint32_t scope_of(const Arrival& arrival);
  void sort_by_arrival();

  RequestTrace trace_;
  TraceRules rules_;
  BlockIds ids_;
  std::uint32_t scope_ = 0;  ///< Of the present request; in a trie, of its next block.
  /// (session, model) to scope, where models are kept apart.
  std::map<std::pair<std::uint32_t, std::string>, std::uint32_t> scopes_;
};

const char* to_string(TraceIdentity identity);
const char* to_string(RequestOrder order);

}  // namespace kvtier
