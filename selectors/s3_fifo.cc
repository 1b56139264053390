#include "selectors/eviction_families.h"
#include "selectors/ghost_ids.h"
#include "selectors/place_lists.h"

#include <algorithm>

namespace kvtier {
namespace {

/// S3-FIFO (Yang, Zhang, Qiu, Yue, Rashmi: SOSP 2023).
///
/// New ids enter a small queue (10 % of the places). What was touched twice by the time it reaches
/// the queue's end moves to the main queue, the rest leaves and is remembered as a ghost; a ghost
/// that returns enters the main queue at once. The main queue gives as many second chances as the
/// 2-bit count of touches. A held place at the end of a queue goes to its front.
class S3Fifo final : public EvictionPolicy {
 public:
  explicit S3Fifo(std::uint32_t capacity)
      : small_target_(std::max(1u, capacity / 10)),
        lists_(capacity, 2),
        places_(capacity),
        ghosts_(capacity - std::min(capacity, small_target_)) {}

  void admit(std::uint32_t place, std::uint64_t id) override {
    const std::uint32_t list = ghosts_.take(id) ? kMain : kSmall;
    lists_.push_front(list, place);
    places_[place] = {id, list, 0};
  }

  void touch(std::uint32_t place) override {
    KVTIER_CHECK(lists_.contains(place), "place {} is empty", place);
    places_[place].touches = std::min(places_[place].touches + 1, kTouchesMax);
  }

  void remove(std::uint32_t place) override { lists_.erase(places_[place].list, place); }

  std::optional<std::uint32_t> evict(std::span<const std::uint16_t> held) override {
    KVTIER_CHECK(held.size() == lists_.capacity(), "{} held counts for {} places", held.size(),
                 lists_.capacity());
    if (lists_.size(kSmall) >= small_target_) {
      if (const auto place = evict_small(held)) return place;
    }
    if (const auto place = evict_main(held)) return place;
    // The main queue is all held. A round over the small one may promote everything it meets, and
    // what it promoted can leave from there.
    if (const auto place = evict_small(held)) return place;
    return evict_main(held);
  }

 private:
  static constexpr std::uint32_t kSmall = 0;
  static constexpr std::uint32_t kMain = 1;
  static constexpr std::uint32_t kTouchesMax = 3;
  struct Place {
    std::uint64_t id = 0;
    std::uint32_t list = kSmall;
    std::uint32_t touches = 0;
  };

  std::optional<std::uint32_t> evict_small(std::span<const std::uint16_t> held) {
    for (std::uint32_t seen = lists_.size(kSmall); seen > 0; --seen) {
      const std::uint32_t place = lists_.back(kSmall);
      if (held[place] != 0) {
        lists_.move_to_front(kSmall, place);
        continue;
      }
      lists_.erase(kSmall, place);
      if (places_[place].touches <= 1) {
        ghosts_.push(places_[place].id);
        return place;
      }
      lists_.push_front(kMain, place);
      places_[place].list = kMain;
      places_[place].touches = 0;
    }
    return std::nullopt;
  }

  /// At most one round per second chance, and one that takes.
  std::optional<std::uint32_t> evict_main(std::span<const std::uint16_t> held) {
    const std::uint64_t most = std::uint64_t{lists_.size(kMain)} * (kTouchesMax + 1);
    for (std::uint64_t seen = 0; seen < most; ++seen) {
      const std::uint32_t place = lists_.back(kMain);
      if (held[place] == 0 && places_[place].touches == 0) {
        lists_.erase(kMain, place);
        return place;
      }
      if (held[place] == 0) --places_[place].touches;
      lists_.move_to_front(kMain, place);
    }
    return std::nullopt;
  }

  std::uint32_t small_target_;
  PlaceLists lists_;
  std::vector<Place> places_;
  GhostIds ghosts_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_s3_fifo(std::uint32_t capacity) {
  return std::make_unique<S3Fifo>(capacity);
}

}  // namespace kvtier
