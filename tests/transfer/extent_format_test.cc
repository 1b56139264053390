#include "transfer/extent_format.h"

#include "tests/transfer/aligned_buffer.h"

#include <gtest/gtest.h>

namespace kvtier {
namespace {

using test::AlignedBuffer;

BlockLayout layout_of(std::uint32_t tokens_per_block) {
  BlockShape shape;
  shape.head_dim = 64;
  shape.value_dim = 64;
  shape.kv_heads = 3;
  shape.tokens_per_block = tokens_per_block;
  shape.extent_bytes = 128 * 1024;
  auto layout = BlockLayout::make(shape);
  EXPECT_TRUE(layout.ok());
  return *layout;
}

ExtentEntry entry_of(std::uint32_t place) {
  ExtentEntry entry;
  entry.identity = {.origin = {.high = 0x1122334455667788ULL, .low = 0x99aabbccddeeff00ULL + place},
                    .layer = LayerIndex{21},
                    .head_group = HeadGroup{2},
                    .index = BlockIndex{1000 + place}};
  entry.generation = Generation{place % 3};
  entry.length_bytes = 256 + place;
  entry.checksum = 0xfeedfacecafebeefULL ^ place;
  return entry;
}

class ExtentFormatTest : public ::testing::Test {
 protected:
  ExtentFormatTest()
      : layout_(layout_of(8)),
        memory_(layout_.extent_header_bytes()),
        header_(memory_.bytes(), layout_) {
    // Whatever lay there before must not show.
    test::fill_pattern(memory_.bytes(), 1);
    header_.format(LayerIndex{21}, HeadGroup{2});
  }

  unsigned byte(std::size_t at) const { return static_cast<unsigned>(memory_.bytes()[at]); }

  BlockLayout layout_;
  AlignedBuffer memory_;
  ExtentHeader header_;
};

TEST_F(ExtentFormatTest, EntriesComeBackAsTheyWereSet) {
  for (std::uint32_t place = 0; place < layout_.blocks_per_extent(); ++place) {
    EXPECT_EQ(header_.entry(place), ExtentEntry{});
    header_.set_entry(place, entry_of(place));
  }
  header_.clear_entry(5);
  header_.seal();
  EXPECT_TRUE(header_.verify(LayerIndex{21}, HeadGroup{2}).ok())
      << header_.verify(LayerIndex{21}, HeadGroup{2}).to_string();
  for (std::uint32_t place = 0; place < layout_.blocks_per_extent(); ++place) {
    EXPECT_EQ(header_.entry(place), place == 5 ? ExtentEntry{} : entry_of(place));
  }
}

// The table of transfer/README.md, byte by byte.
TEST_F(ExtentFormatTest, BytesLieWhereTheDocumentSays) {
  header_.set_entry(1, entry_of(1));
  header_.seal();
  const char magic[] = {'K', 'V', 'T', 'X', 'T', 'N', 'T', '\n'};
  for (std::size_t i = 0; i < 8; ++i) {
    EXPECT_EQ(byte(i), static_cast<unsigned char>(magic[i]));
  }
  EXPECT_EQ(byte(8), 1U);
  EXPECT_EQ(byte(9) + byte(10) + byte(11), 0U);
  EXPECT_EQ(byte(12) + (byte(13) << 8), layout_.blocks_per_extent());
  for (unsigned i = 0; i < 8; ++i) {
    EXPECT_EQ(byte(16 + i), (layout_.fingerprint() >> (8 * i)) & 0xff);
  }
  EXPECT_EQ(byte(24), 21U);
  EXPECT_EQ(byte(28), 2U);
  EXPECT_EQ(byte(32) + (byte(33) << 8) + (byte(34) << 16), 128U * 1024);
  EXPECT_EQ(byte(40) + (byte(41) << 8), layout_.block_bytes());
  EXPECT_EQ(byte(44) + (byte(45) << 8), layout_.payload_bytes());
  const std::size_t entry = 64 + 40;
  EXPECT_EQ(byte(entry), 0x88U);
  EXPECT_EQ(byte(entry + 7), 0x11U);
  EXPECT_EQ(byte(entry + 8), 0x01U);
  EXPECT_EQ(byte(entry + 15), 0x99U);
  EXPECT_EQ(byte(entry + 16) + (byte(entry + 17) << 8), 1001U);
  EXPECT_EQ(byte(entry + 20), 1U);
  EXPECT_EQ(byte(entry + 24) + (byte(entry + 25) << 8), 257U);
  EXPECT_EQ(byte(entry + 32), 0xefU ^ 1U);
  EXPECT_EQ(byte(entry + 39), 0xfeU);
  EXPECT_EQ(byte(64), 0U) << "place 0 is empty";
}

TEST_F(ExtentFormatTest, EveryFlippedByteIsDetected) {
  for (std::uint32_t place = 0; place < layout_.blocks_per_extent(); place += 2) {
    header_.set_entry(place, entry_of(place));
  }
  header_.seal();
  for (std::size_t at = 0; at < memory_.bytes().size(); ++at) {
    for (const std::byte flip : {std::byte{0x01}, std::byte{0x80}, std::byte{0xff}}) {
      memory_.bytes()[at] ^= flip;
      EXPECT_EQ(header_.verify(LayerIndex{21}, HeadGroup{2}).code(), StatusCode::kCorrupt)
          << "byte " << at;
      memory_.bytes()[at] ^= flip;
    }
  }
  EXPECT_TRUE(header_.verify(LayerIndex{21}, HeadGroup{2}).ok());
}

TEST_F(ExtentFormatTest, ChangesAfterSealingAreDetected) {
  header_.seal();
  header_.set_entry(0, entry_of(0));
  EXPECT_EQ(header_.verify(LayerIndex{21}, HeadGroup{2}).code(), StatusCode::kCorrupt);
  header_.seal();
  EXPECT_TRUE(header_.verify(LayerIndex{21}, HeadGroup{2}).ok());
}

TEST_F(ExtentFormatTest, MessagesNameFieldFoundAndExpected) {
  header_.seal();
  const struct {
    std::size_t at;
    const char* field;
  } kCases[] = {{0, "magic"},        {8, "version is 0x2, expected 0x1"},
                {12, "block count"}, {16, "layout fingerprint"},
                {56, "checksum"},    {70, "checksum"}};
  for (const auto& expected : kCases) {
    AlignedBuffer copy(memory_.bytes().size());
    std::copy(memory_.bytes().begin(), memory_.bytes().end(), copy.bytes().begin());
    copy.bytes()[expected.at] ^= std::byte{3};
    const Status status = ExtentHeader(copy.bytes(), layout_).verify(LayerIndex{21}, HeadGroup{2});
    EXPECT_NE(status.message().find(expected.field), std::string::npos) << status.message();
  }
}

TEST_F(ExtentFormatTest, AnotherLayoutIsDetected) {
  header_.seal();
  const BlockLayout other = layout_of(16);
  ASSERT_EQ(other.extent_header_bytes(), layout_.extent_header_bytes());
  const Status status = ExtentHeader(memory_.bytes(), other).verify(LayerIndex{21}, HeadGroup{2});
  EXPECT_EQ(status.code(), StatusCode::kCorrupt);
  EXPECT_NE(status.message().find("layout fingerprint"), std::string::npos) << status.message();
}

TEST_F(ExtentFormatTest, MemoryThatWasNeverWrittenIsCorrupt) {
  AlignedBuffer zeros(layout_.extent_header_bytes());
  EXPECT_EQ(ExtentHeader(zeros.bytes(), layout_).verify(LayerIndex{21}, HeadGroup{2}).code(),
            StatusCode::kCorrupt);
}

TEST_F(ExtentFormatTest, BlockOfAnotherLayerIsABug) {
  ExtentEntry entry = entry_of(0);
  entry.identity.layer = LayerIndex{20};
  EXPECT_DEATH(header_.set_entry(0, entry), "a block of layer 20 group 2 in an extent of layer 21");
}

}  // namespace
}  // namespace kvtier
