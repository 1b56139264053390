#include "kernels/checksum.h"
#include "selectors/registry.h"

#include <fmt/format.h>

#include <algorithm>

namespace kvtier {
namespace {

// A saved selector: magic, version, payload checksum, then the payload: name, shape, state.
constexpr std::uint64_t kMagic = 0x4c4553544b564b0au;  // In memory, little-endian: "\nKVKTSEL".
// 2: coded keys and 4-bit rows lie in tiles of bytes.
constexpr std::uint32_t kVersion = 2;

/// Field by field: a struct's padding is not equal when the struct is.
void put_shape(StateWriter& writer, const SelectorShape& shape) {
  writer.put(shape.dtype);
  writer.put(shape.kv_heads);
  writer.put(shape.heads_per_group);
  writer.put(shape.queries_per_kv_head);
  writer.put(shape.head_dim);
  writer.put(shape.value_dim);
  writer.put(shape.tokens_per_block);
  writer.put(shape.sinks);
  writer.put(shape.window);
  writer.put(shape.softmax.scale);
  writer.put(shape.softmax.logit_cap);
  writer.put(shape.rope.theta);
  writer.put(shape.rope.rotated_dims);
  writer.put(shape.reduction);
  writer.put(shape.seed);
  writer.put(shape.layers);
}

}  // namespace

std::vector<std::byte> save_selector(const Selector& selector, std::string_view name,
                                     const SelectorShape& shape) {
  StateWriter payload;
  payload.put_array(std::span(name.data(), name.size()));
  put_shape(payload, shape);
  selector.save(payload);
  StateWriter whole;
  whole.put(kMagic);
  whole.put(kVersion);
  whole.put(checksum(payload.bytes()));
  whole.put_array(payload.bytes());
  return {whole.bytes().begin(), whole.bytes().end()};
}

Result<std::unique_ptr<Selector>> restore_selector(std::span<const std::byte> bytes,
                                                   const SelectorFactory& factory,
                                                   const SelectorShape& shape, LayerIndex layer) {
  StateReader whole(bytes);
  std::uint64_t magic = 0;
  std::uint32_t version = 0;
  std::uint64_t sum = 0;
  std::vector<std::byte> content;
  KVTIER_RETURN_IF_ERROR(whole.get(magic));
  KVTIER_RETURN_IF_ERROR(whole.get(version));
  if (magic != kMagic || version != kVersion) {
    return corrupt(fmt::format("saved selector: found magic {:x} and version {}, expected {:x} {}",
                               magic, version, kMagic, kVersion));
  }
  KVTIER_RETURN_IF_ERROR(whole.get(sum));
  KVTIER_RETURN_IF_ERROR(whole.get_vector(content, bytes.size()));
  if (checksum(content) != sum || !whole.at_end()) {
    return corrupt("saved selector: its bytes do not match their checksum");
  }
  StateReader payload(content);
  std::vector<char> name;
  KVTIER_RETURN_IF_ERROR(payload.get_vector(name, content.size()));
  if (std::string_view(name.data(), name.size()) != factory.name) {
    return invalid_argument(fmt::format("saved selector: found '{}', expected '{}'",
                                        std::string_view(name.data(), name.size()), factory.name));
  }
  StateWriter expected;
  put_shape(expected, shape);
  std::vector<std::byte> found(expected.bytes().size());
  for (std::byte& byte : found) KVTIER_RETURN_IF_ERROR(payload.get(byte));
  if (!std::ranges::equal(found, expected.bytes())) {
    return invalid_argument("saved selector: it was made for another shape of model or blocks");
  }
  KVTIER_ASSIGN_OR_RETURN(std::unique_ptr<Selector> selector, factory(shape, layer));
  KVTIER_RETURN_IF_ERROR(selector->restore(payload));
  if (!payload.at_end()) return corrupt("saved selector: bytes are left over behind its state");
  return selector;
}

}  // namespace kvtier
