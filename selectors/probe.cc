#include "memory/dtype.h"
#include "selectors/entropy_budget.h"
#include "selectors/families.h"
#include "selectors/far_selector.h"
#include "selectors/key_frame.h"
#include "selectors/landmark_rows.h"
#include "selectors/probe_query.h"
#include "selectors/question_log.h"
#include "selectors/step_logits.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>

namespace kvtier {
namespace {

struct ProbeOptions {
  /// Tokens per representative, whatever the block size: ActQKV's 32 (64 for Qwen).
  std::uint32_t tokens = 32;
  /// ActQKV un-rotates keys and looks from one distance, as InfLLM attends. Here the model attends
  /// at the true positions, and the default needs to know nothing of them.
  bool unrotated = false;
  /// One set for all KV heads, as ActQKV has it; here a set per head group, which is what is moved.
  bool share_layer = false;
  /// Of the softmax whose entropy is a layer's demand. ActQKV has none (1): cosines lie within a
  /// few tenths of each other, so that every layer's entropy is nearly the largest there is and all
  /// budgets are equal. 0.1: a tenth more cosine counts e times as much.
  double temperature = 0.1;
  EntropyBounds bounds;
};

/// Where `frame=unrotated` puts the probe: ActQKV's local window.
constexpr std::uint32_t kProbeDistance = 512;
/// Entropies that a layer's demand is the mean of (ActQKV), and more to go back by.
constexpr std::uint32_t kProbeEntropies = 100;
constexpr std::uint32_t kProbeEntropiesKept = 128;

/// A probe made from a step's queries, each weighted by how unusual it is (ActQKV, 2502.13542, code
/// and reviews), against one representative per `tokens` keys: the cosine over the heads of a group
/// in one vector. One query is its own probe.
///
/// Representatives are mean keys per KV head. ActQKV's are means of the four keys of a block that
/// were attended most while the block was in the local window, per query head; that needs every
/// prompt query and its attention, which no caller of this library has to give, so the mean over
/// all keys of the block is the substitute. It needs no prompt queries at all.
///
/// What is unusual is measured against the running statistics of this sequence and layer: windows
/// of 256 observed prompt queries (those that were observed; a prompt that was observed in part has
/// smaller windows), then every step. ActQKV keeps them for the whole process. Until something is
/// known all queries weigh the same.
///
/// A layer's demand is the mean of its last 100 entropies of softmax(cosine / temperature), as a
/// part of the largest possible; `entropy_budget` turns the demands of all layers into budgets.
/// When a request carries demands, this layer may therefore choose more than its equal share, up to
/// twice; without them it keeps to its budget.
///
/// Cuts go back by nine steps, farther to what the prompt had taught.
class Probe final : public FarSelector {
 public:
  Probe(const SelectorShape& shape, ProbeOptions options)
      : FarSelector(shape),
        grouped_(grouped(shape, options)),
        options_(options),
        frame_(shape, options.unrotated, kProbeDistance),
        rows_(shape, options.tokens),
        logits_(dot_shape(shape), shape.kv_heads, rows_.groups_max()),
        views_(shape.kv_heads),
        squares_(std::size_t{shape.kv_heads} * rows_.groups_max()),
        probe_(std::size_t{shape.query_heads()} * shape.head_dim),
        entropies_(kProbeEntropiesKept, 1),
        summed_(std::size_t{shape.kv_heads} * shape.head_dim),
        groups_(grouped_.head_groups()) {
    const std::size_t blocks_max = shape.tokens_max / shape.tokens_per_block + 1;
    for (Group& group : groups_) {
      group.cosines.resize(rows_.groups_max());
      group.scores.resize(blocks_max);
      group.order.resize(blocks_max);
    }
  }

  void append(const NewTokens& tokens) override {
    frame_.feed(tokens, [this](const NewTokens& piece) { rows_.append(piece); });
  }
  void observe_prompt(const PromptQueries& queries) override { probe_.observe(queries, frame_); }
  void truncate(std::uint32_t position) override {
    rows_.truncate(position);
    squared_ = std::min(squared_, rows_.closed());
    probe_.drop_from(position);
    entropies_.drop_from(position);
  }
  std::uint32_t truncate_floor(std::uint32_t position) const override {
    return rows_.truncate_floor(position);
  }

  float demand() const override;

  std::unique_ptr<Selector> fork() const override { return std::make_unique<Probe>(*this); }
  void save(StateWriter& writer) const override;
  Status restore(StateReader& reader) override;

  std::size_t metadata_bytes() const override {
    return rows_.metadata_bytes() + rows_.closed() * shape().kv_heads * sizeof(float) +
           probe_.bytes() + entropies_.bytes();
  }

 private:
  /// Scratch of one head group.
  struct Group {
    std::vector<float> cosines;
    std::vector<float> scores;
    std::vector<std::uint32_t> order;
    double entropy = 0.0;  ///< As a part of the largest possible.
    bool finite = true;
  };
  /// What the workers share in one answer.
  struct Step {
    const SelectRequest& request;
    std::span<GroupSelection> selection;
    FarRegion region;
    std::uint32_t first = 0;  ///< Representatives of the region.
    std::uint32_t count = 0;
    std::uint32_t far_budget = 0;
  };

  static SelectorShape grouped(SelectorShape shape, const ProbeOptions& options) {
    if (options.share_layer) shape.heads_per_group = shape.kv_heads;
    return shape;
  }
  /// Plain products, the query heads of a KV head added into one query: a sum of products with the
  /// same key is the product with the sum.
  static SelectorShape dot_shape(SelectorShape shape) {
    shape.queries_per_kv_head = 1;
    shape.softmax = {};
    return shape;
  }
  void take_squares(std::uint32_t end);
  std::uint32_t tokens_seen() const override { return rows_.tokens(); }
  void hear(const SelectRequest& request, bool learns) override {
    if (learns) entropies_.drop_from(request.first_position);
    asked_ = probe_.make(request, frame_, learns);
  }
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override;
  void answer_group(const Step& step, std::uint32_t index);
  void take_cosines(const Step& step, std::uint32_t index);

  SelectorShape grouped_;  ///< With the head groups that share a set.
  ProbeOptions options_;
  KeyFrame frame_;
  LandmarkRows rows_;
  StepLogits logits_;
  std::vector<RowsView> views_;
  std::vector<float> squares_;  ///< [KV heads, groups_max]: squared lengths of representatives,
  std::uint32_t squared_ = 0;   ///< of the closed ones before this.
  ProbeQuery probe_;
  std::span<const float> asked_;  ///< The question's probe.
  QuestionLog entropies_;
  std::vector<float> summed_;  ///< [KV heads, head_dim]
  std::vector<Group> groups_;
};

/// Squared lengths of representatives before `end`; those of closed ones stay.
void Probe::take_squares(std::uint32_t end) {
  for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
    for (std::uint32_t g = squared_; g < end; ++g) {
      const std::byte* row = rows_.rows(head, g, 1).data;
      float sum = 0.0f;
      for (std::uint32_t i = 0; i < shape().head_dim; ++i) {
        const float element = load_element(row, shape().dtype, i);
        sum += element * element;
      }
      squares_[std::size_t{head} * rows_.groups_max() + g] = sum;
    }
  }
  squared_ = std::max(squared_, std::min(end, rows_.closed()));
}

Status Probe::answer(const Question& question, std::span<GroupSelection> selection,
                     WorkerPool& pool) {
  const auto& [request, region, learns] = question;
  Step step{.request = request,
            .selection = selection,
            .region = region,
            .first = region.begin / options_.tokens,
            .far_budget = far_budget_tokens(shape(), request)};
  const std::uint32_t end = (region.end - 1) / options_.tokens + 1;
  step.count = end - step.first;
  if (!request.layer_demands.empty()) {
    const std::uint32_t share = entropy_budget(
        request.layer_demands, request.layer,
        request.budget_tokens - always_attended_tokens(shape(), request), options_.bounds);
    step.far_budget = std::min(share, region.tokens());
  }
  if (end > rows_.closed()) rows_.average_open_group();
  take_squares(end);
  for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
    views_[head] = rows_.rows(head, step.first, step.count);
    float* sum = summed_.data() + std::size_t{head} * shape().head_dim;
    std::fill_n(sum, shape().head_dim, 0.0f);
    for (std::uint32_t h = 0; h < shape().queries_per_kv_head; ++h) {
      const float* query =
          asked_.data() + (std::size_t{head} * shape().queries_per_kv_head + h) * shape().head_dim;
      for (std::uint32_t i = 0; i < shape().head_dim; ++i) sum[i] += query[i];
    }
  }
  const SelectRequest plain{.queries = summed_.data(), .query_stride = summed_.size()};
  KVTIER_RETURN_IF_ERROR(logits_.compute(plain, 0, views_, pool));
  // Two pointers: small enough that std::function keeps them without allocating.
  pool.run(groups_.size(),
           [this, &step](std::size_t i) { answer_group(step, static_cast<std::uint32_t>(i)); });
  double entropy = 0.0;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    if (!groups_[i].finite) {
      return invalid_argument(
          fmt::format("probe: scores of head group {} at position {} overflow float32", i,
                      request.first_position));
    }
    entropy += groups_[i].entropy / static_cast<double>(groups_.size());
  }
  if (learns) entropies_.add(request.first_position, 0)[0] = static_cast<float>(entropy);
  if (!options_.share_layer) return {};
  for (GroupSelection& group : selection.subspan(1)) {
    group.ranked.assign(selection[0].ranked.begin(), selection[0].ranked.end());
    group.chosen = selection[0].chosen;
  }
  return {};
}

void Probe::take_cosines(const Step& step, std::uint32_t index) {
  Group& group = groups_[index];
  const std::uint32_t heads = grouped_.heads_per_group;
  const std::uint32_t per_head = shape().queries_per_kv_head;
  const std::span<const float> query = probe_.query();
  double probe = 0.0;
  const std::size_t group_channels = std::size_t{heads} * per_head * shape().head_dim;
  for (std::size_t i = index * group_channels; i < (index + 1) * group_channels; ++i) {
    probe += double{query[i]} * double{query[i]};
  }
  group.finite = true;
  for (std::uint32_t r = 0; r < step.count; ++r) {
    double dot = 0.0;
    double squares = 0.0;
    for (std::uint32_t head = index * heads; head < (index + 1) * heads; ++head) {
      dot += double{logits_.row(head, 0, step.count)[r]};
      squares += double{squares_[std::size_t{head} * rows_.groups_max() + step.first + r]};
    }
    const double norm = std::sqrt(probe) * std::sqrt(squares * per_head);
    group.cosines[r] = norm > 0.0 ? static_cast<float>(dot / norm) : 0.0f;
    group.finite = group.finite && std::isfinite(dot) && std::isfinite(norm);
  }
}

void Probe::answer_group(const Step& step, std::uint32_t index) {
  Group& group = groups_[index];
  take_cosines(step, index);
  if (!group.finite) return;
  // Entropy of p = w / sum: ln(sum) - sum of w ln(w) / sum, with w relative to the largest.
  const std::span<const float> cosines(group.cosines.data(), step.count);
  const float top = *std::ranges::max_element(cosines);
  double sum = 0.0;
  double moment = 0.0;
  for (float cosine : cosines) {
    const double logit = (double{cosine} - double{top}) / options_.temperature;
    sum += std::exp(logit);
    moment += std::exp(logit) * logit;
  }
  group.entropy = step.count > 1
                      ? (std::log(sum) - moment / sum) / std::log(static_cast<double>(step.count))
                      : 1.0;
  const std::uint32_t per_block = shape().tokens_per_block;
  const std::uint32_t blocks = block_count(step.region, per_block);
  std::uint32_t t = step.region.begin;
  for (std::uint32_t b = 0; b < blocks; ++b) {
    const std::uint32_t begin = t;
    const std::uint32_t end = std::min((t / per_block + 1) * per_block, step.region.end);
    float score = 0.0f;
    while (t < end) {
      const std::uint32_t next = std::min(end, (t / options_.tokens + 1) * options_.tokens);
      score += group.cosines[t / options_.tokens - step.first] * static_cast<float>(next - t);
      t = next;
    }
    group.scores[b] = score / static_cast<float>(end - begin);
  }
  rank_blocks({.scores = std::span(group.scores.data(), blocks),
               .always = {},
               .region = step.region,
               .tokens_per_block = per_block,
               .far_budget_tokens = step.far_budget,
               .band_tokens = step.request.band_tokens},
              group.order, step.selection[index]);
}

float Probe::demand() const {
  const std::uint32_t count = std::min(entropies_.count(), kProbeEntropies);
  if (count == 0) return Selector::demand();
  double sum = 0.0;
  for (std::uint32_t back = 0; back < count; ++back) sum += double{entropies_.row(back)[0]};
  return static_cast<float>(sum / count);
}

void Probe::save(StateWriter& writer) const {
  rows_.save(writer);
  probe_.save(writer);
  entropies_.save(writer);
}

Status Probe::restore(StateReader& reader) {
  squared_ = 0;
  KVTIER_RETURN_IF_ERROR(rows_.restore(reader));
  KVTIER_RETURN_IF_ERROR(probe_.restore(reader));
  return entropies_.restore(reader);
}

}  // namespace

const SelectorFamily& probe_family() {
  static constexpr std::string_view kParameters[] = {"tokens",      "frame", "share",
                                                     "temperature", "least", "most"};
  static const SelectorFamily kFamily = {
      .name = "probe",
      .summary = "cosine of mean keys with a probe of unusual queries; entropy shares the budget",
      .source = "ActQKV, 2502.13542",
      .parameters = kParameters,
      .remembers = true,
      .metadata = "(2 head_dim + 8) / tokens B; the window's keys; 9 statistics of queries",
      .build_cost = "O(head_dim)",
      .step_cost = "O(context / tokens * head_dim)",
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        static constexpr std::string_view kShares[] = {"group", "layer"};
        const SelectorParameters& given = recipe.parameters;
        ProbeOptions options;
        KVTIER_ASSIGN_OR_RETURN(options.tokens, given.integer("tokens", options.tokens, 1, 1024));
        KVTIER_ASSIGN_OR_RETURN(const std::size_t frame,
                                given.choice("frame", KeyFrame::kChoices[0], KeyFrame::kChoices));
        KVTIER_ASSIGN_OR_RETURN(const std::size_t share,
                                given.choice("share", kShares[0], kShares));
        KVTIER_ASSIGN_OR_RETURN(options.temperature,
                                given.number("temperature", options.temperature, 1e-4, 1e4));
        KVTIER_ASSIGN_OR_RETURN(options.bounds.least,
                                given.number("least", options.bounds.least, 0.0, 1.0));
        KVTIER_ASSIGN_OR_RETURN(options.bounds.most,
                                given.number("most", options.bounds.most, 1.0, 100.0));
        options.unrotated = frame == 1;
        options.share_layer = share == 1;
        factory.needs.rope = options.unrotated;
        factory.make = [options](const SelectorShape& shape,
                                 LayerIndex) -> Result<std::unique_ptr<Selector>> {
          if (options.unrotated) KVTIER_RETURN_IF_ERROR(KeyFrame::check(shape, "probe"));
          return Result<std::unique_ptr<Selector>>(std::make_unique<Probe>(shape, options));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
