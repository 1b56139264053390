#pragma once

namespace kvtier {

/// What makes look-ahead believe that a block will be wanted.
enum class GuessSource : unsigned char {
  kPreviousSet,  ///< The layer attended it a token ago.
  kBand,         ///< It ranked just below the cut then.
  kHint,         ///< It is what the engine's guess of the layer's question selects.
};
inline constexpr int kGuessSourceCount = 3;

/// "previous_set", "band", "hint".
constexpr const char* to_string(GuessSource source) {
  constexpr const char* kNames[kGuessSourceCount] = {"previous_set", "band", "hint"};
  return kNames[static_cast<int>(source)];
}

}  // namespace kvtier
