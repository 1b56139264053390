#include "kernels/quantised_keys.h"

#include <cmath>
#include <vector>

namespace kvtier {

void score_codes_reference(const SoftmaxOptions& softmax, const CodedTask& task) {
  std::vector<float> key(task.codes.dim);
  for (std::size_t t = 0; t < task.run_count * KeyCodes::kRunTokens; ++t) {
    const std::size_t run = t / KeyCodes::kRunTokens;
    const auto token = static_cast<std::uint32_t>(t % KeyCodes::kRunTokens);
    const std::uint32_t tile = token / KeyCodes::kTileTokens;
    if (task.tiles != nullptr && ((task.tiles[run] >> tile) & 1) == 0) continue;
    read_coded_key(task.codes, task.runs + run * task.codes.run_lines(), token, key.data());
    for (std::size_t q = 0; q < task.query_count; ++q) {
      double dot = 0.0;
      for (std::uint32_t i = 0; i < task.codes.dim; ++i) {
        dot += double{task.queries[q * task.query_stride + i]} * double{key[i]};
      }
      double logit = double{softmax.scale} * dot;
      if (softmax.logit_cap > 0.0f) {
        logit = double{softmax.logit_cap} * std::tanh(logit / double{softmax.logit_cap});
      }
      task.logits[q * task.logit_stride + t] = static_cast<float>(logit);
    }
  }
}

}  // namespace kvtier
