#include "selectors/eviction_policy.h"

#include "selectors/eviction_families.h"

#include <fmt/format.h>

#include <string>

namespace kvtier {
namespace {

struct Entry {
  std::string_view name;
  std::unique_ptr<EvictionPolicy> (*make)(std::uint32_t capacity);
};

constexpr Entry kPolicies[] = {{"lru", make_lru}, {"lrfu", make_lrfu}};

}  // namespace

Result<std::unique_ptr<EvictionPolicy>> make_eviction_policy(std::string_view name,
                                                             std::uint32_t capacity) {
  for (const Entry& entry : kPolicies) {
    if (entry.name == name) return entry.make(capacity);
  }
  std::string known;
  for (const Entry& entry : kPolicies) {
    known += known.empty() ? "" : ", ";
    known += entry.name;
  }
  return invalid_argument(fmt::format("unknown eviction policy '{}' (known: {})", name, known));
}

std::vector<std::string_view> known_eviction_policies() {
  std::vector<std::string_view> names;
  for (const Entry& entry : kPolicies) names.push_back(entry.name);
  return names;
}

}  // namespace kvtier
