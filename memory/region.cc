#include "memory/region.h"

#include "memory/available_memory.h"

#include <hwloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

namespace kvtier {
namespace {

constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

struct TopologyDeleter {
  void operator()(hwloc_topology* topology) const { hwloc_topology_destroy(topology); }
};
struct BitmapDeleter {
  void operator()(hwloc_bitmap_s* bitmap) const { hwloc_bitmap_free(bitmap); }
};
using Topology = std::unique_ptr<hwloc_topology, TopologyDeleter>;
using Bitmap = std::unique_ptr<hwloc_bitmap_s, BitmapDeleter>;

Topology load_topology() {
  hwloc_topology_t raw = nullptr;
  if (hwloc_topology_init(&raw) != 0) return nullptr;
  Topology topology(raw);
  if (hwloc_topology_load(raw) != 0) return nullptr;
  return topology;
}

std::optional<unsigned> node_of_this_thread(hwloc_topology_t topology) {
  Bitmap cpus(hwloc_bitmap_alloc());
  Bitmap nodes(hwloc_bitmap_alloc());
  if (hwloc_get_last_cpu_location(topology, cpus.get(), HWLOC_CPUBIND_THREAD) != 0) return {};
  hwloc_cpuset_to_nodeset(topology, cpus.get(), nodes.get());
  const int first = hwloc_bitmap_first(nodes.get());
  if (first < 0) return {};
  return static_cast<unsigned>(first);
}

void append_note(std::string& note, const std::string& line) {
  if (!note.empty()) note += "; ";
  note += line;
}

void bind_to_node(std::span<std::byte> memory, const RegionOptions& options, RegionStats& stats) {
  const Topology topology = load_topology();
  if (!topology) {
    append_note(stats.note, "hwloc cannot read this machine, memory is not bound");
    return;
  }
  const std::optional<unsigned> node =
      options.numa_node ? options.numa_node : node_of_this_thread(topology.get());
  if (!node) {
    append_note(stats.note, "the calling thread's NUMA node is unknown, memory is not bound");
    return;
  }
  Bitmap nodes(hwloc_bitmap_alloc());
  hwloc_bitmap_only(nodes.get(), *node);
  if (hwloc_set_area_membind(topology.get(), memory.data(), memory.size(), nodes.get(),
                             HWLOC_MEMBIND_BIND, HWLOC_MEMBIND_BYNODESET) != 0) {
    append_note(stats.note,
                fmt::format("binding to NUMA node {} refused ({})", *node, std::strerror(errno)));
    return;
  }
  stats.numa_node = node;
}

// The kernel reports huge pages per mapping and may have joined ours with a neighbour's.
std::size_t huge_page_bytes(std::span<const std::byte> memory) {
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> maps(std::fopen("/proc/self/smaps", "re"),
                                                       &std::fclose);
  if (!maps) return 0;
  char line[512];
  bool ours = false;
  while (std::fgets(line, sizeof line, maps.get()) != nullptr) {
    std::uintptr_t start = 0;
    std::uintptr_t end = 0;
    if (std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " ", &start, &end) == 2) {
      const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
      ours = start <= address && address < end;
    }
    std::size_t kib = 0;
    if (ours && std::sscanf(line, "AnonHugePages: %zu kB", &kib) == 1) {
      return std::min(kib * 1024, memory.size());
    }
  }
  return 0;
}

}  // namespace

Result<Region> Region::allocate(const RegionOptions& options) {
  if (options.bytes == 0) return invalid_argument("a region of 0 bytes");
  // Half of all addresses is more than any machine maps, and keeps the roundings from wrapping.
  const std::size_t available =
      std::min(available_memory_bytes(), std::numeric_limits<std::size_t>::max() / 2);
  if (options.bytes > available) {
    return no_space(
        fmt::format("{} bytes of memory wanted, {} available; choose a smaller capacity",
                    options.bytes, available));
  }
  // Huge pages need an aligned start: map one more and use the aligned part.
  const std::size_t slack = options.huge_pages ? kHugePageBytes : 0;
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t wanted = (options.bytes + page - 1) / page * page;
  const std::size_t mapped = wanted + slack;
  void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return no_space(fmt::format("cannot map {} bytes of memory ({}); choose a smaller capacity",
                                options.bytes, std::strerror(errno)));
  }
  auto* start = static_cast<std::byte*>(base);
  if (slack != 0) {
    const auto address = reinterpret_cast<std::uintptr_t>(start);
    const std::size_t skip = (kHugePageBytes - address % kHugePageBytes) % kHugePageBytes;
    if (skip > 0) munmap(start, skip);
    start += skip;
    if (slack > skip) munmap(start + wanted, slack - skip);
  }

  Region region;
  region.data_ = start;
  region.mapped_bytes_ = wanted;
  region.stats_.bytes = options.bytes;
  if (options.huge_pages && madvise(start, wanted, MADV_HUGEPAGE) != 0) {
    append_note(region.stats_.note, "huge pages refused");
  }
  bind_to_node({start, wanted}, options, region.stats_);
  // Reports what it can of a shortage that came up since the question above; touching the pages
  // would end in a signal.
  if (madvise(start, wanted, MADV_POPULATE_WRITE) != 0) {
    if (errno == ENOMEM || errno == EFAULT || errno == EHWPOISON) {
      return no_space(fmt::format("the system has not {} bytes of memory left ({})", options.bytes,
                                  std::strerror(errno)));
    }
    for (std::size_t offset = 0; offset < wanted; offset += page) start[offset] = std::byte{0};
  }
  if (options.page_lock) {
    region.stats_.page_locked = mlock(start, wanted) == 0;
    if (!region.stats_.page_locked) {
      append_note(region.stats_.note,
                  fmt::format("page-locking refused ({})", std::strerror(errno)));
    }
  }
  region.stats_.huge_page_bytes = huge_page_bytes({start, wanted});
  return region;
}

Region Region::adopt(std::span<std::byte> memory, std::function<void()> release) {
  Region region;
  region.data_ = memory.data();
  region.release_ = std::move(release);
  region.stats_.bytes = memory.size();
  return region;
}

Region::Region(Region&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      mapped_bytes_(std::exchange(other.mapped_bytes_, 0)),
      release_(std::exchange(other.release_, nullptr)),
      stats_(std::exchange(other.stats_, {})) {}

Region& Region::operator=(Region&& other) noexcept {
  if (this != &other) {
    release();
    data_ = std::exchange(other.data_, nullptr);
    mapped_bytes_ = std::exchange(other.mapped_bytes_, 0);
    release_ = std::exchange(other.release_, nullptr);
    stats_ = std::exchange(other.stats_, {});
  }
  return *this;
}

Region::~Region() { release(); }

void Region::release() noexcept {
  if (data_ == nullptr) return;
  if (release_) {
    release_();
  } else {
    munmap(data_, mapped_bytes_);
  }
  data_ = nullptr;
}

}  // namespace kvtier
