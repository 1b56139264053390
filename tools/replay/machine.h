#pragma once

#include <string>

namespace kvtier {

/// What the figures of a run depend on besides input and options.
struct MachineDescription {
  std::string cpu;
  unsigned threads = 0;
  std::string simd;   ///< Instruction set that the kernels use.
  std::string build;  ///< "optimised", or what makes this build slow.
};

MachineDescription describe_machine(unsigned threads);

}  // namespace kvtier
