#include "kernels/gather_blocks.h"

#include <algorithm>
#include <cstring>

namespace kvtier {
namespace {

/// Start of a span that is loaded while the span before is copied: sources lie at random places,
/// and the hardware's prefetcher takes over once it has seen a few lines.
constexpr std::size_t kPrefetchBytes = 1024;

void prefetch(const CopySpan& span) {
  for (std::size_t at = 0; at < std::min(span.bytes, kPrefetchBytes); at += 64) {
    __builtin_prefetch(span.source + at);
  }
}

}  // namespace

void gather_blocks(std::span<const CopySpan> spans) {
  for (std::size_t i = 0; i < spans.size(); ++i) {
    if (i + 1 < spans.size()) prefetch(spans[i + 1]);
    // An empty span may come without addresses, which memcpy does not take.
    if (spans[i].bytes > 0) std::memcpy(spans[i].target, spans[i].source, spans[i].bytes);
  }
}

}  // namespace kvtier
