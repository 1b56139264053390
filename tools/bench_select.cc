#include "tools/bench_select.h"

#include "kernels/partial_attention.h"
#include "memory/dtype.h"
#include "memory/region.h"
#include "selectors/registry.h"
#include "tools/bench_clock.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <random>
#include <utility>

namespace kvtier {
namespace {

constexpr std::uint32_t kPromptQueries = 512;
constexpr std::uint32_t kChunkTokens = 2048;

/// Keys and values twice: as rows, for selectors, and in blocks one behind the other, for exact
/// attention. Queries, marks and scores for whoever needs them.
class Context {
 public:
  static Result<Context> make(const BenchSelectOptions& options, std::uint32_t tokens) {
    Context context(options, tokens);
    KVTIER_ASSIGN_OR_RETURN(context.rows_, Region::allocate({.bytes = 2 * context.row_area()}));
    KVTIER_ASSIGN_OR_RETURN(context.blocks_,
                            Region::allocate({.bytes = context.layout_.block_bytes() *
                                                       options.kv_heads * context.block_count()}));
    context.fill();
    return context;
  }

  const SelectorShape& shape() const { return shape_; }
  std::uint32_t tokens() const { return tokens_; }
  std::size_t kv_bytes() const { return 2 * row_area(); }

  NewTokens rows(std::uint32_t first, std::uint32_t count) const {
    const std::size_t row = row_bytes();
    const std::byte* keys = rows_->bytes().data() + std::size_t{first} * shape_.kv_heads * row;
    return {.first_position = first,
            .tokens = count,
            .keys = keys,
            .key_token_stride = shape_.kv_heads * row,
            .key_head_stride = row,
            .values = keys + row_area(),
            .value_token_stride = shape_.kv_heads * row,
            .value_head_stride = row,
            .marks = marks_.data() + first};
  }

  const float* query(std::uint32_t step) const {
    return queries_.data() + step % kPromptQueries * query_size();
  }
  std::size_t query_size() const { return std::size_t{shape_.query_heads()} * shape_.head_dim; }

  void observe(Selector& selector) const {
    std::vector<std::uint32_t> positions(std::min(kPromptQueries, tokens_ / 2));
    for (std::uint32_t i = 0; i < positions.size(); ++i) {
      positions[i] = tokens_ - static_cast<std::uint32_t>(positions.size()) + i;
    }
    selector.observe_prompt(
        {.queries = queries_.data(), .query_stride = query_size(), .positions = positions});
  }

  SelectRequest request(std::uint32_t step, std::uint32_t budget) const {
    return {.queries = query(step),
            .query_stride = query_size(),
            .first_position = tokens_ - 1,
            .budget_tokens = budget,
            .external = {.scores = external_.data(), .group_stride = 0, .tokens = tokens_}};
  }

  /// Attention over every token of every KV head.
  Status attend_all(std::uint32_t step, WorkerPool& pool) {
    std::vector<AttentionTask> tasks(shape_.kv_heads);
    for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
      tasks[head].queries = query(step) + head * shape_.queries_per_kv_head * shape_.head_dim;
      tasks[head].blocks = std::span(ranges_).subspan(head * block_count(), block_count());
      tasks[head].out = out_.data() + head * shape_.queries_per_kv_head * shape_.head_dim;
      tasks[head].lse = lse_.data() + head * shape_.queries_per_kv_head;
    }
    return partial_attention({&layout_, shape_.queries_per_kv_head, shape_.softmax}, tasks,
                             workspace_, pool);
  }

 private:
  Context(const BenchSelectOptions& options, std::uint32_t tokens)
      : tokens_(tokens), layout_(make_layout(options)) {
    shape_.kv_heads = options.kv_heads;
    shape_.queries_per_kv_head = options.queries_per_kv_head;
    shape_.head_dim = shape_.value_dim = options.head_dim;
    shape_.tokens_per_block = options.block_tokens;
    shape_.softmax.scale = 1.0f / std::sqrt(static_cast<float>(options.head_dim));
    shape_.rope.theta = 500000.0;
    shape_.tokens_max = tokens;
    out_.resize(query_size());
    lse_.resize(shape_.query_heads());
  }

  static BlockLayout make_layout(const BenchSelectOptions& options) {
    BlockShape block;
    block.kv_heads = options.kv_heads;
    block.head_dim = block.value_dim = options.head_dim;
    block.tokens_per_block = options.block_tokens;
    return BlockLayout::make(block).value();
  }

  std::size_t row_bytes() const { return shape_.head_dim * size_of(DType::kF16); }
  std::size_t row_area() const { return std::size_t{tokens_} * shape_.kv_heads * row_bytes(); }
  std::size_t block_count() const {
    return (tokens_ + layout_.tokens_per_block() - 1) / layout_.tokens_per_block();
  }

  void fill() {
    std::mt19937 random(3);
    const auto uniform = [&random] { return static_cast<float>(random() >> 8) * 0x1p-23f - 1.0f; };
    queries_.resize(kPromptQueries * query_size());
    for (float& value : queries_) value = 2.0f * uniform();
    marks_.resize(tokens_);
    for (std::uint8_t& mark : marks_) {
      mark = static_cast<std::uint8_t>(random() % 25 == 0 ? kEndsSentence : 0);
      if (random() % 50 == 0) mark |= kIsLandmark;
    }
    external_.resize(tokens_);
    for (float& score : external_) score = uniform();
    std::byte* keys = rows_->bytes().data();
    const std::size_t elements = std::size_t{shape_.kv_heads} * shape_.head_dim;
    std::vector<float> state(elements);
    for (float& value : state) value = uniform();
    for (std::uint32_t t = 0; t < tokens_; ++t) {
      for (std::size_t i = 0; i < elements; ++i) {
        state[i] = 0.9f * state[i] + 0.4f * uniform();
        store_element(keys, DType::kF16, t * elements + i, state[i]);
        store_element(keys + row_area(), DType::kF16, t * elements + i, uniform());
      }
    }
    fill_blocks();
  }

  void fill_blocks() {
    const std::uint32_t per_block = layout_.tokens_per_block();
    for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
      for (std::uint32_t first = 0; first < tokens_; first += per_block) {
        std::byte* block = blocks_->bytes().data() + ranges_.size() * layout_.block_bytes();
        const std::uint32_t count = std::min(per_block, tokens_ - first);
        for (std::uint32_t t = 0; t < count; ++t) {
          const std::byte* key = rows_->bytes().data() +
                                 (std::size_t{first + t} * shape_.kv_heads + head) * row_bytes();
          std::copy_n(key, row_bytes(), block + layout_.key_offset(0, t));
          std::copy_n(key + row_area(), row_bytes(), block + layout_.value_offset(0, t));
        }
        ranges_.push_back({block, 0, count, first});
      }
    }
  }

  std::uint32_t tokens_;
  SelectorShape shape_;
  BlockLayout layout_;
  std::optional<Region> rows_;    ///< Keys, then values: [tokens, KV heads, head_dim] each.
  std::optional<Region> blocks_;  ///< [KV heads, blocks]
  std::vector<BlockRange> ranges_;
  std::vector<float> queries_;
  std::vector<std::uint8_t> marks_;
  std::vector<float> external_;
  std::vector<float> out_;
  std::vector<float> lse_;
  AttentionWorkspace workspace_;
};

struct Row {
  std::string selector;
  std::uint32_t tokens = 0;
  double append_us_per_token = 0;
  double select_ms = 0;
  std::optional<double> rest_ms;
  double exact_ms = 0;  ///< Measured in turns with this selector.
  double metadata_share = 0;

  double share_of_exact() const { return (select_ms + rest_ms.value_or(0.0)) / exact_ms; }
};

Result<Row> measure(const std::string& name, const BenchSelectOptions& options, Context& context,
                    WorkerPool& pool) {
  KVTIER_ASSIGN_OR_RETURN(const SelectorFactory factory, make_selector_factory(name));
  KVTIER_ASSIGN_OR_RETURN(const std::unique_ptr<Selector> selector,
                          factory(context.shape(), LayerIndex{0}));
  Row row{.selector = name, .tokens = context.tokens()};
  const double building = seconds_of([&] {
    for (std::uint32_t t = 0; t < context.tokens(); t += kChunkTokens) {
      selector->append(context.rows(t, std::min(kChunkTokens, context.tokens() - t)));
    }
    context.observe(*selector);
  });
  row.append_us_per_token = building * 1e6 / context.tokens();
  row.metadata_share =
      static_cast<double>(selector->metadata_bytes()) / static_cast<double>(context.kv_bytes());
  std::vector<GroupSelection> selection(context.shape().head_groups());
  std::vector<float> out(context.query_size());
  std::vector<float> lse(context.shape().query_heads());
  std::vector<double> selecting;
  std::vector<double> estimating;
  std::vector<double> attending;
  const std::uint32_t budget = options.budget_tokens > 0
                                   ? options.budget_tokens
                                   : static_cast<std::uint32_t>(options.budget * context.tokens());
  Status status;
  for (std::uint32_t step = 0; step <= options.steps && status.ok(); ++step) {
    const SelectRequest request = context.request(step, budget);
    selecting.push_back(seconds_of([&] { status = selector->select(request, selection, pool); }));
    if (status.ok() && selector->estimates_rest()) {
      estimating.push_back(seconds_of([&] {
        status = selector->estimate_rest(request, selection, {out.data(), lse.data()}, pool);
      }));
    }
    if (status.ok()) {
      attending.push_back(seconds_of([&] { status = context.attend_all(step, pool); }));
    }
    if (step > 0) continue;
    // The first step allocates, and warms what later ones find warm.
    selecting.clear();
    estimating.clear();
    attending.clear();
  }
  KVTIER_RETURN_IF_ERROR(status);
  row.select_ms = median(selecting) * 1e3;
  if (!estimating.empty()) row.rest_ms = median(estimating) * 1e3;
  row.exact_ms = median(attending) * 1e3;
  return row;
}

std::vector<std::string> names_of(const BenchSelectOptions& options) {
  std::vector<std::string> names;
  for (const std::string& name : options.selectors) {
    if (name != "all") {
      names.push_back(name);
      continue;
    }
    for (const SelectorListing& listing : known_selectors()) {
      if (!listing.decorates) names.push_back(listing.name);
    }
  }
  return names;
}

std::string table(const BenchSelectOptions& options, const std::vector<Row>& rows) {
  std::string text = fmt::format(
      "context  {} KV heads x {}, {} query heads each, float16; blocks of {}, budget {}, {} "
      "threads\nfigures  medians of {} steps; exact: attention over every token, in turns with "
      "each selector\n\n{:<28} {:>8} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9}\n",
      options.kv_heads, options.head_dim, options.queries_per_kv_head, options.block_tokens,
      options.budget_tokens > 0 ? fmt::format("{} tokens", options.budget_tokens)
                                : fmt::format("{:g} %", 100.0 * options.budget),
      options.threads, options.steps, "selector", "tokens", "us/token", "keeps/KV", "select ms",
      "rest ms", "exact ms", "of exact");
  for (const Row& row : rows) {
    text +=
        fmt::format("{:<28} {:>8} {:>10.2f} {:>9.2f}% {:>9.2f} {:>9} {:>9.2f} {:>8.1f}%\n",
                    row.selector, row.tokens, row.append_us_per_token, 100.0 * row.metadata_share,
                    row.select_ms, row.rest_ms ? fmt::format("{:.2f}", *row.rest_ms) : "-",
                    row.exact_ms, 100.0 * row.share_of_exact());
  }
  return text;
}

std::string json(const BenchSelectOptions& options, const std::vector<Row>& rows) {
  nlohmann::ordered_json json;
  json["schema"] = "kvtier.bench-select";
  json["version"] = 1;
  json["options"] = {
      {"kv_heads", options.kv_heads}, {"queries_per_kv_head", options.queries_per_kv_head},
      {"head_dim", options.head_dim}, {"block_tokens", options.block_tokens},
      {"budget", options.budget},     {"threads", options.threads},
      {"steps", options.steps}};
  if (options.budget_tokens > 0) json["options"]["budget_tokens"] = options.budget_tokens;
  json["rows"] = nlohmann::ordered_json::array();
  for (const Row& row : rows) {
    json["rows"].push_back({{"selector", row.selector},
                            {"tokens", row.tokens},
                            {"append_us_per_token", row.append_us_per_token},
                            {"metadata_share_of_kv", row.metadata_share},
                            {"select_ms", row.select_ms},
                            {"rest_ms", row.rest_ms ? nlohmann::ordered_json(*row.rest_ms)
                                                    : nlohmann::ordered_json(nullptr)},
                            {"exact_ms", row.exact_ms},
                            {"share_of_exact", row.share_of_exact()}});
  }
  return json.dump(1) + "\n";
}

}  // namespace

int run_bench_select(const BenchSelectOptions& options) {
#ifndef __OPTIMIZE__
  fmt::print(stderr, "warning: built without optimisation; the figures mean nothing\n");
#endif
  WorkerPool pool(options.threads);
  std::vector<Row> rows;
  for (const std::uint32_t tokens : options.tokens) {
    Result<Context> context = Context::make(options, tokens);
    if (!context.ok()) {
      fmt::print(stderr, "kvtier: bench select: {}\n", context.status().message());
      return 1;
    }
    for (const std::string& name : names_of(options)) {
      Result<Row> row = measure(name, options, *context, pool);
      if (!row.ok()) {
        fmt::print(stderr, "kvtier: bench select: {}: {}\n", name, row.status().message());
        return row.status().code() == StatusCode::kInvalidArgument ? 2 : 1;
      }
      rows.push_back(*row);
    }
  }
  fmt::print("{}", options.format == "json" ? json(options, rows) : table(options, rows));
  return 0;
}

}  // namespace kvtier
