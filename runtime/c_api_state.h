#pragma once

#include "runtime/kvtier.h"
#include "runtime/prefix_store.h"
#include "runtime/runtime.h"

#include <atomic>
#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <vector>

/// Behind the handle of the C ABI: a runtime with the world that it borrows.
struct kvtier_runtime {
  kvtier_runtime();
  ~kvtier_runtime();

  struct Slot {
    std::unique_ptr<kvtier::Sequence> sequence;
    std::uint32_t generation = 0;  ///< Of the sequence that is, or will be, here.
  };

  kvtier::SteadyClock clock;
  std::unique_ptr<kvtier::Timeline> timeline;
  std::unique_ptr<kvtier::Device> device;
  std::unique_ptr<kvtier::Link> link;
  std::unique_ptr<kvtier::File> disk;
  std::unique_ptr<kvtier::Runtime> runtime;
  kvtier::RuntimeOptions options;
  std::vector<Slot> slots;
  /// Of this runtime's sequences: blocks that a store hands on are never mistaken for others'.
  std::uint64_t origin = 0;
  std::uint64_t origins = 0;
  std::unique_ptr<kvtier::PageCipher> cipher;
  std::unique_ptr<kvtier::Store> store;
  std::unique_ptr<kvtier::PrefixStore> prefixes;
  kvtier_logger logger = nullptr;
  void* logger_context = nullptr;
  void log(const std::string& message) const;

  /// Set while a call is under way.
  std::atomic_flag entered = ATOMIC_FLAG_INIT;
  /// Of the last step; the spans live until the next call.
  std::span<const kvtier::AttendedRange> attended;
  std::vector<std::string> failures;
  std::vector<kvtier_range> ranges;
  /// Queries and answers in float32 for callers of another type; they grow to the largest step.
  std::vector<float> queries;
  std::vector<float> out;
  std::vector<float> lse;
};

namespace kvtier::c_api {

/// Remembers the message for `kvtier_last_error` and gives the code.
kvtier_status report(const Status& status);

/// Runs what may fail or throw: nothing leaves but a code.
template <typename Body>
kvtier_status guarded(Body&& body) noexcept {
  try {
    return report(body());
  } catch (const std::bad_alloc&) {
    return report(Status(StatusCode::kNoSpace, "the process has no memory left"));
  } catch (const std::exception& failure) {
    report(io_error(failure.what()));
    return KVTIER_INTERNAL;
  } catch (...) {
    report(io_error("an unknown failure inside the library"));
    return KVTIER_INTERNAL;
  }
}

/// The only call on a runtime at a time, or none.
class Turn {
 public:
  explicit Turn(kvtier_runtime& runtime) : flag_(runtime.entered) {
    mine_ = !flag_.test_and_set(std::memory_order_acquire);
  }
  ~Turn() {
    if (mine_) flag_.clear(std::memory_order_release);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  Status status() const {
    return mine_ ? Status() : busy("another call on this runtime is under way");
  }

 private:
  std::atomic_flag& flag_;
  bool mine_ = false;
};

/// Runs `body(runtime)` as the runtime's only call. `changes` is false for calls after which the
/// views of the last step still hold.
template <typename Body>
kvtier_status with_runtime(kvtier_runtime* runtime, bool changes, Body&& body) noexcept {
  return guarded([&]() -> Status {
    if (runtime == nullptr) return invalid_argument("runtime is NULL");
    const Turn turn(*runtime);
    KVTIER_RETURN_IF_ERROR(turn.status());
    if (changes) {
      runtime->attended = {};
      runtime->failures.clear();
    }
    return body(*runtime);
  });
}

/// Ends the prefix store where one is open.
Status close_store(kvtier_runtime& runtime);

/// A place for one more sequence, and its name once it is there.
Result<std::size_t> free_slot(const kvtier_runtime& runtime);
kvtier_sequence keep_sequence(kvtier_runtime& runtime, std::size_t index,
                              std::unique_ptr<Sequence> sequence);
Origin next_origin(kvtier_runtime& runtime);

/// The sequence of that name. `invalid_argument` for one that was freed or never was.
Result<Sequence*> find_sequence(kvtier_runtime& runtime, kvtier_sequence sequence);

template <typename Body>
kvtier_status with_sequence(kvtier_runtime* runtime, kvtier_sequence sequence, bool changes,
                            Body&& body) noexcept {
  return with_runtime(runtime, changes, [&](kvtier_runtime& inner) -> Status {
    KVTIER_ASSIGN_OR_RETURN(Sequence * found, find_sequence(inner, sequence));
    return body(inner, *found);
  });
}

/// Reads a struct that begins with its size into one of our size that holds the defaults already.
template <typename Struct>
Status read_struct(const Struct* given, const char* name, Struct& target) {
  if (given == nullptr) return invalid_argument(std::string(name) + " is NULL");
  const std::size_t size = given->struct_size;
  if (size < sizeof(std::size_t)) {
    return invalid_argument(
        fmt::format("{}.struct_size is {}; call its _init function first", name, size));
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (std::size_t i = sizeof(Struct); i < size; ++i) {
    if (bytes[i] != 0) {
      return unsupported(
          fmt::format("{} has an option at byte {} that this library ({}) does not know", name, i,
                      kvtier_version_string()));
    }
  }
  std::memcpy(&target, given, std::min(size, sizeof(Struct)));
  target.struct_size = sizeof(Struct);
  return {};
}

/// Writes as much of `value` as the caller's struct has room for; its size stays what it was.
template <typename Struct>
Status write_struct(const Struct& value, const char* name, Struct* target) {
  if (target == nullptr) return invalid_argument(std::string(name) + " is NULL");
  const std::size_t size = target->struct_size;
  if (size < sizeof(std::size_t)) {
    return invalid_argument(
        fmt::format("{0}.struct_size is {1}; set it to sizeof({0})", name, size));
  }
  std::memcpy(target, &value, std::min(size, sizeof(Struct)));
  target->struct_size = size;
  return {};
}

/// Fills a struct of the caller's size with the defaults of ours.
template <typename Struct>
Status init_struct(const Struct& defaults, const char* name, Struct* target, std::size_t size) {
  if (target == nullptr) return invalid_argument(std::string(name) + " is NULL");
  if (size < sizeof(std::size_t)) {
    return invalid_argument(fmt::format("struct_size is {}, expected sizeof({})", size, name));
  }
  std::memset(target, 0, size);
  std::memcpy(target, &defaults, std::min(size, sizeof(Struct)));
  target->struct_size = size;
  return {};
}

/// Text into the caller's memory with a closing zero; `no_space` when it does not fit.
Status write_text(const std::string& text, char* target, std::size_t capacity, std::size_t* needed);

}  // namespace kvtier::c_api
