// The C ABI: what there is to select by, statistics, timelines.

#include "runtime/c_api_state.h"
#include "runtime/timeline_json.h"

#include <nlohmann/json.hpp>

#include <cstdio>

using namespace kvtier;
using namespace kvtier::c_api;
using Json = nlohmann::ordered_json;

namespace kvtier::c_api {

Status write_text(const std::string& text, char* target, std::size_t capacity,
                  std::size_t* needed) {
  if (needed == nullptr && target == nullptr) return invalid_argument("text and needed are NULL");
  if (needed != nullptr) *needed = text.size() + 1;
  if (target == nullptr && capacity == 0) return {};
  if (target == nullptr) return invalid_argument("text is NULL");
  if (text.size() + 1 > capacity) {
    return no_space(fmt::format("the text has {} B with its closing zero, there is room for {}",
                                text.size() + 1, capacity));
  }
  std::memcpy(target, text.c_str(), text.size() + 1);
  return {};
}

namespace {

Json needs_json(const SelectorNeeds& needs) {
  Json list = Json::array();
  if (needs.values) list.push_back("values");
  if (needs.prompt_queries) list.push_back("prompt_queries");
  if (needs.sentence_ends) list.push_back("sentence_ends");
  if (needs.landmark_tokens) list.push_back("landmark_tokens");
  if (needs.rope) list.push_back("rope");
  if (needs.external_scores) list.push_back("external_scores");
  return list;
}

Json tier_json(const TierStats& tier) {
  return {{"capacity_bytes", tier.capacity_bytes}, {"used_bytes", tier.used_bytes},
          {"peak_bytes", tier.peak_bytes},         {"hits", tier.hits},
          {"held_hits", tier.held_hits},           {"evictions", tier.evictions}};
}

Json route_json(const RouteStats& route) {
  return {{"transfers", route.transfers},
          {"bytes", route.bytes},
          {"failures", route.failures},
          {"short_transfers", route.short_transfers},
          {"in_flight_bytes_peak", route.in_flight_bytes_peak}};
}

Json stats_json(const kvtier_runtime& runtime, const RuntimeStats& stats) {
  Json json;
  json["schema"] = "kvtier.runtime-stats";
  json["version"] = 1;
  json["device"] = runtime.device->name();
  json["disk"] = runtime.disk != nullptr ? Json(runtime.disk->traits().backend) : Json(nullptr);
  for (int tier = 0; tier < kTierCount; ++tier) {
    json["tiers"][to_string(static_cast<Tier>(tier))] =
        tier_json(stats.tiers[static_cast<std::size_t>(tier)]);
  }
  for (int route = 0; route < kRouteCount; ++route) {
    json["routes"][to_string(static_cast<Route>(route))] =
        route_json(stats.routes[static_cast<std::size_t>(route)]);
  }
  json["verification"] = {{"verified", stats.verification.verified},
                          {"mismatched", stats.verification.mismatched},
                          {"recovered", stats.verification.recovered},
                          {"failed", stats.verification.failed}};
  json["prefetch"] = {{"issued_bytes", stats.prefetch.issued_bytes},
                      {"useful_bytes", stats.prefetch.useful_bytes},
                      {"wasted_bytes", stats.prefetch.wasted_bytes},
                      {"late", stats.prefetch.late}};
  json["metadata_bytes"] = stats.metadata_bytes;
  json["steps"] = stats.steps;
  json["exact_steps"] = stats.attends;
  json["steps_measured"] = stats.steps_measured;
  json["waves"] = stats.waves;
  json["disk_reads_repeated"] = stats.disk_reads_repeated;
  json["disk_writes_failed"] = stats.disk_writes_failed;
  return json;
}

kvtier_tier_stats tier_stats(const TierStats& tier) {
  return {tier.capacity_bytes, tier.used_bytes, tier.peak_bytes,
          tier.hits,           tier.held_hits,  tier.evictions};
}

std::uint64_t route_bytes(const RuntimeStats& stats, Route route) {
  return stats.routes[static_cast<std::size_t>(route)].bytes;
}

Status write_file(const std::string& text, const char* path) {
  std::FILE* file = std::fopen(path, "we");
  if (file == nullptr) return io_error(fmt::format("{}: {}", path, std::strerror(errno)));
  const bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  if (std::fclose(file) != 0 || !written) {
    return io_error(fmt::format("{}: {}", path, std::strerror(errno)));
  }
  return {};
}

}  // namespace
}  // namespace kvtier::c_api

kvtier_status kvtier_list_selectors(char* text, size_t capacity, size_t* needed) {
  return guarded([&] {
    Json list = Json::array();
    for (const SelectorListing& listing : known_selectors()) {
      list.push_back({{"name", listing.name},
                      {"alias", listing.alias},
                      {"summary", listing.summary},
                      {"source", listing.source},
                      {"parameters", listing.parameters},
                      {"decorates", listing.decorates},
                      {"needs", needs_json(listing.needs)},
                      {"metadata", listing.metadata}});
    }
    return write_text(list.dump(1), text, capacity, needed);
  });
}

kvtier_status kvtier_get_stats(kvtier_runtime* runtime, kvtier_stats* stats) {
  return with_runtime(runtime, false, [&](kvtier_runtime& inner) {
    const RuntimeStats found = inner.runtime->stats();
    kvtier_stats answer{};
    answer.device = tier_stats(found.tiers[static_cast<std::size_t>(Tier::kDevice)]);
    answer.host = tier_stats(found.tiers[static_cast<std::size_t>(Tier::kHost)]);
    answer.disk = tier_stats(found.tiers[static_cast<std::size_t>(Tier::kDisk)]);
    answer.disk_to_host_bytes = route_bytes(found, Route::kDiskToHost);
    answer.host_to_device_bytes = route_bytes(found, Route::kHostToDevice);
    answer.device_to_host_bytes = route_bytes(found, Route::kDeviceToHost);
    answer.host_to_disk_bytes = route_bytes(found, Route::kHostToDisk);
    answer.blocks_verified = found.verification.verified;
    answer.blocks_mismatched = found.verification.mismatched;
    answer.blocks_recovered = found.verification.recovered;
    answer.blocks_failed = found.verification.failed;
    answer.prefetch_issued_bytes = found.prefetch.issued_bytes;
    answer.prefetch_useful_bytes = found.prefetch.useful_bytes;
    answer.prefetch_wasted_bytes = found.prefetch.wasted_bytes;
    answer.prefetch_late = found.prefetch.late;
    answer.metadata_bytes = found.metadata_bytes;
    answer.steps = found.steps;
    answer.exact_steps = found.attends;
    answer.steps_measured = found.steps_measured;
    return write_struct(answer, "stats", stats);
  });
}

kvtier_status kvtier_get_stats_json(kvtier_runtime* runtime, char* text, size_t capacity,
                                    size_t* needed) {
  return with_runtime(runtime, false, [&](kvtier_runtime& inner) {
    return write_text(stats_json(inner, inner.runtime->stats()).dump(1), text, capacity, needed);
  });
}

kvtier_status kvtier_get_sequence_stats(kvtier_runtime* runtime, kvtier_sequence sequence,
                                        kvtier_sequence_stats* stats) {
  return with_sequence(runtime, sequence, false, [&](kvtier_runtime&, Sequence& found) {
    const SequenceStats state = found.stats();
    return write_struct({.blocks = state.blocks,
                         .blocks_resident = state.blocks_resident,
                         .device_bytes = state.device_bytes,
                         .host_bytes = state.host_bytes,
                         .disk_bytes = state.disk_bytes,
                         .shared_bytes = state.shared_bytes,
                         .metadata_bytes = state.metadata_bytes},
                        "stats", stats);
  });
}

kvtier_status kvtier_write_timeline(kvtier_runtime* runtime, const char* path) {
  return with_runtime(runtime, false, [&](kvtier_runtime& inner) -> Status {
    if (path == nullptr) return invalid_argument("path is NULL");
    if (inner.timeline == nullptr) {
      return invalid_argument("no events are kept; open with timeline_events above 0");
    }
    const TimelineProcess process{.title = "kvtier", .events = inner.timeline->events()};
    return write_file(timeline_json({&process, 1}), path);
  });
}
