#include "memory/check.h"
#include "runtime/sequence_state.h"

// Keys that the selector keeps of what it chooses stand for those of the blocks, so that values
// alone are fetched. What a slot then has is its own affair (`DeviceMap::is_whole`): the keys of a
// wave are read anew by the step that attends it, because another sequence that shares the block
// may keep others.

namespace kvtier {

// Whether what the item needs of its block is on the device, or on its way there.
bool Sequence::State::is_ready(const WorkItem& item) const {
  const SlotId slot = runtime.map->find(item.block);
  return !slot.is_none() && (item.kept_keys || runtime.map->is_whole(slot));
}

// The block's own keys are nearer, and used where they are at hand; where results must not depend
// on what is resident, they are not.
bool Sequence::State::attends_kept_keys(const WorkItem& item) const {
  if (!item.kept_keys) return false;
  return runtime.options.deterministic || !runtime.map->is_whole(runtime.map->find(item.block));
}

// Of several ranges of one block, neighbours from `first` on, one that wants it whole decides.
void Sequence::State::want_blocks_one_way(std::size_t first) {
  for (std::size_t begin = first; begin < work.size();) {
    std::size_t end = begin;
    bool kept = true;
    for (; end < work.size() && work[end].index == work[begin].index; ++end) {
      kept = kept && work[end].kept_keys;
    }
    for (; begin < end; ++begin) work[begin].kept_keys = kept;
  }
}

void Sequence::State::want_whole_blocks() {
  for (WorkItem& item : work) item.kept_keys = false;
}

// Points the ranges of items [begin, end), which are resident, to the selector's keys where those
// are attended.
void Sequence::State::read_kept_keys(LayerIndex layer, std::uint32_t begin, std::uint32_t end) {
  if (!selectors[layer.value]->keeps_keys()) return;
  const std::size_t stride = runtime.layout.key_bytes();
  wanted_keys.clear();
  wanted_keys.reserve(work.size());
  for (std::uint32_t i = begin; i < end; ++i) {
    const WorkItem& item = work[i];
    if (!attends_kept_keys(item)) continue;
    attended[item.range].kept_keys = true;
    wanted_keys.push_back({.head_group = item.head_group.value,
                           .block = item.index,
                           .first_token = item.first_token,
                           .tokens = item.tokens});
  }
  if (wanted_keys.empty()) return;
  // Room for the whole step: how much of it waits for its values differs from step to step.
  if (kept_keys.size() < work.size() * stride) kept_keys.resize(work.size() * stride);
  std::size_t next = 0;
  for (std::uint32_t i = begin; i < end; ++i) {
    if (!attends_kept_keys(work[i])) continue;
    ranges[i - begin].keys = kept_keys.data() + next * stride;
    wanted_keys[next].target = kept_keys.data() + next * stride;
    ++next;
  }
  const Selector& selector = *selectors[layer.value];
  runtime.environment.device->workers().run(
      wanted_keys.size(), [this, &selector](std::size_t i) { selector.read_keys(wanted_keys[i]); });
}

}  // namespace kvtier
