#pragma once

#include "kernels/worker_pool.h"
#include "memory/status.h"
#include "selectors/registry.h"
#include "tools/replay/progress.h"
#include "tools/trace/attention_trace.h"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kvtier {

/// What tells a retrieval head from a streaming one.
struct HeadProfileOptions {
  /// Tokens that a streaming head holds: the first and the last ones.
  std::uint32_t sinks = 4;
  std::uint32_t window = 64;
  /// By what classes are told apart. Far mass keeps every head that looks far, also those that look
  /// everywhere alike; evidence keeps those that look at what an answer rests on, as RazorAttention
  /// wants it, and gives up the rest: an output can change a lot where an answer does not.
  enum class Rule : unsigned char { kFarMass, kEvidence };
  Rule rule = Rule::kFarMass;
  /// A KV head is a retrieval head if one of its query heads puts at least this part of its
  /// attention there, in the mean over the steps. Under `kFarMass`, what a streaming head leaves
  /// out is less than that.
  double threshold = 0.1;
};

/// What one KV head does, by that of its query heads which does it most.
struct HeadFigures {
  double far_mass = 0.0;       ///< Attention between sinks and window, mean over the steps.
  double far_mass_high = 0.0;  ///< The same, exceeded at one step in twenty.
  /// Attention on the evidence of the question that is being answered, mean over the steps of
  /// answers with evidence; none where the trace names none.
  std::optional<double> evidence_mass;
  bool retrieval = false;
};

/// By the trace's layers, in their order.
struct HeadProfile {
  std::vector<std::uint32_t> layers;            ///< The model's numbers.
  std::vector<std::vector<HeadFigures>> heads;  ///< [layers][KV heads]
};

/// Measures every head of a recorded trace by exact attention of the recorded queries. The idea of
/// two classes is DuoAttention's (2410.10819) and RazorAttention's (2407.15891); they find them by
/// trained gates and by echoes in made-up text, here it is what the heads did in this text, so a
/// trace should ask for what lies far back. `corrupt` when a logit overflows float32;
/// `invalid_argument` for `kEvidence` when the trace names no evidence. The same figures for any
/// number of threads.
Result<HeadProfile> profile_heads(const AttentionTrace& trace, const HeadProfileOptions& options,
                                  WorkerPool& pool, Progress& progress);

/// "far-mass" or "evidence".
std::string_view rule_name(HeadProfileOptions::Rule rule);

/// The classes as `read_head_classes` takes them, with where they come from: JSON text.
std::string head_classes_json(const HeadProfile& profile, const HeadProfileOptions& options,
                              const AttentionTrace& trace);

}  // namespace kvtier
