#pragma once

#include "memory/dtype.h"
#include "memory/status.h"
#include "selectors/selector.h"
#include "selectors/selector_state.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

namespace kvtier {

/// Turns rows of one head by RoPE (half-split: elements i and i + rotated/2 are a pair; elements
/// behind `rotated_dims` stay), forwards or back, so also undoes it.
///
/// Error. Angles are computed in float64, their sine and cosine rounded to float32, and two
/// products added: an element is off by at most 4 * 2^-24 times its pair's length, and turning
/// there and back by twice that. This is small beside what a recorded key has lost when it was
/// stored (2^-11 of an element in float16, 2^-8 in bfloat16), which turns with it, and beside the
/// engine's own angles where it computes them in float32: position * 1.5 * 2^-24 radians, 0.012 at
/// 128K tokens, in the fast pairs.
///
/// Allocates when made. One thread at a time.
class RopeTurn {
 public:
  RopeTurn(const RopeOptions& rope, std::uint32_t head_dim)
      : half_((rope.rotated_dims == 0 ? head_dim : rope.rotated_dims) / 2),
        frequencies_(half_),
        cosines_(half_),
        sines_(half_) {
    for (std::uint32_t i = 0; i < half_; ++i) {
      frequencies_[i] = std::pow(rope.theta, -static_cast<double>(i) / half_);
    }
  }

  /// The turn that `apply` makes: as RoPE turns a row that moves by so many positions.
  void set(double positions) {
    // Heads are turned one after the other by the same; angles cost more than the turn.
    if (positions == positions_) return;
    positions_ = positions;
    for (std::uint32_t i = 0; i < half_; ++i) {
      const double angle = positions * frequencies_[i];
      cosines_[i] = static_cast<float>(std::cos(angle));
      sines_[i] = static_cast<float>(std::sin(angle));
    }
  }
  void apply(float* row) const {
    for (std::uint32_t i = 0; i < half_; ++i) {
      const float low = row[i];
      const float high = row[i + half_];
      row[i] = low * cosines_[i] - high * sines_[i];
      row[i + half_] = high * cosines_[i] + low * sines_[i];
    }
  }

 private:
  std::uint32_t half_;
  double positions_ = std::numeric_limits<double>::quiet_NaN();  ///< Of the last `set`.
  std::vector<double> frequencies_;
  std::vector<float> cosines_;
  std::vector<float> sines_;
};

/// In which frame a selector compares queries with keys: `rotated`, as the model attends them, or
/// `unrotated`, keys as they were before RoPE and queries turned to stand a fixed distance behind
/// every key, so that only content counts. Un-rotated keys are rounded to the keys' type again.
class KeyFrame {
 public:
  KeyFrame(const SelectorShape& shape, bool unrotated, std::uint32_t distance)
      : shape_(shape),
        unrotated_(unrotated),
        distance_(distance),
        turn_(unrotated ? shape.rope : RopeOptions{1.0, 0}, shape.head_dim),
        row_(shape.head_dim),
        keys_(unrotated ? kPiece * shape.kv_heads * row_bytes() : 0) {}

  static constexpr std::string_view kChoices[] = {"rotated", "unrotated"};
  /// What a shape must have for un-rotating.
  static Status check(const SelectorShape& shape, std::string_view family) {
    const RopeOptions& rope = shape.rope;
    if (rope.known() && rope.rotated_dims % 2 == 0 && shape.head_dim % 2 == 0 &&
        rope.rotated_dims <= shape.head_dim) {
      return {};
    }
    return invalid_argument(
        fmt::format("selector '{}': keys cannot be un-rotated with rope theta {} over {} of {} "
                    "elements",
                    family, rope.theta, rope.rotated_dims, shape.head_dim));
  }

  bool unrotated() const { return unrotated_; }

  /// Calls `take(NewTokens)` for the tokens, piece by piece, with the keys in this frame.
  template <class Take>
  void feed(const NewTokens& tokens, const Take& take) {
    if (!unrotated_) return take(tokens);
    for (std::uint32_t t = 0; t < tokens.tokens; t += kPiece) {
      NewTokens piece = tokens;
      piece.first_position = tokens.first_position + t;
      piece.tokens = std::min(kPiece, tokens.tokens - t);
      for (std::uint32_t i = 0; i < piece.tokens; ++i) turn_back(tokens, t + i, i);
      piece.keys = keys_.data();
      piece.key_token_stride = shape_.kv_heads * row_bytes();
      piece.key_head_stride = row_bytes();
      if (tokens.values != nullptr) piece.values = tokens.values + t * tokens.value_token_stride;
      if (tokens.marks != nullptr) piece.marks = tokens.marks + t;
      take(piece);
    }
  }

  /// Copies the query heads of a position, [query_heads, head_dim], into this frame.
  void turn_query(const float* query, std::uint32_t position, float* target) {
    std::copy_n(query, std::size_t{shape_.query_heads()} * shape_.head_dim, target);
    if (!unrotated_) return;
    turn_.set(static_cast<double>(distance_) - static_cast<double>(position));
    for (std::uint32_t head = 0; head < shape_.query_heads(); ++head) {
      turn_.apply(target + std::size_t{head} * shape_.head_dim);
    }
  }

 private:
  static constexpr std::uint32_t kPiece = 64;

  std::size_t row_bytes() const { return shape_.head_dim * size_of(shape_.dtype); }

  void turn_back(const NewTokens& tokens, std::uint32_t from, std::uint32_t to) {
    turn_.set(-static_cast<double>(tokens.first_position + from));
    for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
      const std::byte* key =
          tokens.keys + head * tokens.key_head_stride + from * tokens.key_token_stride;
      for (std::uint32_t i = 0; i < shape_.head_dim; ++i) {
        row_[i] = load_element(key, shape_.dtype, i);
      }
      turn_.apply(row_.data());
      std::byte* target = keys_.data() + (std::size_t{to} * shape_.kv_heads + head) * row_bytes();
      for (std::uint32_t i = 0; i < shape_.head_dim; ++i) {
        store_element(target, shape_.dtype, i, row_[i]);
      }
    }
  }

  SelectorShape shape_;
  bool unrotated_;
  std::uint32_t distance_;
  RopeTurn turn_;
  std::vector<float> row_;
  FixedArray<std::byte> keys_;  ///< [kPiece, KV heads, head_dim], un-rotated.
};

}  // namespace kvtier
