#include "transfer/file_error.h"

#include <algorithm>
#include <cerrno>
#include <string_view>
#include <system_error>

namespace kvtier {
namespace {

std::string_view name_of(FileOperation::Kind kind) {
  return kind == FileOperation::Kind::kRead ? "read" : "write";
}

}  // namespace

std::string error_text(int error_number) {
  return std::error_code(error_number, std::generic_category()).message();
}

void check_aligned(const FileOperation& operation, std::size_t alignment) {
  const auto address = reinterpret_cast<std::uintptr_t>(operation.buffer.data());
  KVTIER_CHECK(operation.offset % alignment == 0 && address % alignment == 0 &&
                   operation.buffer.size() % alignment == 0,
               "{} of {} B at {} to address {:#x} is not aligned to {}", name_of(operation.kind),
               operation.buffer.size(), operation.offset, address, alignment);
}

std::size_t readable_bytes(const FileOperation& operation, std::uint64_t size_bytes) {
  if (operation.offset >= size_bytes) return 0;
  return static_cast<std::size_t>(
      std::min<std::uint64_t>(operation.buffer.size(), size_bytes - operation.offset));
}

Status check_fits(const FileOperation& operation, std::uint64_t size_bytes) {
  const std::size_t length = operation.buffer.size();
  if (length <= size_bytes && operation.offset <= size_bytes - length) return {};
  return io_error(fmt::format("write of {} B at {} crosses the end of a file of {} B", length,
                              operation.offset, size_bytes));
}

Status describe_failure(const FileOperation& operation, int error_number) {
  std::string message =
      fmt::format("{} of {} B at {}: {}", name_of(operation.kind), operation.buffer.size(),
                  operation.offset, error_text(error_number));
  const bool is_full = error_number == ENOSPC || error_number == EDQUOT;
  if (is_full && operation.kind == FileOperation::Kind::kWrite) return no_space(std::move(message));
  return io_error(std::move(message));
}

}  // namespace kvtier
