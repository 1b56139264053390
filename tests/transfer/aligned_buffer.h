#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace kvtier::test {

inline constexpr std::size_t kPage = 4096;

/// Page-aligned memory of a test; filled with zeros.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(std::size_t bytes);
  std::span<std::byte> bytes() const { return {memory_.get(), size_}; }
  std::span<std::byte> part(std::size_t offset, std::size_t bytes) const {
    return this->bytes().subspan(offset, bytes);
  }

 private:
  struct Freed {
    void operator()(std::byte* memory) const;
  };
  std::unique_ptr<std::byte, Freed> memory_;
  std::size_t size_;
};

/// Bytes that depend on `key` at every word, so that a swap of any two is seen.
void fill_pattern(std::span<std::byte> bytes, std::uint64_t key);
bool has_pattern(std::span<const std::byte> bytes, std::uint64_t key);

}  // namespace kvtier::test
