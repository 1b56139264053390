#include "memory/check.h"
#include "runtime/runtime.h"
#include "runtime/sequence_state.h"

#include <algorithm>
#include <cstring>

// Tokens that are taken back: a rejected draft, a retry. What can fail is prepared for every layer
// before anything is cut.

namespace kvtier {

Status Sequence::truncate(std::uint32_t tokens) {
  State& s = *state_;
  s.runtime.begin_call();
  if (s.closed) return invalid_argument(fmt::format("sequence {} is closed", s.id.value));
  return s.truncate(tokens);
}

Status Sequence::State::truncate(std::uint32_t tokens_left) {
  KVTIER_RETURN_IF_ERROR(runtime.host->settle());
  // Whatever can fail comes first, for every layer; then nothing fails any more.
  plan_seen_again(tokens_left);
  Status prepared;
  for (Stream& stream : streams) {
    if (prepared.ok() && stream.tokens > tokens_left) prepared = prepare_cut(stream, tokens_left);
  }
  if (prepared.ok()) {
    for (Stream& stream : streams) {
      if (stream.tokens > tokens_left) cut(stream, tokens_left);
    }
    for (std::uint32_t layer = 0; layer < tokens.size(); ++layer) {
      if (tokens[layer] > tokens_left) cut_selector(LayerIndex{layer}, tokens_left);
    }
  }
  end_cut();
  return prepared;
}

// Brings what a cut needs, and holds on to it until `end_cut`: the extent that is cut into a frame,
// and to the device the block that is cut. The tokens that the selector wants to see again are
// copied block by block: there need not be room for all of their blocks at once.
Status Sequence::State::prepare_cut(Stream& stream, std::uint32_t tokens_left) {
  const BlockIndex index = runtime.layout.block_of_token(tokens_left);
  const bool cuts_block = tokens_left % runtime.layout.tokens_per_block() != 0;
  const std::uint32_t floor = tokens_left - seen_again[stream.layer.value].tokens;
  for (std::uint32_t i = runtime.layout.block_of_token(floor).value; i < index.value; ++i) {
    const BlockId block = block_id(stream, BlockIndex{i});
    KVTIER_RETURN_IF_ERROR(prepare_block(block));
    copy_seen_again(stream, BlockIndex{i}, block, tokens_left);
    runtime.map->unhold(cut_slots.back());
    cut_slots.pop_back();
    // Reading over damage can have cost an extent its frame.
    const ExtentId extent = cut_frames.back();
    if (!runtime.table->row(extent).frame.is_none()) runtime.table->unhold_frame(extent);
    cut_frames.pop_back();
  }
  if (is_tail(stream, index)) {
    if (cuts_block) copy_seen_again(stream, index, block_id(stream, index), tokens_left);
    return {};
  }
  const std::uint32_t per_extent = runtime.layout.blocks_per_extent();
  if (!cuts_block && index.value % per_extent == 0) return {};
  if (must_copy(stream.extents[index.value / per_extent])) {
    KVTIER_RETURN_IF_ERROR(copy_cut_extent(stream, index, cuts_block));
    if (cuts_block) {
      const BlockId copy =
          runtime.layout.block_id(cut_copies.back().extent, index.value % per_extent);
      copy_seen_again(stream, index, copy, tokens_left);
    }
    return {};
  }
  const BlockId block = block_id(stream, index);
  if (!cuts_block) {
    return prepare_extent(runtime.layout.extent_of(block), runtime.layout.place_of(block));
  }
  KVTIER_RETURN_IF_ERROR(prepare_block(block));
  copy_seen_again(stream, index, block, tokens_left);
  return {};
}

// How far back each selector must be cut, and room for the tokens that it then sees again.
void Sequence::State::plan_seen_again(std::uint32_t tokens_left) {
  const BlockLayout& layout = runtime.layout;
  seen_again.resize(tokens.size());
  for (std::size_t layer = 0; layer < tokens.size(); ++layer) {
    SeenAgain& again = seen_again[layer];
    again.tokens = 0;
    if (tokens[layer] <= tokens_left) continue;
    again.tokens = tokens_left - selectors[layer]->truncate_floor(tokens_left);
    again.keys.resize(again.tokens * layout.kv_heads() * layout.key_row_bytes());
    again.values.resize(again.tokens * layout.kv_heads() * layout.value_row_bytes());
  }
}

// Copies what a resident block has of the tokens that its layer's selector sees again.
void Sequence::State::copy_seen_again(const Stream& stream, BlockIndex index, BlockId block_of,
                                      std::uint32_t tokens_left) {
  const BlockLayout& layout = runtime.layout;
  SeenAgain& again = seen_again[stream.layer.value];
  const std::uint32_t floor = tokens_left - again.tokens;
  const std::uint32_t first = layout.first_token(index);
  const std::uint32_t end = std::min(tokens_left, first + layout.tokens_per_block());
  const std::byte* block = runtime.map->address(runtime.map->find(block_of));
  for (std::uint32_t position = std::max(first, floor); position < end; ++position) {
    for (std::uint32_t head = 0; head < layout.heads_per_block(); ++head) {
      const std::size_t row = std::size_t{position - floor} * layout.kv_heads() +
                              stream.head_group.value * layout.heads_per_block() + head;
      std::memcpy(again.keys.data() + row * layout.key_row_bytes(),
                  block + layout.key_offset(head, position - first), layout.key_row_bytes());
      std::memcpy(again.values.data() + row * layout.value_row_bytes(),
                  block + layout.value_offset(head, position - first), layout.value_row_bytes());
    }
  }
}

Status Sequence::State::prepare_block(BlockId block) {
  KVTIER_RETURN_IF_ERROR(
      prepare_extent(runtime.layout.extent_of(block), runtime.layout.place_of(block)));
  KVTIER_RETURN_IF_ERROR(bring_up(block));
  cut_slots.push_back(runtime.map->find(block));
  return {};
}

Status Sequence::State::prepare_extent(ExtentId extent, std::uint32_t first_cut) {
  KVTIER_RETURN_IF_ERROR(bring_home(extent, first_cut));
  runtime.table->hold_frame(extent);
  cut_frames.push_back(extent);
  return {};
}

// Some selectors cannot give back single tokens of what they have condensed: those see the tokens
// behind their floor once more.
void Sequence::State::cut_selector(LayerIndex layer, std::uint32_t tokens_left) {
  const BlockLayout& layout = runtime.layout;
  const SeenAgain& again = seen_again[layer.value];
  const std::uint32_t floor = tokens_left - again.tokens;
  tokens[layer.value] = tokens_left;
  selectors[layer.value]->truncate(floor);
  if (again.tokens == 0) return;
  selectors[layer.value]->append(
      {.first_position = floor,
       .tokens = again.tokens,
       .keys = again.keys.data(),
       .key_token_stride = layout.kv_heads() * layout.key_row_bytes(),
       .key_head_stride = layout.key_row_bytes(),
       .values = again.values.data(),
       .value_token_stride = layout.kv_heads() * layout.value_row_bytes(),
       .value_head_stride = layout.value_row_bytes(),
       .marks = marks.empty() ? nullptr : marks.data() + floor});
}

void Sequence::State::end_cut() {
  for (ExtentId extent : cut_frames) {
    // Reading it over can have cost an extent its frame.
    if (!runtime.table->row(extent).frame.is_none()) runtime.table->unhold_frame(extent);
  }
  for (SlotId slot : cut_slots) runtime.map->unhold(slot);
  // Those that are left were made for a cut that did not happen.
  for (const CutCopy& copy : cut_copies) {
    for (std::uint32_t place = 0; place < runtime.layout.blocks_per_extent(); ++place) {
      runtime.map->release(runtime.layout.block_id(copy.extent, place));
    }
    runtime.host->release(copy.extent);
  }
  cut_frames.clear();
  cut_slots.clear();
  cut_copies.clear();
}

// Has the extent in a frame, its blocks before `first_cut` as intact as they can be had: its copy
// on disk is about to be given up. One that is damaged for good stays marked, and fails the step
// that wants it.
Status Sequence::State::bring_home(ExtentId extent, std::uint32_t first_cut) {
  Extent& row = runtime.table->row(extent);
  wanted.clear();
  bool damaged = false;
  for (std::uint32_t place = 0; place < std::min(first_cut, row.sealed); ++place) {
    const BlockId block = runtime.layout.block_id(extent, place);
    wanted.push_back(block);
    damaged = damaged || (is_in_frame(row.state) && runtime.table->is_damaged(block));
  }
  if (damaged) runtime.host->settle_write(extent);
  if (row.state == HomeState::kDisk || (damaged && row.state == HomeState::kBoth)) {
    KVTIER_RETURN_IF_ERROR(runtime.host->start_read(extent, Priority::kDemand));
  }
  if (row.state == HomeState::kReading) {
    failures.clear();
    runtime.host->finish_read(extent, wanted, failures);
  }
  if (is_in_frame(row.state)) return {};
  return io_error(fmt::format("the extent at disk offset {} that a truncation cuts cannot be read",
                              runtime.table->disk_offset(extent)));
}

// Has the block, whose extent is in a frame, whole on the device, held.
Status Sequence::State::bring_up(BlockId block) {
  Miss miss{block, runtime.map->find(block), BlockPart::kKeys};
  if (miss.slot.is_none()) {
    const std::optional<SlotId> slot = runtime.map->reserve(block);
    if (!slot) return no_space("no device slot is left for the block that a truncation cuts");
    miss = {block, *slot, BlockPart::kWhole};
  } else {
    runtime.map->hold(miss.slot);
    if (runtime.map->is_whole(miss.slot)) return {};
  }
  failures.clear();
  WaveFetch& fetch = *runtime.waves[0];
  fetch.admit_as(Admission::kUsed);
  (void)fetch.add(miss);
  fetch.begin();
  fetch.finish(failures);
  if (failures.empty()) return {};
  if (miss.part == BlockPart::kKeys) runtime.map->unhold(miss.slot);
  return {failures.front().code, failures.front().message};
}

bool Sequence::State::is_tail(const Stream& stream, BlockIndex index) const {
  return !stream.tail.is_none() && index == runtime.layout.block_of_token(stream.tokens);
}

bool Sequence::State::is_held_by(const Stream& stream, BlockIndex index) const {
  return index.value >= stream.held_begin ||
         runtime.layout.first_token(index) < runtime.options.sinks;
}

void Sequence::State::cut(Stream& stream, std::uint32_t tokens_left) {
  const BlockIndex index = runtime.layout.block_of_token(tokens_left);
  if (is_tail(stream, index)) {
    stream.tokens = tokens_left;
    return;
  }
  const bool cuts_block = tokens_left % runtime.layout.tokens_per_block() != 0;
  const std::uint32_t per_extent = runtime.layout.blocks_per_extent();
  const std::uint32_t place = index.value % per_extent;
  const auto copy = std::ranges::find(cut_copies, &stream, &CutCopy::stream);
  if (copy != cut_copies.end()) {
    use_copy(stream, BlockIndex{index.value - place}, copy->extent);
    cut_copies.erase(copy);
    stream.held_begin = index.value;
  } else {
    drop_outliers(stream, index);
    release_blocks(stream, index.value + (cuts_block ? 1 : 0));
    release_extents(stream, index.value / per_extent + (place != 0 || cuts_block ? 1 : 0));
    if (cuts_block && is_held_by(stream, index)) {
      runtime.map->unhold(runtime.map->find(block_id(stream, index)));
    }
    stream.held_begin = std::min(stream.held_begin, index.value);
  }
  stream.tail = SlotId{};
  stream.generation = Generation{stream.generation.value + 1};
  if (place != 0 || cuts_block) runtime.host->reopen(stream.extents.back(), place);
  if (cuts_block) {
    const BlockId block = block_id(stream, index);
    stream.tail = runtime.map->find(block);
    runtime.map->reopen(stream.tail);
    runtime.table->set_generation(block, stream.generation);
  }
  stream.tokens = tokens_left;
}

// Puts the copy of the extent whose first block is `first` in its place. Of the copy, sinks and the
// block that is cut are on the device; the window is held again from the next step on.
void Sequence::State::use_copy(Stream& stream, BlockIndex first, ExtentId copy) {
  drop_outliers(stream, first);
  release_blocks(stream, first.value);
  for (std::uint32_t i = stream.held_begin; i < first.value; ++i) {
    if (runtime.layout.first_token(BlockIndex{i}) < runtime.options.sinks) continue;
    runtime.map->unhold(runtime.map->find(block_id(stream, BlockIndex{i})));
  }
  release_extents(stream, first.value / runtime.layout.blocks_per_extent());
  stream.extents.push_back(copy);
}

void Sequence::State::release_extents(Stream& stream, std::size_t extents_left) {
  while (stream.extents.size() > extents_left) {
    runtime.host->release(stream.extents.back());
    stream.extents.pop_back();
  }
}

void Sequence::State::drop_outliers(Stream& stream, BlockIndex first) {
  const std::size_t before = stream.outliers.size();
  std::erase_if(stream.outliers, [&](BlockIndex outlier) {
    if (outlier < first) return false;
    runtime.map->unhold(runtime.map->find(block_id(stream, outlier)));
    return true;
  });
  runtime.outliers_held -= static_cast<std::uint32_t>(before - stream.outliers.size());
}

// Gives up the device copies of every block from `first_block` to the end, the open tail included;
// of those that another sequence shares, what this one holds.
void Sequence::State::release_blocks(Stream& stream, std::uint32_t first_block) {
  const std::uint32_t tokens_per_block = runtime.layout.tokens_per_block();
  const std::uint32_t sealed = stream.tokens / tokens_per_block;
  const std::uint32_t end = sealed + (stream.tail.is_none() ? 0 : 1);
  for (std::uint32_t index = first_block; index < end; ++index) {
    const BlockId block = block_id(stream, BlockIndex{index});
    if (!runtime.table->is_shared(runtime.layout.extent_of(block))) {
      runtime.map->release(block);
    } else if (is_held_by(stream, BlockIndex{index})) {
      runtime.map->unhold(runtime.map->find(block));
    }
  }
}

}  // namespace kvtier
