#include "memory/check.h"
#include "runtime/prefix_store.h"
#include "runtime/runtime.h"
#include "runtime/sequence_state.h"
#include "transfer/little_endian.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

// Sequences that outlive the process: whole runs of tokens go to a prefix store and come back.

namespace kvtier {
namespace {

// Metadata of a prefix stands with its last run: each layer's selector, then what tokens are
// marked.
constexpr std::uint32_t kFirstSelectorTag = 1;
constexpr std::uint32_t kMarksTag = 0xFFFFFFFFu;
constexpr std::size_t kFloorBytes = 4;

struct Blob {
  std::uint32_t tag;
  std::vector<std::byte> bytes;
};

}  // namespace

// --- Saving.

Result<std::uint32_t> Sequence::save(PrefixStore& store, std::span<const std::uint32_t> token_ids,
                                     double value) {
  State& s = *state_;
  s.runtime.begin_call();
  if (s.closed) return invalid_argument(fmt::format("sequence {} is closed", s.id.value));
  if (!std::isfinite(value)) {
    return invalid_argument(fmt::format("value is {}, expected a finite number", value));
  }
  if (store.layout().fingerprint() != s.runtime.layout.fingerprint()) {
    return invalid_argument("the prefix store was made for another layout than the runtime's");
  }
  for (std::uint32_t layer = 0; layer < s.tokens.size(); ++layer) {
    if (s.tokens[layer] < token_ids.size()) {
      return invalid_argument(fmt::format("{} token ids, but layer {} has {} tokens",
                                          token_ids.size(), layer, s.tokens[layer]));
    }
  }
  KVTIER_RETURN_IF_ERROR(s.runtime.host->settle());
  return s.save(store, token_ids, value);
}

Result<std::uint32_t> Sequence::State::save(PrefixStore& store,
                                            std::span<const std::uint32_t> token_ids,
                                            double value) {
  const auto streams_count = static_cast<std::uint32_t>(streams.size());
  KVTIER_ASSIGN_OR_RETURN(PrefixStore::Saving saving, store.save(token_ids, streams_count));
  const auto runs = static_cast<std::uint32_t>(token_ids.size() / store.tokens_per_run());
  const std::uint32_t saved = runs * store.tokens_per_run();
  const std::vector<std::uint32_t> missing(saving.missing().begin(), saving.missing().end());
  for (const std::uint32_t run : missing) {
    for (Stream& stream : streams) KVTIER_RETURN_IF_ERROR(save_extent(saving, run, stream));
  }
  std::vector<Blob> blobs;
  if (!missing.empty() && missing.back() == runs - 1) {
    const auto layers = static_cast<std::uint32_t>(selectors.size());
    const std::uint64_t bytes_max = saving.metadata_bytes_max(layers + 1);
    std::uint64_t bytes = saved;  // For the marks.
    for (std::uint32_t layer = 0; layer < layers && bytes <= bytes_max; ++layer) {
      blobs.push_back({kFirstSelectorTag + layer, save_selector_at(LayerIndex{layer}, saved)});
      bytes += blobs.back().bytes.size();
    }
    // Of a prefix so long that one run cannot carry its selectors, the keys are read again.
    if (bytes > bytes_max) blobs.clear();
    if (!marks.empty()) {
      const auto bytes = std::as_bytes(std::span(marks).first(saved));
      blobs.push_back({kMarksTag, {bytes.begin(), bytes.end()}});
    }
  }
  for (const Blob& blob : blobs) {
    KVTIER_RETURN_IF_ERROR(
        saving.add_metadata({.run = runs - 1, .blob = {.tag = blob.tag, .bytes = blob.bytes}}));
  }
  KVTIER_RETURN_IF_ERROR(saving.commit(value));
  return saved;
}

Status Sequence::State::save_extent(PrefixStore::Saving& saving, std::uint32_t run,
                                    const Stream& stream) {
  const ExtentId extent = stream.extents[run];
  KVTIER_RETURN_IF_ERROR(bring_intact(extent));
  // A copy that is on disk has its seal; one that is being written must not be touched.
  if (runtime.table->row(extent).state == HomeState::kHost) runtime.table->header(extent).seal();
  runtime.table->hold_frame(extent);
  const StoreExtentWrite write{
      .key = {.layer = stream.layer, .head_group = stream.head_group, .index = 0},
      .bytes = runtime.table->frame_bytes(runtime.table->row(extent).frame)};
  const Status written = saving.write({.run = run, .extents = {&write, 1}});
  runtime.table->unhold_frame(extent);
  return written;
}

// Has a complete extent in a frame with every block of it as it was sealed.
Status Sequence::State::bring_intact(ExtentId extent) {
  KVTIER_RETURN_IF_ERROR(bring_home(extent, runtime.layout.blocks_per_extent()));
  if (!runtime.table->has_damage(extent)) return {};
  for (std::uint32_t place = 0; place < runtime.layout.blocks_per_extent(); ++place) {
    const BlockId block = runtime.layout.block_id(extent, place);
    if (!runtime.table->is_damaged(block)) continue;
    const BlockCheck check = runtime.host->check(block, runtime.table->block_bytes(block).data());
    return corrupt(runtime.host
                       ->describe(block, Tier::kHost, StatusCode::kCorrupt, check,
                                  "a prefix with damage is not saved")
                       .message);
  }
  return {};
}

// A selector that cannot be cut exactly at the prefix's end is saved as of its floor: what it has
// to see once more is in the blocks.
std::vector<std::byte> Sequence::State::save_selector_at(LayerIndex layer,
                                                         std::uint32_t saved) const {
  const std::unique_ptr<Selector> selector = selectors[layer.value]->fork();
  std::uint32_t floor = saved;
  if (saved < tokens[layer.value]) {
    floor = selector->truncate_floor(saved);
    selector->truncate(floor);
  }
  std::vector<std::byte> bytes(kFloorBytes);
  store_little_endian(bytes.data(), floor);
  const std::vector<std::byte> state =
      kvtier::save_selector(*selector, runtime.options.selector.name, runtime.selector_shape);
  bytes.insert(bytes.end(), state.begin(), state.end());
  return bytes;
}

// --- Restoring.

Result<RestoredSequence> Runtime::restore_sequence(PrefixStore& store,
                                                   std::span<const std::uint32_t> token_ids,
                                                   Origin origin) {
  State& runtime = *state_;
  runtime.begin_call();
  if (store.layout().fingerprint() != runtime.layout.fingerprint()) {
    return invalid_argument("the prefix store was made for another layout than the runtime's");
  }
  KVTIER_RETURN_IF_ERROR(runtime.check_room());
  PrefixHit hit = store.lookup(
      token_ids.first(std::min<std::size_t>(token_ids.size(), runtime.options.tokens_max)));
  KVTIER_ASSIGN_OR_RETURN(
      auto state, Sequence::State::make(runtime, SequenceId{runtime.sequences_made}, origin));
  (void)runtime.add_sequence();
  RestoredSequence restored;
  Status status = state->restore(store, hit, restored);
  if (!status.ok()) {
    (void)state->close();  // What went wrong is told already.
    return status;
  }
  restored.tokens = state->tokens.front();
  if (restored.damaged) {
    // A store for reading keeps it; so does one whose drive takes no more.
    (void)store.drop_damaged(std::move(hit), restored.tokens / store.tokens_per_run());
  }
  restored.sequence.reset(new Sequence(std::move(state)));
  return restored;
}

Status Sequence::State::restore(PrefixStore& store, const PrefixHit& hit,
                                RestoredSequence& restored) {
  const std::uint32_t per_run = store.tokens_per_run();
  std::uint32_t runs = 0;
  for (const StoredItem& item : hit.runs) {
    if (item.extents() != streams.size()) break;
    KVTIER_ASSIGN_OR_RETURN(const bool whole, restore_run(store, item, runs));
    if (!whole) {
      restored.damaged = true;
      break;
    }
    ++runs;
  }
  tokens.assign(tokens.size(), runs * per_run);
  for (Stream& stream : streams) {
    stream.tokens = runs * per_run;
    // The window is held again from the next step on.
    stream.held_begin = stream.tokens / runtime.layout.tokens_per_block();
    for (const ExtentId extent : stream.extents) {
      const BlockIndex first = runtime.table->row(extent).owner.first_block;
      if (runtime.layout.first_token(first) >= runtime.options.sinks) break;
      KVTIER_RETURN_IF_ERROR(bring_intact(extent));
      KVTIER_RETURN_IF_ERROR(bring_sinks(extent, runtime.layout.blocks_per_extent()));
    }
  }
  if (runs == 0) return {};
  restored.selectors_rebuilt = runs < hit.runs.size() || !load_selectors(store, hit);
  if (!restored.selectors_rebuilt) return {};
  for (std::uint32_t layer = 0; layer < selectors.size(); ++layer) {
    KVTIER_ASSIGN_OR_RETURN(selectors[layer],
                            runtime.options.selector(runtime.selector_shape, LayerIndex{layer}));
    KVTIER_RETURN_IF_ERROR(show_again(LayerIndex{layer}, 0));
  }
  return {};
}

// Brings one run into frames, a few layers at a time. False, and nothing of the run is left, when
// the store cannot give all of it intact.
Result<bool> Sequence::State::restore_run(PrefixStore& store, const StoredItem& item,
                                          std::uint32_t run) {
  const std::size_t batch_max = std::max<std::size_t>(
      runtime.layout.head_groups(),
      std::min<std::size_t>(kRestoredAtOnce, runtime.table->frames_available() / 2));
  std::vector<StoreExtentRead> reads;
  for (std::size_t first = 0; first < streams.size(); first += batch_max) {
    const auto batch =
        std::span(streams).subspan(first, std::min(batch_max, streams.size() - first));
    KVTIER_RETURN_IF_ERROR(plan_reads(item, run, batch, reads));
    store.read(reads);
    bool whole = true;
    for (const StoreExtentRead& read : reads) whole = whole && read.status.ok();
    Status adopted;
    for (Stream& stream : batch) {
      if (!whole || !adopted.ok()) break;
      adopted = runtime.host->adopt(stream.extents.back());
      for (std::uint32_t place = 0; place < runtime.layout.blocks_per_extent(); ++place) {
        const BlockId block = runtime.layout.block_id(stream.extents.back(), place);
        stream.generation = std::max(stream.generation, runtime.table->generation(block));
      }
    }
    if (adopted.code() == StatusCode::kCorrupt) whole = false;
    if (whole && !adopted.ok()) return adopted;
    if (whole) continue;
    for (Stream& stream : streams) release_extents(stream, run);
    return false;
  }
  return true;
}

Status Sequence::State::plan_reads(const StoredItem& item, std::uint32_t run,
                                   std::span<Stream> batch, std::vector<StoreExtentRead>& reads) {
  reads.clear();
  for (Stream& stream : batch) {
    KVTIER_ASSIGN_OR_RETURN(const ExtentId extent,
                            runtime.host->create({.sequence = id,
                                                  .origin = origin,
                                                  .layer = stream.layer,
                                                  .head_group = stream.head_group,
                                                  .first_block = BlockIndex{
                                                      run * runtime.layout.blocks_per_extent()}}));
    stream.extents.push_back(extent);
    reads.push_back({.item = &item,
                     .key = {.layer = stream.layer, .head_group = stream.head_group, .index = 0},
                     .target = runtime.table->frame_bytes(runtime.table->row(extent).frame)});
  }
  return {};
}

// False when a selector's state is not there, or of another selector or version: then it sees every
// key again.
bool Sequence::State::load_selectors(PrefixStore& store, const PrefixHit& hit) {
  const auto last = static_cast<std::uint32_t>(hit.runs.size() - 1);
  if (auto found = store.read_metadata(hit, last, kMarksTag); found.ok()) {
    if (found->size() != tokens.front()) return false;
    marks.resize(runtime.options.tokens_max);
    std::memcpy(marks.data(), found->data(), found->size());
  }
  for (std::uint32_t layer = 0; layer < selectors.size(); ++layer) {
    const auto blob = store.read_metadata(hit, last, kFirstSelectorTag + layer);
    if (!blob.ok() || blob->size() < kFloorBytes) return false;
    const auto floor = load_little_endian<std::uint32_t>(blob->data());
    if (floor > tokens[layer]) return false;
    auto selector =
        restore_selector(std::span(*blob).subspan(kFloorBytes), runtime.options.selector,
                         runtime.selector_shape, LayerIndex{layer});
    if (!selector.ok()) return false;
    selectors[layer] = std::move(*selector);
    if (!show_again(LayerIndex{layer}, floor).ok()) return false;
  }
  return true;
}

// Shows the layer's selector the tokens from `first` on, out of their extents.
Status Sequence::State::show_again(LayerIndex layer, std::uint32_t first) {
  const BlockLayout& layout = runtime.layout;
  const std::uint32_t per_extent = layout.tokens_per_extent();
  const std::size_t rows = std::size_t{per_extent} * layout.kv_heads();
  std::vector<std::byte> keys(rows * layout.key_row_bytes());
  std::vector<std::byte> values(rows * layout.value_row_bytes());
  for (std::uint32_t begin = first; begin < tokens[layer.value];) {
    const std::uint32_t run = begin / per_extent;
    for (const Stream& stream : streams_of(layer)) {
      KVTIER_RETURN_IF_ERROR(bring_intact(stream.extents[run]));
      copy_rows(stream.extents[run], stream.head_group, keys, values);
    }
    const std::uint32_t skipped = begin % per_extent;
    const std::size_t token_keys = layout.kv_heads() * layout.key_row_bytes();
    const std::size_t token_values = layout.kv_heads() * layout.value_row_bytes();
    selectors[layer.value]->append({.first_position = begin,
                                    .tokens = per_extent - skipped,
                                    .keys = keys.data() + skipped * token_keys,
                                    .key_token_stride = token_keys,
                                    .key_head_stride = layout.key_row_bytes(),
                                    .values = values.data() + skipped * token_values,
                                    .value_token_stride = token_values,
                                    .value_head_stride = layout.value_row_bytes(),
                                    .marks = marks.empty() ? nullptr : marks.data() + begin});
    begin += per_extent - skipped;
  }
  return {};
}

// The rows of one complete extent into [tokens, KV heads, dim] of a run.
void Sequence::State::copy_rows(ExtentId extent, HeadGroup head_group, std::span<std::byte> keys,
                                std::span<std::byte> values) const {
  const BlockLayout& layout = runtime.layout;
  for (std::uint32_t t = 0; t < layout.tokens_per_extent(); ++t) {
    const std::uint32_t place = t / layout.tokens_per_block();
    const std::uint32_t token = t % layout.tokens_per_block();
    const std::byte* block = runtime.table->block_bytes(layout.block_id(extent, place)).data();
    for (std::uint32_t head = 0; head < layout.heads_per_block(); ++head) {
      const std::size_t row =
          std::size_t{t} * layout.kv_heads() + head_group.value * layout.heads_per_block() + head;
      std::memcpy(keys.data() + row * layout.key_row_bytes(),
                  block + layout.key_offset(head, token), layout.key_row_bytes());
      std::memcpy(values.data() + row * layout.value_row_bytes(),
                  block + layout.value_offset(head, token), layout.value_row_bytes());
    }
  }
}

}  // namespace kvtier
