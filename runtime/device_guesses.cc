#include "runtime/device_guesses.h"

#include "memory/check.h"

#include <algorithm>

namespace kvtier {
namespace {

/// Lighter ones than this are wrong too often to be worth a slot.
constexpr float kLeastWeight = 0.2f;
/// Blocks that are compared with each other, as a multiple of those that a step may start.
constexpr std::size_t kConsidered = 64;

std::uint32_t blocks_of(std::uint64_t bytes, const BlockLayout& layout, const DeviceMap& map) {
  // Two steps' guesses are resident at once: those for this step and those for the next.
  const std::uint64_t most = map.slots() / (2 * kPredictedShare);
  return static_cast<std::uint32_t>(std::min<std::uint64_t>(bytes / layout.block_bytes(), most));
}

}  // namespace

DeviceGuesses::DeviceGuesses(const Parts& parts, std::uint64_t bytes_per_step)
    : layout_(*parts.layout),
      table_(*parts.table),
      map_(*parts.map),
      host_(*parts.host),
      engine_(*parts.engine),
      verify_(parts.verify),
      counters_(*parts.counters),
      blocks_per_step_(blocks_of(bytes_per_step, layout_, map_)),
      budgets_{GuessBudget(blocks_per_step_), GuessBudget(blocks_per_step_),
               GuessBudget(blocks_per_step_)} {
  considered_.reserve(kConsidered * blocks_per_step_);
  copies_.reserve(blocks_per_step_);
  spans_.reserve(blocks_per_step_);
  batches_.reserve(blocks_per_step_);
}

void DeviceGuesses::begin_step() {
  KVTIER_CHECK(copies_.empty(), "{} blocks are on their way at the beginning of a step",
               copies_.size());
  blocks_left_ = blocks_per_step_;
  for (std::size_t i = 0; i < budgets_.size(); ++i) {
    const GuessEnds& ends = map_.guess_ends(static_cast<GuessSource>(i));
    budgets_[i].begin_step(ends.used, ends.unused);
    counters_.prefetch.sources[i].to_device_budget_bytes =
        budgets_[i].allowance() * layout_.block_bytes() / GuessBudget::kProbeSteps;
  }
}

void DeviceGuesses::consider(BlockId block, float weight, GuessSource source) {
  if (!enabled() || weight < kLeastWeight || considered_.size() == considered_.capacity()) return;
  considered_.push_back({block, weight, source});
}

void DeviceGuesses::promote() {
  if (considered_.empty()) return;
  std::ranges::sort(considered_, [](const Guess& a, const Guess& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.block < b.block;
  });
  const std::size_t first = copies_.size();
  for (const Guess& guess : considered_) {
    if (!start(guess)) break;
  }
  considered_.clear();
  submit(first);
}

// False when nothing more can be started.
bool DeviceGuesses::start(const Guess& guess) {
  // Steps need slots of their own: guesses stop where the cache gets tight.
  if (blocks_left_ == 0 || map_.available() <= map_.slots() / 4) return false;
  const ExtentId extent = layout_.extent_of(guess.block);
  // A block can be ranked twice, and a frame may have been taken for a read meanwhile.
  if (!map_.find(guess.block).is_none() || !is_in_frame(table_.row(extent).state)) return true;
  if (table_.is_damaged(guess.block)) return true;
  if (!budgets_[static_cast<std::size_t>(guess.source)].spend()) return true;
  const std::optional<SlotId> slot = map_.reserve(guess.block);
  if (!slot) return false;
  map_.mark_guess(*slot, guess.source);
  table_.hold_frame(extent);
  copies_.push_back({guess.block, *slot, extent});
  spans_.push_back({.source = table_.block_bytes(guess.block).data(),
                    .target = map_.address(*slot),
                    .bytes = layout_.block_bytes()});
  counters_.prefetch.sources[static_cast<std::size_t>(guess.source)].to_device.issued_bytes +=
      layout_.block_bytes();
  --blocks_left_;
  return true;
}

void DeviceGuesses::submit(std::size_t first) {
  if (copies_.size() == first) return;
  Batch batch{.transfer = {}, .first = first, .copies = copies_.size() - first};
  Result<Transfer> transfer =
      engine_.submit({.route = Route::kHostToDevice,
                      .priority = Priority::kPrefetch,
                      .spans = std::span<const CopySpan>(spans_).subspan(first)});
  // Without a transfer its blocks do not arrive, as if it had failed.
  if (transfer.ok()) batch.transfer = std::move(*transfer);
  batches_.push_back(std::move(batch));
}

void DeviceGuesses::settle() {
  for (Batch& batch : batches_) {
    bool moved = static_cast<bool>(batch.transfer);
    if (moved) {
      batch.transfer.raise(Priority::kDemand);
      moved = batch.transfer.wait().ok();
    }
    for (std::size_t i = batch.first; i < batch.first + batch.copies; ++i) {
      const Copy& copy = copies_[i];
      table_.unhold_frame(copy.extent);
      if (moved && is_intact(copy)) {
        map_.arrive(copy.slot, Admission::kPredicted);
        map_.unhold(copy.slot);
      } else {
        map_.fail(copy.slot);
      }
    }
  }
  batches_.clear();
  copies_.clear();
  spans_.clear();
}

bool DeviceGuesses::is_intact(const Copy& copy) {
  if (verify_ != VerifyMode::kAll) return true;
  ++counters_.verification.verified;
  if (host_.check(copy.block, map_.address(copy.slot)).ok) return true;
  ++counters_.verification.mismatched;
  return false;
}

}  // namespace kvtier
