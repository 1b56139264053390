#include "tests/simulate/naive_caches.h"

#include <algorithm>
#include <deque>
#include <map>

namespace kvtier {
namespace {

using Queue = std::deque<std::uint32_t>;  // The newest in front.

bool holds(const Queue& queue, std::uint32_t block) {
  return std::find(queue.begin(), queue.end(), block) != queue.end();
}
void take_out(Queue& queue, std::uint32_t block) {
  queue.erase(std::remove(queue.begin(), queue.end(), block), queue.end());
}
std::uint32_t pop_tail(Queue& queue) {
  const std::uint32_t block = queue.back();
  queue.pop_back();
  return block;
}

class NaiveQueue final : public NaiveCache {
 public:
  NaiveQueue(std::size_t capacity, bool reorders) : capacity_(capacity), reorders_(reorders) {}
  bool contains(std::uint32_t block) const override { return holds(queue_, block); }
  void use(std::uint32_t block, std::uint64_t) override {
    if (contains(block) && !reorders_) return;
    take_out(queue_, block);
    queue_.push_front(block);
    if (queue_.size() > capacity_) queue_.pop_back();
  }

 private:
  std::size_t capacity_;
  bool reorders_;
  Queue queue_;
};

class NaiveSieve final : public NaiveCache {
 public:
  explicit NaiveSieve(std::size_t capacity) : capacity_(capacity) {}
  bool contains(std::uint32_t block) const override { return holds(queue_, block); }
  void use(std::uint32_t block, std::uint64_t) override {
    if (contains(block)) {
      visited_[block] = true;
      return;
    }
    if (queue_.size() == capacity_) {
      // `hand_` counts from the tail.
      while (visited_[at_hand()]) {
        visited_[at_hand()] = false;
        hand_ = (hand_ + 1) % queue_.size();
      }
      // Without it, the next one towards the head has its number; behind the head comes the tail.
      take_out(queue_, at_hand());
      if (hand_ == queue_.size()) hand_ = 0;
    }
    queue_.push_front(block);
    visited_[block] = false;
  }

 private:
  std::uint32_t at_hand() const { return queue_[queue_.size() - 1 - hand_]; }
  std::size_t capacity_;
  Queue queue_;
  std::map<std::uint32_t, bool> visited_;
  std::size_t hand_ = 0;
};

class NaiveS3Fifo final : public NaiveCache {
 public:
  explicit NaiveS3Fifo(std::size_t capacity)
      : capacity_(capacity), small_target_(std::max<std::size_t>(1, capacity / 10)) {}
  bool contains(std::uint32_t block) const override {
    return holds(small_, block) || holds(main_, block);
  }
  void use(std::uint32_t block, std::uint64_t) override {
    if (contains(block)) {
      uses_[block] = std::min(uses_[block] + 1, 3);
      return;
    }
    const bool is_remembered = holds(ghost_, block);
    while (small_.size() + main_.size() >= capacity_) {
      if (small_.size() >= small_target_ || main_.empty()) {
        evict_small();
      } else {
        evict_main();
      }
    }
    take_out(ghost_, block);
    (is_remembered ? main_ : small_).push_front(block);
    uses_[block] = 0;
  }

 private:
  void evict_small() {
    while (!small_.empty()) {
      const std::uint32_t block = pop_tail(small_);
      if (uses_[block] > 1) {
        main_.push_front(block);
        uses_[block] = 0;
        continue;
      }
      ghost_.push_front(block);
      if (ghost_.size() > capacity_ - small_target_) ghost_.pop_back();
      return;
    }
    evict_main();
  }
  void evict_main() {
    while (true) {
      const std::uint32_t block = pop_tail(main_);
      if (uses_[block]-- == 0) return;
      main_.push_front(block);
    }
  }
  std::size_t capacity_;
  std::size_t small_target_;
  Queue small_;
  Queue main_;
  Queue ghost_;
  std::map<std::uint32_t, int> uses_;
};

class NaiveArc final : public NaiveCache {
 public:
  explicit NaiveArc(std::size_t capacity) : c_(capacity) {}
  bool contains(std::uint32_t x) const override { return holds(t1_, x) || holds(t2_, x); }
  void use(std::uint32_t x, std::uint64_t) override {
    if (contains(x)) {
      take_out(t1_, x);
      take_out(t2_, x);
      t2_.push_front(x);
    } else if (holds(b1_, x)) {
      p_ = std::min(c_, p_ + std::max<std::size_t>(1, b2_.size() / b1_.size()));
      replace(false);
      take_out(b1_, x);
      t2_.push_front(x);
    } else if (holds(b2_, x)) {
      const std::size_t delta = std::max<std::size_t>(1, b1_.size() / b2_.size());
      p_ = p_ > delta ? p_ - delta : 0;
      replace(true);
      take_out(b2_, x);
      t2_.push_front(x);
    } else {
      const std::size_t l1 = t1_.size() + b1_.size();
      const std::size_t all = l1 + t2_.size() + b2_.size();
      if (l1 == c_) {
        if (t1_.size() < c_) {
          b1_.pop_back();
          replace(false);
        } else {
          t1_.pop_back();
        }
      } else if (all >= c_) {
        if (all == 2 * c_) b2_.pop_back();
        replace(false);
      }
      t1_.push_front(x);
    }
  }

 private:
  void replace(bool was_in_b2) {
    if (!t1_.empty() && (t1_.size() > p_ || (was_in_b2 && t1_.size() == p_))) {
      b1_.push_front(pop_tail(t1_));
    } else {
      b2_.push_front(pop_tail(t2_));
    }
  }
  std::size_t c_;
  std::size_t p_ = 0;
  Queue t1_, t2_, b1_, b2_;
};

class NaiveGdsf final : public NaiveCache {
 public:
  explicit NaiveGdsf(std::size_t capacity) : capacity_(capacity) {}
  bool contains(std::uint32_t block) const override { return entries_.contains(block); }
  void use(std::uint32_t block, std::uint64_t tokens_before) override {
    if (!contains(block) && entries_.size() == capacity_) {
      const auto least =
          std::min_element(entries_.begin(), entries_.end(), [](const auto& a, const auto& b) {
            return std::pair(a.second.worth, a.second.time) <
                   std::pair(b.second.worth, b.second.time);
          });
      age_ = least->second.worth;
      entries_.erase(least);
    }
    Entry& entry = entries_[block];
    ++entry.uses;
    entry.time = ++clock_;
    entry.worth = age_ + entry.uses * (40'000'000 + 1'300 * tokens_before - 2'600'000);
  }

 private:
  struct Entry {
    std::uint64_t uses = 0;
    std::uint64_t time = 0;
    std::uint64_t worth = 0;
  };
  std::size_t capacity_;
  std::map<std::uint32_t, Entry> entries_;
  std::uint64_t age_ = 0;
  std::uint64_t clock_ = 0;
};

}  // namespace

std::unique_ptr<NaiveCache> make_naive_cache(std::string_view policy, std::size_t capacity) {
  if (policy == "lru") return std::make_unique<NaiveQueue>(capacity, true);
  if (policy == "fifo") return std::make_unique<NaiveQueue>(capacity, false);
  if (policy == "sieve") return std::make_unique<NaiveSieve>(capacity);
  if (policy == "s3-fifo") return std::make_unique<NaiveS3Fifo>(capacity);
  if (policy == "arc") return std::make_unique<NaiveArc>(capacity);
  if (policy == "gdsf") return std::make_unique<NaiveGdsf>(capacity);
  return nullptr;
}

}  // namespace kvtier
