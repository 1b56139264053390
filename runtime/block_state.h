#pragma once

#include <cstdint>

namespace kvtier {

/// Where a block is, as two independent machines (drawn in runtime/README.md):
/// its *home* (host and disk), shared by all blocks of an extent and written by `BlockTable` alone,
/// and its *residency* on the device, one per block, written by `DeviceMap` alone.

/// Home of an extent.
enum class HomeState : unsigned char {
  kFree,     ///< The row is unused.
  kFilling,  ///< In a host frame, some of its blocks not sealed yet. Cannot be dropped.
  kHost,     ///< In a host frame only, complete. Cannot be dropped.
  kWriting,  ///< In a host frame, on its way to disk.
  kBoth,     ///< In a host frame and on disk: the frame can be dropped for nothing.
  kDisk,     ///< On disk only.
  kReading,  ///< On disk, on its way to a host frame.
};
inline constexpr int kHomeStateCount = 7;

enum class HomeEvent : unsigned char {
  kCreate,
  kComplete,  ///< The last block sealed.
  kStartWrite,
  kWriteDone,
  kWriteFailed,
  kDropFrame,
  kStartRead,
  kReadDone,
  kReadFailed,  ///< Or cancelled.
  kReopen,      ///< A truncation cut into it.
  kRelease,     ///< Its tokens are gone.
};
inline constexpr int kHomeEventCount = 11;

/// Residency of a block on the device.
enum class ResidencyState : unsigned char {
  kAbsent,
  kOpen,      ///< The tail of a sequence: tokens are still appended, no other copy exists.
  kArriving,  ///< A slot is taken, the bytes are not in yet.
  kResident,  ///< Sealed and readable; the copy in its home is the one that counts.
};
inline constexpr int kResidencyStateCount = 4;

enum class ResidencyEvent : unsigned char {
  kOpen,
  kSeal,
  kReopen,
  kReserve,
  kArrive,
  kFail,  ///< The bytes did not come, or were not the right ones.
  kEvict,
  kRelease,
};
inline constexpr int kResidencyEventCount = 8;

/// What of a block is meant. On the device a block may have its values alone, where a selector
/// keeps keys of its own; its home always has all of it.
enum class BlockPart : unsigned char {
  kWhole,
  kValues,
  kKeys,
};

const char* to_string(HomeState state);
const char* to_string(HomeEvent event);
const char* to_string(ResidencyState state);
const char* to_string(ResidencyEvent event);

/// One row of the table.
template <typename State, typename Event>
struct Transition {
  State from;
  Event event;
  State to;
};

/// Every legal transition; whatever is not here is a bug and `advance` aborts on it.
inline constexpr Transition<HomeState, HomeEvent> kHomeTransitions[] = {
    {HomeState::kFree, HomeEvent::kCreate, HomeState::kFilling},
    {HomeState::kFilling, HomeEvent::kComplete, HomeState::kHost},
    {HomeState::kFilling, HomeEvent::kReopen, HomeState::kFilling},
    {HomeState::kFilling, HomeEvent::kRelease, HomeState::kFree},
    {HomeState::kHost, HomeEvent::kStartWrite, HomeState::kWriting},
    {HomeState::kHost, HomeEvent::kReopen, HomeState::kFilling},
    {HomeState::kHost, HomeEvent::kRelease, HomeState::kFree},
    {HomeState::kWriting, HomeEvent::kWriteDone, HomeState::kBoth},
    {HomeState::kWriting, HomeEvent::kWriteFailed, HomeState::kHost},
    {HomeState::kBoth, HomeEvent::kDropFrame, HomeState::kDisk},
    {HomeState::kBoth, HomeEvent::kReopen, HomeState::kFilling},
    {HomeState::kBoth, HomeEvent::kRelease, HomeState::kFree},
    {HomeState::kDisk, HomeEvent::kStartRead, HomeState::kReading},
    {HomeState::kDisk, HomeEvent::kRelease, HomeState::kFree},
    {HomeState::kReading, HomeEvent::kReadDone, HomeState::kBoth},
    {HomeState::kReading, HomeEvent::kReadFailed, HomeState::kDisk},
};

inline constexpr Transition<ResidencyState, ResidencyEvent> kResidencyTransitions[] = {
    {ResidencyState::kAbsent, ResidencyEvent::kOpen, ResidencyState::kOpen},
    {ResidencyState::kAbsent, ResidencyEvent::kReserve, ResidencyState::kArriving},
    {ResidencyState::kOpen, ResidencyEvent::kSeal, ResidencyState::kResident},
    {ResidencyState::kOpen, ResidencyEvent::kRelease, ResidencyState::kAbsent},
    {ResidencyState::kArriving, ResidencyEvent::kArrive, ResidencyState::kResident},
    {ResidencyState::kArriving, ResidencyEvent::kFail, ResidencyState::kAbsent},
    {ResidencyState::kResident, ResidencyEvent::kReopen, ResidencyState::kOpen},
    {ResidencyState::kResident, ResidencyEvent::kEvict, ResidencyState::kAbsent},
    {ResidencyState::kResident, ResidencyEvent::kRelease, ResidencyState::kAbsent},
};

bool is_legal(HomeState from, HomeEvent event);
bool is_legal(ResidencyState from, ResidencyEvent event);

/// The state after `event`; an illegal one aborts with both names.
HomeState advance(HomeState from, HomeEvent event);
ResidencyState advance(ResidencyState from, ResidencyEvent event);

/// Whether the extent's bytes can be read in a host frame now.
constexpr bool is_in_frame(HomeState state) {
  return state == HomeState::kFilling || state == HomeState::kHost ||
         state == HomeState::kWriting || state == HomeState::kBoth;
}

}  // namespace kvtier
