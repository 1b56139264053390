#include "runtime/runtime.h"
#include "runtime/sequence_state.h"

namespace kvtier {

Status Sequence::attend(const ExactRequest& request, StepReport* report) {
  (void)request;
  (void)report;
  return unsupported("exact attention over all tiers is not there yet");
}

}  // namespace kvtier
