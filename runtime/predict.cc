#include "runtime/runtime.h"
#include "runtime/sequence_state.h"

#include <algorithm>

// After a step: what the next ones will likely want.

namespace kvtier {

Status Sequence::hint(const StepRequest& guess) {
  State& s = *state_;
  Runtime::State& runtime = s.runtime;
  runtime.begin_call();
  KVTIER_RETURN_IF_ERROR(s.check_step(guess));
  if (!runtime.look_ahead->enabled()) return {};
  const std::uint32_t layer = guess.layer.value;
  KVTIER_RETURN_IF_ERROR(s.selectors[layer]->hint(
      {.queries = guess.queries,
       .query_stride = std::size_t{runtime.options.query_heads} * runtime.layout.head_dim(),
       .query_count = guess.query_count,
       .first_position = s.tokens[layer] - guess.query_count,
       .budget_tokens = guess.budget_tokens,
       .external = guess.external,
       .layer_demands = s.layer_demands(),
       .layer = layer},
      s.selections, runtime.environment.device->workers()));
  for (Stream& stream : s.streams_of(guess.layer)) {
    const GroupSelection& selection = s.selections[stream.head_group.value];
    s.wanted.clear();
    for (std::uint32_t i = 0; i < selection.chosen; ++i) {
      s.wanted.push_back(s.block_id(stream, selection.ranked[i].block));
    }
    runtime.look_ahead->consider(
        {.ranked = s.wanted, .chosen = selection.chosen, .source = GuessSource::kHint});
  }
  // Good until the layer has been stepped, which is at most a token away.
  runtime.look_ahead->promote(runtime.steps + runtime.steps_per_token());
  return {};
}

// What the step ranked is the forecast of the layer's next.
void Sequence::State::keep_forecast(LayerIndex layer) {
  for (Stream& stream : streams_of(layer)) {
    const GroupSelection& selection = selections[stream.head_group.value];
    stream.ranked.clear();
    stream.chosen = selection.chosen;
    for (const SelectedUnit& unit : selection.ranked) {
      stream.ranked.push_back(block_id(stream, unit.block));
    }
  }
}

// Just before a layer's step is the best time to promote for it: earlier, its guesses would take
// the frames of the layers before it; later, there is nothing left to hide behind. Returns the time
// this took.
Duration Sequence::State::predict(LayerIndex layer) {
  if (!runtime.look_ahead->enabled()) return {};
  const Duration start = runtime.now();
  keep_forecast(layer);
  const std::uint32_t layers = runtime.options.layers;
  std::uint64_t started_bytes = 0;
  for (std::uint32_t ahead = 1; ahead <= std::min(LookAhead::kLayersAhead, layers); ++ahead) {
    if (ahead > 1 && !runtime.look_ahead->has_budget()) break;
    const LayerIndex next{(layer.value + ahead) % layers};
    for (const Stream& stream : streams_of(next)) {
      runtime.look_ahead->consider({.ranked = stream.ranked, .chosen = stream.chosen});
    }
    // An engine steps every sequence of a layer before the next layer, or every layer of a
    // sequence before the next sequence: by then the guess has been used either way.
    started_bytes += runtime.look_ahead->promote(runtime.steps + ahead * runtime.sequences_open);
  }
  const Duration end = runtime.now();
  runtime.record(Track::kLookAhead, "look_ahead", start, end, started_bytes);
  return end - start;
}

}  // namespace kvtier
