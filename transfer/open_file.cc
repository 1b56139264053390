#include "transfer/open_file.h"

#include "transfer/posix_file.h"
#include "transfer/scratch_file.h"
#include "transfer/uring_file.h"

#include <utility>

namespace kvtier {
namespace {

// Reasons that are not empty, in one line.
std::string join(std::string reasons, const std::string& another) {
  if (reasons.empty() || another.empty()) return reasons + another;
  return reasons + "; " + another;
}

}  // namespace

Result<std::unique_ptr<File>> open_file(const FileOptions& options) {
  KVTIER_ASSIGN_OR_RETURN(ScratchFile scratch, ScratchFile::create(options));
  return serve_file(scratch, options);
}

Result<std::unique_ptr<File>> serve_file(ScratchFile& scratch, const FileOptions& options) {
  std::string reason = join(scratch.direct_refusal(), scratch.reservation_refusal());
  // Through the page cache io_uring hands each miss to a kernel thread anyway: the pool does as
  // well and needs no permission. Who asked for buffered I/O, or for io_uring, gets the ring.
  const bool try_ring = options.backend == FileBackend::kIoUring ||
                        (options.backend == FileBackend::kAuto && scratch.direct_refusal().empty());
  if (try_ring) {
    auto opened = UringFile::open(scratch, options.queue_depth, reason);
    const bool fall_back = !opened.ok() && options.backend == FileBackend::kAuto &&
                           opened.status().code() == StatusCode::kUnsupported;
    if (!fall_back) return opened;
    reason = join(opened.status().message(), reason);
  }
  return PosixFile::open(scratch, options.queue_depth, std::move(reason));
}

}  // namespace kvtier
