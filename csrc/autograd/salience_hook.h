#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace apt {

using at::Tensor;

// What salience hears at one place of a model: sums over tokens, [channels] each, of |h|, of |dL/dh| and, if
// asked for, of h with its sign. An activation counts when its gradient arrives, and only its sums wait for
// it.
class Listener : public std::enable_shared_from_this<Listener> {
 public:
  explicit Listener(bool is_signed) : is_signed_(is_signed) {}

  // h [..., channels] has come; without gradients it is passed over, and so is one that came before and comes
  // again in a backward (a non-reentrant checkpoint recomputes with the very input of the forward). tokens
  // [...] (bool): those that count; where the shape is another, all do, and false comes back. position [all
  // channels] (int32): where in h a channel lies, below 0: not there, a zero; for neighbours that hand over
  // kept lanes alone.
  bool hear(const Tensor& h, const std::optional<Tensor>& tokens, const std::optional<Tensor>& position);

  // Since the last `forget`, of all whose gradient has come; empty if none has.
  std::vector<Tensor> sums() const;
  bool heard() const;
  void forget();

 private:
  void add(std::vector<Tensor> found);
  bool is_new(const Tensor& h);

  const bool is_signed_;
  mutable std::mutex mutex_;  // gradients arrive on the backward's threads
  std::vector<Tensor> sums_;
  // What was heard and is still there; a tensor that was written in place since has another node.
  struct Known {
    c10::weak_intrusive_ptr<at::TensorImpl> tensor;
    const void* node;
  };
  std::vector<Known> known_;
};

}  // namespace apt
