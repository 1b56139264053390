#pragma once

#include "memory/clock.h"
#include "memory/status.h"
#include "memory/timeline.h"
#include "transfer/file.h"
#include "transfer/link.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace kvtier {

enum class Route : unsigned char { kDiskToHost, kHostToDevice, kDeviceToHost, kHostToDisk };
inline constexpr int kRouteCount = 4;
/// "disk_to_host", ...
const char* to_string(Route route);

/// Order of service: on one route nothing of a lower rank starts while a higher one waits; on the
/// two routes that share a file or a link, not while a higher one waits and fits.
enum class Priority : unsigned char { kDemand, kPrefetch, kWriteBack };
inline constexpr int kPriorityCount = 3;

/// One move of bytes. Memory (and, for links, the span list) belongs to the caller and stays valid
/// and untouched until the transfer is terminal.
struct TransferRequest {
  Route route = Route::kHostToDevice;
  Priority priority = Priority::kDemand;
  /// Disk routes: place in the file and aligned host memory.
  std::uint64_t offset = 0;
  std::span<std::byte> buffer = {};
  /// Link routes: what to copy.
  std::span<const CopySpan> spans = {};
};

enum class TransferState : unsigned char { kQueued, kInFlight, kDone, kFailed, kCancelled };

class TransferEngine;

/// Handle of one submitted transfer. Move-only; empty by default. Dropping it does not cancel: the
/// bytes still move and the caller's memory stays in use until the engine is drained.
/// Any thread may use it, one at a time. It does not outlive its engine.
class Transfer {
 public:
  Transfer() = default;
  Transfer(Transfer&& other) noexcept;
  Transfer& operator=(Transfer&& other) noexcept;
  ~Transfer();

  explicit operator bool() const { return engine_ != nullptr; }

  TransferState poll() const;
  /// Blocks until terminal and returns the result; the handle is empty afterwards. With an engine
  /// without threads the caller drives it from here.
  Status wait();
  /// Somebody waits by now: a transfer that is still queued goes on in the queue of a higher rank,
  /// behind what is there. One that has started, or has that rank already, stays as it is.
  void raise(Priority priority);
  /// Best effort: a queued transfer never starts, one in flight may still end well. A terminal
  /// state follows in any case.
  void cancel();

 private:
  friend class TransferEngine;
  Transfer(TransferEngine* engine, std::uint32_t record) : engine_(engine), record_(record) {}

  TransferEngine* engine_ = nullptr;
  std::uint32_t record_ = 0;
};

/// What one route has moved so far.
struct RouteStats {
  std::uint64_t transfers = 0;
  std::uint64_t submitted_bytes = 0;  ///< As accepted by `submit`, however they end.
  std::uint64_t bytes = 0;            ///< Of transfers that ended well.
  std::uint64_t failures = 0;
  std::uint64_t cancelled = 0;
  std::uint64_t short_transfers = 0;  ///< Submitted again because fewer bytes came than asked.
  std::size_t in_flight_bytes_peak = 0;
};

/// Moves bytes between the tiers in order of priority, under a bound of bytes in flight per route.
///
/// One thread drives the file and one the link (a ring belongs to one thread); with
/// `threads = false` there are none and whoever waits drives both, so a test or a simulation runs
/// in one deterministic order. `submit` takes a short lock, never held across I/O, and allocates
/// nothing; every queue is bounded. Thread-safe.
///
/// A transfer that ends well but short is started again from its beginning, three times at most;
/// then it fails with `io_error`. Every other failure goes to its owner as it is.
class TransferEngine {
 public:
  struct Options {
    /// Transfers that may exist at once, terminal ones with a live handle included.
    std::uint32_t max_transfers = 4096;
    /// Bytes in flight per route. One transfer larger than the bound runs alone.
    std::size_t in_flight_bytes_max = std::size_t{32} << 20;
    /// Share of the bound, and of the file's queue, that prefetch and write-back may fill together,
    /// so that a demand read finds room at once. One of them may always run.
    double background_share = 0.5;
    bool threads = true;
    Timeline* timeline = nullptr;
  };

  /// `disk` may be null (no disk tier: disk routes are `unsupported`). All outlive the engine.
  static Result<std::unique_ptr<TransferEngine>> open(const Options& options, const Clock& clock,
                                                      File* disk, Link* link);
  ~TransferEngine();
  TransferEngine(const TransferEngine&) = delete;
  TransferEngine& operator=(const TransferEngine&) = delete;

  /// `busy` when `max_transfers` exist: nothing has changed, wait for one and retry. `unsupported`
  /// without the file or link that the route needs, `cancelled` after `close`.
  Result<Transfer> submit(const TransferRequest& request);

  /// Moves things along once; for an engine without threads. Returns whether anything is left.
  bool progress();
  /// Returns when nothing is queued or in flight.
  void drain();
  /// Refuses new transfers, drains, joins the threads. Call once, before destruction. Handles that
  /// are still held stay valid until then.
  Status close();

  RouteStats stats(Route route) const;

 private:
  friend class Transfer;
  struct State;
  explicit TransferEngine(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace kvtier
