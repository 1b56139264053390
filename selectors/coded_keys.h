#pragma once

#include "kernels/quantised_keys.h"
#include "selectors/recent_rows.h"
#include "selectors/selector.h"

#include <cstddef>
#include <cstdint>

namespace kvtier {

/// The keys of one layer as codes, a run of 64 tokens at a time: what `scan` and `two-stage` score.
///
/// Exact beside them: the keys of the sinks (unlike all others; they take no part in the first
/// run's ranges), and the newest keys, at least a window and the open run. A run is coded when its
/// last token comes and its codes are final, so the state is a function of the tokens alone.
///
/// Everything is allocated when made. One thread at a time, scoring apart.
class CodedKeys {
 public:
  CodedKeys(const SelectorShape& shape, std::uint32_t bits);

  void append(const NewTokens& tokens);
  void truncate(std::uint32_t position) { recent_.truncate(position); }
  std::uint32_t truncate_floor(std::uint32_t position) const {
    return recent_.truncate_floor(position);
  }
  void save(StateWriter& writer) const;
  Status restore(StateReader& reader);
  std::size_t metadata_bytes() const;

  const KeyCodes& codes() const { return codes_; }
  std::uint32_t tokens() const { return recent_.tokens(); }
  /// Complete runs.
  std::uint32_t runs() const { return recent_.closed(); }
  /// Tokens that have codes; those behind them are exact.
  std::uint32_t coded_tokens() const { return runs() * KeyCodes::kRunTokens; }
  std::uint32_t runs_max() const { return runs_max_; }

  const CodeLine* run(std::uint32_t head, std::uint32_t index) const {
    return lines_.data() + line_offset(head, index);
  }
  /// Keys of tokens [begin, end) of one head, token i of them at `target + i * stride_bytes`: exact
  /// where they are kept so (sinks, the open run), what their codes stand for elsewhere.
  void read(std::uint32_t head, std::uint32_t begin, std::uint32_t end, std::byte* target,
            std::size_t stride_bytes) const;

  /// Exact keys: of the sinks that have come, and of tokens [coded_tokens(), end).
  RowsView sinks(std::uint32_t head) const;
  RowsView open(std::uint32_t head, std::uint32_t end) const {
    return recent_.rows(head, coded_tokens(), end);
  }

 private:
  std::size_t line_offset(std::uint32_t head, std::uint32_t run) const {
    return (std::size_t{head} * runs_max_ + run) * codes_.run_lines();
  }
  std::size_t sink_offset(std::uint32_t head) const {
    return std::size_t{head} * sinks_max_ * recent_.row_bytes();
  }
  std::uint32_t sink_count() const { return std::min(sinks_max_, tokens()); }

  KeyCodes codes_;
  std::uint32_t sinks_max_;
  std::uint32_t runs_max_;
  RecentRows recent_;
  FixedArray<CodeLine> lines_;   ///< [KV heads, runs_max, run_lines]
  FixedArray<std::byte> sinks_;  ///< [KV heads, sinks, head_dim]
};

}  // namespace kvtier
