#include "tests/transfer/aligned_buffer.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace kvtier::test {
namespace {

std::uint64_t word_of(std::uint64_t key, std::size_t index) {
  std::uint64_t word = (key + 1) * 0x9e3779b97f4a7c15ULL + index * 0xd1b54a32d192ed03ULL;
  word ^= word >> 29;
  return word * 0xbf58476d1ce4e5b9ULL;
}

}  // namespace

void AlignedBuffer::Freed::operator()(std::byte* memory) const { std::free(memory); }

AlignedBuffer::AlignedBuffer(std::size_t bytes)
    : memory_(static_cast<std::byte*>(std::aligned_alloc(kPage, bytes))), size_(bytes) {
  if (memory_ == nullptr) throw std::bad_alloc();
  std::memset(memory_.get(), 0, bytes);
}

void fill_pattern(std::span<std::byte> bytes, std::uint64_t key) {
  for (std::size_t i = 0; i * 8 < bytes.size(); ++i) {
    const std::uint64_t word = word_of(key, i);
    std::memcpy(bytes.data() + i * 8, &word, 8);
  }
}

bool has_pattern(std::span<const std::byte> bytes, std::uint64_t key) {
  for (std::size_t i = 0; i * 8 < bytes.size(); ++i) {
    const std::uint64_t word = word_of(key, i);
    if (std::memcmp(bytes.data() + i * 8, &word, 8) != 0) return false;
  }
  return true;
}

}  // namespace kvtier::test
