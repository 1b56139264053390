#pragma once

#include <cstdint>

namespace kvtier::testing {

/// Allocations of the whole process so far, every thread included: a program that links
/// `kvtier_allocation_counter` has its operator new replaced by one that counts.
std::uint64_t allocation_count();

}  // namespace kvtier::testing
