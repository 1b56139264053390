#pragma once

#include "kernels/merge_states.h"
#include "runtime/prefix_store.h"
#include "runtime/rest_choice.h"
#include "runtime/runtime_state.h"
#include "selectors/selector.h"

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace kvtier {

/// The blocks of one layer and head group of a sequence.
struct Stream {
  LayerIndex layer;
  HeadGroup head_group;
  std::vector<ExtentId> extents;
  std::uint32_t tokens = 0;
  /// Of blocks that seal from now on; grows when a truncation cuts into sealed ones.
  Generation generation{0};
  /// Slot of the open tail block; none between a block's seal and the next token.
  SlotId tail;
  /// Blocks [held_begin, end) are on the device and held once each: the local window and the tail.
  /// So are the sinks' blocks, from their seal on.
  std::uint32_t held_begin = 0;
  /// Blocks that the selector wants at every step, held once more.
  std::vector<BlockIndex> outliers;
  /// What the last step ranked outside sinks and window, and how many of it it attended: a forecast
  /// of the next.
  std::vector<BlockId> ranked;
  std::uint32_t chosen = 0;
};

/// A block to be attended in a step.
struct WorkItem {
  BlockId block;
  HeadGroup head_group;
  BlockIndex index;
  std::uint32_t first_token = 0;
  std::uint32_t tokens = 0;
  bool held = false;  ///< Its slot is, by the wave under way.
  /// Its keys may be those that the selector keeps: its values are all that must be there.
  bool kept_keys = false;
  std::uint32_t range = 0;  ///< Of a step: its place in `attended`.
};

/// What a sequence owns. Private to runtime/; the behaviour is in sequence.cc (tokens come),
/// truncate.cc (they are taken back), fork.cc (two sequences share them), saved_prefix.cc (they
/// outlive the process), step.cc (a step is
/// planned and concluded), predict.cc (what comes next is guessed), waves.cc (its blocks are
/// fetched and attended), kept_keys.cc (keys that the selector keeps stand for those of blocks) and
/// rest.cc (what is not attended is estimated).
struct Sequence::State {
  Runtime::State& runtime;
  SequenceId id;
  Origin origin;
  std::vector<Stream> streams;  ///< [layers][head groups]
  std::vector<std::unique_ptr<Selector>> selectors;
  std::vector<std::uint32_t> tokens;     ///< Per layer.
  std::vector<std::uint8_t> marks;       ///< By position; empty while nobody has given any.
  std::vector<float> demands;            ///< What each layer's selector last answered to `demand`.
  std::vector<float> shared_demands;     ///< The same as the first layer's step found them.
  std::vector<RestChoice> rest_choices;  ///< Per layer.
  bool closed = false;

  /// The queries that are answered together: all of a step, or one with a selection of its own.
  struct Pass {
    std::uint32_t first_query = 0;
    std::uint32_t first_position = 0;
    std::uint32_t end = 0;        ///< Tokens that its last query sees.
    std::size_t first_range = 0;  ///< Of `attended`.
  };
  Pass pass;
  std::uint32_t queries_of_step = 0;
  /// What the waves under way are for. Only of a step hits are counted, and does eviction learn.
  enum class Purpose : unsigned char {
    kStep,
    kMeasure,  ///< Over what was not chosen, to compare with.
    kExact,    ///< Over everything, streamed.
  };
  Purpose purpose = Purpose::kStep;
  struct Estimates {
    std::uint32_t rows = 0;
    bool measured = false;
  };
  Estimates report_estimates;

  // Scratch of a step; grown at most to the longest sequence.
  std::vector<GroupSelection> selections;
  std::vector<WorkItem> work;
  std::vector<AttendedRange> attended;
  std::vector<BlockFailure> failures;
  std::vector<BlockRange> ranges;
  std::vector<AttentionTask> tasks;
  std::vector<HeadGroup> task_groups;
  std::vector<float> partial_out;
  std::vector<float> partial_lse;
  std::vector<std::uint32_t> query_positions;
  std::vector<BlockId> wanted;
  std::vector<WorkItem> work_missing;
  std::vector<WantedKeys> wanted_keys;
  std::vector<std::byte> kept_keys;  ///< [wanted keys of a wave, keys of a block]
  std::vector<ResolvedRange> resolved_ranges;
  std::vector<std::uint32_t> resolved_begins;
  // Of a step whose selector estimates the rest; see rest.cc.
  std::vector<float> rest_out;
  std::vector<float> rest_lse;
  std::vector<float> exact_out;
  std::vector<float> exact_lse;
  std::vector<float> attended_out;
  std::vector<float> attended_lse;
  std::vector<float> stands_for_log;  ///< By head group.
  std::vector<double> error_without;
  std::vector<double> error_with;

  // What a truncation holds on to while it is under way.
  std::vector<ExtentId> cut_frames;
  std::vector<SlotId> cut_slots;
  /// Copies that take the place of extents that it cuts and may not change.
  struct CutCopy {
    const Stream* stream;
    ExtentId extent;
  };
  std::vector<CutCopy> cut_copies;
  /// Per layer: the last tokens before the cut, for a selector that was cut further back.
  struct SeenAgain {
    std::uint32_t tokens = 0;
    std::vector<std::byte> keys;    ///< [tokens, KV heads, head_dim]
    std::vector<std::byte> values;  ///< [tokens, KV heads, value_dim]
  };
  std::vector<SeenAgain> seen_again;

  static Result<std::unique_ptr<State>> make(Runtime::State& runtime, SequenceId id, Origin origin);
  /// Without selectors.
  static std::unique_ptr<State> make_empty(Runtime::State& runtime, SequenceId id, Origin origin);
  State(Runtime::State& r, SequenceId i, Origin o) : runtime(r), id(i), origin(o) {}

  std::span<Stream> streams_of(LayerIndex layer) {
    const std::uint32_t groups = runtime.layout.head_groups();
    return std::span(streams).subspan(std::size_t{layer.value} * groups, groups);
  }
  BlockId block_id(const Stream& stream, BlockIndex index) const {
    const std::uint32_t per_extent = runtime.layout.blocks_per_extent();
    return runtime.layout.block_id(stream.extents[index.value / per_extent],
                                   index.value % per_extent);
  }

  // sequence.cc
  Status check_call(LayerIndex layer) const;
  Status close();
  Status append_chunk(LayerIndex layer, const TokenRows& rows, std::uint32_t first,
                      std::uint32_t count);
  Status ensure_tail(Stream& stream);
  void write_rows(Stream& stream, const TokenRows& rows, std::uint32_t first, std::uint32_t count);
  Status seal_tail(Stream& stream);
  void slide_window(Stream& stream);

  // fork.cc
  static Result<std::unique_ptr<State>> fork(const State& parent, std::uint32_t tokens,
                                             Origin origin);
  Status fork_stream(const Stream& source, Stream& target);
  Status copy_open_extent(const Stream& source, Stream& target);
  bool must_copy(ExtentId extent) const;
  Status copy_cut_extent(const Stream& stream, BlockIndex index, bool cuts_block);
  Status bring_sinks(ExtentId copy, std::uint32_t blocks);

  // saved_prefix.cc
  /// Extents that a restore has under way at once, at most.
  static constexpr std::size_t kRestoredAtOnce = 64;
  Result<std::uint32_t> save(PrefixStore& store, std::span<const std::uint32_t> token_ids,
                             double value);
  Status save_extent(PrefixStore::Saving& saving, std::uint32_t run, const Stream& stream);
  Status bring_intact(ExtentId extent);
  std::vector<std::byte> save_selector_at(LayerIndex layer, std::uint32_t saved) const;
  Status restore(PrefixStore& store, const PrefixHit& hit, RestoredSequence& restored);
  Result<bool> restore_run(PrefixStore& store, const StoredItem& item, std::uint32_t run);
  Status plan_reads(const StoredItem& item, std::uint32_t run, std::span<Stream> batch,
                    std::vector<StoreExtentRead>& reads);
  bool load_selectors(PrefixStore& store, const PrefixHit& hit);
  Status show_again(LayerIndex layer, std::uint32_t first);
  void copy_rows(ExtentId extent, HeadGroup head_group, std::span<std::byte> keys,
                 std::span<std::byte> values) const;

  // truncate.cc
  Status truncate(std::uint32_t tokens_left);
  Status prepare_cut(Stream& stream, std::uint32_t tokens_left);
  Status prepare_block(BlockId block);
  Status prepare_extent(ExtentId extent, std::uint32_t first_cut);
  void remember_marks(const TokenRows& rows, std::uint32_t first, std::uint32_t count);
  void plan_seen_again(std::uint32_t tokens_left);
  void copy_seen_again(const Stream& stream, BlockIndex index, BlockId block,
                       std::uint32_t tokens_left);
  void cut_selector(LayerIndex layer, std::uint32_t tokens_left);
  void cut(Stream& stream, std::uint32_t tokens_left);
  void end_cut();
  Status bring_home(ExtentId extent, std::uint32_t first_cut);
  Status bring_up(BlockId block);
  bool is_tail(const Stream& stream, BlockIndex index) const;
  bool is_held_by(const Stream& stream, BlockIndex index) const;
  void use_copy(Stream& stream, BlockIndex first, ExtentId copy);
  void release_extents(Stream& stream, std::size_t extents_left);
  void drop_outliers(Stream& stream, BlockIndex first);
  void release_blocks(Stream& stream, std::uint32_t first_block);

  // step.cc
  std::span<const float> layer_demands() const {
    return runtime.options.share_budget ? std::span<const float>(shared_demands)
                                        : std::span<const float>();
  }
  Status check_step(const StepRequest& request);
  StepRequest one_query_of(const StepRequest& request, std::uint32_t query) const;
  Status plan_queries(const StepRequest& request, std::uint32_t first_query, StepTiming& timing,
                      SelectRequest& question);
  Status step_queries(const StepRequest& request, std::uint32_t first_query, StepTiming& timing);
  Status refuse(const StepRequest& request, StepReport* report, const Status& status);
  void plan_work(const StepRequest& request);
  void add_tokens(const Stream& stream, std::uint32_t begin, std::uint32_t end,
                  bool kept_keys = false);
  void append_group_work(Stream& stream, const GroupSelection& selection,
                         std::uint32_t window_begin);
  void hold_after_step(LayerIndex layer);
  void fill_report(const StepRequest& request, const StepTiming& timing, StepReport* report) const;

  // predict.cc
  void keep_forecast(LayerIndex layer);
  Duration predict(LayerIndex layer);

  // exact.cc
  Status check_exact(const ExactRequest& request) const;

  // resolve.cc
  Status hold_work(StepTiming& timing);
  std::uint32_t count_slots_wanted() const;
  void fill_resolved(ResolvedBlocks* resolved);

  // rest.cc
  bool may_estimate(LayerIndex layer) const;
  void grow_rest(std::size_t rows);
  void reserve_sample(std::size_t rows);
  Status add_rest(const StepRequest& request, const SelectRequest& question);
  bool attends_everything() const;
  StatesView attended_states();
  void measure_rest(const StepRequest& request);
  void plan_complement(const StepRequest& request);
  float thin_out(std::size_t first, std::uint32_t turn);

  // kept_keys.cc
  bool is_ready(const WorkItem& item) const;
  bool attends_kept_keys(const WorkItem& item) const;
  void want_blocks_one_way(std::size_t first);
  void want_whole_blocks();
  void read_kept_keys(LayerIndex layer, std::uint32_t begin, std::uint32_t end);

  // waves.cc
  Status run_waves(const StepRequest& request, StepTiming& timing);
  Admission admission() const;
  std::uint32_t wave_slots_max() const;
  std::uint32_t stream_reads_max() const;
  Status no_room_for(std::uint32_t begin, std::uint32_t end) const;
  std::uint32_t put_hits_first();
  std::uint32_t plan_wave(std::uint32_t begin, std::uint32_t hits, std::uint32_t slots_max,
                          WaveFetch& fetch);
  std::uint32_t piece_end(std::uint32_t begin, std::uint32_t hits) const;
  bool piece_fits(std::uint32_t begin, std::uint32_t end, const WaveFetch& fetch) const;
  void take_piece(std::uint32_t begin, std::uint32_t end, WaveFetch& fetch);
  Status attend_wave(const StepRequest& request, std::uint32_t begin, std::uint32_t end,
                     StepTiming& timing);
  Status attend_tasks(const StepRequest& request, std::size_t first, std::size_t count,
                      StepTiming& timing);
  void finish_outputs(const StepRequest& request);
  void fail_outputs(const StepRequest& request);
  void merge_task(const StepRequest& request, const AttentionTask& task, HeadGroup group);
  void release_wave(std::uint32_t begin, std::uint32_t end);
};

}  // namespace kvtier
