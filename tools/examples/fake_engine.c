/* The life of a sequence under kvtier, as an inference engine would drive it, with made-up keys and
 * queries in place of a model: prompt in chunks with exact attention, decoding with selection, a
 * draft of which a part is rejected, a fork, statistics.
 *
 * cc fake_engine.c $(pkg-config --cflags --libs kvtier) -o fake_engine && ./fake_engine [DIRECTORY]
 * With a directory, most of the context lies there on disk. */
#include <kvtier.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum {
  LAYERS = 2,
  KV_HEADS = 2,
  QUERY_HEADS = 4,
  HEAD_DIM = 64,
  PROMPT = 2000,
  CHUNK = 500,
  ANSWER = 40,
  DRAFT = 4,
  BUDGET = 256
};

static void check(kvtier_status status, const char* what) {
  if (status == KVTIER_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, kvtier_status_name(status), kvtier_last_error());
  exit(1);
}

static void log_line(void* context, const char* message) {
  (void)context;
  fprintf(stderr, "note: %s\n", message);
}

/* What a model would compute. */
static float made_up(unsigned seed) {
  seed = (seed ^ 61u) * 2654435761u;
  seed ^= seed >> 15;
  return (float)(seed % 2000u) / 1000.0f - 1.0f;
}

static void append(kvtier_runtime* runtime, kvtier_sequence sequence, unsigned layer,
                   unsigned first, unsigned tokens) {
  const size_t row = (size_t)KV_HEADS * HEAD_DIM;
  float* keys = malloc(tokens * row * sizeof(float));
  float* values = malloc(tokens * row * sizeof(float));
  if (keys == NULL || values == NULL) exit(1);
  for (unsigned i = 0; i < tokens * row; ++i) {
    keys[i] = made_up((layer << 28) + first * (unsigned)row + i);
    values[i] = made_up((layer << 28) + first * (unsigned)row + i + 1);
  }
  kvtier_rows rows;
  check(KVTIER_ROWS_INIT(&rows), "rows");
  rows.keys = keys;
  rows.values = values;
  rows.key_token_stride = rows.value_token_stride = row * sizeof(float);
  rows.key_head_stride = rows.value_head_stride = HEAD_DIM * sizeof(float);
  rows.tokens = tokens;
  check(kvtier_append(runtime, sequence, layer, &rows), "append");
  free(keys);
  free(values);
}

/* Attention of the last `tokens` tokens of every layer: exact for a prompt, selected otherwise.
 * Returns a number that stands for the model's output. */
static double attend(kvtier_runtime* runtime, kvtier_sequence sequence, unsigned tokens,
                     int exact) {
  const size_t size = (size_t)tokens * QUERY_HEADS * HEAD_DIM;
  float* queries = malloc(size * sizeof(float));
  float* out = malloc(size * sizeof(float));
  if (queries == NULL || out == NULL) exit(1);
  double sum = 0.0;
  for (unsigned layer = 0; layer < LAYERS; ++layer) {
    for (unsigned i = 0; i < size; ++i) queries[i] = 2.0f * made_up(i * 31u + layer);
    kvtier_query query;
    check(KVTIER_QUERY_INIT(&query), "query");
    query.layer = layer;
    query.query_count = tokens;
    query.queries = queries;
    query.out = out;
    query.budget_tokens = BUDGET;
    check(exact ? kvtier_attend_exact(runtime, sequence, &query, NULL)
                : kvtier_step(runtime, sequence, &query, NULL),
          exact ? "attend_exact" : "step");
    for (unsigned i = 0; i < size; ++i) sum += out[i];
  }
  free(queries);
  free(out);
  if (!isfinite(sum)) exit(1);
  return sum;
}

/* Every layer's keys of new tokens, then their attention. */
static double forward(kvtier_runtime* runtime, kvtier_sequence sequence, unsigned first,
                      unsigned tokens, int exact) {
  for (unsigned layer = 0; layer < LAYERS; ++layer) append(runtime, sequence, layer, first, tokens);
  return attend(runtime, sequence, tokens, exact);
}

int main(int argc, char** argv) {
  kvtier_options options;
  check(KVTIER_OPTIONS_INIT(&options), "options");
  options.dtype = KVTIER_F32;
  options.layers = LAYERS;
  options.query_heads = QUERY_HEADS;
  options.kv_heads = KV_HEADS;
  options.head_dim = HEAD_DIM;
  options.tokens_max = PROMPT + 2 * ANSWER;
  options.sequences_max = 2;
  options.logger = log_line;

  /* What it needs at least, and a device tier of an eighth of everything. */
  kvtier_needs needs;
  needs.struct_size = sizeof(needs);
  check(kvtier_runtime_needs(&options, &needs), "needs");
  options.device_capacity_bytes = needs.device_bytes_all / 8;
  if (options.device_capacity_bytes < needs.device_bytes) {
    options.device_capacity_bytes = needs.device_bytes;
  }
  options.host_capacity_bytes = needs.host_bytes + needs.extent_bytes_total;
  if (argc > 1) {
    options.disk_path = argv[1];
    options.disk_capacity_bytes = needs.extent_bytes_total;
    options.host_capacity_bytes = needs.host_bytes + needs.host_reserve_bytes;
    options.look_ahead_bytes = 1 << 20;
  }
  kvtier_runtime* runtime = NULL;
  check(kvtier_runtime_open(&options, &runtime), "open");

  kvtier_sequence sequence = 0;
  check(kvtier_sequence_create(runtime, &sequence), "create");
  unsigned tokens = 0;
  for (; tokens < PROMPT; tokens += CHUNK) forward(runtime, sequence, tokens, CHUNK, 1);
  for (unsigned i = 0; i < ANSWER / 2; ++i) forward(runtime, sequence, tokens++, 1, 0);

  /* A draft of four tokens is verified at once; the model takes the first two. */
  forward(runtime, sequence, tokens, DRAFT, 0);
  check(kvtier_truncate(runtime, sequence, tokens + 2), "truncate");
  tokens += 2;

  /* A second answer to the same context: what is stored is shared, and both go on. */
  kvtier_sequence other = 0;
  check(kvtier_sequence_fork(runtime, sequence, tokens, &other), "fork");
  const double one = forward(runtime, sequence, tokens, 1, 0);
  const double two = forward(runtime, other, tokens, 1, 0);
  printf("%u tokens; the two answers begin with %.6f and %.6f\n", tokens + 1, one, two);

  kvtier_stats stats;
  stats.struct_size = sizeof(stats);
  check(kvtier_get_stats(runtime, &stats), "stats");
  printf("device  %8.1f KiB of %.1f KiB in use, %llu hits\n", (double)stats.device.used_bytes / 1024,
         (double)stats.device.capacity_bytes / 1024, (unsigned long long)stats.device.hits);
  printf("host    %8.1f KiB in use, %llu hits; disk %.1f KiB, %llu hits\n",
         (double)stats.host.used_bytes / 1024, (unsigned long long)stats.host.hits,
         (double)stats.disk.used_bytes / 1024, (unsigned long long)stats.disk.hits);
  check(kvtier_sequence_free(runtime, other), "free");
  check(kvtier_sequence_free(runtime, sequence), "free");
  check(kvtier_runtime_close(runtime), "close");
  return 0;
}
