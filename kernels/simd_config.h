#pragma once

// Included before Highway by every source that is compiled once per instruction set.
//
// The loops keep their accumulators in arrays of vectors, which sizeless vector types do not
// allow; on such machines the fixed-size NEON or scalar variants are chosen instead. On x86 there
// are AVX2, AVX3 and what newer versions of Highway put above it, and one variant for everything
// older: what lies between adds compile time and no machine that anyone decodes on.
#define HWY_DISABLED_TARGETS \
  (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV | HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
