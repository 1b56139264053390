#include "kernels/checksum.h"
#include "transfer/link.h"

#include <vector>

namespace kvtier {
namespace {

// Decisions fall when a copy is reaped: source and target are the caller's promise until then, so
// the target can still be damaged, and nothing needs to be remembered while the copy is in flight.
class FaultyLink final : public Link {
 public:
  FaultyLink(std::unique_ptr<Link> wrapped, const FaultPlan& plan, FaultCounts* counts)
      : wrapped_(std::move(wrapped)),
        name_(fmt::format("faulty({})", wrapped_->name())),
        rate_(plan.link_bitflip_rate),
        seed_(plan.seed),
        counts_(counts),
        uses_(kUseCounters) {}

  const std::string& name() const override { return name_; }

  std::size_t submit(std::span<LinkOperation* const> operations) override {
    return wrapped_->submit(operations);
  }

  std::size_t reap(std::span<LinkOperation*> done, Duration timeout) override {
    const std::size_t count = wrapped_->reap(done, timeout);
    for (LinkOperation* operation : done.first(count)) {
      if (operation->status.ok() && operation->transferred > 0) maybe_flip(*operation);
    }
    return count;
  }

  void wake() override { wrapped_->wake(); }

 private:
  // Contents that share a counter share their count of uses; with this many that hardly matters.
  static constexpr std::size_t kUseCounters = std::size_t{1} << 16;
  static constexpr std::uint64_t kSaltHit = 0x6c696e6b;
  static constexpr std::uint64_t kSaltBit = 0x6c696e6c;

  void maybe_flip(const LinkOperation& operation) {
    std::uint64_t place = static_cast<std::uint64_t>(operation.direction);
    for (const CopySpan& span : operation.spans) {
      place = fault_draw(place, kSaltHit, checksum({span.target, span.bytes}), span.bytes);
    }
    const std::uint64_t use = uses_[place % kUseCounters]++;
    if (!fault_hits(fault_draw(seed_, kSaltHit, place, use), rate_)) return;
    std::uint64_t bit = fault_draw(seed_, kSaltBit, place, use) % (operation.transferred * 8);
    for (const CopySpan& span : operation.spans) {
      const std::uint64_t span_bits = std::uint64_t{span.bytes} * 8;
      if (bit < span_bits) {
        span.target[bit / 8] ^= std::byte{1} << (bit % 8);
        break;
      }
      bit -= span_bits;
    }
    if (counts_ == nullptr) return;
    counts_->fired[static_cast<std::size_t>(FaultKind::kBitFlip)].fetch_add(
        1, std::memory_order_relaxed);
  }

  const std::unique_ptr<Link> wrapped_;
  const std::string name_;
  const double rate_;
  const std::uint64_t seed_;
  FaultCounts* const counts_;
  std::vector<std::uint32_t> uses_;
};

}  // namespace

std::unique_ptr<Link> make_faulty_link(std::unique_ptr<Link> wrapped, const FaultPlan& plan,
                                       FaultCounts* counts) {
  return std::make_unique<FaultyLink>(std::move(wrapped), plan, counts);
}

}  // namespace kvtier
