#pragma once

#include "memory/dtype.h"
#include "memory/status.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace kvtier {

/// Positions [begin, end) of a trace's tokens; never empty.
struct TokenSpan {
  std::uint32_t begin = 0;
  std::uint32_t end = 0;
};

/// A question and the model's answer: positions question_start <= answer_start <= end.
struct TraceTurn {
  std::string question;
  std::string answer;
  /// What a right answer contains; may be empty.
  std::vector<std::string> expected;
  /// Only what full attention solves can be lost by a selector.
  bool solved_by_full_attention = false;
  std::uint32_t question_start = 0;
  std::uint32_t answer_start = 0;
  std::uint32_t end = 0;
  /// Where the text states what the question asks for; empty when it does not.
  std::vector<TokenSpan> evidence;
};

/// Shape and origin of the model that was recorded.
struct TraceModel {
  std::string name;
  std::string license;  ///< May be empty, like the next two.
  std::string architecture;
  std::string weights;
  std::uint32_t layers = 0;
  std::uint32_t query_heads = 0;
  std::uint32_t kv_heads = 0;
  std::uint32_t head_dim = 0;
  std::uint32_t value_dim = 0;
  std::uint32_t vocab_size = 0;  ///< 0: not said.
};

/// What `manifest.json` promises about a file beside it.
struct TraceFileEntry {
  std::string sha256;
  std::uint64_t size_bytes = 0;
};

/// `manifest.json` of an attention trace, version 1. Everything that can be checked without another
/// file has been: types, ranges, and every figure against the others.
struct TraceManifest {
  static constexpr std::string_view kSchema = "kvtier.attention-trace";
  static constexpr std::uint32_t kVersion = 1;
  static constexpr std::string_view kTokensFile = "tokens.safetensors";

  std::string name;
  std::string description;  ///< May be empty, like the next two.
  std::string text;
  std::string recorded_with;
  TraceModel model;
  double rope_theta = 0;  ///< 0: not said.
  /// Keys and queries are stored as the model attends them, after rotation.
  bool rope_applied_to_keys = true;
  double softmax_scale = 0;
  double logit_cap = 0;       ///< 0: logits are not capped.
  DType dtype = DType::kF16;  ///< Of keys, values and queries.
  std::uint32_t tokens = 0;
  /// Tokens before the first recorded step.
  std::uint32_t context_tokens = 0;
  std::uint32_t steps = 0;
  /// Numbers of the model's layers that were recorded, ascending.
  std::vector<std::uint32_t> kept_layers;
  std::vector<TraceTurn> turns;
  std::map<std::string, TraceFileEntry> files;

  /// "layer-007.safetensors".
  static std::string layer_file_name(std::uint32_t layer);
  /// `file` names the manifest in errors. Fails with `corrupt`.
  static Result<TraceManifest> parse(std::span<const std::byte> text, const std::string& file);
};

}  // namespace kvtier
