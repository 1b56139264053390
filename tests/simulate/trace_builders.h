#pragma once

#include "tools/simulate/request_trace.h"

#include <cstdint>
#include <random>
#include <vector>

namespace kvtier {

/// A request as a test writes it.
struct DraftRequest {
  std::int64_t arrival_us = 0;
  std::vector<std::uint64_t> ids;
  /// 0: as many as its blocks hold.
  std::uint64_t input_tokens = 0;
};

/// A trace of these requests, `block_tokens` each; ids are taken as they are.
RequestTrace make_request_trace(const std::vector<DraftRequest>& requests,
                                std::uint32_t block_tokens = 4);

/// Requests that walk down a random tree: equal ids stand for equal prefixes.
std::vector<DraftRequest> random_chained(std::mt19937_64& random, std::size_t requests,
                                         std::uint64_t depth_max, std::uint64_t branches);

/// Requests of unrelated ids, some twice in one request.
std::vector<DraftRequest> random_unchained(std::mt19937_64& random, std::size_t requests,
                                           std::uint64_t blocks_max, std::uint64_t unique);

}  // namespace kvtier
