#pragma once

#include "kernels/checksum.h"
#include "kernels/code_runs.h"
#include "kernels/partial_attention.h"
#include "kernels/quantised_keys.h"
#include "memory/block_layout.h"
#include "memory/dtype.h"
#include "runtime/device_step.h"
#include "tests/kernels/gpu_fixture.h"

#include <cmath>
#include <numeric>
#include <vector>

namespace kvtier {

/// A small model's layer: every block of every list in page-locked frames, near ones held in slots,
/// codes of the far ones made on the GPU, a cache of `cache_slots` for the rest.
class DeviceStepCase {
 public:
  DeviceStepCase(const Gpu& gpu, StreamRef stream, const DeviceStepShape& shape,
                 std::uint32_t cache_slots, std::uint32_t seed)
      : gpu_(gpu), stream_(stream), shape_(shape), cache_slots_(cache_slots), random_(seed) {
    shape_.near_ranges_max = blocks_per_list() - far_blocks() + sink_blocks();
    fill_host();
    fill_tables();
    fill_near();
    code();
  }

  const DeviceStepShape& shape() const { return shape_; }
  const DeviceStepTables& tables() const { return tables_; }
  DeviceStepTables& tables() { return tables_; }
  FetchReport& report() { return *tables_.report; }
  const FailedBlock* failed() const { return tables_.failed; }
  std::uint32_t far_blocks() const { return shape_.runs_max * 64 / shape_.tokens_per_block; }
  std::uint32_t sink_blocks() const { return shape_.sinks / shape_.tokens_per_block; }
  std::span<std::byte> host_block(std::uint32_t list, std::uint32_t block) {
    return host_->bytes().subspan((std::size_t{list} * blocks_per_list() + block) * block_bytes(),
                                  block_bytes());
  }
  void set_frame(std::uint32_t list, std::uint32_t frame) {
    const std::uint32_t one[] = {frame};
    KVTIER_CHECK(frames_->upload(std::as_bytes(std::span(one)), list * 4).ok() && synchronize(),
                 "no upload");
  }
  void new_queries() {
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < query_bytes_.size() / 2; ++i) {
      store_element(query_bytes_.data(), shape_.dtype, i, normal(random_));
    }
    KVTIER_CHECK(queries_->upload(query_bytes_).ok() && synchronize(), "no upload");
  }

  std::vector<float> out() const { return read<float>(out_->data(), out_->size() / 4); }
  std::vector<std::uint32_t> chosen(const DeviceStep& step) const {
    return read<std::uint32_t>(reinterpret_cast<const std::byte*>(step.chosen()),
                               std::size_t{shape_.lists()} * shape_.chosen_max);
  }

  /// Near and chosen blocks attended exactly in float64, the rest estimated from codes and means.
  std::vector<float> reference(const std::vector<std::uint32_t>& chosen, bool estimate) {
    std::vector<float> out(shape_.rows() * shape_.value_dim);
    for (std::uint32_t list = 0; list < shape_.lists(); ++list) {
      const std::uint32_t* first = chosen.data() + std::size_t{list} * shape_.chosen_max;
      std::vector<std::uint32_t> blocks(first, first + shape_.chosen_max);
      while (!blocks.empty() && blocks.back() == 0xFFFFFFFFu) blocks.pop_back();
      reference_of(list, blocks, estimate,
                   out.data() + std::size_t{list} * shape_.queries_per_kv_head * shape_.value_dim);
    }
    return out;
  }

 private:
  std::size_t block_bytes() const { return layout_.block_bytes(); }
  std::uint32_t blocks_per_list() const { return far_blocks() + 64 / shape_.tokens_per_block; }
  std::uint32_t slots() const { return cache_slots_ + shape_.lists() * shape_.near_ranges_max; }
  bool synchronize() const { return gpu_.synchronize(stream_).ok(); }

  DeviceBuffer upload(std::span<const std::byte> bytes) const {
    DeviceBuffer buffer = DeviceBuffer::allocate(gpu_, bytes.size(), stream_).value();
    KVTIER_CHECK(buffer.upload(bytes).ok() && synchronize(), "no upload");
    return buffer;
  }
  template <typename T>
  T* keep(std::optional<DeviceBuffer>& buffer, const std::vector<T>& values) {
    buffer.emplace(upload(std::as_bytes(std::span(values))));
    return buffer->as<T>();
  }
  template <typename T>
  std::vector<T> read(const std::byte* from, std::size_t count) const {
    std::vector<T> values(count);
    KVTIER_CHECK(gpu_.calls().copy(values.data(), from, count * sizeof(T), stream_.get()) == 0 &&
                     synchronize(),
                 "reading back failed");
    return values;
  }
  PinnedRegion pin(std::size_t bytes) const {
    return PinnedRegion::pin(gpu_, Region::allocate({.bytes = bytes}).value()).value();
  }

  void fill_host() {
    layout_ = BlockLayout::make({.dtype = shape_.dtype,
                                 .head_dim = shape_.head_dim,
                                 .value_dim = shape_.value_dim,
                                 .kv_heads = shape_.kv_heads,
                                 .tokens_per_block = shape_.tokens_per_block})
                  .value();
    const std::size_t blocks = std::size_t{shape_.lists()} * blocks_per_list();
    host_.emplace(pin(blocks * block_bytes()));
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < blocks * block_bytes() / 2; ++i) {
      store_element(host_->bytes().data(), shape_.dtype, i, normal(random_));
    }
    query_bytes_.resize(shape_.rows() * shape_.head_dim * 2);
    queries_.emplace(DeviceBuffer::allocate(gpu_, query_bytes_.size(), stream_).value());
    new_queries();
  }

  /// One extent a list: frames are lists' blocks side by side.
  void fill_tables() {
    const std::uint32_t lists = shape_.lists();
    const std::uint32_t blocks = lists * blocks_per_list();
    std::vector<std::uint32_t> extents(lists);
    std::iota(extents.begin(), extents.end(), 0u);
    std::vector<std::uint64_t> seeds;
    std::vector<std::uint64_t> sums;
    for (std::uint32_t b = 0; b < blocks; ++b) {
      seeds.push_back(random_());
      sums.push_back(
          seeded_checksum(host_block(b / blocks_per_list(), b % blocks_per_list()), seeds.back()));
    }
    tables_.host = host_->bytes();
    tables_.places = {.extents = keep(extents_, extents),
                      .extents_max = 1,
                      .blocks_per_extent = blocks_per_list(),
                      .frames = keep(frames_, extents),
                      .generations = keep(generations_, std::vector<std::uint32_t>(lists, 3)),
                      .extent_count = lists,
                      .frame_bytes = blocks_per_list() * block_bytes(),
                      .header_bytes = 0,
                      .block_bytes = block_bytes(),
                      .seeds = keep(seeds_, seeds),
                      .sums = keep(sums_, sums)};
    std::vector<std::uint32_t> marks(slots(), 0);
    std::fill(marks.begin() + cache_slots_, marks.end(), SlotMap::kHeld);
    tables_.map = {keep(entries_, std::vector<MapEntry>(blocks)),
                   keep(residents_, std::vector<std::uint32_t>(slots(), kNoBlock)),
                   keep(marks_, marks),
                   keep(owners_, std::vector<std::uint32_t>(blocks, SlotMap::kNobody)),
                   keep(clock_, std::vector<SlotMap::Clock>(1)),
                   slots(),
                   blocks};
    slab_.emplace(DeviceBuffer::allocate(gpu_, slots() * block_bytes(), stream_).value());
    KVTIER_CHECK(slab_->fill(0xFF).ok(), "no fill");
    tables_.slab_bytes = {slab_->data(), slab_->size()};
    tables_.slab = {.blocks = slab_->data(),
                    .slots = slots(),
                    .block_bytes = block_bytes(),
                    .dtype = shape_.dtype,
                    .head_dim = shape_.head_dim,
                    .value_dim = shape_.value_dim,
                    .tokens_per_block = shape_.tokens_per_block};
    out_.emplace(
        DeviceBuffer::allocate(gpu_, shape_.rows() * shape_.value_dim * 4, stream_).value());
    KVTIER_CHECK(out_->fill(0xFF).ok(), "no fill");
    status_.emplace(pin(64 * 1024));
    tables_.report = reinterpret_cast<FetchReport*>(status_->bytes().data());
    tables_.failed = reinterpret_cast<FailedBlock*>(status_->bytes().data() + 4096);
    tables_.failed_max = 1000;
    tables_.queries = queries_->data();
    tables_.out = out_->data();
    tables_.out_dtype = DType::kF32;
    tables_.run_counts =
        keep(run_counts_, std::vector<std::uint32_t>(shape_.sequences, shape_.runs_max));
  }

  std::vector<std::uint32_t> near_blocks() const {
    std::vector<std::uint32_t> blocks(sink_blocks());
    std::iota(blocks.begin(), blocks.end(), 0u);
    for (std::uint32_t b = far_blocks(); b < blocks_per_list(); ++b) blocks.push_back(b);
    return blocks;
  }

  void fill_near() {
    std::vector<SlotRange> ranges;
    std::vector<std::uint32_t> offsets = {0};
    std::uint32_t slot = cache_slots_;
    for (std::uint32_t list = 0; list < shape_.lists(); ++list) {
      for (const std::uint32_t block : near_blocks()) {
        KVTIER_CHECK(slab_->upload(host_block(list, block), slot * block_bytes()).ok(),
                     "no upload");
        ranges.push_back({slot++, block * shape_.tokens_per_block, 0,
                          static_cast<std::uint16_t>(shape_.tokens_per_block)});
      }
      offsets.push_back(static_cast<std::uint32_t>(ranges.size()));
    }
    tables_.near_ranges = keep(near_ranges_, ranges);
    tables_.near_offsets = keep(near_offsets_, offsets);
  }

  void code() {
    const std::uint32_t lists = shape_.lists();
    const DeviceCodes codes{shape_.head_dim, shape_.dtype};
    const std::size_t runs = std::size_t{lists} * shape_.runs_max;
    const DeviceBuffer blocks = upload(host_->bytes());
    std::vector<CodeRunJob> jobs;
    std::vector<std::uint32_t> slots;
    for (std::uint32_t list = 0; list < lists; ++list) {
      for (std::uint32_t run = 0; run < shape_.runs_max; ++run) jobs.push_back({list, run});
      for (std::uint32_t b = 0; b < far_blocks(); ++b)
        slots.push_back(list * blocks_per_list() + b);
    }
    std::optional<DeviceBuffer> device_jobs;
    std::optional<DeviceBuffer> device_slots;
    codes_.emplace(DeviceBuffer::allocate(gpu_, runs * codes.run_bytes(), stream_).value());
    means_.emplace(DeviceBuffer::allocate(gpu_, runs * shape_.value_dim * 2, stream_).value());
    CodeRunsParams params;
    params.slab = tables_.slab;
    params.slab.blocks = blocks.data();
    params.slab.slots = lists * blocks_per_list();
    params.jobs = keep(device_jobs, jobs);
    params.slots = keep(device_slots, slots);
    params.job_count = static_cast<std::uint32_t>(jobs.size());
    params.sinks = shape_.sinks;
    params.lists = lists;
    params.runs_max = shape_.runs_max;
    params.codes = codes_->data();
    params.value_means = means_->data();
    KVTIER_CHECK(code_runs(gpu_, params, stream_).ok() && synchronize(), "no codes");
    tables_.codes = codes_->data();
    tables_.value_means = means_->data();
  }

  void reference_of(std::uint32_t list, const std::vector<std::uint32_t>& chosen, bool estimate,
                    float* out) {
    const std::uint32_t group = shape_.queries_per_kv_head;
    const std::uint32_t dim = shape_.head_dim;
    std::vector<float> queries(std::size_t{group} * dim);
    for (std::size_t i = 0; i < queries.size(); ++i) {
      queries[i] = load_element(query_bytes_.data(), shape_.dtype, list * queries.size() + i);
    }
    std::vector<float> lse(group);
    attend(list, queries, near_blocks(), out, lse.data());
    const std::vector<float> near_lse = lse;
    std::vector<float> part(std::size_t{group} * shape_.value_dim);
    std::vector<float> part_lse(group);
    attend(list, queries, chosen, part.data(), part_lse.data());
    merge_states_reference({out, lse.data()}, {part.data(), part_lse.data()}, group,
                           shape_.value_dim);
    if (!estimate) return;
    estimate_list(list, queries, near_lse, chosen, part, part_lse);
    merge_states_reference({out, lse.data()}, {part.data(), part_lse.data()}, group,
                           shape_.value_dim);
  }

  void attend(std::uint32_t list, const std::vector<float>& queries,
              const std::vector<std::uint32_t>& blocks, float* out, float* lse) {
    std::vector<BlockRange> ranges;
    for (const std::uint32_t block : blocks) {
      ranges.push_back({host_block(list, block).data(), 0, shape_.tokens_per_block, 0});
    }
    AttentionTask task;
    task.queries = queries.data();
    task.blocks = ranges;
    task.out = out;
    task.lse = lse;
    partial_attention_reference({&layout_, shape_.queries_per_kv_head, shape_.softmax}, task);
  }

  void estimate_list(std::uint32_t list, const std::vector<float>& queries,
                     const std::vector<float>& near_lse, const std::vector<std::uint32_t>& chosen,
                     std::vector<float>& out, std::vector<float>& lse) {
    const std::uint32_t group = shape_.queries_per_kv_head;
    const KeyCodes codes{.bits = 4, .dim = shape_.head_dim, .dtype = shape_.dtype};
    std::vector<CodeLine> lines(shape_.runs_max * codes.run_lines());
    std::vector<std::byte> keys(64 * layout_.key_row_bytes());
    std::vector<float> means(std::size_t{shape_.runs_max} * shape_.value_dim);
    for (std::uint32_t run = 0; run < shape_.runs_max; ++run) {
      const std::uint32_t skip = run == 0 ? shape_.sinks : 0;
      for (std::uint32_t t = 0; t < 64; ++t) {
        const std::uint32_t token = run * 64 + t;
        const auto block = host_block(list, token / shape_.tokens_per_block);
        const std::uint32_t in_block = token % shape_.tokens_per_block;
        std::copy_n(block.data() + layout_.key_offset(0, in_block), layout_.key_row_bytes(),
                    keys.data() + t * layout_.key_row_bytes());
        for (std::uint32_t i = 0; i < shape_.value_dim && t >= skip; ++i) {
          means[run * shape_.value_dim + i] +=
              load_element(block.data() + layout_.value_offset(0, in_block), shape_.dtype, i) /
              float(64 - skip);
        }
      }
      quantise_run(codes, {keys.data(), 64, shape_.head_dim, layout_.key_row_bytes(), shape_.dtype},
                   skip, lines.data() + run * codes.run_lines());
    }
    const std::size_t tokens = std::size_t{shape_.runs_max} * 64;
    std::vector<float> logits(group * tokens);
    std::vector<float> scores(far_blocks());
    score_codes_reference(shape_.softmax, {.codes = codes,
                                           .runs = lines.data(),
                                           .run_count = shape_.runs_max,
                                           .queries = queries.data(),
                                           .query_stride = shape_.head_dim,
                                           .query_count = group,
                                           .logits = logits.data(),
                                           .logit_stride = tokens});
    scan_reference({.group = group,
                    .tokens_per_cell = shape_.tokens_per_block,
                    .sinks = shape_.sinks,
                    .value_dim = shape_.value_dim,
                    .logits = logits,
                    .near_lse = near_lse,
                    .value_means = means,
                    .chosen = chosen,
                    .scores = scores,
                    .out = out,
                    .lse = lse});
  }

  const Gpu& gpu_;
  StreamRef stream_;
  DeviceStepShape shape_;
  std::uint32_t cache_slots_;
  std::mt19937 random_;
  BlockLayout layout_ = BlockLayout::make({}).value();
  DeviceStepTables tables_;
  std::vector<std::byte> query_bytes_;
  std::optional<PinnedRegion> host_, status_;
  std::optional<DeviceBuffer> queries_, extents_, frames_, generations_, seeds_, sums_, entries_,
      residents_, marks_, owners_, clock_, slab_, out_, run_counts_, near_ranges_, near_offsets_,
      codes_, means_;
};

}  // namespace kvtier
