#include "memory/stream_ref.h"

#include <gtest/gtest.h>

#include <type_traits>

namespace kvtier {
namespace {

static_assert(!std::is_default_constructible_v<StreamRef>);
static_assert(!std::is_constructible_v<StreamRef, std::nullptr_t>);
static_assert(!std::is_constructible_v<StreamRef, int>);
static_assert(!std::is_convertible_v<CUstream_st*, StreamRef>);

CUstream_st* at(std::uintptr_t address) { return reinterpret_cast<CUstream_st*>(address); }

TEST(StreamRef, NamesOneStream) {
  const StreamRef stream(at(0x1000));
  EXPECT_EQ(stream.get(), at(0x1000));
  EXPECT_EQ(stream, StreamRef(at(0x1000)));
  EXPECT_FALSE(stream == StreamRef(at(0x2000)));
}

TEST(StreamRefDeathTest, RefusesNullAndTheDefaultStreams) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  for (const std::uintptr_t address : {0u, 1u, 2u}) {
    EXPECT_DEATH(StreamRef{at(address)}, "is a default stream");
  }
}

}  // namespace
}  // namespace kvtier
