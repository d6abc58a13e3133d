// Register every op of op_table.h with the dispatcher (torch.ops.apt_ext), and bind it with pybind11
// (apt_ext._C).
#include <ATen/SequenceNumber.h>
#include <ATen/Version.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "autograd/salience_hook.h"
#include "autograd/shared_linear.h"
#include "device.h"
#include "op_table.h"
#include "ops/channel_sums.h"
#include "ops/mask_values.h"
#include "ops/sharing.h"
#include "routes/plan.h"

namespace apt {
namespace {

// The type that holds an argument in pybind11 while the call runs.
template <class T>
struct Held {
  using type = std::decay_t<T>;
};
template <>
struct Held<at::TensorList> {
  using type = std::vector<Tensor>;
};
template <>
struct Held<c10::SymIntArrayRef> {
  using type = std::vector<c10::SymInt>;
};
template <>
struct Held<at::IntArrayRef> {
  using type = std::vector<int64_t>;
};

// Bind the op's typed dispatcher handle, so that autograd, autocast and fake tensors see the call. The GIL is
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

// The thread that an autograd node was made in, and its number there: nodes count up in each thread by
// itself.
using AutogradSequence = std::pair<uint64_t, uint64_t>;

AutogradSequence autograd_sequence() {
  return {at::RecordFunction::currentThreadId(), at::sequence_number::peek()};
}

std::optional<AutogradSequence> node_sequence() {
  auto node = torch::autograd::get_current_node();
  return node ? std::optional(AutogradSequence{node->thread_id(), node->sequence_nr()}) : std::nullopt;
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
  std::istringstream listed(APT_CUDA_ARCHS);
  for (std::string arch; std::getline(listed, arch, ';');)
    if (!arch.empty()) archs.push_back(arch);
  info["cuda_archs"] = archs;
  info["torch_version"] = APT_TORCH_VERSION;
  info["cpu_capability"] = at::get_cpu_capability();
  return info;
}

// Plan a layer on a GPU with these properties, without one: for tests, and to see what a shape gets.
void bind_plan(py::module& m) {
  using Route = LinearPlan::Route;
  py::class_<LinearPlan>(m, "LinearPlan")
      .def_property_readonly(
          "route", [](const LinearPlan& p) { return p.route == Route::kPasses ? "passes" : "library"; })
      .def_readonly("padded", &LinearPlan::padded)
      .def_readonly("rows", &LinearPlan::rows)
      .def_readonly("up_splits_N", &LinearPlan::up_splits_N)
      .def_readonly("up_splits_K", &LinearPlan::up_splits_K)
      .def_readonly("span_N", &LinearPlan::span_N)
      .def_readonly("span_K", &LinearPlan::span_K)
      .def("__repr__", &LinearPlan::str);
  m.def(
      "launch_plan",
      [](int64_t M, int64_t N, int64_t K, int64_t R, const std::string& dtype, int capability,
         int multiprocessors, int64_t shared_bytes) {
        const std::map<std::string, DType> types{{"float64", DType::kFloat64},
                                                 {"float32", DType::kFloat32},
                                                 {"float16", DType::kFloat16},
                                                 {"bfloat16", DType::kBFloat16}};
        auto type = types.find(dtype);
        TORCH_CHECK_VALUE(type != types.end(), "dtype must be float64, float32, float16 or bfloat16, got ",
                          dtype);
        return launch_plan({M, N, K, R, type->second}, {capability, multiprocessors, shared_bytes});
      },
      py::arg("M"), py::arg("N"), py::arg("K"), py::arg("R"), py::arg("dtype") = "bfloat16",
      py::arg("capability") = 90, py::arg("multiprocessors") = 132, py::arg("shared_bytes") = 232448,
      "How apt_linear of this shape is computed on a GPU with these properties (default: an H100 or H200).");
}

void bind_salience_hook(py::module& m) {
  py::class_<SalienceHook, std::shared_ptr<SalienceHook>>(m, "Listener",
                                                          "What salience hears at one place of a model.")
      .def(py::init<bool>(), py::arg("is_signed") = false)
      .def("hear", &SalienceHook::record, py::arg("h"), py::arg("tokens") = py::none(),
           py::arg("position") = py::none(), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("heard", &SalienceHook::has_gradients)
      .def("sums", &SalienceHook::sums, py::call_guard<py::gil_scoped_release>())
      .def("add", &SalienceHook::add, py::arg("found"), py::call_guard<py::gil_scoped_release>())
      .def("forget", &SalienceHook::reset, py::call_guard<py::gil_scoped_release>());
}

void bind_shared_linear(py::module& m) {
  // weight, bias, lora_A, lora_B, mask_out, scaling, dropout
  using Loose = std::tuple<OptTensor, OptTensor, Tensor, Tensor, OptTensor, double, double>;
  static constexpr auto layer_of = [](Loose loose) {
    return std::make_from_tuple<SharedLayer>(
        std::tuple_cat(std::move(loose), std::tuple<OptTensor>(std::nullopt)));
  };
  py::class_<SharedOutputs, std::shared_ptr<SharedOutputs>>(
      m, "SharedOutputs", "Outputs of layers that read one x, computed together and not handed out yet.")
      .def(
          "take",
          [](SharedOutputs& outputs, size_t i, const Tensor& x, Loose layer) {
            return outputs.take(i, x, layer_of(std::move(layer)));
          },
          py::arg("i"), py::arg("x"), py::arg("layer"), py::call_guard<py::gil_scoped_release>(),
          "The output of layer i, once; None where it was not computed, or not for what is given now.");
  m.def(
      "shared_linear",
      [](const Tensor& x, std::vector<Loose> loose, bool always, const py::object& rng) {
        std::vector<SharedLayer> layers;
        for (Loose& layer : loose) layers.push_back(layer_of(std::move(layer)));
        const auto draw = [&] {
          py::gil_scoped_acquire gil;
          return rng(x).cast<Tensor>();
        };
        py::gil_scoped_release no_gil;
        return SharedOutputs::compute(x, std::move(layers), always, draw);
      },
      py::arg("x"), py::arg("layers"), py::arg("always"), py::arg("rng"),
      "apt_linear of layers (weight, bias, lora_A, lora_B, mask_out, scaling, dropout) that read one x; None "
      "where each is to be computed alone. always: also where sharing saves nothing. rng(x) is called for each "
      "layer that drops.");
}

}  // namespace

// The first three have kernels. The others reach the same checks, which refuse their layout in words.
constexpr c10::DispatchKey kBackends[] = {c10::DispatchKey::CPU,
                                          c10::DispatchKey::CUDA,
                                          c10::DispatchKey::Meta,
                                          c10::DispatchKey::SparseCPU,
                                          c10::DispatchKey::SparseCUDA,
                                          c10::DispatchKey::SparseMeta,
                                          c10::DispatchKey::SparseCsrCPU,
                                          c10::DispatchKey::SparseCsrCUDA,
                                          c10::DispatchKey::SparseCsrMeta,
                                          c10::DispatchKey::QuantizedCPU,
                                          c10::DispatchKey::QuantizedCUDA,
                                          c10::DispatchKey::QuantizedMeta,
                                          c10::DispatchKey::NestedTensorCPU,
                                          c10::DispatchKey::NestedTensorCUDA,
                                          c10::DispatchKey::NestedTensorMeta,
                                          c10::DispatchKey::MkldnnCPU};

TORCH_LIBRARY(apt_ext, m) {
  for_each_op([&](const char* name, const char* schema, auto* function) {
    m.def((std::string(name) + schema).c_str(), {at::Tag::pt2_compliant_tag});
    for (auto key : kBackends) m.impl(name, torch::dispatch(key, function));
  });
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Typed, positional doors to the ops of torch.ops.apt_ext, and build_info().";
  for_each_op([&](const char* name, const char* schema, auto* function) {
    [&]<class Return, class... Args>(Return (*typed)(Args...)) {
      bind_op(m, name, schema, typed, std::index_sequence_for<Args...>{});
    }(function);
  });
  bind_plan(m);
  bind_salience_hook(m);
  bind_shared_linear(m);
  m.def("next_moment", &autograd_sequence,
        "(thread, sequence number) that the next autograd node made here will have.");
  m.def("node_moment", &node_sequence,
        "(thread, sequence number) of the autograd node that runs here, or None.");
  m.def("channel_sums", &channel_sums, py::arg("values"), py::arg("tokens"), py::arg("is_signed"),
        py::call_guard<py::gil_scoped_release>(),
        "Sums of |values| (or values) [..., channels] over the tokens [...] that count (bool, or None): no "
        "gradient.");
  m.def(
      "merge_all", &merge_all, py::arg("weights"), py::arg("lora_A"), py::arg("lora_B"), py::arg("scalings"),
      py::arg("masks_in"), py::arg("masks_out"), py::call_guard<py::gil_scoped_release>(),
      "Merge each pair of factors into its weight in place; all, or none where one would not be finite: its "
      "index, else -1.");
  m.def("check_gpu", &check_gpu, py::arg("gpu"), py::arg("major"), py::arg("minor"), py::arg("archs"),
        "RuntimeError unless a build for these architectures (8.0;9.0a;9.0+PTX) has code for the GPU.");
  m.def("all_ones", &all_ones, py::arg("first"), py::arg("second"),
        "Whether every entry of these masks on the CPU is 1; None is.");
  m.def("sharing", &sharing, py::arg("tensor"), py::arg("others"),
        "The places in `others` of what is this tensor or shares memory with it.");
  m.def("same_masks", &same_masks, py::arg("first"), py::arg("first_before"), py::arg("second"),
        py::arg("second_before"), "Whether two masks on the CPU hold the values of two others.");
  m.def("build_info", &build_info,
        "What this build is: version, cuda, cuda_archs, cuda_version, torch_version, cpu_capability.");
}

}  // namespace apt
