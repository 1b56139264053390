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
  auto state = make_empty(runtime, id, origin);
  for (std::uint32_t layer = 0; layer < runtime.options.layers; ++layer) {
    KVTIER_ASSIGN_OR_RETURN(auto selector,
                            runtime.options.selector(runtime.selector_shape, LayerIndex{layer}));
    state->selectors.push_back(std::move(selector));
  }
  return state;
}

std::unique_ptr<Sequence::State> Sequence::State::make_empty(Runtime::State& runtime, SequenceId id,
                                                             Origin origin) {
  auto state = std::make_unique<State>(runtime, id, origin);
  const RuntimeOptions& options = runtime.options;
  const BlockLayout& layout = runtime.layout;
  const std::uint32_t extents = options.tokens_max / layout.tokens_per_extent() + 1;
  for (std::uint32_t layer = 0; layer < options.layers; ++layer) {
    for (std::uint32_t group = 0; group < layout.head_groups(); ++group) {
      Stream stream;
      stream.layer = LayerIndex{layer};
      stream.head_group = HeadGroup{group};
      stream.extents.reserve(extents);
      state->streams.push_back(std::move(stream));
    }
  }
  state->tokens.assign(options.layers, 0);
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

std::uint32_t Sequence::tokens(LayerIndex layer) const {
  return layer.value < state_->tokens.size() ? state_->tokens[layer.value] : 0;
}

// Every call that names a layer begins with this.
Status Sequence::State::check_call(LayerIndex layer) const {
  if (closed) return invalid_argument(fmt::format("sequence {} is closed", id.value));
  if (layer.value >= runtime.options.layers) {
    return invalid_argument(fmt::format("layer {}, but the runtime was opened with {} layers",
                                        layer.value, runtime.options.layers));
  }
  return {};
}

// --- Appending.

Status Sequence::append(LayerIndex layer, const TokenRows& rows) {
  State& s = *state_;
  Runtime::State& runtime = s.runtime;
  runtime.begin_call();
  KVTIER_RETURN_IF_ERROR(s.check_call(layer));
  if (rows.tokens > 0 && (rows.keys == nullptr || rows.values == nullptr)) {
    return invalid_argument(fmt::format("{} tokens to append without keys or values", rows.tokens));
  }
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
  s.runtime.begin_call();
  KVTIER_RETURN_IF_ERROR(s.check_call(layer));
  if (queries.queries == nullptr && !queries.positions.empty()) {
    return invalid_argument("prompt queries are null");
  }
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
    return no_space(fmt::format(
        "all {} device slots are held and {} bytes more are needed; give the device tier more "
        "capacity",
        runtime.map->slots(), runtime.layout.block_bytes()));
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
  const Status written = runtime.host->write_through(block, slot);
  if (runtime.table->row(extent).sealed < runtime.layout.blocks_per_extent()) return written;
  const Status completed = runtime.host->complete(extent);
  return written.ok() ? completed : written;
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

// Marks belong to tokens: every layer brings the same, and the first that does is believed.
void Sequence::State::remember_marks(const TokenRows& rows, std::uint32_t first,
                                     std::uint32_t count) {
  if (rows.marks == nullptr) return;
  if (marks.empty()) marks.resize(runtime.options.tokens_max);
  std::copy_n(rows.marks, count, marks.begin() + first);
}

// --- Ending.

Status Sequence::close() {
  State& s = *state_;
  s.runtime.begin_call();
  if (s.closed) return invalid_argument(fmt::format("sequence {} is closed already", s.id.value));
  return s.close();
}

Status Sequence::State::close() {
  const Status settled = runtime.host->settle();
  for (Stream& stream : streams) {
    drop_outliers(stream, BlockIndex{0});
    release_blocks(stream, 0);
    stream.tail = SlotId{};
    release_extents(stream, 0);
    stream.tokens = 0;
  }
  closed = true;
  --runtime.sequences_open;
  return settled;
}

}  // namespace kvtier
