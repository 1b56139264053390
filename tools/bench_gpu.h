#pragma once

#include "kernels/gpu.h"
#include "kernels/gpu_memory.h"
#include "memory/status.h"

#include <nlohmann/json.hpp>

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace kvtier {

struct GpuBenchOptions {
  /// "table" or "json".
  std::string format = "table";
  /// Python interpreter that may have PyTorch to compare with; empty: do not compare.
  std::string python = "python3";
  /// Every figure is the median of as many interleaved repetitions.
  unsigned repetitions = 9;
  /// Memory that blocks lie in at random places: page-locked for `gather`, the GPU's for
  /// `attention`.
  std::size_t region_bytes = std::size_t{16} << 30;
};

/// Scattered copies between page-locked memory and the GPU, against large copies and the driver's
/// ways to copy many blocks. Returns the process's exit code.
int run_bench_gather(const GpuBenchOptions& options);
/// Attention over resident slots, against the rate at which memory is read and PyTorch.
int run_bench_gpu_attention(const GpuBenchOptions& options);

/// Scoring of landmarks and choosing the best, at the rate at which memory is read.
int run_bench_gpu_select(const GpuBenchOptions& options);

/// Microseconds of one kind of work over the repetitions.
struct GpuSamples {
  double median = 0;
  double least = 0;
  double most = 0;
};

/// A GPU with a stream, and interleaved timing of what is enqueued on it.
class GpuBench {
 public:
  static Result<GpuBench> open();

  const Gpu& gpu() const { return *gpu_; }
  StreamRef stream() const { return stream_->ref(); }
  Status wait() const { return gpu_->synchronize(stream()); }

  /// Runs every work once to warm up, then all in turn, `repetitions` times.
  Result<std::vector<GpuSamples>> measure(std::span<const std::function<Status()>> works,
                                          unsigned repetitions) const;

  /// Names of the machine's parts, for the head of a report.
  nlohmann::ordered_json machine() const;

 private:
  std::unique_ptr<CudaCalls> calls_;
  std::unique_ptr<Gpu> gpu_;
  std::unique_ptr<GpuStream> stream_;
};

/// Prints rows of equal keys as a table, or everything as JSON.
void print_gpu_report(const GpuBenchOptions& options, const std::string& name,
                      const nlohmann::ordered_json& machine, const nlohmann::ordered_json& rows);

/// 2 for options that make no sense, 5 for a missing GPU, 1 for everything else.
int gpu_bench_failure(const char* name, const Status& status);

}  // namespace kvtier
