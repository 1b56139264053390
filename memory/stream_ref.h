#pragma once

#include "memory/check.h"

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace kvtier {

/// A CUDA stream that somebody else owns: where a launcher enqueues its work.
///
/// There is always one: no default, and neither null nor the handles that stand for a default
/// stream are accepted, because work there waits for every other stream of the process. View: the
/// stream outlives what is enqueued. Cost: a pointer.
class StreamRef {
 public:
  explicit StreamRef(CUstream_st* stream) : stream_(stream) {
    KVTIER_CHECK(reinterpret_cast<std::uintptr_t>(stream) > kLastDefaultStream,
                 "stream {} is a default stream", reinterpret_cast<std::uintptr_t>(stream));
  }
  StreamRef(std::nullptr_t) = delete;
  StreamRef(int) = delete;

  CUstream_st* get() const { return stream_; }
  friend bool operator==(StreamRef a, StreamRef b) { return a.stream_ == b.stream_; }

 private:
  /// 0 is null, 1 the legacy and 2 the per-thread default stream.
  static constexpr std::uintptr_t kLastDefaultStream = 2;

  CUstream_st* stream_;
};

}  // namespace kvtier
