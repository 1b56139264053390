#pragma once

#include "memory/status.h"

#include <array>
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

struct CUstream_st;
struct CUevent_st;
struct CUgraphExec_st;

namespace kvtier {

/// What the CUDA runtime answers: its error number, 0 for success.
using CudaError = int;

/// What to know of a GPU to choose kernels and their shapes.
struct GpuTraits {
  std::string name;
  int ordinal = 0;
  int capability = 0;  ///< 10 * major + minor: 90 is an H100.
  unsigned multiprocessors = 0;
  std::size_t shared_bytes_per_block = 0;  ///< The most that a kernel may ask for.
  std::size_t shared_bytes_per_multiprocessor = 0;
  std::size_t memory_bytes = 0;
  std::size_t l2_bytes = 0;
  int driver = 0;  ///< CUDA version of the driver: 13000 is 13.0.
};

struct KernelLaunch {
  const void* kernel = nullptr;
  std::array<unsigned, 3> grid = {1, 1, 1};
  unsigned threads = 0;
  std::size_t shared_bytes = 0;
  void** arguments = nullptr;
  CUstream_st* stream = nullptr;
  /// Let the kernel start while the one before it on the stream ends; it waits for that one's
  /// results itself (`wait_for_previous_kernel`). From sm_90 on.
  bool early = false;
};

/// One piece of a batch of copies.
struct BatchCopy {
  void* const* targets = nullptr;  ///< [count]
  void* const* sources = nullptr;  ///< [count]
  const std::size_t* bytes = nullptr;
  std::size_t count = 0;
};

/// Every CUDA call that the library makes, so that a test can make any of them fail by wrapping it.
/// Nothing here throws or prints. Thread-safe, as the runtime itself is.
class CudaCalls {
 public:
  virtual ~CudaCalls() = default;

  virtual CudaError count_devices(int& count) = 0;
  /// Fills in everything; makes `ordinal` the calling thread's device.
  virtual CudaError open_device(int ordinal, GpuTraits& traits) = 0;
  /// Fails if no machine code or PTX in this program runs on the device.
  virtual CudaError find_kernel(const void* kernel) = 0;
  virtual CudaError allow_shared_bytes(const void* kernel, std::size_t bytes) = 0;
  virtual CudaError launch(const KernelLaunch& launch) = 0;

  virtual CudaError allocate(void** address, std::size_t bytes, CUstream_st* stream) = 0;
  virtual CudaError release(void* address, CUstream_st* stream) = 0;
  virtual CudaError pin(void* address, std::size_t bytes) = 0;
  virtual CudaError unpin(void* address) = 0;
  virtual CudaError copy(void* target, const void* source, std::size_t bytes,
                         CUstream_st* stream) = 0;
  /// Error 801 (not supported) where the toolkit or the driver is older than 12.8.
  virtual CudaError copy_batch(const BatchCopy& batch, CUstream_st* stream) = 0;
  virtual CudaError fill(void* target, int byte, std::size_t bytes, CUstream_st* stream) = 0;

  virtual CudaError create_stream(CUstream_st** stream) = 0;
  virtual CudaError destroy_stream(CUstream_st* stream) = 0;
  virtual CudaError synchronize(CUstream_st* stream) = 0;
  virtual CudaError create_event(CUevent_st** event) = 0;
  virtual CudaError destroy_event(CUevent_st* event) = 0;
  virtual CudaError record(CUevent_st* event, CUstream_st* stream) = 0;
  virtual CudaError wait_event(CUevent_st* event) = 0;
  virtual CudaError elapsed_ms(CUevent_st* begin, CUevent_st* end, float& ms) = 0;
  /// What is enqueued on the stream from now on waits for what was recorded last.
  virtual CudaError stream_wait(CUstream_st* stream, CUevent_st* event) = 0;

  /// What is enqueued on the stream between these two is not run, but kept as a graph.
  virtual CudaError begin_capture(CUstream_st* stream) = 0;
  virtual CudaError end_capture(CUstream_st* stream, CUgraphExec_st** graph) = 0;
  virtual CudaError launch_graph(CUgraphExec_st* graph, CUstream_st* stream) = 0;
  virtual CudaError destroy_graph(CUgraphExec_st* graph) = 0;

  virtual std::string_view describe(CudaError error) = 0;
};

/// The real runtime, or, in a build without CUDA, calls that find no device.
std::unique_ptr<CudaCalls> make_cuda_calls();

/// `no_space` for exhausted memory, `unsupported` for what this machine, driver or program cannot
/// do, `busy` for what is not ready, `io_error` for everything after which the device is lost.
Status cuda_status(CudaCalls& calls, CudaError error, std::string_view what);

}  // namespace kvtier
