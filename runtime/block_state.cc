#include "runtime/block_state.h"

#include "memory/check.h"

#include <iterator>

namespace kvtier {
namespace {

template <typename State, typename Event, std::size_t kRows>
const Transition<State, Event>* find(const Transition<State, Event> (&table)[kRows], State from,
                                     Event event) {
  for (const auto& row : table) {
    if (row.from == from && row.event == event) return &row;
  }
  return nullptr;
}

template <typename State, typename Event, std::size_t kRows>
State advance_in(const Transition<State, Event> (&table)[kRows], State from, Event event) {
  const auto* row = find(table, from, event);
  KVTIER_CHECK(row != nullptr, "'{}' does not happen to a block that is '{}'", to_string(event),
               to_string(from));
  return row->to;
}

template <typename Enum, std::size_t kNames>
const char* name_of(const char* const (&names)[kNames], Enum value) {
  const auto index = static_cast<std::size_t>(value);
  KVTIER_CHECK(index < kNames, "state or event {} of {}", index, kNames);
  return names[index];
}

}  // namespace

const char* to_string(HomeState state) {
  static constexpr const char* kNames[kHomeStateCount] = {"free", "filling", "host",   "writing",
                                                          "both", "disk",    "reading"};
  return name_of(kNames, state);
}

const char* to_string(HomeEvent event) {
  static constexpr const char* kNames[kHomeEventCount] = {
      "create",     "complete",  "start_write", "write_done", "write_failed", "drop_frame",
      "start_read", "read_done", "read_failed", "reopen",     "release"};
  return name_of(kNames, event);
}

const char* to_string(ResidencyState state) {
  static constexpr const char* kNames[kResidencyStateCount] = {"absent", "open", "arriving",
                                                               "resident"};
  return name_of(kNames, state);
}

const char* to_string(ResidencyEvent event) {
  static constexpr const char* kNames[kResidencyEventCount] = {
      "open", "seal", "reopen", "reserve", "arrive", "fail", "evict", "release"};
  return name_of(kNames, event);
}

bool is_legal(HomeState from, HomeEvent event) {
  return find(kHomeTransitions, from, event) != nullptr;
}

bool is_legal(ResidencyState from, ResidencyEvent event) {
  return find(kResidencyTransitions, from, event) != nullptr;
}

HomeState advance(HomeState from, HomeEvent event) {
  return advance_in(kHomeTransitions, from, event);
}

ResidencyState advance(ResidencyState from, ResidencyEvent event) {
  return advance_in(kResidencyTransitions, from, event);
}

}  // namespace kvtier
