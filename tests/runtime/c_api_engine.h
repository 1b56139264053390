#pragma once

#include "runtime/kvtier.h"

#include <cstdint>
#include <string>
#include <vector>

namespace kvtier::testing {

/// What a small model's engine would open: two layers, two KV heads of 16 elements, four query
/// heads, float32, blocks of four tokens, memory for everything unless a test asks for less.
kvtier_options small_options();

inline constexpr auto kInvalid = KVTIER_INVALID_ARGUMENT;

/// The status of an open that must fail, after which nothing is there to close.
kvtier_status refused_open(const kvtier_options& options);

/// Element of a key or value: a function of where it stands, so that no golden copy is needed.
float content(std::uint32_t layer, std::uint32_t head, std::uint32_t position,
              std::uint32_t element, bool value);

/// A runtime that is opened through the C ABI, and closed when it ends. Calls expect success; tests
/// of refusals call the ABI themselves with `runtime`.
class Engine {
 public:
  explicit Engine(const kvtier_options& options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  kvtier_sequence create();
  /// Tokens [first, first + tokens) of the content, to every layer.
  void append(kvtier_sequence sequence, std::uint32_t first, std::uint32_t tokens);
  /// The same of one layer; the status is the caller's affair.
  kvtier_status append_layer(kvtier_sequence sequence, std::uint32_t layer, std::uint32_t first,
                             std::uint32_t tokens);

  /// A question with pseudo-random queries and room for its answer; both live as long as the
  /// engine's next question.
  kvtier_query ask(std::uint32_t layer, std::uint32_t query_count, std::uint32_t budget);
  const std::vector<float>& queries() const { return queries_; }
  const std::vector<float>& out() const { return out_; }
  const std::vector<float>& lse() const { return lse_; }

  /// Causal attention of the last question over every one of `tokens` tokens, in float64.
  std::vector<double> exact_reference(std::uint32_t layer, std::uint32_t tokens) const;

  kvtier_runtime* runtime = nullptr;
  kvtier_options options;

 private:
  std::vector<float> queries_;
  std::vector<float> out_;
  std::vector<float> lse_;
  std::uint64_t asked_ = 0;
};

/// Largest absolute difference; NaN anywhere is infinitely far.
double distance(const std::vector<float>& found, const std::vector<double>& expected);
bool all_nan(const std::vector<float>& values);

/// float32 contents and sums over at most a few hundred tokens: rounding stays far below this.
inline constexpr double kTolerance = 1e-5;

}  // namespace kvtier::testing
