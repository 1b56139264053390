#include "runtime/runtime.h"
#include "runtime/sequence_state.h"

namespace kvtier {

Status Sequence::resolve(const StepRequest& request, ResolvedBlocks* resolved) {
  (void)request;
  (void)resolved;
  return unsupported("slots cannot be resolved yet");
}

SequenceStats Sequence::stats() const { return {}; }

}  // namespace kvtier
