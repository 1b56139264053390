// The C ABI: prefixes that outlive the process.

#include "runtime/c_api_state.h"
#include "transfer/durability.h"

using namespace kvtier;
using namespace kvtier::c_api;

namespace {

kvtier_store_options default_store_options() {
  kvtier_store_options options{};
  options.struct_size = sizeof(options);
  options.free_bytes_min = StoreOptions().free_bytes_min;
  options.durability = KVTIER_DURABLE_CRASH;
  return options;
}

Status open_prefixes(kvtier_runtime& runtime, const kvtier_store_options& given) {
  if (runtime.store != nullptr) return busy("the runtime has a store open; close it first");
  if (given.path == nullptr || given.model == nullptr) {
    return invalid_argument("store options: path or model is NULL");
  }
  if (raw_value(given.durability) < KVTIER_DURABLE_NONE ||
      raw_value(given.durability) > KVTIER_DURABLE_POWER) {
    return invalid_argument(
        fmt::format("durability is {}, expected 0 to 3", raw_value(given.durability)));
  }
  StoreOptions options;
  options.durability = static_cast<Durability>(raw_value(given.durability));
  options.capacity_bytes = given.capacity_bytes;
  options.free_bytes_min = given.free_bytes_min;
  options.read_only = given.read_only != 0;
  options.layout_fingerprint = runtime.runtime->layout().fingerprint();
  if (given.key_file != nullptr) {
    KVTIER_ASSIGN_OR_RETURN(PageCipher cipher, PageCipher::read(given.key_file));
    runtime.cipher = std::make_unique<PageCipher>(std::move(cipher));
    options.cipher = runtime.cipher.get();
  }
  KVTIER_ASSIGN_OR_RETURN(runtime.store, open_store(given.path, options));
  runtime.log(runtime.store->notice());
  runtime.prefixes = std::make_unique<PrefixStore>(
      runtime.store.get(), runtime.runtime->layout(),
      PrefixScope{.model = given.model,
                  .tenant_salt = given.tenant_salt != nullptr ? given.tenant_salt : ""});
  return {};
}

/// Runs `body(runtime, ids)` where a store is open.
template <typename Body>
kvtier_status with_store(kvtier_runtime* runtime, const uint32_t* token_ids, uint32_t count,
                         Body&& body) {
  return with_runtime(runtime, true, [&](kvtier_runtime& inner) -> Status {
    if (inner.prefixes == nullptr) return invalid_argument("no store is open; kvtier_store_open");
    if (token_ids == nullptr && count > 0) return invalid_argument("token_ids is NULL");
    return body(inner, std::span<const std::uint32_t>(token_ids, count));
  });
}

}  // namespace

namespace kvtier::c_api {

Status close_store(kvtier_runtime& runtime) {
  runtime.prefixes.reset();
  if (runtime.store == nullptr) return {};
  const Status status = runtime.store->close();
  runtime.store.reset();
  runtime.cipher.reset();
  return status;
}

}  // namespace kvtier::c_api

kvtier_status kvtier_store_options_init(kvtier_store_options* options, size_t struct_size) {
  return guarded(
      [&] { return init_struct(default_store_options(), "store options", options, struct_size); });
}

kvtier_status kvtier_store_open(kvtier_runtime* runtime, const kvtier_store_options* options) {
  return with_runtime(runtime, true, [&](kvtier_runtime& inner) -> Status {
    kvtier_store_options given = default_store_options();
    KVTIER_RETURN_IF_ERROR(read_struct(options, "store options", given));
    return open_prefixes(inner, given);
  });
}

kvtier_status kvtier_store_close(kvtier_runtime* runtime) {
  return with_runtime(runtime, true, [&](kvtier_runtime& inner) { return close_store(inner); });
}

kvtier_status kvtier_sequence_save(kvtier_runtime* runtime, kvtier_sequence sequence,
                                   const uint32_t* token_ids, uint32_t count, double value,
                                   uint32_t* saved) {
  if (saved != nullptr) *saved = 0;
  return with_store(runtime, token_ids, count,
                    [&](kvtier_runtime& inner, std::span<const std::uint32_t> ids) -> Status {
                      KVTIER_ASSIGN_OR_RETURN(Sequence * found, find_sequence(inner, sequence));
                      KVTIER_ASSIGN_OR_RETURN(const std::uint32_t tokens,
                                              found->save(*inner.prefixes, ids, value));
                      if (saved != nullptr) *saved = tokens;
                      return {};
                    });
}

kvtier_status kvtier_sequence_restore(kvtier_runtime* runtime, const uint32_t* token_ids,
                                      uint32_t count, kvtier_sequence* sequence, uint32_t* tokens) {
  if (sequence != nullptr) *sequence = 0;
  if (tokens != nullptr) *tokens = 0;
  return with_store(runtime, token_ids, count,
                    [&](kvtier_runtime& inner, std::span<const std::uint32_t> ids) -> Status {
                      if (sequence == nullptr || tokens == nullptr) {
                        return invalid_argument("sequence or tokens is NULL");
                      }
                      KVTIER_ASSIGN_OR_RETURN(const std::size_t index, free_slot(inner));
                      KVTIER_ASSIGN_OR_RETURN(RestoredSequence restored,
                                              inner.runtime->restore_sequence(*inner.prefixes, ids,
                                                                              next_origin(inner)));
                      if (restored.damaged)
                        inner.log("a stored prefix was damaged; it ends before the damage");
                      *tokens = restored.tokens;
                      *sequence = keep_sequence(inner, index, std::move(restored.sequence));
                      return {};
                    });
}

kvtier_status kvtier_store_forget(kvtier_runtime* runtime, const uint32_t* token_ids,
                                  uint32_t count) {
  return with_store(runtime, token_ids, count,
                    [](kvtier_runtime& inner, std::span<const std::uint32_t> ids) {
                      return inner.prefixes->forget(ids);
                    });
}

kvtier_status kvtier_get_store_stats(kvtier_runtime* runtime, kvtier_store_stats* stats) {
  return with_store(runtime, nullptr, 0,
                    [&](kvtier_runtime& inner, std::span<const std::uint32_t>) {
                      const StoreStats found = inner.store->stats();
                      return write_struct({.tokens_per_run = inner.prefixes->tokens_per_run(),
                                           .items = found.items,
                                           .capacity_bytes = found.capacity_bytes,
                                           .data_bytes = found.data_bytes,
                                           .free_bytes = found.free_bytes,
                                           .written_bytes = found.written_bytes,
                                           .read_bytes = found.read_bytes,
                                           .evicted_items = found.evicted_items,
                                           .blocks_verified = found.blocks_verified,
                                           .blocks_corrupt = found.blocks_corrupt,
                                           .read_failures = found.read_failures,
                                           .write_failures = found.write_failures},
                                          "stats", stats);
                    });
}
