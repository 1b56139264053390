#include "memory/check.h"
#include "runtime/runtime.h"
#include "runtime/sequence_state.h"

#include <algorithm>
#include <cstring>
#include <utility>

// Sequences that share their beginning. Complete extents belong to all of them and never change;
// whoever would change one copies it first.

namespace kvtier {

Result<std::unique_ptr<Sequence>> Sequence::fork(std::uint32_t tokens, Origin origin) const {
  const State& parent = *state_;
  parent.runtime.begin_call();
  if (parent.closed) {
    return invalid_argument(fmt::format("sequence {} is closed", parent.id.value));
  }
  if (origin == parent.origin) {
    return invalid_argument(
        "a fork needs an origin of its own: what it appends would be taken for its parent's");
  }
  for (std::uint32_t layer = 0; layer < parent.tokens.size(); ++layer) {
    if (parent.tokens[layer] < tokens) {
      return invalid_argument(fmt::format("a fork at {} tokens, but layer {} has {}", tokens, layer,
                                          parent.tokens[layer]));
    }
  }
  Runtime::State& runtime = parent.runtime;
  KVTIER_RETURN_IF_ERROR(runtime.check_room());
  KVTIER_RETURN_IF_ERROR(runtime.host->settle());
  KVTIER_ASSIGN_OR_RETURN(auto state, State::fork(parent, tokens, origin));
  return std::unique_ptr<Sequence>(new Sequence(std::move(state)));
}

// First everything, then the cut: what a cut into a layer's tokens takes is known in one place.
Result<std::unique_ptr<Sequence::State>> Sequence::State::fork(const State& parent,
                                                               std::uint32_t tokens,
                                                               Origin origin) {
  Runtime::State& runtime = parent.runtime;
  auto child = make_empty(runtime, runtime.add_sequence(), origin);
  child->tokens = parent.tokens;
  child->marks = parent.marks;
  child->demands = parent.demands;
  child->shared_demands = parent.shared_demands;
  child->rest_choices = parent.rest_choices;
  for (const auto& selector : parent.selectors) child->selectors.push_back(selector->fork());
  Status status;
  for (std::size_t i = 0; i < parent.streams.size() && status.ok(); ++i) {
    status = child->fork_stream(parent.streams[i], child->streams[i]);
  }
  if (status.ok() && *std::ranges::max_element(child->tokens) > tokens) {
    status = child->truncate(tokens);
  }
  if (status.ok()) return child;
  (void)child->close();  // What went wrong is told already.
  return status;
}

// After every line `target` is a stream that `close` can end.
Status Sequence::State::fork_stream(const Stream& source, Stream& target) {
  const BlockLayout& layout = runtime.layout;
  const std::uint32_t per_extent = layout.blocks_per_extent();
  const std::uint32_t complete = source.tokens / layout.tokens_per_extent();
  for (std::uint32_t i = 0; i < complete; ++i) {
    runtime.table->share(source.extents[i]);
    target.extents.push_back(source.extents[i]);
  }
  target.tokens = complete * layout.tokens_per_extent();
  target.held_begin = complete * per_extent;
  for (std::uint32_t i = 0; i < target.held_begin; ++i) {
    if (layout.first_token(BlockIndex{i}) >= runtime.options.sinks) break;
    // The parent holds its sinks, so they are there.
    runtime.map->hold(runtime.map->find(block_id(target, BlockIndex{i})));
  }
  if (source.tokens == target.tokens && source.extents.size() == complete) return {};
  return copy_open_extent(source, target);
}

// The extent that the parent is filling, its open tail included.
Status Sequence::State::copy_open_extent(const Stream& source, Stream& target) {
  const BlockLayout& layout = runtime.layout;
  const ExtentId original = source.extents.back();
  const std::uint32_t sealed = runtime.table->row(original).sealed;
  KVTIER_ASSIGN_OR_RETURN(const ExtentId copy,
                          runtime.host->create({.sequence = id,
                                                .origin = origin,
                                                .layer = source.layer,
                                                .head_group = source.head_group,
                                                .first_block = BlockIndex{target.held_begin}}));
  target.extents.push_back(copy);
  runtime.host->copy_blocks(original, copy, sealed, target.generation);
  target.tokens += sealed * layout.tokens_per_block();
  target.held_begin += sealed;
  KVTIER_RETURN_IF_ERROR(bring_sinks(copy, sealed));
  if (source.tail.is_none()) return {};
  const BlockId tail = layout.block_id(copy, sealed);
  const std::optional<SlotId> slot = runtime.map->open(tail);
  if (!slot) {
    return no_space(
        fmt::format("all {} device slots are held and {} bytes more are needed for a fork",
                    runtime.map->slots(), layout.block_bytes()));
  }
  runtime.table->set_generation(tail, target.generation);
  std::memcpy(runtime.map->address(*slot), runtime.map->address(source.tail), layout.block_bytes());
  target.tail = *slot;
  target.tokens = source.tokens;
  return {};
}

// Sinks are held on the device wherever they are copied to.
Status Sequence::State::bring_sinks(ExtentId copy, std::uint32_t blocks) {
  const BlockIndex first = runtime.table->row(copy).owner.first_block;
  for (std::uint32_t place = 0; place < blocks; ++place) {
    if (runtime.layout.first_token(BlockIndex{first.value + place}) >= runtime.options.sinks) break;
    KVTIER_RETURN_IF_ERROR(bring_up(runtime.layout.block_id(copy, place)));
  }
  return {};
}

// An extent that others share, or that was another's first: two sequences that go on under one
// identity could not be told apart.
bool Sequence::State::must_copy(ExtentId extent) const {
  return runtime.table->is_shared(extent) || runtime.table->row(extent).owner.origin != origin;
}

// Prepares a cut at block `index` of a stream whose extent there may not change: a copy with the
// blocks before it and, where the cut goes through the block, that block, on the device.
Status Sequence::State::copy_cut_extent(const Stream& stream, BlockIndex index, bool cuts_block) {
  const BlockLayout& layout = runtime.layout;
  const std::uint32_t place = index.value % layout.blocks_per_extent();
  const std::uint32_t blocks = place + (cuts_block ? 1 : 0);
  const ExtentId original = stream.extents[index.value / layout.blocks_per_extent()];
  KVTIER_RETURN_IF_ERROR(bring_home(original, blocks));
  runtime.table->hold_frame(original);
  const Result<ExtentId> copy =
      runtime.host->create_for_cut({.sequence = id,
                                    .origin = origin,
                                    .layer = stream.layer,
                                    .head_group = stream.head_group,
                                    .first_block = BlockIndex{index.value - place}});
  if (copy.ok()) {
    cut_copies.push_back({&stream, *copy});
    runtime.host->copy_blocks(original, *copy, blocks, Generation{stream.generation.value + 1});
  }
  runtime.table->unhold_frame(original);
  if (!copy.ok()) return copy.status();
  KVTIER_RETURN_IF_ERROR(bring_sinks(*copy, place));
  if (!cuts_block) return {};
  const BlockId cut = layout.block_id(*copy, place);
  KVTIER_RETURN_IF_ERROR(bring_up(cut));
  cut_slots.push_back(runtime.map->find(cut));
  return {};
}

}  // namespace kvtier
