#pragma once

#include "kernels/cuda_calls.h"

#include <cstdlib>
#include <cstring>
#include <set>
#include <string_view>

namespace kvtier {

/// CUDA calls without a GPU: memory is the host's, copies happen at once, kernels do nothing. Any
/// call can be made to fail, which is what it is for.
class FakeCudaCalls : public CudaCalls {
 public:
  /// Calls count from 0; those from `first` on fail with `error`.
  void fail_from(int first, CudaError error) {
    first_failure_ = calls_ + first;
    error_ = error;
  }
  int calls() const { return calls_; }
  /// Streams, events, allocations and registrations that are not given back yet.
  std::size_t alive() const { return alive_.size(); }
  int launches = 0;
  int waits = 0;  ///< Of the CPU for a stream or an event.
  GpuTraits device = {.name = "fake",
                      .capability = 90,
                      .multiprocessors = 132,
                      .shared_bytes_per_block = 227 * 1024,
                      .shared_bytes_per_multiprocessor = 228 * 1024};

  CudaError count_devices(int& count) override {
    count = 1;
    return next();
  }
  CudaError open_device(int, GpuTraits& traits) override {
    traits = device;
    return next();
  }
  CudaError find_kernel(const void*) override { return next(); }
  CudaError allow_shared_bytes(const void*, std::size_t) override { return next(); }
  CudaError launch(const KernelLaunch&) override {
    ++launches;
    return next();
  }
  CudaError allocate(void** address, std::size_t bytes, CUstream_st*) override {
    return create(address, bytes);
  }
  CudaError release(void* address, CUstream_st*) override { return destroy(address); }
  CudaError pin(void* address, std::size_t) override {
    if (const CudaError error = next()) return error;
    alive_.insert(address);
    return 0;
  }
  CudaError unpin(void* address) override {
    alive_.erase(address);
    return 0;
  }
  CudaError copy(void* target, const void* source, std::size_t bytes, CUstream_st*) override {
    std::memcpy(target, source, bytes);
    return next();
  }
  CudaError copy_batch(const BatchCopy&, CUstream_st*) override { return next(); }
  CudaError fill(void* target, int byte, std::size_t bytes, CUstream_st*) override {
    std::memset(target, byte, bytes);
    return next();
  }
  CudaError create_stream(CUstream_st** stream) override {
    return create(reinterpret_cast<void**>(stream), 64);
  }
  CudaError destroy_stream(CUstream_st* stream) override { return destroy(stream); }
  CudaError synchronize(CUstream_st*) override {
    ++waits;
    return next();
  }
  CudaError create_event(CUevent_st** event) override {
    return create(reinterpret_cast<void**>(event), 64);
  }
  CudaError destroy_event(CUevent_st* event) override { return destroy(event); }
  CudaError record(CUevent_st*, CUstream_st*) override { return next(); }
  CudaError wait_event(CUevent_st*) override {
    ++waits;
    return next();
  }
  CudaError elapsed_ms(CUevent_st*, CUevent_st*, float& ms) override {
    ms = 1.5f;
    return next();
  }
  CudaError stream_wait(CUstream_st*, CUevent_st*) override { return next(); }
  CudaError begin_capture(CUstream_st*) override { return next(); }
  CudaError end_capture(CUstream_st*, CUgraphExec_st** graph) override {
    return create(reinterpret_cast<void**>(graph), 64);
  }
  CudaError launch_graph(CUgraphExec_st*, CUstream_st*) override { return next(); }
  CudaError destroy_graph(CUgraphExec_st* graph) override { return destroy(graph); }
  std::string_view describe(CudaError) override { return "an injected error"; }

 private:
  CudaError next() { return calls_++ >= first_failure_ ? error_ : 0; }
  CudaError create(void** address, std::size_t bytes) {
    if (const CudaError error = next()) return error;
    *address = std::malloc(bytes);
    alive_.insert(*address);
    return 0;
  }
  /// Never counted: destructors must work after every failure.
  CudaError destroy(void* address) {
    alive_.erase(address);
    std::free(address);
    return 0;
  }

  int calls_ = 0;
  int first_failure_ = 1 << 30;
  CudaError error_ = 0;
  std::set<void*> alive_;
};

}  // namespace kvtier
