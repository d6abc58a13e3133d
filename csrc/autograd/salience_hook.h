// Record what salience is made of at one place of a model.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "../tensor.h"

namespace apt {

// Sums over tokens, [channels] each, of |h|, of |dL/dh| and, if asked for, of h with its sign. An activation
// counts when its gradient arrives, and only its sums wait for it.
class SalienceHook : public std::enable_shared_from_this<SalienceHook> {
 public:
  explicit SalienceHook(bool is_signed) : is_signed_(is_signed) {}

  // Record h [..., channels]. Without gradients it is passed over, and so is one that came before and comes
  // again in a backward (a non-reentrant checkpoint recomputes with the very input of the forward).
  //   tokens    [...] bool: those that count. Where the shape is another, all do, and false comes back.
  //   position  [all channels] int32: where in h a channel lies; below 0: not there, a zero. For neighbours
  //             that hand over kept channels alone.
  bool record(const Tensor& h, const OptTensor& tokens, const OptTensor& position);

  // Return the sums since the last reset, of all activations whose gradient has come; empty if none has.
  std::vector<Tensor> sums() const;
  bool has_gradients() const;
  void reset();

  // Add to the sums what came with another gradient: as many, of the same shapes.
  void add(std::vector<Tensor> found);

 private:
  bool is_new(const Tensor& h);

  const bool is_signed_;
  mutable std::mutex mutex_;  // gradients arrive on the backward's threads
  std::vector<Tensor> sums_;
  // What was recorded and is still there. A tensor that was written in place since has another node.
  struct Known {
    c10::weak_intrusive_ptr<at::TensorImpl> tensor;
    const void* node;
  };
  std::vector<Known> known_;
};

}  // namespace apt
