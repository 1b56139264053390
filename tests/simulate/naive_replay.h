#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace kvtier {

/// Requests by the letter of the published definitions, with nothing of the simulator's in them:
/// neither its readers, nor its numbering, nor its data structures.
struct NaiveTrace {
  struct Request {
    double time = 0;
    std::uint64_t input_tokens = 0;
    /// (session, id), from the first on.
    std::vector<std::pair<std::uint64_t, std::uint64_t>> blocks;
  };
  std::uint64_t block_tokens = 0;
  std::vector<Request> requests;  ///< In order.
};

struct NaiveHits {
  std::uint64_t hit_blocks = 0;
  std::uint64_t hit_tokens = 0;
  std::uint64_t second_half_hit_tokens = 0;

  bool operator==(const NaiveHits&) const = default;
};

/// Reads a Mooncake file, or a folder of agent sessions, with a DOM parser.
NaiveTrace naive_mooncake(const std::string& path);
NaiveTrace naive_agent_sessions(const std::string& folder);

/// An ordered list of blocks, touched last block first.
NaiveHits naive_lru(const NaiveTrace& trace, std::size_t capacity);
/// After each request, everything sorted by its next use.
NaiveHits naive_optimal(const NaiveTrace& trace, std::size_t capacity);
NaiveHits naive_infinite(const NaiveTrace& trace);

}  // namespace kvtier
