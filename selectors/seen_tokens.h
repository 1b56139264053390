#pragma once

#include "selectors/selector.h"

#include <cstdint>

namespace kvtier {

/// How many tokens a selector has seen: holds its caller to consecutive appends and honest cuts.
class SeenTokens {
 public:
  explicit SeenTokens(std::uint32_t most) : most_(most) {}

  void append(const TokenKeys& keys) {
    KVTIER_CHECK(keys.first_position == count_, "keys from position {}, expected {}",
                 keys.first_position, count_);
    KVTIER_CHECK(keys.tokens <= most_ - count_, "{} and {} more tokens, at most {}", count_,
                 keys.tokens, most_);
    count_ += keys.tokens;
  }
  void truncate(std::uint32_t position) {
    KVTIER_CHECK(position <= count_, "cut at {} of {} tokens", position, count_);
    count_ = position;
  }
  /// Every token that is to be ranked must have been appended.
  void check_covers(FarRegion region) const {
    KVTIER_CHECK(region.end <= count_, "tokens to {} are to be ranked, {} were appended",
                 region.end, count_);
  }

  std::uint32_t count() const { return count_; }

 private:
  std::uint32_t most_;
  std::uint32_t count_ = 0;
};

}  // namespace kvtier
