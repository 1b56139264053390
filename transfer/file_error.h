#pragma once

#include "transfer/file.h"

#include <cstddef>
#include <cstdint>
#include <string>

namespace kvtier {

/// What every kind of file says and checks in the same way. Pure functions; thread-safe.

/// The system's words for an error number.
std::string error_text(int error_number);
/// Aborts when offset, address or size is not a multiple of `alignment`.
void check_aligned(const FileOperation& operation, std::size_t alignment);
/// The part of a read that lies before the end of a file of `size_bytes`.
std::size_t readable_bytes(const FileOperation& operation, std::uint64_t size_bytes);
/// `io_error` for a write that crosses the end: the file does not grow.
Status check_fits(const FileOperation& operation, std::uint64_t size_bytes);
/// The status for a failed system call: `no_space` for a write to a full disk, else `io_error`.
Status describe_failure(const FileOperation& operation, int error_number);

}  // namespace kvtier
