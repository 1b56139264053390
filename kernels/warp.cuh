#pragma once

namespace kvtier {

inline constexpr unsigned kWarpLanes = 32;
inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

}  // namespace kvtier
