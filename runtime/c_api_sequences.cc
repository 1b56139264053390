// The C ABI: sequences, and what goes into them.

#include "runtime/c_api_state.h"

using namespace kvtier;
using namespace kvtier::c_api;

namespace kvtier::c_api {
namespace {

/// The place counts from 1, so that no sequence is called 0.
kvtier_sequence name_of(std::size_t index, std::uint32_t number) {
  return std::uint64_t{number} << 32 | (index + 1);
}

Status check_layer(const kvtier_runtime& runtime, std::uint32_t layer) {
  if (layer < runtime.options.layers) return {};
  return invalid_argument(
      fmt::format("layer is {}, the runtime has {}", layer, runtime.options.layers));
}

}  // namespace

Status check_memory(int memory, const void* stream, const char* name) {
  if (memory != KVTIER_MEMORY_HOST && memory != KVTIER_MEMORY_DEVICE) {
    return invalid_argument(fmt::format("{}.memory is {}, expected 0 or 1", name, memory));
  }
  if (memory == KVTIER_MEMORY_HOST && stream == nullptr) return {};
  return unsupported(fmt::format(
      "{} is in device memory or has a stream: this library has no CUDA runtime; pass host memory "
      "and no stream",
      name));
}

// A sequence's content is named by who made it and when.
Origin next_origin(kvtier_runtime& runtime) {
  return {.high = runtime.origin, .low = ++runtime.origins};
}

Result<std::size_t> free_slot(kvtier_runtime& runtime) {
  for (std::size_t i = 0; i < runtime.slots.size(); ++i) {
    if (runtime.slots[i].sequence == nullptr) return i;
  }
  if (runtime.slots.size() < runtime.options.sequences_max) {
    runtime.slots.emplace_back();
    return runtime.slots.size() - 1;
  }
  return no_space(fmt::format("{} sequences are open, as many as sequences_max allows; free one",
                              runtime.slots.size()));
}

kvtier_sequence keep_sequence(kvtier_runtime& runtime, std::size_t index,
                              std::unique_ptr<Sequence> sequence) {
  kvtier_runtime::Slot& slot = runtime.slots[index];
  slot.sequence = std::move(sequence);
  slot.number = runtime.next_number++;
  return name_of(index, slot.number);
}

Result<Sequence*> find_sequence(kvtier_runtime& runtime, kvtier_sequence sequence) {
  const std::size_t place = sequence & 0xFFFFFFFFu;
  const auto number = static_cast<std::uint32_t>(sequence >> 32);
  if (place > 0 && place <= runtime.slots.size()) {
    const kvtier_runtime::Slot& slot = runtime.slots[place - 1];
    if (slot.number == number && slot.sequence != nullptr) return slot.sequence.get();
    if (number - runtime.first_number < runtime.next_number - runtime.first_number) {
      return invalid_argument(fmt::format("sequence {:#x} was freed", sequence));
    }
  }
  return invalid_argument(fmt::format("sequence {:#x} is none of this runtime's", sequence));
}

}  // namespace kvtier::c_api

kvtier_status kvtier_rows_init(kvtier_rows* rows, size_t struct_size) {
  return guarded([&] { return init_struct(kvtier_rows{}, "rows", rows, struct_size); });
}

kvtier_status kvtier_sequence_create(kvtier_runtime* runtime, kvtier_sequence* sequence) {
  if (sequence != nullptr) *sequence = 0;
  return with_runtime(runtime, true, [&](kvtier_runtime& inner) -> Status {
    if (sequence == nullptr) return invalid_argument("sequence is NULL");
    KVTIER_ASSIGN_OR_RETURN(const std::size_t index, free_slot(inner));
    KVTIER_ASSIGN_OR_RETURN(auto created, inner.runtime->create_sequence(next_origin(inner)));
    *sequence = keep_sequence(inner, index, std::move(created));
    return {};
  });
}

kvtier_status kvtier_sequence_fork(kvtier_runtime* runtime, kvtier_sequence parent, uint32_t tokens,
                                   kvtier_sequence* sequence) {
  if (sequence != nullptr) *sequence = 0;
  return with_sequence(
      runtime, parent, true, [&](kvtier_runtime& inner, Sequence& found) -> Status {
        if (sequence == nullptr) return invalid_argument("sequence is NULL");
        KVTIER_ASSIGN_OR_RETURN(const std::size_t index, free_slot(inner));
        KVTIER_ASSIGN_OR_RETURN(auto forked, found.fork(tokens, next_origin(inner)));
        *sequence = keep_sequence(inner, index, std::move(forked));
        return {};
      });
}

kvtier_status kvtier_sequence_free(kvtier_runtime* runtime, kvtier_sequence sequence) {
  if (sequence == 0) return KVTIER_OK;
  return with_sequence(runtime, sequence, true, [&](kvtier_runtime& inner, Sequence& found) {
    const Status status = found.close();
    inner.slots[(sequence & 0xFFFFFFFFu) - 1].sequence.reset();
    return status;
  });
}

kvtier_status kvtier_sequence_tokens(kvtier_runtime* runtime, kvtier_sequence sequence,
                                     uint32_t layer, uint32_t* tokens) {
  return with_sequence(runtime, sequence, false,
                       [&](kvtier_runtime& inner, Sequence& found) -> Status {
                         if (tokens == nullptr) return invalid_argument("tokens is NULL");
                         KVTIER_RETURN_IF_ERROR(check_layer(inner, layer));
                         *tokens = found.tokens(LayerIndex{layer});
                         return {};
                       });
}

kvtier_status kvtier_append(kvtier_runtime* runtime, kvtier_sequence sequence, uint32_t layer,
                            const kvtier_rows* rows) {
  return with_sequence(
      runtime, sequence, true, [&](kvtier_runtime& inner, Sequence& found) -> Status {
        kvtier_rows given{};
        KVTIER_RETURN_IF_ERROR(read_struct(rows, "rows", given));
        KVTIER_RETURN_IF_ERROR(check_layer(inner, layer));
        KVTIER_RETURN_IF_ERROR(check_memory(raw_value(given.memory), given.stream, "rows"));
        if (given.reserved != 0) {
          return invalid_argument(fmt::format("rows.reserved is {}, expected 0", given.reserved));
        }
        if (given.tokens > 0 && (given.keys == nullptr || given.values == nullptr)) {
          return invalid_argument("rows.keys or rows.values is NULL");
        }
        return found.append(LayerIndex{layer},
                            {.keys = static_cast<const std::byte*>(given.keys),
                             .values = static_cast<const std::byte*>(given.values),
                             .key_token_stride = given.key_token_stride,
                             .key_head_stride = given.key_head_stride,
                             .value_token_stride = given.value_token_stride,
                             .value_head_stride = given.value_head_stride,
                             .tokens = given.tokens,
                             .marks = given.marks});
      });
}

kvtier_status kvtier_truncate(kvtier_runtime* runtime, kvtier_sequence sequence, uint32_t tokens) {
  return with_sequence(runtime, sequence, true,
                       [&](kvtier_runtime&, Sequence& found) { return found.truncate(tokens); });
}

kvtier_status kvtier_observe_prompt(kvtier_runtime* runtime, kvtier_sequence sequence,
                                    uint32_t layer, const float* queries, const uint32_t* positions,
                                    uint32_t count) {
  return with_sequence(
      runtime, sequence, true, [&](kvtier_runtime& inner, Sequence& found) -> Status {
        KVTIER_RETURN_IF_ERROR(check_layer(inner, layer));
        if (queries == nullptr || positions == nullptr) {
          return invalid_argument("queries or positions is NULL");
        }
        const std::size_t stride =
            std::size_t{inner.options.query_heads} * inner.options.block.head_dim;
        return found.observe_prompt(
            LayerIndex{layer},
            {.queries = queries, .query_stride = stride, .positions = {positions, count}});
      });
}
