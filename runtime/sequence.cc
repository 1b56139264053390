#include "memory/check.h"
#include "runtime/runtime.h"
#include "runtime/sequence_state.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace kvtier {

// --- Making.

Result<std::unique_ptr<Sequence::State>> Sequence::State::make(Runtime::State& runtime,
                                                               SequenceId id, Origin origin) {
  auto state = std::make_unique<State>(runtime, id, origin);
  const RuntimeOptions& options = runtime.options;
  const BlockLayout& layout = runtime.layout;
  const std::uint32_t extents = options.tokens_max / layout.tokens_per_extent() + 1;
  for (std::uint32_t layer = 0; layer < options.layers; ++layer) {
    KVTIER_ASSIGN_OR_RETURN(auto selector,
                            options.selector(runtime.selector_shape, LayerIndex{layer}));
    state->selectors.push_back(std::move(selector));
    state->tokens.push_back(0);
    for (std::uint32_t group = 0; group < layout.head_groups(); ++group) {
      Stream stream;
      stream.layer = LayerIndex{layer};
      stream.head_group = HeadGroup{group};
      stream.extents.reserve(extents);
      state->streams.push_back(std::move(stream));
    }
  }
  state->selections.resize(layout.head_groups());
  state->demands.assign(options.layers, std::numeric_limits<float>::quiet_NaN());
  state->shared_demands = state->demands;
  state->rest_choices.assign(options.layers,
                             RestChoice(options.query_heads, options.measure_interval_max));
  return state;
}

Sequence::Sequence(std::unique_ptr<State> state) : state_(std::move(state)) {}

Sequence::~Sequence() {
  KVTIER_CHECK(state_->closed, "sequence {} is destroyed that was not closed", state_->id.value);
}

std::uint32_t Sequence::tokens(LayerIndex layer) const { return state_->tokens.at(layer.value); }

// --- Appending.

Status Sequence::append(LayerIndex layer, const TokenRows& rows) {
  State& s = *state_;
  Runtime::State& runtime = s.runtime;
  KVTIER_CHECK(!s.closed && layer.value < runtime.options.layers, "layer {} of {}", layer.value,
               runtime.options.layers);
  const std::uint32_t before = s.tokens[layer.value];
  if (rows.tokens > runtime.options.tokens_max - before) {
    return invalid_argument(fmt::format("{} tokens after {} are more than tokens_max {}",
                                        rows.tokens, before, runtime.options.tokens_max));
  }
  const Duration start = runtime.now();
  Status status;
  std::uint32_t done = 0;
  while (done < rows.tokens) {
    const std::uint32_t room =
        runtime.layout.tokens_per_block() - (before + done) % runtime.layout.tokens_per_block();
    const std::uint32_t count = std::min(room, rows.tokens - done);
    const Status appended = s.append_chunk(layer, rows, done, count);
    if (s.tokens[layer.value] > before + done) done += count;
    if (status.ok()) status = appended;
    // Damage on the way down is marked and told; the tokens behind it still belong to the context.
    if (!appended.ok() && appended.code() != StatusCode::kCorrupt) break;
  }
  if (done > 0) {
    s.selectors[layer.value]->append({.first_position = before,
                                      .tokens = done,
                                      .keys = rows.keys,
                                      .key_token_stride = rows.key_token_stride,
                                      .key_head_stride = rows.key_head_stride,
                                      .values = rows.values,
                                      .value_token_stride = rows.value_token_stride,
                                      .value_head_stride = rows.value_head_stride,
                                      .marks = rows.marks});
    s.remember_marks(rows, before, done);
  }
  const Status settled = runtime.host->settle();
  runtime.record(Track::kAppend, "append", start, runtime.now(),
                 done * runtime.layout.token_head_bytes() * runtime.layout.kv_heads());
  return status.ok() ? settled : status;
}

Status Sequence::observe_prompt(LayerIndex layer, const PromptQueries& queries) {
  State& s = *state_;
  KVTIER_CHECK(!s.closed && layer.value < s.runtime.options.layers, "layer {} of {}", layer.value,
               s.runtime.options.layers);
  const std::size_t elements =
      std::size_t{s.runtime.options.query_heads} * s.runtime.layout.head_dim();
  for (std::size_t i = 0; i < queries.positions.size(); ++i) {
    const std::uint32_t position = queries.positions[i];
    if (position >= s.tokens[layer.value] || (i > 0 && position <= queries.positions[i - 1])) {
      return invalid_argument(
          fmt::format("prompt query {} is of position {}: expected them ascending, of the {} "
                      "tokens appended",
                      i, position, s.tokens[layer.value]));
    }
    const float* query = queries.queries + i * queries.query_stride;
    if (!std::all_of(query, query + elements, [](float x) { return std::isfinite(x); })) {
      return invalid_argument(
          fmt::format("prompt query {} (position {}) is not finite", i, position));
    }
  }
  s.selectors[layer.value]->observe_prompt(queries);
  return {};
}

// Tokens of one block, in all head groups. When a tail cannot be opened nothing has changed; a
// failure after that (of the write-through) leaves the tokens appended.
Status Sequence::State::append_chunk(LayerIndex layer, const TokenRows& rows, std::uint32_t first,
                                     std::uint32_t count) {
  for (Stream& stream : streams_of(layer)) KVTIER_RETURN_IF_ERROR(ensure_tail(stream));
  tokens[layer.value] += count;
  Status status;
  for (Stream& stream : streams_of(layer)) {
    write_rows(stream, rows, first, count);
    stream.tokens += count;
    if (stream.tokens % runtime.layout.tokens_per_block() == 0) {
      const Status sealed = seal_tail(stream);
      if (status.ok()) status = sealed;
    }
    slide_window(stream);
  }
  return status;
}

Status Sequence::State::ensure_tail(Stream& stream) {
  if (!stream.tail.is_none()) return {};
  const BlockIndex index = runtime.layout.block_of_token(stream.tokens);
  const std::uint32_t per_extent = runtime.layout.blocks_per_extent();
  if (index.value / per_extent == stream.extents.size()) {
    KVTIER_ASSIGN_OR_RETURN(const ExtentId extent,
                            runtime.host->create({.sequence = id,
                                                  .origin = origin,
                                                  .layer = stream.layer,
                                                  .head_group = stream.head_group,
                                                  .first_block = index}));
    stream.extents.push_back(extent);
  }
  const BlockId block = block_id(stream, index);
  std::optional<SlotId> slot = runtime.map->open(block);
  if (!slot) {
    // Slots whose blocks still wait to be written through are held: let them go.
    KVTIER_RETURN_IF_ERROR(runtime.host->settle());
    slot = runtime.map->open(block);
  }
  if (!slot) {
    return no_space(fmt::format("all {} device slots are held; give the device tier more capacity",
                                runtime.map->slots()));
  }
  runtime.table->set_generation(block, stream.generation);
  stream.tail = *slot;
  return {};
}

void Sequence::State::write_rows(Stream& stream, const TokenRows& rows, std::uint32_t first,
                                 std::uint32_t count) {
  const BlockLayout& layout = runtime.layout;
  std::byte* block = runtime.map->address(stream.tail);
  const std::uint32_t first_in_block = stream.tokens % layout.tokens_per_block();
  for (std::uint32_t head = 0; head < layout.heads_per_block(); ++head) {
    const std::size_t kv_head = stream.head_group.value * layout.heads_per_block() + head;
    for (std::uint32_t i = 0; i < count; ++i) {
      const std::size_t token = first + i;
      std::memcpy(block + layout.key_offset(head, first_in_block + i),
                  rows.keys + token * rows.key_token_stride + kv_head * rows.key_head_stride,
                  layout.key_row_bytes());
      std::memcpy(block + layout.value_offset(head, first_in_block + i),
                  rows.values + token * rows.value_token_stride + kv_head * rows.value_head_stride,
                  layout.value_row_bytes());
    }
  }
}

Status Sequence::State::seal_tail(Stream& stream) {
  const BlockIndex index = runtime.layout.block_of_token(stream.tokens - 1);
  const BlockId block = block_id(stream, index);
  const SlotId slot = stream.tail;
  stream.tail = SlotId{};
  runtime.map->seal(slot);
  const ExtentId extent = runtime.layout.extent_of(block);
  ++runtime.table->row(extent).sealed;
  KVTIER_RETURN_IF_ERROR(runtime.host->write_through(block, slot));
  if (runtime.table->row(extent).sealed < runtime.layout.blocks_per_extent()) return {};
  return runtime.host->complete(extent);
}

// The tail's hold becomes the window's when it seals; it ends when the window has moved on.
void Sequence::State::slide_window(Stream& stream) {
  const std::uint32_t tokens_per_block = runtime.layout.tokens_per_block();
  const std::uint32_t window_begin =
      stream.tokens > runtime.options.window ? stream.tokens - runtime.options.window : 0;
  const std::uint32_t first = window_begin / tokens_per_block;
  for (; stream.held_begin < first; ++stream.held_begin) {
    if (stream.held_begin * tokens_per_block < runtime.options.sinks) continue;
    const BlockId block = block_id(stream, BlockIndex{stream.held_begin});
    runtime.map->unhold(runtime.map->find(block));
  }
}

// --- Truncating.

Status Sequence::truncate(std::uint32_t tokens) {
  State& s = *state_;
  KVTIER_CHECK(!s.closed, "sequence {} is closed", s.id.value);
  KVTIER_RETURN_IF_ERROR(s.runtime.host->settle());
  // Whatever can fail comes first, for every layer; then nothing fails any more.
  s.plan_seen_again(tokens);
  Status prepared;
  for (Stream& stream : s.streams) {
    if (prepared.ok() && stream.tokens > tokens) prepared = s.prepare_cut(stream, tokens);
  }
  if (prepared.ok()) {
    for (Stream& stream : s.streams) {
      if (stream.tokens > tokens) s.cut(stream, tokens);
    }
    for (std::uint32_t layer = 0; layer < s.tokens.size(); ++layer) {
      if (s.tokens[layer] > tokens) s.cut_selector(LayerIndex{layer}, tokens);
    }
  }
  s.end_cut();
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
    copy_seen_again(stream, BlockIndex{i}, tokens_left);
    runtime.map->unhold(cut_slots.back());
    cut_slots.pop_back();
    // Reading over damage can have cost an extent its frame.
    const ExtentId extent = cut_frames.back();
    if (!runtime.table->row(extent).frame.is_none()) runtime.table->unhold_frame(extent);
    cut_frames.pop_back();
  }
  if (!is_tail(stream, index) && !cuts_block) {
    if (index.value % runtime.layout.blocks_per_extent() == 0) return {};
    const BlockId block = block_id(stream, index);
    return prepare_extent(runtime.layout.extent_of(block), runtime.layout.place_of(block));
  }
  if (!is_tail(stream, index)) KVTIER_RETURN_IF_ERROR(prepare_block(block_id(stream, index)));
  if (cuts_block) copy_seen_again(stream, index, tokens_left);
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
void Sequence::State::copy_seen_again(const Stream& stream, BlockIndex index,
                                      std::uint32_t tokens_left) {
  const BlockLayout& layout = runtime.layout;
  SeenAgain& again = seen_again[stream.layer.value];
  const std::uint32_t floor = tokens_left - again.tokens;
  const std::uint32_t first = layout.first_token(index);
  const std::uint32_t end = std::min(tokens_left, first + layout.tokens_per_block());
  const std::byte* block = runtime.map->address(runtime.map->find(block_id(stream, index)));
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
  if (runtime.map->find(block).is_none()) {
    KVTIER_RETURN_IF_ERROR(bring_up(block));
  } else {
    runtime.map->hold(runtime.map->find(block));
  }
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

// Marks belong to tokens: every layer brings the same, and the first that does is believed.
void Sequence::State::remember_marks(const TokenRows& rows, std::uint32_t first,
                                     std::uint32_t count) {
  if (rows.marks == nullptr) return;
  if (marks.empty()) marks.resize(runtime.options.tokens_max);
  std::copy_n(rows.marks, count, marks.begin() + first);
}

void Sequence::State::end_cut() {
  for (ExtentId extent : cut_frames) {
    // Reading it over can have cost an extent its frame.
    if (!runtime.table->row(extent).frame.is_none()) runtime.table->unhold_frame(extent);
  }
  for (SlotId slot : cut_slots) runtime.map->unhold(slot);
  cut_frames.clear();
  cut_slots.clear();
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

// Has the block, whose extent is in a frame, on the device, held.
Status Sequence::State::bring_up(BlockId block) {
  const std::optional<SlotId> slot = runtime.map->reserve(block);
  if (!slot) return no_space("no device slot is left for the block that a truncation cuts");
  failures.clear();
  WaveFetch& fetch = *runtime.waves[0];
  (void)fetch.add({block, *slot});
  fetch.begin();
  fetch.finish(failures);
  if (failures.empty()) return {};
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
  const std::size_t outliers_before = stream.outliers.size();
  std::erase_if(stream.outliers, [&](BlockIndex outlier) {
    if (outlier < index) return false;
    if (outlier == index && cuts_block) {
      runtime.map->unhold(runtime.map->find(block_id(stream, index)));
    }
    return true;
  });
  runtime.outliers_held -= static_cast<std::uint32_t>(outliers_before - stream.outliers.size());
  release_blocks(stream, index.value + (cuts_block ? 1 : 0));
  stream.tail = SlotId{};
  stream.generation = Generation{stream.generation.value + 1};

  const std::uint32_t place = index.value % runtime.layout.blocks_per_extent();
  const std::uint32_t extents_left =
      index.value / runtime.layout.blocks_per_extent() + (place != 0 || cuts_block ? 1 : 0);
  while (stream.extents.size() > extents_left) {
    runtime.host->release(stream.extents.back());
    stream.extents.pop_back();
  }
  if (place != 0 || cuts_block) runtime.host->reopen(stream.extents.back(), place);
  if (cuts_block) {
    const BlockId block = block_id(stream, index);
    const SlotId slot = runtime.map->find(block);
    runtime.map->reopen(slot);
    if (is_held_by(stream, index)) runtime.map->unhold(slot);
    runtime.table->set_generation(block, stream.generation);
    stream.tail = slot;
  }
  stream.held_begin = std::min(stream.held_begin, index.value);
  stream.tokens = tokens_left;
}

// Gives up the device copies of every block from `first_block` to the end, the open tail included.
void Sequence::State::release_blocks(Stream& stream, std::uint32_t first_block) {
  const std::uint32_t tokens_per_block = runtime.layout.tokens_per_block();
  const std::uint32_t sealed = stream.tokens / tokens_per_block;
  const std::uint32_t end = sealed + (stream.tail.is_none() ? 0 : 1);
  for (std::uint32_t index = first_block; index < end; ++index) {
    runtime.map->release(block_id(stream, BlockIndex{index}));
  }
}

// --- Ending.

Status Sequence::close() {
  State& s = *state_;
  KVTIER_CHECK(!s.closed, "sequence {} is closed twice", s.id.value);
  const Status settled = s.runtime.host->settle();
  for (Stream& stream : s.streams) {
    s.runtime.outliers_held -= static_cast<std::uint32_t>(stream.outliers.size());
    stream.outliers.clear();
    s.release_blocks(stream, 0);
    stream.tail = SlotId{};
    for (ExtentId extent : stream.extents) s.runtime.host->release(extent);
    stream.extents.clear();
  }
  s.closed = true;
  --s.runtime.sequences_open;
  return settled;
}

}  // namespace kvtier
