#include "selectors/eviction_families.h"
#include "selectors/place_lists.h"

namespace kvtier {
namespace {

/// Least recently used. A held place met at the cold end counts as used (whoever holds it is at
/// it), so that each is passed over once and not at every eviction: O(1) amortised.
class Lru final : public EvictionPolicy {
 public:
  explicit Lru(std::uint32_t capacity) : lists_(capacity, 1) {}

  void admit(std::uint32_t place, std::uint64_t, Admission) override {
    lists_.push_front(0, place);
  }
  void touch(std::uint32_t place) override { lists_.move_to_front(0, place); }
  void remove(std::uint32_t place) override { lists_.erase(0, place); }

  std::optional<std::uint32_t> evict(std::span<const std::uint16_t> held) override {
    KVTIER_CHECK(held.size() == lists_.capacity(), "{} held counts for {} places", held.size(),
                 lists_.capacity());
    return lists_.take_back(0, held);
  }

 private:
  PlaceLists lists_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru(std::uint32_t capacity) {
  return std::make_unique<Lru>(capacity);
}

}  // namespace kvtier
