// kvtier fsck: reads a whole store and verifies it; drops what is unsound when asked to.

#include "tools/cli/parse.h"
#include "tools/cli/store_key.h"
#include "tools/cli/verbs.h"
#include "transfer/store_check.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include <memory>

namespace kvtier {
namespace {

using nlohmann::ordered_json;

struct FsckOptions {
  std::string path;
  bool repair = false;
  bool rebuild = false;
  std::string key_file;
  std::string format = "table";
};

std::string fsck_table(const FsckOptions& options, const StoreCheckReport& report) {
  std::string text =
      fmt::format("store {}: {}\n", options.path, format_bytes(report.stats.capacity_bytes));
  if (!report.notice.empty()) text += fmt::format("  notice: {}\n", report.notice);
  text += fmt::format("  {} items, {} extents, {} blocks, {} blobs: {} read and verified\n",
                      report.items, report.extents, report.blocks, report.blobs,
                      format_bytes(report.bytes));
  text += fmt::format("  {} of {} free, {} of it in places of 256 KiB\n",
                      format_bytes(report.stats.free_bytes), format_bytes(report.stats.data_bytes),
                      format_bytes(report.stats.free_256k_bytes));
  for (const std::string& line : report.unsound) text += fmt::format("  unsound: {}\n", line);
  if (report.stats.items_dropped > 0) {
    text += fmt::format("  {} items are listed, but not there\n", report.stats.items_dropped);
  }
  if (report.repaired > 0) text += fmt::format("  {} items dropped\n", report.repaired);
  return text + (report.sound() ? "  sound\n" : "  NOT sound (--repair drops what is not)\n");
}

ordered_json fsck_json(const FsckOptions& options, const StoreCheckReport& report) {
  return {{"schema", "kvtier.fsck-result"},
          {"version", 1},
          {"options",
           {{"path", options.path}, {"repair", options.repair}, {"rebuild", options.rebuild}}},
          {"sound", report.sound()},
          {"notice", report.notice},
          {"rebuilt", report.stats.rebuilt},
          {"items", report.items},
          {"items_dropped", report.stats.items_dropped},
          {"extents", report.extents},
          {"blocks", report.blocks},
          {"blocks_corrupt", report.stats.blocks_corrupt},
          {"blobs", report.blobs},
          {"bytes_verified", report.bytes},
          {"capacity_bytes", report.stats.capacity_bytes},
          {"data_bytes", report.stats.data_bytes},
          {"free_bytes", report.stats.free_bytes},
          {"free_256k_bytes", report.stats.free_256k_bytes},
          {"unsound", report.unsound},
          {"repaired", report.repaired}};
}

// Progress belongs to a person who watches.
void show_progress(std::uint64_t done, std::uint64_t total) {
  if (::isatty(STDERR_FILENO) == 0) return;
  fmt::print(stderr, "\rkvtier: looking through the segments: {} of {}{}", format_bytes(done),
             format_bytes(total), done == total ? "\n" : "");
}

ExitCode run_fsck(const FsckOptions& options) {
  Result<std::optional<PageCipher>> cipher = store_key(options.key_file);
  if (!cipher.ok()) return fail(ExitCode::kBadInput, cipher.status());
  StoreOptions store_options;
  store_options.cipher = *cipher ? &**cipher : nullptr;
  store_options.read_only = !options.repair;
  store_options.ignore_index = options.rebuild;
  store_options.free_bytes_min = 0;
  store_options.progress = show_progress;
  Result<std::unique_ptr<Store>> store = open_store(options.path, store_options);
  if (!store.ok()) return fail(ExitCode::kBadInput, store.status());
  Result<StoreCheckReport> report = check_store(**store, options.repair);
  const Status closed = (*store)->close();
  if (!report.ok()) return fail(ExitCode::kFailed, report.status());
  if (!closed.ok()) return fail(ExitCode::kFailed, closed);
  const ExitCode code = report->sound() ? ExitCode::kDone : ExitCode::kRequirementFailed;
  if (options.format == "table") return print_result(fsck_table(options, *report), code);
  return print_result(fsck_json(options, *report).dump(2) + "\n", code);
}

}  // namespace

void add_fsck(CLI::App& app, ExitCode& exit_code) {
  auto options = std::make_shared<FsckOptions>();
  CLI::App* verb = app.add_subcommand("fsck", "Verify a persistent store, block by block");
  verb->add_option("PATH", options->path, "The store's folder")->required()->type_name("");
  verb->add_flag("--repair", options->repair,
                 "Drop items that are not wholly sound; nothing is mended or made up");
  verb->add_flag("--rebuild", options->rebuild,
                 "Look through the segments instead of asking the index");
  verb->add_option("--key-file", options->key_file,
                   "Key of an encrypted store (default: the variable KVTIER_STORE_KEY)")
      ->type_name("");
  verb->add_option("--format", options->format, "table or json (default: table)")
      ->check(CLI::IsMember({"table", "json"}))
      ->type_name("");
  verb->footer(
      "Without --repair nothing is changed; what a running process is writing meanwhile may look\n"
      "unsound. With it the store is locked.\n"
      "Exit codes: 0 sound, 3 no store that can be read, 4 unsound.\n\n"
      "Examples:\n"
      "  kvtier fsck /var/cache/kv\n"
      "  kvtier fsck /var/cache/kv --repair --format json");
  verb->callback([options, &exit_code] { exit_code = run_fsck(*options); });
}

}  // namespace kvtier
