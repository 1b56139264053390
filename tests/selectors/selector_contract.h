#pragma once

#include "selectors/registry.h"
#include "tests/selectors/context.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <vector>

// What every selector promises, whatever it thinks of blocks: one suite, over every family that the
// registry knows (a new one joins by itself), some of them with parameters, and unlike shapes. What
// is here is common to its files, one per topic.

namespace kvtier::testing {

inline constexpr std::uint32_t kContractTokens = 300;

struct ContractCase {
  const char* label;
  SelectorShape shape;
};
const std::vector<ContractCase>& contract_cases();

/// Every family at its defaults (decorators around a plain one), then some with parameters.
std::vector<std::string> contract_names();

class SelectorContract : public ::testing::TestWithParam<std::tuple<std::string, std::size_t>> {
 protected:
  const std::string& name() const { return std::get<0>(GetParam()); }
  const SelectorShape& shape() const { return contract_cases()[std::get<1>(GetParam())].shape; }
  std::uint32_t always() const { return shape().sinks + shape().window; }
  SelectorFactory factory() const {
    return make_selector_factory(name(), testing::resources()).value();
  }
  /// After a prompt of so many tokens, of which the last half was observed.
  std::unique_ptr<Selector> filled(std::uint32_t tokens = kContractTokens) const {
    auto selector = make(name(), shape());
    selector->append(context_.keys(0, tokens));
    context_.observe(*selector, tokens / 2, tokens - tokens / 2);
    return selector;
  }
  /// Some head groups may be told to hold less than the budget allows.
  bool uses_the_budget() const {
    return !name().starts_with("head-class") && !name().starts_with("adaptive-budget");
  }

  Context context_{shape(), kContractTokens, 11};
};

std::uint32_t tokens_of(std::span<const SelectedUnit> units);
void expect_same(const std::vector<GroupSelection>& a, const std::vector<GroupSelection>& b);

/// Each unit is one far block, cut by the region and nothing else (or a part of one, where
/// `partial` says so), each token listed once, in order.
void expect_well_formed(const GroupSelection& group, const SelectorShape& shape, FarRegion region,
                        bool partial);

}  // namespace kvtier::testing
