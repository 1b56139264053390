#include "tests/transfer/test_files.h"

#include "transfer/faulty_file.h"
#include "transfer/memory_file.h"
#include "transfer/open_file.h"

#include <gtest/gtest.h>

#include <array>

namespace kvtier::test {
namespace {

OpenedFile open_backend(std::uint64_t bytes, std::uint32_t queue_depth, FileBackend backend) {
  auto opened = open_file({.directory = scratch_directory(),
                           .bytes = bytes,
                           .backend = backend,
                           .queue_depth = queue_depth,
                           .direct = true});
  if (!opened.ok()) return {nullptr, opened.status().to_string()};
  return {std::move(opened).value(), ""};
}

}  // namespace

std::string scratch_directory() {
  std::string directory = ::testing::TempDir();
  if (directory.size() > 1 && directory.back() == '/') directory.pop_back();
  return directory;
}

OpenedFile open_memory(std::uint64_t bytes, std::uint32_t queue_depth) {
  return {
      std::make_unique<MemoryFile>(MemoryFile::Options{.bytes = bytes, .queue_depth = queue_depth}),
      ""};
}

OpenedFile open_uring(std::uint64_t bytes, std::uint32_t queue_depth) {
  return open_backend(bytes, queue_depth, FileBackend::kIoUring);
}

OpenedFile open_posix(std::uint64_t bytes, std::uint32_t queue_depth) {
  return open_backend(bytes, queue_depth, FileBackend::kPosix);
}

OpenedFile wrap_faulty(OpenedFile wrapped, const FaultPlan& plan, FaultCounts* counts) {
  if (wrapped.file == nullptr) return wrapped;
  return {std::make_unique<FaultyFile>(std::move(wrapped.file), plan, counts), ""};
}

FileOperation read_operation(std::uint64_t offset, std::span<std::byte> buffer) {
  FileOperation operation;
  operation.kind = FileOperation::Kind::kRead;
  operation.offset = offset;
  operation.buffer = buffer;
  return operation;
}

FileOperation write_operation(std::uint64_t offset, std::span<std::byte> buffer) {
  FileOperation operation = read_operation(offset, buffer);
  operation.kind = FileOperation::Kind::kWrite;
  return operation;
}

std::vector<FileOperation*> run_all(File& file, std::span<FileOperation> operations) {
  std::vector<FileOperation*> waiting;
  for (FileOperation& operation : operations) waiting.push_back(&operation);
  std::span<FileOperation* const> rest = waiting;
  std::vector<FileOperation*> finished;
  std::array<FileOperation*, 16> done{};
  while (finished.size() < operations.size()) {
    rest = rest.subspan(file.submit(rest));
    const std::size_t count = file.reap(done, kPatience);
    finished.insert(finished.end(), done.begin(), done.begin() + count);
  }
  return finished;
}

void run_one(File& file, FileOperation& operation) { run_all(file, {&operation, 1}); }

}  // namespace kvtier::test
