// Check arguments. Every message names the argument, what was expected and what came.
// TORCH_CHECK_VALUE raises ValueError, TORCH_CHECK_TYPE TypeError, TORCH_CHECK RuntimeError.
#pragma once

#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "tensor.h"

namespace apt {

inline bool is_compute_dtype(at::ScalarType t) {
  return t == at::kDouble || t == at::kFloat || t == at::kHalf || t == at::kBFloat16;
}

// Make text of numbers here and not in a stream: a SymInt's own operator<< lives in another library, and a
// C++ runtime linked into this one would hand it a stream it cannot use (seen with a static libstdc++).
inline std::string text(const c10::SymInt& value) {
  auto known = value.maybe_as_int();
  return known.has_value() ? std::to_string(*known) : value.toSymNode()->str();
}

inline std::string text(c10::SymIntArrayRef sizes) {
  std::string out = "[";
  for (const c10::SymInt& size : sizes) out += (out.size() > 1 ? ", " : "") + text(size);
  return out + "]";
}

// "grads[3]", put together only when a message needs it.
struct Indexed {
  const char* list;
  size_t index;
  friend std::ostream& operator<<(std::ostream& out, const Indexed& name) {
    return out << name.list << '[' << std::to_string(name.index) << ']';
  }
};

// Name a dtype as Python spells it.
inline const char* name_of(at::ScalarType t) {
  switch (t) {
    case at::kDouble:
      return "float64";
    case at::kFloat:
      return "float32";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    default:
      return c10::toString(t);
  }
}

template <class Name>
void check_strided(const Tensor& tensor, const Name& name) {
  TORCH_CHECK_TYPE(tensor.defined(), name, " must be a Tensor, got None");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && !tensor.is_nested(), name,
                   " must be a dense strided tensor, got ",
                   tensor.is_nested() ? "a nested tensor" : c10::str("layout ", tensor.layout()));
}

template <class Name>
void check_floating(const Tensor& tensor, const Name& name) {
  TORCH_CHECK_TYPE(is_compute_dtype(tensor.scalar_type()), name,
                   " must be float64, float32, float16 or bfloat16, got ", name_of(tensor.scalar_type()));
}

inline void check_same_dtype(const Tensor& tensor, const char* name, const Tensor& like,
                             const char* like_name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), name, " must have ", like_name, "'s dtype ",
                   name_of(like.scalar_type()), ", got ", name_of(tensor.scalar_type()));
}

// Low-rank factors and masks: the base's dtype, or float32 over a 16-bit base (masks: over any base).
template <class Name>
void check_dtype_or_float32(const Tensor& tensor, const Name& name, at::ScalarType base, bool over_any) {
  bool wide_ok = over_any || base == at::kHalf || base == at::kBFloat16;
  TORCH_CHECK_TYPE(tensor.scalar_type() == base || (wide_ok && tensor.scalar_type() == at::kFloat), name,
                   " must have dtype ", name_of(base), wide_ok && base != at::kFloat ? " or float32" : "",
                   ", got ", name_of(tensor.scalar_type()));
}

// Where the layer agrees with itself it is x that does not fit, and not what it is held against first.
inline void check_dtype_of_x(const Tensor& x, const OptTensor& weight, const char* weight_name,
                             const Tensor& A, const Tensor& B) {
  auto sixteen = [](at::ScalarType t) { return t == at::kHalf || t == at::kBFloat16; };
  at::ScalarType own = weight.has_value() ? weight->scalar_type() : A.scalar_type();
  if (x.scalar_type() == own || (!weight.has_value() && sixteen(x.scalar_type()) && own == at::kFloat))
    return;
  auto fits = [&](at::ScalarType t) {
    return t == own || (weight.has_value() && sixteen(own) && t == at::kFloat);
  };
  TORCH_CHECK_TYPE(
      !is_compute_dtype(own) || !fits(A.scalar_type()) || !fits(B.scalar_type()), "x must have dtype ",
      name_of(own), " to fit ", weight.has_value() ? weight_name : "lora_A",
      weight.has_value() ? ", lora_A and lora_B, got " : " and lora_B, got ", name_of(x.scalar_type()));
}

template <class Name, class LikeName>
void check_same_device(const Tensor& tensor, const Name& name, const Tensor& like,
                       const LikeName& like_name) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, " must be on ", like_name, "'s device ",
                    like.device().str(), ", got ", tensor.device().str());
}

// Expected reads like "[N=4096, R=8]". The fault may as well lie with the tensors that it is held against:
// `fit` says which they are.
template <class Fit>
void check_matrix(const Tensor& tensor, const char* name, const char* rows_name, const c10::SymInt& rows,
                  const char* cols_name, const c10::SymInt& cols, const Fit& fit) {
  bool fits = tensor.dim() == 2;
  fits = fits && tensor.sym_size(0) == rows && tensor.sym_size(1) == cols;
  TORCH_CHECK_VALUE(fits, name, " must have shape [", rows_name, "=", text(rows), ", ", cols_name, "=",
                    text(cols), "] to fit ", fit(), ", got ", text(tensor.sym_sizes()));
}

// "weight [19, 24]"
inline std::string sized(const char* name, const Tensor& tensor) {
  return name + (" " + text(tensor.sym_sizes()));
}

template <class Name>
void check_vector(const Tensor& tensor, const Name& name, const char* size_name, const c10::SymInt& size) {
  bool fits = tensor.dim() == 1;
  fits = fits && tensor.sym_size(0) == size;
  TORCH_CHECK_VALUE(fits, name, " must have shape [", size_name, "=", text(size), "], got ",
                    text(tensor.sym_sizes()));
}

template <class Name, class LikeName>
void check_mask(const OptTensor& mask, const Name& name, const char* size_name, const c10::SymInt& size,
                const Tensor& like, const LikeName& like_name) {
  if (!mask.has_value()) return;
  check_strided(*mask, name);
  check_same_device(*mask, name, like, like_name);
  check_dtype_or_float32(*mask, name, like.scalar_type(), /*over_any=*/true);
  check_vector(*mask, name, size_name, size);
}

// The memory of a tensor with elements, first byte to one past the last: two that do not meet share nothing.
struct Extent {
  const char *begin, *end;
  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
};

inline Extent extent(const Tensor& tensor) {
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return {begin, begin + (tensor.numel() == 0 ? 0 : (last + 1) * tensor.element_size())};
}

// Each dimension, smallest stride first, must step over all that the ones before it reach. Stricter than no
// overlap: layouts that interleave exactly (as_strided can make them) are refused too.
template <class Name>
void check_no_self_overlap(const Tensor& tensor, const Name& name) {
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) > 1) steps.emplace_back(tensor.stride(dim), tensor.size(dim) - 1);
  }
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;
  for (auto [stride, count] : steps) {
    TORCH_CHECK(
        stride > reach, name,
        " is written, so no two of its elements may share memory, but more than one of them refers to "
        "a single memory location (expanded or overlapping); expected a tensor of its own, .clone() "
        "makes one");
    reach += stride * count;
  }
}

template <class Name>
void check_constant(const char* op, const OptTensor& tensor, const Name& name) {
  TORCH_CHECK(!(tensor.has_value() && tensor->requires_grad() && at::GradMode::is_enabled()), op, ": ", name,
              " is a constant here and has no gradient, but it requires one; expected ", name,
              ".requires_grad to be False (detach it), got True");
}

}  // namespace apt
