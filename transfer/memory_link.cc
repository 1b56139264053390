#include "transfer/link.h"
#include "transfer/operation_list.h"

#include <algorithm>

namespace kvtier {
namespace {

class MemoryLink final : public Link {
 public:
  explicit MemoryLink(std::uint32_t queue_depth) : queue_depth_(queue_depth) {
    KVTIER_CHECK(queue_depth > 0, "a link needs a queue depth");
  }

  const std::string& name() const override { return name_; }

  std::size_t submit(std::span<LinkOperation* const> operations) override {
    const std::size_t accepted =
        std::min(operations.size(), std::size_t{queue_depth_} - in_flight_);
    for (LinkOperation* operation : operations.first(accepted)) {
      gather_blocks(operation->spans);
      operation->status = Status();
      operation->transferred = 0;
      for (const CopySpan& span : operation->spans) operation->transferred += span.bytes;
      finished_.push(operation);
      ++in_flight_;
    }
    return accepted;
  }

  std::size_t reap(std::span<LinkOperation*> done, Duration) override {
    const std::size_t count = finished_.pop_into(done);
    in_flight_ -= static_cast<std::uint32_t>(count);
    return count;
  }

 private:
  const std::string name_ = "memory";
  const std::uint32_t queue_depth_;
  std::uint32_t in_flight_ = 0;
  OperationList<LinkOperation> finished_;
};

}  // namespace

std::unique_ptr<Link> make_memory_link(std::uint32_t queue_depth) {
  return std::make_unique<MemoryLink>(queue_depth);
}

}  // namespace kvtier
