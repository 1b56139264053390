#include "transfer/scratch_file.h"

#include "transfer/file_error.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <utility>

namespace kvtier {
namespace {

constexpr std::size_t kPageBytes = 4096;

template <typename Call>
auto retry_interrupted(Call call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

Status check_directory(const std::string& directory) {
  struct stat found {};
  if (::stat(directory.c_str(), &found) != 0) {
    const int error = errno;
    std::string message = fmt::format("{}: {}", directory, error_text(error));
    return error == ENOENT || error == ENOTDIR ? not_found(std::move(message))
                                               : io_error(std::move(message));
  }
  if (!S_ISDIR(found.st_mode)) return not_found(fmt::format("{}: not a directory", directory));
  return {};
}

// The name exists only between two system calls, and no other process can open it by guessing.
int create_and_unlink(const std::string& directory) {
  std::string path = directory + "/kvtier-XXXXXX";
  const int descriptor = ::mkostemp(path.data(), O_CLOEXEC);
  if (descriptor >= 0) ::unlink(path.c_str());
  return descriptor;
}

int open_nameless(const std::string& directory) {
  const int descriptor = retry_interrupted(
      [&] { return ::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC | O_EXCL, 0600); });
  // File systems and kernels without O_TMPFILE answer in one of these ways.
  if (descriptor >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)) {
    return descriptor;
  }
  return create_and_unlink(directory);
}

std::uint64_t free_bytes(int descriptor) {
  struct statvfs found {};
  if (::fstatvfs(descriptor, &found) != 0) return 0;
  return std::uint64_t{found.f_bavail} * found.f_frsize;
}

Status too_small(const FileOptions& options, std::uint64_t free) {
  return no_space(
      fmt::format("{}: {} B wanted, {} B free", options.directory, options.bytes, free));
}

// Zero, or the error number of the first direct write (where nothing can be lost) or read.
int probe_page(int descriptor, bool may_write) {
  alignas(kPageBytes) static const std::array<std::byte, kPageBytes> kZeros{};
  alignas(kPageBytes) std::array<std::byte, kPageBytes> page;
  if (may_write &&
      retry_interrupted([&] { return ::pwrite(descriptor, kZeros.data(), kPageBytes, 0); }) < 0) {
    return errno;
  }
  if (retry_interrupted([&] { return ::pread(descriptor, page.data(), kPageBytes, 0); }) < 0) {
    return errno;
  }
  return 0;
}

}  // namespace

Result<ScratchFile> ScratchFile::create(const FileOptions& options) {
  if (options.bytes == 0 || options.bytes % kPageBytes != 0) {
    return invalid_argument(fmt::format("a file of {} B, expected a positive multiple of {}",
                                        options.bytes, kPageBytes));
  }
  KVTIER_RETURN_IF_ERROR(check_directory(options.directory));
  const int descriptor = open_nameless(options.directory);
  if (descriptor < 0) {
    const int error = errno;
    return io_error(
        fmt::format("{}: cannot create a file: {}", options.directory, error_text(error)));
  }
  ScratchFile file(descriptor);
  KVTIER_RETURN_IF_ERROR(file.reserve(options));
  if (options.direct) KVTIER_RETURN_IF_ERROR(file.try_direct(options, true));
  return file;
}

Result<ScratchFile> ScratchFile::named(int folder, const std::string& name, Access access,
                                       const FileOptions& options) {
  const std::string path = fmt::format("{}/{}", options.directory, name);
  if (access == Access::kCreate && (options.bytes == 0 || options.bytes % kPageBytes != 0)) {
    return invalid_argument(fmt::format("{}: a file of {} B, expected a positive multiple of {}",
                                        path, options.bytes, kPageBytes));
  }
  // Not blocking: the name could be that of a pipe which nobody reads.
  const int flags = (access == Access::kRead ? O_RDONLY : O_RDWR) | O_NOFOLLOW | O_CLOEXEC |
                    O_NONBLOCK | (access == Access::kCreate ? O_CREAT | O_EXCL : 0);
  const int descriptor =
      retry_interrupted([&] { return ::openat(folder, name.c_str(), flags, 0600); });
  if (descriptor < 0) {
    const int error = errno;
    std::string message = fmt::format("{}: {}", path, error_text(error));
    if (error == ENOENT) return not_found(std::move(message));
    if (error == ELOOP) return unsupported(message + " (a symbolic link is not followed)");
    return io_error(std::move(message));
  }
  ScratchFile file(descriptor);
  struct stat found {};
  if (::fstat(descriptor, &found) != 0) {
    return io_error(fmt::format("{}: {}", path, error_text(errno)));
  }
  if (!S_ISREG(found.st_mode) || found.st_uid != ::geteuid() || found.st_nlink > 1 ||
      (found.st_mode & 077) != 0) {
    return unsupported(
        fmt::format("{}: expected a plain file of this user with one name and mode 0600", path));
  }
  if (access == Access::kCreate) {
    KVTIER_RETURN_IF_ERROR(file.reserve(options));
  } else {
    file.size_bytes_ = static_cast<std::uint64_t>(found.st_size);
  }
  if (options.direct) KVTIER_RETURN_IF_ERROR(file.try_direct(options, access == Access::kCreate));
  return file;
}

Status ScratchFile::reserve(const FileOptions& options) {
  // Asked first: some file systems fill up to the brim before fallocate() fails.
  const std::uint64_t free = free_bytes(descriptor_);
  if (free < options.bytes) return too_small(options, free);
  size_bytes_ = options.bytes;
  const auto length = static_cast<off_t>(options.bytes);
  if (retry_interrupted([&] { return ::fallocate(descriptor_, 0, 0, length); }) == 0) return {};
  const int error = errno;
  if (error == ENOSPC || error == EDQUOT || error == EFBIG) return too_small(options, free);
  if (error != EOPNOTSUPP && error != ENOSYS) {
    return io_error(fmt::format("{}: cannot reserve {} B: {}", options.directory, options.bytes,
                                error_text(error)));
  }
  // Not posix_fallocate(): where the file system cannot reserve, it would write every block.
  if (retry_interrupted([&] { return ::ftruncate(descriptor_, length); }) != 0) {
    return io_error(fmt::format("{}: cannot set the size to {} B: {}", options.directory,
                                options.bytes, error_text(errno)));
  }
  reservation_refusal_ = "the file system cannot reserve space";
  return {};
}

Status ScratchFile::try_direct(const FileOptions& options, bool may_write) {
  struct statfs found {};
  if (::fstatfs(descriptor_, &found) == 0 &&
      (found.f_type == TMPFS_MAGIC || found.f_type == RAMFS_MAGIC)) {
    // Newer kernels accept the flag here, but the bytes still lie in the page cache.
    direct_refusal_ = fmt::format("{} is in memory (tmpfs): no direct I/O", options.directory);
    return {};
  }
  const int flags = ::fcntl(descriptor_, F_GETFL);
  int error = 0;
  if (flags < 0 || ::fcntl(descriptor_, F_SETFL, flags | O_DIRECT) != 0) {
    error = errno;
  } else {
    error = probe_page(descriptor_, may_write);
  }
  if (error == 0) {
    direct_ = true;
    return {};
  }
  if (error != EINVAL && error != EOPNOTSUPP) {
    return io_error(
        fmt::format("{}: first access failed: {}", options.directory, error_text(error)));
  }
  if (flags >= 0) ::fcntl(descriptor_, F_SETFL, flags);
  direct_refusal_ = fmt::format("{} refuses direct I/O ({})", options.directory, error_text(error));
  return {};
}

ScratchFile::ScratchFile(ScratchFile&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)),
      size_bytes_(other.size_bytes_),
      direct_(other.direct_),
      direct_refusal_(std::move(other.direct_refusal_)),
      reservation_refusal_(std::move(other.reservation_refusal_)) {}

ScratchFile& ScratchFile::operator=(ScratchFile&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  std::swap(size_bytes_, other.size_bytes_);
  std::swap(direct_, other.direct_);
  std::swap(direct_refusal_, other.direct_refusal_);
  std::swap(reservation_refusal_, other.reservation_refusal_);
  return *this;
}

ScratchFile::~ScratchFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

Status ScratchFile::sync() const {
  if (retry_interrupted([&] { return ::fdatasync(descriptor_); }) == 0) return {};
  return io_error(fmt::format("fdatasync: {}", error_text(errno)));
}

Status ScratchFile::close() {
  // The descriptor is gone even when close() reports a failure.
  if (::close(std::exchange(descriptor_, -1)) == 0) return {};
  return io_error(fmt::format("close: {}", error_text(errno)));
}

}  // namespace kvtier
