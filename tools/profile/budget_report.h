#pragma once

#include "tools/profile/budget_plan.h"

#include <string>
#include <vector>

namespace kvtier {

/// Layers that are alike, in the order in which the first of each stands.
struct LayerGroup {
  LayerDescription layer;
  std::uint32_t count = 0;
};
std::vector<LayerGroup> group_layers(const ModelDescription& model);

struct BudgetReport {
  const BudgetOptions* options = nullptr;
  const BudgetInputs* inputs = nullptr;
  const BudgetPlan* plan = nullptr;
  std::vector<Suggestion> suggestions;
};

/// For people; the last line before the suggestions is the verdict.
std::string budget_table(const BudgetReport& report);
/// Schema "kvtier.budget", version 1.
std::string budget_json(const BudgetReport& report);

}  // namespace kvtier
