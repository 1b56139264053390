#include "tools/profile/machine_profile.h"

#include "tools/trace/json_document.h"
#include "tools/trace/mapped_file.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <span>
#include <utility>

namespace kvtier {

namespace {

using nlohmann::ordered_json;

constexpr const char* kProfileSchema = "kvtier.machine-profile";
constexpr std::uint64_t kProfileVersion = 1;
constexpr std::uint64_t kBytesMax = std::uint64_t{1} << 60;

ordered_json parameters_json(const ProfileParameters& parameters) {
  ordered_json json = ordered_json::object();
  for (const auto& [key, value] : parameters) {
    if (std::holds_alternative<double>(value)) {
      const double number = std::get<double>(value);
      // Sizes and counts are whole; a reader should not have to wonder about 65536.0.
      if (number == std::floor(number) && number < 9e15) {
        json[key] = static_cast<std::uint64_t>(number);
      } else {
        json[key] = number;
      }
    } else {
      json[key] = std::get<std::string>(value);
    }
  }
  return json;
}

ordered_json entry_json(const ProfileEntry& entry) {
  ordered_json json;
  json["name"] = entry.name;
  json["parameters"] = parameters_json(entry.parameters);
  if (!entry.has_figure()) {
    json["waived"] = entry.waived;
    return json;
  }
  json["unit"] = entry.unit;
  json["median"] = entry.median;
  json["lowest"] = entry.lowest;
  json["highest"] = entry.highest;
  json["repetitions"] = entry.repetitions;
  if (entry.latency_us_p50) json["latency_us_p50"] = *entry.latency_us_p50;
  if (entry.latency_us_p99) json["latency_us_p99"] = *entry.latency_us_p99;
  if (!entry.note.empty()) json["note"] = entry.note;
  return json;
}

Result<std::string> optional_text(const JsonField& object, const char* key) {
  KVTIER_ASSIGN_OR_RETURN(const auto field, object.optional_member(key));
  return field ? field->as_string() : Result<std::string>(std::string());
}

Result<std::uint64_t> optional_count(const JsonField& object, const char* key) {
  KVTIER_ASSIGN_OR_RETURN(const auto field, object.optional_member(key));
  return field ? field->as_count(0, kBytesMax) : Result<std::uint64_t>(std::uint64_t{0});
}

Result<double> positive(const JsonField& object, const char* key) {
  KVTIER_ASSIGN_OR_RETURN(const JsonField field, object.member(key));
  KVTIER_ASSIGN_OR_RETURN(const double value, field.as_number());
  if (value <= 0) return field.mismatch("a number above 0");
  return value;
}

Status read_figure(const JsonField& field, ProfileEntry& entry) {
  KVTIER_ASSIGN_OR_RETURN(const JsonField unit, field.member("unit"));
  KVTIER_ASSIGN_OR_RETURN(entry.unit, unit.as_string());
  if (entry.unit != "bytes_per_s" && entry.unit != "flop_per_s" &&
      entry.unit != "head_tokens_per_s" && entry.unit != "s") {
    return unit.mismatch("bytes_per_s, flop_per_s, head_tokens_per_s or s");
  }
  KVTIER_ASSIGN_OR_RETURN(entry.median, positive(field, "median"));
  KVTIER_ASSIGN_OR_RETURN(entry.lowest, positive(field, "lowest"));
  KVTIER_ASSIGN_OR_RETURN(entry.highest, positive(field, "highest"));
  if (entry.lowest > entry.median || entry.median > entry.highest) {
    return field.mismatch("lowest, median and highest in ascending order");
  }
  KVTIER_ASSIGN_OR_RETURN(const JsonField repetitions, field.member("repetitions"));
  KVTIER_ASSIGN_OR_RETURN(const auto count, repetitions.as_count(1, 1'000'000'000));
  entry.repetitions = static_cast<std::uint32_t>(count);
  for (const auto& [key, target] : {std::pair{"latency_us_p50", &entry.latency_us_p50},
                                    std::pair{"latency_us_p99", &entry.latency_us_p99}}) {
    KVTIER_ASSIGN_OR_RETURN(const auto latency, field.optional_member(key));
    if (!latency) continue;
    KVTIER_ASSIGN_OR_RETURN(*target, positive(field, key));
  }
  KVTIER_ASSIGN_OR_RETURN(entry.note, optional_text(field, "note"));
  return {};
}

Result<ProfileEntry> read_entry(const JsonField& field) {
  ProfileEntry entry;
  KVTIER_ASSIGN_OR_RETURN(const JsonField name, field.member("name"));
  KVTIER_ASSIGN_OR_RETURN(entry.name, name.as_string());
  KVTIER_ASSIGN_OR_RETURN(const auto parameters, field.optional_member("parameters"));
  if (parameters) {
    if (!parameters->value().is_object()) return parameters->mismatch("an object");
    for (const auto& [key, value] : parameters->value().items()) {
      KVTIER_ASSIGN_OR_RETURN(const JsonField parameter, parameters->member(key));
      if (value.is_string()) {
        KVTIER_ASSIGN_OR_RETURN(std::string word, parameter.as_string());
        entry.parameters[key] = std::move(word);
      } else {
        KVTIER_ASSIGN_OR_RETURN(const double number, parameter.as_number());
        if (number <= 0) return parameter.mismatch("a number above 0, or a word");
        entry.parameters[key] = number;
      }
    }
  }
  KVTIER_ASSIGN_OR_RETURN(const auto waived, field.optional_member("waived"));
  if (!waived) {
    KVTIER_RETURN_IF_ERROR(read_figure(field, entry));
    return entry;
  }
  KVTIER_ASSIGN_OR_RETURN(entry.waived, waived->as_string());
  if (entry.waived.empty()) return waived->mismatch("the reason");
  if (field.value().contains("median")) {
    return field.mismatch("either a figure or the reason why there is none");
  }
  return entry;
}

Status read_machine(const JsonField& machine, MachineProfile& profile) {
  KVTIER_ASSIGN_OR_RETURN(profile.cpu, optional_text(machine, "cpu"));
  KVTIER_ASSIGN_OR_RETURN(const auto threads, optional_count(machine, "threads"));
  profile.threads = static_cast<std::uint32_t>(threads);
  KVTIER_ASSIGN_OR_RETURN(profile.simd, optional_text(machine, "simd"));
  KVTIER_ASSIGN_OR_RETURN(profile.build, optional_text(machine, "build"));
  KVTIER_ASSIGN_OR_RETURN(profile.host_memory_bytes, optional_count(machine, "host_memory_bytes"));
  KVTIER_ASSIGN_OR_RETURN(profile.gpu, optional_text(machine, "gpu"));
  KVTIER_ASSIGN_OR_RETURN(profile.gpu_memory_bytes, optional_count(machine, "gpu_memory_bytes"));
  KVTIER_ASSIGN_OR_RETURN(profile.disk_free_bytes, optional_count(machine, "disk_free_bytes"));
  KVTIER_ASSIGN_OR_RETURN(const auto nodes, machine.optional_member("numa_nodes"));
  if (!nodes) return {};
  KVTIER_ASSIGN_OR_RETURN(const auto elements, nodes->elements());
  for (const JsonField& element : elements) {
    NumaNodeDescription node;
    KVTIER_ASSIGN_OR_RETURN(const auto number, optional_count(element, "node"));
    KVTIER_ASSIGN_OR_RETURN(node.memory_bytes, optional_count(element, "memory_bytes"));
    KVTIER_ASSIGN_OR_RETURN(const auto cpus, optional_count(element, "cpus"));
    node.node = static_cast<std::uint32_t>(number);
    node.cpus = static_cast<std::uint32_t>(cpus);
    profile.numa_nodes.push_back(node);
  }
  return {};
}

/// How far apart two sets of parameters are; none where a word differs.
std::optional<double> distance(const ProfileParameters& wanted, const ProfileParameters& found) {
  double sum = 0;
  for (const auto& [key, value] : wanted) {
    const auto other = found.find(key);
    if (other == found.end()) continue;
    if (value.index() != other->second.index()) return std::nullopt;
    if (std::holds_alternative<std::string>(value)) {
      if (value != other->second) return std::nullopt;
      continue;
    }
    sum += std::abs(std::log(std::get<double>(value) / std::get<double>(other->second)));
  }
  return sum;
}

}  // namespace

std::string MachineProfile::to_json() const {
  ordered_json json;
  json["schema"] = kProfileSchema;
  json["version"] = kProfileVersion;
  json["name"] = name;
  json["source"] = source;
  json["provenance"] = provenance;
  ordered_json& machine = json["machine"];
  machine["cpu"] = cpu;
  machine["threads"] = threads;
  machine["simd"] = simd;
  machine["build"] = build;
  machine["host_memory_bytes"] = host_memory_bytes;
  machine["numa_nodes"] = ordered_json::array();
  for (const NumaNodeDescription& node : numa_nodes) {
    machine["numa_nodes"].push_back(
        {{"node", node.node}, {"memory_bytes", node.memory_bytes}, {"cpus", node.cpus}});
  }
  machine["gpu"] = gpu;
  machine["gpu_memory_bytes"] = gpu_memory_bytes;
  machine["disk_free_bytes"] = disk_free_bytes;
  json["entries"] = ordered_json::array();
  for (const ProfileEntry& entry : entries) json["entries"].push_back(entry_json(entry));
  json["equivalents"] = equivalents;
  return json.dump(1, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

Result<MachineProfile> MachineProfile::parse(std::string_view text, const std::string& file) {
  KVTIER_ASSIGN_OR_RETURN(const nlohmann::json json,
                          parse_json(std::as_bytes(std::span(text)), file, "profile"));
  const JsonField document(json, file);
  KVTIER_ASSIGN_OR_RETURN(const JsonField schema, document.member("schema"));
  KVTIER_ASSIGN_OR_RETURN(const std::string schema_name, schema.as_string());
  if (schema_name != kProfileSchema) {
    return schema.mismatch(kProfileSchema, "`kvtier profile machine --output` writes one");
  }
  KVTIER_ASSIGN_OR_RETURN(const JsonField version, document.member("version"));
  KVTIER_ASSIGN_OR_RETURN(const auto number, version.as_count(0, kBytesMax));
  if (number != kProfileVersion) {
    return version.mismatch("1", "measure again with this version of kvtier");
  }
  MachineProfile profile;
  KVTIER_ASSIGN_OR_RETURN(const JsonField name, document.member("name"));
  KVTIER_ASSIGN_OR_RETURN(profile.name, name.as_string());
  KVTIER_ASSIGN_OR_RETURN(profile.source, optional_text(document, "source"));
  KVTIER_ASSIGN_OR_RETURN(profile.provenance, optional_text(document, "provenance"));
  KVTIER_ASSIGN_OR_RETURN(const JsonField machine, document.member("machine"));
  KVTIER_RETURN_IF_ERROR(read_machine(machine, profile));
  KVTIER_ASSIGN_OR_RETURN(const JsonField entries, document.member("entries"));
  KVTIER_ASSIGN_OR_RETURN(const auto elements, entries.elements());
  for (const JsonField& element : elements) {
    KVTIER_ASSIGN_OR_RETURN(ProfileEntry entry, read_entry(element));
    for (const ProfileEntry& other : profile.entries) {
      if (other.name == entry.name && other.parameters == entry.parameters) {
        return element.mismatch("an entry of other name or parameters than those before");
      }
    }
    profile.entries.push_back(std::move(entry));
  }
  KVTIER_ASSIGN_OR_RETURN(const auto equivalents, document.optional_member("equivalents"));
  if (equivalents) {
    KVTIER_ASSIGN_OR_RETURN(const auto lines, equivalents->elements());
    for (const JsonField& line : lines) {
      KVTIER_ASSIGN_OR_RETURN(std::string command, line.as_string());
      profile.equivalents.push_back(std::move(command));
    }
  }
  return profile;
}

Result<MachineProfile> MachineProfile::read(const std::string& path) {
  KVTIER_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::open(path));
  const auto bytes = file.bytes();
  return parse({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, path);
}

const ProfileEntry* MachineProfile::nearest(std::string_view wanted,
                                            const ProfileParameters& parameters) const {
  const ProfileEntry* best = nullptr;
  double least = std::numeric_limits<double>::infinity();
  for (const ProfileEntry& entry : entries) {
    if (entry.name != wanted || !entry.has_figure()) continue;
    const auto apart = distance(parameters, entry.parameters);
    if (!apart || *apart >= least) continue;
    least = *apart;
    best = &entry;
  }
  return best;
}

std::optional<double> MachineProfile::interpolated(std::string_view wanted,
                                                   const std::string& parameter, double x,
                                                   const ProfileParameters& others) const {
  // Of entries with one value of the parameter, the nearest in the others.
  std::map<double, std::pair<double, double>> points;
  for (const ProfileEntry& entry : entries) {
    if (entry.name != wanted || !entry.has_figure()) continue;
    const auto at = entry.parameters.find(parameter);
    if (at == entry.parameters.end() || !std::holds_alternative<double>(at->second)) continue;
    const auto apart = distance(others, entry.parameters);
    if (!apart) continue;
    const auto [place, added] =
        points.try_emplace(std::get<double>(at->second), *apart, entry.median);
    if (!added && *apart < place->second.first) place->second = {*apart, entry.median};
  }
  if (points.empty()) return std::nullopt;
  const auto right = points.lower_bound(x);
  if (right == points.begin()) return right->second.second;
  const auto left = std::prev(right);
  if (right == points.end()) return left->second.second;
  const double share = std::log(x / left->first) / std::log(right->first / left->first);
  return left->second.second * std::pow(right->second.second / left->second.second, share);
}

std::string MachineProfile::why_none(std::string_view wanted) const {
  for (const ProfileEntry& entry : entries) {
    if (entry.name == wanted && !entry.has_figure()) return entry.waived;
  }
  return "the profile has no such entry";
}

}  // namespace kvtier
