#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

namespace kvtier {

/// A cache policy written down as its paper puts it, with lists that are searched from end to end:
/// slow, and short enough to be checked by eye.
class NaiveCache {
 public:
  virtual ~NaiveCache() = default;
  virtual bool contains(std::uint32_t block) const = 0;
  /// `tokens_before` lie in front of the block in its prompt.
  virtual void use(std::uint32_t block, std::uint64_t tokens_before) = 0;
};

/// "lru", "fifo", "s3-fifo", "sieve", "arc", "gdsf"; null for another name.
std::unique_ptr<NaiveCache> make_naive_cache(std::string_view policy, std::size_t capacity);

}  // namespace kvtier
