#include "tools/cli/segment_inspection.h"

#include "tools/cli/parse.h"
#include "tools/cli/text_table.h"

#include <cstring>

namespace kvtier {
namespace {

std::string hex_text(std::span<const std::byte> bytes) {
  std::string text;
  for (const std::byte byte : bytes) text += fmt::format("{:02x}", std::to_integer<int>(byte));
  return text;
}

const char* cipher_name(Cipher cipher) {
  return cipher == Cipher::kAes256Xts ? "aes-256-xts" : "none";
}

}  // namespace

bool is_segment(std::span<const std::byte> bytes) {
  return bytes.size() >= SegmentHeader::kBytes && std::memcmp(bytes.data(), "KVTSEGM\n", 8) == 0;
}

std::string segment_table(const std::string& path, const SegmentReport& report) {
  const SegmentHeader& header = report.header;
  TextTable table(2);
  const auto add = [&](const char* name, const std::string& text) {
    table.add({std::string("  ") + name, text});
  };
  add("store",
      fmt::format("{}, segment {} of {}", hex_text(header.store), header.segment, header.segments));
  add("size", fmt::format("{} ({} B)", format_bytes(report.file_bytes), report.file_bytes));
  add("layout", fmt::format("{:#018x} when the store was made", header.layout_fingerprint));
  add("codec", "none");
  add("cipher", header.cipher == Cipher::kNone
                    ? "none"
                    : fmt::format("{}, key {}", cipher_name(header.cipher), hex_text(header.key)));
  add("manifests", fmt::format("{} sound", report.manifests));
  add("extents", fmt::format("{} with {} blocks, {} of them corrupt", report.extents, report.blocks,
                             report.blocks_corrupt));
  add("other units", fmt::format("{} begin with zeros, {} are blobs, insides or remains",
                                 report.empty_units, report.other_units));
  std::string text = fmt::format("segment {}\n{}", path, table.text());
  for (const std::string& line : report.corrupt) text += fmt::format("  corrupt: {}\n", line);
  return text + (report.blocks_corrupt == 0 ? "  sound\n" : "  NOT sound\n");
}

nlohmann::ordered_json segment_json(const SegmentReport& report) {
  const SegmentHeader& header = report.header;
  return {{"store", hex_text(header.store)},
          {"segment", header.segment},
          {"segments", header.segments},
          {"file_bytes", report.file_bytes},
          {"layout_fingerprint", fmt::format("{:#018x}", header.layout_fingerprint)},
          {"codec", "none"},
          {"cipher", cipher_name(header.cipher)},
          {"key_id", header.cipher == Cipher::kNone ? nlohmann::ordered_json(nullptr)
                                                    : nlohmann::ordered_json(hex_text(header.key))},
          {"manifests", report.manifests},
          {"extents", report.extents},
          {"blocks", report.blocks},
          {"blocks_corrupt", report.blocks_corrupt},
          {"empty_units", report.empty_units},
          {"other_units", report.other_units},
          {"corrupt", report.corrupt}};
}

}  // namespace kvtier
