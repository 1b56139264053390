#include "tools/replay/output_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <random>
#include <system_error>
#include <utility>

namespace kvtier {
namespace {

std::string error_text(int code) { return std::generic_category().message(code); }

/// Another at each call: what a killed run has left behind, in whatever container, is not in the
/// way.
std::string temporary_name(const std::string& path) {
  std::random_device random;
  return fmt::format("{}.tmp-{:08x}{:08x}", path, random(), random());
}

Status cannot_write(const std::string& path, int code) {
  const std::string message = fmt::format("cannot write '{}': {}", path, error_text(code));
  return code == ENOSPC || code == EDQUOT ? no_space(message) : io_error(message);
}

/// Writes `text` to a file just opened and closes it; errno of what failed, or 0.
int write_and_close(int descriptor, const std::string& text, bool sync) {
  int failure = 0;
  for (std::size_t done = 0; done < text.size() && failure == 0;) {
    const ssize_t count = ::write(descriptor, text.data() + done, text.size() - done);
    if (count >= 0) {
      done += static_cast<std::size_t>(count);
    } else if (errno != EINTR) {
      failure = errno;
    }
  }
  // Before the rename, or a crash could leave the new name with no content.
  if (failure == 0 && sync && ::fsync(descriptor) != 0) failure = errno;
  if (::close(descriptor) != 0 && failure == 0) failure = errno;
  return failure;
}

}  // namespace

Result<OutputFile> OutputFile::open(const std::string& path) {
  const auto refuse = [&](const std::string& why) {
    return invalid_argument(
        fmt::format("found '{}', expected a file that can be written: {}", path, why));
  };
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (std::filesystem::is_directory(status)) return refuse("it is a directory");
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
    if (::access(path.c_str(), W_OK) != 0) return refuse(error_text(errno));
    return OutputFile(path, true);
  }
  std::string target = path;
  if (std::filesystem::exists(status)) {
    // Without this, renaming would replace a link by a file instead of what it points to.
    target = std::filesystem::canonical(path, error).string();
    if (error) return refuse(error.message());
    if (::access(target.c_str(), W_OK) != 0) return refuse(error_text(errno));
  }
  const std::string probe = temporary_name(target);
  const int descriptor = ::open(probe.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (descriptor < 0) return refuse(error_text(errno));
  ::close(descriptor);
  ::unlink(probe.c_str());
  return OutputFile(std::move(target), false);
}

Status OutputFile::write(const std::string& text) const {
  const std::string name = direct_ ? path_ : temporary_name(path_);
  const int flags = direct_ ? O_WRONLY : O_WRONLY | O_CREAT | O_EXCL;
  const int descriptor = ::open(name.c_str(), flags | O_CLOEXEC, 0666);
  if (descriptor < 0) return cannot_write(path_, errno);
  int failure = write_and_close(descriptor, text, !direct_);
  if (direct_) return failure == 0 ? Status() : cannot_write(path_, failure);
  if (failure == 0 && std::rename(name.c_str(), path_.c_str()) != 0) failure = errno;
  if (failure == 0) return {};
  ::unlink(name.c_str());
  return cannot_write(path_, failure);
}

}  // namespace kvtier
