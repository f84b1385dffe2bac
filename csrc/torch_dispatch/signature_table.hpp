// The signatures of the operators seen so far, found by the address of their schema.
//
// A hash table of fixed size whose buckets are lists that only grow at their heads: readers take no
// lock, writers take one. An operator that is taken out of the dispatcher gives its address free
// for another one; its node is marked dead then, by a listener that the dispatcher calls, and
// stays.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "torch_dispatch/signature.hpp"

namespace penstock::torch_dispatch {

/// Reads an operator's signature from its schema.
std::unique_ptr<Signature> parse(const c10::OperatorHandle& op);

class SignatureTable {
 public:
  /// Listens to the dispatcher for the life of the process; the table must not be destroyed.
  SignatureTable();
  SignatureTable(const SignatureTable&) = delete;
  SignatureTable& operator=(const SignatureTable&) = delete;

  const Signature& find(const c10::OperatorHandle& op);
  /// The operator is about to leave the dispatcher.
  void forget(const c10::OperatorHandle& op);

 private:
  struct Node {
    const void* schema;
    std::atomic<bool> dead;
    std::unique_ptr<Signature> signature;
    Node* next;
  };
  static constexpr std::size_t kBuckets = 4096;

  static std::size_t bucket_of(const void* schema) {
    const auto address = reinterpret_cast<std::uintptr_t>(schema);
    return static_cast<std::size_t>((address >> 4) * 0x9E3779B97F4A7C15ULL >> 52);
  }
  static Node* search(Node* node, const void* schema) {
    for (; node != nullptr; node = node->next) {
      if (node->schema == schema && !node->dead.load(std::memory_order_acquire)) return node;
    }
    return nullptr;
  }
  const Signature& add(const c10::OperatorHandle& op, const void* schema);

  std::array<std::atomic<Node*>, kBuckets> heads_{};
  std::mutex mutex_;  // of writers
};

}  // namespace penstock::torch_dispatch
