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
#include <stdexcept>
#include <string>
#include <vector>

/// Behind the handle of the C ABI: a runtime with the world that it borrows.
struct kvtier_runtime {
  kvtier_runtime();
  ~kvtier_runtime();

  struct Slot {
    std::unique_ptr<kvtier::Sequence> sequence;
    std::uint32_t number = 0;  ///< Of the sequence that is here.
  };

  kvtier::SteadyClock clock;
  std::unique_ptr<kvtier::Timeline> timeline;
  std::unique_ptr<kvtier::Device> device;
  std::unique_ptr<kvtier::Link> link;
  std::unique_ptr<kvtier::File> disk;
  std::unique_ptr<kvtier::Runtime> runtime;
  kvtier::RuntimeOptions options;
  std::vector<Slot> slots;  ///< At most `sequences_max`.
  /// Sequences are numbered from a random number on, so that one of another runtime is noticed.
  std::uint32_t first_number = 0;
  std::uint32_t next_number = 0;
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
  /// A call was left by an exception: nobody knows what it had changed, so nothing is asked again.
  bool broken = false;
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
kvtier_status report(const Status& status) noexcept;
kvtier_status report(kvtier_status code, const char* message) noexcept;

/// Runs what may fail or throw: nothing leaves but a code.
template <typename Body>
kvtier_status guarded(Body&& body) noexcept {
  try {
    return report(body());
  } catch (const std::bad_alloc&) {
    return report(KVTIER_NO_SPACE, "the process has no memory left");
  } catch (const std::exception& failure) {
    return report(KVTIER_INTERNAL, failure.what());
  } catch (...) {
    return report(KVTIER_INTERNAL, "an unknown failure inside the library");
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
/// views of the last step still hold. An exception that leaves a call that changes something is the
/// runtime's last.
template <typename Body>
kvtier_status with_runtime(kvtier_runtime* runtime, bool changes, Body&& body) noexcept {
  bool broke = false;
  const kvtier_status status = guarded([&]() -> Status {
    if (runtime == nullptr) return invalid_argument("runtime is NULL");
    const Turn turn(*runtime);
    KVTIER_RETURN_IF_ERROR(turn.status());
    if (runtime->broken) {
      throw std::runtime_error("an earlier call failed inside the library; close the runtime");
    }
    if (changes) {
      runtime->attended = {};
      runtime->failures.clear();
    }
    broke = runtime->broken = changes;
    Status done = body(*runtime);
    broke = runtime->broken = false;
    return done;
  });
  return broke ? KVTIER_INTERNAL : status;
}

/// Pointers of the caller's must be to host memory while there is no CUDA runtime; a device pointer
/// cannot be told from a bad one, so callers say what theirs are.
Status check_memory(int memory, const void* stream, const char* name);

/// Ends the prefix store where one is open.
Status close_store(kvtier_runtime& runtime);

/// A place for one more sequence, and its name once it is there.
Result<std::size_t> free_slot(kvtier_runtime& runtime);
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

/// More than any version adds; a size beyond it was never set.
inline constexpr std::size_t kStructGrowthMax = 4096;

/// Reads a struct that begins with its size into one of our size that holds the defaults already.
template <typename Struct>
Status read_struct(const Struct* given, const char* name, Struct& target) {
  if (given == nullptr) return invalid_argument(std::string(name) + " is NULL");
  const std::size_t size = given->struct_size;
  if (size < sizeof(std::size_t) || size > sizeof(Struct) + kStructGrowthMax) {
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

/// Writes as much of `value` as the caller's struct has room for, and zero behind it; its size
/// stays what it was.
template <typename Struct>
Status write_struct(const Struct& value, const char* name, Struct* target) {
  if (target == nullptr) return invalid_argument(std::string(name) + " is NULL");
  const std::size_t size = target->struct_size;
  if (size < sizeof(std::size_t) || size > sizeof(Struct) + kStructGrowthMax) {
    return invalid_argument(
        fmt::format("{0}.struct_size is {1}; set it to sizeof({0})", name, size));
  }
  std::memcpy(target, &value, std::min(size, sizeof(Struct)));
  if (size > sizeof(Struct)) {
    std::memset(reinterpret_cast<unsigned char*>(target) + sizeof(Struct), 0,
                size - sizeof(Struct));
  }
  target->struct_size = size;
  return {};
}

/// Fills a struct of the caller's size with the defaults of ours.
template <typename Struct>
Status init_struct(const Struct& defaults, const char* name, Struct* target, std::size_t size) {
  if (target == nullptr) return invalid_argument(std::string(name) + " is NULL");
  if (size < sizeof(std::size_t) || size > sizeof(Struct) + kStructGrowthMax) {
    return invalid_argument(fmt::format("struct_size is {}, expected sizeof({})", size, name));
  }
  std::memset(target, 0, size);
  std::memcpy(target, &defaults, std::min(size, sizeof(Struct)));
  target->struct_size = size;
  return {};
}

/// What stands in a C enum, which may be anything an int can hold; C++ may not even look at it as
/// an enum.
template <typename Enum>
int raw_value(const Enum& given) {
  static_assert(sizeof(Enum) == sizeof(int));
  int value = 0;
  std::memcpy(&value, &given, sizeof(value));
  return value;
}

/// Text into the caller's memory with a closing zero; `no_space` when it does not fit.
Status write_text(const std::string& text, char* target, std::size_t capacity, std::size_t* needed);

}  // namespace kvtier::c_api
