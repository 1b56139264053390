#include "kernels/read_bytes.h"
#include "tests/kernels/gpu_fixture.h"

namespace kvtier {
namespace {

class ReadBytesGpu : public GpuTest {};

TEST_F(ReadBytesGpu, ReadsEveryWordOnce) {
  for (const std::size_t bytes :
       {std::size_t{0}, std::size_t{16}, std::size_t{65536 + 48}, std::size_t{80} << 20}) {
    std::vector<std::uint64_t> words(bytes / 8);
    fill_random(std::as_writable_bytes(std::span(words)), bytes);
    std::uint64_t expected = 5;
    for (const std::uint64_t word : words) expected ^= word;
    const DeviceBuffer buffer = to_device(words);
    const DeviceBuffer sum = to_device(std::vector<std::uint64_t>{5});
    ASSERT_TRUE(read_bytes(gpu(), {buffer.data(), bytes}, sum.as<std::uint64_t>(), stream()).ok());
    EXPECT_EQ(to_host<std::uint64_t>(sum)[0], expected) << bytes;
  }
  const DeviceBuffer odd = device_bytes(8);
  EXPECT_EQ(read_bytes(gpu(), {odd.data(), 8}, nullptr, stream()).code(), StatusCode::kUnsupported);
}

}  // namespace
}  // namespace kvtier
