#include "runtime/timeline_json.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>

namespace kvtier {
namespace {

using Json = nlohmann::ordered_json;

/// One event per line: a timeline holds hundreds of thousands, too many for one tree in memory.
void append_event(std::string& text, const Json& event) {
  if (text.back() != '[') text += ',';
  text += "\n";
  text += event.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Json metadata(const char* kind, std::size_t process, int track, const std::string& name) {
  return {
      {"name", kind}, {"ph", "M"}, {"pid", process}, {"tid", track}, {"args", {{"name", name}}}};
}

double microseconds(Duration duration) { return static_cast<double>(duration.count()) / 1e3; }

void append_run(std::string& text, const TimelineProcess& run, std::size_t process) {
  append_event(text, metadata("process_name", process, 0, run.title));
  for (int track = 0; track < kTrackCount; ++track) {
    append_event(text,
                 metadata("thread_name", process, track, to_string(static_cast<Track>(track))));
    Json order = metadata("thread_sort_index", process, track, "");
    order["args"] = {{"sort_index", track}};
    append_event(text, order);
  }
  Duration start = run.events.empty() ? Duration{} : run.events.front().start;
  for (const TimelineEvent& event : run.events) start = std::min(start, event.start);
  for (const TimelineEvent& event : run.events) {
    append_event(text, {{"name", event.name},
                        {"ph", "X"},
                        {"pid", process},
                        {"tid", static_cast<int>(event.track)},
                        {"ts", microseconds(event.start - start)},
                        {"dur", microseconds(event.duration)},
                        {"args", {{"bytes", event.bytes}}}});
  }
}

}  // namespace

std::string timeline_json(std::span<const TimelineProcess> runs) {
  std::string text = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[";
  for (std::size_t run = 0; run < runs.size(); ++run) append_run(text, runs[run], run + 1);
  return text + "\n]}\n";
}

}  // namespace kvtier
