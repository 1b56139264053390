#include "transfer/memory_file.h"

#include "transfer/file_error.h"
#include "transfer/operation_list.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace kvtier {

struct MemoryFile::State {
  FileTraits traits;
  std::vector<std::byte> stored;
  OperationList<FileOperation> finished;
  std::uint32_t in_flight = 0;
  bool closed = false;

  void execute(FileOperation& operation) {
    operation.status = Status();
    operation.transferred = 0;
    if (operation.kind == FileOperation::Kind::kRead) {
      operation.transferred = readable_bytes(operation, stored.size());
      if (operation.transferred == 0) return;
      std::memcpy(operation.buffer.data(), stored.data() + operation.offset, operation.transferred);
      return;
    }
    operation.status = check_fits(operation, stored.size());
    if (!operation.status.ok() || operation.buffer.empty()) return;
    std::memcpy(stored.data() + operation.offset, operation.buffer.data(), operation.buffer.size());
    operation.transferred = operation.buffer.size();
  }
};

MemoryFile::MemoryFile(const Options& options) : state_(std::make_unique<State>()) {
  KVTIER_CHECK(options.queue_depth > 0 && options.alignment > 0, "queue depth {}, alignment {}",
               options.queue_depth, options.alignment);
  state_->traits.backend = "memory";
  state_->traits.alignment = options.alignment;
  state_->traits.queue_depth = options.queue_depth;
  state_->stored.resize(options.bytes);
}

MemoryFile::~MemoryFile() {
  KVTIER_CHECK(state_->closed, "a memory file was destroyed without close()");
}

const FileTraits& MemoryFile::traits() const { return state_->traits; }
std::uint64_t MemoryFile::size_bytes() const { return state_->stored.size(); }
Status MemoryFile::register_buffers(std::span<const std::span<std::byte>>) { return {}; }

std::size_t MemoryFile::submit(std::span<FileOperation* const> operations) {
  KVTIER_CHECK(!state_->closed, "submit after close()");
  const std::size_t room = state_->traits.queue_depth - state_->in_flight;
  const std::size_t accepted = std::min(operations.size(), room);
  for (FileOperation* operation : operations.first(accepted)) {
    check_aligned(*operation, state_->traits.alignment);
    state_->execute(*operation);
    state_->finished.push(operation);
    ++state_->in_flight;
  }
  return accepted;
}

std::size_t MemoryFile::reap(std::span<FileOperation*> done, Duration) {
  const std::size_t count = state_->finished.pop_into(done);
  state_->in_flight -= static_cast<std::uint32_t>(count);
  return count;
}

// Everything accepted has finished already: the ordinary result stands.
void MemoryFile::cancel(FileOperation*) {}

Status MemoryFile::sync() { return {}; }

Status MemoryFile::close() {
  KVTIER_CHECK(state_->in_flight == 0, "close() with {} operations in flight", state_->in_flight);
  state_->closed = true;
  return {};
}

std::span<std::byte> MemoryFile::bytes() { return state_->stored; }

}  // namespace kvtier
