#pragma once

#include "runtime/prefix_store.h"
#include "runtime/runtime.h"
#include "transfer/faulty_file.h"
#include "transfer/memory_file.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace kvtier::testing {

/// f32 contents and f32 accumulation over at most a few thousand tokens: the error of the weighted
/// mean is a few ulp times the square root of the count, far below this.
inline constexpr double kOutputTolerance = 1e-5;

/// Contents that can be checked anywhere without a golden copy: every element of a key or value is
/// a function of layer, KV head, position and version. The version tells a token from the one that
/// stood at its position before a truncation.
class Content {
 public:
  Content(const BlockShape& shape, float scale) : shape_(shape), scale_(scale) {}

  float key(std::uint32_t layer, std::uint32_t head, std::uint32_t position, std::uint32_t version,
            std::uint32_t element) const;
  float value(std::uint32_t layer, std::uint32_t head, std::uint32_t position,
              std::uint32_t version, std::uint32_t element) const;
  const BlockShape& shape() const { return shape_; }

 private:
  BlockShape shape_;
  float scale_;
};

/// A device that looks at every token it is asked to attend, then attends it (or not, where only
/// the bytes matter).
class CheckingDevice final : public Device {
 public:
  enum class Tamper { kNothing, kLeaveOut, kRepeat, kSwap };

  CheckingDevice(const Content& content, bool compute);

  /// What the next step is about: its layer, its queries and the version of every position.
  void expect(std::uint32_t layer, const float* queries, std::uint32_t heads_per_group,
              const std::vector<std::uint32_t>* versions);
  /// Spoils the n-th block attended from now on.
  void tamper(Tamper how, std::uint64_t block);

  std::uint64_t wrong_blocks() const { return wrong_blocks_; }
  std::uint64_t blocks_seen() const { return blocks_seen_; }

  const std::string& name() const override { return host_.name(); }
  Result<Region> allocate_slab(std::size_t bytes) override { return host_.allocate_slab(bytes); }
  Result<Region> allocate_frames(std::size_t bytes) override {
    return Region::allocate({.bytes = bytes});
  }
  Status attend(const AttentionParams& params, std::span<const AttentionTask> tasks) override;
  WorkerPool& workers() override { return host_.workers(); }

 private:
  bool is_right(const AttentionParams& params, const AttentionTask& task,
                const BlockRange& range) const;
  void spoil(std::vector<BlockRange>& ranges, const BlockRange& other);

  HostDevice host_;
  Content content_;
  bool compute_;
  std::uint32_t layer_ = 0;
  const float* queries_ = nullptr;
  std::uint32_t heads_per_group_ = 1;
  const std::vector<std::uint32_t>* versions_ = nullptr;
  std::uint64_t wrong_blocks_ = 0;
  std::uint64_t blocks_seen_ = 0;
  Tamper tamper_ = Tamper::kNothing;
  std::uint64_t tamper_block_ = 0;
};

/// How a test runtime differs from the usual one.
struct HarnessOptions {
  BlockShape block{.dtype = DType::kF32,
                   .head_dim = 8,
                   .value_dim = 8,
                   .kv_heads = 2,
                   .kv_heads_per_block = 1,
                   .tokens_per_block = 4,
                   .extent_bytes = 12 * 1024};
  std::uint32_t layers = 2;
  std::uint32_t queries_per_kv_head = 2;
  std::string selector = "random";
  /// Instead of `selector`, where a test has its own.
  SelectorFactory factory;
  EstimateRest estimate_rest = EstimateRest::kMeasured;
  std::uint32_t tokens_max = 1024;
  std::uint32_t sequences_max = 1;
  std::uint32_t sinks = 4;
  std::uint32_t window = 16;
  SoftmaxOptions softmax{.scale = 0.35f};
  std::vector<float> sink_logits;
  std::uint64_t look_ahead_bytes = 0;
  std::string eviction = "lru";
  VerifyMode verify = VerifyMode::kArrivals;
  bool deterministic = false;
  bool transfer_threads = false;
  bool compute = true;
  float content_scale = 1.0f;
  std::uint64_t seed = 1;
  /// 0: just what the needs say.
  std::size_t device_bytes = 0;
  std::size_t host_bytes = 0;
  /// All that the sequences can need, unless given.
  std::uint64_t disk_bytes = ~std::uint64_t{0};
  FaultPlan faults;
};

/// A runtime in a world of memory, its sequences, and the truth about their tokens. Calls are about
/// the sequence in use: the first, until `use` says otherwise.
class Harness {
 public:
  explicit Harness(const HarnessOptions& options);
  ~Harness();

  Status append(std::uint32_t tokens);
  /// Appends to one layer only what the others have.
  Status append_layer(std::uint32_t layer, std::uint32_t tokens);
  Status truncate(std::uint32_t tokens);
  /// Queries are pseudo-random; `out` and `lse` are kept for the accessors below.
  Status step(std::uint32_t layer, std::uint32_t budget, std::uint32_t query_count = 1,
              QuerySelection selection = QuerySelection::kShared);
  /// One query, given: [query_heads, head_dim].
  Status step_with(std::uint32_t layer, std::uint32_t budget, std::span<const float> query);

  /// Exact attention of the last tokens over all; `out` and `lse` are kept likewise.
  Status attend(std::uint32_t layer, std::uint32_t query_count);
  Status resolve(std::uint32_t layer, std::uint32_t budget, ResolvedBlocks* resolved,
                 std::uint32_t query_count = 1);

  /// A fork of the sequence in use, in use afterwards.
  Status fork(std::uint32_t tokens);
  /// Another sequence of the same tokens as the one in use, appended one by one; in use afterwards.
  Status copy();
  /// A sequence that begins with what the store has of `token_ids`, whose tokens are those that a
  /// harness appends first; in use afterwards. How many were found and how.
  Result<RestoredSequence> restore(PrefixStore& store, std::span<const std::uint32_t> token_ids);
  /// Ends the sequence in use; the last one takes its number, and the first is in use afterwards.
  Status end();
  void use(std::size_t sequence) { active_ = sequence; }
  std::size_t sequences() const { return branches_.size(); }
  Sequence& sequence() { return *branches_[active_].sequence; }

  /// Exact attention over what the last step attended, in float64, from contents; where the step
  /// says that it attended kept keys, over what `scan` and `two-stage` keep of contents.
  std::vector<double> reference_out() const;
  /// Over every token that a query sees.
  std::vector<double> exact_reference() const;

  const StepReport& report() const { return report_; }
  const std::vector<float>& out() const { return out_; }
  /// Of the last step.
  const std::vector<float>& queries() const { return queries_; }
  const std::vector<float>& lse() const { return lse_; }
  std::uint32_t tokens() const { return static_cast<std::uint32_t>(branch().versions.size()); }
  CheckingDevice& device() { return *device_; }
  Runtime& runtime() { return *runtime_; }
  const RuntimeOptions& options() const { return options_; }
  const FaultCounts& faults() const { return fault_counts_; }
  const FaultCounts& link_faults() const { return link_fault_counts_; }
  MemoryFile& stored() { return *memory_file_; }
  /// Ends everything; the stats stay readable.
  Status close();

 private:
  /// One sequence, and what stands at each of its positions.
  struct Branch {
    std::unique_ptr<Sequence> sequence;
    std::vector<std::uint32_t> versions;
    std::uint32_t version = 1;  ///< Of what is appended next.
  };
  const Branch& branch() const { return branches_[active_]; }
  Branch& branch() { return branches_[active_]; }
  Result<std::unique_ptr<Sequence>> make_sequence();
  void make_queries(std::uint32_t layer, std::uint32_t query_count);
  StepRequest make_request(std::uint32_t layer, std::uint32_t budget, std::uint32_t query_count,
                           QuerySelection selection);
  Status ask(std::uint32_t layer, std::uint32_t budget, std::uint32_t query_count,
             QuerySelection selection);
  std::vector<double> reference_over(std::span<const AttendedRange> ranges) const;
  std::vector<float> kept_run(std::uint32_t head, std::uint32_t run) const;
  void make_rows(std::uint32_t layer, std::uint32_t first, std::uint32_t count);

  HarnessOptions setup_;
  RuntimeOptions options_;
  Content content_;
  SteadyClock clock_;
  FaultCounts fault_counts_;
  FaultCounts link_fault_counts_;
  std::unique_ptr<CheckingDevice> device_;
  std::unique_ptr<Link> link_;
  MemoryFile* memory_file_ = nullptr;
  std::unique_ptr<File> disk_;
  std::unique_ptr<Runtime> runtime_;
  std::vector<Branch> branches_;
  std::size_t active_ = 0;
  std::uint64_t origins_ = 0;
  std::uint32_t next_version_ = 1;
  std::uint32_t last_layer_ = 0;
  std::uint32_t last_query_count_ = 1;
  std::vector<float> keys_;
  std::vector<float> values_;
  std::vector<float> queries_;
  std::vector<float> out_;
  std::vector<float> lse_;
  StepReport report_;
  bool closed_ = false;
};

/// Largest absolute difference.
double max_difference(const std::vector<float>& a, const std::vector<double>& b);

}  // namespace kvtier::testing
