#pragma once

#include "selectors/rank_blocks.h"
#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvtier {

/// The frame that selectors of the far region share: checks a request, makes room for the answer,
/// and asks the family only when there is something to rank. A family says how many tokens it has
/// seen, and answers.
class FarSelector : public Selector {
 public:
  Status select(const SelectRequest& request, std::span<GroupSelection> selection,
                WorkerPool& pool) final {
    return ask(request, selection, pool, true);
  }
  Status hint(const SelectRequest& request, std::span<GroupSelection> selection,
              WorkerPool& pool) final {
    return ask(request, selection, pool, false);
  }

 protected:
  struct Question {
    const SelectRequest& request;
    FarRegion region;     ///< Not empty; all of it was appended.
    bool learns = false;  ///< A step; else a guess, which must leave no trace.
  };

  /// `units_max`: the most units that an answer for a head group can have; 0: one per block.
  explicit FarSelector(const SelectorShape& shape, std::size_t units_max = 0)
      : shape_(shape), units_max_(units_max) {}

  const SelectorShape& shape() const { return shape_; }
  void set_units_max(std::size_t units_max) { units_max_ = units_max; }

  virtual std::uint32_t tokens_seen() const = 0;
  /// Every question, before it is known whether there is anything to rank: for families that learn
  /// from what is asked.
  virtual void hear(const SelectRequest& request, bool learns) {
    (void)request;
    (void)learns;
  }
  /// `selection` is empty, with room for as many units as there can be.
  virtual Status answer(const Question& question, std::span<GroupSelection> selection,
                        WorkerPool& pool) = 0;

 private:
  Status ask(const SelectRequest& request, std::span<GroupSelection> selection, WorkerPool& pool,
             bool learns) {
    KVTIER_RETURN_IF_ERROR(check_request(shape_, request));
    reserve_selection(shape_, selection, units_max_);
    hear(request, learns);
    const FarRegion region = FarRegion::of(shape_, request.first_position);
    KVTIER_CHECK(region.end <= tokens_seen(), "tokens to {} are to be ranked, {} were appended",
                 region.end, tokens_seen());
    if (region.tokens() == 0) return {};
    return answer({request, region, learns}, selection, pool);
  }

  SelectorShape shape_;
  std::size_t units_max_;
};

}  // namespace kvtier
