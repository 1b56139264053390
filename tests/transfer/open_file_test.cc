#include "transfer/open_file.h"

#include "tests/transfer/aligned_buffer.h"
#include "tests/transfer/test_files.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <optional>

namespace kvtier {
namespace {

using test::AlignedBuffer;
using test::fill_pattern;
using test::has_pattern;
using test::kPage;

constexpr std::uint64_t kBytes = 64 * kPage;

class OpenFileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = std::filesystem::path(test::scratch_directory()) /
                 ("kvtier-open-" + std::to_string(::getpid()));
    std::filesystem::create_directory(directory_);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  FileOptions options(FileBackend backend = FileBackend::kAuto) const {
    return {.directory = directory_.string(),
            .bytes = kBytes,
            .backend = backend,
            .queue_depth = 4,
            .direct = true};
  }

  std::filesystem::path directory_;
};

// Makes the kernel answer `error` to a system call, for the rest of the process: what a container's
// filter or a lesser file system does. With `mask`, only when the third argument has one of its
// bits, and with `second`, only when the second is that: a call without a third argument has
// something there too.
void refuse(long number, int error, std::uint32_t mask = 0, std::optional<int> second = {}) {
  const auto answer = SECCOMP_RET_ERRNO | static_cast<std::uint32_t>(error);
  sock_filter rules[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(number), 0, 5),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[1])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(second.value_or(0)), 0,
               static_cast<std::uint8_t>(second ? 3 : 0)),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[2])),
      BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, mask, 0, static_cast<std::uint8_t>(mask == 0 ? 0 : 1)),
      BPF_STMT(BPF_RET | BPF_K, answer),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{.len = static_cast<unsigned short>(std::size(rules)), .filter = rules};
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
      ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
    std::cerr << "seccomp is refused here\n";
    ::_exit(77);
  }
}

// Runs in a process of its own, which ends with 0 when all is well, 77 when it cannot tell.
void expect_works(const FileOptions& options, const std::string& backend, bool direct,
                  const std::string& reason) {
  auto opened = open_file(options);
  if (!opened.ok()) {
    std::cerr << opened.status().to_string() << "\n";
    ::_exit(1);
  }
  File& file = **opened;
  AlignedBuffer buffer(kPage);
  fill_pattern(buffer.bytes(), 5);
  FileOperation write = test::write_operation(kPage, buffer.bytes());
  test::run_one(file, write);
  fill_pattern(buffer.bytes(), 6);
  FileOperation read = test::read_operation(kPage, buffer.bytes());
  test::run_one(file, read);
  const bool good = write.status.ok() && read.status.ok() && has_pattern(buffer.bytes(), 5) &&
                    file.traits().backend == backend && file.traits().direct == direct &&
                    file.traits().reason.find(reason) != std::string::npos &&
                    std::filesystem::is_empty(options.directory);
  std::cerr << file.traits().backend << ", direct " << file.traits().direct << ", reason '"
            << file.traits().reason << "', " << write.status.to_string() << ", "
            << read.status.to_string() << "\n";
  const bool closed = file.close().ok();
  ::_exit(good && closed ? 0 : 1);
}

// What the system gives without any refusal of ours.
bool system_is_complete(const FileOptions& options) {
  auto opened = open_file(options);
  if (!opened.ok()) return false;
  const bool complete = (*opened)->traits().reason.empty();
  return (*opened)->close().ok() && complete;
}

TEST_F(OpenFileTest, LeavesNoNameBehind) {
  auto opened = open_file(options());
  ASSERT_TRUE(opened.ok()) << opened.status().to_string();
  EXPECT_TRUE(std::filesystem::is_empty(directory_));
  EXPECT_EQ((*opened)->size_bytes(), kBytes);
  EXPECT_TRUE((*opened)->close().ok());
}

TEST_F(OpenFileTest, NamesTheDirectoryThatIsMissing) {
  FileOptions missing = options();
  missing.directory += "/nowhere";
  const auto opened = open_file(missing);
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.status().code(), StatusCode::kNotFound);
  EXPECT_NE(opened.status().message().find(missing.directory), std::string::npos);
}

TEST_F(OpenFileTest, RefusesSizesThatAreNoPages) {
  for (const std::uint64_t bytes : {std::uint64_t{0}, std::uint64_t{1000}}) {
    FileOptions odd = options();
    odd.bytes = bytes;
    EXPECT_EQ(open_file(odd).status().code(), StatusCode::kInvalidArgument) << bytes;
  }
}

TEST_F(OpenFileTest, DiskTooSmallFailsAtOpenWithFigures) {
  FileOptions large = options();
  large.bytes = std::uint64_t{1} << 50;
  const auto opened = open_file(large);
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.status().code(), StatusCode::kNoSpace);
  const std::string message = opened.status().message();
  EXPECT_NE(message.find(large.directory), std::string::npos) << message;
  EXPECT_NE(message.find("1125899906842624 B wanted"), std::string::npos) << message;
  EXPECT_NE(message.find(" B free"), std::string::npos) << message;
}

TEST_F(OpenFileTest, TmpfsGetsTheThreadPoolAndSaysWhy) {
  if (!std::filesystem::is_directory("/dev/shm")) GTEST_SKIP() << "no /dev/shm";
  FileOptions shared = options();
  shared.directory = "/dev/shm";
  auto opened = open_file(shared);
  if (!opened.ok()) GTEST_SKIP() << opened.status().to_string();
  const FileTraits traits = (*opened)->traits();
  EXPECT_TRUE((*opened)->close().ok());
  EXPECT_EQ(traits.backend, "posix");
  EXPECT_FALSE(traits.direct);
  EXPECT_NE(traits.reason.find("/dev/shm is in memory"), std::string::npos) << traits.reason;
}

TEST_F(OpenFileTest, BackendAskedForByNameIsUsed) {
  auto posix = open_file(options(FileBackend::kPosix));
  ASSERT_TRUE(posix.ok()) << posix.status().to_string();
  EXPECT_EQ((*posix)->traits().backend, "posix");
  EXPECT_TRUE((*posix)->close().ok());
}

TEST_F(OpenFileTest, BufferedIoIsNoRefusalWhenAskedFor) {
  FileOptions buffered = options(FileBackend::kPosix);
  buffered.direct = false;
  auto opened = open_file(buffered);
  ASSERT_TRUE(opened.ok()) << opened.status().to_string();
  EXPECT_FALSE((*opened)->traits().direct);
  EXPECT_EQ((*opened)->traits().reason, "");
  EXPECT_TRUE((*opened)->close().ok());
}

// The cases below take something away from a system that has everything; each runs in a process of
// its own, because what the kernel once refuses it refuses for good.
class RefusedFileTest : public OpenFileTest {
 protected:
  void SetUp() override {
    OpenFileTest::SetUp();
    GTEST_FLAG_SET(death_test_style, "fast");
    if (!system_is_complete(options())) GTEST_SKIP() << "this system refuses something already";
  }
  static bool good_or_unknown(int status) {
    return ::testing::ExitedWithCode(0)(status) || ::testing::ExitedWithCode(77)(status);
  }
};

TEST_F(RefusedFileTest, IoUringRefusedFallsBackToTheThreadPool) {
  EXPECT_EXIT(
      {
        refuse(SYS_io_uring_setup, EPERM);
        expect_works(options(), "posix", true, "io_uring is refused (Operation not permitted)");
      },
      good_or_unknown, "");
}

TEST_F(RefusedFileTest, IoUringRefusedIsAnErrorWhenAskedForByName) {
  EXPECT_EXIT(
      {
        refuse(SYS_io_uring_setup, EPERM);
        const auto opened = open_file(options(FileBackend::kIoUring));
        ::_exit(opened.status().code() == StatusCode::kUnsupported ? 0 : 1);
      },
      good_or_unknown, "");
}

TEST_F(RefusedFileTest, NoTemporaryFilesMeansCreateAndUnlink) {
  EXPECT_EXIT(
      {
        refuse(SYS_openat, EOPNOTSUPP, O_TMPFILE & ~O_DIRECTORY);
        expect_works(options(), "io_uring", true, "");
      },
      good_or_unknown, "");
}

TEST_F(RefusedFileTest, NoReservationIsSaid) {
  EXPECT_EXIT(
      {
        refuse(SYS_fallocate, EOPNOTSUPP);
        expect_works(options(), "io_uring", true, "cannot reserve space");
      },
      good_or_unknown, "");
}

TEST_F(RefusedFileTest, FullDiskAtReservationIsNoSpace) {
  EXPECT_EXIT(
      {
        refuse(SYS_fallocate, ENOSPC);
        ::_exit(open_file(options()).status().code() == StatusCode::kNoSpace ? 0 : 1);
      },
      good_or_unknown, "");
}

TEST_F(RefusedFileTest, DirectIoRefusedFallsBackToThePageCache) {
  EXPECT_EXIT(
      {
        refuse(SYS_fcntl, EINVAL, O_DIRECT, F_SETFL);
        expect_works(options(), "posix", false, "refuses direct I/O (Invalid argument)");
      },
      good_or_unknown, "");
}

TEST_F(RefusedFileTest, BuffersThatCannotBeRegisteredAreSaidAndWorkOn) {
  EXPECT_EXIT(
      {
        refuse(SYS_io_uring_register, ENOMEM);
        auto opened = open_file(options());
        if (!opened.ok()) ::_exit(1);
        AlignedBuffer buffer(kPage);
        const std::span<std::byte> range = buffer.bytes();
        const bool said =
            (*opened)->register_buffers({&range, 1}).ok() &&
            (*opened)->traits().reason.find("buffers are not registered") != std::string::npos;
        FileOperation read = test::read_operation(0, buffer.bytes());
        test::run_one(**opened, read);
        const bool closed = (*opened)->close().ok();
        ::_exit(said && read.status.ok() && closed ? 0 : 1);
      },
      good_or_unknown, "");
}

}  // namespace
}  // namespace kvtier
