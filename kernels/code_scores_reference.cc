#include "kernels/code_scores.h"

#include <cmath>
#include <limits>

namespace kvtier {
namespace {

double centroid_element(const CodebookView& codebook, std::size_t element, std::size_t centroid) {
  return double{codebook.centroids[element * kCodeCentroids + centroid]};
}

}  // namespace

void nearest_codes_reference(const CodebookView& codebook, const float* rows, std::size_t count,
                             std::uint8_t* codes) {
  for (std::size_t r = 0; r < count; ++r) {
    for (std::uint32_t p = 0; p < codebook.parts; ++p) {
      double least = std::numeric_limits<double>::infinity();
      for (std::size_t c = 0; c < kCodeCentroids; ++c) {
        double distance = 0.0;
        for (std::size_t i = p * codebook.part_dim(); i < (p + 1) * codebook.part_dim(); ++i) {
          const double gap = double{rows[r * codebook.dim + i]} - centroid_element(codebook, i, c);
          distance += gap * gap;
        }
        if (std::isinf(codebook.half_norms[p * kCodeCentroids + c]) || distance >= least) continue;
        least = distance;
        codes[r * codebook.parts + p] = static_cast<std::uint8_t>(c);
      }
    }
  }
}

void score_codes_reference(const SoftmaxOptions& softmax, const CodeTask& task) {
  for (std::size_t q = 0; q < task.query_count; ++q) {
    for (std::size_t r = 0; r < task.rows; ++r) {
      double dot = 0.0;
      for (std::size_t i = 0; i < task.codebook.dim; ++i) {
        const std::uint8_t code =
            task.codes[r * task.codebook.parts + i / task.codebook.part_dim()];
        dot += double{task.queries[q * task.query_stride + i]} *
               centroid_element(task.codebook, i, code);
      }
      double logit = double{softmax.scale} * dot;
      const double cap = double{softmax.logit_cap};
      if (cap > 0.0) logit = cap * std::tanh(logit / cap);
      task.logits[q * task.logit_stride + r] = static_cast<float>(logit);
    }
  }
}

}  // namespace kvtier
