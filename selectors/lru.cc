#include "selectors/eviction_families.h"
#include "selectors/place_lists.h"

namespace kvtier {
namespace {

/// Least recently used. A held place met at the cold end counts as used (whoever holds it is at
/// it), so that each is passed over once and not at every eviction: O(1) amortised. What is
/// streamed stands in a list of its own and leaves before everything else.
class Lru final : public EvictionPolicy {
 public:
  explicit Lru(std::uint32_t capacity) : lists_(capacity, 2), list_of_(capacity) {}

  void admit(std::uint32_t place, std::uint64_t, Admission why) override {
    list_of_[place] = why == Admission::kStreamed ? kStreamed : kUsed;
    lists_.push_front(list_of_[place], place);
  }
  void touch(std::uint32_t place) override {
    lists_.erase(list_of_[place], place);
    list_of_[place] = kUsed;
    lists_.push_front(kUsed, place);
  }
  void remove(std::uint32_t place) override { lists_.erase(list_of_[place], place); }

  std::optional<std::uint32_t> evict(std::span<const std::uint16_t> held) override {
    KVTIER_CHECK(held.size() == lists_.capacity(), "{} held counts for {} places", held.size(),
                 lists_.capacity());
    if (const auto place = lists_.take_back(kStreamed, held)) return place;
    return lists_.take_back(kUsed, held);
  }

 private:
  static constexpr std::uint32_t kUsed = 0;
  static constexpr std::uint32_t kStreamed = 1;

  PlaceLists lists_;
  std::vector<std::uint32_t> list_of_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru(std::uint32_t capacity) {
  return std::make_unique<Lru>(capacity);
}

}  // namespace kvtier
