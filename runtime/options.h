#pragma once

#include "kernels/kv_view.h"
#include "memory/block_layout.h"
#include "selectors/registry.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kvtier {

/// Which hops of a block are checked against its checksum.
enum class VerifyMode : unsigned char {
  kArrivals,  ///< Whenever an extent arrives from disk.
  kAll,       ///< Also after every copy between host and device, in both directions.
  kNone,      ///< Nothing: for tests that must fail without verification. No tool offers it.
};

/// What becomes of the tokens that a step does not attend, where the selector can estimate them.
enum class EstimateRest : unsigned char {
  kMeasured,  ///< Estimated in the query heads where sampled steps show that it helps.
  kAlways,
  kNever,  ///< Left out: softmax over the attended tokens alone.
};

/// Everything a runtime is opened with. Behaviour first, sizes after.
struct RuntimeOptions {
  // The model.
  BlockShape block;
  std::uint32_t layers = 1;
  std::uint32_t query_heads = 8;
  SoftmaxOptions softmax;
  RopeOptions rope;  ///< For selectors that un-rotate keys; unknown by default.
  /// [layers, query_heads]; empty for models without attention sinks as logits.
  std::vector<float> sink_logits;

  // What is attended.
  SelectorFactory selector;  ///< Empty: `kDefaultSelector`.
  GroupReduction reduction = GroupReduction::kSum;
  std::uint32_t sinks = 4;    ///< First tokens, always attended and held on the device.
  std::uint32_t window = 64;  ///< Last tokens, likewise.
  /// Lets selectors with an opinion on it (`probe`, `adaptive-budget`) move tokens between layers:
  /// one layer may then attend up to twice its budget, all layers together no more than their sum.
  bool share_budget = false;
  EstimateRest estimate_rest = EstimateRest::kMeasured;
  /// Most steps of a layer from one that is measured to the next. A measurement reads a sample of
  /// what was not chosen: some 2,048 tokens per head group.
  std::uint32_t measure_interval_max = 256;

  // How it moves.
  std::string eviction = "lrfu";  ///< For device slots and host frames; see `make_eviction_policy`.
  /// Bytes per step that look-ahead may promote from disk to host; 0 switches that off.
  std::uint64_t look_ahead_bytes = 0;
  /// Bytes per step that it may promote from host frames to the device, likewise.
  std::uint64_t look_ahead_device_bytes = 0;
  VerifyMode verify = VerifyMode::kArrivals;
  /// Attends and merges in one fixed order whatever is resident: results are equal bit for bit
  /// across capacities, at the price of the overlap between resident and missing blocks.
  bool deterministic = false;
  std::uint64_t seed = 0;
  /// False: no transfer threads, everything moves on the calling thread in one order.
  bool transfer_threads = true;

  // How much.
  std::uint32_t tokens_max = 0;  ///< Longest sequence.
  std::uint32_t sequences_max = 1;
  std::size_t device_capacity_bytes = 0;
  std::size_t host_capacity_bytes = 0;
  std::uint64_t disk_capacity_bytes = 0;  ///< 0: no disk tier.
};

/// The least that a runtime with these options needs to take one step, by tier.
struct RuntimeNeeds {
  std::size_t device_bytes = 0;
  std::size_t host_bytes = 0;
  /// The part of the host tier that stays free of blocks which lie nowhere else, so that there is
  /// room to read into: with a disk tier, host and disk together must exceed
  /// `extent_bytes_total` by this.
  std::size_t host_reserve_bytes = 0;
  /// What all sequences at full length occupy in extents, on host and disk together.
  std::uint64_t extent_bytes_total = 0;
};

}  // namespace kvtier
