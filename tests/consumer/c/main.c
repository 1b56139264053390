/* The least that a C program does with an installed kvtier: one sequence, one step. */
#include <kvtier.h>
#include <stdio.h>

enum { HEAD_DIM = 32 };

static int failed(const char* what) {
  fprintf(stderr, "%s: %s\n", what, kvtier_last_error());
  return 1;
}

int main(void) {
  kvtier_options options;
  if (KVTIER_OPTIONS_INIT(&options) != KVTIER_OK) return failed("init");
  options.dtype = KVTIER_F32;
  options.query_heads = options.kv_heads = 1;
  options.head_dim = HEAD_DIM;
  options.tokens_max = 256;
  options.threads = 1;
  kvtier_needs needs;
  needs.struct_size = sizeof(needs);
  if (kvtier_runtime_needs(&options, &needs) != KVTIER_OK) return failed("needs");
  options.device_capacity_bytes = needs.device_bytes;
  options.host_capacity_bytes = needs.host_bytes + needs.extent_bytes_total;
  kvtier_runtime* runtime = NULL;
  if (kvtier_runtime_open(&options, &runtime) != KVTIER_OK) return failed("open");
  kvtier_sequence sequence = 0;
  if (kvtier_sequence_create(runtime, &sequence) != KVTIER_OK) return failed("create");
  float row[HEAD_DIM];
  for (int i = 0; i < HEAD_DIM; ++i) row[i] = (float)i;
  kvtier_rows rows;
  KVTIER_ROWS_INIT(&rows);
  rows.keys = rows.values = row;
  rows.key_token_stride = rows.value_token_stride = sizeof(row);
  rows.key_head_stride = rows.value_head_stride = sizeof(row);
  rows.tokens = 1;
  if (kvtier_append(runtime, sequence, 0, &rows) != KVTIER_OK) return failed("append");
  float out[HEAD_DIM];
  kvtier_query query;
  KVTIER_QUERY_INIT(&query);
  query.queries = row;
  query.out = out;
  query.budget_tokens = 128;
  if (kvtier_step(runtime, sequence, &query, NULL) != KVTIER_OK) return failed("step");
  /* Attention over one token is that token's value. */
  for (int i = 0; i < HEAD_DIM; ++i) {
    if (out[i] != row[i]) {
      fprintf(stderr, "out[%d] is %g\n", i, (double)out[i]);
      return 1;
    }
  }
  if (kvtier_runtime_close(runtime) != KVTIER_OK) return failed("close");
  printf("kvtier %s\n", kvtier_version_string());
  return 0;
}
