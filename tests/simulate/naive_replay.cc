#include "tests/simulate/naive_replay.h"

#include "memory/check.h"
#include "tools/simulate/input_stream.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <list>
#include <map>
#include <set>
#include <sstream>

namespace kvtier {
namespace {

using Block = std::pair<std::uint64_t, std::uint64_t>;

std::string decompressed(const std::string& path) {
  auto stream = InputStream::open(path);
  KVTIER_CHECK(stream.ok(), "{}", stream.status().message());
  std::string text;
  std::vector<char> part(1 << 16);
  while (true) {
    const std::size_t count = stream->read(part).value();
    if (count == 0) return text;
    text.append(part.data(), count);
  }
}

void sort_by_time(NaiveTrace& trace) {
  std::stable_sort(trace.requests.begin(), trace.requests.end(),
                   [](const auto& a, const auto& b) { return a.time < b.time; });
}

void add_agent_requests(const nlohmann::json& list, double start, std::uint64_t session,
                        NaiveTrace& trace) {
  for (const auto& entry : list) {
    const double t = start + entry["t"].get<double>();
    if (entry["type"] == "subagent") {
      add_agent_requests(entry["requests"], t, session, trace);
      continue;
    }
    NaiveTrace::Request request;
    request.time = static_cast<double>(session) * 60000 + std::nearbyint(t * 1000);
    request.input_tokens = entry["in"];
    for (const auto& id : entry["hash_ids"]) request.blocks.emplace_back(session, id);
    trace.requests.push_back(std::move(request));
  }
}

template <typename IsResident>
std::size_t leading_hits(const NaiveTrace::Request& request, IsResident is_resident) {
  std::size_t hits = 0;
  while (hits < request.blocks.size() && is_resident(request.blocks[hits])) ++hits;
  return hits;
}

void count_hits(const NaiveTrace& trace, std::size_t r, std::size_t hits, NaiveHits& sum) {
  for (std::size_t i = 0; i < hits; ++i) {
    const std::uint64_t left = trace.requests[r].input_tokens - i * trace.block_tokens;
    const std::uint64_t tokens = std::min(trace.block_tokens, left);
    ++sum.hit_blocks;
    sum.hit_tokens += tokens;
    if (r >= trace.requests.size() / 2) sum.second_half_hit_tokens += tokens;
  }
}

}  // namespace

NaiveTrace naive_mooncake(const std::string& path) {
  NaiveTrace trace{.block_tokens = 512};
  std::istringstream lines(decompressed(path));
  for (std::string line; std::getline(lines, line);) {
    const auto json = nlohmann::json::parse(line);
    NaiveTrace::Request request{.time = json["timestamp"], .input_tokens = json["input_length"]};
    for (const auto& id : json["hash_ids"]) request.blocks.emplace_back(0, id);
    trace.requests.push_back(std::move(request));
  }
  sort_by_time(trace);
  return trace;
}

NaiveTrace naive_agent_sessions(const std::string& folder) {
  NaiveTrace trace{.block_tokens = 64};
  std::set<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().string().find(".json") != std::string::npos) files.insert(entry.path());
  }
  std::uint64_t session = 0;
  for (const std::string& file : files) {
    add_agent_requests(nlohmann::json::parse(decompressed(file))["requests"], 0, session++, trace);
  }
  sort_by_time(trace);
  return trace;
}

NaiveHits naive_lru(const NaiveTrace& trace, std::size_t capacity) {
  NaiveHits sum;
  std::list<Block> recent;
  std::map<Block, std::list<Block>::iterator> place;
  for (std::size_t r = 0; r < trace.requests.size(); ++r) {
    const auto& request = trace.requests[r];
    count_hits(trace, r, leading_hits(request, [&](const Block& b) { return place.contains(b); }),
               sum);
    for (auto block = request.blocks.rbegin(); block != request.blocks.rend(); ++block) {
      const auto found = place.find(*block);
      if (found != place.end()) recent.erase(found->second);
      recent.push_front(*block);
      place[*block] = recent.begin();
      if (recent.size() <= capacity) continue;
      place.erase(recent.back());
      recent.pop_back();
    }
  }
  return sum;
}

NaiveHits naive_optimal(const NaiveTrace& trace, std::size_t capacity) {
  NaiveHits sum;
  // The requests that use a block, and how deep it lies there.
  std::map<Block, std::vector<std::pair<std::size_t, std::size_t>>> uses;
  for (std::size_t r = 0; r < trace.requests.size(); ++r) {
    const auto& blocks = trace.requests[r].blocks;
    for (std::size_t i = 0; i < blocks.size(); ++i) uses[blocks[i]].emplace_back(r, i);
  }
  std::set<Block> resident;
  for (std::size_t r = 0; r < trace.requests.size(); ++r) {
    const auto& request = trace.requests[r];
    count_hits(trace, r,
               leading_hits(request, [&](const Block& b) { return resident.contains(b); }), sum);
    resident.insert(request.blocks.begin(), request.blocks.end());
    std::vector<std::pair<std::pair<std::size_t, std::size_t>, Block>> wanted;
    for (const Block& block : resident) {
      const auto& all = uses[block];
      const auto next = std::upper_bound(all.begin(), all.end(), std::pair(r, SIZE_MAX));
      if (next != all.end()) wanted.emplace_back(*next, block);
    }
    if (wanted.size() > capacity) {
      std::nth_element(wanted.begin(), wanted.begin() + static_cast<std::ptrdiff_t>(capacity),
                       wanted.end());
      wanted.resize(capacity);
    }
    resident.clear();
    for (const auto& [next, block] : wanted) resident.insert(block);
  }
  return sum;
}

NaiveHits naive_infinite(const NaiveTrace& trace) {
  NaiveHits sum;
  std::set<Block> seen;
  for (std::size_t r = 0; r < trace.requests.size(); ++r) {
    const auto& request = trace.requests[r];
    count_hits(trace, r, leading_hits(request, [&](const Block& b) { return seen.contains(b); }),
               sum);
    seen.insert(request.blocks.begin(), request.blocks.end());
  }
  return sum;
}

}  // namespace kvtier
