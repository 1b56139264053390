#include "tools/simulate/input_stream.h"

#include "tools/trace/json_document.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#include <cerrno>
#include <system_error>
#include <utility>
#include <vector>

namespace kvtier {
namespace {

constexpr std::size_t kFileBufferBytes = std::size_t{1} << 18;

Status unreadable(const std::string& path, int error) {
  const std::string message = std::generic_category().message(error);
  return error == ENOENT
             ? not_found(input_error(path, "file", message, "a readable file").message())
             : io_error(input_error(path, "file", message, "a readable file").message());
}

}  // namespace

struct InputStream::State {
  explicit State(std::string name) : path(std::move(name)) {}
  ~State() {
    if (descriptor >= 0) close(descriptor);
    ZSTD_freeDStream(zstd);
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  std::string path;
  int descriptor = -1;
  Sha256 sha256;
  ZSTD_DStream* zstd = nullptr;  ///< None for a plain file.
  std::vector<char> compressed;
  ZSTD_inBuffer input{};
  std::size_t frame_left = 0;  ///< 0 between frames, as ZSTD_decompressStream says it.

  Result<std::size_t> read_file(std::span<char> target) {
    while (true) {
      const ssize_t count = ::read(descriptor, target.data(), target.size());
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return unreadable(path, errno);
      sha256.update(std::as_bytes(target.first(static_cast<std::size_t>(count))));
      return static_cast<std::size_t>(count);
    }
  }

  Result<std::size_t> read_zstd(std::span<char> target) {
    ZSTD_outBuffer output{target.data(), target.size(), 0};
    while (output.pos == 0) {
      if (input.pos == input.size) {
        KVTIER_ASSIGN_OR_RETURN(const std::size_t count, read_file(compressed));
        if (count == 0) {
          if (frame_left == 0) return std::size_t{0};
          return input_error(path, "zstd", "the end of the file inside a frame", "a whole frame");
        }
        input = {compressed.data(), count, 0};
      }
      frame_left = ZSTD_decompressStream(zstd, &output, &input);
      if (ZSTD_isError(frame_left) != 0) {
        return input_error(path, "zstd", ZSTD_getErrorName(frame_left), "zstd frames");
      }
    }
    return output.pos;
  }
};

InputStream::InputStream(std::unique_ptr<State> state) : state_(std::move(state)) {}
InputStream::InputStream(InputStream&&) noexcept = default;
InputStream& InputStream::operator=(InputStream&&) noexcept = default;
InputStream::~InputStream() = default;

Result<InputStream> InputStream::open(const std::string& path) {
  auto state = std::make_unique<State>(path);
  state->descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (state->descriptor < 0) return unreadable(path, errno);
  struct stat attributes = {};
  if (fstat(state->descriptor, &attributes) != 0) return unreadable(path, errno);
  if (S_ISDIR(attributes.st_mode)) return unreadable(path, EISDIR);
  if (path.ends_with(".zst")) {
    state->zstd = ZSTD_createDStream();
    if (state->zstd == nullptr) return no_space(path + ": no memory to decompress it");
    state->compressed.resize(kFileBufferBytes);
  }
  return InputStream(std::move(state));
}

const std::string& InputStream::path() const { return state_->path; }

Result<std::size_t> InputStream::read(std::span<char> target) {
  return state_->zstd != nullptr ? state_->read_zstd(target) : state_->read_file(target);
}

std::string InputStream::digest() const { return "sha256:" + state_->sha256.hex(); }

}  // namespace kvtier
