#include "tools/simulate/sweep_run.h"

#include "tools/replay/output_file.h"
#include "tools/trace/json_document.h"
#include "tools/trace/mapped_file.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <limits>
#include <mutex>
#include <thread>

namespace kvtier {
namespace {

using SweepJson = nlohmann::ordered_json;
using SweepClock = std::chrono::steady_clock;

constexpr std::string_view kPartialSchema = "kvtier.sweep-partial";
constexpr std::uint64_t kCountMax64 = std::numeric_limits<std::uint64_t>::max();
/// Between writes: short enough that little is lost, long enough that writing costs nothing.
constexpr auto kSavePeriod = std::chrono::milliseconds(500);

template <typename T>
SweepJson json_or_null(const std::optional<T>& value) {
  return value ? SweepJson(*value) : SweepJson(nullptr);
}

SweepJson run_to_json(std::size_t index, const SimulationRun& run) {
  SweepJson json = {{"index", index},
                    {"policy", run.policy},
                    {"capacity_blocks", json_or_null(run.capacity_blocks)},
                    {"hit_blocks", run.hits.hit_blocks},
                    {"hit_tokens", run.hits.hit_tokens},
                    {"second_half_hit_tokens", run.hits.second_half_hit_tokens},
                    {"tiers", SweepJson::array()}};
  for (const TierResult& tier : run.tiers) {
    json["tiers"].push_back({{"name", tier.name},
                             {"capacity_blocks", json_or_null(tier.capacity_blocks)},
                             {"hit_blocks", tier.hit_blocks},
                             {"hit_tokens", tier.hit_tokens},
                             {"inserted_blocks", json_or_null(tier.inserted_blocks)},
                             {"inserted_tokens", json_or_null(tier.inserted_tokens)},
                             {"evicted_blocks", json_or_null(tier.evicted_blocks)}});
  }
  return json;
}

Result<std::uint64_t> count_member(const JsonField& field, std::string_view key) {
  KVTIER_ASSIGN_OR_RETURN(const JsonField member, field.member(key));
  return member.as_count(0, kCountMax64);
}

Status optional_count(const JsonField& field, std::string_view key,
                      std::optional<std::uint64_t>& target) {
  KVTIER_ASSIGN_OR_RETURN(const std::optional<JsonField> member, field.optional_member(key));
  if (!member) return {};
  KVTIER_ASSIGN_OR_RETURN(target, member->as_count(0, kCountMax64));
  return {};
}

Result<std::string> string_member(const JsonField& field, std::string_view key) {
  KVTIER_ASSIGN_OR_RETURN(const JsonField member, field.member(key));
  return member.as_string();
}

Result<TierResult> tier_from_json(const JsonField& field) {
  TierResult tier;
  KVTIER_ASSIGN_OR_RETURN(tier.name, string_member(field, "name"));
  KVTIER_ASSIGN_OR_RETURN(tier.hit_blocks, count_member(field, "hit_blocks"));
  KVTIER_ASSIGN_OR_RETURN(tier.hit_tokens, count_member(field, "hit_tokens"));
  KVTIER_RETURN_IF_ERROR(optional_count(field, "capacity_blocks", tier.capacity_blocks));
  KVTIER_RETURN_IF_ERROR(optional_count(field, "inserted_blocks", tier.inserted_blocks));
  KVTIER_RETURN_IF_ERROR(optional_count(field, "inserted_tokens", tier.inserted_tokens));
  KVTIER_RETURN_IF_ERROR(optional_count(field, "evicted_blocks", tier.evicted_blocks));
  return tier;
}

Result<SimulationRun> run_from_json(const JsonField& field) {
  SimulationRun run;
  KVTIER_ASSIGN_OR_RETURN(run.policy, string_member(field, "policy"));
  KVTIER_RETURN_IF_ERROR(optional_count(field, "capacity_blocks", run.capacity_blocks));
  KVTIER_ASSIGN_OR_RETURN(run.hits.hit_blocks, count_member(field, "hit_blocks"));
  KVTIER_ASSIGN_OR_RETURN(run.hits.hit_tokens, count_member(field, "hit_tokens"));
  KVTIER_ASSIGN_OR_RETURN(run.hits.second_half_hit_tokens,
                          count_member(field, "second_half_hit_tokens"));
  KVTIER_ASSIGN_OR_RETURN(const JsonField tiers, field.member("tiers"));
  KVTIER_ASSIGN_OR_RETURN(const std::vector<JsonField> elements, tiers.elements());
  if (elements.empty()) return tiers.mismatch("at least one tier");
  for (const JsonField& element : elements) {
    KVTIER_ASSIGN_OR_RETURN(TierResult tier, tier_from_json(element));
    run.tiers.push_back(std::move(tier));
  }
  return run;
}

}  // namespace

Result<SweepRecord> SweepRecord::open(const std::string& path, std::string key, std::size_t runs) {
  SweepRecord record(path, std::move(key), runs);
  if (path.empty()) return record;
  std::error_code ignored;
  if (std::filesystem::exists(path, ignored)) KVTIER_RETURN_IF_ERROR(record.load());
  const auto writable = OutputFile::open(path);
  if (!writable.ok()) return invalid_argument("--resume: " + writable.status().message());
  return record;
}

Status SweepRecord::load() {
  KVTIER_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::open(path_));
  KVTIER_ASSIGN_OR_RETURN(const nlohmann::json document,
                          parse_json(file.bytes(), path_, "content"));
  const JsonField root(document, path_);
  KVTIER_ASSIGN_OR_RETURN(const JsonField schema, root.member("schema"));
  if (schema.value() != nlohmann::json(kPartialSchema)) return schema.mismatch(kPartialSchema);
  KVTIER_ASSIGN_OR_RETURN(const std::string key, string_member(root, "key"));
  if (key != key_) {
    return invalid_argument(fmt::format(
        "--resume: found runs of another trace or other options in {}, expected this sweep's "
        "(remove the file, or name another)",
        printable(path_)));
  }
  KVTIER_ASSIGN_OR_RETURN(const JsonField list, root.member("runs"));
  KVTIER_ASSIGN_OR_RETURN(const std::vector<JsonField> elements, list.elements());
  for (const JsonField& element : elements) {
    KVTIER_ASSIGN_OR_RETURN(const JsonField index, element.member("index"));
    KVTIER_ASSIGN_OR_RETURN(const std::uint64_t place, index.as_count(0, runs_.size() - 1));
    KVTIER_ASSIGN_OR_RETURN(runs_[place], run_from_json(element));
  }
  return {};
}

std::size_t SweepRecord::finished() const {
  std::size_t count = 0;
  for (const auto& run : runs_) count += run ? 1u : 0u;
  return count;
}

Status SweepRecord::save() const {
  if (path_.empty()) return {};
  SweepJson json = {{"schema", kPartialSchema}, {"key", key_}, {"runs", SweepJson::array()}};
  for (std::size_t i = 0; i < runs_.size(); ++i) {
    if (runs_[i]) json["runs"].push_back(run_to_json(i, *runs_[i]));
  }
  KVTIER_ASSIGN_OR_RETURN(const OutputFile file, OutputFile::open(path_));
  return file.write(json.dump(1) + "\n");
}

std::vector<SimulationRun> SweepRecord::take() && {
  std::vector<SimulationRun> runs;
  for (auto& run : runs_) {
    KVTIER_CHECK(run.has_value(), "run {} is not finished", runs.size());
    runs.push_back(std::move(*run));
  }
  return runs;
}

Status run_sweep(const Simulator& simulator, const std::vector<PlannedSimulation>& planned,
                 unsigned threads, SweepRecord& record,
                 const std::function<void(std::size_t)>& on_progress) {
  std::mutex mutex;  // Guards everything below but `next`, and the record.
  Status status;
  std::size_t finished = record.finished();
  auto saved = SweepClock::now();
  std::atomic<std::size_t> next = 0;
  const auto work = [&] {
    while (true) {
      const std::size_t index = next.fetch_add(1);
      if (index >= planned.size()) return;
      {
        const std::lock_guard lock(mutex);
        if (!status.ok()) return;
        if (record.run(index)) continue;
      }
      SimulationRun run = simulator.run(planned[index]);
      const std::lock_guard lock(mutex);
      record.set(index, std::move(run));
      on_progress(++finished);
      if (SweepClock::now() - saved < kSavePeriod) continue;
      const Status save = record.save();
      if (status.ok()) status = save;
      saved = SweepClock::now();
    }
  };
  std::vector<std::jthread> workers;
  for (unsigned i = 1; i < threads; ++i) workers.emplace_back(work);
  work();
  workers.clear();  // Joins.
  KVTIER_RETURN_IF_ERROR(status);
  return record.save();
}

std::string time_left(std::size_t done, std::size_t total, double elapsed_s) {
  if (done == 0 || done >= total) return "";
  const double left = elapsed_s / static_cast<double>(done) * static_cast<double>(total - done);
  const auto seconds = static_cast<std::uint64_t>(std::ceil(left));
  if (seconds < 60) return fmt::format("{} s", seconds);
  if (seconds < 3600) return fmt::format("{} min {} s", seconds / 60, seconds % 60);
  return fmt::format("{} h {} min", seconds / 3600, seconds / 60 % 60);
}

}  // namespace kvtier
