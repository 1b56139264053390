#pragma once

#include <cstddef>
#include <span>

namespace kvtier {

/// First-in first-out list of operations chained through their `next`. Owns nothing, allocates
/// nothing; not thread-safe.
template <typename Operation>
class OperationList {
 public:
  bool empty() const { return first_ == nullptr; }

  void push(Operation* operation) {
    operation->next = nullptr;
    (empty() ? first_ : last_->next) = operation;
    last_ = operation;
  }

  /// Null when empty.
  Operation* pop() {
    Operation* const operation = first_;
    if (operation != nullptr) {
      first_ = operation->next;
      operation->next = nullptr;
    }
    return operation;
  }

  /// Moves operations to the front of `target`, as many as fit; returns how many.
  std::size_t pop_into(std::span<Operation*> target) {
    std::size_t count = 0;
    while (count < target.size() && !empty()) target[count++] = pop();
    return count;
  }

  /// Whether `operation` was in the list; it is not afterwards. Linear in the list's length.
  bool remove(Operation* operation) {
    Operation* previous = nullptr;
    for (Operation* it = first_; it != nullptr; previous = it, it = it->next) {
      if (it != operation) continue;
      (previous == nullptr ? first_ : previous->next) = it->next;
      if (last_ == it) last_ = previous;
      it->next = nullptr;
      return true;
    }
    return false;
  }

 private:
  Operation* first_ = nullptr;
  Operation* last_ = nullptr;
};

}  // namespace kvtier
