#include "transfer/fault_plan.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <charconv>
#include <optional>
#include <vector>

namespace kvtier {
namespace {

constexpr std::array<const char*, kFaultKindCount> kKindNames = {
    "bitflip", "rot", "shortread", "eio", "writeeio", "enospc", "misplaced", "lostwrite", "delay"};

std::uint64_t mix(std::uint64_t value) {
  value ^= value >> 30;
  value *= 0xbf58476d1ce4e5b9ULL;
  value ^= value >> 27;
  value *= 0x94d049bb133111ebULL;
  return value ^ (value >> 31);
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  while (true) {
    const std::size_t at = text.find(separator);
    parts.push_back(text.substr(0, at));
    if (at == std::string_view::npos) return parts;
    text.remove_prefix(at + 1);
  }
}

template <typename Number>
std::optional<Number> parse_number(std::string_view text) {
  Number number{};
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  if (text.empty() || error != std::errc() || stop != end) return std::nullopt;
  return number;
}

Status wrong(std::string_view part, const std::string& why) {
  return invalid_argument(
      fmt::format("fault '{}': {} (known: kind[:disk|link]:rate with kind one of {}, and seed=N)",
                  part, why, fmt::join(kKindNames, ", ")));
}

// One `kind[:target]:rate`.
Status parse_fault(std::string_view part, FaultPlan& plan) {
  const std::vector<std::string_view> fields = split(part, ':');
  const auto name = std::find(kKindNames.begin(), kKindNames.end(), fields.front());
  if (name == kKindNames.end())
    return wrong(part, fmt::format("unknown kind '{}'", fields.front()));
  if (fields.size() < 2) return wrong(part, "no rate");
  if (fields.size() > 3) return wrong(part, "too many fields");
  const std::string_view target = fields.size() == 3 ? fields[1] : std::string_view("disk");
  if (target != "disk" && target != "link") {
    return wrong(part, fmt::format("unknown target '{}'", target));
  }
  const std::optional<double> rate = parse_number<double>(fields.back());
  // Written so that NaN fails too.
  if (!rate || !(*rate >= 0.0 && *rate <= 1.0)) {
    return wrong(part, fmt::format("'{}' is not a rate from 0 to 1", fields.back()));
  }
  const auto kind = static_cast<std::size_t>(name - kKindNames.begin());
  if (target == "link" && static_cast<FaultKind>(kind) != FaultKind::kBitFlip) {
    return wrong(part, "a link takes bitflip only");
  }
  double& slot = target == "link" ? plan.link_bitflip_rate : plan.disk_rate[kind];
  slot = *rate;
  return {};
}

// What must not be given twice: everything before the rate, with the default target spelled out.
std::string key_of(std::string_view part) {
  if (part.starts_with("seed=")) return "seed";
  const std::vector<std::string_view> fields = split(part, ':');
  return fmt::format("{}:{}", fields[0], fields.size() == 3 ? fields[1] : "disk");
}

}  // namespace

const char* to_string(FaultKind kind) {
  const auto index = static_cast<std::size_t>(kind);
  KVTIER_CHECK(index < kKindNames.size(), "fault kind {}", index);
  return kKindNames[index];
}

bool FaultPlan::any() const {
  return link_bitflip_rate > 0.0 ||
         std::any_of(disk_rate.begin(), disk_rate.end(), [](double rate) { return rate > 0.0; });
}

Result<FaultPlan> FaultPlan::parse(std::string_view spec) {
  FaultPlan plan;
  if (spec.empty()) return plan;
  std::vector<std::string> seen;
  for (const std::string_view part : split(spec, ',')) {
    if (part.starts_with("seed=")) {
      const auto seed = parse_number<std::uint64_t>(part.substr(5));
      if (!seed) return wrong(part, "the seed is not a whole number");
      plan.seed = *seed;
    } else {
      KVTIER_RETURN_IF_ERROR(parse_fault(part, plan));
    }
    std::string key = key_of(part);
    if (std::find(seen.begin(), seen.end(), key) != seen.end()) return wrong(part, "given twice");
    seen.push_back(std::move(key));
  }
  return plan;
}

std::string FaultPlan::to_string() const {
  std::string spec;
  for (std::size_t kind = 0; kind < disk_rate.size(); ++kind) {
    if (disk_rate[kind] > 0.0)
      spec += fmt::format("{}:disk:{},", kKindNames[kind], disk_rate[kind]);
  }
  if (link_bitflip_rate > 0.0) spec += fmt::format("bitflip:link:{},", link_bitflip_rate);
  return spec + fmt::format("seed={}", seed);
}

std::uint64_t fault_draw(std::uint64_t seed, std::uint64_t salt, std::uint64_t place,
                         std::uint64_t use) {
  // Each input goes through the mixer on its own, so that neighbouring places and uses, which are
  // what really occurs, give unrelated draws.
  std::uint64_t draw = mix(seed + 0x9e3779b97f4a7c15ULL);
  for (const std::uint64_t input : {salt, place, use}) {
    draw = mix(std::rotl(draw, 23) ^ mix(input + 0x9e3779b97f4a7c15ULL));
  }
  return draw;
}

bool fault_hits(std::uint64_t draw, double rate) {
  // The upper 53 bits as a number in [0, 1): rate 0 never hits, rate 1 always does.
  return static_cast<double>(draw >> 11) * 0x1.0p-53 < rate;
}

// Every injected failure says so in its message; callers put their own words around it.
bool is_injected(const Status& status) {
  return !status.ok() && status.message().find("injected ") != std::string::npos;
}

}  // namespace kvtier
