#pragma once

#include "memory/status.h"

#include <string_view>

namespace kvtier {

/// What a store promises about an item once `commit` has said `ok`. Costs are in
/// transfer/README.md.
enum class Durability : unsigned char {
  kNone,   ///< Gone with the process, whatever ends it: the files have no names.
  kClean,  ///< There after `close`; a process that ends otherwise leaves an empty store.
  kCrash,  ///< There after the process is killed; a power failure may cost recent items.
  kPower,  ///< There after a power failure: `commit` waits for the drive (`fdatasync`).
};

/// "none", "clean", "crash", "power".
const char* to_string(Durability level);
/// `invalid_argument` names what would be accepted.
Result<Durability> parse_durability(std::string_view text);

}  // namespace kvtier
