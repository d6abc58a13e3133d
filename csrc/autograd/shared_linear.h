// Layers that read the same x and are called one by one: the first call computes the outputs of all in one
// autograd node, and the others are handed theirs.
#pragma once

#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

#include <functional>
#include <memory>
#include <vector>

#include "../backend.h"
#include "../ops/shared_linear.h"

namespace apt {

// A pointer that does not keep an autograd node alive, whichever kind of pointer this torch owns nodes by.
template <class Pointer>
struct WeakPointer;
template <class T>
struct WeakPointer<std::shared_ptr<T>> {
  using type = std::weak_ptr<T>;
};
template <class T>
struct WeakPointer<c10::intrusive_ptr<T>> {
  using type = c10::weak_intrusive_ptr<T>;
};
using NodePointer = decltype(torch::autograd::Edge::function);
using WeakNode = WeakPointer<NodePointer>::type;

// A tensor as it was. It is not kept alive.
class SeenTensor {
 public:
  explicit SeenTensor(const OptTensor& tensor);
  bool is_still(const OptTensor& tensor) const;

 private:
  bool is_there_;
  c10::weak_intrusive_ptr<at::TensorImpl> tensor_;
  const void* data_ = nullptr;  // which an assignment to .data changes, and no counter
  int64_t count_ = 0;
  uint32_t version_ = 0;
  bool requires_grad_ = false;
};

// Modes and the stream that a call runs under.
struct CallState {
  bool grad, autocast;
  at::ScalarType autocast_dtype;
  Stream stream;

  static CallState of(const Tensor& x);
  bool operator==(const CallState&) const = default;
};

// The outputs of layers that were computed together and not handed out yet: plain values, which hold neither
// the graph nor x. A layer whose output nobody takes has no part in the graph, as if it had not been computed.
class SharedOutputs {
 public:
  // Null where nothing is shared: fewer than two layers fit x, it would not pay (unless `always`), or the
  // call is one that needs each layer's own op (tracing, torch.func, dual numbers, inference tensors). A layer
  // that drops gets its rng from `draw`, in their order. Either all layers learn or none: one node would make
  // the output of a frozen one require a gradient as well.
  static std::shared_ptr<SharedOutputs> compute(const Tensor& x, std::vector<SharedLayer> layers, bool always,
                                                const std::function<Tensor()>& draw);

  // The output of layer i for this call, once; none where it was not computed or is another by now.
  OptTensor take(size_t i, const Tensor& x, const SharedLayer& layer);

 private:
  struct Output {
    size_t layer;
    Tensor y;
    std::vector<SeenTensor> seen;  // of the layer
    double scaling, dropout;
    std::vector<torch::autograd::Edge> edges;  // of its inputs, which the node gets when it is taken
    size_t first_input;                        // the first of them among the node's
  };

  // state: of the call, before autocast is excluded from what it computes.
  SharedOutputs(const Tensor& x, const std::vector<SharedLayer>& layers, const std::vector<size_t>& taken,
                const CallState& state);

  SeenTensor x_;
  CallState state_;
  std::vector<Output> outputs_;
  std::optional<WeakNode> node_;  // none without gradients
  NodePointer untaken_;           // the same, until the first output is taken
};

}  // namespace apt
