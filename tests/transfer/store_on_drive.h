#pragma once

#include "tests/transfer/store_world.h"
#include "transfer/store.h"

#include <gtest/gtest.h>

#include <memory>
#include <utility>

namespace kvtier::test {

/// A store on a simulated drive, opened, closed and killed at will.
class StoreOnDrive : public ::testing::Test {
 public:
  static constexpr std::uint64_t kCapacity = 4 << 20;

 protected:
  std::unique_ptr<Store> open(StoreOptions options) {
    auto store = Store::open(drive_.open(), options);
    EXPECT_TRUE(store.ok()) << store.status().to_string();
    return store.ok() ? std::move(*store) : nullptr;
  }
  std::unique_ptr<Store> open(Durability level = Durability::kCrash) {
    return open(store_options(kCapacity, level));
  }
  // As after kill -9: what was written stays, nothing is said goodbye to.
  void kill(std::unique_ptr<Store> store) {
    drive_.stop_after(0);
    EXPECT_FALSE(store->close().ok());
    store.reset();
    drive_.restart();
  }

  bool is_whole(Store& store, std::uint64_t number, const ItemShape& shape = {}) {
    const ItemVerdict verdict = read_item(store, layout_, number, shape);
    EXPECT_FALSE(verdict.wrong);
    return verdict.found && verdict.whole;
  }

  BlockLayout layout_ = small_layout();
  SimulatedDrive drive_;
};

}  // namespace kvtier::test
