#include "runtime/runtime.h"

#include "memory/check.h"
#include "runtime/runtime_state.h"
#include "runtime/sequence_state.h"

#include <algorithm>
#include <utility>

namespace kvtier {
namespace {

constexpr std::uint64_t ceil_divide(std::uint64_t a, std::uint64_t b) { return (a + b - 1) / b; }

Status check_options(const RuntimeOptions& options) {
  if (options.layers == 0) return invalid_argument("layers is 0, expected at least 1");
  if (options.tokens_max == 0) return invalid_argument("tokens_max is 0, expected at least 1");
  if (options.sequences_max == 0)
    return invalid_argument("sequences_max is 0, expected at least 1");
  if (options.query_heads == 0 || options.query_heads % options.block.kv_heads != 0) {
    return invalid_argument(fmt::format("query_heads is {}, expected a multiple of kv_heads {}",
                                        options.query_heads, options.block.kv_heads));
  }
  if (options.query_heads / options.block.kv_heads > 16) {
    return invalid_argument(fmt::format("{} query heads per KV head, expected at most 16",
                                        options.query_heads / options.block.kv_heads));
  }
  const std::size_t logits = options.sink_logits.size();
  if (logits != 0 && logits != std::size_t{options.layers} * options.query_heads) {
    return invalid_argument(fmt::format("sink_logits has {} entries, expected {} x {}", logits,
                                        options.layers, options.query_heads));
  }
  return {};
}

// Slots that one stream (sequence, layer, head group) holds on to whatever happens: sinks, a window
// that starts anywhere in a block, and the open tail.
std::uint64_t held_slots_per_stream(const RuntimeOptions& options, const BlockLayout& layout) {
  const std::uint64_t tokens = layout.tokens_per_block();
  const std::uint64_t held =
      ceil_divide(options.sinks, tokens) + ceil_divide(options.window, tokens) + 2;
  return std::min<std::uint64_t>(held, ceil_divide(options.tokens_max, tokens));
}

// Sizes of which the sums below could overflow are beyond every machine.
Status check_sizes(const RuntimeOptions& options, const BlockLayout& layout) {
  constexpr double kBytesMax = 0x1p60;
  const double streams = double{1} * options.sequences_max * options.layers * layout.head_groups();
  const double tokens = double{1} * std::max(options.tokens_max, options.sinks);
  const double extents = tokens / layout.tokens_per_extent() + 4;
  if (streams * extents * static_cast<double>(layout.extent_bytes()) <= kBytesMax) return {};
  return invalid_argument(fmt::format(
      "layers is {}, sequences_max {}, tokens_max {} and sinks {}, which together are more than "
      "2^60 bytes",
      options.layers, options.sequences_max, options.tokens_max, options.sinks));
}

std::uint64_t count_streams(const RuntimeOptions& options, const BlockLayout& layout) {
  return std::uint64_t{options.sequences_max} * options.layers * layout.head_groups();
}

// Frames that hold nothing but what can be read again: two extents that a step reads at a time, or,
// where a chunk must be attended as a whole, as many as it has blocks; and the one in each stream
// that a truncation cuts.
std::uint64_t reading_frames(const RuntimeOptions& options, const BlockLayout& layout) {
  return count_streams(options, layout) +
         (options.deterministic ? std::max(2u, blocks_per_chunk(layout)) : 2);
}

RuntimeNeeds compute_needs(const RuntimeOptions& options, const BlockLayout& layout) {
  const std::uint64_t streams = count_streams(options, layout);
  RuntimeNeeds needs;
  // A truncation brings one block per stream beside those that are held, and, where it cuts into
  // what a fork shares, the sinks' once more, of one sequence.
  const std::uint64_t sinks_again =
      options.sequences_max == 1
          ? 0
          : streams / options.sequences_max * ceil_divide(options.sinks, layout.tokens_per_block());
  needs.device_bytes = (streams * (held_slots_per_stream(options, layout) + 1) + sinks_again +
                        blocks_per_chunk(layout)) *
                       layout.block_bytes();
  needs.host_reserve_bytes = reading_frames(options, layout) * layout.extent_bytes();
  // And one extent being filled per stream.
  needs.host_bytes = streams * layout.extent_bytes() + needs.host_reserve_bytes;
  needs.extent_bytes_total =
      streams * ceil_divide(options.tokens_max, layout.tokens_per_extent()) * layout.extent_bytes();
  return needs;
}

Status check_capacities(const RuntimeOptions& options, const BlockLayout& layout) {
  KVTIER_RETURN_IF_ERROR(check_sizes(options, layout));
  const RuntimeNeeds needs = compute_needs(options, layout);
  if (options.device_capacity_bytes < needs.device_bytes) {
    return invalid_argument(fmt::format(
        "device capacity is {} bytes, but one step needs {} (sinks, window and tail of every layer "
        "and head group, and one chunk of selected blocks)",
        options.device_capacity_bytes, needs.device_bytes));
  }
  if (options.host_capacity_bytes < needs.host_bytes) {
    return invalid_argument(
        fmt::format("host capacity is {} bytes, but {} are needed (an extent of {} bytes being "
                    "filled for every "
                    "layer and head group, and {} to read into)",
                    options.host_capacity_bytes, needs.host_bytes, layout.extent_bytes(),
                    reading_frames(options, layout)));
  }
  return {};
}

SelectorShape make_selector_shape(const RuntimeOptions& options) {
  return {.dtype = options.block.dtype,
          .kv_heads = options.block.kv_heads,
          .heads_per_group = options.block.kv_heads_per_block,
          .queries_per_kv_head = options.query_heads / options.block.kv_heads,
          .head_dim = options.block.head_dim,
          .value_dim = options.block.value_dim,
          .tokens_per_block = options.block.tokens_per_block,
          .sinks = options.sinks,
          .window = options.window,
          .softmax = options.softmax,
          .rope = options.rope,
          .reduction = options.reduction,
          .seed = options.seed,
          .layers = options.layers,
          .tokens_max = options.tokens_max};
}

// Ends an engine that has no runtime yet, also when what it is for cannot be made because memory
// has run out: an engine checks that it was closed.
class EngineEnd {
 public:
  explicit EngineEnd(TransferEngine& engine) : engine_(&engine) {}
  ~EngineEnd() {
    if (engine_ != nullptr) (void)engine_->close();  // Nothing was submitted.
  }
  EngineEnd(const EngineEnd&) = delete;
  EngineEnd& operator=(const EngineEnd&) = delete;
  void is_not_yet() { engine_ = nullptr; }

 private:
  TransferEngine* engine_;
};

}  // namespace

// --- Opening.

Result<RuntimeNeeds> Runtime::needs(const RuntimeOptions& options) {
  KVTIER_RETURN_IF_ERROR(check_options(options));
  KVTIER_ASSIGN_OR_RETURN(const BlockLayout layout, BlockLayout::make(options.block));
  KVTIER_RETURN_IF_ERROR(check_sizes(options, layout));
  return compute_needs(options, layout);
}

Result<std::unique_ptr<Runtime>> Runtime::open(const RuntimeOptions& given,
                                               const Environment& environment) {
  RuntimeOptions options = given;
  if (!options.selector) {
    KVTIER_ASSIGN_OR_RETURN(options.selector, make_selector_factory(kDefaultSelector));
  }
  KVTIER_CHECK(environment.clock && environment.device && environment.link,
               "a runtime needs a clock, a device and a link");
  KVTIER_RETURN_IF_ERROR(check_options(options));
  KVTIER_ASSIGN_OR_RETURN(BlockLayout layout, BlockLayout::make(options.block));
  KVTIER_RETURN_IF_ERROR(check_capacities(options, layout));
  const std::uint64_t places = options.disk_capacity_bytes / layout.extent_bytes();
  if (places > 0 && (environment.disk == nullptr ||
                     environment.disk->size_bytes() < places * layout.extent_bytes())) {
    return invalid_argument(
        fmt::format("disk capacity is {} bytes, but the file has {}", options.disk_capacity_bytes,
                    environment.disk == nullptr ? 0 : environment.disk->size_bytes()));
  }
  const std::size_t slab_bytes =
      options.device_capacity_bytes / layout.block_bytes() * layout.block_bytes();
  const std::size_t frame_bytes =
      options.host_capacity_bytes / layout.extent_bytes() * layout.extent_bytes();
  KVTIER_ASSIGN_OR_RETURN(Region slab, environment.device->allocate_slab(slab_bytes));
  KVTIER_ASSIGN_OR_RETURN(Region frames, environment.device->allocate_frames(frame_bytes));

  if (places > 0) {
    const std::span<std::byte> range = frames.bytes();
    KVTIER_RETURN_IF_ERROR(environment.disk->register_buffers({&range, 1}));
  }
  auto state = std::make_unique<State>(State{.options = options,
                                             .environment = environment,
                                             .layout = layout,
                                             .selector_shape = make_selector_shape(options),
                                             .slab = std::move(slab),
                                             .frames = std::move(frames),
                                             .engine = nullptr});
  TransferEngine::Options engine_options;
  engine_options.max_transfers =
      2 * static_cast<std::uint32_t>(frame_bytes / layout.extent_bytes()) + 64;
  engine_options.threads = options.transfer_threads;
  engine_options.timeline = environment.timeline;
  KVTIER_ASSIGN_OR_RETURN(
      state->engine,
      TransferEngine::open(engine_options, *environment.clock,
                           places > 0 ? environment.disk : nullptr, environment.link));
  EngineEnd end(*state->engine);
  KVTIER_RETURN_IF_ERROR(state->make_parts());
  std::unique_ptr<Runtime> runtime(new Runtime(std::move(state)));
  end.is_not_yet();
  return runtime;
}

// What moves blocks between the memory that is there and the engine.
Status Runtime::State::make_parts() {
  const RuntimeNeeds needs = compute_needs(options, layout);
  const auto slots = static_cast<std::uint32_t>(slab.bytes().size() / layout.block_bytes());
  const auto frame_count =
      static_cast<std::uint32_t>(frames.bytes().size() / layout.extent_bytes());
  const std::uint64_t places = options.disk_capacity_bytes / layout.extent_bytes();
  KVTIER_ASSIGN_OR_RETURN(auto slot_policy, make_eviction_policy(options.eviction, slots));
  KVTIER_ASSIGN_OR_RETURN(auto frame_policy, make_eviction_policy(options.eviction, frame_count));
  table = std::make_unique<BlockTable>(layout, frames.bytes(), static_cast<std::uint32_t>(places),
                                       std::move(frame_policy));
  // Only then is a copy to the device checked.
  if (options.verify == VerifyMode::kAll) table->keep_values_checksums();
  const std::uint64_t blocks = (frame_count + places) * layout.blocks_per_extent();
  map = std::make_unique<DeviceMap>(layout, slab.bytes(), blocks, std::move(slot_policy));
  host = std::make_unique<HostTier>(HostTier::Parts{
      &layout, table.get(), map.get(), engine.get(), environment.clock, options.verify, &counters,
      places > 0 ? static_cast<std::uint32_t>(reading_frames(options, layout)) : 0});
  const std::uint64_t spoken_for = needs.device_bytes / layout.block_bytes();
  outliers_held_max =
      static_cast<std::uint32_t>(slots - std::min<std::uint64_t>(slots, spoken_for));
  device_guesses = std::make_unique<DeviceGuesses>(
      DeviceGuesses::Parts{&layout, table.get(), map.get(), host.get(), engine.get(),
                           options.verify, &counters},
      options.look_ahead_device_bytes);
  look_ahead = std::make_unique<LookAhead>(
      LookAhead::Parts{&layout, table.get(), map.get(), host.get(), device_guesses.get(),
                       &counters},
      LookAhead::Limits{.bytes_per_step = places > 0 ? options.look_ahead_bytes : 0,
                        .steps_per_token = options.layers});
  for (auto& wave : waves) {
    wave = std::make_unique<WaveFetch>(WaveFetch::Parts{&layout, table.get(), map.get(), host.get(),
                                                        engine.get(), options.verify, &counters},
                                       slots);
  }
  return {};
}

Runtime::Runtime(std::unique_ptr<State> state) : state_(std::move(state)) {}

Runtime::~Runtime() { KVTIER_CHECK(state_->closed, "a runtime is destroyed that was not closed"); }

const BlockLayout& Runtime::layout() const { return state_->layout; }

// --- Living.

Status Runtime::State::check_room() const {
  if (closed) return invalid_argument("the runtime is closed");
  if (sequences_open < options.sequences_max) return {};
  return no_space(
      fmt::format("{} sequences are open, as many as sequences_max allows", sequences_open));
}

SequenceId Runtime::State::add_sequence() {
  ++sequences_open;
  return SequenceId{sequences_made++};
}

Result<std::unique_ptr<Sequence>> Runtime::create_sequence(Origin origin) {
  State& s = *state_;
  s.begin_call();
  KVTIER_RETURN_IF_ERROR(s.check_room());
  KVTIER_ASSIGN_OR_RETURN(auto state,
                          Sequence::State::make(s, SequenceId{s.sequences_made}, origin));
  (void)s.add_sequence();
  return std::unique_ptr<Sequence>(new Sequence(std::move(state)));
}

// What became of guesses on the device is the map's to say.
PrefetchStats Runtime::State::prefetch_stats() const {
  PrefetchStats stats = counters.prefetch;
  for (int i = 0; i < kGuessSourceCount; ++i) {
    const GuessEnds& ends = map->guess_ends(static_cast<GuessSource>(i));
    GuessSourceStats& source = stats.sources[static_cast<std::size_t>(i)];
    source.to_device.useful_bytes = ends.used * layout.block_bytes();
    source.to_device.wasted_bytes = ends.unused * layout.block_bytes();
    stats.to_device += source.to_device;
  }
  return stats;
}

RuntimeStats Runtime::stats() const {
  const State& s = *state_;
  const std::uint64_t block = s.layout.block_bytes();
  const std::uint64_t extent = s.layout.extent_bytes();
  RuntimeStats stats;
  stats.tiers[static_cast<int>(Tier::kDevice)] = {.capacity_bytes = s.options.device_capacity_bytes,
                                                  .used_bytes = s.map->slots_used() * block,
                                                  .peak_bytes = s.map->slots_peak() * block,
                                                  .hits = s.hits[0],
                                                  .held_hits = s.held_hits,
                                                  .evictions = s.map->evictions()};
  stats.tiers[static_cast<int>(Tier::kHost)] = {.capacity_bytes = s.options.host_capacity_bytes,
                                                .used_bytes = s.table->frames_used() * extent,
                                                .peak_bytes = s.table->frames_peak() * extent,
                                                .hits = s.hits[1],
                                                .held_hits = 0,
                                                .evictions = s.counters.host_evictions};
  stats.tiers[static_cast<int>(Tier::kDisk)] = {.capacity_bytes = s.options.disk_capacity_bytes,
                                                .used_bytes = s.table->places_used() * extent,
                                                .peak_bytes = s.table->places_peak() * extent,
                                                .hits = s.hits[2],
                                                .held_hits = 0,
                                                .evictions = 0};
  for (int route = 0; route < kRouteCount; ++route) {
    stats.routes[static_cast<std::size_t>(route)] = s.engine->stats(static_cast<Route>(route));
  }
  stats.verification = s.counters.verification;
  stats.prefetch = s.prefetch_stats();
  stats.metadata_bytes = s.metadata_bytes_peak;
  stats.steps = s.steps;
  stats.waves = s.wave_count;
  stats.steps_measured = s.steps_measured;
  stats.attends = s.attends;
  stats.disk_reads_repeated = s.counters.disk_reads_repeated;
  stats.disk_writes_failed = s.counters.disk_writes_failed;
  stats.slab = s.slab.stats();
  stats.frames = s.frames.stats();
  return stats;
}

Status Runtime::close() {
  State& s = *state_;
  s.begin_call();
  if (s.closed) return invalid_argument("the runtime is closed already");
  if (s.sequences_open > 0) {
    return busy(fmt::format("{} sequences are still open", s.sequences_open));
  }
  s.closed = true;
  const Status drained = s.engine->close();
  if (!drained.ok()) return drained;
  return s.host->write_failure();
}

}  // namespace kvtier
