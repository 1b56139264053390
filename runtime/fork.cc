#include "runtime/runtime.h"
#include "runtime/sequence_state.h"

namespace kvtier {

Result<std::unique_ptr<Sequence>> Sequence::fork(std::uint32_t tokens, Origin origin) const {
  (void)tokens;
  (void)origin;
  return unsupported("sequences cannot be forked yet");
}

}  // namespace kvtier
