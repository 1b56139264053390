#pragma once

#include "memory/check.h"

#include <string>
#include <string_view>
#include <utility>
#include <variant>

namespace kvtier {

/// What the caller should do next, not which function failed.
enum class StatusCode : unsigned char {
  kOk,
  kNotFound,         ///< Nothing by that name or id: recompute or create it.
  kNoSpace,          ///< A bound is reached: evict or free something, then retry.
  kBusy,             ///< Nothing has changed: retry later.
  kCancelled,        ///< The caller asked for this.
  kIoError,          ///< This copy is gone or out of reach: use another.
  kCorrupt,          ///< Bytes are not what they must be: drop this copy, use another or recompute.
  kUnsupported,      ///< Use another path.
  kInvalidArgument,  ///< The request itself is wrong (public boundary only).
};

/// Returns the code's name as used in messages, for example "no_space".
std::string_view to_string(StatusCode code);

/// Outcome of an operation that the world can make fail.
///
/// Success holds no message and allocates nothing. Failure carries one line that names the thing,
/// what was found and what was expected. Programming errors are not statuses: see `KVTIER_CHECK`.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

  /// "no_space: message", or "ok".
  std::string to_string() const;

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

Status not_found(std::string message);
Status no_space(std::string message);
Status busy(std::string message);
Status cancelled(std::string message);
Status io_error(std::string message);
Status corrupt(std::string message);
Status unsupported(std::string message);
Status invalid_argument(std::string message);

/// A value, or the status that says why there is none. Asking for the absent one aborts.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Status status) : state_(std::in_place_index<1>, std::move(status)) {
    KVTIER_CHECK(!std::get<1>(state_).ok(), "a Result without a value needs a failure");
  }

  bool ok() const { return state_.index() == 0; }
  Status status() const { return ok() ? Status() : std::get<1>(state_); }

  T& value() & {
    KVTIER_CHECK(ok(), "no value: {}", std::get<1>(state_).to_string());
    return std::get<0>(state_);
  }
  const T& value() const& {
    KVTIER_CHECK(ok(), "no value: {}", std::get<1>(state_).to_string());
    return std::get<0>(state_);
  }
  T&& value() && {
    KVTIER_CHECK(ok(), "no value: {}", std::get<1>(state_).to_string());
    return std::get<0>(std::move(state_));
  }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(*this).value(); }

 private:
  std::variant<T, Status> state_;
};

}  // namespace kvtier

#define KVTIER_CONCAT_INNER_(a, b) a##b
#define KVTIER_CONCAT_(a, b) KVTIER_CONCAT_INNER_(a, b)

/// Returns from the enclosing function when `expression` is a failed Status.
#define KVTIER_RETURN_IF_ERROR(expression)           \
  do {                                               \
    ::kvtier::Status kvtier_status_ = (expression);  \
    if (!kvtier_status_.ok()) return kvtier_status_; \
  } while (false)

/// `KVTIER_ASSIGN_OR_RETURN(auto file, open_file(options));`
#define KVTIER_ASSIGN_OR_RETURN(declaration, expression)        \
  auto KVTIER_CONCAT_(kvtier_result_, __LINE__) = (expression); \
  if (!KVTIER_CONCAT_(kvtier_result_, __LINE__).ok())           \
    return KVTIER_CONCAT_(kvtier_result_, __LINE__).status();   \
  declaration = std::move(KVTIER_CONCAT_(kvtier_result_, __LINE__)).value()
