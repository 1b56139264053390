#pragma once

#include "memory/block_layout.h"
#include "transfer/store.h"

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace kvtier {

/// Whose prefixes these are. All of it goes into the hash chain: a prefix is found by who saved it
/// with the same three and the same layout, and by nobody else.
struct PrefixScope {
  /// Model, weights and everything else that KV depends on (RoPE scaling, adapters, KV
  /// quantisation), as the caller names it.
  std::string model;
  /// A secret of the tenant: without it nobody can tell what a tenant has stored.
  std::string tenant_salt;
};

/// A prefix that was found: its runs are held and cannot be evicted while this lives. Move-only.
struct PrefixHit {
  /// Tokens that were found, a multiple of the run's length; 0 is a miss.
  std::uint32_t tokens = 0;
  /// One per run, in order.
  std::vector<StoredItem> runs;
};

/// One run to save: `tokens_per_run` tokens, as extents of every layer and head group.
struct PrefixRunWrite {
  std::uint32_t run = 0;  ///< Tokens [run * tokens_per_run, (run + 1) * tokens_per_run).
  std::span<const StoreExtentWrite> extents;
};

/// Metadata that goes with a run: a selector's state up to the run's end, for instance.
struct PrefixMetadata {
  std::uint32_t run = 0;
  StoreBlob blob;  ///< Tags from 1; 0 is the store's own.
};

/// Prefixes by what they say: runs of tokens under a chain of SHA-256, each over the digest before
/// it and the run's own token ids, in a `Store`.
///
/// Runs are as long as an extent (`BlockLayout::tokens_per_extent`); what is behind the last whole
/// run is neither saved nor found. Prefixes that begin alike share their runs. On a hit the token
/// ids that were saved are compared with those asked for, so that not even a collision of digests
/// gives another's blocks.
///
/// Borrows the store. One thread at a time. `lookup` costs one hash of the tokens and one read of a
/// manifest per run that is there.
class PrefixStore {
 public:
  PrefixStore(Store* store, const BlockLayout& layout, const PrefixScope& scope);

  std::uint32_t tokens_per_run() const { return tokens_per_run_; }
  const BlockLayout& layout() const { return layout_; }

  /// Keys of the whole runs of `tokens`, in order.
  std::vector<StoreKey> chain(std::span<const std::uint32_t> tokens) const;

  /// The longest prefix of which every run is stored and says what it must. Damage ends the prefix
  /// before it and is dropped from the store.
  PrefixHit lookup(std::span<const std::uint32_t> tokens);

  /// A prefix that is being saved, run by run; see `save`.
  class Saving {
   public:
    Saving(Saving&&) noexcept = default;
    Saving& operator=(Saving&&) noexcept = default;

    /// Runs that are not stored yet and have to be written, in order.
    std::span<const std::uint32_t> missing() const { return missing_; }
    /// Writes extents of a missing run, in as many calls as the caller likes; of one run any order.
    Status write(const PrefixRunWrite& run);
    /// Kept until `commit`; the bytes must live until then. Metadata of runs that are stored
    /// already is left out: it is there.
    Status add_metadata(const PrefixMetadata& metadata);
    /// Bytes that so many pieces of metadata of one run may have together.
    std::uint64_t metadata_bytes_max(std::uint32_t pieces) const {
      return Store::blob_bytes_max(extents_per_run_, pieces + 1);
    }
    /// Makes all of it visible at once, durable to the store's level, and counts one more reference
    /// to the prefix. Runs that were not written whole are an `invalid_argument`.
    Status commit(double value);

   private:
    friend class PrefixStore;
    Saving() = default;
    struct Run {
      std::uint32_t run = 0;
      StoreFill fill;
      std::vector<std::byte> token_bytes;
      std::vector<StoreBlob> blobs;
      std::uint32_t written = 0;
    };
    Run* find(std::uint32_t run);

    PrefixStore* store_ = nullptr;
    std::uint32_t extents_per_run_ = 0;
    std::vector<StoreKey> chain_;
    std::vector<StoredItem> held_;  // Runs that are shared; not evicted while this lives.
    std::vector<std::uint32_t> missing_;
    std::vector<Run> runs_;
  };

  /// Starts saving the whole runs of `tokens`: takes places for those that are missing.
  /// `extents_per_run` is layers times head groups. `invalid_argument` when there is no whole run,
  /// otherwise as `Store::fill`.
  Result<Saving> save(std::span<const std::uint32_t> tokens, std::uint32_t extents_per_run);

  /// Drops one reference to the prefix of these whole runs; runs that nothing else refers to or
  /// continues are dropped, from the end. `not_found` when it is not stored.
  Status forget(std::span<const std::uint32_t> tokens);

  /// Drops one run of a hit whose extents could not be read as they were written, so that whoever
  /// saves it next writes it anew. The hit is let go of: what is held is not dropped. As
  /// `Store::erase`.
  Status drop_damaged(PrefixHit hit, std::uint32_t run);

  /// Reads and verifies extents of a hit; see `Store::read`.
  void read(std::span<StoreExtentRead> reads) { store_->read(reads); }
  /// `not_found` when the run has no metadata under that tag.
  Result<std::vector<std::byte>> read_metadata(const PrefixHit& hit, std::uint32_t run,
                                               std::uint32_t tag);

 private:
  Status compare(const StoredItem& item, std::span<const std::uint32_t> tokens);

  Store* store_;
  BlockLayout layout_;
  StoreKey root_;
  std::uint32_t tokens_per_run_;
};

}  // namespace kvtier
