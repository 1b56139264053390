#include "memory/status.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>

namespace kvtier {
namespace {

TEST(Status, SuccessSaysNothing) {
  const Status status;
  EXPECT_TRUE(status.ok());
  EXPECT_EQ(status.code(), StatusCode::kOk);
  EXPECT_EQ(status.message(), "");
  EXPECT_EQ(status.to_string(), "ok");
}

TEST(Status, EveryFailureHasItsCodeAndName) {
  const std::pair<Status, const char*> cases[] = {
      {not_found("m"), "not_found: m"},
      {no_space("m"), "no_space: m"},
      {busy("m"), "busy: m"},
      {cancelled("m"), "cancelled: m"},
      {io_error("m"), "io_error: m"},
      {corrupt("m"), "corrupt: m"},
      {unsupported("m"), "unsupported: m"},
      {invalid_argument("m"), "invalid_argument: m"},
  };
  for (const auto& [status, text] : cases) {
    EXPECT_FALSE(status.ok());
    EXPECT_EQ(status.to_string(), text);
  }
}

TEST(Result, HoldsAMoveOnlyValue) {
  Result<std::unique_ptr<int>> result = std::make_unique<int>(7);
  ASSERT_TRUE(result.ok());
  EXPECT_TRUE(result.status().ok());
  EXPECT_EQ(**result, 7);
  const std::unique_ptr<int> taken = std::move(result).value();
  EXPECT_EQ(*taken, 7);
}

TEST(Result, HoldsAFailure) {
  const Result<std::string> result = not_found("block 7");
  EXPECT_FALSE(result.ok());
  EXPECT_EQ(result.status().code(), StatusCode::kNotFound);
  EXPECT_EQ(result.status().message(), "block 7");
}

TEST(ResultDeathTest, AskingForTheAbsentOneStopsTheProcess) {
  Result<int> failed = not_found("block 7");
  EXPECT_DEATH(static_cast<void>(failed.value()), "no value: not_found: block 7");
  EXPECT_DEATH(static_cast<void>(Result<int>(Status())), "needs a failure");
}

Result<std::unique_ptr<int>> make(int value) {
  if (value < 0) return invalid_argument("negative");
  return std::make_unique<int>(value);
}

Status check(int value, int& reached) {
  KVTIER_RETURN_IF_ERROR(make(value).status());
  ++reached;
  return {};
}

Result<int> sum(int a, int b) {
  KVTIER_ASSIGN_OR_RETURN(auto first, make(a));
  KVTIER_ASSIGN_OR_RETURN(const std::unique_ptr<int> second, make(b));
  return *first + *second;
}

TEST(StatusMacros, ReturnOnFailureAndGoOnOtherwise) {
  int reached = 0;
  EXPECT_TRUE(check(1, reached).ok());
  EXPECT_EQ(check(-1, reached).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(reached, 1);
}

TEST(StatusMacros, AssignMovesTheValueOut) {
  EXPECT_EQ(sum(2, 3).value(), 5);
  EXPECT_EQ(sum(-2, 3).status().message(), "negative");
  EXPECT_EQ(sum(2, -3).status().message(), "negative");
}

}  // namespace
}  // namespace kvtier
