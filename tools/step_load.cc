#include "tools/step_load.h"

#include "kernels/checksum.h"
#include "kernels/code_runs.h"
#include "memory/dtype.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <thread>

namespace kvtier {
namespace {

constexpr std::size_t kExtentBytes = 64 * 1024;
constexpr std::uint32_t kFailedMax = 1024;

/// work(first, end) over [0, count) on all cores.
template <typename Work>
void split(std::size_t count, const Work& work) {
  const std::size_t threads = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> workers;
  for (std::size_t t = 0; t < threads; ++t) {
    workers.emplace_back([=] { work(count * t / threads, count * (t + 1) / threads); });
  }
  for (std::thread& worker : workers) worker.join();
}

}  // namespace

DeviceStepShape StepCase::shape() const {
  DeviceStepShape shape;
  shape.sequences = sequences;
  shape.tokens_per_block = tokens_per_block;
  shape.softmax.scale = 1.0f / std::sqrt(float(kDim));
  shape.sinks = kSinks;
  shape.runs_max = (context - kWindow) / 64;
  shape.chosen_max = chosen();
  shape.near_ranges_max = near_blocks();
  return shape;
}

Result<std::unique_ptr<StepLoad>> StepLoad::make(const GpuBench& bench, const StepCase& c,
                                                 std::span<const std::byte> host) {
  KVTIER_CHECK(host.size() >= c.host_bytes(), "{} bytes for a case of {}", host.size(),
               c.host_bytes());
  std::unique_ptr<StepLoad> load(new StepLoad(bench, c, host.first(c.host_bytes())));
  KVTIER_RETURN_IF_ERROR(load->fill());
  return load;
}

Status StepLoad::allocate(std::size_t bytes, std::optional<DeviceBuffer>& buffer) const {
  KVTIER_ASSIGN_OR_RETURN(DeviceBuffer made,
                          DeviceBuffer::allocate(bench_.gpu(), bytes, bench_.stream()));
  buffer.emplace(std::move(made));
  return {};
}

Status StepLoad::upload(std::span<const std::byte> bytes,
                        std::optional<DeviceBuffer>& buffer) const {
  KVTIER_RETURN_IF_ERROR(allocate(bytes.size(), buffer));
  KVTIER_RETURN_IF_ERROR(buffer->upload(bytes));
  return bench_.wait();
}

Status StepLoad::fill() {
  KVTIER_RETURN_IF_ERROR(fill_places());
  KVTIER_RETURN_IF_ERROR(fill_map());
  KVTIER_RETURN_IF_ERROR(fill_near());
  KVTIER_RETURN_IF_ERROR(make_codes());
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0.0f, 2.5f);
  const std::size_t rows = std::size_t{case_.lists()} * StepCase::kGroup;
  std::vector<std::byte> queries(rows * StepCase::kDim * 2);
  for (std::size_t i = 0; i < rows * StepCase::kDim; ++i) {
    store_element(queries.data(), DType::kBF16, i, normal(random));
  }
  KVTIER_RETURN_IF_ERROR(upload(queries, queries_));
  KVTIER_RETURN_IF_ERROR(allocate(rows * StepCase::kDim * 4, out_));
  KVTIER_RETURN_IF_ERROR(
      upload(std::vector<std::uint32_t>(case_.sequences, case_.shape().runs_max), run_counts_));
  KVTIER_ASSIGN_OR_RETURN(Region region, Region::allocate({.bytes = 64 * 1024}));
  KVTIER_ASSIGN_OR_RETURN(PinnedRegion status, PinnedRegion::pin(bench_.gpu(), std::move(region)));
  status_.emplace(std::move(status));
  tables_.report = reinterpret_cast<FetchReport*>(status_->bytes().data());
  tables_.failed = reinterpret_cast<FailedBlock*>(status_->bytes().data() + 4096);
  tables_.failed_max = kFailedMax;
  tables_.queries = queries_->data();
  tables_.run_counts = run_counts_->as<std::uint32_t>();
  tables_.out = out_->data();
  tables_.out_dtype = DType::kF32;
  return {};
}

Status StepLoad::fill_places() {
  blocks_per_extent_ = static_cast<std::uint32_t>(kExtentBytes / case_.block_bytes());
  const std::uint32_t extents = blocks() / blocks_per_extent_;
  std::vector<std::uint32_t> ids(extents);
  std::iota(ids.begin(), ids.end(), 0u);
  frames_ = ids;
  std::shuffle(frames_.begin(), frames_.end(), std::mt19937(7));
  std::vector<std::uint64_t> seeds(blocks());
  std::vector<std::uint64_t> sums(blocks());
  split(blocks(), [&](std::size_t first, std::size_t end) {
    for (std::size_t b = first; b < end; ++b) {
      seeds[b] = 0x9E3779B97F4A7C15u * (b + 1);
      const std::size_t at = place(static_cast<std::uint32_t>(b)) * case_.block_bytes();
      sums[b] = seeded_checksum(host_.subspan(at, case_.block_bytes()), seeds[b]);
    }
  });
  KVTIER_RETURN_IF_ERROR(upload(ids, extents_));
  KVTIER_RETURN_IF_ERROR(upload(frames_, device_frames_));
  KVTIER_RETURN_IF_ERROR(upload(std::vector<std::uint32_t>(extents, 1), generations_));
  KVTIER_RETURN_IF_ERROR(upload(seeds, seeds_));
  KVTIER_RETURN_IF_ERROR(upload(sums, sums_));
  tables_.host = host_;
  tables_.places = {.extents = extents_->as<std::uint32_t>(),
                    .extents_max = case_.blocks_per_list() / blocks_per_extent_,
                    .blocks_per_extent = blocks_per_extent_,
                    .frames = device_frames_->as<std::uint32_t>(),
                    .generations = generations_->as<std::uint32_t>(),
                    .extent_count = extents,
                    .frame_bytes = kExtentBytes,
                    .header_bytes = 0,
                    .block_bytes = case_.block_bytes(),
                    .seeds = seeds_->as<std::uint64_t>(),
                    .sums = sums_->as<std::uint64_t>()};
  return {};
}

Status StepLoad::fill_map() {
  std::vector<std::uint32_t> marks(slots(), 0);
  std::fill(marks.begin() + cache_slots(), marks.end(), SlotMap::kHeld);
  KVTIER_RETURN_IF_ERROR(upload(std::vector<MapEntry>(blocks()), entries_));
  KVTIER_RETURN_IF_ERROR(upload(std::vector<std::uint32_t>(slots(), kNoBlock), residents_));
  KVTIER_RETURN_IF_ERROR(upload(marks, marks_));
  KVTIER_RETURN_IF_ERROR(upload(std::vector<std::uint32_t>(blocks(), SlotMap::kNobody), owners_));
  KVTIER_RETURN_IF_ERROR(upload(std::vector<SlotMap::Clock>(1), clock_));
  KVTIER_RETURN_IF_ERROR(allocate(slots() * case_.block_bytes(), slab_));
  tables_.map = {entries_->as<MapEntry>(),
                 residents_->as<std::uint32_t>(),
                 marks_->as<std::uint32_t>(),
                 owners_->as<std::uint32_t>(),
                 clock_->as<SlotMap::Clock>(),
                 slots(),
                 blocks()};
  tables_.slab_bytes = {slab_->data(), slab_->size()};
  tables_.slab = {.blocks = slab_->data(),
                  .slots = slots(),
                  .block_bytes = case_.block_bytes(),
                  .dtype = DType::kBF16,
                  .head_dim = StepCase::kDim,
                  .value_dim = StepCase::kDim,
                  .tokens_per_block = case_.tokens_per_block};
  return {};
}

Status StepLoad::fill_near() {
  std::vector<SlotRange> ranges;
  std::vector<std::uint32_t> offsets = {0};
  const std::uint32_t sinks = StepCase::kSinks / case_.tokens_per_block;
  for (std::uint32_t list = 0; list < case_.lists(); ++list) {
    for (std::uint32_t i = 0; i < case_.near_blocks(); ++i) {
      // Sinks from the front, the window from the back.
      const std::uint32_t index = i < sinks ? i : case_.blocks_per_list() - case_.near_blocks() + i;
      const std::uint32_t block = list * case_.blocks_per_list() + index;
      const auto slot = cache_slots() + static_cast<std::uint32_t>(ranges.size());
      KVTIER_RETURN_IF_ERROR(
          slab_->upload(host_.subspan(place(block) * case_.block_bytes(), case_.block_bytes()),
                        slot * case_.block_bytes()));
      ranges.push_back({slot, index * case_.tokens_per_block, 0,
                        static_cast<std::uint16_t>(case_.tokens_per_block)});
    }
    offsets.push_back(static_cast<std::uint32_t>(ranges.size()));
  }
  KVTIER_RETURN_IF_ERROR(upload(ranges, near_ranges_));
  KVTIER_RETURN_IF_ERROR(upload(offsets, near_offsets_));
  tables_.near_ranges = near_ranges_->as<SlotRange>();
  tables_.near_offsets = near_offsets_->as<std::uint32_t>();
  return {};
}

Status StepLoad::make_codes() {
  const std::uint32_t runs = case_.shape().runs_max;
  std::optional<DeviceBuffer> all;
  std::optional<DeviceBuffer> device_jobs;
  std::optional<DeviceBuffer> device_slots;
  std::vector<CodeRunJob> jobs;
  std::vector<std::uint32_t> slots;
  for (std::uint32_t list = 0; list < case_.lists(); ++list) {
    for (std::uint32_t run = 0; run < runs; ++run) jobs.push_back({list, run});
    const std::uint32_t first = list * case_.blocks_per_list();
    for (std::uint32_t b = 0; b < runs * 64 / case_.tokens_per_block; ++b) {
      slots.push_back(static_cast<std::uint32_t>(place(first + b)));
    }
  }
  CodeRunsParams params;
  params.slab = tables_.slab;
  KVTIER_RETURN_IF_ERROR(upload(host_, all));
  KVTIER_RETURN_IF_ERROR(upload(jobs, device_jobs));
  KVTIER_RETURN_IF_ERROR(upload(slots, device_slots));
  KVTIER_RETURN_IF_ERROR(allocate(jobs.size() * params.layout().run_bytes(), codes_));
  KVTIER_RETURN_IF_ERROR(allocate(jobs.size() * StepCase::kDim * 2, means_));
  params.slab.blocks = all->data();
  params.slab.slots = blocks();
  params.jobs = device_jobs->as<CodeRunJob>();
  params.slots = device_slots->as<std::uint32_t>();
  params.job_count = static_cast<std::uint32_t>(jobs.size());
  params.sinks = StepCase::kSinks;
  params.lists = case_.lists();
  params.runs_max = runs;
  params.codes = codes_->data();
  params.value_means = means_->data();
  KVTIER_RETURN_IF_ERROR(code_runs(bench_.gpu(), params, bench_.stream()));
  tables_.codes = codes_->data();
  tables_.value_means = means_->data();
  return bench_.wait();
}

Status StepLoad::force_hits(const DeviceStep& step, unsigned percent) {
  const std::uint32_t k = case_.chosen();
  std::vector<std::uint32_t> chosen(std::size_t{case_.lists()} * k);
  std::vector<MapEntry> entries(blocks());
  std::vector<std::uint32_t> residents(slots());
  KVTIER_RETURN_IF_ERROR(
      cuda_status(bench_.gpu().calls(),
                  bench_.gpu().calls().copy(chosen.data(), step.chosen(), chosen.size() * 4,
                                            bench_.stream().get()),
                  "reading a choice"));
  KVTIER_RETURN_IF_ERROR(entries_->download(std::as_writable_bytes(std::span(entries))));
  KVTIER_RETURN_IF_ERROR(residents_->download(std::as_writable_bytes(std::span(residents))));
  KVTIER_RETURN_IF_ERROR(bench_.wait());
  std::vector<bool> wanted(blocks());
  std::mt19937 random(11);
  for (std::uint32_t list = 0; list < case_.lists(); ++list) {
    const auto first = chosen.begin() + std::ptrdiff_t{list} * k;
    std::vector<std::uint32_t> cells(first, first + k);
    for (std::uint32_t& cell : cells) cell += list * case_.blocks_per_list();
    for (const std::uint32_t block : cells) wanted[block] = true;
    std::shuffle(cells.begin(), cells.end(), random);
    for (std::uint32_t i = k * percent / 100; i < k; ++i) {
      MapEntry& entry = entries[cells[i]];
      if (entry.slot != kNoSlot) residents[entry.slot] = kNoBlock;
      entry.slot = kNoSlot;
    }
  }
  // Every other slot is taken by somebody, half of them used since the hand passed.
  std::vector<std::uint32_t> marks(slots(), 1);
  std::fill(marks.begin() + cache_slots(), marks.end(), SlotMap::kHeld);
  std::uint32_t filler = 0;
  for (std::uint32_t slot = 0; slot < cache_slots(); ++slot) {
    if (residents[slot] != kNoBlock) continue;
    while (filler < blocks() && (wanted[filler] || entries[filler].slot != kNoSlot)) ++filler;
    if (filler == blocks()) break;
    residents[slot] = filler;
    entries[filler] = {slot, 1};
    marks[slot] = random() % 2;
  }
  KVTIER_RETURN_IF_ERROR(upload(entries, saved_entries_));
  KVTIER_RETURN_IF_ERROR(upload(residents, saved_residents_));
  return upload(marks, saved_marks_);
}

Status StepLoad::restore() const {
  CudaCalls& calls = bench_.gpu().calls();
  const std::pair<const DeviceBuffer*, const DeviceBuffer*> pairs[] = {
      {&*entries_, &*saved_entries_},
      {&*residents_, &*saved_residents_},
      {&*marks_, &*saved_marks_}};
  for (const auto& [target, source] : pairs) {
    KVTIER_RETURN_IF_ERROR(cuda_status(
        calls, calls.copy(target->data(), source->data(), source->size(), bench_.stream().get()),
        "restoring the map"));
  }
  return clock_->fill(0);
}

Result<std::vector<float>> StepLoad::out() const {
  std::vector<float> out(out_->size() / 4);
  KVTIER_RETURN_IF_ERROR(out_->download(std::as_writable_bytes(std::span(out))));
  KVTIER_RETURN_IF_ERROR(bench_.wait());
  return out;
}

}  // namespace kvtier
