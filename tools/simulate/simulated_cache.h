#pragma once

#include "memory/check.h"
#include "memory/status.h"
#include "tools/simulate/block_ids.h"

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

namespace kvtier {

/// One use of one block.
struct BlockUse {
  BlockNumber block = 0;
  /// Tokens that lie before it in its prompt: what computing it again must attend to.
  std::uint64_t tokens_before = 0;
};

/// What a block costs, for policies that ask. Picoseconds, so that sums are exact on every machine.
struct BlockCosts {
  /// To compute a token again: what every token costs, and what each token before it adds.
  std::uint64_t recompute_ps_per_token = 40'000'000;
  std::uint64_t recompute_ps_per_token_before = 1'300;
  /// To load a token from this tier instead.
  std::uint64_t load_ps_per_token = 2'600'000;

  /// What holding a token saves at each use; 0 when loading costs more than computing.
  std::uint64_t saving_ps_per_token(std::uint64_t tokens_before) const {
    const std::uint64_t compute =
        recompute_ps_per_token + recompute_ps_per_token_before * tokens_before;
    return compute > load_ps_per_token ? compute - load_ps_per_token : 0;
  }
};

/// What a use found, and what had to leave for it.
struct CacheUse {
  BlockNumber evicted = kNoBlock;
  bool was_resident = false;
};

/// A cache of `capacity` blocks in the hands of an eviction policy, without any data: blocks are
/// numbers below `unique_blocks`.
///
/// Policies derive from it and decide; what is resident, and the counts, are kept here. Whatever is
/// used becomes resident (no policy here bypasses). Deterministic; one thread at a time; allocates
/// only when made, some 10 to 30 bytes per distinct block.
///
/// Not an `EvictionPolicy` (selectors/): that one works on places, passes over held ones and tells
/// guesses from uses, while these must remember blocks that are gone, take back what leaves a tier
/// above, and have nothing held.
class SimulatedCache {
 public:
  virtual ~SimulatedCache() = default;

  std::uint32_t capacity() const { return capacity_; }
  std::uint32_t size() const { return size_; }
  bool contains(BlockNumber block) const { return is_resident_[block] != 0; }

  /// The block is used: it is resident afterwards.
  CacheUse use(const BlockUse& use) {
    if (contains(use.block)) {
      on_hit(use);
      return {.was_resident = true};
    }
    evicted_ = kNoBlock;
    on_miss(use);
    KVTIER_CHECK(contains(use.block) && size_ <= capacity_, "block {}, {} of {} blocks", use.block,
                 size_, capacity_);
    return {.evicted = evicted_, .was_resident = false};
  }

  /// A resident block goes elsewhere; nothing is learnt.
  void remove(BlockNumber block) {
    KVTIER_CHECK(contains(block), "block {} is not resident", block);
    forget(block);
    is_resident_[block] = 0;
    --size_;
  }

 protected:
  SimulatedCache(std::uint32_t unique_blocks, std::uint32_t capacity)
      : capacity_(capacity), is_resident_(unique_blocks) {
    KVTIER_CHECK(capacity > 0, "a cache without room");
  }

  bool is_full() const { return size_ == capacity_; }
  void admit(BlockNumber block) {
    is_resident_[block] = 1;
    ++size_;
  }
  void evict(BlockNumber block) {
    is_resident_[block] = 0;
    --size_;
    evicted_ = block;
  }

 private:
  virtual void on_hit(const BlockUse& use) = 0;
  /// Must `admit` the block, after having made room with `evict`.
  virtual void on_miss(const BlockUse& use) = 0;
  /// Takes the block out of the policy's own records.
  virtual void forget(BlockNumber block) = 0;

  std::uint32_t capacity_;
  std::uint32_t size_ = 0;
  std::vector<std::uint8_t> is_resident_;
  BlockNumber evicted_ = kNoBlock;  ///< By the present use.
};

struct SimulatedCacheOptions {
  std::uint32_t unique_blocks = 0;
  std::uint32_t capacity = 0;
  BlockCosts costs;
};

/// "lru", "fifo", "s3-fifo", "sieve", "arc", "gdsf"; the name must be known.
std::unique_ptr<SimulatedCache> make_simulated_cache(std::string_view policy,
                                                     const SimulatedCacheOptions& options);
std::vector<std::string_view> known_simulated_caches();

// One per file.
std::unique_ptr<SimulatedCache> make_simulated_lru(const SimulatedCacheOptions& options);
std::unique_ptr<SimulatedCache> make_simulated_fifo(const SimulatedCacheOptions& options);
std::unique_ptr<SimulatedCache> make_simulated_s3_fifo(const SimulatedCacheOptions& options);
std::unique_ptr<SimulatedCache> make_simulated_sieve(const SimulatedCacheOptions& options);
std::unique_ptr<SimulatedCache> make_simulated_arc(const SimulatedCacheOptions& options);
std::unique_ptr<SimulatedCache> make_simulated_gdsf(const SimulatedCacheOptions& options);

}  // namespace kvtier
