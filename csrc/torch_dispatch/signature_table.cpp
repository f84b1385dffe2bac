#include "torch_dispatch/signature_table.hpp"

#include <utility>

namespace penstock::torch_dispatch {

namespace {

class Listener : public c10::OpRegistrationListener {
 public:
  explicit Listener(SignatureTable& table) : table_(table) {}
  void onOperatorRegistered(const c10::OperatorHandle&) override {}
  void onOperatorDeregistered(const c10::OperatorHandle& op) override { table_.forget(op); }

 private:
  SignatureTable& table_;
};

}  // namespace

SignatureTable::SignatureTable() {
  // Never destroyed: that would have to happen while the dispatcher still lives.
  static auto& registration = *new c10::RegistrationHandleRAII(
      c10::Dispatcher::singleton().addRegistrationListener(std::make_unique<Listener>(*this)));
  static_cast<void>(registration);
}

const Signature& SignatureTable::find(const c10::OperatorHandle& op) {
  const void* schema = &op.schema();
  const auto& head = heads_[bucket_of(schema)];
  if (const Node* node = search(head.load(std::memory_order_acquire), schema)) {
    return *node->signature;
  }
  return add(op, schema);
}

const Signature& SignatureTable::add(const c10::OperatorHandle& op, const void* schema) {
  auto signature = parse(op);  // takes locks of the dispatcher's, so not under ours
  const std::lock_guard lock(mutex_);
  auto& head = heads_[bucket_of(schema)];
  Node* first = head.load(std::memory_order_relaxed);
  if (const Node* node = search(first, schema)) return *node->signature;
  auto* node = new Node{schema, false, std::move(signature), first};  // for good
  head.store(node, std::memory_order_release);
  return *node->signature;
}

void SignatureTable::forget(const c10::OperatorHandle& op) {
  if (!op.hasSchema()) return;
  const void* schema = &op.schema();
  const std::lock_guard lock(mutex_);
  Node* first = heads_[bucket_of(schema)].load(std::memory_order_relaxed);
  if (Node* node = search(first, schema)) node->dead.store(true, std::memory_order_release);
}

}  // namespace penstock::torch_dispatch
