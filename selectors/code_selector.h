#pragma once

#include "selectors/coded_keys.h"
#include "selectors/coded_logits.h"
#include "selectors/families.h"
#include "selectors/far_selector.h"
#include "selectors/group_rows.h"
#include "selectors/token_scores.h"

#include <cstddef>
#include <cstdint>
#include <optional>

namespace kvtier {

/// What `scan` and `two-stage` have in common: keys as codes, mean values of groups of tokens, and
/// the weights of a step, from which blocks are ranked and the rest is estimated. A family adds
/// which codes are read.
///
/// A cut within the window, or within the open run, is exact; a deeper one is made where a run
/// begins (or a group of values, if that is larger).
class CodeSelector : public FarSelector {
 public:
  struct Options {
    /// Of a code. Four lose hardly anything against the keys themselves; two halve the bytes.
    std::uint32_t bits = 4;
    /// Tokens whose values are averaged for the estimate of the rest: 64 tokens cost a quarter of
    /// the bytes of 16.
    std::uint32_t value_tokens = 64;
    /// Whether the rest is estimated, and means of values are kept for it.
    bool tail = true;
    /// Whether the keys of what is chosen are read from their codes: half the bytes move, and the
    /// chosen tokens are weighed as coarsely as they were scored.
    bool keys_from_codes = false;

    /// `bits`, `values`, `tail` and `fetch` of a name; what is needed follows from them.
    static Result<Options> parse(const SelectorParameters& parameters, SelectorNeeds& needs);
  };

  void append(const NewTokens& tokens) override;
  void truncate(std::uint32_t position) override;
  std::uint32_t truncate_floor(std::uint32_t position) const override;

  bool estimates_rest() const override { return values_.has_value(); }
  Status estimate_rest(const SelectRequest& request, std::span<const GroupSelection> selection,
                       StatesView target, WorkerPool& pool) override;

  bool keeps_keys() const override { return keys_from_codes_; }
  void read_keys(const WantedKeys& wanted) const override;

  void save(StateWriter& writer) const override;
  Status restore(StateReader& reader) override;
  std::size_t metadata_bytes() const override;

 protected:
  CodeSelector(const SelectorShape& shape, const Options& options);

  std::uint32_t tokens_seen() const override { return keys_.tokens(); }
  const CodedKeys& keys() const { return keys_; }
  CodedLogits& logits() { return logits_; }
  /// Weighs every token, those of tiles that `coarse` leaves out by their group, and ranks blocks.
  Status rank(const Question& question, const CoarseTokens* coarse,
              std::span<GroupSelection> selection, WorkerPool& pool);

 private:
  bool keys_from_codes_;
  CodedKeys keys_;
  std::optional<GroupRows> values_;
  CodedLogits logits_;
  TokenScores scores_;
};

}  // namespace kvtier
