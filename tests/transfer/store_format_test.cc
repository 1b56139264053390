// The byte layouts: what is written is read back, and no byte can change unseen.

#include "transfer/store_format.h"

#include "tests/transfer/store_world.h"
#include "transfer/index_log.h"
#include "transfer/memory_file.h"
#include "transfer/space_map.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

namespace kvtier {
namespace store_format {

using test::key_of;

template <std::size_t kSize>
std::array<std::byte, kSize> bytes_from(int first) {
  std::array<std::byte, kSize> bytes;
  for (std::size_t i = 0; i < kSize; ++i)
    bytes[i] = static_cast<std::byte>(first + static_cast<int>(i));
  return bytes;
}

const SegmentHeader kHeader = {.store = bytes_from<16>(1),
                               .segment = 3,
                               .segments = 8,
                               .segment_bytes = 1 << 20,
                               .layout_fingerprint = 0x1122334455667788,
                               .cipher = Cipher::kAes256Xts,
                               .key = bytes_from<16>(100)};

TEST(StoreFormatTest, SegmentHeadersAreAsSpecifiedAndNoByteChangesUnseen) {
  std::vector<std::byte> page(SegmentHeader::kBytes);
  encode(kHeader, page);
  EXPECT_EQ(std::memcmp(page.data(), "KVTSEGM\n\1\0\0\0\3\0\0\0", 16), 0);
  EXPECT_EQ(page[32], std::byte{0x88});
  EXPECT_EQ(page[60], std::byte{1});
  const auto decoded = decode_segment_header(page);
  ASSERT_TRUE(decoded.ok()) << decoded.status().to_string();
  EXPECT_EQ(*decoded, kHeader);
  for (std::size_t i = 0; i < page.size(); ++i) {
    page[i] ^= std::byte{0x10};
    EXPECT_FALSE(decode_segment_header(page).ok()) << i;
    page[i] ^= std::byte{0x10};
  }
  page[8] = std::byte{2};
  EXPECT_EQ(decode_segment_header(page).status().code(), StatusCode::kUnsupported);
}

TEST(StoreFormatTest, ManifestsAreAsSpecifiedAndNoByteChangesUnseen) {
  const std::vector<ManifestPart> parts = {{.kind = ManifestPart::Kind::kExtent,
                                            .units = 2,
                                            .first = 1,
                                            .second = 2,
                                            .third = 3,
                                            .unit = 6,
                                            .digest = 77},
                                           {.kind = ManifestPart::Kind::kBlobPiece,
                                            .units = 1,
                                            .first = 5,
                                            .second = 0,
                                            .third = 100,
                                            .unit = 9,
                                            .digest = 78},
                                           {.kind = ManifestPart::Kind::kInlineBlob,
                                            .units = 0,
                                            .first = 6,
                                            .second = 0,
                                            .third = 4,
                                            .unit = 160 + 96,
                                            .digest = 79}};
  const ManifestHeader header = {.store = bytes_from<16>(1),
                                 .number = 99,
                                 .layout_fingerprint = 5,
                                 .key = key_of(1),
                                 .parent = key_of(2),
                                 .extent_bytes = 128 * 1024,
                                 .parts = 3,
                                 .bytes = 160 + 96 + 8};
  std::vector<std::byte> manifest(header.bytes);
  manifest[160 + 96] = std::byte{42};
  encode_manifest(header, parts, manifest);
  EXPECT_TRUE(looks_like_manifest(manifest, header.store));
  EXPECT_FALSE(looks_like_manifest(manifest, bytes_from<16>(2)));
  std::vector<ManifestPart> found;
  const auto decoded = decode_manifest(manifest, found);
  ASSERT_TRUE(decoded.ok()) << decoded.status().to_string();
  EXPECT_EQ(decoded->number, 99U);
  EXPECT_EQ(decoded->key, header.key);
  EXPECT_EQ(decoded->parent, header.parent);
  EXPECT_EQ(found, parts);
  for (std::size_t i = 0; i < manifest.size(); ++i) {
    manifest[i] ^= std::byte{1};
    EXPECT_FALSE(decode_manifest(manifest, found).ok()) << i;
    manifest[i] ^= std::byte{1};
  }
  // Cut short anywhere.
  for (std::size_t bytes = 0; bytes < manifest.size(); bytes += 3) {
    EXPECT_FALSE(decode_manifest(std::span(manifest).first(bytes), found).ok());
  }
}

TEST(StoreFormatTest, RandomBytesAreNothing) {
  std::mt19937_64 random(1);
  std::vector<std::byte> bytes(8192);
  for (int round = 0; round < 2000; ++round) {
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
    // With the right beginning, so that more than the magic is looked at.
    std::memcpy(bytes.data(), "KVTMANI\n\1\0\0\0", 12);
    const auto parts_count = static_cast<std::uint8_t>(random() % 16);
    bytes[12] = std::byte{parts_count};
    bytes[13] = bytes[14] = bytes[15] = std::byte{0};
    std::vector<ManifestPart> parts;
    EXPECT_FALSE(decode_manifest(bytes, parts).ok());
    IndexRecord record;
    EXPECT_EQ(decode_record(std::span(bytes).first(128), 1, 0, record), RecordState::kDamaged);
  }
}

IndexRecord record_of(std::uint64_t number) {
  return {.kind = IndexRecord::Kind::kPut,
          .references = 3,
          .unit = 17,
          .units = 1,
          .number = number,
          .manifest = 5,
          .value = 2.5,
          .key = key_of(number)};
}

class IndexLogTest : public ::testing::Test {
 protected:
  static constexpr std::uint64_t kRecords = 128;
  IndexLogTest() : file_({.bytes = IndexLog::file_bytes(kRecords)}) {
    auto log = IndexLog::open(&file_);
    EXPECT_TRUE(log.ok());
    log_ = std::move(*log);
  }
  ~IndexLogTest() override { EXPECT_TRUE(file_.close().ok()); }

  IndexContent load() {
    auto log = IndexLog::open(&file_);
    auto content = (*log)->load(store_);
    EXPECT_TRUE(content.ok()) << content.status().to_string();
    return content.ok() ? *content : IndexContent{};
  }

  StoreId store_ = bytes_from<16>(1);
  MemoryFile file_;
  std::unique_ptr<IndexLog> log_;
};

TEST_F(IndexLogTest, AppendedRecordsAreReadBackAfterEveryNumber) {
  ASSERT_TRUE(log_->rewrite({.store = store_}, {}).ok());
  std::vector<IndexRecord> all;
  for (std::uint64_t i = 0; i < kRecords; ++i) {
    const IndexContent content = load();
    EXPECT_EQ(content.damage, "") << i;
    ASSERT_EQ(content.records, all);
    EXPECT_EQ(log_->room(), kRecords - i);
    all.push_back(record_of(i + 1));
    ASSERT_TRUE(log_->append({&all.back(), 1}).ok());
  }
  EXPECT_EQ(load().records, all);
  EXPECT_EQ(log_->append({all.data(), 1}).code(), StatusCode::kNoSpace);
  // The other area takes over, and what the first one held is no part of it.
  ASSERT_TRUE(log_->rewrite({.store = store_, .clean = true}, std::span(all).first(33)).ok());
  const IndexContent content = load();
  EXPECT_EQ(content.damage, "");
  EXPECT_EQ(content.records.size(), 33U);
  EXPECT_TRUE(content.header.clean);
}

TEST_F(IndexLogTest, EveryLostPageAndEveryFlippedRecordIsNoticed) {
  ASSERT_TRUE(log_->rewrite({.store = store_}, {}).ok());
  std::vector<IndexRecord> records;
  for (std::uint64_t i = 0; i < 64; ++i) records.push_back(record_of(i + 1));
  ASSERT_TRUE(log_->append(records).ok());
  const std::vector<std::byte> sound(file_.bytes().begin(), file_.bytes().end());
  const auto restore = [&] { std::copy(sound.begin(), sound.end(), file_.bytes().begin()); };
  // Two full pages and one of ends: none can go missing, the last one either.
  std::size_t pages_that_matter = 0;
  for (std::size_t at = 0; at < sound.size(); at += 4096) {
    if (std::all_of(sound.begin() + static_cast<std::ptrdiff_t>(at),
                    sound.begin() + static_cast<std::ptrdiff_t>(at + 4096),
                    [](std::byte b) { return b == std::byte{0}; })) {
      continue;
    }
    std::fill_n(file_.bytes().begin() + static_cast<std::ptrdiff_t>(at), 4096, std::byte{0});
    auto log = IndexLog::open(&file_);
    const auto content = (*log)->load(store_);
    // Pages of the area that does not count, its header apart, are nobody's loss.
    ASSERT_TRUE(content.ok());
    const bool is_other_area =
        at / (sound.size() / 2) != log_->area() && at % (sound.size() / 2) > 0;
    EXPECT_EQ(content->damage.empty(), is_other_area) << at;
    pages_that_matter += !is_other_area;
    restore();
  }
  EXPECT_EQ(pages_that_matter, 5U);
  for (std::size_t at = 0; at < sound.size(); at += 131) {
    if (sound[at] == std::byte{0}) continue;
    file_.bytes()[at] ^= std::byte{0x20};
    auto log = IndexLog::open(&file_);
    const auto content = (*log)->load(store_);
    const bool is_other_area =
        content.ok() && content->damage.empty() && content->records == records;
    EXPECT_TRUE(!content.ok() || !content->damage.empty() || is_other_area) << at;
    restore();
  }
}

// Items of 0 to 7 parts, which is up to three records behind a detail.
std::vector<std::vector<ManifestPart>> parts_of_items(std::size_t items) {
  std::vector<std::vector<ManifestPart>> all(items);
  for (std::uint32_t i = 0; i < items; ++i) {
    for (std::uint32_t p = 0; p < i % 8; ++p) {
      all[i].push_back({.units = 1, .first = p, .second = i, .unit = 10 * i + p, .digest = i * p});
    }
  }
  return all;
}

TEST_F(IndexLogTest, ACleanListRepeatsWhatManifestsSayAsFarAsThereIsRoom) {
  const auto parts = parts_of_items(60);
  std::vector<IndexRecord> records;
  std::vector<IndexDetailed> details;
  for (std::uint32_t i = 0; i < parts.size(); ++i) {
    records.push_back(record_of(i + 1));
    details.push_back({.detail = {.parent = key_of(i),
                                  .layout_fingerprint = 77,
                                  .extent_bytes = 8192,
                                  .manifest_bytes = 4000 + i,
                                  .parts = static_cast<std::uint32_t>(parts[i].size())},
                       .parts = parts[i]});
  }
  ASSERT_TRUE(log_->rewrite({.store = store_, .clean = true}, records, details).ok());
  const IndexContent content = load();
  EXPECT_EQ(content.damage, "");
  EXPECT_EQ(content.records, records);
  // 128 lines: 60 records, and details for some of them.
  EXPECT_LE(content.header.records, kRecords);
  ASSERT_GT(content.details.size(), 10U);
  ASSERT_LT(content.details.size(), 60U);
  std::vector<ManifestPart> expected;
  for (std::size_t i = 0; i < content.details.size(); ++i) {
    EXPECT_EQ(content.details[i], details[i].detail);
    expected.insert(expected.end(), parts[i].begin(), parts[i].end());
  }
  EXPECT_EQ(content.parts, expected);
  // A list that goes on after a clean stop is another one.
  ASSERT_TRUE(log_->rewrite({.store = store_}, records).ok());
  EXPECT_TRUE(load().details.empty());
}

TEST_F(IndexLogTest, DetailsOutOfPlaceAreDamage) {
  const auto parts = parts_of_items(8);
  const IndexRecord record = record_of(1);
  const auto damage_of = [&](const IndexDetail& detail, std::span<const ManifestPart> listed) {
    const IndexDetailed detailed{.detail = detail, .parts = listed};
    EXPECT_TRUE(log_->rewrite({.store = store_, .clean = true}, {&record, 1}, {&detailed, 1}).ok());
    return load().damage;
  };
  const IndexDetail sound = {.extent_bytes = 8192, .manifest_bytes = 4096, .parts = 7};
  EXPECT_EQ(damage_of(sound, parts[7]), "");
  // Parts of a size that the item's extents do not have.
  IndexDetail other = sound;
  other.extent_bytes = 100'000;
  EXPECT_NE(damage_of(other, parts[7]), "");
  // Fewer parts than the detail says.
  const std::span<std::byte> bytes = file_.bytes();
  EXPECT_EQ(damage_of(sound, parts[7]), "");
  const std::size_t area = bytes.size() / 2 * log_->area();
  encode(record, log_->epoch(), 4, bytes.subspan(area + 4096 + 4 * 128, 128));
  EXPECT_THAT(load().damage, ::testing::HasSubstr("record 4 is torn"));
}

TEST_F(IndexLogTest, AFailedWriteStopsAppendingUntilARewrite) {
  ASSERT_TRUE(log_->rewrite({.store = store_}, {}).ok());
  EXPECT_EQ(log_->rewrite({.store = store_}, std::vector<IndexRecord>(kRecords + 1)).code(),
            StatusCode::kNoSpace);
  EXPECT_TRUE(log_->is_sound());
  EXPECT_EQ(load().damage, "");
}

}  // namespace store_format
}  // namespace kvtier
