#include "kernels/scan_codes.h"

#include "kernels/code_runs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace kvtier {

void reorder_run(const KeyCodes& codes, const CodeLine* run, std::span<std::byte> target) {
  const DeviceCodes device{codes.dim, codes.dtype};
  KVTIER_CHECK(codes.bits == 4 && target.size() == device.run_bytes(), "a run of {} bits in {}",
               codes.bits, target.size());
  const std::uint32_t per_line = codes.channels_per_line();
  const auto code_of = [&](std::uint32_t token, std::uint32_t channel) {
    const CodeLine* tile = run + token / KeyCodes::kTileTokens * codes.tile_lines();
    const std::uint32_t in_line = channel % per_line;
    std::uint16_t word;
    std::memcpy(
        &word,
        tile[channel / per_line].bytes + 2 * (2 * (token % KeyCodes::kTileTokens) + in_line % 2),
        sizeof(word));
    return static_cast<std::uint32_t>(word >> (in_line / 2 * 4) & 15);
  };
  const std::uint32_t steps = codes.dim / 16;
  for (std::uint32_t i = 0; i < 4 * steps * 32; ++i) {
    const std::uint32_t tile = i / (steps * 32);
    const std::uint32_t lane = i % 128 / 4;
    const std::uint32_t step = i % (steps * 32) / 128 * 4 + i % 4;
    std::uint32_t word = 0;
    for (std::uint32_t t = 0; t < 2; ++t) {
      for (std::uint32_t e = 0; e < 4; ++e) {
        const std::uint32_t code =
            code_of(lane / 4 * 8 + 2 * tile + t, lane % 4 * (codes.dim / 4) + step * 4 + e);
        word |= code << (e % 2 * 16 + e / 2 * 4 + t * 8);
      }
    }
    std::memcpy(target.data() + std::size_t{i} * 4, &word, sizeof(word));
  }
  std::memcpy(target.data() + device.scales_offset(),
              run + KeyCodes::kRunTiles * codes.tile_lines(),
              target.size() - device.scales_offset());
}

void scan_reference(const ScanReference& task) {
  const std::size_t tokens = task.logits.size() / task.group;
  std::ranges::fill(task.scores, 0.0f);
  std::vector<double> weights(tokens);
  for (std::uint32_t q = 0; q < task.group; ++q) {
    const std::span logits = task.logits.subspan(q * tokens, tokens);
    double top = task.near_lse.empty() ? -INFINITY : double{task.near_lse[q]};
    for (std::size_t t = task.sinks; t < tokens; ++t) top = std::max(top, double{logits[t]});
    double total = task.near_lse.empty() ? 0.0 : std::exp(double{task.near_lse[q]} - top);
    for (std::size_t t = task.sinks; t < tokens; ++t) total += std::exp(double{logits[t]} - top);
    const double lse = top + std::log(total);
    for (std::size_t t = 0; t < tokens; ++t) {
      weights[t] = t < task.sinks ? 0.0 : std::exp(double{logits[t]} - lse);
      task.scores[t / task.tokens_per_cell] += static_cast<float>(weights[t]);
    }
    for (const std::uint32_t cell : task.chosen) {
      std::fill_n(weights.begin() + cell * task.tokens_per_cell, task.tokens_per_cell, 0.0);
    }
    double rest = 0.0;
    std::vector<double> out(task.value_dim);
    for (std::size_t t = 0; t < tokens; ++t) {
      rest += weights[t];
      const float* mean = task.value_means.data() + t / 64 * task.value_dim;
      for (std::uint32_t i = 0; i < task.value_dim; ++i) out[i] += weights[t] * double{mean[i]};
    }
    for (std::uint32_t i = 0; i < task.value_dim; ++i) {
      task.out[q * task.value_dim + i] = rest > 0.0 ? static_cast<float>(out[i] / rest) : 0.0f;
    }
    task.lse[q] = rest > 0.0 ? static_cast<float>(lse + std::log(rest)) : kEmptyLse;
  }
  for (std::uint32_t cell = 0; cell < task.sinks / task.tokens_per_cell; ++cell) {
    task.scores[cell] = -1.0f;
  }
}

}  // namespace kvtier
