// The C ABI: steps, exact attention, resolved slots.

#include "memory/dtype.h"
#include "runtime/c_api_state.h"

#include <chrono>
#include <limits>

using namespace kvtier;
using namespace kvtier::c_api;

namespace {

kvtier_query default_query() {
  kvtier_query query{};
  query.struct_size = sizeof(query);
  query.query_count = 1;
  query.dtype = KVTIER_F32;
  return query;
}

double seconds(Duration duration) { return std::chrono::duration<double>(duration).count(); }

/// A query in the runtime's own terms: float32, with memory for what the caller did not ask for.
class Question {
 public:
  /// With `answers`, out is wanted too.
  Status read(kvtier_runtime& runtime, const kvtier_query* query, bool answers) {
    runtime_ = &runtime;
    given_ = default_query();
    KVTIER_RETURN_IF_ERROR(read_struct(query, "query", given_));
    if (given_.layer >= runtime.options.layers) {
      return invalid_argument(fmt::format("query.layer is {}, the runtime has {}", given_.layer,
                                          runtime.options.layers));
    }
    if (given_.query_count == 0 || given_.query_count > runtime.options.tokens_max) {
      return invalid_argument(fmt::format("query.query_count is {}, expected 1 to {}",
                                          given_.query_count, runtime.options.tokens_max));
    }
    if (given_.queries == nullptr || (answers && given_.out == nullptr)) {
      return invalid_argument("query.queries or query.out is NULL");
    }
    KVTIER_RETURN_IF_ERROR(check_memory(raw_value(given_.memory), given_.stream, "query"));
    switch (raw_value(given_.dtype)) {
      case KVTIER_F16: dtype_ = DType::kF16; break;
      case KVTIER_BF16: dtype_ = DType::kBF16; break;
      case KVTIER_F32: dtype_ = DType::kF32; break;
      default:
        return invalid_argument(
            fmt::format("query.dtype is {}, expected 0 to 2", raw_value(given_.dtype)));
    }
    prepare();
    return {};
  }

  const kvtier_query& given() const { return given_; }
  const float* queries() const { return queries_; }
  float* out() const { return out_; }
  float* lse() const { return lse_; }

  StepRequest step() const {
    return {.layer = LayerIndex{given_.layer},
            .queries = queries_,
            .query_count = given_.query_count,
            .selection = given_.own_selection != 0 ? QuerySelection::kOwn : QuerySelection::kShared,
            .budget_tokens = given_.budget_tokens,
            .external = {.scores = given_.external_scores,
                         .group_stride = given_.external_stride,
                         .tokens = given_.external_tokens},
            .out = out_,
            .lse = lse_};
  }

  /// Writes the answer in the caller's type; NaN stays NaN.
  void finish() const {
    if (dtype_ == DType::kF32) return;
    auto* target = static_cast<std::byte*>(given_.out);
    for (std::size_t i = 0; i < out_count(); ++i) store_element(target, dtype_, i, out_[i]);
  }

 private:
  std::size_t rows() const {
    return std::size_t{given_.query_count} * runtime_->options.query_heads;
  }
  std::size_t out_count() const { return rows() * runtime_->options.block.value_dim; }

  void prepare() {
    if (given_.lse != nullptr) {
      lse_ = given_.lse;
    } else {
      if (runtime_->lse.size() < rows()) runtime_->lse.resize(rows());
      lse_ = runtime_->lse.data();
    }
    if (dtype_ == DType::kF32) {
      queries_ = static_cast<const float*>(given_.queries);
      out_ = static_cast<float*>(given_.out);
      return;
    }
    const std::size_t count = rows() * runtime_->options.block.head_dim;
    if (runtime_->queries.size() < count) runtime_->queries.resize(count);
    if (runtime_->out.size() < out_count()) runtime_->out.resize(out_count());
    const auto* source = static_cast<const std::byte*>(given_.queries);
    for (std::size_t i = 0; i < count; ++i) {
      runtime_->queries[i] = load_element(source, dtype_, i);
    }
    queries_ = runtime_->queries.data();
    out_ = runtime_->out.data();
  }

  kvtier_runtime* runtime_ = nullptr;
  kvtier_query given_{};
  DType dtype_ = DType::kF32;
  const float* queries_ = nullptr;
  float* out_ = nullptr;
  float* lse_ = nullptr;
};

void keep_failures(kvtier_runtime& runtime, std::span<const BlockFailure> failures) {
  for (const BlockFailure& failure : failures) runtime.failures.push_back(failure.message);
}

Status write_report(const StepReport& step, kvtier_report* report) {
  if (report == nullptr) return {};
  kvtier_report answer{};
  answer.attended_tokens_max = step.attended_tokens_max;
  answer.attended_tokens_total = step.attended_tokens_total;
  answer.metadata_bytes = step.metadata_bytes;
  answer.rows_estimated = step.rows_estimated;
  answer.failures = static_cast<std::uint32_t>(step.failures.size());
  answer.waits = step.timing.waits;
  answer.select_s = seconds(step.timing.select);
  answer.resolve_s = seconds(step.timing.resolve);
  answer.fetch_s = seconds(step.timing.fetch);
  answer.attend_s = seconds(step.timing.attend);
  answer.merge_s = seconds(step.timing.merge);
  answer.rest_s = seconds(step.timing.rest);
  answer.look_ahead_s = seconds(step.timing.look_ahead);
  answer.total_s = seconds(step.timing.total);
  return write_struct(answer, "report", report);
}

/// What a step and exact attention have in common: `run(question, report)`.
template <typename Run>
kvtier_status answer(kvtier_runtime* runtime, kvtier_sequence sequence, const kvtier_query* query,
                     kvtier_report* report, Run&& run) {
  return with_sequence(runtime, sequence, true,
                       [&](kvtier_runtime& inner, Sequence& found) -> Status {
                         Question question;
                         KVTIER_RETURN_IF_ERROR(question.read(inner, query, true));
                         if (report != nullptr) {
                           // Refused before anything is attended, rather than after.
                           KVTIER_RETURN_IF_ERROR(write_report({}, report));
                         }
                         StepReport step;
                         const Status status = run(found, question, step);
                         question.finish();
                         inner.attended = step.attended;
                         keep_failures(inner, step.failures);
                         KVTIER_RETURN_IF_ERROR(write_report(step, report));
                         return status;
                       });
}

}  // namespace

kvtier_status kvtier_query_init(kvtier_query* query, size_t struct_size) {
  return guarded([&] { return init_struct(default_query(), "query", query, struct_size); });
}

kvtier_status kvtier_step(kvtier_runtime* runtime, kvtier_sequence sequence,
                          const kvtier_query* query, kvtier_report* report) {
  return answer(runtime, sequence, query, report,
                [](Sequence& found, const Question& question, StepReport& step) {
                  return found.step(question.step(), &step);
                });
}

kvtier_status kvtier_attend_exact(kvtier_runtime* runtime, kvtier_sequence sequence,
                                  const kvtier_query* query, kvtier_report* report) {
  return answer(runtime, sequence, query, report,
                [](Sequence& found, const Question& question, StepReport& step) {
                  return found.attend({.layer = LayerIndex{question.given().layer},
                                       .queries = question.queries(),
                                       .query_count = question.given().query_count,
                                       .out = question.out(),
                                       .lse = question.lse()},
                                      &step);
                });
}

kvtier_status kvtier_hint(kvtier_runtime* runtime, kvtier_sequence sequence,
                          const kvtier_query* guess) {
  return with_sequence(runtime, sequence, true,
                       [&](kvtier_runtime& inner, Sequence& found) -> Status {
                         Question question;
                         KVTIER_RETURN_IF_ERROR(question.read(inner, guess, false));
                         return found.hint(question.step());
                       });
}

kvtier_status kvtier_resolve(kvtier_runtime* runtime, kvtier_sequence sequence,
                             const kvtier_query* query, kvtier_slots* slots) {
  return with_sequence(
      runtime, sequence, true, [&](kvtier_runtime& inner, Sequence& found) -> Status {
        Question question;
        KVTIER_RETURN_IF_ERROR(question.read(inner, query, false));
        KVTIER_RETURN_IF_ERROR(write_struct(kvtier_slots{}, "slots", slots));
        ResolvedBlocks resolved;
        const Status status = found.resolve(question.step(), &resolved);
        keep_failures(inner, resolved.failures);
        KVTIER_RETURN_IF_ERROR(status);
        inner.ranges.clear();
        for (const ResolvedRange& range : resolved.ranges) {
          inner.ranges.push_back({.head_group = range.head_group.value,
                                  .block = range.block.value,
                                  .first_token = range.first_token,
                                  .tokens = range.tokens,
                                  .slot = range.slot.value,
                                  .query = UINT32_MAX});
        }
        const BlockLayout& layout = inner.runtime->layout();
        return write_struct({.slab = resolved.slab,
                             .slot_stride = resolved.slot_stride_bytes,
                             .values_offset = layout.value_offset(0, 0),
                             .ranges = inner.ranges.data(),
                             .range_count = static_cast<std::uint32_t>(inner.ranges.size()),
                             .tokens_max = resolved.tokens_max},
                            "slots", slots);
      });
}

kvtier_status kvtier_attended(kvtier_runtime* runtime, kvtier_range* ranges, uint32_t capacity,
                              uint32_t* count) {
  return with_runtime(runtime, false, [&](kvtier_runtime& inner) -> Status {
    if (count == nullptr || (ranges == nullptr && capacity > 0)) {
      return invalid_argument("ranges or count is NULL");
    }
    *count = static_cast<std::uint32_t>(inner.attended.size());
    for (std::size_t i = 0; i < inner.attended.size() && i < capacity; ++i) {
      const AttendedRange& range = inner.attended[i];
      ranges[i] = {.head_group = range.head_group.value,
                   .block = range.block.value,
                   .first_token = range.first_token,
                   .tokens = range.tokens,
                   .slot = UINT32_MAX,
                   .query = range.query};
    }
    return {};
  });
}

const char* kvtier_failure_text(kvtier_runtime* runtime, uint32_t number) {
  const char* text = nullptr;
  static_cast<void>(with_runtime(runtime, false, [&](kvtier_runtime& inner) -> Status {
    if (number < inner.failures.size()) text = inner.failures[number].c_str();
    return {};
  }));
  return text;
}
