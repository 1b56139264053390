#include "selectors/coded_means.h"

#include "kernels/quantised_keys.h"
#include "kernels/score_rows.h"

#include <algorithm>
#include <cstring>

namespace kvtier {
namespace {

/// Groups as tokens: what `CodedKeys` sees.
SelectorShape of_groups(SelectorShape shape, std::uint32_t group_tokens) {
  shape.tokens_max = shape.tokens_max / group_tokens + 1;
  shape.sinks = shape.sinks / group_tokens;
  shape.window = (shape.window + group_tokens - 1) / group_tokens;
  return shape;
}

SelectorShape uncapped(SelectorShape shape) {
  shape.softmax.logit_cap = 0.0f;
  return shape;
}

/// The open run, and the open group behind it.
constexpr std::uint32_t kOpenRows = KeyCodes::kRunTokens + 1;

}  // namespace

CodedMeans::CodedMeans(const SelectorShape& shape, std::uint32_t group_tokens, std::uint32_t bits)
    : shape_(uncapped(shape)),
      group_tokens_(group_tokens),
      recent_({.heads = shape.kv_heads,
               .dim = shape.head_dim,
               .dtype = shape.dtype,
               .group_tokens = group_tokens,
               .keep_tokens = shape.window,
               .tokens_max = shape.tokens_max}),
      means_(of_groups(shape, group_tokens), bits),
      open_logits_(shape_, shape.kv_heads, kOpenRows),
      mean_(std::size_t{shape.kv_heads} * recent_.row_bytes()),
      open_rows_(std::size_t{shape.kv_heads} * kOpenRows * recent_.row_bytes()),
      views_(shape.kv_heads) {}

void CodedMeans::append(const NewTokens& tokens) {
  recent_.append(NewRows::keys(tokens), [this](std::uint32_t group) { take_mean(group); });
}

void CodedMeans::take_mean(std::uint32_t group) {
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    write_mean(head, group, (group + 1) * group_tokens_, mean_.data() + head * recent_.row_bytes());
  }
  means_.append({.first_position = group,
                 .tokens = 1,
                 .keys = mean_.data(),
                 .key_token_stride = mean_.size(),
                 .key_head_stride = recent_.row_bytes()});
}

/// The mean over a group's tokens before `end` that are not sinks. Returns how many there are.
std::size_t CodedMeans::write_mean(std::uint32_t head, std::uint32_t group, std::uint32_t end,
                                   std::byte* target) const {
  const RowsView rows = recent_.rows(head, std::max(group * group_tokens_, shape_.sinks), end);
  if (rows.rows == 0) {
    std::memset(target, 0, recent_.row_bytes());
  } else {
    mean_rows(rows, group_tokens_, target);
  }
  return rows.rows;
}

void CodedMeans::truncate(std::uint32_t position) {
  recent_.truncate(position);
  means_.truncate(position / group_tokens_);
}

std::uint32_t CodedMeans::truncate_floor(std::uint32_t position) const {
  const std::uint32_t floor = recent_.truncate_floor(position);
  const std::uint32_t group = floor / group_tokens_;
  const std::uint32_t kept = means_.truncate_floor(group);
  return kept == group ? floor : kept * group_tokens_;
}

void CodedMeans::save(StateWriter& writer) const {
  recent_.save(writer);
  means_.save(writer);
}

Status CodedMeans::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(recent_.restore(reader));
  KVTIER_RETURN_IF_ERROR(means_.restore(reader));
  if (means_.tokens() == recent_.closed()) return {};
  return corrupt(fmt::format("selector state: found {} means for {} groups of tokens",
                             means_.tokens(), recent_.closed()));
}

Status CodedMeans::score(const SelectRequest& request, std::uint32_t visible, StepLogits& target,
                         WorkerPool& pool) {
  const std::uint32_t groups = (visible - 1) / group_tokens_ + 1;
  const std::uint32_t run_groups = KeyCodes::kRunTokens;
  Step step{.request = request,
            .target = target,
            .runs = std::min(means_.runs(), (groups + run_groups - 1) / run_groups),
            .rows = request.query_count * shape_.queries_per_kv_head};
  step.slices = (step.runs + kTaskRuns - 1) / kTaskRuns;
  target.reserve(step.rows);
  const std::size_t of_head = std::size_t{shape_.queries_per_kv_head} * shape_.head_dim;
  queries_.resize(std::max(queries_.size(), shape_.kv_heads * request.query_count * of_head));
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    for (std::uint32_t q = 0; q < request.query_count; ++q) {
      std::copy_n(request.queries + q * request.query_stride + head * of_head, of_head,
                  queries_.data() + (std::size_t{head} * request.query_count + q) * of_head);
    }
  }
  // Two pointers: small enough that std::function keeps them without allocating.
  pool.run(std::size_t{shape_.kv_heads} * step.slices,
           [this, &step](std::size_t task) { score_runs(step, static_cast<std::uint32_t>(task)); });
  if (groups <= means_.coded_tokens()) return {};
  gather_open(groups, visible);
  KVTIER_RETURN_IF_ERROR(open_logits_.compute(request, 0, views_, pool));
  const std::uint32_t first = means_.coded_tokens();
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    for (std::uint32_t row = 0; row < step.rows; ++row) {
      std::ranges::copy(open_logits_.row(head, row, groups - first),
                        target.row(head, row, groups).begin() + first);
    }
  }
  return {};
}

void CodedMeans::score_runs(const Step& step, std::uint32_t task) {
  const std::uint32_t head = task / step.slices;
  const std::uint32_t first = task % step.slices * kTaskRuns;
  score_codes(shape_.softmax,
              {.codes = means_.codes(),
               .runs = means_.run(head, first),
               .run_count = std::min(kTaskRuns, step.runs - first),
               .tiles = nullptr,
               .queries = queries_.data() + std::size_t{head} * step.rows * shape_.head_dim,
               .query_stride = shape_.head_dim,
               .query_count = step.rows,
               .logits = step.target.all_rows(head).data() + first * KeyCodes::kRunTokens,
               .logit_stride = step.target.row_stride()});
}

/// Puts what has no codes yet side by side: the means of the open run and the open group's.
void CodedMeans::gather_open(std::uint32_t groups, std::uint32_t visible) {
  const std::size_t row_bytes = recent_.row_bytes();
  const std::uint32_t first = means_.coded_tokens();
  const std::uint32_t closed = std::min(groups, means_.tokens());
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    std::byte* target = open_rows_.data() + std::size_t{head} * kOpenRows * row_bytes;
    if (closed > first) {
      std::memcpy(target, means_.open(head, closed).data, (closed - first) * row_bytes);
    }
    if (groups > closed) {
      write_mean(head, closed, visible, target + (closed - first) * row_bytes);
    }
    views_[head] = {target, groups - first, shape_.head_dim, row_bytes, shape_.dtype};
  }
}

}  // namespace kvtier
