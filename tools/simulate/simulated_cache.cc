#include "tools/simulate/simulated_cache.h"

namespace kvtier {
namespace {

struct CacheFamily {
  std::string_view name;
  std::unique_ptr<SimulatedCache> (*make)(const SimulatedCacheOptions&);
};
constexpr CacheFamily kCacheFamilies[] = {
    {"lru", make_simulated_lru},         {"fifo", make_simulated_fifo},
    {"s3-fifo", make_simulated_s3_fifo}, {"sieve", make_simulated_sieve},
    {"arc", make_simulated_arc},         {"gdsf", make_simulated_gdsf},
};

}  // namespace

std::unique_ptr<SimulatedCache> make_simulated_cache(std::string_view policy,
                                                     const SimulatedCacheOptions& options) {
  for (const CacheFamily& family : kCacheFamilies) {
    if (family.name == policy) return family.make(options);
  }
  KVTIER_CHECK(false, "no policy '{}'", policy);
}

std::vector<std::string_view> known_simulated_caches() {
  std::vector<std::string_view> names;
  for (const CacheFamily& family : kCacheFamilies) names.push_back(family.name);
  return names;
}

}  // namespace kvtier
