#pragma once

#include "memory/block_layout.h"
#include "tests/transfer/aligned_buffer.h"
#include "transfer/store.h"
#include "transfer/store_directory.h"

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace kvtier::test {

/// A drive in memory whose files outlive the directories that are opened on it. It keeps what was
/// synced apart from what was only written, can stop in the middle of anything, lose its power, and
/// fail in ways that a test chooses. One thread.
class SimulatedDrive {
 public:
  struct Write {
    std::string file;
    std::uint64_t offset = 0;
    std::vector<std::byte> bytes;
  };
  struct Stored {
    std::vector<std::byte> written;  ///< What reads see.
    std::vector<std::byte> synced;   ///< What is sure to survive a loss of power.
  };

  /// A folder on this drive. The drive outlives it.
  std::unique_ptr<StoreDirectory> open();

  /// After so many more writes and syncs nothing works any more, until `restart`.
  void stop_after(std::uint64_t operations) { left_ = operations; }
  bool stopped() const { return left_ == 0; }
  void restart() { left_ = kForever; }

  /// Where a misdirected write may land.
  enum class Misdirect : unsigned char {
    kOntoUnsynced,  ///< The place of another write that was not synced.
    kAnywhere,      ///< Any aligned place of its file, synced content included.
  };
  /// Writes that were not synced are kept, dropped, torn at 512 B or 4 KiB, or land elsewhere, in
  /// any order. Then everything is as if synced, and works again.
  void lose_power(std::uint64_t seed, Misdirect misdirect);

  std::map<std::string, Stored>& files() { return files_; }
  std::uint64_t total_bytes() const;

  // What a test may make fail.
  Status read_failure;   ///< Every read of a segment.
  Status write_failure;  ///< Every write of a segment.
  Status sync_failure;
  Status index_failure;  ///< Every write of the index.
  std::uint64_t free_bytes = std::uint64_t{1} << 40;
  std::uint64_t syncs = 0;

 private:
  friend class SimulatedFile;
  friend class SimulatedDirectory;
  static constexpr std::uint64_t kForever = ~std::uint64_t{0};
  bool takes_one_more();
  void apply(const Write& write, std::mt19937_64& random, Misdirect misdirect);

  std::map<std::string, Stored> files_;
  std::vector<Write> unsynced_;
  std::uint64_t left_ = kForever;
};

/// A small layout: 16 blocks of 256 B in an extent of 8 KiB, or as many as fit in a larger one.
BlockLayout small_layout(std::size_t extent_bytes = 8192);

/// The key that a number stands for.
StoreKey key_of(std::uint64_t number);

/// An extent whose every byte follows from the item's number, the layer, the head group and the
/// index; sealed.
void fill_extent(std::span<std::byte> extent, const BlockLayout& layout, std::uint64_t number,
                 const StoreExtentKey& key);

/// Bytes that follow from a number.
std::vector<std::byte> blob_of(std::uint64_t number, std::size_t bytes);

/// Options of a store that tests make: `crash`, no reserve.
StoreOptions store_options(std::uint64_t capacity_bytes, Durability level = Durability::kCrash);

/// What an item of a number consists of.
struct ItemShape {
  std::uint32_t extents = 2;
  std::size_t blob_bytes = 100;  ///< Under tag 1.
  std::uint64_t parent = 0;      ///< Number of the parent, 0 for none.
  double value = 0.0;
};

/// Writes and commits an item.
Status put_item(Store& store, const BlockLayout& layout, std::uint64_t number,
                const ItemShape& shape = {});

/// How reading an item ended.
struct ItemVerdict {
  bool found = false;
  bool whole = false;  ///< All extents and blobs are there and right.
  bool wrong = false;  ///< Something was called good and is not what was written.
  std::uint32_t bad_blocks = 0;
  Status status;  ///< The first that was not ok.
};
ItemVerdict read_item(Store& store, const BlockLayout& layout, std::uint64_t number,
                      const ItemShape& shape = {});

}  // namespace kvtier::test
