#pragma once

#include "selectors/selector.h"
#include "selectors/selector_state.h"

#include <fmt/format.h>

#include <cstdint>

namespace kvtier {

/// How many tokens a selector has seen: holds its caller to consecutive appends and honest cuts.
class SeenTokens {
 public:
  explicit SeenTokens(std::uint32_t most) : most_(most) {}

  void append(const NewTokens& tokens) {
    KVTIER_CHECK(tokens.first_position == count_, "tokens from position {}, expected {}",
                 tokens.first_position, count_);
    KVTIER_CHECK(tokens.tokens <= most_ - count_, "{} and {} more tokens, at most {}", count_,
                 tokens.tokens, most_);
    count_ += tokens.tokens;
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

  void save(StateWriter& writer) const { writer.put(count_); }
  Status restore(StateReader& reader) {
    KVTIER_RETURN_IF_ERROR(reader.get(count_));
    if (count_ <= most_) return {};
    return corrupt(
        fmt::format("selector state: found {} tokens, expected at most {}", count_, most_));
  }

  std::uint32_t count() const { return count_; }

 private:
  std::uint32_t most_;
  std::uint32_t count_ = 0;
};

}  // namespace kvtier
