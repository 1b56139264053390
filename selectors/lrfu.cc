#include "selectors/eviction_families.h"
#include "selectors/ghost_scores.h"
#include "selectors/place_heap.h"
#include "selectors/place_lists.h"

#include <algorithm>
#include <cmath>

namespace kvtier {
namespace {

/// Least recently and frequently used (Lee, Choi, Kim, Noh, Min, Cho, Kim: IEEE Transactions on
/// Computers 50(12), 2001): every use counts, and counts half as much for each half-life that has
/// passed since; the smallest sum leaves. What has left is remembered with its sum for as many
/// departures as there are places, so that a block that returns goes on from where it was.
///
/// What is admitted on a prediction stands in a queue of its own, of at most one place in
/// `kPredictedShare`, and leaves first come, first out until it is used: guesses compete with
/// guesses, and a wrong one costs no block that has been used. What is streamed stands in another
/// queue and leaves before everything else.
///
/// Time is the number of uses. The half-life is `kHalfLife` uses for every place, so a block must
/// do without for several turnovers of the tier before its past stops counting.
///
/// A score is log2 of the sum, with each use at time t weighing 2^(t / half-life): it grows with
/// time instead of being aged, and the order of any two stays the same until one is used.
/// O(log places) for each call; a held place met at the cold end counts as used once, so that it is
/// not met at every eviction.
class Lrfu final : public EvictionPolicy {
 public:
  explicit Lrfu(std::uint32_t capacity)
      : half_life_(kHalfLife * std::max(1u, capacity)),
        predicted_max_(std::max(1u, capacity / kPredictedShare)),
        heap_(capacity),
        predicted_(capacity, 1),
        streamed_(capacity, 1),
        ids_(capacity),
        ghosts_(capacity) {
    passed_.reserve(capacity);
  }

  void admit(std::uint32_t place, std::uint64_t id, Admission why) override {
    ids_[place] = id;
    if (why == Admission::kStreamed) {
      streamed_.push_front(0, place);
    } else if (why == Admission::kPredicted) {
      predicted_.push_front(0, place);
    } else {
      push_used(place);
    }
  }

  void touch(std::uint32_t place) override {
    if (predicted_.contains(place) || streamed_.contains(place)) {
      remove(place);
      push_used(place);
      return;
    }
    ++uses_;
    heap_.update(place, with_use(heap_.score(place)));
  }

  void remove(std::uint32_t place) override {
    if (streamed_.contains(place)) {
      streamed_.erase(0, place);
    } else if (predicted_.contains(place)) {
      predicted_.erase(0, place);
    } else {
      heap_.erase(place);
    }
  }

  std::optional<std::uint32_t> evict(std::span<const std::uint16_t> held) override {
    KVTIER_CHECK(held.size() == heap_.capacity(), "{} held counts for {} places", held.size(),
                 heap_.capacity());
    if (const auto place = streamed_.take_back(0, held)) return place;
    if (predicted_.size(0) >= predicted_max_) {
      if (const auto place = predicted_.take_back(0, held)) return place;
    }
    if (const auto place = evict_used(held)) return place;
    return predicted_.take_back(0, held);
  }

 private:
  /// Shorter is better where a step fills the cache, longer where it does not: a compromise
  /// (selectors/README.md).
  static constexpr double kHalfLife = 3.0;

  struct Passed {
    std::uint32_t place;
    double score;
  };

  void push_used(std::uint32_t place) {
    ++uses_;
    const std::optional<double> past = ghosts_.take(ids_[place]);
    heap_.push(place, past ? with_use(*past) : now());
  }

  std::optional<std::uint32_t> evict_used(std::span<const std::uint16_t> held) {
    std::optional<std::uint32_t> victim;
    passed_.clear();
    while (heap_.size() > 0 && !victim) {
      const std::uint32_t place = heap_.top();
      if (held[place] == 0) {
        victim = place;
        ghosts_.push(ids_[place], heap_.score(place));
      } else {
        passed_.push_back({place, with_use(heap_.score(place))});
      }
      heap_.erase(place);
    }
    for (const Passed& each : passed_) heap_.push(each.place, each.score);
    return victim;
  }

  double now() const { return static_cast<double>(uses_) / half_life_; }
  double with_use(double score) const {
    const double use = now();
    return std::max(score, use) + std::log2(1.0 + std::exp2(-std::abs(score - use)));
  }

  double half_life_;
  std::uint32_t predicted_max_;
  std::uint64_t uses_ = 0;
  PlaceHeap heap_;
  PlaceLists predicted_;
  PlaceLists streamed_;
  std::vector<std::uint64_t> ids_;
  GhostScores ghosts_;
  std::vector<Passed> passed_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lrfu(std::uint32_t capacity) {
  return std::make_unique<Lrfu>(capacity);
}

}  // namespace kvtier
