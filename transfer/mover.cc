#include "transfer/mover.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace kvtier {
namespace {

// Copies of a link that are handed over at once; a link does not say how deep its queue is.
constexpr std::uint32_t kLinkBatch = 64;

void fill(FileOperation& operation, const TransferRequest& request) {
  operation.kind = request.route == Route::kDiskToHost ? FileOperation::Kind::kRead
                                                       : FileOperation::Kind::kWrite;
  operation.offset = request.offset;
  operation.buffer = request.buffer;
}

void fill(LinkOperation& operation, const TransferRequest& request) {
  operation.direction = request.route == Route::kHostToDevice ? LinkDirection::kHostToDevice
                                                              : LinkDirection::kDeviceToHost;
  operation.spans = request.spans;
}

// `Device` is a File or a Link; their submit and reap differ only in the operation's type.
template <typename Device, typename Operation, Operation TransferRecord::*kMember>
class DeviceMover : public Mover {
 public:
  DeviceMover(Device& device, std::uint32_t queue_depth)
      : device_(device), depth_(queue_depth), submitted_(queue_depth), reaped_(queue_depth) {}

  std::uint32_t queue_depth() const override { return depth_; }

  std::size_t submit(std::span<TransferRecord* const> records) override {
    KVTIER_CHECK(records.size() <= depth_, "{} records at once, {} at most", records.size(),
                 depth_);
    for (std::size_t i = 0; i < records.size(); ++i) {
      Operation& operation = records[i]->*kMember;
      fill(operation, records[i]->request);
      operation.owner = records[i];
      submitted_[i] = &operation;
    }
    return device_.submit(std::span(submitted_).first(records.size()));
  }

  std::size_t reap(std::span<TransferRecord*> done, Duration timeout) override {
    const std::size_t most = std::min(done.size(), reaped_.size());
    const std::size_t count = device_.reap(std::span(reaped_).first(most), timeout);
    for (std::size_t i = 0; i < count; ++i) {
      done[i] = static_cast<TransferRecord*>(reaped_[i]->owner);
      done[i]->result = std::exchange(reaped_[i]->status, Status());
      done[i]->transferred = reaped_[i]->transferred;
    }
    return count;
  }

  void wake() override { device_.wake(); }

 protected:
  Device& device_;

 private:
  const std::uint32_t depth_;
  std::vector<Operation*> submitted_;
  std::vector<Operation*> reaped_;
};

class FileMover final : public DeviceMover<File, FileOperation, &TransferRecord::file_operation> {
 public:
  using DeviceMover::DeviceMover;
  void cancel(TransferRecord& record) override { device_.cancel(&record.file_operation); }
};

class LinkMover final : public DeviceMover<Link, LinkOperation, &TransferRecord::link_operation> {
 public:
  using DeviceMover::DeviceMover;
  // A copy that has started is over sooner than any request to stop it.
  void cancel(TransferRecord&) override {}
};

}  // namespace

std::unique_ptr<Mover> make_file_mover(File& file) {
  return std::make_unique<FileMover>(file, file.traits().queue_depth);
}

std::unique_ptr<Mover> make_link_mover(Link& link) {
  return std::make_unique<LinkMover>(link, kLinkBatch);
}

}  // namespace kvtier
