#include "selectors/code_selector.h"

namespace kvtier {

Result<CodeSelector::Options> CodeSelector::Options::parse(const SelectorParameters& parameters,
                                                           SelectorNeeds& needs) {
  static constexpr std::string_view kBits[] = {"4", "2"};
  static constexpr std::string_view kValues[] = {"8", "16", "32", "64", "128"};
  static constexpr std::string_view kTail[] = {"on", "off"};
  static constexpr std::string_view kFetch[] = {"both", "values"};
  KVTIER_ASSIGN_OR_RETURN(const std::size_t bits, parameters.choice("bits", "4", kBits));
  KVTIER_ASSIGN_OR_RETURN(const std::size_t values, parameters.choice("values", "64", kValues));
  KVTIER_ASSIGN_OR_RETURN(const std::size_t tail, parameters.choice("tail", "on", kTail));
  KVTIER_ASSIGN_OR_RETURN(const std::size_t fetch, parameters.choice("fetch", "both", kFetch));
  needs.values = tail == 0;
  return Options{.bits = bits == 0 ? 4u : 2u,
                 .value_tokens = 8u << values,
                 .tail = tail == 0,
                 .keys_from_codes = fetch == 1};
}

CodeSelector::CodeSelector(const SelectorShape& shape, const Options& options)
    : FarSelector(shape),
      keys_from_codes_(options.keys_from_codes),
      keys_(shape, options.bits),
      logits_(shape),
      scores_(shape, {.value_tokens = options.tail ? options.value_tokens : 0}) {
  if (options.tail) {
    values_.emplace(shape, GroupRows::Options{options.value_tokens, /*of_values=*/true});
  }
}

void CodeSelector::append(const NewTokens& tokens) {
  keys_.append(tokens);
  if (!values_) return;
  KVTIER_CHECK(tokens.values != nullptr || tokens.tokens == 0,
               "tokens from position {} come without values", tokens.first_position);
  values_->append(tokens);
}

void CodeSelector::truncate(std::uint32_t position) {
  keys_.truncate(position);
  if (values_) values_->truncate(position);
}

std::uint32_t CodeSelector::truncate_floor(std::uint32_t position) const {
  // Where one part can only be cut earlier, the other must be too.
  for (std::uint32_t floor = position;; position = floor) {
    floor = keys_.truncate_floor(position);
    if (values_) floor = values_->truncate_floor(floor);
    if (floor == position) return floor;
  }
}

Status CodeSelector::rank(const Question& question, const CoarseTokens* coarse,
                          std::span<GroupSelection> selection, WorkerPool& pool) {
  logits_.use(keys_, coarse);
  KVTIER_RETURN_IF_ERROR(scores_.compute(question.request, keys_.tokens(), logits_, pool));
  return scores_.rank(question.request, selection, pool);
}

Status CodeSelector::estimate_rest(const SelectRequest& request,
                                   std::span<const GroupSelection> selection, StatesView target,
                                   WorkerPool& pool) {
  if (!values_) return Selector::estimate_rest(request, selection, target, pool);
  scores_.estimate_rest(request, selection, *values_, target, pool);
  return {};
}

void CodeSelector::read_keys(const WantedKeys& wanted) const {
  const std::uint32_t per_block = shape().tokens_per_block;
  KVTIER_CHECK(keys_from_codes_ && wanted.first_token + wanted.tokens <= per_block,
               "keys of tokens {} + {} of a block", wanted.first_token, wanted.tokens);
  const std::size_t row_bytes = shape().head_dim * size_of(shape().dtype);
  const std::uint32_t begin = wanted.block.value * per_block + wanted.first_token;
  for (std::uint32_t i = 0; i < shape().heads_per_group; ++i) {
    keys_.read(wanted.head_group * shape().heads_per_group + i, begin, begin + wanted.tokens,
               wanted.target + (std::size_t{i} * per_block + wanted.first_token) * row_bytes,
               row_bytes);
  }
}

void CodeSelector::save(StateWriter& writer) const {
  keys_.save(writer);
  if (values_) values_->save(writer);
}

Status CodeSelector::restore(StateReader& reader) {
  KVTIER_RETURN_IF_ERROR(keys_.restore(reader));
  return values_ ? values_->restore(reader) : Status();
}

std::size_t CodeSelector::metadata_bytes() const {
  return keys_.metadata_bytes() + (values_ ? values_->metadata_bytes() : 0);
}

}  // namespace kvtier
