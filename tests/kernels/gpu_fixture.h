#pragma once

#include "kernels/gpu.h"
#include "kernels/gpu_memory.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <vector>

namespace kvtier {

/// A test on a real GPU: skipped, with the reason, where there is none; any other failure to open
/// one is a failed test.
class GpuTest : public testing::Test {
 protected:
  void SetUp() override {
    Result<Gpu> gpu = Gpu::open(*calls_);
    if (!gpu.ok() && gpu.status().code() == StatusCode::kUnsupported) {
      GTEST_SKIP() << gpu.status().to_string();
    }
    ASSERT_TRUE(gpu.ok()) << gpu.status().to_string();
    gpu_.emplace(std::move(gpu).value());
    stream_.emplace(GpuStream::create(*gpu_).value());
  }

  const Gpu& gpu() const { return *gpu_; }
  StreamRef stream() const { return stream_->ref(); }
  void wait() const {
    const Status status = gpu_->synchronize(stream());
    ASSERT_TRUE(status.ok()) << status.to_string();
  }

  DeviceBuffer device_bytes(std::size_t bytes) const {
    return DeviceBuffer::allocate(*gpu_, bytes, stream()).value();
  }
  template <typename T>
  DeviceBuffer to_device(const std::vector<T>& values) const {
    DeviceBuffer buffer = device_bytes(values.size() * sizeof(T));
    const Status status = buffer.upload(std::as_bytes(std::span(values)));
    KVTIER_CHECK(status.ok(), "{}", status.to_string());
    KVTIER_CHECK(gpu_->synchronize(stream()).ok(), "the upload failed");
    return buffer;
  }
  template <typename T>
  std::vector<T> to_host(const DeviceBuffer& buffer) const {
    std::vector<T> values(buffer.size() / sizeof(T));
    const Status status = buffer.download(std::as_writable_bytes(std::span(values)));
    EXPECT_TRUE(status.ok()) << status.to_string();
    wait();
    return values;
  }
  PinnedRegion pinned_bytes(std::size_t bytes) const {
    Region region = Region::allocate({.bytes = bytes}).value();
    return PinnedRegion::pin(*gpu_, std::move(region)).value();
  }

 private:
  std::unique_ptr<CudaCalls> calls_ = make_cuda_calls();
  std::optional<Gpu> gpu_;
  std::optional<GpuStream> stream_;
};

/// Random bytes, eight at a time.
inline void fill_random(std::span<std::byte> bytes, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  for (std::size_t at = 0; at < bytes.size(); at += 8) {
    const std::uint64_t word = random();
    std::memcpy(bytes.data() + at, &word, std::min<std::size_t>(8, bytes.size() - at));
  }
}

}  // namespace kvtier
