#include "selectors/selector.h"

#include "memory/check.h"

#include <algorithm>

namespace kvtier {

Status Selector::estimate_rest(const SelectRequest&, std::span<const GroupSelection>, StatesView,
                               WorkerPool&) {
  return unsupported("this selector does not estimate what it leaves out");
}

void Selector::read_keys(const WantedKeys& wanted) const {
  KVTIER_CHECK(false, "keys of block {} of a selector that keeps none", wanted.block.value);
}

void reorder_selectors(std::vector<std::unique_ptr<Selector>>& beams,
                       std::span<const std::uint32_t> parents) {
  std::vector<std::unique_ptr<Selector>> next(parents.size());
  std::vector<std::uint32_t> children(beams.size());
  for (std::uint32_t parent : parents) {
    KVTIER_CHECK(parent < beams.size(), "parent {} of {} beams", parent, beams.size());
    ++children[parent];
  }
  for (std::size_t i = 0; i < parents.size(); ++i) {
    std::unique_ptr<Selector>& parent = beams[parents[i]];
    next[i] = --children[parents[i]] == 0 ? std::move(parent) : parent->fork();
  }
  beams = std::move(next);
}

}  // namespace kvtier
