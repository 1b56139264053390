#pragma once

#include "memory/check.h"
#include "memory/region.h"
#include "memory/status.h"

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

namespace kvtier {

/// A fixed number of plain elements, not initialised when made, copied with its owner: what
/// selectors keep per token. Owner; allocates when made or copied. Large ones ask for huge pages:
/// memory is then taken 2 MiB at a time as it is first written.
template <typename T>
class FixedArray {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  FixedArray() = default;
  explicit FixedArray(std::size_t size)
      : size_(size), elements_(std::make_unique_for_overwrite<T[]>(size)) {
    if (size * sizeof(T) >= kHugeArrayBytes) {
      advise_huge_pages(std::as_writable_bytes(std::span(elements_.get(), size)));
    }
  }
  FixedArray(const FixedArray& other) : FixedArray(other.size_) {
    if (size_ > 0) std::memcpy(elements_.get(), other.elements_.get(), size_ * sizeof(T));
  }
  FixedArray& operator=(const FixedArray& other) { return *this = FixedArray(other); }
  FixedArray(FixedArray&&) noexcept = default;
  FixedArray& operator=(FixedArray&&) noexcept = default;

  std::size_t size() const { return size_; }
  T* data() { return elements_.get(); }
  const T* data() const { return elements_.get(); }
  T& operator[](std::size_t i) { return elements_[i]; }
  const T& operator[](std::size_t i) const { return elements_[i]; }
  std::span<T> part(std::size_t first, std::size_t count) { return {data() + first, count}; }
  std::span<const T> part(std::size_t first, std::size_t count) const {
    return {data() + first, count};
  }

 private:
  /// What a core's address translation covers in pages of 4 KiB, roughly (3072 of them on Zen 4).
  static constexpr std::size_t kHugeArrayBytes = std::size_t{16} << 20;

  std::size_t size_ = 0;
  std::unique_ptr<T[]> elements_;
};

/// Collects a selector's state as bytes. Plain values and arrays in the order they are put; the
/// reader takes them in the same order. Host byte order: a state is read where it was written, or
/// after whoever stores it has checked that.
class StateWriter {
 public:
  template <typename T>
  void put(const T& value) {
    static_assert(std::is_trivially_copyable_v<T> && !std::is_pointer_v<T>);
    put_bytes(&value, sizeof(T));
  }
  /// Length first. `T` must be plain.
  template <typename T>
  void put_array(std::span<T> values) {
    static_assert(std::is_trivially_copyable_v<T> && !std::is_pointer_v<T>);
    put(static_cast<std::uint64_t>(values.size()));
    if (!values.empty()) put_bytes(values.data(), values.size_bytes());
  }
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  void put_bytes(const void* from, std::size_t count) {
    const auto* begin = static_cast<const std::byte*>(from);
    bytes_.insert(bytes_.end(), begin, begin + count);
  }
  std::vector<std::byte> bytes_;
};

/// Takes back what a `StateWriter` collected. Never reads past the end: `corrupt` instead.
class StateReader {
 public:
  explicit StateReader(std::span<const std::byte> bytes) : rest_(bytes) {}

  template <typename T>
  Status get(T& value) {
    static_assert(std::is_trivially_copyable_v<T> && !std::is_pointer_v<T>);
    return get_bytes(&value, sizeof(T));
  }
  /// An array of at most `target.size()` elements into the front of `target`; `count` of them.
  template <typename T>
  Status get_array(std::span<T> target, std::size_t& count) {
    static_assert(std::is_trivially_copyable_v<T> && !std::is_pointer_v<T>);
    std::uint64_t size = 0;
    KVTIER_RETURN_IF_ERROR(get(size));
    if (size > target.size()) {
      return corrupt(
          fmt::format("selector state: found an array of {} elements, expected at most "
                      "{}",
                      size, target.size()));
    }
    count = static_cast<std::size_t>(size);
    return count == 0 ? Status() : get_bytes(target.data(), count * sizeof(T));
  }
  /// An array that must fill `target`.
  template <typename T>
  Status get_exactly(std::span<T> target) {
    std::size_t count = 0;
    KVTIER_RETURN_IF_ERROR(get_array(target, count));
    if (count == target.size()) return {};
    return corrupt(fmt::format("selector state: found an array of {} elements, expected {}", count,
                               target.size()));
  }
  /// One into a vector that grows to the array's length, at most `most`.
  template <typename T>
  Status get_vector(std::vector<T>& target, std::size_t most) {
    std::uint64_t size = 0;
    KVTIER_RETURN_IF_ERROR(get(size));
    if (size > most || size * sizeof(T) > rest_.size()) {
      return corrupt(
          fmt::format("selector state: found an array of {} elements, expected at most "
                      "{} and the bytes for them",
                      size, most));
    }
    target.resize(static_cast<std::size_t>(size));
    return size == 0 ? Status() : get_bytes(target.data(), target.size() * sizeof(T));
  }
  bool at_end() const { return rest_.empty(); }

 private:
  Status get_bytes(void* target, std::size_t count) {
    if (count > rest_.size()) {
      return corrupt(
          fmt::format("selector state: found {} bytes, expected {} more", rest_.size(), count));
    }
    std::memcpy(target, rest_.data(), count);
    rest_ = rest_.subspan(count);
    return {};
  }
  std::span<const std::byte> rest_;
};

}  // namespace kvtier
