#include "selectors/box_search.h"
#include "selectors/box_tree.h"
#include "selectors/families.h"
#include "selectors/far_selector.h"
#include "selectors/question_history.h"

#include <fmt/format.h>

#include <memory>
#include <vector>

namespace kvtier {
namespace {

struct ChunkTreeOptions {
  /// Tokens of the smallest chunk: Quest's page, whose box costs 6 % of its keys and values.
  /// LeoAM's illustration has 4 and would cost 25 %.
  std::uint32_t leaf_tokens = 16;
  BoxSearch::Options search;
};

/// Adaptive chunks judged by boxes (LeoAM, 2506.20187): a tree of variable-size chunks, each with
/// an upper bound from the box around its keys, refined best first from where the last step ended;
/// chunks that were not used for some steps become one again.
///
/// A reconstruction: of LeoAM's body only reviews and notes could be read. Known from them are the
/// tree, the bound, the priority queue, the merging of unimportant chunks, and that chunks on disk
/// are judged by abstracts alone. Ours are: boxes as abstracts (elementwise smallest and largest
/// key), four children per node, the reduction over heads (`BoxSearch`), the numbers.
///
/// Without a limit (`effort=0`) the answer is exactly the smallest chunks of the largest bounds,
/// whatever was asked before. Boxes are loose: where no chunk stands out, proving the order means
/// looking at nearly all of them, and then the limit ends the search. `effort` is the number of
/// boxes that a step may look at per smallest chunk that it wants: 16 are half of a way down from
/// the coarse tiling to the leaves of a million tokens (8 levels of 4 boxes), and neighbours share
/// most of theirs; `least` boxes are always allowed. Work per step is then bounded by the budget
/// and not by the context; the answer is the best of what has been looked at, and the next step
/// goes on from there. The limit costs quality where it bites: with 635 boxes for the 1963 leaves
/// of a recorded 31K context, the choice found 0.58 of the best possible far mass, and 0.77 without
/// it.
///
/// LeoAM also takes a large chunk whole when its lower bound is near its upper; with boxes after
/// RoPE they never are, so this is left out. Its choice of layers' chunk sizes comes with the tree.
class ChunkTree final : public FarSelector {
 public:
  ChunkTree(const SelectorShape& shape, const ChunkTreeOptions& options)
      : FarSelector(shape),
        tree_(shape, options.leaf_tokens),
        options_(options.search),
        remembered_(shape.head_groups(), QuestionHistory<Frontier>(kQuestionVersions, {})),
        status_(shape.head_groups()) {
    reserve();
    // A leaf begins and ends a piece of a block at most.
    set_units_max(shape.tokens_max / shape.tokens_per_block + 2 * tree_.leaves_max() + 4);
  }

  void append(const NewTokens& tokens) override { tree_.append(tokens); }
  void truncate(std::uint32_t position) override {
    tree_.truncate(position);
    for (auto& history : remembered_) history.drop_from(position);
  }
  std::uint32_t truncate_floor(std::uint32_t position) const override {
    return tree_.truncate_floor(position);
  }

  std::unique_ptr<Selector> fork() const override {
    auto copy = std::make_unique<ChunkTree>(*this);
    copy->reserve();
    return copy;
  }
  void save(StateWriter& writer) const override {
    tree_.save(writer);
    for (const auto& history : remembered_) {
      history.save(writer, [](StateWriter& to, const Frontier& frontier) {
        to.put(frontier.leaves);
        to.put_array(std::span(frontier.chunks));
      });
    }
  }
  Status restore(StateReader& reader) override {
    KVTIER_RETURN_IF_ERROR(tree_.restore(reader));
    for (auto& history : remembered_) {
      KVTIER_RETURN_IF_ERROR(history.restore(reader, [this](StateReader& from, Frontier& frontier) {
        KVTIER_RETURN_IF_ERROR(from.get(frontier.leaves));
        KVTIER_RETURN_IF_ERROR(from.get_vector(frontier.chunks, tree_.leaves_max()));
        return check_tiling(frontier);
      }));
    }
    return {};
  }

  /// With the largest tiling that a question can leave; the versions for going back are left out.
  std::size_t metadata_bytes() const override {
    return tree_.metadata_bytes() +
           remembered_.size() * tree_.closed_leaves() * sizeof(Frontier::Chunk);
  }

 private:
  std::uint32_t tokens_seen() const override { return tree_.tokens(); }
  /// A search leaves its frontier in the searches' scratch; only a step remembers it.
  Status answer(const Question& question, std::span<GroupSelection> selection,
                WorkerPool& pool) override {
    const auto& [request, region, learns] = question;
    if (region.end > tree_.closed_leaves() * tree_.leaf_tokens()) tree_.box_open_leaf();
    struct Step {
      const Question& question;
      std::span<GroupSelection> selection;
    } step{question, selection};
    pool.run(searches_.size(), [this, &step](std::size_t i) {
      search_group(step.question, static_cast<std::uint32_t>(i), step.selection[i]);
    });
    for (const Status& status : status_) KVTIER_RETURN_IF_ERROR(status);
    for (std::size_t i = 0; learns && i < remembered_.size(); ++i) {
      remembered_[i].add(request.first_position) = searches_[i].frontier();
    }
    return {};
  }

  void search_group(const Question& question, std::uint32_t head_group, GroupSelection& selection) {
    const auto& [request, region, learns] = question;
    const std::uint32_t budget = far_budget_tokens(shape(), request);
    BoxSearch& search = searches_[head_group];
    status_[head_group] =
        search.run(tree_,
                   {.request = request,
                    .region = region,
                    .head_group = head_group,
                    .wanted_tokens = budget,
                    .band_tokens = std::min(request.band_tokens, region.tokens() - budget)},
                   remembered_[head_group].newest());
    if (!status_[head_group].ok()) return;
    rank_ranges(search.best(), shape().tokens_per_block, budget, request.band_tokens, selection);
  }

  /// Copies have room for what they hold only; searches are scratch and made anew.
  void reserve() {
    searches_.clear();
    for (std::uint32_t i = 0; i < shape().head_groups(); ++i) {
      searches_.emplace_back(shape(), tree_, options_);
    }
    for (auto& history : remembered_) {
      history.for_each([this](Frontier& frontier) { frontier.chunks.reserve(tree_.leaves_max()); });
    }
  }

  /// Damaged bytes must not send a search to boxes that do not exist.
  Status check_tiling(const Frontier& frontier) const {
    std::uint32_t leaf = 0;
    bool tiles = frontier.leaves <= tree_.leaves_max();
    for (const Frontier::Chunk& chunk : frontier.chunks) {
      if (!tiles || chunk.node >= tree_.nodes_max()) {
        tiles = false;
        break;
      }
      // Nodes of sinks only are left out at the front.
      if (leaf == 0) {
        const std::uint32_t first = tree_.first_leaf(chunk.node);
        tiles = std::uint64_t{first} * tree_.leaf_tokens() <= shape().sinks;
        leaf = first;
      }
      tiles = tiles && tree_.first_leaf(chunk.node) == leaf && !tree_.empty(chunk.node);
      leaf = tree_.end_leaf(chunk.node);
    }
    if (tiles && (leaf == frontier.leaves || frontier.chunks.empty())) return {};
    return corrupt("selector state: chunks that do not tile the context");
  }

  BoxTree tree_;
  BoxSearch::Options options_;
  std::vector<BoxSearch> searches_;
  std::vector<QuestionHistory<Frontier>> remembered_;
  std::vector<Status> status_;
};

}  // namespace

const SelectorFamily& chunk_tree_family() {
  static constexpr std::string_view kParameters[] = {"tokens", "effort", "least", "merge"};
  static const SelectorFamily kFamily = {
      .name = "chunk-tree",
      .summary = "chunks of variable size, refined best first by the bounds of their boxes",
      .source = "LeoAM, 2506.20187 (reconstruction)",
      .parameters = kParameters,
      .remembers = true,
      .partial_blocks = true,
      .metadata = "4 head_dim / tokens * 4/3 B, the last frontier, and the window's keys",
      .build_cost = "O(head_dim)",
      .step_cost = "O(effort * budget / tokens * head_dim)",
      .make = [](const SelectorRecipe& recipe, SelectorFactory& factory) -> Status {
        ChunkTreeOptions options;
        KVTIER_ASSIGN_OR_RETURN(options.leaf_tokens,
                                recipe.parameters.integer("tokens", options.leaf_tokens, 1, 1024));
        KVTIER_ASSIGN_OR_RETURN(
            options.search.effort,
            recipe.parameters.integer("effort", options.search.effort, 0, 1u << 20));
        KVTIER_ASSIGN_OR_RETURN(
            options.search.least,
            recipe.parameters.integer("least", options.search.least, 64, 1u << 20));
        KVTIER_ASSIGN_OR_RETURN(
            options.search.merge_after,
            recipe.parameters.integer("merge", options.search.merge_after, 1, 1u << 20));
        factory.make = [options](const SelectorShape& shape, LayerIndex) {
          return Result<std::unique_ptr<Selector>>(std::make_unique<ChunkTree>(shape, options));
        };
        return {};
      }};
  return kFamily;
}

}  // namespace kvtier
