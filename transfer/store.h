#pragma once

#include "memory/ids.h"
#include "memory/status.h"
#include "transfer/durability.h"
#include "transfer/page_cipher.h"
#include "transfer/store_directory.h"
#include "transfer/store_format.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace kvtier {

/// How a store is opened. Behaviour first, size and speed after.
struct StoreOptions {
  Durability durability = Durability::kCrash;
  /// Encrypts what is written; null leaves it plain. Outlives the store.
  PageCipher* cipher = nullptr;
  /// For an existing store: read what is there and change nothing. Writing calls are `unsupported`.
  bool read_only = false;
  /// Rebuild from the segments even where the index is sound.
  bool ignore_index = false;
  /// Hear of a rebuild: bytes looked at, bytes in all.
  std::function<void(std::uint64_t, std::uint64_t)> progress;

  /// Of all files together, index and lock included; all of it is taken when the store is made and
  /// never more. An existing store must have been made with the same, or 0: take what is there.
  std::uint64_t capacity_bytes = 0;
  /// What must stay free on the file system besides: less at open is refused.
  std::uint64_t free_bytes_min = std::uint64_t{1} << 30;
  /// Size of a segment file; 0 divides the capacity by eight, at most 4 TiB each.
  std::uint64_t segment_bytes = 0;
  /// Fingerprint of the layout that the store is made for; for the segments' headers.
  std::uint64_t layout_fingerprint = 0;
  /// Check every block of an extent before it is written: damage in memory is not stored.
  bool verify_writes = true;
};

/// What a store has done and found since it was opened.
struct StoreStats {
  std::uint64_t items = 0;
  std::uint64_t capacity_bytes = 0;   ///< Of all files; never exceeded.
  std::uint64_t data_bytes = 0;       ///< For extents, blobs and manifests.
  std::uint64_t free_bytes = 0;       ///< Of those.
  std::uint64_t free_256k_bytes = 0;  ///< Of those, as places of 256 KiB.

  std::uint64_t commits = 0;
  std::uint64_t written_bytes = 0;
  std::uint64_t read_bytes = 0;
  std::uint64_t evicted_items = 0;
  std::uint64_t erased_items = 0;
  std::uint64_t blocks_verified = 0;
  std::uint64_t blocks_corrupt = 0;  ///< Checksum, or header of another extent.
  std::uint64_t read_failures = 0;   ///< Reads that ended in an error or at the file's end.
  std::uint64_t write_failures = 0;
  std::uint64_t index_rewrites = 0;

  // Of opening.
  bool rebuilt = false;             ///< From the segments; `notice` says why.
  std::uint64_t items_dropped = 0;  ///< Listed, but their manifest is not there as it must be.
};

/// Which extent of an item.
struct StoreExtentKey {
  LayerIndex layer;
  HeadGroup head_group;
  std::uint32_t index = 0;  ///< Among those of the item's layer and head group.
  friend auto operator<=>(const StoreExtentKey&, const StoreExtentKey&) = default;
};

/// A sealed extent to write. The memory is page-aligned and stays as it is until the call returns.
struct StoreExtentWrite {
  StoreExtentKey key;
  std::span<const std::byte> bytes;
};

/// Bytes that the store does not look into: selector metadata, token ids.
struct StoreBlob {
  std::uint32_t tag = 0;  ///< The caller's; distinct within an item.
  std::span<const std::byte> bytes;
};

class Store;

/// An item that is being written: it has its places and nobody sees it. Move-only. Dropping it
/// gives the places back. It does not outlive its store.
class StoreFill {
 public:
  StoreFill() = default;
  StoreFill(StoreFill&& other) noexcept;
  StoreFill& operator=(StoreFill&& other) noexcept;
  ~StoreFill();
  explicit operator bool() const { return store_ != nullptr; }

 private:
  friend class Store;
  StoreFill(Store* store, std::uint32_t index) : store_(store), index_(index) {}
  Store* store_ = nullptr;
  std::uint32_t index_ = 0;
};

/// An item that can be read and is neither evicted nor erased while this lives. Move-only. It does
/// not outlive its store.
class StoredItem {
 public:
  StoredItem() = default;
  StoredItem(StoredItem&& other) noexcept;
  StoredItem& operator=(StoredItem&& other) noexcept;
  ~StoredItem();
  explicit operator bool() const { return store_ != nullptr; }

  const StoreKey& key() const;
  const StoreKey& parent() const;
  std::uint32_t extents() const;
  std::uint32_t extent_bytes() const;
  std::uint64_t layout_fingerprint() const;
  /// None when the item has no blob of that tag.
  std::optional<std::uint64_t> blob_bytes(std::uint32_t tag) const;
  /// Tags of the blobs, ascending within those in the manifest and those in places of their own.
  std::vector<std::uint32_t> blob_tags() const;
  /// Keys of the extents in ascending order; of as many as fit.
  std::size_t list_extents(std::span<StoreExtentKey> target) const;

 private:
  friend class Store;
  StoredItem(Store* store, std::uint32_t index) : store_(store), index_(index) {}
  Store* store_ = nullptr;
  std::uint32_t index_ = 0;
};

/// One extent to read, and what came of it.
struct StoreExtentRead {
  const StoredItem* item = nullptr;
  StoreExtentKey key;
  /// Page-aligned, of the item's `extent_bytes`; best registered with `register_buffers`.
  std::span<std::byte> target;
  /// One per place of the extent, or empty: kOk, kNotFound for a place that holds no block,
  /// kCorrupt, kIoError.
  std::span<StatusCode> blocks;

  /// `ok` only when header and every block are as they were written. Otherwise `not_found` (no such
  /// extent), `io_error` or `corrupt`; blocks that `blocks` calls ok are good all the same.
  Status status;
};

struct StoreFillRequest {
  StoreKey key;
  /// Item that this one continues; all zero for none. A store evicts what nothing continues first.
  StoreKey parent;
  std::uint64_t layout_fingerprint = 0;
  std::uint32_t extents = 0;
  std::size_t extent_bytes = 0;  ///< Up to 256 KiB, a multiple of 4 KiB; all of one item alike.
};

/// Items of extents and blobs under digests, in preallocated files, bounded, restart-safe.
///
/// An item is visible once it is committed, and it is committed once its bytes are durable to the
/// store's level. Each key is written once: content under a key never changes. When the store is
/// full the least valuable items go, of equal value the longest unused; items that are held, or
/// that another continues, stay. What cannot be read intact is never returned as good: see
/// `StoreExtentRead`.
///
/// One thread at a time; calls wait for their I/O and take no locks. Memory: about 32 bytes per
/// extent and 200 per item, and 2 MiB of buffers.
class Store {
 public:
  /// Opens the store in `directory` or makes one. Errors: `no_space` with the figures when the file
  /// system is too small or would be left with less than `free_bytes_min`; `unsupported` for a
  /// store of another capacity or version; `io_error`, `corrupt`. A damaged or outdated index is no
  /// error: it is rebuilt and `notice` says so. Another key than the store's is none either: the
  /// store then finds nothing and takes nothing, and `notice` names both keys.
  static Result<std::unique_ptr<Store>> open(std::unique_ptr<StoreDirectory> directory,
                                             const StoreOptions& options);
  ~Store();

  /// One line for people about what was found at open; empty when all was as it should be.
  const std::string& notice() const;
  StoreStats stats() const;
  Durability durability() const;

  /// Memory that reads and writes will use; see `File::register_buffers`. Before anything else.
  Status register_buffers(std::span<const std::span<std::byte>> ranges);

  // --- Writing.

  /// Takes places, evicting as needed. `busy` when the key is stored or being written already;
  /// `no_space`, with the figures, when too much is held. What could never fit evicts nothing.
  Result<StoreFill> fill(const StoreFillRequest& request);
  /// Writes extents, each key once, at most as many as were asked for. `corrupt` when one is not a
  /// sound extent of the layer, head group and layout that it is to be. After a failure the fill
  /// can only be dropped.
  Status write(StoreFill& fill, std::span<const StoreExtentWrite> extents);
  /// Makes items visible once their bytes are durable. The last call for these fills, which are
  /// empty afterwards; after a failure none of them is visible and their places are free. Several
  /// at once share the waiting for the drive.
  struct Commit {
    StoreFill* fill = nullptr;
    std::span<const StoreBlob> blobs;
    double value = 0.0;  ///< Larger stays longer.
    /// Who refers to the item itself; 0 for one that is there for those that continue it.
    std::uint32_t references = 1;
  };
  Status commit(std::span<const Commit> commits);

  /// What so many blobs of an item with so many extents may have together; more is `unsupported`
  /// at commit.
  static std::uint64_t blob_bytes_max(std::uint32_t extents, std::uint32_t blobs);

  // --- Reading.

  bool contains(const StoreKey& key) const;
  /// `not_found`. Counts as a use.
  Result<StoredItem> find(const StoreKey& key);
  /// Reads and verifies a batch; every read has a status of its own. The next reads are on their
  /// way while one is verified.
  void read(std::span<StoreExtentRead> reads);
  /// Reads a blob whole into memory of just its size, any alignment. `not_found`, `io_error`,
  /// `corrupt`.
  Status read_blob(const StoredItem& item, std::uint32_t tag, std::span<std::byte> target);

  /// Reads the item's manifest once more: an index that was closed cleanly repeats what it says, so
  /// opening may not have. `io_error`, `corrupt`.
  Status verify_manifest(const StoredItem& item);

  // --- Keeping and dropping.

  /// What the item is worth from now on. Not logged: a store that is opened anew has the value of
  /// the commit, or of the last clean stop.
  Status set_value(const StoreKey& key, double value);
  /// The count of references survives as the item does; eviction does not ask for it.
  Status add_reference(const StoreKey& key);
  /// With the last reference the item goes, and so do those before it that nobody refers to,
  /// continues or holds; what stays for one of these reasons goes when it is evicted.
  Status drop_reference(const StoreKey& key);
  /// Drops an item at once: for what was found damaged. `busy` while it is held.
  Status erase(const StoreKey& key);
  /// Moves up to `moves_max` places together so that more of what is free is whole 256 KiB; returns
  /// how many were moved. Costs a read and two writes each.
  Result<std::uint32_t> defragment(std::uint32_t moves_max);

  /// Keys of the items that continue this one, whether it is there or not; in no order.
  std::vector<StoreKey> continuations(const StoreKey& key) const;
  /// Calls `visit` for every item, in no order; nothing may be committed or dropped meanwhile.
  void for_each(const std::function<void(const StoreKey&)>& visit) const;

  /// Writes the index and ends the store's life; no fill or item may be left. Call once.
  Status close();

 private:
  friend class StoreFill;
  friend class StoredItem;
  struct State;
  explicit Store(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

/// Opens `path` on disk with a directory that suits the level.
Result<std::unique_ptr<Store>> open_store(const std::string& path, const StoreOptions& options);

}  // namespace kvtier
