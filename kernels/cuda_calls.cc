#include "kernels/cuda_calls.h"

#ifdef KVTIER_CUDA
#include <cuda_runtime_api.h>
#endif

namespace kvtier {
namespace {

// The numbers are part of CUDA's interface; named here so that a build without CUDA knows them too.
constexpr CudaError kOutOfMemory = 2;
constexpr CudaError kInsufficientDriver = 35;
constexpr CudaError kNoDevice = 100;
constexpr CudaError kInvalidDevice = 101;
constexpr CudaError kNoKernelImage = 209;
constexpr CudaError kUnsupportedPtx = 222;
constexpr CudaError kNotReady = 600;
constexpr CudaError kNotSupported = 801;
constexpr CudaError kHostMemoryNotRegistered = 713;
constexpr CudaError kInvalidValue = 1;

#ifdef KVTIER_CUDA

class CudaRuntime final : public CudaCalls {
 public:
  CudaError count_devices(int& count) override { return cudaGetDeviceCount(&count); }

  CudaError open_device(int ordinal, GpuTraits& traits) override {
    if (const CudaError error = cudaSetDevice(ordinal)) return error;
    cudaDeviceProp properties;
    if (const CudaError error = cudaGetDeviceProperties(&properties, ordinal)) return error;
    traits.name = properties.name;
    traits.ordinal = ordinal;
    traits.capability = 10 * properties.major + properties.minor;
    traits.multiprocessors = static_cast<unsigned>(properties.multiProcessorCount);
    traits.shared_bytes_per_block = properties.sharedMemPerBlockOptin;
    traits.shared_bytes_per_multiprocessor = properties.sharedMemPerMultiprocessor;
    traits.memory_bytes = properties.totalGlobalMem;
    traits.l2_bytes = static_cast<std::size_t>(properties.l2CacheSize);
    return cudaDriverGetVersion(&traits.driver);
  }

  CudaError find_kernel(const void* kernel) override {
    cudaFuncAttributes attributes;
    return take(cudaFuncGetAttributes(&attributes, kernel));
  }
  CudaError allow_shared_bytes(const void* kernel, std::size_t bytes) override {
    return take(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(bytes)));
  }
  CudaError launch(const KernelLaunch& launch) override {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);
    config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = launch.stream;
    config.attrs = &early;
    config.numAttrs = launch.early ? 1 : 0;
    return take(cudaLaunchKernelExC(&config, launch.kernel, launch.arguments));
  }

  CudaError allocate(void** address, std::size_t bytes, CUstream_st* stream) override {
    return take(cudaMallocAsync(address, bytes, stream));
  }
  CudaError release(void* address, CUstream_st* stream) override {
    return take(cudaFreeAsync(address, stream));
  }
  CudaError pin(void* address, std::size_t bytes) override {
    return take(cudaHostRegister(address, bytes, cudaHostRegisterPortable));
  }
  CudaError unpin(void* address) override { return take(cudaHostUnregister(address)); }
  CudaError copy(void* target, const void* source, std::size_t bytes,
                 CUstream_st* stream) override {
    return take(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, stream));
  }
  CudaError copy_batch(const BatchCopy& batch, CUstream_st* stream) override;
  CudaError fill(void* target, int byte, std::size_t bytes, CUstream_st* stream) override {
    return take(cudaMemsetAsync(target, byte, bytes, stream));
  }

  CudaError create_stream(CUstream_st** stream) override {
    return take(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking));
  }
  CudaError destroy_stream(CUstream_st* stream) override { return cudaStreamDestroy(stream); }
  CudaError synchronize(CUstream_st* stream) override {
    return take(cudaStreamSynchronize(stream));
  }
  CudaError create_event(CUevent_st** event) override { return take(cudaEventCreate(event)); }
  CudaError destroy_event(CUevent_st* event) override { return cudaEventDestroy(event); }
  CudaError record(CUevent_st* event, CUstream_st* stream) override {
    return take(cudaEventRecord(event, stream));
  }
  CudaError wait_event(CUevent_st* event) override { return take(cudaEventSynchronize(event)); }
  CudaError elapsed_ms(CUevent_st* begin, CUevent_st* end, float& ms) override {
    return take(cudaEventElapsedTime(&ms, begin, end));
  }
  CudaError stream_wait(CUstream_st* stream, CUevent_st* event) override {
    return take(cudaStreamWaitEvent(stream, event, 0));
  }

  CudaError begin_capture(CUstream_st* stream) override {
    return take(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  }
  CudaError end_capture(CUstream_st* stream, CUgraphExec_st** graph) override {
    cudaGraph_t captured = nullptr;
    if (const CudaError error = take(cudaStreamEndCapture(stream, &captured))) return error;
    const CudaError error = take(cudaGraphInstantiate(graph, captured, 0));
    cudaGraphDestroy(captured);
    return error;
  }
  CudaError launch_graph(CUgraphExec_st* graph, CUstream_st* stream) override {
    return take(cudaGraphLaunch(graph, stream));
  }
  CudaError destroy_graph(CUgraphExec_st* graph) override { return cudaGraphExecDestroy(graph); }

  std::string_view describe(CudaError error) override {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
  }

 private:
  /// The runtime also keeps a failed call's error for whoever asks next: it has been reported here.
  static CudaError take(cudaError_t error) {
    if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
    return error;
  }
};

CudaError CudaRuntime::copy_batch([[maybe_unused]] const BatchCopy& batch,
                                  [[maybe_unused]] CUstream_st* stream) {
#if CUDART_VERSION >= 12080
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  std::size_t first = 0;
#if CUDART_VERSION >= 13000
  return take(cudaMemcpyBatchAsync(batch.targets, batch.sources, batch.bytes, batch.count,
                                   &attributes, &first, 1, stream));
#else
  std::size_t failed = 0;
  return take(cudaMemcpyBatchAsync(
      const_cast<void**>(batch.targets), const_cast<void**>(batch.sources),
      const_cast<std::size_t*>(batch.bytes), batch.count, &attributes, &first, 1, &failed, stream));
#endif
#else
  return kNotSupported;
#endif
}

#else

/// What is there without CUDA: no device, and therefore nothing else to call.
class NoCuda final : public CudaCalls {
 public:
  CudaError count_devices(int&) override { return kNoDevice; }
  CudaError open_device(int, GpuTraits&) override { return kNoDevice; }
  CudaError find_kernel(const void*) override { return kNoDevice; }
  CudaError allow_shared_bytes(const void*, std::size_t) override { return kNoDevice; }
  CudaError launch(const KernelLaunch&) override { return kNoDevice; }
  CudaError allocate(void**, std::size_t, CUstream_st*) override { return kNoDevice; }
  CudaError release(void*, CUstream_st*) override { return kNoDevice; }
  CudaError pin(void*, std::size_t) override { return kNoDevice; }
  CudaError unpin(void*) override { return kNoDevice; }
  CudaError copy(void*, const void*, std::size_t, CUstream_st*) override { return kNoDevice; }
  CudaError copy_batch(const BatchCopy&, CUstream_st*) override { return kNoDevice; }
  CudaError fill(void*, int, std::size_t, CUstream_st*) override { return kNoDevice; }
  CudaError create_stream(CUstream_st**) override { return kNoDevice; }
  CudaError destroy_stream(CUstream_st*) override { return kNoDevice; }
  CudaError synchronize(CUstream_st*) override { return kNoDevice; }
  CudaError create_event(CUevent_st**) override { return kNoDevice; }
  CudaError destroy_event(CUevent_st*) override { return kNoDevice; }
  CudaError record(CUevent_st*, CUstream_st*) override { return kNoDevice; }
  CudaError wait_event(CUevent_st*) override { return kNoDevice; }
  CudaError elapsed_ms(CUevent_st*, CUevent_st*, float&) override { return kNoDevice; }
  CudaError stream_wait(CUstream_st*, CUevent_st*) override { return kNoDevice; }
  CudaError begin_capture(CUstream_st*) override { return kNoDevice; }
  CudaError end_capture(CUstream_st*, CUgraphExec_st**) override { return kNoDevice; }
  CudaError launch_graph(CUgraphExec_st*, CUstream_st*) override { return kNoDevice; }
  CudaError destroy_graph(CUgraphExec_st*) override { return kNoDevice; }
  std::string_view describe(CudaError) override { return "this kvtier was built without CUDA"; }
};

#endif

}  // namespace

std::unique_ptr<CudaCalls> make_cuda_calls() {
#ifdef KVTIER_CUDA
  return std::make_unique<CudaRuntime>();
#else
  return std::make_unique<NoCuda>();
#endif
}

Status cuda_status(CudaCalls& calls, CudaError error, std::string_view what) {
  if (error == 0) return {};
  std::string message = fmt::format("{}: {} (CUDA error {})", what, calls.describe(error), error);
  switch (error) {
    case kOutOfMemory: return no_space(std::move(message));
    case kNotReady: return busy(std::move(message));
    case kInvalidValue:
    case kInsufficientDriver:
    case kNoDevice:
    case kInvalidDevice:
    case kNoKernelImage:
    case kUnsupportedPtx:
    case kHostMemoryNotRegistered:
    case kNotSupported: return unsupported(std::move(message));
    default: return io_error(std::move(message));
  }
}

}  // namespace kvtier
