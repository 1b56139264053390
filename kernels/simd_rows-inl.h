// Loops over rows of keys that several kernels share, compiled once per instruction set.

#if defined(KVTIER_KERNELS_SIMD_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVTIER_KERNELS_SIMD_ROWS_INL_H_
#undef KVTIER_KERNELS_SIMD_ROWS_INL_H_
#else
#define KVTIER_KERNELS_SIMD_ROWS_INL_H_
#endif

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

HWY_BEFORE_NAMESPACE();
namespace kvtier {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using FloatVec = hn::Vec<FloatTag>;
inline constexpr std::size_t kLanes = hn::MaxLanes(FloatTag());
/// Rows of keys or values are multiples of this many elements; only wider vectors need a tail.
inline constexpr std::size_t kDimMultiple = 8;
inline constexpr bool kNeedsTail = kLanes > kDimMultiple;
static_assert(kLanes <= 2 * kDimMultiple, "a row's tail is at most one half vector");

/// Rows of queries whose accumulators, four tokens each, stay in registers with four vectors of
/// keys: 7 * 4 + 4 of 32 registers where an operand may come from memory, otherwise 6 * 4 + 4 + 1,
/// and 3 * 4 + 4 of 16. Fewer where nobody waits for speed, since every number of rows is compiled
/// for every type.
#if HWY_TARGET <= HWY_AVX3
inline constexpr std::size_t kRegisterRows = 7;
#elif HWY_ARCH_ARM
inline constexpr std::size_t kRegisterRows = 6;
#elif HWY_TARGET == HWY_AVX2
inline constexpr std::size_t kRegisterRows = 3;
#else
inline constexpr std::size_t kRegisterRows = 1;
#endif

/// Starts the load of a line into the level-2 cache. That level keeps more loads in flight than
/// level 1, which `hwy::Prefetch` asks for, and holds what is read a tile later.
HWY_INLINE void prefetch_line(const void* line) {
#if HWY_COMPILER_GCC || HWY_COMPILER_CLANG
  __builtin_prefetch(line, 0, 2);
#else
  hwy::Prefetch(line);
#endif
}

template <class D, typename T>
HWY_INLINE hn::Vec<D> load_as_f32(D d, const T* HWY_RESTRICT from) {
  if constexpr (std::is_same_v<T, float>) {
    return hn::LoadU(d, from);
  } else {
    const hn::Rebind<T, D> narrow;
    return hn::PromoteTo(d, hn::LoadU(narrow, from));
  }
}

/// The last `kDimMultiple` elements of a row, zeros above them.
template <typename T>
HWY_INLINE FloatVec load_tail_as_f32(const T* HWY_RESTRICT from) {
  const FloatTag d;
#if HWY_MAX_BYTES > 32
  return hn::ZeroExtendVector(d, load_as_f32(hn::Half<FloatTag>(), from));
#else
  return load_as_f32(d, from);
#endif
}

#if HWY_MAX_BYTES >= 16
template <class D, class V>
HWY_INLINE void store_sum_of_blocks(D d, V sums, float* HWY_RESTRICT target) {
  if constexpr (hn::MaxLanes(D()) <= 4) {
    hn::StoreU(sums, d, target);
  } else {
    const hn::Half<D> half;
    store_sum_of_blocks(half, hn::Add(hn::LowerHalf(half, sums), hn::UpperHalf(half, sums)),
                        target);
  }
}
#endif

/// Sums each of four vectors into four neighbouring floats. Adding pairs while transposing costs
/// 3 operations per sum where four separate horizontal sums cost 8.
HWY_INLINE void store_four_sums(FloatVec a, FloatVec b, FloatVec c, FloatVec e,
                                float* HWY_RESTRICT target) {
  const FloatTag d;
#if HWY_MAX_BYTES >= 16
  const hn::RepartitionToWide<hn::RebindToUnsigned<FloatTag>> wide;
  const auto ab =
      hn::BitCast(wide, hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  const auto ce =
      hn::BitCast(wide, hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e)));
  const FloatVec low = hn::BitCast(d, hn::InterleaveLower(wide, ab, ce));
  const FloatVec high = hn::BitCast(d, hn::InterleaveUpper(wide, ab, ce));
  store_sum_of_blocks(d, hn::Add(low, high), target);
#else
  target[0] = hn::GetLane(hn::SumOfLanes(d, a));
  target[1] = hn::GetLane(hn::SumOfLanes(d, b));
  target[2] = hn::GetLane(hn::SumOfLanes(d, c));
  target[3] = hn::GetLane(hn::SumOfLanes(d, e));
#endif
}

#if HWY_MAX_BYTES >= 16
template <class D, class V>
HWY_INLINE void store_max_of_blocks(D d, V tops, float* HWY_RESTRICT target) {
  if constexpr (hn::MaxLanes(D()) <= 4) {
    hn::StoreU(tops, d, target);
  } else {
    const hn::Half<D> half;
    store_max_of_blocks(half, hn::Max(hn::LowerHalf(half, tops), hn::UpperHalf(half, tops)),
                        target);
  }
}
#endif

/// Likewise the largest of each.
HWY_INLINE void store_four_maxima(FloatVec a, FloatVec b, FloatVec c, FloatVec e,
                                  float* HWY_RESTRICT target) {
  const FloatTag d;
#if HWY_MAX_BYTES >= 16
  const hn::RepartitionToWide<hn::RebindToUnsigned<FloatTag>> wide;
  const auto ab =
      hn::BitCast(wide, hn::Max(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  const auto ce =
      hn::BitCast(wide, hn::Max(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e)));
  const FloatVec low = hn::BitCast(d, hn::InterleaveLower(wide, ab, ce));
  const FloatVec high = hn::BitCast(d, hn::InterleaveUpper(wide, ab, ce));
  store_max_of_blocks(d, hn::Max(low, high), target);
#else
  target[0] = hn::GetLane(hn::MaxOfLanes(d, a));
  target[1] = hn::GetLane(hn::MaxOfLanes(d, b));
  target[2] = hn::GetLane(hn::MaxOfLanes(d, c));
  target[3] = hn::GetLane(hn::MaxOfLanes(d, e));
#endif
}

/// Query rows for the loops below: padded with zeros to `padded_dim`, 64-byte aligned.
struct QueryRows {
  const float* data = nullptr;
  std::size_t stride = 0;
};

/// sums[r][t] += keys[t] * queries[r], one vector wide.
template <std::size_t kRows>
HWY_INLINE void add_products(FloatVec (&sums)[kRows][4], const float* HWY_RESTRICT queries,
                             std::size_t stride, FloatVec k0, FloatVec k1, FloatVec k2,
                             FloatVec k3) {
  const FloatTag d;
  HWY_UNROLL(8)
  for (std::size_t r = 0; r < kRows; ++r) {
    const FloatVec q = hn::Load(d, queries + r * stride);
    sums[r][0] = hn::MulAdd(k0, q, sums[r][0]);
    sums[r][1] = hn::MulAdd(k1, q, sums[r][1]);
    sums[r][2] = hn::MulAdd(k2, q, sums[r][2]);
    sums[r][3] = hn::MulAdd(k3, q, sums[r][3]);
  }
}

/// target[r * target_stride + t] = dot(queries[r], keys[t]) for four keys. One conversion of the
/// keys to float32 serves all `kRows` queries.
template <typename T, std::size_t kRows>
HWY_INLINE void dot_four_keys(const T* const* HWY_RESTRICT keys, QueryRows queries, std::size_t dim,
                              float* HWY_RESTRICT target, std::size_t target_stride) {
  const FloatTag d;
  const T* HWY_RESTRICT k0 = keys[0];
  const T* HWY_RESTRICT k1 = keys[1];
  const T* HWY_RESTRICT k2 = keys[2];
  const T* HWY_RESTRICT k3 = keys[3];
  FloatVec sums[kRows][4];
  HWY_UNROLL(8)
  for (std::size_t r = 0; r < kRows; ++r) {
    sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = hn::Zero(d);
  }
  std::size_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    add_products<kRows>(sums, queries.data + i, queries.stride, load_as_f32(d, k0 + i),
                        load_as_f32(d, k1 + i), load_as_f32(d, k2 + i), load_as_f32(d, k3 + i));
  }
  if (kNeedsTail && i < dim) {
    add_products<kRows>(sums, queries.data + i, queries.stride, load_tail_as_f32(k0 + i),
                        load_tail_as_f32(k1 + i), load_tail_as_f32(k2 + i),
                        load_tail_as_f32(k3 + i));
  }
  HWY_UNROLL(8)
  for (std::size_t r = 0; r < kRows; ++r) {
    store_four_sums(sums[r][0], sums[r][1], sums[r][2], sums[r][3], target + r * target_stride);
  }
}

/// Calls `body(std::integral_constant<std::size_t, n>)` for n = `count`, 1 <= count <= kMax: turns
/// a number of rows into one the compiler can keep in registers.
template <std::size_t kMax, class Body>
HWY_INLINE void with_constant(std::size_t count, const Body& body) {
  if constexpr (kMax > 1) {
    if (count < kMax) return with_constant<kMax - 1>(count, body);
  }
  body(std::integral_constant<std::size_t, kMax>());
}

/// Rows to take next when `left` remain and `most` fit: even pieces, because a small last piece
/// converts every key again for few queries.
HWY_INLINE std::size_t even_piece(std::size_t left, std::size_t most) {
  const std::size_t pieces = (left + most - 1) / most;
  return (left + pieces - 1) / pieces;
}

}  // namespace HWY_NAMESPACE
}  // namespace kvtier
HWY_AFTER_NAMESPACE();

#endif  // include guard per target
