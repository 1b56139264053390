// kvtier bench: how fast one part runs, against what the machine gives.

#include "selectors/registry.h"
#include "tools/bench_attention.h"
#include "tools/bench_disk.h"
#include "tools/bench_prefill.h"
#include "tools/bench_select.h"
#ifdef KVTIER_CUDA
#include "tools/bench_gpu.h"
#include "tools/bench_step.h"
#endif
#include "tools/cli/options.h"
#include "tools/cli/verbs.h"

#include <CLI/CLI.hpp>

#include <limits>
#include <memory>

namespace kvtier {
namespace {

Result<unsigned> parse_positive(std::string_view text) {
  const Result<std::uint64_t> count = parse_count(text);
  if (count.ok() && *count > 0 && *count <= std::numeric_limits<unsigned>::max()) {
    return static_cast<unsigned>(*count);
  }
  return invalid_argument(fmt::format("found '{}', expected a whole number from 1", text));
}

Result<std::size_t> parse_size(std::string_view text) { return parse_bytes(text); }

void add_attention(CLI::App& bench, ExitCode& exit_code) {
  auto options = std::make_shared<BenchAttentionOptions>();
  CLI::App* verb = bench.add_subcommand(
      "attention", "Partial attention over resident blocks, as a share of the read bandwidth");
  verb->add_option("--format", options->format, "table or json (default: table)")
      ->check(CLI::IsMember({"table", "json"}))
      ->type_name("");
  add_values(*verb, "--threads", options->threads, parse_positive, "Thread counts, one run each",
             "1,2");
  add_value(*verb, "--repetitions", options->repetitions, parse_positive,
            "Interleaved repetitions; figures are their median", "7");
  add_value(*verb, "--region-bytes", options->region_bytes, parse_size,
            "Memory that blocks lie in; larger than the last-level cache", "1GiB");
  add_value(*verb, "--bytes-per-repetition", options->bytes_per_repetition, parse_size,
            "Bytes that one repetition reads at least", "192MiB");
  verb->add_option("--python", options->python,
                   "Interpreter whose PyTorch is compared with; '' for none (default: python3)")
      ->type_name("");
  verb->footer(
      "Every result is compared with a plain reference. Figures are ratios of measurements of\n"
      "this run; exit code 4 when a result differs.\n\n"
      "Examples:\n"
      "  kvtier bench attention\n"
      "  kvtier bench attention --threads 1 --format json");
  verb->callback(
      [options, &exit_code] { exit_code = static_cast<ExitCode>(run_bench_attention(*options)); });
}

void add_prefill(CLI::App& bench, ExitCode& exit_code) {
  auto options = std::make_shared<BenchPrefillOptions>();
  CLI::App* verb = bench.add_subcommand(
      "prefill", "Exact attention of a chunk of a prompt over resident blocks, beside PyTorch");
  add_value(*verb, "--queries", options->queries, parse_positive, "Tokens of the chunk", "1024");
  add_value(*verb, "--tokens", options->tokens, parse_positive, "Tokens they see, and their own",
            "8192");
  add_values(*verb, "--threads", options->threads, parse_positive, "Thread counts, one run each",
             "1,2");
  add_value(*verb, "--repetitions", options->repetitions, parse_positive,
            "Interleaved repetitions; figures are their median", "5");
  verb->add_option("--python", options->python,
                   "Interpreter whose PyTorch is compared with; '' for none (default: python3)")
      ->type_name("");
  verb->footer(
      "The last queries' results are compared with a plain reference; exit code 4 when one "
      "differs.\n\n"
      "Examples:\n"
      "  kvtier bench prefill\n"
      "  kvtier bench prefill --queries 256 --tokens 32768 --threads 1");
  verb->callback(
      [options, &exit_code] { exit_code = static_cast<ExitCode>(run_bench_prefill(*options)); });
}

Result<std::uint32_t> parse_tokens(std::string_view text) {
  const Result<std::uint64_t> count = parse_count(text);
  if (count.ok() && *count >= 1024 && *count <= (1u << 24)) {
    return static_cast<std::uint32_t>(*count);
  }
  return invalid_argument(
      fmt::format("found '{}', expected a whole number from 1024 to {}", text, 1u << 24));
}

#ifdef KVTIER_CUDA
Result<std::uint32_t> parse_percent(std::string_view text) {
  const Result<std::uint64_t> count = parse_count(text);
  if (count.ok() && *count <= 100) return static_cast<std::uint32_t>(*count);
  return invalid_argument(fmt::format("found '{}', expected a whole number up to 100", text));
}
#endif

Result<std::string> parse_selector(std::string_view text) {
  if (text == "all") return std::string(text);
  const auto factory = make_selector_factory(text);
  if (!factory.ok()) return factory.status();
  return std::string(text);
}

void add_select(CLI::App& bench, ExitCode& exit_code) {
  auto options = std::make_shared<BenchSelectOptions>();
  CLI::App* verb = bench.add_subcommand(
      "select", "What choosing blocks costs, as a share of exact attention over all of them");
  verb->add_option("--format", options->format, "table or json (default: table)")
      ->check(CLI::IsMember({"table", "json"}))
      ->type_name("");
  add_values(*verb, "--selector", options->selectors, parse_selector,
             "Selectors, as listed by `kvtier selectors`, or all", "all");
  add_values(*verb, "--tokens", options->tokens, parse_tokens, "Lengths of the context", "131072");
  add_value(*verb, "--budget-tokens", options->budget_tokens, parse_positive,
            "Tokens chosen per KV head, sinks and window included, whatever the context",
            "2 % of the context");
  add_value(*verb, "--threads", options->threads, parse_positive, "Threads", "2");
  add_value(*verb, "--steps", options->steps, parse_positive, "Steps measured", "7");
  verb->footer(
      "Examples:\n"
      "  kvtier bench select\n"
      "  kvtier bench select --selector chunk-tree,mean --tokens 8192,131072");
  verb->callback(
      [options, &exit_code] { exit_code = static_cast<ExitCode>(run_bench_select(*options)); });
}

Result<std::size_t> parse_io_size(std::string_view text) {
  const Result<std::uint64_t> bytes = parse_bytes(text);
  if (bytes.ok() && *bytes >= 4096 && *bytes <= (16 << 20)) return *bytes;
  return invalid_argument(fmt::format("found '{}', expected bytes from 4KiB to 16MiB", text));
}

Result<std::uint32_t> parse_depth(std::string_view text) {
  const Result<std::uint64_t> depth = parse_count(text);
  if (depth.ok() && *depth > 0 && *depth <= 1024) return static_cast<std::uint32_t>(*depth);
  return invalid_argument(fmt::format("found '{}', expected a whole number from 1 to 1024", text));
}

Result<double> parse_seconds(std::string_view text) {
  const Result<double> seconds = parse_number(text);
  if (seconds.ok() && *seconds >= 0.01 && *seconds <= 3600) return *seconds;
  return invalid_argument(fmt::format("found '{}', expected seconds from 0.01 to 3600", text));
}

Result<FileBackend> parse_backend(std::string_view text) {
  if (text == "auto") return FileBackend::kAuto;
  if (text == "io_uring") return FileBackend::kIoUring;
  if (text == "posix") return FileBackend::kPosix;
  return invalid_argument(fmt::format("found '{}', expected auto, io_uring or posix", text));
}

void add_disk(CLI::App& bench, ExitCode& exit_code) {
  auto options = std::make_shared<BenchDiskOptions>();
  CLI::App* verb = bench.add_subcommand(
      "disk", "Verified reads and writes of a directory's disk, in turns with fio");
  verb->add_option("PATH", options->directory, "Directory that a nameless scratch file is made in")
      ->required()
      ->type_name("");
  verb->add_option("--format", options->format, "table or json (default: table)")
      ->check(CLI::IsMember({"table", "json"}))
      ->type_name("");
  add_values(*verb, "--operations", options->patterns, parse_disk_pattern,
             "random_read, sequential_read, random_write, sequential_write",
             "random_read,sequential_write");
  add_values(*verb, "--sizes", options->io_bytes, parse_io_size, "Bytes of one operation",
             "64KiB,256KiB,1MiB");
  add_values(*verb, "--depths", options->depths, parse_depth, "Operations in flight", "1,16,64");
  add_value(*verb, "--backend", options->backend, parse_backend, "auto, io_uring or posix", "auto");
  add_value(*verb, "--file-bytes", options->file_bytes, parse_bytes, "Size of the scratch file",
            "2GiB");
  add_value(*verb, "--seconds", options->seconds, parse_seconds, "Length of one measurement", "1");
  add_value(*verb, "--repetitions", options->repetitions, parse_positive,
            "Measurements of each; figures are their median", "5");
  verb->add_option("--fio", options->fio, "Program to compare with; '' for none (default: fio)")
      ->type_name("");
  verb->footer(
      "The file has no name and is gone when the program ends, however it ends. Exit code 4 when\n"
      "a page was not what was written.\n\n"
      "Examples:\n"
      "  kvtier bench disk /tmp\n"
      "  kvtier bench disk . --operations random_read --sizes 64KiB --depths 1,64");
  verb->callback(
      [options, &exit_code] { exit_code = static_cast<ExitCode>(run_bench_disk(*options)); });
}

#ifdef KVTIER_CUDA
void add_gpu_bench(CLI::App& bench, const char* name, const char* what, const char* region_help,
                   int (*run)(const GpuBenchOptions&), ExitCode& exit_code) {
  auto options = std::make_shared<GpuBenchOptions>();
  CLI::App* verb = bench.add_subcommand(name, what);
  verb->add_option("--format", options->format, "table or json (default: table)")
      ->check(CLI::IsMember({"table", "json"}))
      ->type_name("");
  add_value(*verb, "--repetitions", options->repetitions, parse_positive,
            "Interleaved repetitions; figures are their median", "9");
  add_value(*verb, "--region-bytes", options->region_bytes, parse_size, region_help, "16GiB");
  verb->add_option("--python", options->python,
                   "Interpreter whose PyTorch is compared with; '' for none (default: python3)")
      ->type_name("");
  verb->footer(fmt::format(
      "Blocks and results are verified in the run; exit code 4 when one is wrong, 5 without a "
      "GPU.\n\nExamples:\n  kvtier bench {0}\n  kvtier bench {0} --format json",
      name));
  verb->callback([options, run, &exit_code] { exit_code = static_cast<ExitCode>(run(*options)); });
}

void add_step(CLI::App& bench, ExitCode& exit_code) {
  auto options = std::make_shared<BenchStepOptions>();
  CLI::App* verb = bench.add_subcommand(
      "step", "One layer's decode step on the GPU, keys and values in page-locked memory");
  verb->add_option("--format", options->format, "table or json (default: table)")
      ->check(CLI::IsMember({"table", "json"}))
      ->type_name("");
  add_values(*verb, "--tokens", options->contexts, parse_tokens, "Lengths of the context",
             "32768,131072,524288,1048576");
  add_values(*verb, "--budget", options->budgets, parse_positive,
             "Tokens that a KV head attends, sinks and window included", "640,2048");
  add_values(*verb, "--block", options->blocks, parse_positive, "Tokens per block: 1, 4 or 8", "8");
  add_values(*verb, "--hits", options->hits, parse_percent,
             "Percent of the choice that is on the GPU before the step", "95,80,0");
  add_value(*verb, "--batch", options->batch, parse_positive, "Sequences of one step", "1");
  add_value(*verb, "--repetitions", options->repetitions, parse_positive,
            "Interleaved repetitions; figures are their median", "15");
  verb->add_option("--python", options->python,
                   "Interpreter whose PyTorch is compared with; '' for none (default: python3)")
      ->type_name("");
  verb->footer(
      "Results are verified in the run; exit code 4 when one is wrong, 5 without a GPU.\n\n"
      "Examples:\n"
      "  kvtier bench step\n"
      "  kvtier bench step --tokens 131072 --block 1,4,8 --hits 95 --format json");
  verb->callback(
      [options, &exit_code] { exit_code = static_cast<ExitCode>(run_bench_step(*options)); });
}
#endif

}  // namespace

void add_bench(CLI::App& app, ExitCode& exit_code) {
  CLI::App* verb = app.add_subcommand("bench", "Measure how fast one part runs");
  verb->require_subcommand(1);
  verb->footer(
      "Examples:\n"
      "  kvtier bench attention\n"
      "  kvtier bench select --help");
  add_attention(*verb, exit_code);
  add_prefill(*verb, exit_code);
  add_select(*verb, exit_code);
  add_disk(*verb, exit_code);
#ifdef KVTIER_CUDA
  add_gpu_bench(*verb, "gather",
                "Scattered copies between page-locked memory and the GPU, both directions",
                "Page-locked memory that blocks lie in", run_bench_gather, exit_code);
  add_gpu_bench(*verb, "gpu-attention", "Attention on the GPU over resident slots",
                "GPU memory that blocks lie in", run_bench_gpu_attention, exit_code);
  add_gpu_bench(*verb, "gpu-select", "Scoring of landmarks and the choice of the best, on the GPU",
                "GPU memory that landmarks lie in", run_bench_gpu_select, exit_code);
  add_step(*verb, exit_code);
#endif
}

}  // namespace kvtier
