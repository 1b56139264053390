#include "transfer/disk_directory.h"

#include "transfer/file_error.h"
#include "transfer/scratch_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <map>
#include <utility>

namespace kvtier {
namespace {

// A descriptor that is closed with its owner.
class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~Descriptor() {
    if (number_ >= 0) ::close(number_);
  }
  int number() const { return number_; }

 private:
  int number_;
};

std::string host_name() {
  std::array<char, 256> name{};
  if (::gethostname(name.data(), name.size() - 1) != 0) return "unknown";
  return name.data();
}

Status make_folder(const std::string& path) {
  if (::mkdir(path.c_str(), 0700) == 0 || errno == EEXIST) return {};
  const int error = errno;
  std::string message = fmt::format("{}: cannot make the folder: {}", path, error_text(error));
  return error == ENOENT ? not_found(std::move(message)) : io_error(std::move(message));
}

Result<Descriptor> open_folder(const std::string& path, bool create) {
  if (create) KVTIER_RETURN_IF_ERROR(make_folder(path));
  Descriptor folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (folder.number() < 0) {
    const int error = errno;
    std::string message = fmt::format("{}: {}", path, error_text(error));
    if (error == ENOENT) return not_found(std::move(message));
    if (error == ELOOP || error == ENOTDIR) {
      return unsupported(message + " (expected a folder; a symbolic link is not followed)");
    }
    return io_error(std::move(message));
  }
  struct stat found {};
  if (::fstat(folder.number(), &found) != 0) {
    return io_error(fmt::format("{}: {}", path, error_text(errno)));
  }
  if (found.st_uid != ::geteuid()) {
    return unsupported(
        fmt::format("{}: belongs to user {}, expected {}", path, found.st_uid, ::geteuid()));
  }
  if ((found.st_mode & 077) != 0) {
    return unsupported(fmt::format("{}: mode {:04o} lets others in, expected 0700 (chmod 700 {})",
                                   path, found.st_mode & 07777, path));
  }
  return folder;
}

// The lock is on an open file and not on a name or a process id: the kernel drops it with the
// process, and a holder that died leaves nothing to clean up.
Result<Descriptor> lock_folder(int folder, const std::string& path) {
  Descriptor lock(::openat(folder, kLockFileName, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (lock.number() < 0) {
    return io_error(fmt::format("{}/{}: {}", path, kLockFileName, error_text(errno)));
  }
  if (::flock(lock.number(), LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    if (error != EWOULDBLOCK) {
      return io_error(fmt::format("{}/{}: {}", path, kLockFileName, error_text(error)));
    }
    std::array<char, 320> holder{};
    const ssize_t length = ::pread(lock.number(), holder.data(), holder.size() - 1, 0);
    std::string text(holder.data(), length > 0 ? static_cast<std::size_t>(length) : 0);
    text = text.substr(0, text.find('\n'));
    return busy(fmt::format("{} is in use by {}; one process at a time can hold it", path,
                            text.empty() ? "a process that has not said which" : text));
  }
  const std::string self = fmt::format("process {} on host {}\n", ::getpid(), host_name());
  const bool written =
      ::ftruncate(lock.number(), 0) == 0 &&
      ::pwrite(lock.number(), self.data(), self.size(), 0) == static_cast<ssize_t>(self.size());
  if (!written) return io_error(fmt::format("{}/{}: cannot be written", path, kLockFileName));
  return lock;
}

class DiskDirectory final : public StoreDirectory {
 public:
  DiskDirectory(std::string path, const DiskDirectoryOptions& options, Descriptor folder,
                Descriptor lock)
      : path_(std::move(path)),
        options_(options),
        folder_(std::move(folder)),
        lock_(std::move(lock)) {}

  const std::string& name() const override { return path_; }

  Result<std::optional<std::uint64_t>> size_of(const std::string& file) override {
    struct stat found {};
    if (::fstatat(folder_.number(), file.c_str(), &found, AT_SYMLINK_NOFOLLOW) == 0) {
      return std::optional<std::uint64_t>(static_cast<std::uint64_t>(found.st_size));
    }
    if (errno == ENOENT) return std::optional<std::uint64_t>();
    return io_error(fmt::format("{}/{}: {}", path_, file, error_text(errno)));
  }

  Result<std::unique_ptr<File>> create(const std::string& file, std::uint64_t bytes) override {
    return serve(file, ScratchFile::Access::kCreate, bytes);
  }
  Result<std::unique_ptr<File>> open(const std::string& file) override {
    return serve(file,
                 options_.read_only ? ScratchFile::Access::kRead : ScratchFile::Access::kWrite, 0);
  }

  Status remove(const std::string& file) override {
    if (::unlinkat(folder_.number(), file.c_str(), 0) == 0 || errno == ENOENT) return {};
    return io_error(fmt::format("{}/{}: {}", path_, file, error_text(errno)));
  }

  Status check(const std::string& file) override {
    const auto known = known_.find(file);
    KVTIER_CHECK(known != known_.end(), "{} was not opened", file);
    struct stat found {};
    if (::fstatat(folder_.number(), file.c_str(), &found, AT_SYMLINK_NOFOLLOW) != 0) {
      return io_error(fmt::format("{}/{}: {}", path_, file, error_text(errno)));
    }
    if (found.st_ino != known->second.inode || found.st_dev != known->second.device) {
      return io_error(fmt::format("{}/{}: another file has taken its place", path_, file));
    }
    if (static_cast<std::uint64_t>(found.st_size) < known->second.bytes) {
      return io_error(fmt::format("{}/{}: cut to {} B, expected {}", path_, file, found.st_size,
                                  known->second.bytes));
    }
    return {};
  }

  Status sync() override {
    if (::fsync(folder_.number()) == 0) return {};
    return io_error(fmt::format("{}: fsync: {}", path_, error_text(errno)));
  }

  Result<std::uint64_t> free_bytes() override {
    struct statvfs found {};
    if (::fstatvfs(folder_.number(), &found) != 0) {
      return io_error(fmt::format("{}: {}", path_, error_text(errno)));
    }
    return std::uint64_t{found.f_bavail} * found.f_frsize;
  }

 private:
  struct Known {
    dev_t device = 0;
    ino_t inode = 0;
    std::uint64_t bytes = 0;
  };

  Result<std::unique_ptr<File>> serve(const std::string& file, ScratchFile::Access access,
                                      std::uint64_t bytes) {
    const FileOptions options = {.directory = path_,
                                 .bytes = bytes,
                                 .backend = options_.backend,
                                 .queue_depth = options_.queue_depth,
                                 .direct = options_.direct};
    KVTIER_ASSIGN_OR_RETURN(ScratchFile scratch,
                            ScratchFile::named(folder_.number(), file, access, options));
    struct stat found {};
    if (::fstat(scratch.descriptor(), &found) != 0) {
      return io_error(fmt::format("{}/{}: {}", path_, file, error_text(errno)));
    }
    known_[file] = {found.st_dev, found.st_ino, scratch.size_bytes()};
    return serve_file(scratch, options);
  }

  std::string path_;
  DiskDirectoryOptions options_;
  Descriptor folder_;
  Descriptor lock_;
  std::map<std::string, Known> known_;
};

// Files that nobody can find: they end with the process, whatever ends it.
class NamelessDirectory final : public StoreDirectory {
 public:
  NamelessDirectory(std::string path, const DiskDirectoryOptions& options)
      : path_(std::move(path)), options_(options) {}

  const std::string& name() const override { return path_; }
  Result<std::optional<std::uint64_t>> size_of(const std::string&) override {
    return std::optional<std::uint64_t>();
  }
  Result<std::unique_ptr<File>> create(const std::string&, std::uint64_t bytes) override {
    return open_file({.directory = path_,
                      .bytes = bytes,
                      .backend = options_.backend,
                      .queue_depth = options_.queue_depth,
                      .direct = options_.direct});
  }
  Result<std::unique_ptr<File>> open(const std::string& file) override {
    return not_found(fmt::format("{}/{}: the file had no name", path_, file));
  }
  Status remove(const std::string&) override { return {}; }
  Status check(const std::string&) override { return {}; }
  Status sync() override { return {}; }
  Result<std::uint64_t> free_bytes() override {
    struct statvfs found {};
    if (::statvfs(path_.c_str(), &found) != 0) {
      return io_error(fmt::format("{}: {}", path_, error_text(errno)));
    }
    return std::uint64_t{found.f_bavail} * found.f_frsize;
  }

 private:
  std::string path_;
  DiskDirectoryOptions options_;
};

// A slash at the end would make the system follow a symbolic link there.
std::string without_end_slashes(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

}  // namespace

Result<std::unique_ptr<StoreDirectory>> open_disk_directory(const std::string& path,
                                                            const DiskDirectoryOptions& options) {
  const std::string name = without_end_slashes(path);
  KVTIER_ASSIGN_OR_RETURN(Descriptor folder,
                          open_folder(name, options.create && !options.read_only));
  Descriptor lock(-1);
  if (!options.read_only) {
    KVTIER_ASSIGN_OR_RETURN(lock, lock_folder(folder.number(), name));
  }
  return std::unique_ptr<StoreDirectory>(
      new DiskDirectory(name, options, std::move(folder), std::move(lock)));
}

Result<std::unique_ptr<StoreDirectory>> open_nameless_directory(
    const std::string& path, const DiskDirectoryOptions& options) {
  if (options.create) KVTIER_RETURN_IF_ERROR(make_folder(path));
  return std::unique_ptr<StoreDirectory>(new NamelessDirectory(path, options));
}

}  // namespace kvtier
