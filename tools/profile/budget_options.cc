#include "tools/profile/budget_options.h"

#include "selectors/registry.h"
#include "tools/cli/options.h"
#include "tools/profile/reuse_curve.h"

#include <fmt/format.h>

#include <limits>
#include <utility>

namespace kvtier {

namespace {

constexpr std::uint64_t kTokensMax = std::uint64_t{1} << 32;

Result<std::uint64_t> parse_tokens_asked(std::string_view text) {
  const auto count = parse_count(text);
  if (count.ok() && *count > 0 && *count <= kTokensMax) return *count;
  return invalid_argument(
      fmt::format("found '{}', expected a whole number from 1 to {}", text, kTokensMax));
}

Result<std::optional<std::uint64_t>> parse_day(std::string_view text) {
  KVTIER_ASSIGN_OR_RETURN(const std::uint64_t count, parse_count(text));
  return std::optional(count);
}

Result<std::optional<std::uint64_t>> parse_size_given(std::string_view text) {
  KVTIER_ASSIGN_OR_RETURN(const std::uint64_t bytes, parse_bytes(text));
  return std::optional(bytes);
}

Result<std::optional<double>> parse_positive_number(std::string_view text) {
  const auto number = parse_number(text);
  if (number.ok() && *number > 0) return std::optional(*number);
  return invalid_argument(fmt::format("found '{}', expected a number above 0", text));
}

Result<std::uint32_t> parse_up_to(std::string_view text, std::uint32_t most) {
  const auto count = parse_count(text);
  if (count.ok() && *count > 0 && *count <= most) return static_cast<std::uint32_t>(*count);
  return invalid_argument(
      fmt::format("found '{}', expected a whole number from 1 to {}", text, most));
}

Result<double> parse_fraction(std::string_view text) {
  KVTIER_ASSIGN_OR_RETURN(const Share share, Share::parse(text));
  if (share.fraction() <= 1) return share.fraction();
  return invalid_argument(fmt::format("found '{}', expected at most 100%", text));
}

Result<std::string> parse_selector_name(std::string_view text) {
  const auto factory = make_selector_factory(text);
  if (!factory.ok()) return factory.status();
  return std::string(text);
}

Result<Share> parse_reserve(std::string_view text) {
  KVTIER_ASSIGN_OR_RETURN(const Share share, Share::parse(text));
  if (share.fraction() < 1) return share;
  return invalid_argument(fmt::format("found '{}', expected less than 100%", text));
}

void bind_question(CLI::App& verb, BudgetOptions& options) {
  verb.add_option("--model", options.model_path, "config.json of a Hugging Face checkpoint")
      ->required()
      ->type_name("");
  verb.add_option("--read-as", options.read_as, "Read it as another family (model_type)")
      ->type_name("");
  add_value(verb, "--context", options.context_tokens, parse_tokens_asked, "Tokens per sequence",
            "131072");
  add_value(verb, "--sequences", options.sequences, parse_tokens_asked, "Decoded at one time", "1");
  add_value(verb, "--target-ms", options.target_ms, parse_positive_number,
            "Most ms per token and sequence; exit code 4 when it is missed", "");
  add_value(verb, "--prefix", options.prefix_tokens, parse_tokens_asked,
            "Prefix that is loaded or recomputed", "the context");
  add_value(verb, "--tokens-per-day", options.tokens_per_day, parse_day,
            "New tokens a day, for disk wear", "decoding without a break");
}

void bind_serving(CLI::App& verb, BudgetOptions& options) {
  add_value(verb, "--selector", options.selector, parse_selector_name,
            "As listed by `kvtier selectors`", std::string(kDefaultSelector));
  add_value(verb, "--budget", options.budget, Budget::parse,
            "Tokens attended: a count, or a share of the context", "2%");
  add_value(
      verb, "--block-tokens", options.block_tokens,
      [](std::string_view text) { return parse_up_to(text, 64); }, "Tokens of a block", "8");
  add_value(verb, "--extent-bytes", options.extent_bytes, parse_bytes, "What the disk reads",
            "128KiB");
  add_value(verb, "--kv-dtype", options.kv_type, KvType::parse, "fp32, bf16, fp16, fp8, int8, int4",
            "bf16");
  add_value(
      verb, "--tensor-parallel", options.gpus,
      [](std::string_view text) { return parse_up_to(text, 1024); },
      "GPUs that share the model by heads", "1");
  add_value(verb, "--weight-bytes", options.weight_bytes, parse_size_given, "Size of the weights",
            "estimated");
}

void bind_hardware(CLI::App& verb, BudgetOptions& options) {
  verb.add_option("--machine", options.machine_path, "Profile by `kvtier profile machine`")
      ->type_name("");
  add_value(verb, "--device-memory", options.device_memory, parse_size_given, "Of each GPU",
            "the profile's");
  add_value(verb, "--host-memory", options.host_memory, parse_size_given, "", "the profile's");
  add_value(verb, "--disk-space", options.disk_space, parse_size_given, "", "the profile's");
  add_value(verb, "--reserve", options.reserve, parse_reserve,
            "Of device and host memory, for everything else", "10%");
  add_value(verb, "--reuse", options.reuse, parse_fraction,
            "What a step finds of its choice in a cache of its size", "68%");
  verb.add_option("--trace", options.trace_path, "Attention trace to measure reuse on instead")
      ->type_name("");
  add_value(verb, "--gemm-flops", options.gemm_flops, parse_positive_number,
            "Operations per second of prefill, such as 4e14", "the profile's");
}

std::string plain_bytes(std::uint64_t bytes) {
  constexpr std::uint64_t kGiB = std::uint64_t{1} << 30;
  return bytes % kGiB == 0 && bytes > 0 ? fmt::format("{}GiB", bytes / kGiB)
                                        : fmt::format("{}", bytes);
}

}  // namespace

Result<KvType> KvType::parse(std::string_view text) {
  for (const auto& [name, bytes] :
       {std::pair{"fp32", 4.0}, std::pair{"bf16", 2.0}, std::pair{"fp16", 2.0},
        std::pair{"fp8", 1.0}, std::pair{"int8", 1.0}, std::pair{"int4", 0.5}}) {
    if (text == name) return KvType{name, bytes};
  }
  return invalid_argument(
      fmt::format("found '{}', expected fp32, bf16, fp16, fp8, int8 or int4", text));
}

BudgetOptions::BudgetOptions()
    : selector(kDefaultSelector),
      budget(Budget::parse("2%").value()),
      reserve(Share::parse("10%").value()),
      reuse(kStandardReuse) {}

void bind_budget_options(CLI::App& verb, BudgetOptions& options) {
  bind_question(verb, options);
  bind_serving(verb, options);
  bind_hardware(verb, options);
  verb.add_option("--format", options.format, "table or json (default: table)")
      ->check(CLI::IsMember({"table", "json"}))
      ->type_name("");
  verb.add_option("--output", options.output_path, "File for the result (default: stdout)")
      ->type_name("");
}

Status check_budget_options(const BudgetOptions& options) {
  if (options.target_ms && options.machine_path.empty()) {
    return invalid_argument(
        "--target-ms: found no --machine, expected a profile to compute times from (`kvtier "
        "profile "
        "machine --output machine.json`, or one of tools/profiles)");
  }
  if (options.context_tokens >
      (std::numeric_limits<std::uint64_t>::max() >> 20) / options.sequences) {
    return invalid_argument("--sequences: more tokens in all than can be counted");
  }
  if (options.prefix_tokens > options.context_tokens) {
    return invalid_argument(fmt::format("--prefix: found {}, expected at most the context of {}",
                                        options.prefix_tokens, options.context_tokens));
  }
  return {};
}

std::string shell_word(const std::string& word) {
  if (word.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
                             "._-+=:,%/@") == std::string::npos &&
      !word.empty()) {
    return word;
  }
  std::string text = "'";
  for (const char c : word) text += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return text + "'";
}

std::string budget_command(const BudgetOptions& options) {
  const BudgetOptions defaults;
  std::string text = "kvtier profile budget --model " + shell_word(options.model_path);
  const auto add = [&text](const char* name, const std::string& value) {
    text += fmt::format(" {} {}", name, shell_word(value));
  };
  if (!options.read_as.empty()) add("--read-as", options.read_as);
  add("--context", fmt::format("{}", options.context_tokens));
  add("--sequences", fmt::format("{}", options.sequences));
  if (options.prefix_tokens > 0) add("--prefix", fmt::format("{}", options.prefix_tokens));
  if (options.tokens_per_day) add("--tokens-per-day", fmt::format("{}", *options.tokens_per_day));
  if (options.selector != defaults.selector) add("--selector", options.selector);
  if (options.budget.text() != defaults.budget.text()) add("--budget", options.budget.text());
  if (options.block_tokens != defaults.block_tokens) {
    add("--block-tokens", fmt::format("{}", options.block_tokens));
  }
  if (options.extent_bytes != defaults.extent_bytes) {
    add("--extent-bytes", fmt::format("{}", options.extent_bytes));
  }
  if (options.kv_type.name != defaults.kv_type.name) add("--kv-dtype", options.kv_type.name);
  if (options.gpus != 1) add("--tensor-parallel", fmt::format("{}", options.gpus));
  if (options.weight_bytes) add("--weight-bytes", plain_bytes(*options.weight_bytes));
  if (!options.machine_path.empty()) add("--machine", options.machine_path);
  if (options.device_memory) add("--device-memory", plain_bytes(*options.device_memory));
  if (options.host_memory) add("--host-memory", plain_bytes(*options.host_memory));
  if (options.disk_space) add("--disk-space", plain_bytes(*options.disk_space));
  if (options.reserve.fraction() != defaults.reserve.fraction()) {
    add("--reserve", fmt::format("{:g}%", 100 * options.reserve.fraction()));
  }
  if (options.reuse != defaults.reuse) add("--reuse", fmt::format("{:g}%", 100 * options.reuse));
  if (!options.trace_path.empty()) add("--trace", options.trace_path);
  if (options.gemm_flops) add("--gemm-flops", fmt::format("{:g}", *options.gemm_flops));
  if (options.target_ms) add("--target-ms", fmt::format("{:g}", *options.target_ms));
  return text;
}

}  // namespace kvtier
