#include "kernels/gpu_memory.h"

#include <utility>

namespace kvtier {

Result<GpuStream> GpuStream::create(const Gpu& gpu) {
  CUstream_st* stream = nullptr;
  KVTIER_RETURN_IF_ERROR(
      cuda_status(gpu.calls(), gpu.calls().create_stream(&stream), "creating a stream"));
  return GpuStream(gpu.calls(), stream);
}

GpuStream::GpuStream(GpuStream&& other) noexcept
    : calls_(other.calls_), stream_(std::exchange(other.stream_, nullptr)) {}

GpuStream::~GpuStream() {
  if (stream_ != nullptr) calls_->destroy_stream(stream_);
}

Result<DeviceBuffer> DeviceBuffer::allocate(const Gpu& gpu, std::size_t bytes, StreamRef stream,
                                            const DeviceAllocator& allocator) {
  KVTIER_CHECK((allocator.allocate == nullptr) == (allocator.release == nullptr),
               "an allocator needs both of its functions");
  DeviceBuffer buffer(gpu.calls(), stream, allocator);
  if (bytes == 0) return buffer;
  void* address = nullptr;
  const CudaError error = allocator.allocate != nullptr
                              ? allocator.allocate(allocator.context, &address, bytes, stream.get())
                              : gpu.calls().allocate(&address, bytes, stream.get());
  KVTIER_RETURN_IF_ERROR(
      cuda_status(gpu.calls(), error, fmt::format("allocating {} bytes of GPU memory", bytes)));
  buffer.data_ = static_cast<std::byte*>(address);
  buffer.bytes_ = bytes;
  return buffer;
}

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : calls_(other.calls_),
      stream_(other.stream_),
      allocator_(other.allocator_),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

DeviceBuffer::~DeviceBuffer() {
  if (data_ == nullptr) return;
  if (allocator_.release != nullptr) {
    allocator_.release(allocator_.context, data_, stream_.get());
  } else {
    calls_->release(data_, stream_.get());
  }
}

Status DeviceBuffer::upload(std::span<const std::byte> bytes, std::size_t offset) const {
  KVTIER_CHECK(offset + bytes.size() <= bytes_, "{} bytes at {} of {}", bytes.size(), offset,
               bytes_);
  if (bytes.empty()) return {};
  return cuda_status(*calls_,
                     calls_->copy(data_ + offset, bytes.data(), bytes.size(), stream_.get()),
                     "copying to the GPU");
}

Status DeviceBuffer::download(std::span<std::byte> bytes, std::size_t offset) const {
  KVTIER_CHECK(offset + bytes.size() <= bytes_, "{} bytes at {} of {}", bytes.size(), offset,
               bytes_);
  if (bytes.empty()) return {};
  return cuda_status(*calls_,
                     calls_->copy(bytes.data(), data_ + offset, bytes.size(), stream_.get()),
                     "copying from the GPU");
}

Status DeviceBuffer::fill(int byte) const {
  if (bytes_ == 0) return {};
  return cuda_status(*calls_, calls_->fill(data_, byte, bytes_, stream_.get()),
                     "filling GPU memory");
}

Result<PinnedRegion> PinnedRegion::pin(const Gpu& gpu, Region region) {
  const std::span<std::byte> bytes = region.bytes();
  KVTIER_RETURN_IF_ERROR(cuda_status(gpu.calls(), gpu.calls().pin(bytes.data(), bytes.size()),
                                     fmt::format("page-locking {} bytes", bytes.size())));
  return PinnedRegion(gpu.calls(), std::move(region));
}

PinnedRegion::PinnedRegion(PinnedRegion&& other) noexcept
    : calls_(std::exchange(other.calls_, nullptr)), region_(std::move(other.region_)) {}

PinnedRegion::~PinnedRegion() {
  if (calls_ != nullptr) calls_->unpin(region_.bytes().data());
}

Result<GpuGraph> GpuGraph::capture(const Gpu& gpu, StreamRef stream,
                                   const std::function<Status()>& enqueue) {
  CudaCalls& calls = gpu.calls();
  KVTIER_RETURN_IF_ERROR(
      cuda_status(calls, calls.begin_capture(stream.get()), "beginning a capture"));
  const Status enqueued = enqueue();
  // Ended in any case: a stream that captures can do nothing else.
  CUgraphExec_st* graph = nullptr;
  const Status ended =
      cuda_status(calls, calls.end_capture(stream.get(), &graph), "ending a capture");
  if (!ended.ok()) return enqueued.ok() ? ended : enqueued;
  GpuGraph captured(calls, graph);
  if (!enqueued.ok()) return enqueued;
  return captured;
}

GpuGraph::GpuGraph(GpuGraph&& other) noexcept
    : calls_(other.calls_), graph_(std::exchange(other.graph_, nullptr)) {}

GpuGraph::~GpuGraph() {
  if (graph_ != nullptr) calls_->destroy_graph(graph_);
}

Status GpuGraph::launch(StreamRef stream) const {
  return cuda_status(*calls_, calls_->launch_graph(graph_, stream.get()), "launching a graph");
}

Result<GpuEvent> GpuEvent::create(const Gpu& gpu) {
  CUevent_st* event = nullptr;
  KVTIER_RETURN_IF_ERROR(
      cuda_status(gpu.calls(), gpu.calls().create_event(&event), "creating an event"));
  return GpuEvent(gpu.calls(), event);
}

GpuEvent::GpuEvent(GpuEvent&& other) noexcept
    : calls_(other.calls_), event_(std::exchange(other.event_, nullptr)) {}

GpuEvent::~GpuEvent() {
  if (event_ != nullptr) calls_->destroy_event(event_);
}

Status GpuEvent::order(StreamRef before, StreamRef after) const {
  KVTIER_RETURN_IF_ERROR(
      cuda_status(*calls_, calls_->record(event_, before.get()), "recording an event"));
  return cuda_status(*calls_, calls_->stream_wait(after.get(), event_), "ordering two streams");
}

Result<GpuTimer> GpuTimer::create(const Gpu& gpu) {
  GpuTimer timer(gpu.calls());
  for (CUevent_st** event : {&timer.begin_, &timer.end_}) {
    KVTIER_RETURN_IF_ERROR(
        cuda_status(gpu.calls(), gpu.calls().create_event(event), "creating an event"));
  }
  return timer;
}

GpuTimer::GpuTimer(GpuTimer&& other) noexcept
    : calls_(other.calls_),
      begin_(std::exchange(other.begin_, nullptr)),
      end_(std::exchange(other.end_, nullptr)) {}

GpuTimer::~GpuTimer() {
  if (begin_ != nullptr) calls_->destroy_event(begin_);
  if (end_ != nullptr) calls_->destroy_event(end_);
}

Status GpuTimer::start(StreamRef stream) const {
  return cuda_status(*calls_, calls_->record(begin_, stream.get()), "recording an event");
}

Status GpuTimer::stop(StreamRef stream) const {
  return cuda_status(*calls_, calls_->record(end_, stream.get()), "recording an event");
}

Result<double> GpuTimer::elapsed_us() const {
  KVTIER_RETURN_IF_ERROR(cuda_status(*calls_, calls_->wait_event(end_), "waiting for an event"));
  float ms = 0.0f;
  KVTIER_RETURN_IF_ERROR(
      cuda_status(*calls_, calls_->elapsed_ms(begin_, end_, ms), "timing by events"));
  return double{ms} * 1000.0;
}

}  // namespace kvtier
