#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>

namespace kvtier {

/// What is asked of PyTorch: `calls` calls of `queries` queries over `tokens` tokens each.
struct TorchRequest {
  std::uint32_t head_dim = 0;
  std::uint32_t group = 0;
  std::uint32_t kv_heads = 0;
  std::size_t tokens = 0;
  std::size_t calls = 0;
  unsigned threads = 0;
  /// Which part of the peer's own region to start at, so that repetitions stay cold.
  std::size_t repetition = 0;
  std::size_t queries = 1;        ///< Not masked.
  std::size_t element_bytes = 2;  ///< float16, or 4: float32.
};

/// A Python process with PyTorch that is asked for one repetition at a time, so that both sides
/// are measured in turns. Owns the process; ends it in the destructor by closing its input.
class TorchPeer {
 public:
  /// None when the interpreter or its torch module is not there.
  static std::unique_ptr<TorchPeer> start(const std::string& python, std::size_t region_bytes);
  ~TorchPeer();
  TorchPeer(const TorchPeer&) = delete;
  TorchPeer& operator=(const TorchPeer&) = delete;

  /// "2.4.1+cpu".
  const std::string& version() const { return version_; }
  /// Seconds of one repetition; none when the peer failed, after which it answers no more.
  std::optional<double> seconds(const TorchRequest& request);

 private:
  TorchPeer() = default;
  std::optional<std::string> read_line();

  pid_t process_ = -1;
  FILE* requests_ = nullptr;
  FILE* answers_ = nullptr;
  std::string version_;
};

}  // namespace kvtier
