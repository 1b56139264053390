#pragma once

#include "memory/status.h"
#include "tools/cli/parse.h"
#include "tools/simulate/cache_run.h"
#include "tools/simulate/request_trace.h"
#include "tools/simulate/trace_format.h"

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace CLI {
class App;
}

namespace kvtier {

/// How much a cache holds: blocks ("512"), a share of the trace's distinct blocks ("10%"), or bytes
/// ("64GiB", with its unit). Value type.
class BlockAmount {
 public:
  static Result<BlockAmount> parse(std::string_view text);
  /// Bytes with or without a unit.
  static Result<BlockAmount> parse_as_bytes(std::string_view text);

  /// As it was written.
  const std::string& text() const { return text_; }
  bool is_bytes() const { return std::holds_alternative<Bytes>(amount_); }
  /// Rounded down, shares to one block at least. `bytes_per_block` matters for bytes only.
  std::uint64_t blocks(std::uint64_t unique_blocks, std::uint64_t bytes_per_block) const;

 private:
  struct Bytes {
    std::uint64_t bytes;
  };
  using Amount = std::variant<std::uint64_t, Share, Bytes>;
  BlockAmount(std::string_view text, Amount amount) : text_(text), amount_(amount) {}

  std::string text_;
  Amount amount_;
};

/// "host=64GiB": a tier of a hierarchy.
struct TierAmount {
  std::string name;
  BlockAmount amount;

  static Result<TierAmount> parse(std::string_view text);
};

/// What `kvtier simulate` and `kvtier sweep` were asked for: each value understood, none checked
/// against the trace yet.
struct SimulateOptions {
  std::string trace_path;
  std::optional<TraceFormat> input_format;
  TraceRules rules;

  std::vector<std::string> policies;
  std::vector<BlockAmount> capacities;  ///< Runs with one tier each; empty for the usual ones.
  std::vector<TierAmount> tiers;        ///< One hierarchy instead, from the fastest.
  Hierarchy hierarchy = Hierarchy::kInclusive;
  TouchOrder touch_order = TouchOrder::kLastFirst;
  std::uint64_t bytes_per_token = 0;  ///< 0: not given; no bytes in and out.
  BlockCosts costs;

  // Of a sweep.
  std::uint32_t points = 20;  ///< Capacities, where none are named.
  unsigned threads = 0;       ///< 0: all that the process may use.
  std::string resume_path;    ///< Empty: none.

  std::string format = "table";
  std::string output_path;  ///< Empty: stdout.

  SimulateOptions();
};

std::vector<std::string_view> known_simulation_policies();

/// Adds the trace argument and the options to a verb; parsing fills `options`. Values that cannot
/// be understood end parsing with a `CLI::ParseError`.
void bind_simulate_options(CLI::App& verb, SimulateOptions& options);
void bind_sweep_options(CLI::App& verb, SimulateOptions& options);

/// What the options contradict among themselves; `invalid_argument` names the option.
Status check_simulate_options(const SimulateOptions& options);

}  // namespace kvtier
