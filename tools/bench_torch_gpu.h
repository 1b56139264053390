#pragma once

#include <sys/types.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>

namespace kvtier {

/// One decode step of PyTorch's scaled_dot_product_attention on the GPU: bfloat16, 8 KV heads of
/// 128, 32 query heads, contiguous keys and values in GPU memory.
struct TorchGpuRequest {
  std::uint32_t batch = 1;
  std::uint32_t tokens = 0;
  /// Different tensors that are attended in turn, so that none is found in the cache.
  std::uint32_t sets = 1;
};

struct TorchGpuAnswer {
  double us = 0;        ///< Median of one step, replayed from a CUDA graph.
  std::string backend;  ///< The fastest of those that run.
};

/// A Python process with PyTorch. Owns it; ends it by closing its input.
class TorchGpuPeer {
 public:
  /// None when the interpreter, its torch module or its GPU is not there.
  static std::unique_ptr<TorchGpuPeer> start(const std::string& python);
  ~TorchGpuPeer();
  TorchGpuPeer(const TorchGpuPeer&) = delete;
  TorchGpuPeer& operator=(const TorchGpuPeer&) = delete;

  const std::string& version() const { return version_; }
  std::optional<TorchGpuAnswer> measure(const TorchGpuRequest& request);

 private:
  TorchGpuPeer() = default;
  std::optional<std::string> read_line();

  pid_t process_ = -1;
  FILE* requests_ = nullptr;
  FILE* answers_ = nullptr;
  std::string version_;
};

}  // namespace kvtier
