#include "tests/runtime/harness.h"

#include "memory/check.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace kvtier::testing {
namespace {

std::uint64_t mix(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Uniform in [-1, 1), in steps that f32 holds exactly.
float unit(std::uint64_t bits) {
  return static_cast<float>(static_cast<std::int32_t>(mix(bits) >> 40) - (1 << 23)) /
         static_cast<float>(1 << 23);
}

std::uint64_t place(std::uint64_t kind, std::uint64_t layer, std::uint64_t head,
                    std::uint64_t position, std::uint64_t version, std::uint64_t element) {
  return mix(mix(kind << 56 | layer << 48 | head << 40 | element << 28 | version) ^ position);
}

}  // namespace

// --- Contents.

float Content::key(std::uint32_t layer, std::uint32_t head, std::uint32_t position,
                   std::uint32_t version, std::uint32_t element) const {
  return scale_ * unit(place(1, layer, head, position, version, element));
}

float Content::value(std::uint32_t layer, std::uint32_t head, std::uint32_t position,
                     std::uint32_t version, std::uint32_t element) const {
  return unit(place(2, layer, head, position, version, element));
}

// --- Device.

CheckingDevice::CheckingDevice(const Content& content, bool compute)
    : host_(1), content_(content), compute_(compute) {}

void CheckingDevice::expect(std::uint32_t layer, const float* queries,
                            std::uint32_t heads_per_group,
                            const std::vector<std::uint32_t>* versions) {
  layer_ = layer;
  queries_ = queries;
  heads_per_group_ = heads_per_group;
  versions_ = versions;
}

void CheckingDevice::tamper(Tamper how, std::uint64_t block) {
  tamper_ = how;
  tamper_block_ = blocks_seen_ + block;
}

bool CheckingDevice::is_right(const AttentionParams& params, const AttentionTask& task,
                              const BlockRange& range) const {
  const BlockLayout& layout = *params.layout;
  const auto group = static_cast<std::uint32_t>(static_cast<std::size_t>(task.queries - queries_) /
                                                (heads_per_group_ * layout.head_dim()));
  for (std::uint32_t head = 0; head < layout.heads_per_block(); ++head) {
    const std::uint32_t kv_head = group * layout.heads_per_block() + head;
    for (std::uint32_t i = 0; i < range.tokens; ++i) {
      const std::uint32_t position = range.position + i;
      const std::uint32_t version = versions_->at(position);
      const std::byte* key = range.keys_begin() + layout.key_offset(head, range.first_token + i);
      const std::byte* value = range.block + layout.value_offset(head, range.first_token + i);
      for (std::uint32_t e = 0; e < layout.head_dim(); ++e) {
        const float expected = content_.key(layer_, kv_head, position, version, e);
        const float found = load_element(key, DType::kF32, e);
        // Keys that a selector keeps are near: within half a step of two bits over the range.
        if (range.keys == nullptr ? found != expected : !(std::abs(found - expected) < 0.35f)) {
          return false;
        }
      }
      for (std::uint32_t e = 0; e < layout.value_dim(); ++e) {
        if (load_element(value, DType::kF32, e) !=
            content_.value(layer_, kv_head, position, version, e))
          return false;
      }
    }
  }
  return true;
}

// `ranges` ends with the block to spoil; `other` is a different block of the same call.
void CheckingDevice::spoil(std::vector<BlockRange>& ranges, const BlockRange& other) {
  switch (tamper_) {
    case Tamper::kNothing: break;
    case Tamper::kLeaveOut: ranges.pop_back(); break;
    case Tamper::kRepeat: ranges.push_back(ranges.back()); break;
    case Tamper::kSwap: ranges.back().block = other.block; break;
  }
}

Status CheckingDevice::attend(const AttentionParams& params, std::span<const AttentionTask> tasks) {
  if (tamper_ == Tamper::kNothing) {
    for (const AttentionTask& task : tasks) {
      blocks_seen_ += task.blocks.size();
      for (const BlockRange& range : task.blocks) wrong_blocks_ += !is_right(params, task, range);
    }
    return compute_ ? host_.attend(params, tasks) : Status();
  }
  std::vector<AttentionTask> spoilt(tasks.begin(), tasks.end());
  std::vector<std::vector<BlockRange>> ranges(tasks.size());
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    for (const BlockRange& range : tasks[i].blocks) {
      if (!is_right(params, tasks[i], range)) ++wrong_blocks_;
      ranges[i].push_back(range);
      if (blocks_seen_ == tamper_block_) {
        const BlockRange& first = tasks[i].blocks.front();
        const bool is_first = range.block == first.block;
        const AttentionTask& another = tasks[(i + 1) % tasks.size()];
        spoil(ranges[i], is_first ? another.blocks.back() : first);
      }
      ++blocks_seen_;
    }
    spoilt[i].blocks = ranges[i];
  }
  if (!compute_) return {};
  return host_.attend(params, spoilt);
}

// --- Harness.

Harness::Harness(const HarnessOptions& setup)
    : setup_(setup), content_(setup.block, setup.content_scale) {
  options_.block = setup.block;
  options_.layers = setup.layers;
  options_.query_heads = setup.block.kv_heads * setup.queries_per_kv_head;
  options_.softmax = setup.softmax;
  options_.sink_logits = setup.sink_logits;
  options_.selector = setup.factory ? setup.factory : make_selector_factory(setup.selector).value();
  options_.estimate_rest = setup.estimate_rest;
  options_.sinks = setup.sinks;
  options_.window = setup.window;
  options_.eviction = setup.eviction;
  options_.look_ahead_bytes = setup.look_ahead_bytes;
  options_.verify = setup.verify;
  options_.deterministic = setup.deterministic;
  options_.seed = setup.seed;
  options_.transfer_threads = setup.transfer_threads;
  options_.tokens_max = setup.tokens_max;
  options_.sequences_max = setup.sequences_max;
  const RuntimeNeeds needs = Runtime::needs(options_).value();
  options_.device_capacity_bytes = std::max(setup.device_bytes, needs.device_bytes);
  options_.host_capacity_bytes = std::max(setup.host_bytes, needs.host_bytes);
  options_.disk_capacity_bytes = std::min(setup.disk_bytes, needs.extent_bytes_total);

  device_ = std::make_unique<CheckingDevice>(content_, setup.compute);
  auto file = std::make_unique<MemoryFile>(
      MemoryFile::Options{.bytes = std::max<std::uint64_t>(options_.disk_capacity_bytes, 4096)});
  memory_file_ = file.get();
  disk_ = std::move(file);
  link_ = make_memory_link();
  if (setup.faults.any()) {
    disk_ = std::make_unique<FaultyFile>(std::move(disk_), setup.faults, &fault_counts_);
    link_ = make_faulty_link(std::move(link_), setup.faults, &link_fault_counts_);
  }
  runtime_ = Runtime::open(options_, {.clock = &clock_,
                                      .device = device_.get(),
                                      .link = link_.get(),
                                      .disk = disk_.get(),
                                      .timeline = nullptr})
                 .value();
  branches_.reserve(setup.sequences_max + 1);
  branches_.push_back({.sequence = make_sequence().value(), .versions = {}});
  branch().versions.reserve(setup.tokens_max);
}

Result<std::unique_ptr<Sequence>> Harness::make_sequence() {
  return runtime_->create_sequence({.high = setup_.seed, .low = 42 + origins_++});
}

Harness::~Harness() {
  if (!closed_) (void)close();
}

Status Harness::close() {
  closed_ = true;
  Status sequence;
  for (Branch& each : branches_) {
    const Status ended = each.sequence->close();
    if (sequence.ok()) sequence = ended;
  }
  const Status runtime = runtime_->close();
  const Status disk = disk_->close();
  for (const Status& status : {sequence, runtime, disk}) {
    if (!status.ok()) return status;
  }
  return {};
}

void Harness::make_rows(std::uint32_t layer, std::uint32_t first, std::uint32_t count) {
  const BlockShape& shape = setup_.block;
  keys_.resize(std::size_t{count} * shape.kv_heads * shape.head_dim);
  values_.resize(std::size_t{count} * shape.kv_heads * shape.value_dim);
  std::size_t k = 0;
  std::size_t v = 0;
  for (std::uint32_t position = first; position < first + count; ++position) {
    for (std::uint32_t head = 0; head < shape.kv_heads; ++head) {
      for (std::uint32_t e = 0; e < shape.head_dim; ++e) {
        keys_[k++] = content_.key(layer, head, position, branch().versions[position], e);
      }
      for (std::uint32_t e = 0; e < shape.value_dim; ++e) {
        values_[v++] = content_.value(layer, head, position, branch().versions[position], e);
      }
    }
  }
}

Status Harness::append_layer(std::uint32_t layer, std::uint32_t tokens) {
  const BlockShape& shape = setup_.block;
  const std::uint32_t first = branch().sequence->tokens(LayerIndex{layer});
  KVTIER_CHECK(first + tokens <= branch().versions.size(), "{} tokens have no version yet", tokens);
  make_rows(layer, first, tokens);
  return branch().sequence->append(
      LayerIndex{layer}, {.keys = reinterpret_cast<const std::byte*>(keys_.data()),
                          .values = reinterpret_cast<const std::byte*>(values_.data()),
                          .key_token_stride = shape.kv_heads * shape.head_dim * sizeof(float),
                          .key_head_stride = shape.head_dim * sizeof(float),
                          .value_token_stride = shape.kv_heads * shape.value_dim * sizeof(float),
                          .value_head_stride = shape.value_dim * sizeof(float),
                          .tokens = tokens});
}

Status Harness::append(std::uint32_t tokens) {
  std::vector<std::uint32_t>& versions = branch().versions;
  versions.insert(versions.end(), tokens, branch().version);
  Status status;
  for (std::uint32_t layer = 0; layer < setup_.layers; ++layer) {
    const Status appended = append_layer(layer, tokens);
    if (status.ok()) status = appended;
  }
  return status;
}

Status Harness::truncate(std::uint32_t tokens) {
  KVTIER_RETURN_IF_ERROR(branch().sequence->truncate(tokens));
  branch().versions.resize(tokens);
  branch().version = ++next_version_;
  return {};
}

Status Harness::fork(std::uint32_t tokens) {
  KVTIER_ASSIGN_OR_RETURN(auto sequence, branch().sequence->fork(tokens, {.high = setup_.seed,
                                                                          .low = 42 + origins_++}));
  Branch child{.sequence = std::move(sequence),
               .versions = {branch().versions.begin(), branch().versions.begin() + tokens},
               .version = ++next_version_};
  branches_.push_back(std::move(child));
  use(branches_.size() - 1);
  return {};
}

Status Harness::copy() {
  KVTIER_ASSIGN_OR_RETURN(auto sequence, make_sequence());
  Branch twin{
      .sequence = std::move(sequence), .versions = branch().versions, .version = ++next_version_};
  branches_.push_back(std::move(twin));
  use(branches_.size() - 1);
  for (std::uint32_t layer = 0; layer < setup_.layers; ++layer) {
    KVTIER_RETURN_IF_ERROR(append_layer(layer, tokens()));
  }
  return {};
}

Result<RestoredSequence> Harness::restore(PrefixStore& store,
                                          std::span<const std::uint32_t> token_ids) {
  KVTIER_ASSIGN_OR_RETURN(
      RestoredSequence restored,
      runtime_->restore_sequence(store, token_ids, {.high = setup_.seed, .low = 42 + origins_++}));
  branches_.push_back({.sequence = std::move(restored.sequence),
                       .versions = std::vector<std::uint32_t>(restored.tokens, 1),
                       .version = ++next_version_});
  use(branches_.size() - 1);
  return restored;
}

Status Harness::end() {
  const Status status = branch().sequence->close();
  std::swap(branches_[active_], branches_.back());
  branches_.pop_back();
  use(0);
  return status;
}

void Harness::make_queries(std::uint32_t layer, std::uint32_t query_count) {
  queries_.resize(std::size_t{query_count} * options_.query_heads * setup_.block.head_dim);
  for (std::size_t i = 0; i < queries_.size(); ++i) {
    queries_[i] = 2.0f * unit(place(3, layer, 0, tokens(), setup_.seed & 0xFFFF, i));
  }
}

Status Harness::step(std::uint32_t layer, std::uint32_t budget, std::uint32_t query_count,
                     QuerySelection selection) {
  make_queries(layer, query_count);
  return ask(layer, budget, query_count, selection);
}

Status Harness::step_with(std::uint32_t layer, std::uint32_t budget, std::span<const float> query) {
  queries_.assign(query.begin(), query.end());
  return ask(layer, budget, 1, QuerySelection::kShared);
}

StepRequest Harness::make_request(std::uint32_t layer, std::uint32_t budget,
                                  std::uint32_t query_count, QuerySelection selection) {
  const std::uint32_t heads = options_.query_heads;
  out_.assign(std::size_t{query_count} * heads * setup_.block.value_dim, 0.0f);
  lse_.assign(std::size_t{query_count} * heads, 0.0f);
  device_->expect(layer, queries_.data(),
                  setup_.queries_per_kv_head * setup_.block.kv_heads_per_block, &branch().versions);
  last_layer_ = layer;
  last_query_count_ = query_count;
  return {.layer = LayerIndex{layer},
          .queries = queries_.data(),
          .query_count = query_count,
          .selection = selection,
          .budget_tokens = budget,
          .out = out_.data(),
          .lse = lse_.data()};
}

Status Harness::ask(std::uint32_t layer, std::uint32_t budget, std::uint32_t query_count,
                    QuerySelection selection) {
  return branch().sequence->step(make_request(layer, budget, query_count, selection), &report_);
}

Status Harness::attend(std::uint32_t layer, std::uint32_t query_count) {
  make_queries(layer, query_count);
  const StepRequest request = make_request(layer, 0, query_count, QuerySelection::kShared);
  return branch().sequence->attend({.layer = request.layer,
                                    .queries = request.queries,
                                    .query_count = query_count,
                                    .out = request.out,
                                    .lse = request.lse},
                                   &report_);
}

Status Harness::resolve(std::uint32_t layer, std::uint32_t budget, ResolvedBlocks* resolved,
                        std::uint32_t query_count) {
  make_queries(layer, query_count);
  StepRequest request = make_request(layer, budget, query_count, QuerySelection::kShared);
  request.out = nullptr;
  request.lse = nullptr;
  return branch().sequence->resolve(request, resolved);
}

}  // namespace kvtier::testing
