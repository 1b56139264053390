// What `kvtier bench disk` measures with: wrong pages are seen, failures are told, fio's answers
// are read.

#include "tests/tools/run_kvtier.h"
#include "tools/disk_load.h"
#include "tools/fio_peer.h"
#include "transfer/faulty_file.h"
#include "transfer/memory_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvtier {
namespace {

using testing::Contains;
using testing::HasSubstr;

constexpr std::size_t kIoBytes = 64 << 10;
constexpr std::uint32_t kDepth = 4;
constexpr DiskPattern kRandomRead{.write = false, .random = true};
constexpr DiskPattern kRandomWrite{.write = true, .random = true};
constexpr DiskPattern kSequentialWrite{.write = true, .random = false};

std::unique_ptr<File> make_file(std::string_view faults = "") {
  auto memory = std::make_unique<MemoryFile>(
      MemoryFile::Options{.bytes = 16 << 20, .queue_depth = kDepth + DiskLoad::kSpare});
  if (faults.empty()) return memory;
  return std::make_unique<FaultyFile>(std::move(memory), FaultPlan::parse(faults).value(), nullptr);
}

TEST(DiskLoad, SoundFilesHaveNoWrongPages) {
  const auto file = make_file();
  auto load = DiskLoad::make(*file, kIoBytes, kDepth);
  ASSERT_TRUE(load.ok());
  ASSERT_TRUE(load->fill().ok());
  for (const DiskPattern pattern : {kRandomRead, kRandomWrite, kRandomRead, kSequentialWrite}) {
    const auto run = load->run(pattern, kIoBytes / 4, kDepth, 0.02, true);
    ASSERT_TRUE(run.ok()) << run.status().message();
    EXPECT_EQ(run->pages_wrong, 0u);
    EXPECT_GE(run->bytes, kDepth * kIoBytes / 4);
    EXPECT_EQ(run->bytes % (kIoBytes / 4), 0u);
  }
  EXPECT_EQ(load->verify_written().value(), 0u);
  EXPECT_TRUE(file->close().ok());
}

TEST(DiskLoad, FlippedBitsAreSeenOnlyByWhoVerifies) {
  const auto file = make_file("bitflip:1,seed=1");
  auto load = DiskLoad::make(*file, kIoBytes, kDepth);
  ASSERT_TRUE(load->fill().ok());
  const auto checked = load->run(kRandomRead, kIoBytes, kDepth, 0.01, true);
  ASSERT_TRUE(checked.ok());
  EXPECT_EQ(checked->pages_wrong, checked->bytes / kIoBytes);
  EXPECT_EQ(load->run(kRandomRead, kIoBytes, kDepth, 0.01, false)->pages_wrong, 0u);
  EXPECT_TRUE(file->close().ok());
}

TEST(DiskLoad, LostWritesAreFoundAtTheEnd) {
  const auto file = make_file("lostwrite:0.5,seed=1");
  auto load = DiskLoad::make(*file, kIoBytes, kDepth);
  ASSERT_TRUE(load->fill().ok());
  ASSERT_TRUE(load->run(kSequentialWrite, kIoBytes, kDepth, 0.01, true).ok());
  EXPECT_GT(load->verify_written().value(), 0u);
  EXPECT_TRUE(file->close().ok());
}

TEST(DiskLoad, AFailedOperationEndsTheRun) {
  const auto file = make_file("eio:0.2,seed=1");
  auto load = DiskLoad::make(*file, kIoBytes, kDepth);
  ASSERT_TRUE(load->fill().ok());
  const auto run = load->run(kRandomRead, kIoBytes, kDepth, 1.0, true);
  ASSERT_FALSE(run.ok());
  EXPECT_EQ(run.status().code(), StatusCode::kIoError);
  // Nothing is left in flight.
  EXPECT_TRUE(file->close().ok());
}

TEST(FioPeer, AsksForTheSameLoad) {
  const FioJob job{.path = "f",
                   .pattern = "randread",
                   .io_bytes = 65536,
                   .depth = 16,
                   .bytes = 1 << 20,
                   .fixed_buffers = true};
  const auto ring = fio_arguments("fio", job);
  EXPECT_THAT(ring, Contains("--iodepth=16"));
  EXPECT_THAT(ring, Contains("--fixedbufs=1"));
  FioJob threads = job;
  threads.engine = "psync";
  EXPECT_THAT(fio_arguments("fio", threads), Contains("--numjobs=16"));
}

TEST(FioPeer, ReadsTheRateOrSaysWhatItFound) {
  const std::string answer =
      "note: a warning\n{\"jobs\":[{\"read\":{\"bw_bytes\":1500},\"write\":{\"bw_bytes\":2500}}]}";
  EXPECT_EQ(read_fio_result(answer, false).value(), 1500.0);
  EXPECT_EQ(read_fio_result(answer, true).value(), 2500.0);
  EXPECT_THAT(read_fio_result("{\"jobs\":[]}", false).status().message(), HasSubstr("jobs"));
  EXPECT_FALSE(read_fio_result("", true).ok());
  EXPECT_EQ(fio_version("/no/such/program"), "");
  EXPECT_EQ(run_fio("/no/such/program", {}).status().code(), StatusCode::kIoError);
}

TEST(BenchDisk, PrintsItsSchema) {
  const Outcome outcome =
      run_kvtier({"bench", "disk", testing::TempDir(), "--fio", "", "--format", "json",
                  "--file-bytes", "32MiB", "--sizes", "64KiB", "--depths", "2", "--seconds", "0.02",
                  "--repetitions", "1", "--operations", "random_read,random_write"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  const auto json = nlohmann::ordered_json::parse(outcome.output);
  EXPECT_EQ(json["schema"], "kvtier.bench-disk");
  EXPECT_EQ(json["version"], 1);
  ASSERT_EQ(json["rows"].size(), 2u);
  for (const char* field :
       {"operation", "io_bytes", "depth", "backend", "gb_per_s", "gb_per_s_unverified",
        "fio_gb_per_s", "ratio_to_fio", "cpu_s_per_gb"}) {
    EXPECT_TRUE(json["rows"][0].contains(field)) << field;
  }
  EXPECT_TRUE(json["rows"][0]["fio_gb_per_s"].is_null());
  EXPECT_GT(json["rows"][1]["gb_per_s"].get<double>(), 0.0);
}

TEST(BenchDisk, RefusesWhatMakesNoSense) {
  EXPECT_EQ(run_kvtier({"bench", "disk", "/no/such/folder"}).exit_code, 2);
  EXPECT_EQ(run_kvtier({"bench", "disk"}).exit_code, 2);
  EXPECT_EQ(run_kvtier({"bench", "disk", "/tmp", "--sizes", "5000"}).exit_code, 2);
  EXPECT_EQ(run_kvtier({"bench", "disk", "/tmp", "--file-bytes", "1MiB"}).exit_code, 2);
  EXPECT_EQ(run_kvtier({"bench", "disk", "/tmp", "--operations", "erase"}).exit_code, 2);
}

}  // namespace
}  // namespace kvtier
