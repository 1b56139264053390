#pragma once

#include "kernels/gpu.h"
#include "kernels/scan_codes.h"
#include "memory/status.h"
#include "memory/stream_ref.h"

#include <cstddef>
#include <cstdint>

namespace kvtier {

/// The k best cells of every list after `pool_scan`, which has counted first digits: exact, equal
/// scores in ascending index order, and the answer in ascending index order too, so that whatever
/// is made of it has one order. One or two kernels, where `top_k` takes six: the cut by the first
/// digit is known, few candidates are left behind it, and nobody needs them sorted by score.
struct ChooseCellsParams {
  std::uint32_t k = 0;  ///< Up to `kMaxTopK`.
  /// [lists, k]: cells, ascending; `kNoIndex` behind fewer candidates.
  std::uint32_t* chosen = nullptr;
  std::byte* workspace = nullptr;  ///< `choose_cells_workspace_bytes`, 16-byte aligned.
};

std::size_t choose_cells_workspace_bytes(const Gpu& gpu, const ScanParams& scan);

/// Enqueues the choice; marks chosen cells in `scores` and their runs in `touched`. A list whose
/// scores are not numbers gets a choice nobody should use: its lse2 is not a number either.
/// Allocates nothing, waits for nothing; may be captured.
Status choose_cells(const Gpu& gpu, const ScanParams& scan, const ChooseCellsParams& params,
                    StreamRef stream);

}  // namespace kvtier
