// The store in a real folder: names, modes, locks, and files that others damage meanwhile.

#include "tests/transfer/store_world.h"
#include "tests/transfer/test_files.h"
#include "transfer/disk_directory.h"
#include "transfer/faulty_file.h"
#include "transfer/store.h"
#include "transfer/store_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <numeric>

namespace kvtier {
namespace store_disk {

namespace fs = std::filesystem;
using test::ItemVerdict;
using test::key_of;
using test::put_item;
using test::read_item;
using testing::HasSubstr;

constexpr std::uint64_t kDiskCapacity = 8 << 20;

class StoreDiskTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(test::scratch_directory()) / fmt::format("kvtier-store-{}", ::getpid());
    fs::remove_all(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::unique_ptr<Store> open(FileBackend backend = FileBackend::kAuto,
                              PageCipher* cipher = nullptr, Durability level = Durability::kCrash) {
    auto directory = open_disk_directory(folder_, {.backend = backend, .queue_depth = 8});
    EXPECT_TRUE(directory.ok()) << directory.status().to_string();
    if (!directory.ok()) return nullptr;
    StoreOptions options = test::store_options(kDiskCapacity, level);
    options.cipher = cipher;
    auto store = Store::open(std::move(*directory), options);
    EXPECT_TRUE(store.ok()) << store.status().to_string();
    return store.ok() ? std::move(*store) : nullptr;
  }

  std::uint64_t bytes_on_disk() const {
    std::uint64_t bytes = 0;
    for (const auto& entry : fs::directory_iterator(folder_)) {
      struct stat found {};
      EXPECT_EQ(::stat(entry.path().c_str(), &found), 0);
      bytes += std::max<std::uint64_t>(static_cast<std::uint64_t>(found.st_size),
                                       static_cast<std::uint64_t>(found.st_blocks) * 512);
    }
    return bytes;
  }

  fs::path folder_;
  BlockLayout layout_ = test::small_layout(64 * 1024);
};

TEST_F(StoreDiskTest, EveryBackendKeepsItems) {
  for (const FileBackend backend : {FileBackend::kPosix, FileBackend::kAuto}) {
    fs::remove_all(folder_);
    for (int life = 0; life < 3; ++life) {
      auto store = open(backend);
      ASSERT_NE(store, nullptr);
      for (std::uint64_t number = 1; number <= 10; ++number) {
        if (life == 0) {
          ASSERT_TRUE(put_item(*store, layout_, number).ok());
        }
        EXPECT_TRUE(read_item(*store, layout_, number).whole);
      }
      ASSERT_TRUE(store->close().ok());
    }
  }
}

TEST_F(StoreDiskTest, FilesAreTheOwnersAlone) {
  auto store = open();
  struct stat found {};
  ASSERT_EQ(::stat(folder_.c_str(), &found), 0);
  EXPECT_EQ(found.st_mode & 07777, 0700U);
  for (const auto& entry : fs::directory_iterator(folder_)) {
    ASSERT_EQ(::stat(entry.path().c_str(), &found), 0);
    EXPECT_EQ(found.st_mode & 07777, 0600U) << entry.path();
  }
  ASSERT_TRUE(store->close().ok());
  store.reset();
  // A folder that others may enter, a file that others may read, links in place of either.
  fs::permissions(folder_, fs::perms(0755));
  auto refused = open_disk_directory(folder_, {});
  EXPECT_EQ(refused.status().code(), StatusCode::kUnsupported);
  EXPECT_THAT(refused.status().message(), HasSubstr("chmod 700"));
  fs::permissions(folder_, fs::perms(0700));
  const fs::path link = folder_.string() + "-link";
  fs::remove(link);
  fs::create_directory_symlink(folder_, link);
  EXPECT_EQ(open_disk_directory(link, {}).status().code(), StatusCode::kUnsupported);
  EXPECT_EQ(open_disk_directory(link.string() + "/", {}).status().code(), StatusCode::kUnsupported);
  fs::remove(link);
  const fs::path segment = folder_ / "segment-0000";
  const auto open_fails_with = [&](StatusCode code) {
    auto directory = open_disk_directory(folder_, {});
    ASSERT_TRUE(directory.ok());
    const auto opened = Store::open(std::move(*directory), test::store_options(kDiskCapacity));
    EXPECT_EQ(opened.status().code(), code) << opened.status().to_string();
  };
  fs::permissions(segment, fs::perms(0644));
  open_fails_with(StatusCode::kUnsupported);
  fs::permissions(segment, fs::perms(0600));
  fs::rename(segment, folder_ / "elsewhere");
  fs::create_symlink(folder_ / "elsewhere", segment);
  open_fails_with(StatusCode::kUnsupported);
  fs::remove(segment);
  fs::create_hard_link(folder_ / "elsewhere", segment);
  open_fails_with(StatusCode::kUnsupported);
}

TEST_F(StoreDiskTest, ASecondProcessIsToldWhoHoldsTheStore) {
  auto store = open();
  const auto second = open_disk_directory(folder_, {});
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.status().code(), StatusCode::kBusy);
  EXPECT_THAT(second.status().message(), HasSubstr(fmt::format("process {} on host", ::getpid())));
  ASSERT_TRUE(store->close().ok());
  store.reset();
  EXPECT_TRUE(open_disk_directory(folder_, {}).ok());
}

TEST_F(StoreDiskTest, AHundredTimesTheCapacityStaysWithinIt) {
  auto store = open();
  const std::uint64_t items = 100 * kDiskCapacity / (5 * 64 * 1024);
  std::mt19937_64 random(3);
  for (std::uint64_t number = 1; number <= items; ++number) {
    ASSERT_TRUE(put_item(*store, layout_, number,
                         {.extents = 4, .value = static_cast<double>(random() % 3)})
                    .ok());
    if (number % 64 == 0) {
      ASSERT_LE(bytes_on_disk(), kDiskCapacity);
    }
  }
  EXPECT_GE(store->stats().written_bytes, 80 * kDiskCapacity);
  EXPECT_EQ(store->stats().blocks_corrupt, 0U);
  EXPECT_TRUE(read_item(*store, layout_, items, {.extents = 4}).whole);
  ASSERT_TRUE(store->close().ok());
  EXPECT_LE(bytes_on_disk(), kDiskCapacity);
}

TEST_F(StoreDiskTest, FilesTakenAwayWhileOpenAreNoticed) {
  auto store = open();
  ASSERT_TRUE(put_item(*store, layout_, 1).ok());
  // Cut short: what was read before is an error of its own now, and new items are refused.
  const fs::path segment = folder_ / "segment-0000";
  const std::uint64_t size = fs::file_size(segment);
  fs::resize_file(segment, 4096);
  const ItemVerdict verdict = read_item(*store, layout_, 1);
  EXPECT_TRUE(verdict.found);
  EXPECT_FALSE(verdict.whole);
  EXPECT_FALSE(verdict.wrong);
  EXPECT_EQ(verdict.status.code(), StatusCode::kIoError) << verdict.status.to_string();
  EXPECT_GT(store->stats().read_failures, 0U);
  fs::resize_file(segment, size);
  ASSERT_TRUE(put_item(*store, layout_, 2).ok());
  // Removed: reads go on through the open file, but nothing new would survive.
  fs::remove(segment);
  EXPECT_TRUE(read_item(*store, layout_, 2).whole);
  const Status lost = put_item(*store, layout_, 3);
  EXPECT_EQ(lost.code(), StatusCode::kIoError);
  EXPECT_THAT(lost.message(), HasSubstr("segment-0000"));
  EXPECT_FALSE(store->contains(key_of(3)));
  ASSERT_TRUE(store->close().ok());
  store.reset();
  store = open();
  EXPECT_THAT(store->notice(), HasSubstr("segment-0000 is missing"));
  EXPECT_TRUE(put_item(*store, layout_, 4).ok());
  ASSERT_TRUE(store->close().ok());
}

TEST_F(StoreDiskTest, LevelNoneLeavesNothing) {
  fs::create_directory(folder_);
  auto store = open_store(folder_, test::store_options(kDiskCapacity, Durability::kNone));
  ASSERT_TRUE(store.ok()) << store.status().to_string();
  ASSERT_TRUE(put_item(**store, layout_, 1).ok());
  EXPECT_TRUE(read_item(**store, layout_, 1).whole);
  EXPECT_TRUE(fs::is_empty(folder_));
  ASSERT_TRUE((*store)->close().ok());
  EXPECT_TRUE(fs::is_empty(folder_));
}

PageCipher cipher_of(int seed) {
  std::vector<std::byte> key(PageCipher::kKeyBytes);
  test::fill_pattern(key, static_cast<std::uint64_t>(seed));
  auto cipher = PageCipher::make(key);
  EXPECT_TRUE(cipher.ok());
  return std::move(*cipher);
}

TEST_F(StoreDiskTest, EncryptedContentIsReadWithItsKeyAlone) {
  PageCipher right = cipher_of(1);
  PageCipher wrong = cipher_of(2);
  test::ItemShape shape{.extents = 20, .blob_bytes = 300'000};
  auto store = open(FileBackend::kAuto, &right);
  ASSERT_TRUE(put_item(*store, layout_, 1, shape).ok());
  EXPECT_TRUE(read_item(*store, layout_, 1, shape).whole);
  ASSERT_TRUE(store->close().ok());
  store.reset();
  std::ifstream file(folder_ / "segment-0000", std::ios::binary);
  const std::string bytes(std::istreambuf_iterator<char>(file), {});
  EXPECT_EQ(bytes.find("KVTXTNT"), std::string::npos);
  EXPECT_EQ(bytes.find("KVTMANI"), std::string::npos);
  for (PageCipher* cipher : {&wrong, static_cast<PageCipher*>(nullptr)}) {
    store = open(FileBackend::kAuto, cipher);
    EXPECT_THAT(store->notice(), HasSubstr("encrypted with key"));
    EXPECT_FALSE(store->contains(key_of(1)));
    EXPECT_EQ(store->find(key_of(1)).status().code(), StatusCode::kNotFound);
    EXPECT_EQ(put_item(*store, layout_, 2).code(), StatusCode::kUnsupported);
    ASSERT_TRUE(store->close().ok());
    store.reset();
  }
  store = open(FileBackend::kAuto, &right);
  EXPECT_TRUE(read_item(*store, layout_, 1, shape).whole);
  ASSERT_TRUE(store->close().ok());
  store.reset();
  fs::remove(folder_ / "index");
  store = open(FileBackend::kAuto, &right);
  EXPECT_TRUE(store->stats().rebuilt);
  EXPECT_TRUE(read_item(*store, layout_, 1, shape).whole);
  ASSERT_TRUE(store->close().ok());
}

TEST_F(StoreDiskTest, KeysAreReadFromFilesThatNobodyElseMayRead) {
  fs::create_directory(folder_);
  const fs::path path = folder_ / "key";
  const auto write = [&](const std::string& text, unsigned mode) {
    fs::remove(path);
    std::ofstream(path, std::ios::binary) << text;
    fs::permissions(path, fs::perms(mode));
  };
  std::string digits;
  for (int i = 0; i < 64; ++i) digits += fmt::format("{:02x}", (i * 7 + 1) & 0xff);
  write(digits + "\n", 0600);
  const auto cipher = PageCipher::read(path);
  ASSERT_TRUE(cipher.ok()) << cipher.status().to_string();
  std::string raw;
  for (int i = 0; i < 64; ++i) raw += static_cast<char>((i * 7 + 1) & 0xff);
  write(raw, 0600);
  const auto same = PageCipher::read(path);
  ASSERT_TRUE(same.ok());
  EXPECT_EQ(cipher->id(), same->id());
  write(digits, 0644);
  EXPECT_EQ(PageCipher::read(path).status().code(), StatusCode::kUnsupported);
  write(digits.substr(1), 0600);
  EXPECT_EQ(PageCipher::read(path).status().code(), StatusCode::kInvalidArgument);
  write("x" + digits.substr(1), 0600);
  EXPECT_EQ(PageCipher::read(path).status().code(), StatusCode::kInvalidArgument);
  write(std::string(128, 'a'), 0600);
  EXPECT_EQ(PageCipher::read(path).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(PageCipher::read(folder_ / "none").status().code(), StatusCode::kNotFound);
}

// Wraps every file of a folder.
class FaultyDirectory final : public StoreDirectory {
 public:
  FaultyDirectory(std::unique_ptr<StoreDirectory> inner, const FaultPlan& plan, FaultCounts* counts)
      : inner_(std::move(inner)), plan_(plan), counts_(counts) {}
  const std::string& name() const override { return inner_->name(); }
  Result<std::optional<std::uint64_t>> size_of(const std::string& file) override {
    return inner_->size_of(file);
  }
  Result<std::unique_ptr<File>> create(const std::string& file, std::uint64_t bytes) override {
    return wrap(inner_->create(file, bytes));
  }
  Result<std::unique_ptr<File>> open(const std::string& file) override {
    return wrap(inner_->open(file));
  }
  Status remove(const std::string& file) override { return inner_->remove(file); }
  Status check(const std::string& file) override { return inner_->check(file); }
  Status sync() override { return inner_->sync(); }
  Result<std::uint64_t> free_bytes() override { return inner_->free_bytes(); }

 private:
  Result<std::unique_ptr<File>> wrap(Result<std::unique_ptr<File>> file) {
    if (!file.ok()) return file;
    return std::unique_ptr<File>(new FaultyFile(std::move(*file), plan_, counts_));
  }
  std::unique_ptr<StoreDirectory> inner_;
  FaultPlan plan_;
  FaultCounts* counts_;
};

TEST_F(StoreDiskTest, UnderEveryFaultNothingWrongIsCalledGood) {
  const auto plan = FaultPlan::parse(
      "bitflip:0.01,rot:0.01,shortread:0.02,eio:0.01,writeeio:0.01,enospc:0.01,misplaced:0.01,"
      "lostwrite:0.01,delay:0.05,seed=5");
  ASSERT_TRUE(plan.ok()) << plan.status().to_string();
  FaultCounts counts;
  std::uint64_t whole = 0;
  std::uint64_t refused = 0;
  for (std::uint64_t life = 0; life < 30; ++life) {
    SCOPED_TRACE(life);
    FaultPlan seeded = *plan;
    seeded.seed = life;
    auto inner = open_disk_directory(folder_, {.backend = FileBackend::kPosix, .queue_depth = 8});
    ASSERT_TRUE(inner.ok());
    auto store = Store::open(std::make_unique<FaultyDirectory>(std::move(*inner), seeded, &counts),
                             test::store_options(kDiskCapacity));
    if (!store.ok()) {
      // A store whose first page cannot be read or written is refused, and the folder starts anew.
      if (life % 3 == 0) fs::remove_all(folder_);
      continue;
    }
    for (std::uint64_t number = 1; number <= 40; ++number) {
      if (!(*store)->contains(key_of(number))) {
        const Status ignored = put_item(**store, layout_, number);
        refused += !ignored.ok();
      }
      const ItemVerdict verdict = read_item(**store, layout_, number);
      ASSERT_FALSE(verdict.wrong) << number;
      whole += verdict.whole;
      if (verdict.found && verdict.status.code() == StatusCode::kCorrupt) {
        refused += 1;
        const Status ignored = (*store)->erase(key_of(number));
        refused += !ignored.ok();
      }
    }
    const Status ignored = (*store)->close();
    refused += !ignored.ok();
  }
  EXPECT_GT(whole, 100U);
  EXPECT_GT(refused, 20U);
}

TEST_F(StoreDiskTest, ACheckFindsAndDropsWhatIsUnsound) {
  auto store = open();
  for (std::uint64_t number = 1; number <= 6; ++number) {
    ASSERT_TRUE(put_item(*store, layout_, number).ok());
  }
  auto report = check_store(*store, false);
  ASSERT_TRUE(report.ok());
  EXPECT_TRUE(report->sound());
  EXPECT_EQ(report->items, 6U);
  EXPECT_EQ(report->extents, 12U);
  EXPECT_EQ(report->blobs, 6U);
  ASSERT_TRUE(store->close().ok());
  store.reset();
  // One bit of one block.
  std::fstream file(folder_ / "segment-0000", std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(static_cast<std::streamoff>(SegmentHeader::kDataOffset + layout_.block_offset(3)));
  file.put('!');
  file.close();
  auto segment = inspect_segment(folder_ / "segment-0000", nullptr);
  ASSERT_TRUE(segment.ok()) << segment.status().to_string();
  EXPECT_EQ(segment->extents, 12U);
  EXPECT_EQ(segment->manifests, 6U);
  EXPECT_EQ(segment->blocks_corrupt, 1U);
  store = open();
  report = check_store(*store, false);
  ASSERT_TRUE(report.ok());
  EXPECT_FALSE(report->sound());
  ASSERT_EQ(report->unsound.size(), 1U);
  report = check_store(*store, true);
  EXPECT_TRUE(report->sound());
  EXPECT_EQ(report->repaired, 1U);
  report = check_store(*store, false);
  EXPECT_TRUE(report->sound());
  EXPECT_EQ(report->items, 5U);
  ASSERT_TRUE(store->close().ok());
}

}  // namespace store_disk
}  // namespace kvtier
