#pragma once

#include "kernels/gpu.h"
#include "memory/region.h"
#include "memory/status.h"
#include "memory/stream_ref.h"

#include <cstddef>
#include <functional>
#include <span>

// Owners of what the GPU's driver hands out. Each is move-only and releases in its destructor,
// which waits for nothing. The `CudaCalls` behind the `Gpu` outlive them.

namespace kvtier {

/// Where device memory comes from: the engine's own allocator, so that both share one pool.
/// Stream-ordered: the memory is usable on `stream` at once, and released behind its work.
struct DeviceAllocator {
  void* context = nullptr;
  /// None: `cudaMallocAsync` and `cudaFreeAsync`.
  CudaError (*allocate)(void* context, void** address, std::size_t bytes,
                        CUstream_st* stream) = nullptr;
  CudaError (*release)(void* context, void* address, CUstream_st* stream) = nullptr;
};

/// A non-blocking stream.
class GpuStream {
 public:
  static Result<GpuStream> create(const Gpu& gpu);
  GpuStream(GpuStream&& other) noexcept;
  GpuStream& operator=(GpuStream&&) = delete;
  ~GpuStream();

  StreamRef ref() const { return StreamRef(stream_); }

 private:
  GpuStream(CudaCalls& calls, CUstream_st* stream) : calls_(&calls), stream_(stream) {}
  CudaCalls* calls_;
  CUstream_st* stream_;
};

/// A range of device memory; uninitialised. The stream it was allocated on outlives it.
class DeviceBuffer {
 public:
  static Result<DeviceBuffer> allocate(const Gpu& gpu, std::size_t bytes, StreamRef stream,
                                       const DeviceAllocator& allocator = {});
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&&) = delete;
  ~DeviceBuffer();

  /// Not to be dereferenced on the CPU.
  std::byte* data() const { return data_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  std::size_t size() const { return bytes_; }

  /// Enqueue a copy of `bytes.size()` bytes; the host side stays alive until the stream is there.
  Status upload(std::span<const std::byte> bytes, std::size_t offset = 0) const;
  Status download(std::span<std::byte> bytes, std::size_t offset = 0) const;
  Status fill(int byte) const;

 private:
  DeviceBuffer(CudaCalls& calls, StreamRef stream, const DeviceAllocator& allocator)
      : calls_(&calls), stream_(stream), allocator_(allocator) {}

  CudaCalls* calls_;
  StreamRef stream_;
  DeviceAllocator allocator_;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// A region that the GPU reads and writes at its own address.
class PinnedRegion {
 public:
  /// Registers the region's pages: about 0.65 s per GiB. `no_space` where the limit is reached.
  static Result<PinnedRegion> pin(const Gpu& gpu, Region region);
  PinnedRegion(PinnedRegion&& other) noexcept;
  PinnedRegion& operator=(PinnedRegion&&) = delete;
  ~PinnedRegion();

  std::span<std::byte> bytes() const { return region_.bytes(); }
  const RegionStats& stats() const { return region_.stats(); }

 private:
  PinnedRegion(CudaCalls& calls, Region region) : calls_(&calls), region_(std::move(region)) {}
  CudaCalls* calls_;
  Region region_;
};

/// Work that was captured from a stream and is replayed as one launch.
class GpuGraph {
 public:
  /// Runs `enqueue`, which enqueues on `stream` only, without executing what it enqueues.
  static Result<GpuGraph> capture(const Gpu& gpu, StreamRef stream,
                                  const std::function<Status()>& enqueue);
  GpuGraph(GpuGraph&& other) noexcept;
  GpuGraph& operator=(GpuGraph&&) = delete;
  ~GpuGraph();

  Status launch(StreamRef stream) const;

 private:
  GpuGraph(CudaCalls& calls, CUgraphExec_st* graph) : calls_(&calls), graph_(graph) {}
  CudaCalls* calls_;
  CUgraphExec_st* graph_;
};

/// A point in one stream's work that another stream can wait for. In a capture the other stream's
/// work becomes part of the graph.
class GpuEvent {
 public:
  static Result<GpuEvent> create(const Gpu& gpu);
  GpuEvent(GpuEvent&& other) noexcept;
  GpuEvent& operator=(GpuEvent&&) = delete;
  ~GpuEvent();

  /// What `after` is given from now on waits for what `before` was given until now.
  Status order(StreamRef before, StreamRef after) const;

 private:
  GpuEvent(CudaCalls& calls, CUevent_st* event) : calls_(&calls), event_(event) {}
  CudaCalls* calls_;
  CUevent_st* event_;
};

/// Time that work on one stream takes, from `start` to `stop`, by events.
class GpuTimer {
 public:
  static Result<GpuTimer> create(const Gpu& gpu);
  GpuTimer(GpuTimer&& other) noexcept;
  GpuTimer& operator=(GpuTimer&&) = delete;
  ~GpuTimer();

  Status start(StreamRef stream) const;
  Status stop(StreamRef stream) const;
  /// Waits for `stop` to be reached.
  Result<double> elapsed_us() const;

 private:
  explicit GpuTimer(CudaCalls& calls) : calls_(&calls) {}
  CudaCalls* calls_;
  CUevent_st* begin_ = nullptr;
  CUevent_st* end_ = nullptr;
};

}  // namespace kvtier
