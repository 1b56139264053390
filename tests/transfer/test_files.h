#pragma once

#include "transfer/fault_plan.h"
#include "transfer/file.h"

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace kvtier::test {

/// Long enough that a test which runs into it has failed; nothing waits for it otherwise.
inline constexpr Duration kPatience = std::chrono::seconds(60);

/// What a suite over several files can run on. A null file comes with the reason to skip.
struct OpenedFile {
  std::unique_ptr<File> file;
  std::string refusal;
};

/// Where the tests keep scratch files.
std::string scratch_directory();
OpenedFile open_memory(std::uint64_t bytes, std::uint32_t queue_depth);
OpenedFile open_uring(std::uint64_t bytes, std::uint32_t queue_depth);
OpenedFile open_posix(std::uint64_t bytes, std::uint32_t queue_depth);
/// `plan` without a rate injects nothing.
OpenedFile wrap_faulty(OpenedFile wrapped, const FaultPlan& plan, FaultCounts* counts);

FileOperation read_operation(std::uint64_t offset, std::span<std::byte> buffer);
FileOperation write_operation(std::uint64_t offset, std::span<std::byte> buffer);
/// Submits all (in as many parts as the queue takes) and reaps all; the order of completion.
std::vector<FileOperation*> run_all(File& file, std::span<FileOperation> operations);
/// One operation from start to end.
void run_one(File& file, FileOperation& operation);

}  // namespace kvtier::test
