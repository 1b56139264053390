#pragma once

#include "memory/check.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

namespace kvtier {

/// Bounds of one layer's share, as parts of an equal one.
struct EntropyBounds {
  double least = 32.0 / 46.0;  ///< ActQKV: at least 32 blocks where an equal share is 46.
  double most = 2.0;           ///< ActQKV.
};

/// Far tokens that `layer` may choose when all layers together have `far_tokens` each (ActQKV,
/// 2502.13542, code): walking the layers in order, each takes of what is left the part that its
/// demand has of the demands still to come, within the bounds. As long as a demand is missing (not
/// a number, negative, or all zero) each takes an equal part.
///
/// Never more than far_tokens * layers over all layers, provided that every layer of a step is
/// given the same demands.
inline std::uint32_t entropy_budget(std::span<const float> demands, std::uint32_t layer,
                                    std::uint32_t far_tokens, const EntropyBounds& bounds) {
  KVTIER_CHECK(layer < demands.size(), "layer {} of {}", layer, demands.size());
  double wanted = 0.0;
  bool known = true;
  for (float demand : demands) {
    known = known && demand >= 0.0f;
    wanted += double{demand};
  }
  std::uint64_t left = std::uint64_t{far_tokens} * demands.size();
  std::uint64_t share = 0;
  for (std::uint32_t l = 0; l <= layer; ++l) {
    const double part = known && wanted > 0.0 && std::isfinite(wanted)
                            ? std::min(1.0, double{demands[l]} / wanted)
                            : 1.0 / static_cast<double>(demands.size() - l);
    const double tokens =
        std::clamp(std::round(part * static_cast<double>(left)),
                   std::round(bounds.least * far_tokens), std::round(bounds.most * far_tokens));
    share = std::min(left, static_cast<std::uint64_t>(tokens));
    left -= share;
    wanted -= double{demands[l]};
  }
  return static_cast<std::uint32_t>(share);
}

}  // namespace kvtier
