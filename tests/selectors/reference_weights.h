#pragma once

#include "selectors/selector.h"
#include "tests/selectors/context.h"

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace kvtier::testing {

/// Attention weights of every query of a step over all tokens that it sees, in float64 with obvious
/// loops, and what selectors that estimate mass make of them.
class ReferenceWeights {
 public:
  /// logit(query, query head, token), scaled.
  using Logit = std::function<double(std::uint32_t, std::uint32_t, std::uint32_t)>;

  /// From the keys themselves.
  ReferenceWeights(const Context& context, const SelectorShape& shape,
                   const SelectRequest& request);
  ReferenceWeights(const Context& context, const SelectorShape& shape, const SelectRequest& request,
                   const Logit& logit);

  double weight(std::uint32_t query, std::uint32_t head, std::uint32_t token) const {
    return weights_[row(query, head)][token];
  }
  double lse(std::uint32_t query, std::uint32_t head) const { return lse_[row(query, head)]; }

  /// Score of one block's far tokens for a head group, under `kMax` or `kSum`.
  double block_score(std::uint32_t group, std::uint32_t block) const;
  /// What the chosen tokens of a group hold, added over queries and heads.
  double found(std::uint32_t group, const GroupSelection& selection) const;

  struct State {
    std::vector<double> out;
    double lse = 0.0;
  };
  /// Far tokens that are not chosen, each with the mean value of its group of `value_tokens`.
  State rest(std::uint32_t query, std::uint32_t head, const GroupSelection& selection,
             std::uint32_t value_tokens) const;
  /// Everything that is attended exactly: sinks, window, chosen tokens.
  State attended(std::uint32_t query, std::uint32_t head, const GroupSelection& selection) const;
  State everything(std::uint32_t query, std::uint32_t head) const;

 private:
  std::size_t row(std::uint32_t query, std::uint32_t head) const {
    return query * shape_.query_heads() + head;
  }
  std::vector<bool> chosen(const GroupSelection& selection) const;
  State state_of(std::uint32_t query, std::uint32_t head,
                 const std::function<bool(std::uint32_t)>& takes) const;

  const Context& context_;
  SelectorShape shape_;
  FarRegion region_;
  std::uint32_t queries_;
  std::uint32_t tokens_;  ///< Seen by the last query.
  std::vector<std::vector<double>> weights_;
  std::vector<double> lse_;
};

/// Makes all keys integers from 0 to 15 and every channel of every run of 64 span that range, so
/// that 4-bit codes are exact; queries become multiples of 1/8.
void make_codes_exact(Context& context, const SelectorShape& shape);

}  // namespace kvtier::testing
