#include "tools/bench_reads.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>

namespace kvtier {
namespace {

constexpr std::size_t kLineBytes = 64;
constexpr std::size_t kReadAheads[] = {0, 4, 8, 16};

/// Adds up everything it is shown, as 64-bit words: the cheapest use of memory that a compiler
/// cannot leave out.
class WordSum {
 public:
  void add_line(const std::byte* line) {
    std::array<std::uint64_t, kLineBytes / 8> words;
    std::memcpy(words.data(), line, kLineBytes);
    for (std::size_t i = 0; i < words.size(); ++i) lanes_[i] += words[i];
  }
  std::uint64_t total() const {
    return std::accumulate(lanes_.begin(), lanes_.end(), std::uint64_t{0});
  }

 private:
  std::array<std::uint64_t, kLineBytes / 8> lanes_{};
};

/// Runs `part(worker)` on every worker. The sums go where the compiler must believe they are used.
template <class Part>
double timed(WorkerPool& pool, const Part& part) {
  const auto begin = std::chrono::steady_clock::now();
  pool.run(pool.threads(), [&](std::size_t worker) {
    [[maybe_unused]] volatile std::uint64_t sink = part(worker);
  });
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void prefetch(const std::byte* line) { __builtin_prefetch(line, 0, 2); }

std::uint64_t read_blocks(std::span<const BlockRange> blocks, std::size_t block_bytes,
                          std::size_t ahead) {
  WordSum sum;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    // As in attend_chunks_cpu.cc: blocks' first lines next to each other, so that the translations
    // of their addresses overlap.
    if (ahead > 0 && i % ahead == 0) {
      const std::size_t end = std::min(i + 2 * ahead, blocks.size());
      for (std::size_t later = i + ahead; later < end; ++later) prefetch(blocks[later].block);
    }
    const bool prefetches = ahead > 0 && i + ahead < blocks.size();
    const std::byte* later = prefetches ? blocks[i + ahead].block : nullptr;
    for (std::size_t at = 0; at < block_bytes; at += kLineBytes) {
      if (prefetches) prefetch(later + at);
      sum.add_line(blocks[i].block + at);
    }
  }
  return sum.total();
}

}  // namespace

double read_stream_seconds(std::span<const std::byte> bytes, WorkerPool& pool) {
  const std::size_t part = bytes.size() / pool.threads() / kLineBytes * kLineBytes;
  return timed(pool, [&](std::size_t worker) {
    WordSum sum;
    const std::byte* begin = bytes.data() + worker * part;
    for (std::size_t at = 0; at < part; at += kLineBytes) sum.add_line(begin + at);
    return sum.total();
  });
}

double read_blocks_seconds(std::span<const BlockRange> blocks, std::size_t block_bytes,
                           std::size_t ahead, WorkerPool& pool) {
  return timed(pool, [&](std::size_t worker) {
    const std::size_t begin = worker * blocks.size() / pool.threads();
    const std::size_t end = (worker + 1) * blocks.size() / pool.threads();
    return read_blocks(blocks.subspan(begin, end - begin), block_bytes, ahead);
  });
}

std::size_t best_read_ahead(std::span<const BlockRange> blocks, std::size_t block_bytes,
                            WorkerPool& pool) {
  std::size_t best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (int round = 0; round < 2; ++round) {
    for (const std::size_t ahead : kReadAheads) {
      const double seconds = read_blocks_seconds(blocks, block_bytes, ahead, pool);
      if (seconds >= least) continue;
      least = seconds;
      best = ahead;
    }
  }
  return best;
}

}  // namespace kvtier
