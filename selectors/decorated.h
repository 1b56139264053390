#pragma once

#include "selectors/selector.h"

#include <memory>
#include <span>
#include <utility>

namespace kvtier {

/// A selector that hands everything on to another: what decorators are derived from. They override
/// what they change, as a rule `select` and `hint`.
///
/// `estimate_rest` is handed on with the decorator's own answer, which may choose less than the
/// inner selector did: the estimate is about what the given selection leaves out.
class Decorated : public Selector {
 public:
  Decorated(const SelectorShape& shape, std::unique_ptr<Selector> inner)
      : shape_(shape), inner_(std::move(inner)) {}
  Decorated(const Decorated& other) : shape_(other.shape_), inner_(other.inner_->fork()) {}
  Decorated& operator=(const Decorated&) = delete;

  void append(const NewTokens& tokens) override { inner_->append(tokens); }
  void observe_prompt(const PromptQueries& queries) override { inner_->observe_prompt(queries); }
  void truncate(std::uint32_t position) override { inner_->truncate(position); }
  std::uint32_t truncate_floor(std::uint32_t position) const override {
    return inner_->truncate_floor(position);
  }
  Status select(const SelectRequest& request, std::span<GroupSelection> selection,
                WorkerPool& pool) override {
    return inner_->select(request, selection, pool);
  }
  Status hint(const SelectRequest& request, std::span<GroupSelection> selection,
              WorkerPool& pool) override {
    return inner_->hint(request, selection, pool);
  }
  bool estimates_rest() const override { return inner_->estimates_rest(); }
  Status estimate_rest(const SelectRequest& request, std::span<const GroupSelection> selection,
                       StatesView target, WorkerPool& pool) override {
    return inner_->estimate_rest(request, selection, target, pool);
  }
  bool keeps_keys() const override { return inner_->keeps_keys(); }
  void read_keys(const WantedKeys& wanted) const override { inner_->read_keys(wanted); }
  float demand() const override { return inner_->demand(); }
  void save(StateWriter& writer) const override { inner_->save(writer); }
  Status restore(StateReader& reader) override { return inner_->restore(reader); }
  std::size_t metadata_bytes() const override { return inner_->metadata_bytes(); }

 protected:
  const SelectorShape& shape() const { return shape_; }
  Selector& inner() { return *inner_; }
  const Selector& inner() const { return *inner_; }

 private:
  SelectorShape shape_;
  std::unique_ptr<Selector> inner_;
};

/// Shortens a ranking: `budget_tokens` are chosen and `band_tokens` more stay behind them, in whole
/// units, by the rules of `rank_blocks` (the first unit that does not fit ends the choice and
/// begins the band; no band when the budget ends among the held). Returns the tokens chosen.
std::uint32_t shorten_selection(std::uint32_t budget_tokens, std::uint32_t band_tokens,
                                GroupSelection& selection);

}  // namespace kvtier
