#include "kernels/checksum.h"
#include "runtime/host_tier.h"

// Of the host tier, what is known of a block's bytes: the checksums that are made when it seals,
// the checks against them, and what a failed one is told as.

namespace kvtier {

void HostTier::set_checksums(BlockId id, const std::byte* bytes) {
  const BlockIdentity identity = table_.identity(id);
  const Generation generation = table_.generation(id);
  ExtentHeader header = table_.header(layout_.extent_of(id));
  header.set_entry(
      layout_.place_of(id),
      {.identity = identity,
       .generation = generation,
       .length_bytes = static_cast<std::uint32_t>(layout_.payload_bytes()),
       .checksum = block_checksum({bytes, layout_.payload_bytes()}, identity, generation)});
  if (table_.keeps_values_checksums()) table_.set_values_checksum(id, sum_values(id, bytes));
}

std::uint64_t HostTier::sum_values(BlockId id, const std::byte* bytes) const {
  return block_checksum(
      {bytes + layout_.key_bytes(), layout_.payload_bytes() - layout_.key_bytes()},
      table_.identity(id), table_.generation(id));
}

BlockCheck HostTier::check(BlockId id, const std::byte* bytes) const {
  if (verify_ == VerifyMode::kNone) return {};
  const ExtentEntry entry = table_.header(layout_.extent_of(id)).entry(layout_.place_of(id));
  BlockCheck checked;
  checked.expected = entry.checksum;
  checked.found =
      block_checksum({bytes, layout_.payload_bytes()}, table_.identity(id), table_.generation(id));
  checked.ok = checked.expected == checked.found && entry.length_bytes == layout_.payload_bytes();
  return checked;
}

BlockCheck HostTier::check_values(BlockId id, const std::byte* bytes) const {
  BlockCheck checked;
  checked.expected = table_.values_checksum(id);
  checked.found = sum_values(id, bytes);
  checked.ok = checked.expected == checked.found;
  return checked;
}

BlockFailure HostTier::describe(BlockId id, Tier tier, StatusCode code, const BlockCheck& check,
                                std::string_view reason) const {
  const BlockIdentity identity = table_.identity(id);
  const Generation generation = table_.generation(id);
  BlockFailure failure{.tier = tier,
                       .identity = identity,
                       .generation = generation,
                       .code = code,
                       .checksum_expected = check.expected,
                       .checksum_found = check.found,
                       .message = {}};
  // An I/O error or a foreign header leaves no checksum to compare.
  const std::string checksums =
      check.ok
          ? ""
          : fmt::format("checksum expected {:016x}, found {:016x}: ", check.expected, check.found);
  failure.message = fmt::format(
      "{}: block {} of layer index {}, head group {}, generation {}, origin {:016x}{:016x}: {}{}",
      to_string(tier), identity.index.value, identity.layer.value, identity.head_group.value,
      generation.value, identity.origin.high, identity.origin.low, checksums, reason);
  return failure;
}

}  // namespace kvtier
