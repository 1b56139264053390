#include "runtime/prefix_store.h"

#include "transfer/little_endian.h"
#include "transfer/sha256.h"

#include <algorithm>
#include <utility>

namespace kvtier {
namespace {

// The store's own blob of every run: its token ids.
constexpr std::uint32_t kTokensTag = 0;
constexpr std::size_t kTokenBytes = 4;

// A field with its length, so that no two scopes have the same bytes.
void add_field(Sha256& sha256, std::string_view text) {
  std::array<std::byte, 8> length;
  store_little_endian(length.data(), std::uint64_t{text.size()});
  sha256.update(length);
  sha256.update(std::as_bytes(std::span(text)));
}

std::vector<std::byte> bytes_of(std::span<const std::uint32_t> tokens) {
  std::vector<std::byte> bytes(tokens.size() * kTokenBytes);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    store_little_endian(bytes.data() + i * kTokenBytes, tokens[i]);
  }
  return bytes;
}

StoreKey next_key(const StoreKey& before, std::span<const std::byte> token_bytes) {
  Sha256 sha256;
  sha256.update(before.bytes);
  sha256.update(token_bytes);
  return {sha256.digest()};
}

}  // namespace

PrefixStore::PrefixStore(Store* store, const BlockLayout& layout, const PrefixScope& scope)
    : store_(store), layout_(layout), tokens_per_run_(layout.tokens_per_extent()) {
  Sha256 sha256;
  add_field(sha256, "kvtier prefix 1");
  add_field(sha256, scope.model);
  add_field(sha256, scope.tenant_salt);
  std::array<std::byte, 12> shape;
  store_little_endian(shape.data(), layout.fingerprint());
  store_little_endian(shape.data() + 8, tokens_per_run_);
  sha256.update(shape);
  root_ = {sha256.digest()};
}

std::vector<StoreKey> PrefixStore::chain(std::span<const std::uint32_t> tokens) const {
  std::vector<StoreKey> keys;
  StoreKey key = root_;
  while (tokens.size() >= tokens_per_run_) {
    key = next_key(key, bytes_of(tokens.first(tokens_per_run_)));
    keys.push_back(key);
    tokens = tokens.subspan(tokens_per_run_);
  }
  return keys;
}

// Whether the item is a run of this layout whose token ids are just these.
Status PrefixStore::compare(const StoredItem& item, std::span<const std::uint32_t> tokens) {
  const std::vector<std::byte> expected = bytes_of(tokens);
  if (item.layout_fingerprint() != layout_.fingerprint() ||
      item.blob_bytes(kTokensTag) != expected.size()) {
    return corrupt(fmt::format("run {}: of another layout or length", item.key().short_text()));
  }
  std::vector<std::byte> found(expected.size());
  KVTIER_RETURN_IF_ERROR(store_->read_blob(item, kTokensTag, found));
  if (found == expected) return {};
  return corrupt(fmt::format("run {}: other token ids under this digest", item.key().short_text()));
}

PrefixHit PrefixStore::lookup(std::span<const std::uint32_t> tokens) {
  PrefixHit hit;
  StoreKey key = root_;
  while (tokens.size() >= tokens_per_run_) {
    const std::span<const std::uint32_t> run = tokens.first(tokens_per_run_);
    key = next_key(key, bytes_of(run));
    Result<StoredItem> item = store_->find(key);
    if (!item.ok()) break;
    const Status same = compare(*item, run);
    if (!same.ok()) {
      // Let go of it first: what is held is not erased. A store for reading keeps it.
      *item = StoredItem();
      if (same.code() == StatusCode::kCorrupt) {
        if (const Status erased = store_->erase(key); !erased.ok()) break;
      }
      break;
    }
    hit.runs.push_back(std::move(*item));
    hit.tokens += tokens_per_run_;
    tokens = tokens.subspan(tokens_per_run_);
  }
  return hit;
}

Result<PrefixStore::Saving> PrefixStore::save(std::span<const std::uint32_t> tokens,
                                              std::uint32_t extents_per_run) {
  Saving saving;
  saving.store_ = this;
  saving.extents_per_run_ = extents_per_run;
  saving.chain_ = chain(tokens);
  if (saving.chain_.empty()) {
    return invalid_argument(fmt::format("{} tokens are no whole run of {}: nothing to save",
                                        tokens.size(), tokens_per_run_));
  }
  for (std::uint32_t run = 0; run < saving.chain_.size(); ++run) {
    const StoreKey& key = saving.chain_[run];
    if (Result<StoredItem> item = store_->find(key); item.ok()) {
      saving.held_.push_back(std::move(*item));
      continue;
    }
    KVTIER_ASSIGN_OR_RETURN(StoreFill fill,
                            store_->fill({.key = key,
                                          .parent = run == 0 ? StoreKey() : saving.chain_[run - 1],
                                          .layout_fingerprint = layout_.fingerprint(),
                                          .extents = extents_per_run,
                                          .extent_bytes = layout_.extent_bytes()}));
    saving.missing_.push_back(run);
    saving.runs_.push_back({.run = run,
                            .fill = std::move(fill),
                            .token_bytes = bytes_of(tokens.subspan(
                                std::size_t{run} * tokens_per_run_, tokens_per_run_)),
                            .blobs = {},
                            .written = 0});
  }
  return saving;
}

PrefixStore::Saving::Run* PrefixStore::Saving::find(std::uint32_t run) {
  const auto found =
      std::find_if(runs_.begin(), runs_.end(), [run](const Run& r) { return r.run == run; });
  return found == runs_.end() ? nullptr : &*found;
}

Status PrefixStore::Saving::write(const PrefixRunWrite& write) {
  Run* const run = find(write.run);
  if (run == nullptr) {
    return invalid_argument(fmt::format("run {} is not one of those missing", write.run));
  }
  KVTIER_RETURN_IF_ERROR(store_->store_->write(run->fill, write.extents));
  run->written += static_cast<std::uint32_t>(write.extents.size());
  return {};
}

Status PrefixStore::Saving::add_metadata(const PrefixMetadata& metadata) {
  if (metadata.blob.tag == kTokensTag) {
    return invalid_argument("metadata with tag 0, which is the token ids'");
  }
  if (metadata.run >= chain_.size()) {
    return invalid_argument(fmt::format("metadata of run {} of {}", metadata.run, chain_.size()));
  }
  if (Run* const run = find(metadata.run)) run->blobs.push_back(metadata.blob);
  return {};
}

Status PrefixStore::Saving::commit(double value) {
  for (const Run& run : runs_) {
    if (run.written == extents_per_run_) continue;
    return invalid_argument(fmt::format("run {}: {} of {} extents were written", run.run,
                                        run.written, extents_per_run_));
  }
  std::vector<Store::Commit> commits;
  for (Run& run : runs_) {
    run.blobs.push_back({.tag = kTokensTag, .bytes = run.token_bytes});
    // The prefix is referred to by its last run; the others are there for those that follow.
    const bool is_last = run.run + 1 == chain_.size();
    commits.push_back(
        {.fill = &run.fill, .blobs = run.blobs, .value = value, .references = is_last ? 1u : 0u});
  }
  if (!commits.empty()) KVTIER_RETURN_IF_ERROR(store_->store_->commit(commits));
  const bool is_last_shared = runs_.empty() || runs_.back().run + 1 != chain_.size();
  runs_.clear();
  missing_.clear();
  return is_last_shared ? store_->store_->add_reference(chain_.back()) : Status();
}

Status PrefixStore::forget(std::span<const std::uint32_t> tokens) {
  const std::vector<StoreKey> keys = chain(tokens);
  if (keys.empty()) return not_found("no whole run of tokens");
  return store_->drop_reference(keys.back());
}

Status PrefixStore::drop_damaged(PrefixHit hit, std::uint32_t run) {
  if (run >= hit.runs.size()) {
    return not_found(fmt::format("run {} of a prefix of {}", run, hit.runs.size()));
  }
  const StoreKey key = hit.runs[run].key();
  hit.runs.clear();
  return store_->erase(key);
}

Result<std::vector<std::byte>> PrefixStore::read_metadata(const PrefixHit& hit, std::uint32_t run,
                                                          std::uint32_t tag) {
  if (run >= hit.runs.size()) {
    return not_found(fmt::format("run {} of a prefix of {}", run, hit.runs.size()));
  }
  const std::optional<std::uint64_t> bytes = hit.runs[run].blob_bytes(tag);
  if (!bytes) return not_found(fmt::format("run {} has no metadata under tag {}", run, tag));
  std::vector<std::byte> metadata(*bytes);
  KVTIER_RETURN_IF_ERROR(store_->read_blob(hit.runs[run], tag, metadata));
  return metadata;
}

}  // namespace kvtier
