#include "kernels/gpu.h"

#include "kernels/gpu_memory.h"
#include "tests/kernels/fake_cuda_calls.h"

#include <gtest/gtest.h>

#include <vector>

namespace kvtier {
namespace {

constexpr CudaError kOutOfMemory = 2;
constexpr CudaError kOldDriver = 35;
constexpr CudaError kNoDevice = 100;
constexpr CudaError kNoKernelImage = 209;
constexpr CudaError kIllegalAddress = 700;

TEST(Gpu, OpensWhatIsThereAndSaysWhatIsNot) {
  FakeCudaCalls calls;
  const Result<Gpu> gpu = Gpu::open(calls);
  ASSERT_TRUE(gpu.ok());
  EXPECT_EQ(gpu->traits().capability, 90);
  EXPECT_EQ(Gpu::open(calls, 1).status().to_string(), "unsupported: GPU 1 wanted, 1 found");
  for (const CudaError error : {kOldDriver, kNoDevice, kNoKernelImage}) {
    for (int call = 0; call < 3; ++call) {
      FakeCudaCalls broken;
      broken.fail_from(call, error);
      const Status status = Gpu::open(broken).status();
      EXPECT_EQ(status.code(), StatusCode::kUnsupported) << error;
      EXPECT_NE(status.message().find("an injected error"), std::string::npos);
    }
  }
}

TEST(Gpu, ErrorsSayWhatToDoNext) {
  FakeCudaCalls calls;
  EXPECT_TRUE(cuda_status(calls, 0, "x").ok());
  EXPECT_EQ(cuda_status(calls, kOutOfMemory, "x").code(), StatusCode::kNoSpace);
  EXPECT_EQ(cuda_status(calls, 600, "x").code(), StatusCode::kBusy);
  EXPECT_EQ(cuda_status(calls, kIllegalAddress, "x").code(), StatusCode::kIoError);
  EXPECT_EQ(cuda_status(calls, kIllegalAddress, "moving").to_string(),
            "io_error: moving: an injected error (CUDA error 700)");
}

TEST(Gpu, ALaunchThatFailsIsReportedWithTheKernelsName) {
  FakeCudaCalls calls;
  const Gpu gpu = Gpu::open(calls).value();
  calls.fail_from(0, kIllegalAddress);
  EXPECT_EQ(gpu.launch({.threads = 32}, "some_kernel").to_string(),
            "io_error: some_kernel: an injected error (CUDA error 700)");
  // More shared memory than a kernel has without asking: the question fails first.
  EXPECT_FALSE(gpu.launch({.threads = 32, .shared_bytes = 64 * 1024}, "some_kernel").ok());
  EXPECT_EQ(calls.launches, 1);
}

// Everything the owners do, with every call failing in turn: a status, and nothing left behind.
Status use_memory(CudaCalls& calls) {
  KVTIER_ASSIGN_OR_RETURN(const Gpu gpu, Gpu::open(calls));
  KVTIER_ASSIGN_OR_RETURN(const GpuStream stream, GpuStream::create(gpu));
  KVTIER_ASSIGN_OR_RETURN(const GpuTimer timer, GpuTimer::create(gpu));
  KVTIER_ASSIGN_OR_RETURN(const DeviceBuffer buffer,
                          DeviceBuffer::allocate(gpu, 4096, stream.ref()));
  KVTIER_ASSIGN_OR_RETURN(Region region, Region::allocate({.bytes = 8192}));
  KVTIER_ASSIGN_OR_RETURN(const PinnedRegion pinned, PinnedRegion::pin(gpu, std::move(region)));
  KVTIER_RETURN_IF_ERROR(timer.start(stream.ref()));
  KVTIER_ASSIGN_OR_RETURN(const GpuGraph graph, GpuGraph::capture(gpu, stream.ref(), [&] {
                            return gpu.launch({.threads = 32}, "some_kernel");
                          }));
  KVTIER_RETURN_IF_ERROR(graph.launch(stream.ref()));
  KVTIER_RETURN_IF_ERROR(buffer.fill(3));
  KVTIER_RETURN_IF_ERROR(buffer.upload(pinned.bytes().first(64), 128));
  KVTIER_RETURN_IF_ERROR(buffer.download(pinned.bytes().first(64), 64));
  KVTIER_RETURN_IF_ERROR(timer.stop(stream.ref()));
  KVTIER_ASSIGN_OR_RETURN(const double us, timer.elapsed_us());
  KVTIER_CHECK(us == 1500.0, "{} us", us);
  KVTIER_CHECK(pinned.bytes()[0] == std::byte{3}, "the fill did not come back");
  return gpu.synchronize(stream.ref());
}

TEST(GpuMemory, EveryFailedCallIsReportedAndNothingLeaks) {
  FakeCudaCalls calls;
  ASSERT_TRUE(use_memory(calls).ok());
  EXPECT_EQ(calls.alive(), 0u);
  const int all = calls.calls();
  ASSERT_GT(all, 10);
  for (int first = 0; first < all; ++first) {
    FakeCudaCalls broken;
    broken.fail_from(first, kOutOfMemory);
    EXPECT_EQ(use_memory(broken).code(), StatusCode::kNoSpace) << first;
    EXPECT_EQ(broken.alive(), 0u) << first;
  }
}

TEST(GpuMemory, TheEnginesAllocatorIsAsked) {
  FakeCudaCalls calls;
  const Gpu gpu = Gpu::open(calls).value();
  const GpuStream stream = GpuStream::create(gpu).value();
  struct Engine {
    std::vector<std::byte> pool = std::vector<std::byte>(100);
    int taken = 0;
  } engine;
  const DeviceAllocator allocator = {
      &engine,
      [](void* context, void** address, std::size_t bytes, CUstream_st*) {
        auto* e = static_cast<Engine*>(context);
        if (bytes > e->pool.size()) return kOutOfMemory;
        *address = e->pool.data();
        ++e->taken;
        return 0;
      },
      [](void* context, void*, CUstream_st*) {
        --static_cast<Engine*>(context)->taken;
        return 0;
      }};
  {
    const Result<DeviceBuffer> buffer = DeviceBuffer::allocate(gpu, 60, stream.ref(), allocator);
    ASSERT_TRUE(buffer.ok());
    EXPECT_EQ(buffer->data(), engine.pool.data());
    EXPECT_EQ(engine.taken, 1);
  }
  EXPECT_EQ(engine.taken, 0);
  EXPECT_EQ(DeviceBuffer::allocate(gpu, 101, stream.ref(), allocator).status().code(),
            StatusCode::kNoSpace);
}

}  // namespace
}  // namespace kvtier
