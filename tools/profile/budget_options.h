#pragma once

#include "memory/status.h"
#include "tools/cli/parse.h"
#include "tools/profile/model_description.h"

#include <cstdint>
#include <optional>
#include <string>

namespace CLI {
class App;
}

namespace kvtier {

/// How keys and values are stored: its name, and bytes per element without scales.
struct KvType {
  std::string name = "bf16";
  double bytes = 2;

  static Result<KvType> parse(std::string_view text);
};

/// What `kvtier profile budget` was asked for: each value understood, none checked against the
/// model or the machine yet.
struct BudgetOptions {
  std::string model_path;
  std::string read_as;  ///< Family that the config is read as; empty: what it says.

  // The question.
  std::uint64_t context_tokens = 131072;
  std::uint64_t sequences = 1;
  std::optional<double> target_ms;
  std::uint64_t prefix_tokens = 0;              ///< 0: the context.
  std::optional<std::uint64_t> tokens_per_day;  ///< None: decoding without a break.

  // How it is served.
  std::string selector;
  Budget budget;
  std::uint32_t block_tokens = 8;
  std::uint64_t extent_bytes = 128 * 1024;
  KvType kv_type;
  std::uint32_t gpus = 1;
  std::optional<std::uint64_t> weight_bytes;

  // What it is served on; the profile's where they are not given.
  std::string machine_path;
  std::optional<std::uint64_t> device_memory;  ///< Per GPU.
  std::optional<std::uint64_t> host_memory;
  std::optional<std::uint64_t> disk_space;
  Share reserve;  ///< Of device and host memory: activations, the engine, the system.
  double reuse;   ///< Of the standard curve.
  std::string trace_path;
  std::optional<double> gemm_flops;  ///< Rate of prefill; the profile's where it is not given.

  std::string format = "table";
  std::string output_path;

  BudgetOptions();
};

/// Adds every option to `verb`; parsing fills `options` or ends with a `CLI::ParseError`.
void bind_budget_options(CLI::App& verb, BudgetOptions& options);

/// What the options contradict among themselves; `invalid_argument` names the option.
Status check_budget_options(const BudgetOptions& options);

/// The command line that asks the same again, its words quoted for a shell. Options that are at
/// their defaults are left out, as is where the result goes.
std::string budget_command(const BudgetOptions& options);

/// `word` as a shell takes it for one.
std::string shell_word(const std::string& word);

}  // namespace kvtier
