// Both doors, from the one table in ops.h: the dispatcher (torch.ops.apt_ext) and pybind11 (apt_ext._C).
#include <torch/extension.h>

#include <map>
#include <string>
#include <vector>

#include "ops.h"

namespace apt {
namespace {

// What pybind11 can hold of an argument while the call runs.
template <class T>
struct Held {
  using type = std::decay_t<T>;
};
template <>
struct Held<at::TensorList> {
  using type = std::vector<Tensor>;
};
template <>
struct Held<at::IntArrayRef> {
  using type = std::vector<int64_t>;
};

// Binds the op's typed dispatcher handle, so autograd, autocast and fake tensors see the call; the GIL is
// released.
template <class Return, class... Args, size_t... index>
void bind_op(py::module& m, const std::string& name, const std::string& schema, Return (*)(Args...),
             std::index_sequence<index...>) {
  auto op = c10::Dispatcher::singleton()
                .findSchemaOrThrow(("apt_ext::" + name).c_str(), "")
                .typed<Return(Args...)>();
  const auto& arguments = op.schema().arguments();
  m.def(
      name.c_str(), [op](typename Held<Args>::type... args) -> Return { return op.call(args...); },
      py::arg(arguments[index].name().c_str())..., py::call_guard<py::gil_scoped_release>(),
      (name + schema).c_str());
}

py::dict build_info() {
  py::dict info;
  info["version"] = APT_VERSION;
#ifdef APT_WITH_CUDA
  info["cuda"] = true;
  info["cuda_version"] = APT_CUDA_VERSION;
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
#endif
  std::vector<std::string> archs;
  std::string listed = APT_CUDA_ARCHS, arch;
  for (char c : listed + ";") {
    if (c != ';') {
      arch += c;
    } else if (!arch.empty()) {
      archs.push_back(std::exchange(arch, ""));
    }
  }
  info["cuda_archs"] = archs;
  info["torch_version"] = APT_TORCH_VERSION;
  info["cpu_capability"] = at::get_cpu_capability();
  return info;
}

}  // namespace

TORCH_LIBRARY(apt_ext, m) {
  for_each_op([&](const char* name, const char* schema, auto* function) {
    m.def((std::string(name) + schema).c_str(), {at::Tag::pt2_compliant_tag});
    for (auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::Meta}) {
      m.impl(name, torch::dispatch(key, function));
    }
  });
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Typed, positional doors to the ops of torch.ops.apt_ext, and build_info().";
  for_each_op([&](const char* name, const char* schema, auto* function) {
    [&]<class Return, class... Args>(Return (*typed)(Args...)) {
      bind_op(m, name, schema, typed, std::index_sequence_for<Args...>{});
    }(function);
  });
  m.def("build_info", &build_info,
        "What this build is: version, cuda, cuda_archs, cuda_version, torch_version, cpu_capability.");
}

}  // namespace apt
