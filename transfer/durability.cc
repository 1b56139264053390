#include "transfer/durability.h"

namespace kvtier {
namespace {

constexpr const char* kDurabilityNames[] = {"none", "clean", "crash", "power"};

}  // namespace

const char* to_string(Durability level) {
  const auto index = static_cast<std::size_t>(level);
  KVTIER_CHECK(index < std::size(kDurabilityNames), "durability level {}", index);
  return kDurabilityNames[index];
}

Result<Durability> parse_durability(std::string_view text) {
  for (std::size_t i = 0; i < std::size(kDurabilityNames); ++i) {
    if (text == kDurabilityNames[i]) return static_cast<Durability>(i);
  }
  return invalid_argument(
      fmt::format("durability '{}', expected none, clean, crash or power", text));
}

}  // namespace kvtier
