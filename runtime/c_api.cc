// The C ABI: the library, and opening and closing a runtime.

#include "runtime/c_api_state.h"
#include "runtime/engine_device.h"
#include "transfer/open_file.h"

#include <cmath>
#include <limits>
#include <random>
#include <string_view>

using namespace kvtier;
using namespace kvtier::c_api;

namespace kvtier::c_api {
namespace {

/// Memory that is there already: a message about memory that is lacking must not need any.
thread_local char last_error[2048];
/// More events than this fill memory before a person has looked at them.
constexpr std::uint32_t kTimelineEventsMax = 1u << 24;

kvtier_status code_of(StatusCode code) {
  switch (code) {
    case StatusCode::kOk: return KVTIER_OK;
    case StatusCode::kNotFound: return KVTIER_NOT_FOUND;
    case StatusCode::kNoSpace: return KVTIER_NO_SPACE;
    case StatusCode::kBusy: return KVTIER_BUSY;
    case StatusCode::kCancelled: return KVTIER_CANCELLED;
    case StatusCode::kIoError: return KVTIER_IO_ERROR;
    case StatusCode::kCorrupt: return KVTIER_CORRUPT;
    case StatusCode::kUnsupported: return KVTIER_UNSUPPORTED;
    case StatusCode::kInvalidArgument: return KVTIER_INVALID_ARGUMENT;
  }
  return KVTIER_INTERNAL;
}

kvtier_options default_options() {
  const RuntimeOptions runtime;
  kvtier_options options{};
  options.struct_size = sizeof(options);
  options.dtype = KVTIER_F16;
  options.layers = 1;
  options.tokens_per_block = runtime.block.tokens_per_block;
  options.kv_heads_per_block = runtime.block.kv_heads_per_block;
  options.extent_bytes = runtime.block.extent_bytes;
  options.reduction = KVTIER_REDUCE_SUM;
  options.sinks = runtime.sinks;
  options.window = runtime.window;
  options.rest = KVTIER_REST_MEASURED;
  options.verify = KVTIER_VERIFY_ARRIVALS;
  options.sequences_max = 1;
  return options;
}

/// One of the values of a C enum, which may hold anything.
template <typename Target>
Status pick(int given, const char* name, std::initializer_list<Target> values, Target& target) {
  if (given < 0 || static_cast<std::size_t>(given) >= values.size()) {
    return invalid_argument(
        fmt::format("{} is {}, expected 0 to {}", name, given, values.size() - 1));
  }
  target = values.begin()[given];
  return {};
}

Status translate_model(const kvtier_options& given, RuntimeOptions& options) {
  KVTIER_RETURN_IF_ERROR(pick(raw_value(given.dtype), "dtype",
                              {DType::kF16, DType::kBF16, DType::kF32}, options.block.dtype));
  if (given.kv_heads == 0 || given.query_heads == 0 || given.query_heads % given.kv_heads != 0) {
    return invalid_argument(
        fmt::format("query_heads is {} and kv_heads is {}; expected a positive multiple",
                    given.query_heads, given.kv_heads));
  }
  if (given.head_dim == 0) return invalid_argument("head_dim is 0, expected at least 1");
  options.block.head_dim = given.head_dim;
  options.block.value_dim = given.value_dim == 0 ? given.head_dim : given.value_dim;
  options.block.kv_heads = given.kv_heads;
  options.block.kv_heads_per_block = given.kv_heads_per_block;
  options.block.tokens_per_block = given.tokens_per_block;
  options.block.extent_bytes = given.extent_bytes;
  options.layers = given.layers;
  options.query_heads = given.query_heads;
  options.softmax.scale = given.softmax_scale != 0.0f
                              ? given.softmax_scale
                              : 1.0f / std::sqrt(static_cast<float>(given.head_dim));
  options.softmax.logit_cap = given.logit_cap;
  options.rope = {.theta = given.rope_theta, .rotated_dims = given.rope_dims};
  if (!std::isfinite(options.softmax.scale) || !std::isfinite(given.logit_cap) ||
      !std::isfinite(given.rope_theta)) {
    return invalid_argument("softmax_scale, logit_cap and rope_theta must be finite");
  }
  if (given.sink_logits != nullptr) {
    const std::size_t count = std::size_t{given.layers} * given.query_heads;
    options.sink_logits.assign(given.sink_logits, given.sink_logits + count);
  }
  return {};
}

Status translate(const kvtier_options& given, RuntimeOptions& options) {
  KVTIER_RETURN_IF_ERROR(translate_model(given, options));
  if (given.selector != nullptr) {
    KVTIER_ASSIGN_OR_RETURN(options.selector, make_selector_factory(given.selector));
  }
  KVTIER_RETURN_IF_ERROR(pick(raw_value(given.reduction), "reduction",
                              {GroupReduction::kMax, GroupReduction::kSum, GroupReduction::kMean},
                              options.reduction));
  KVTIER_RETURN_IF_ERROR(
      pick(raw_value(given.rest), "rest",
           {EstimateRest::kMeasured, EstimateRest::kAlways, EstimateRest::kNever},
           options.estimate_rest));
  KVTIER_RETURN_IF_ERROR(pick(raw_value(given.verify), "verify",
                              {VerifyMode::kArrivals, VerifyMode::kAll}, options.verify));
  if (given.eviction != nullptr) options.eviction = given.eviction;
  options.sinks = given.sinks;
  options.window = given.window;
  options.look_ahead_bytes = given.look_ahead_bytes;
  options.deterministic = given.deterministic != 0;
  options.seed = given.seed;
  if (given.measure_interval != 0) options.measure_interval_max = given.measure_interval;
  options.tokens_max = given.tokens_max;
  options.sequences_max = given.sequences_max;
  options.device_capacity_bytes = given.device_capacity_bytes;
  options.host_capacity_bytes = given.host_capacity_bytes;
  options.disk_capacity_bytes =
      given.disk_capacity_bytes / BlockLayout::kPageBytes * BlockLayout::kPageBytes;
  return {};
}

Status check_allocator(const kvtier_allocator* allocator, const char* name) {
  if (allocator == nullptr || (allocator->allocate != nullptr && allocator->release != nullptr)) {
    return {};
  }
  return invalid_argument(fmt::format("{}: both functions are needed", name));
}

Status open(const kvtier_options& given, kvtier_runtime& target) {
  KVTIER_RETURN_IF_ERROR(translate(given, target.options));
  target.logger = given.logger;
  target.logger_context = given.logger_context;
  KVTIER_RETURN_IF_ERROR(check_allocator(given.device_allocator, "device_allocator"));
  KVTIER_RETURN_IF_ERROR(check_allocator(given.host_allocator, "host_allocator"));
  if (given.threads > 4096) {
    return invalid_argument(fmt::format("threads is {}, expected at most 4096", given.threads));
  }
  RuntimeOptions& options = target.options;
  std::random_device random;
  target.origin = std::uint64_t{random()} << 32 | random();
  target.first_number = target.next_number = random();
  if (given.timeline_events > kTimelineEventsMax) {
    return invalid_argument(fmt::format("timeline_events is {}, expected at most {}",
                                        given.timeline_events, kTimelineEventsMax));
  }
  if (given.timeline_events > 0) {
    target.timeline = std::make_unique<Timeline>(given.timeline_events);
  }
  target.device =
      std::make_unique<EngineDevice>(given.threads, given.device_allocator, given.host_allocator);
  target.link = make_memory_link();
  if (options.disk_capacity_bytes > 0) {
    if (given.disk_path == nullptr) {
      return invalid_argument("disk_path is NULL although disk_capacity_bytes is not 0");
    }
    // A wrong option should not cost a reservation on disk first.
    KVTIER_RETURN_IF_ERROR(Runtime::needs(options).status());
    KVTIER_ASSIGN_OR_RETURN(target.disk, open_file({.directory = given.disk_path,
                                                    .bytes = options.disk_capacity_bytes}));
    target.log(target.disk->traits().reason);
  }
  KVTIER_ASSIGN_OR_RETURN(target.runtime,
                          Runtime::open(options, {.clock = &target.clock,
                                                  .device = target.device.get(),
                                                  .link = target.link.get(),
                                                  .disk = target.disk.get(),
                                                  .timeline = target.timeline.get()}));
  target.log(target.runtime->stats().slab.note);
  target.log(target.runtime->stats().frames.note);
  return {};
}

Status close(kvtier_runtime& runtime) {
  Status first;
  const auto keep = [&first](const Status& status) {
    if (first.ok()) first = status;
  };
  for (kvtier_runtime::Slot& slot : runtime.slots) {
    if (slot.sequence == nullptr) continue;
    keep(slot.sequence->close());
    slot.sequence.reset();
  }
  keep(close_store(runtime));
  if (runtime.runtime != nullptr) keep(runtime.runtime->close());
  runtime.runtime.reset();
  if (runtime.disk != nullptr) keep(runtime.disk->close());
  runtime.disk.reset();
  return first;
}

}  // namespace

kvtier_status report(kvtier_status code, const char* message) noexcept {
  const std::size_t size = std::min(std::strlen(message), sizeof last_error - 1);
  std::memcpy(last_error, message, size);
  last_error[size] = '\0';
  return code;
}

kvtier_status report(const Status& status) noexcept {
  const kvtier_status code = code_of(status.code());
  return status.ok() ? code : report(code, status.message().c_str());
}

}  // namespace kvtier::c_api

kvtier_runtime::kvtier_runtime() = default;
kvtier_runtime::~kvtier_runtime() = default;

void kvtier_runtime::log(const std::string& message) const {
  if (logger != nullptr && !message.empty()) logger(logger_context, message.c_str());
}

uint32_t kvtier_version(void) {
  return 10000 * KVTIER_VERSION_MAJOR + 100 * KVTIER_VERSION_MINOR + KVTIER_VERSION_PATCH;
}

const char* kvtier_version_string(void) { return KVTIER_VERSION; }

int kvtier_has_feature(const char* name) {
  if (name == nullptr) return 0;
  for (const std::string_view known :
       {"cpu", "disk", "exact-attention", "fork", "resolve", "prefix-store"}) {
    if (name == known) return 1;
  }
  return 0;
}

size_t kvtier_struct_size(const char* name) {
  struct Known {
    std::string_view name;
    std::size_t size;
  };
  constexpr Known kKnown[] = {{"kvtier_allocator", sizeof(kvtier_allocator)},
                              {"kvtier_options", sizeof(kvtier_options)},
                              {"kvtier_needs", sizeof(kvtier_needs)},
                              {"kvtier_rows", sizeof(kvtier_rows)},
                              {"kvtier_query", sizeof(kvtier_query)},
                              {"kvtier_report", sizeof(kvtier_report)},
                              {"kvtier_range", sizeof(kvtier_range)},
                              {"kvtier_slots", sizeof(kvtier_slots)},
                              {"kvtier_tier_stats", sizeof(kvtier_tier_stats)},
                              {"kvtier_stats", sizeof(kvtier_stats)},
                              {"kvtier_sequence_stats", sizeof(kvtier_sequence_stats)},
                              {"kvtier_store_options", sizeof(kvtier_store_options)},
                              {"kvtier_store_stats", sizeof(kvtier_store_stats)}};
  for (const Known& known : kKnown) {
    if (name != nullptr && known.name == name) return known.size;
  }
  return 0;
}

const char* kvtier_status_name(kvtier_status status) {
  constexpr const char* kNames[] = {
      "ok",      "not_found",   "no_space",         "busy",    "cancelled", "io_error",
      "corrupt", "unsupported", "invalid_argument", "internal"};
  const auto index = static_cast<unsigned>(raw_value(status));
  return index < std::size(kNames) ? kNames[index] : "unknown";
}

const char* kvtier_last_error(void) { return last_error; }

kvtier_status kvtier_options_init(kvtier_options* options, size_t struct_size) {
  return guarded([&] { return init_struct(default_options(), "options", options, struct_size); });
}

kvtier_status kvtier_runtime_needs(const kvtier_options* options, kvtier_needs* needs) {
  return guarded([&]() -> Status {
    kvtier_options given = default_options();
    KVTIER_RETURN_IF_ERROR(read_struct(options, "options", given));
    RuntimeOptions translated;
    KVTIER_RETURN_IF_ERROR(translate(given, translated));
    KVTIER_ASSIGN_OR_RETURN(const RuntimeNeeds found, Runtime::needs(translated));
    KVTIER_ASSIGN_OR_RETURN(const BlockLayout layout, BlockLayout::make(translated.block));
    const std::uint64_t blocks =
        (std::uint64_t{translated.tokens_max} + layout.tokens_per_block() - 1) /
        layout.tokens_per_block() * layout.head_groups() * translated.layers *
        translated.sequences_max;
    kvtier_needs answer{};
    answer.device_bytes = found.device_bytes;
    answer.host_bytes = found.host_bytes;
    answer.host_reserve_bytes = found.host_reserve_bytes;
    answer.extent_bytes_total = found.extent_bytes_total;
    answer.device_bytes_all =
        std::max<std::uint64_t>(found.device_bytes, blocks * layout.block_bytes());
    return write_struct(answer, "needs", needs);
  });
}

kvtier_status kvtier_runtime_open(const kvtier_options* options, kvtier_runtime** runtime) {
  if (runtime != nullptr) *runtime = nullptr;
  return guarded([&]() -> Status {
    if (runtime == nullptr) return invalid_argument("runtime is NULL");
    kvtier_options given = default_options();
    KVTIER_RETURN_IF_ERROR(read_struct(options, "options", given));
    auto opened = std::make_unique<kvtier_runtime>();
    Status status;
    try {
      status = open(given, *opened);
    } catch (...) {
      // Memory has run out: what was opened so far wants to be closed all the same.
      static_cast<void>(close(*opened).ok());
      throw;
    }
    if (!status.ok()) {
      // The first failure is what the caller should hear.
      static_cast<void>(close(*opened).ok());
      return status;
    }
    *runtime = opened.release();
    return {};
  });
}

kvtier_status kvtier_runtime_close(kvtier_runtime* runtime) {
  if (runtime == nullptr) return KVTIER_OK;
  return guarded([&]() -> Status {
    {
      Turn turn(*runtime);
      KVTIER_RETURN_IF_ERROR(turn.status());
    }
    // What a call left half done can be neither ended nor freed safely: it stays where it is.
    if (runtime->broken) {
      throw std::runtime_error("an earlier call failed inside the library; its memory is lost");
    }
    const std::unique_ptr<kvtier_runtime> owned(runtime);
    return close(*owned);
  });
}
