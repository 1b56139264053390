#include "transfer/faulty_file.h"

#include "transfer/file_error.h"
#include "transfer/operation_list.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

namespace kvtier {
namespace {

constexpr std::uint64_t kHoldMax = 8;
// What a short read leaves behind its end, so that nobody takes old bytes there for new ones.
constexpr std::byte kPoison{0xdb};

void flip_bit(std::span<std::byte> bytes, std::uint64_t draw) {
  const std::uint64_t bit = draw % (std::uint64_t{bytes.size()} * 8);
  bytes[bit / 8] ^= std::byte{1} << (bit % 8);
}

std::string injected(const char* what, const FileOperation& operation) {
  return fmt::format("injected {}: {} B at {}", what, operation.buffer.size(), operation.offset);
}

}  // namespace

// Invariants: a slot is free, in the wrapped file, in `unsent`, in `held`, or its outer operation
// is in `ready`; in_flight counts all but the free ones. Every vector has room for all slots from
// the start.
struct FaultyFile::State {
  struct Freed {
    void operator()(std::byte* memory) const { std::free(memory); }
  };

  // One operation between its acceptance and its reaping: the caller's, and the one that the
  // wrapped file sees in its place.
  struct Slot {
    FileOperation* outer = nullptr;
    FileOperation inner;
    std::optional<FaultKind> fault;
    // Settles where, how much or which bit.
    std::uint64_t draw = 0;
    // Completions and calls of `reap` to wait for.
    std::uint64_t hold = 0;
    bool in_wrapped = false;
    std::unique_ptr<std::byte, Freed> rotten;
    std::size_t rotten_bytes = 0;
  };

  State(std::unique_ptr<File> file, const FaultPlan& fault_plan, FaultCounts* fault_counts)
      : wrapped(std::move(file)), plan(fault_plan), counts(fault_counts) {
    const std::uint32_t depth = wrapped->traits().queue_depth;
    slots.resize(depth);
    free.reserve(depth);
    unsent.reserve(depth);
    held.reserve(depth);
    reaped.resize(depth);
    for (std::uint32_t i = depth; i > 0; --i) free.push_back(i - 1);
    const std::size_t places = wrapped->size_bytes() / wrapped->traits().alignment + 1;
    for (std::vector<std::uint32_t>& counters : uses) counters.resize(places);
    refresh_traits();
  }

  void refresh_traits() {
    traits = wrapped->traits();
    traits.backend = fmt::format("faulty({})", wrapped->traits().backend);
  }

  std::size_t units(std::size_t bytes) const { return bytes / traits.alignment; }
  void count(FaultKind kind) {
    if (counts == nullptr) return;
    counts->fired[static_cast<std::size_t>(kind)].fetch_add(1, std::memory_order_relaxed);
  }

  void decide(Slot& slot);
  bool prepare(Slot& slot);
  std::uint64_t another_place(const FileOperation& operation, std::uint64_t draw) const;
  void spoil_copy(Slot& slot);
  void send();
  void settle(Slot& slot);
  void apply(Slot& slot);
  void release(std::size_t aged, std::uint64_t steps);

  const std::unique_ptr<File> wrapped;
  const FaultPlan plan;
  FaultCounts* const counts;
  FileTraits traits;
  std::vector<Slot> slots;
  std::vector<std::uint32_t> free;
  // Accepted here, not yet accepted by the wrapped file; in order.
  std::vector<FileOperation*> unsent;
  // Complete, but held back.
  std::vector<std::uint32_t> held;
  std::vector<FileOperation*> reaped;
  OperationList<FileOperation> ready;
  // How often each place was read and written before.
  std::array<std::vector<std::uint32_t>, 2> uses;
  std::uint32_t in_flight = 0;
  bool closed = false;
};

// The plan's answer for the operation in `slot`.
void FaultyFile::State::decide(Slot& slot) {
  constexpr FaultKind kReadKinds[] = {FaultKind::kIoError, FaultKind::kMisplaced,
                                      FaultKind::kShortRead, FaultKind::kBitFlip};
  constexpr FaultKind kWriteKinds[] = {FaultKind::kWriteError, FaultKind::kNoSpace,
                                       FaultKind::kLostWrite, FaultKind::kRot};
  const bool is_write = slot.outer->kind == FileOperation::Kind::kWrite;
  std::vector<std::uint32_t>& counters = uses[static_cast<std::size_t>(is_write)];
  const std::uint64_t place = slot.outer->offset;
  const std::uint64_t use = counters[std::min<std::size_t>(units(place), counters.size() - 1)]++;
  // Reads and writes of a place draw apart; the second set of salts settles the details.
  const std::uint64_t salt = is_write ? 32 : 0;
  const auto draw = [&](FaultKind kind, std::uint64_t set) {
    return fault_draw(plan.seed, salt + 64 * set + static_cast<std::uint64_t>(kind), place, use);
  };
  const auto hits = [&](FaultKind kind) {
    return fault_hits(draw(kind, 0), plan.disk_rate[static_cast<std::size_t>(kind)]);
  };
  slot.fault.reset();
  for (const FaultKind kind : is_write ? kWriteKinds : kReadKinds) {
    if (!hits(kind)) continue;
    slot.fault = kind;
    slot.draw = draw(kind, 1);
    break;
  }
  slot.hold = hits(FaultKind::kDelay) ? 1 + draw(FaultKind::kDelay, 1) % kHoldMax : 0;
  if (slot.hold > 0) count(FaultKind::kDelay);
}

// Another place of the same size and phase: where a misdirected read of extents would really land.
std::uint64_t FaultyFile::State::another_place(const FileOperation& operation,
                                               std::uint64_t draw) const {
  const std::uint64_t length = operation.buffer.size();
  const std::uint64_t size = wrapped->size_bytes();
  if (length == 0 || size < length) return operation.offset;
  const std::uint64_t phase = operation.offset % length;
  const std::uint64_t places = phase + length <= size ? (size - phase) / length : 0;
  if (places < 2) return operation.offset;
  const std::uint64_t own = operation.offset / length;
  return phase + (own + 1 + draw % (places - 1)) % places * length;
}

// The caller's bytes stay as they are: what rots is a copy.
void FaultyFile::State::spoil_copy(Slot& slot) {
  const std::span<std::byte> bytes = slot.outer->buffer;
  if (slot.rotten_bytes < bytes.size()) {
    const std::size_t alignment = std::max(traits.alignment, sizeof(void*));
    slot.rotten.reset(static_cast<std::byte*>(std::aligned_alloc(alignment, bytes.size())));
    KVTIER_CHECK(slot.rotten != nullptr, "no memory for a copy of {} B", bytes.size());
    slot.rotten_bytes = bytes.size();
  }
  slot.inner.buffer = {slot.rotten.get(), bytes.size()};
  std::memcpy(slot.inner.buffer.data(), bytes.data(), bytes.size());
  flip_bit(slot.inner.buffer, slot.draw);
}

// Turns the caller's operation into the wrapped file's; false when that file shall not see it.
bool FaultyFile::State::prepare(Slot& slot) {
  FileOperation& inner = slot.inner;
  inner.kind = slot.outer->kind;
  inner.offset = slot.outer->offset;
  inner.buffer = slot.outer->buffer;
  inner.owner = &slot;
  inner.status = Status();
  inner.transferred = 0;
  if (!slot.fault) return true;
  if (inner.buffer.empty()) {
    slot.fault.reset();
    return true;
  }
  switch (*slot.fault) {
    case FaultKind::kIoError:
    case FaultKind::kNoSpace:
    case FaultKind::kLostWrite: return false;
    case FaultKind::kWriteError:
      inner.buffer = inner.buffer.first(slot.draw % units(inner.buffer.size()) * traits.alignment);
      return !inner.buffer.empty();
    case FaultKind::kMisplaced:
      inner.offset = another_place(*slot.outer, slot.draw);
      if (inner.offset == slot.outer->offset) slot.fault.reset();
      return true;
    case FaultKind::kRot: spoil_copy(slot); return true;
    case FaultKind::kBitFlip:
    case FaultKind::kShortRead:
    case FaultKind::kDelay: return true;
  }
  return true;
}

void FaultyFile::State::send() {
  if (unsent.empty()) return;
  const std::size_t accepted = wrapped->submit(unsent);
  for (FileOperation* const inner : std::span(unsent).first(accepted)) {
    static_cast<Slot*>(inner->owner)->in_wrapped = true;
  }
  unsent.erase(unsent.begin(), unsent.begin() + static_cast<std::ptrdiff_t>(accepted));
}

// Gives the caller's operation the result of a fault that fired.
void FaultyFile::State::apply(Slot& slot) {
  FileOperation& outer = *slot.outer;
  switch (*slot.fault) {
    case FaultKind::kIoError: outer.status = io_error(injected("eio", outer)); break;
    case FaultKind::kWriteError:
      outer.status = io_error(injected("writeeio", outer));
      outer.transferred = 0;
      break;
    case FaultKind::kNoSpace: outer.status = no_space(injected("enospc", outer)); break;
    case FaultKind::kLostWrite: outer.transferred = outer.buffer.size(); break;
    case FaultKind::kShortRead:
      if (outer.transferred < traits.alignment) return;
      outer.transferred = slot.draw % units(outer.transferred) * traits.alignment;
      std::fill(outer.buffer.begin() + static_cast<std::ptrdiff_t>(outer.transferred),
                outer.buffer.end(), kPoison);
      break;
    case FaultKind::kBitFlip:
      if (outer.transferred == 0) return;
      flip_bit(outer.buffer.first(outer.transferred), slot.draw);
      break;
    case FaultKind::kRot:
    case FaultKind::kMisplaced:
    case FaultKind::kDelay: break;
  }
  count(*slot.fault);
}

// The wrapped file is done with the slot, or never saw it.
void FaultyFile::State::settle(Slot& slot) {
  slot.in_wrapped = false;
  slot.outer->status = std::exchange(slot.inner.status, Status());
  slot.outer->transferred = slot.inner.transferred;
  if (slot.fault && slot.outer->status.ok()) apply(slot);
  const auto index = static_cast<std::uint32_t>(&slot - slots.data());
  if (slot.hold > 0) {
    held.push_back(index);
    return;
  }
  ready.push(slot.outer);
}

// Brings the first `aged` of those held back `steps` nearer; with nothing else left that could
// overtake them, lets all go.
void FaultyFile::State::release(std::size_t aged, std::uint64_t steps) {
  const bool others = in_flight > held.size();
  std::size_t kept = 0;
  for (std::size_t i = 0; i < held.size(); ++i) {
    const std::uint32_t index = held[i];
    Slot& slot = slots[index];
    if (i < aged) slot.hold -= std::min(slot.hold, steps);
    if (slot.hold > 0 && others) {
      held[kept++] = index;
    } else {
      ready.push(slot.outer);
    }
  }
  held.resize(kept);
}

FaultyFile::FaultyFile(std::unique_ptr<File> wrapped, const FaultPlan& plan, FaultCounts* counts)
    : state_(std::make_unique<State>(std::move(wrapped), plan, counts)) {}

FaultyFile::~FaultyFile() {
  KVTIER_CHECK(state_->closed, "a faulty file was destroyed without close()");
}

const FileTraits& FaultyFile::traits() const { return state_->traits; }
std::uint64_t FaultyFile::size_bytes() const { return state_->wrapped->size_bytes(); }

Status FaultyFile::register_buffers(std::span<const std::span<std::byte>> ranges) {
  Status status = state_->wrapped->register_buffers(ranges);
  state_->refresh_traits();
  return status;
}

std::size_t FaultyFile::submit(std::span<FileOperation* const> operations) {
  KVTIER_CHECK(!state_->closed, "submit after close()");
  std::size_t accepted = 0;
  for (FileOperation* const operation : operations) {
    if (state_->free.empty()) break;
    check_aligned(*operation, state_->traits.alignment);
    State::Slot& slot = state_->slots[state_->free.back()];
    operation->token = state_->free.back();
    state_->free.pop_back();
    ++state_->in_flight;
    ++accepted;
    slot.outer = operation;
    state_->decide(slot);
    if (state_->prepare(slot)) {
      state_->unsent.push_back(&slot.inner);
    } else {
      state_->settle(slot);
    }
  }
  state_->send();
  return accepted;
}

std::size_t FaultyFile::reap(std::span<FileOperation*> done, Duration timeout) {
  State& state = *state_;
  if (done.empty()) return 0;
  while (state.in_flight > 0) {
    state.send();
    const bool can_wait = state.ready.empty() && state.in_flight > state.held.size();
    const std::size_t count =
        state.wrapped->reap(state.reaped, can_wait ? timeout : Duration::zero());
    // Only what was held before is aged, by this call and by the completions that overtake it.
    const std::size_t held_before = state.held.size();
    for (FileOperation* const inner : std::span(state.reaped).first(count)) {
      state.settle(*static_cast<State::Slot*>(inner->owner));
    }
    state.release(held_before, count + 1);
    if (!state.ready.empty() || count == 0) break;
  }
  const std::size_t count = state.ready.pop_into(done);
  for (FileOperation* const operation : done.first(count)) state.free.push_back(operation->token);
  state.in_flight -= static_cast<std::uint32_t>(count);
  return count;
}

void FaultyFile::cancel(FileOperation* operation) {
  State::Slot& slot = state_->slots[operation->token];
  if (slot.in_wrapped) {
    state_->wrapped->cancel(&slot.inner);
    return;
  }
  const auto unsent = std::find(state_->unsent.begin(), state_->unsent.end(), &slot.inner);
  if (unsent == state_->unsent.end()) return;
  state_->unsent.erase(unsent);
  slot.inner.status = cancelled("not started");
  state_->settle(slot);
}

void FaultyFile::wake() { state_->wrapped->wake(); }
Status FaultyFile::sync() { return state_->wrapped->sync(); }

Status FaultyFile::close() {
  KVTIER_CHECK(state_->in_flight == 0, "close() with {} operations in flight", state_->in_flight);
  state_->closed = true;
  return state_->wrapped->close();
}

}  // namespace kvtier
