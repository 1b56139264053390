// The real program on a real store: `fsck` and `inspect` of a segment.

#include "tests/tools/make_trace.h"
#include "tests/tools/run_kvtier.h"
#include "tests/transfer/store_world.h"
#include "transfer/disk_directory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>

namespace kvtier {
namespace store_command {

using nlohmann::ordered_json;
using testing::HasSubstr;

// A folder with a store of three items, as a process leaves it.
class StoreCommandTest : public ::testing::Test {
 protected:
  void make(PageCipher* cipher = nullptr) {
    auto directory = open_disk_directory(path(), {});
    ASSERT_TRUE(directory.ok()) << directory.status().to_string();
    StoreOptions options = test::store_options(4 << 20);
    options.cipher = cipher;
    auto store = Store::open(std::move(*directory), options);
    ASSERT_TRUE(store.ok()) << store.status().to_string();
    for (std::uint64_t number = 1; number <= 3; ++number) {
      ASSERT_TRUE(test::put_item(**store, layout_, number).ok());
    }
    ASSERT_TRUE((*store)->close().ok());
  }
  std::string path() const { return (scratch_.path() / "store").string(); }
  std::string segment() const { return path() + "/segment-0000"; }
  void damage() {
    std::fstream file(segment(), std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(static_cast<std::streamoff>(SegmentHeader::kDataOffset + layout_.block_offset(3)));
    file.put('!');
  }

  const ScratchFolder scratch_;
  BlockLayout layout_ = test::small_layout();
};

TEST_F(StoreCommandTest, FsckPassesWhatIsSoundAndRepairsWhatIsNot) {
  make();
  Outcome outcome = run_kvtier({"fsck", path()});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_THAT(outcome.output, HasSubstr("3 items, 6 extents, 96 blocks, 3 blobs"));
  EXPECT_THAT(outcome.output, HasSubstr("\n  sound\n"));
  damage();
  outcome = run_kvtier({"fsck", path(), "--format", "json"});
  EXPECT_EQ(outcome.exit_code, 4);
  ordered_json json = ordered_json::parse(outcome.output);
  EXPECT_EQ(json["schema"], "kvtier.fsck-result");
  EXPECT_EQ(json["version"], 1);
  EXPECT_EQ(json["sound"], false);
  EXPECT_EQ(json["blocks_corrupt"], 1);
  EXPECT_EQ(json["unsound"].size(), 1U);
  outcome = run_kvtier({"fsck", path(), "--repair"});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.output, HasSubstr("1 items dropped"));
  for (const bool rebuild : {false, true}) {
    std::vector<std::string> arguments = {"fsck", path(), "--format", "json"};
    if (rebuild) arguments.push_back("--rebuild");
    outcome = run_kvtier(arguments);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
    json = ordered_json::parse(outcome.output);
    EXPECT_EQ(json["items"], 2);
    EXPECT_EQ(json["rebuilt"], rebuild);
  }
}

TEST_F(StoreCommandTest, FsckOfWhatIsNoStoreIsBadInput) {
  EXPECT_EQ(run_kvtier({"fsck", path()}).exit_code, 3);
  make();
  const auto held = open_disk_directory(path(), {});
  ASSERT_TRUE(held.ok());
  const Outcome outcome = run_kvtier({"fsck", path(), "--repair"});
  EXPECT_EQ(outcome.exit_code, 3);
  EXPECT_THAT(outcome.errors, HasSubstr("is in use by process"));
  EXPECT_EQ(run_kvtier({"fsck", path()}).exit_code, 0);
  EXPECT_EQ(run_kvtier({"fsck"}).exit_code, 2);
}

TEST_F(StoreCommandTest, InspectShowsASegmentAndNamesItsDamage) {
  make();
  Outcome outcome = run_kvtier({"inspect", segment()});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_THAT(outcome.output, HasSubstr("6 with 96 blocks, 0 of them corrupt"));
  outcome = run_kvtier({"inspect", segment(), "--format", "json"});
  const ordered_json json = ordered_json::parse(outcome.output);
  EXPECT_EQ(json["kind"], "segment");
  EXPECT_EQ(json["segment"]["manifests"], 3);
  EXPECT_EQ(json["segment"]["blocks"], 96);
  damage();
  outcome = run_kvtier({"inspect", segment()});
  EXPECT_EQ(outcome.exit_code, 3);
  EXPECT_THAT(outcome.errors, HasSubstr("1 of 96 blocks are corrupt"));
  std::fstream file(segment(), std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(40);
  file.put('!');
  file.close();
  outcome = run_kvtier({"inspect", segment()});
  EXPECT_EQ(outcome.exit_code, 3);
  EXPECT_THAT(outcome.errors, HasSubstr("segment header: checksum"));
}

TEST_F(StoreCommandTest, AnEncryptedStoreNeedsItsKey) {
  std::string digits;
  for (int i = 0; i < 64; ++i) digits += fmt::format("{:02x}", i + 1);
  auto cipher = PageCipher::parse(std::as_bytes(std::span(digits)));
  ASSERT_TRUE(cipher.ok());
  make(&*cipher);
  const std::string key = (scratch_.path() / "key").string();
  std::ofstream(key) << digits << "\n";
  std::filesystem::permissions(key, std::filesystem::perms(0600));
  Outcome outcome = run_kvtier({"fsck", path(), "--key-file", key});
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.output, HasSubstr("3 items"));
  EXPECT_EQ(run_kvtier({"inspect", segment(), "--key-file", key}).exit_code, 0);
  EXPECT_EQ(run_kvtier({"inspect", segment()}).exit_code, 3);
  outcome = run_kvtier({"fsck", path()});
  EXPECT_THAT(outcome.output, HasSubstr("0 items"));
  EXPECT_THAT(outcome.output, HasSubstr("encrypted with key"));
  ASSERT_EQ(::setenv("KVTIER_STORE_KEY", digits.c_str(), 1), 0);
  outcome = run_kvtier({"fsck", path()});
  ::unsetenv("KVTIER_STORE_KEY");
  EXPECT_THAT(outcome.output, HasSubstr("3 items"));
}

}  // namespace store_command
}  // namespace kvtier
