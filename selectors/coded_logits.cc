#include "selectors/coded_logits.h"

#include <algorithm>

namespace kvtier {

CodedLogits::CodedLogits(const SelectorShape& shape)
    : shape_(shape),
      sink_logits_(shape, shape.kv_heads, std::min(shape.sinks, shape.tokens_max)),
      open_logits_(shape, shape.kv_heads, KeyCodes::kRunTokens),
      views_(shape.kv_heads) {}

Status CodedLogits::prepare(const SelectRequest& request, const float*, std::uint32_t,
                            std::uint32_t, WorkerPool& pool) {
  return coarse_ == nullptr ? score_exact(request, *keys_, pool) : Status();
}

Status CodedLogits::score_exact(const SelectRequest& request, const CodedKeys& keys,
                                WorkerPool& pool) {
  visible_ = std::min(request.first_position + request.query_count, keys.tokens());
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) views_[head] = keys.sinks(head);
  sink_count_ = static_cast<std::uint32_t>(views_[0].rows);
  KVTIER_RETURN_IF_ERROR(sink_logits_.compute(request, 0, views_, pool));
  open_first_ = keys.coded_tokens();
  if (visible_ <= open_first_) return {};
  for (std::uint32_t head = 0; head < shape_.kv_heads; ++head) {
    views_[head] = keys.open(head, visible_);
  }
  return open_logits_.compute(request, 0, views_, pool);
}

void CodedLogits::fill(const TokenPiece& piece) {
  const std::uint32_t first_run = piece.first_token / KeyCodes::kRunTokens;
  const std::uint32_t end_run =
      std::min(keys_->runs(), (piece.end_token + KeyCodes::kRunTokens - 1) / KeyCodes::kRunTokens);
  if (first_run < end_run) {
    const std::uint8_t* tiles = nullptr;
    if (coarse_ != nullptr) {
      tiles = coarse_->tiles[piece.head / shape_.heads_per_group].data() + first_run;
      fill_coarse(piece, tiles, end_run - first_run);
    }
    score_codes(shape_.softmax, {.codes = keys_->codes(),
                                 .runs = keys_->run(piece.head, first_run),
                                 .run_count = end_run - first_run,
                                 .tiles = tiles,
                                 .queries = piece.queries,
                                 .query_stride = shape_.head_dim,
                                 .query_count = piece.rows,
                                 .logits = piece.logits,
                                 .logit_stride = kCellRowTokens,
                                 .goes_on = end_run < keys_->runs()});
  }
  const std::uint32_t sinks_end = std::min(sink_count_, piece.end_token);
  const std::uint32_t open_first = std::max(open_first_, piece.first_token);
  for (std::uint32_t r = 0; r < piece.rows; ++r) {
    float* logits = piece.logits + r * kCellRowTokens;
    const std::uint32_t row = piece.first_row + r;
    if (piece.first_token < sinks_end) {
      const std::span<const float> exact = sink_logits_.row(piece.head, row, sink_count_);
      std::ranges::copy(exact.subspan(piece.first_token, sinks_end - piece.first_token), logits);
    }
    if (open_first < piece.end_token) {
      const std::span<const float> exact =
          open_logits_.row(piece.head, row, visible_ - open_first_);
      std::ranges::copy(exact.subspan(open_first - open_first_, piece.end_token - open_first),
                        logits + (open_first - piece.first_token));
    }
  }
}

namespace {

/// The logits of the groups that fill a tile, each as often as it has tokens.
template <std::uint32_t kPerGroup>
void repeat(const float* groups, float* logits) {
  for (std::uint32_t g = 0; g < KeyCodes::kTileTokens / kPerGroup; ++g) {
    for (std::uint32_t t = 0; t < kPerGroup; ++t) logits[g * kPerGroup + t] = groups[g];
  }
}

using Repeat = void (*)(const float* groups, float* logits);

/// Null where groups do not fill a tile evenly.
Repeat repeat_for(std::uint32_t per_group) {
  switch (per_group) {
    case 1: return repeat<1>;
    case 2: return repeat<2>;
    case 4: return repeat<4>;
    case 8: return repeat<8>;
    case 16: return repeat<16>;
    default: return nullptr;
  }
}

}  // namespace

/// Gives the tokens of tiles that are not scored the logit of their group.
void CodedLogits::fill_coarse(const TokenPiece& piece, const std::uint8_t* tiles,
                              std::uint32_t runs) {
  const std::uint32_t per_group = coarse_->group_tokens;
  const Repeat whole_tile =
      piece.first_token % KeyCodes::kTileTokens == 0 ? repeat_for(per_group) : nullptr;
  for (std::uint32_t r = 0; r < piece.rows; ++r) {
    const std::span<const float> groups =
        coarse_->logits->row(piece.head, piece.first_row + r, coarse_->groups);
    float* logits = piece.logits + r * kCellRowTokens;
    for (std::uint32_t tile = 0; tile < runs * KeyCodes::kRunTiles; ++tile) {
      if ((tiles[tile / KeyCodes::kRunTiles] >> tile % KeyCodes::kRunTiles) & 1) continue;
      const std::uint32_t end = (tile + 1) * KeyCodes::kTileTokens;
      if (whole_tile != nullptr && (piece.first_token + end) / per_group <= groups.size()) {
        const std::uint32_t first = end - KeyCodes::kTileTokens;
        whole_tile(groups.data() + (piece.first_token + first) / per_group, logits + first);
        continue;
      }
      for (std::uint32_t t = tile * KeyCodes::kTileTokens; t < end;) {
        const std::uint32_t group = (piece.first_token + t) / per_group;
        const std::uint32_t next = std::min(end, (group + 1) * per_group - piece.first_token);
        // The last run can reach beyond what the queries see, and so beyond the groups.
        const float logit = group < groups.size() ? groups[group] : 0.0f;
        std::fill(logits + t, logits + next, logit);
        t = next;
      }
    }
  }
}

}  // namespace kvtier
