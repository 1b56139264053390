#include "memory/check.h"

#include <gtest/gtest.h>

namespace kvtier {
namespace {

TEST(Check, PassesWithoutEvaluatingItsMessage) {
  int evaluated = 0;
  KVTIER_CHECK(true, "{}", ++evaluated);
  EXPECT_EQ(evaluated, 0);
}

TEST(CheckDeathTest, PrintsPlaceConditionAndValues) {
  EXPECT_DEATH(KVTIER_CHECK(1 > 2, "{} blocks of {}", 1, 2),
               "check_test.cc:[0-9]+: check failed: 1 > 2: 1 blocks of 2");
}

}  // namespace
}  // namespace kvtier
