#include "tools/trace/mapped_file.h"

#include "tools/trace/json_document.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace kvtier {
namespace {

Status cannot_open(const std::string& path, int error) {
  const Status line = input_error(path, "file", std::generic_category().message(error),
                                  "a regular file that can be read");
  return error == ENOENT || error == ENOTDIR ? not_found(line.message()) : io_error(line.message());
}

}  // namespace

Result<MappedFile> MappedFile::open(const std::string& path) {
  // O_NONBLOCK so that a FIFO is refused below instead of waited for.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) return cannot_open(path, errno);
  struct stat attributes = {};
  void* address = nullptr;
  int error = ::fstat(descriptor, &attributes) == 0 ? 0 : errno;
  if (error == 0 && !S_ISREG(attributes.st_mode)) {
    ::close(descriptor);
    return input_error(path, "file", S_ISDIR(attributes.st_mode) ? "a folder" : "a special file",
                       "a regular file that can be read");
  }
  const auto size = static_cast<std::size_t>(attributes.st_size);
  if (error == 0 && size > 0) {
    address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (address == MAP_FAILED) error = errno;
  }
  ::close(descriptor);
  if (error != 0) return cannot_open(path, error);
  return MappedFile(path, {static_cast<const std::byte*>(address), size});
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)), bytes_(std::exchange(other.bytes_, {})) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

}  // namespace kvtier
