#include "kernels/score_rows.h"
#include "kernels/top_k.h"
#include "selectors/families.h"
#include "selectors/far_selector.h"
#include "selectors/question_log.h"
#include "selectors/sentence_rows.h"
#include "selectors/step_logits.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>

namespace kvtier {
namespace {

struct SentenceOptions {
  /// Longest sentence in tokens; text without punctuation (code, tables) is cut there. The paper
  /// has no cap. 128 is about five ordinary sentences, and an eighth of the paper's budget.
  std::uint32_t cap = 128;
};

/// Questions that a cut can go back by.
constexpr std::uint32_t kSentenceQuestions = 16;

/// Whole sentences by their mean key (SentenceKV, 2504.00970, paper and code): the score of a
/// sentence is the product of its vector with the mean query of the sentence being generated, the
/// step's queries included; the best sentences are attended, the last one cut at the budget.
///
/// What the paper drops for good in prefill (all but the tokens that the last prompt queries
/// attend most) is not dropped here: it lies on a lower tier with its sentence and is found with
/// it. Vectors are therefore means over all tokens of a sentence, sinks apart. The paper attends
/// everything while a sentence has but one query; here the budget holds, with that query alone.
/// The paper ranks per query head and leaves the group open: here heads are pooled as the shape
/// says, by softmax over the sentences in which each counts once per token, or by mean logit.
///
/// What is remembered of questions: the sums of the sentence's queries after each of the last 16.
class Sentences final : public FarSelector {
 public:
  Sentences(const SelectorShape& shape, SentenceOptions options)
      // A piece ends where a block or a sentence does, or at one of two cuts.
      : FarSelector(shape, std::size_t{shape.tokens_max} + 3),
        rows_(shape, options.cap),
        logits_(shape, shape.kv_heads, shape.tokens_max + 1),
        views_(shape.kv_heads),
        questions_(kSentenceQuestions, std::size_t{shape.query_heads()} * shape.head_dim),
        sum_(std::size_t{shape.query_heads()} * shape.head_dim),
        asked_(sum_.size()),
        groups_(shape.head_groups(), Group(shape.tokens_max + 1)) {}

  void append(const NewTokens& tokens) override { rows_.append(tokens); }
  void truncate(std::uint32_t position) override {
    rows_.truncate(position);
    questions_.drop_from(position);
  }
  std::uint32_t truncate_floor(std::uint32_t position) const override {
    return rows_.truncate_floor(position);
  }

  std::unique_ptr<Selector> fork() const override { return std::make_unique<Sentences>(*this); }
  void save(StateWriter& writer) const override {
    rows_.save(writer);
    questions_.save(writer);
  }
  Status restore(StateReader& reader) override {
    KVTIER_RETURN_IF_ERROR(rows_.restore(reader));
    return questions_.restore(reader);
  }
  std::size_t metadata_bytes() const override {
    return rows_.metadata_bytes() + questions_.bytes();
  }

 private:
  /// Scratch of one head group.
  struct Group {
    explicit Group(std::size_t units) : scores(units), order(units), best(units) {}
    FixedArray<float> scores;
    FixedArray<std::uint32_t> order;
    FixedArray<RankedRange> best;
    bool finite = true;
  };
  /// What the workers share in one answer.
  struct Step {
    const SelectRequest& request;
    std::span<GroupSelection> selection;
    FarRegion region;
    std::uint32_t first = 0;  ///< Sentences of the region.
    std::uint32_t count = 0;
    std::uint32_t far_budget = 0;
  };

  std::uint32_t tokens_seen() const override { return rows_.tokens(); }
  void hear(const SelectRequest& request, bool learns) override;
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override;
  void answer_group(const Step& step, std::uint32_t head_group);
  void score_group(const Step& step, Group& group, std::uint32_t head_group);
  RankedRange range_of(const Step& step, std::uint32_t unit, float score) const;

  SentenceRows rows_;
  StepLogits logits_;
  std::vector<RowsView> views_;
  QuestionLog questions_;
  std::vector<float> sum_;
  std::vector<float> asked_;
  std::vector<Group> groups_;
};

/// Leaves the mean query in `asked_`, and the sums behind it in the log if it learns. The step's
/// queries all have their say in this step, also where a draft runs into the next sentence.
void Sentences::hear(const SelectRequest& request, bool learns) {
  if (learns) questions_.drop_from(request.first_position);
  std::uint32_t count = 0;
  std::ranges::fill(sum_, 0.0f);
  const std::uint32_t begin = rows_.begin(rows_.unit_of(request.first_position));
  if (!questions_.empty() && questions_.position() >= begin &&
      questions_.position() < request.first_position) {
    std::ranges::copy(questions_.row(), sum_.begin());
    count = questions_.number();
  }
  std::ranges::copy(sum_, asked_.begin());
  const auto said = static_cast<float>(count + request.query_count);
  for (std::uint32_t q = 0; q < request.query_count; ++q) {
    const std::uint32_t position = request.first_position + q;
    const float* query = request.queries + q * request.query_stride;
    if (q > 0 && rows_.begin(rows_.unit_of(position)) == position) {
      std::ranges::fill(sum_, 0.0f);
      count = 0;
    }
    ++count;
    for (std::size_t i = 0; i < sum_.size(); ++i) {
      sum_[i] += query[i];
      asked_[i] += query[i];
    }
    if (learns) std::ranges::copy(sum_, questions_.add(position, count).begin());
  }
  for (float& value : asked_) value /= said;
}

Status Sentences::answer(const Question& question, std::span<GroupSelection> selection,
                         WorkerPool& pool) {
  const auto& [request, region, learns] = question;
  Step step{.request = request,
            .selection = selection,
            .region = region,
            .first = rows_.unit_of(region.begin),
            .far_budget = far_budget_tokens(shape(), request)};
  step.count = rows_.unit_of(region.end - 1) - step.first + 1;
  if (step.first + step.count > rows_.closed()) rows_.average_open();
  for (std::uint32_t head = 0; head < shape().kv_heads; ++head) {
    views_[head] = rows_.rows(head, step.first, step.count);
  }
  const SelectRequest mean{.queries = asked_.data(), .query_stride = asked_.size()};
  KVTIER_RETURN_IF_ERROR(logits_.compute(mean, 0, views_, pool));
  // Two pointers: small enough that std::function keeps them without allocating.
  pool.run(groups_.size(),
           [this, &step](std::size_t i) { answer_group(step, static_cast<std::uint32_t>(i)); });
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    if (groups_[i].finite) continue;
    return invalid_argument(
        fmt::format("sentence: scores of head group {} at position {} overflow float32", i,
                    request.first_position));
  }
  return {};
}

/// The part of a sentence that lies in the region.
RankedRange Sentences::range_of(const Step& step, std::uint32_t unit, float score) const {
  return {std::max(rows_.begin(unit), step.region.begin),
          std::min(rows_.end(unit), step.region.end), score};
}

void Sentences::answer_group(const Step& step, std::uint32_t head_group) {
  Group& group = groups_[head_group];
  group.finite = true;
  score_group(step, group, head_group);
  const std::span<const float> scores = group.scores.part(0, step.count);
  group.finite = group.finite && all_finite(scores);
  if (!group.finite) return;
  // As many of the best as it takes: a guess from the mean length, doubled until it is enough.
  const std::uint64_t wanted = std::uint64_t{step.far_budget} + step.request.band_tokens;
  std::uint64_t k = wanted * step.count / step.region.tokens() + 16;
  for (;; k *= 2) {
    std::uint64_t tokens = 0;
    std::size_t taken = 0;
    for (std::uint32_t i : top_k(scores, k, group.order.part(0, step.count))) {
      group.best[taken] = range_of(step, step.first + i, scores[i]);
      tokens += group.best[taken].end - group.best[taken].begin;
      ++taken;
      if (tokens >= wanted) break;
    }
    if (tokens < wanted && taken < step.count) continue;
    rank_ranges(group.best.part(0, taken), shape().tokens_per_block, step.far_budget,
                step.request.band_tokens, step.selection[head_group]);
    return;
  }
}

void Sentences::score_group(const Step& step, Group& group, std::uint32_t head_group) {
  const std::span<float> scores = group.scores.part(0, step.count);
  std::ranges::fill(scores, 0.0f);
  const auto heads = static_cast<float>(shape().heads_per_group * shape().queries_per_kv_head);
  for (std::uint32_t i = 0; i < shape().heads_per_group; ++i) {
    const std::size_t head = std::size_t{head_group} * shape().heads_per_group + i;
    for (std::uint32_t h = 0; h < shape().queries_per_kv_head; ++h) {
      const std::span<float> row = logits_.row(head, h, step.count);
      group.finite = group.finite && all_finite(row);
      if (!group.finite) return;
      float share = 1.0f / heads;
      if (shape().reduction != GroupReduction::kMean) {
        softmax_row(row);
        double all = 0.0;
        for (std::uint32_t u = 0; u < step.count; ++u) {
          const RankedRange range = range_of(step, step.first + u, 0.0f);
          all += double{row[u]} * (range.end - range.begin);
        }
        share = static_cast<float>(1.0 / all);
      }
      const bool largest = shape().reduction == GroupReduction::kMax;
      for (std::uint32_t u = 0; u < step.count; ++u) {
        const float score = row[u] * share;
        scores[u] = largest ? std::max(scores[u], score) : scores[u] + score;
      }
    }
  }
}

}  // namespace

const SelectorFamily& sentence_family() {
  static constexpr std::string_view kParameters[] = {"cap"};
  static const SelectorFamily kFamily = {
      .name = "sentence",
      .summary = "whole sentences by their mean key, for the mean query of the current sentence",
      .source = "SentenceKV, 2504.00970",
      .parameters = kParameters,
      .remembers = true,
      .partial_blocks = true,
      .needs = {.sentence_ends = true},
      .metadata = "(2 head_dim + 4) / sentence length B; the newest keys, 16 queries",
      .build_cost = "O(head_dim)",
      .step_cost = "O(sentences * head_dim)",
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        SentenceOptions options;
        KVTIER_ASSIGN_OR_RETURN(options.cap,
                                recipe.parameters.integer("cap", options.cap, 1, 4096));
        factory.make = [options](const SelectorShape& shape, LayerIndex) {
          return Result<std::unique_ptr<Selector>>(std::make_unique<Sentences>(shape, options));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
