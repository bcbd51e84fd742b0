// module.cpp: rfkernels._C, one function per op of the C ABI and a few questions about the build.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "attention.h"
#include "fast_calls.h"
#include "projected_update.h"
#include "rfk/rfk.h"
#include "views.h"

namespace py = pybind11;
using rfk_python::Call;

namespace {

constexpr const char* kIsaNames[RFK_ISA_COUNT] = {"baseline", "avx2", "avx512", "amx"};
constexpr const char* kOpNames[RFK_OP_COUNT] = {"ode_step", "interpolate", "flow_loss", "random", "quantize",
                                                "attention", "projected_update"};

int32_t index_of(const char* what, const std::string& name, const char* const* names, int32_t count) {
  std::string known;
  for (int32_t i = 0; i < count; ++i) {
    if (name == names[i]) return i;
    known += (i > 0 ? ", " : "") + std::string(names[i]);
  }
  throw py::value_error(std::string(what) + " must be one of " + known + "; got '" + name + "'");
}

void euler_step(py::object x, py::object v, py::object v_uncond, py::object dt, py::object guidance, py::object out,
                py::object cast) {
  Call call("euler_step");
  const rfk_tensor* vx = call.tensor(x, "x");
  const rfk_tensor* vv = call.tensor(v, "v");
  const rfk_tensor* vu = call.tensor(v_uncond, "v_uncond");
  const rfk_tensor* vo = call.tensor(out, "out");
  const rfk_tensor* vc = call.tensor(cast, "cast");
  const rfk_scalar step = call.scalar(dt, "dt"), scale = call.scalar(guidance, "guidance_scale");
  call.run([&](const rfk_device& device) { return rfk_euler_step(&device, vx, vv, vu, &step, &scale, vo, vc); });
}

void taylor_step(py::object x, py::tuple derivatives, py::object dt, py::object out, py::object cast) {
  Call call("taylor_step");
  const rfk_tensor* vx = call.tensor(x, "x");
  rfk_tensor views[3];
  if (derivatives.size() > 3) throw py::value_error("taylor_step: derivatives must be 1 to 3 tensors");
  for (size_t k = 0; k < derivatives.size(); ++k) views[k] = *call.tensor(derivatives[k], "derivatives");
  const rfk_tensor* vo = call.tensor(out, "out");
  const rfk_tensor* vc = call.tensor(cast, "cast");
  const rfk_scalar step = call.scalar(dt, "dt");
  call.run([&](const rfk_device& device) {
    return rfk_taylor_step(&device, vx, views, static_cast<int32_t>(derivatives.size()), &step, vo, vc);
  });
}

void linear_step(py::object x, py::tuple tensors, py::object x_coefficient, py::tuple coefficients, py::object noise,
                 py::object out, py::object cast) {
  Call call("linear_step");
  const size_t count = tensors.size();
  if (count > RFK_MAX_TERMS || coefficients.size() != count) {
    throw py::value_error("linear_step: as many coefficients as tensors, at most 8");
  }
  const rfk_tensor* vx = call.tensor(x, "x");
  rfk_tensor views[RFK_MAX_TERMS];
  rfk_scalar factors[RFK_MAX_TERMS];
  for (size_t k = 0; k < count; ++k) {
    views[k] = *call.tensor(tensors[k], "tensors");
    factors[k] = call.scalar(coefficients[k], "coefficients");
  }
  const rfk_tensor* vo = call.tensor(out, "out");
  const rfk_tensor* vc = call.tensor(cast, "cast");
  const rfk_scalar c0 = call.scalar(x_coefficient, "x_coefficient");
  rfk_noise draw{};
  rfk_scalar scale{};
  if (!noise.is_none()) {
    const py::tuple parts(noise);  // (scale, seed, offset)
    scale = call.scalar(parts[0], "noise_scale");
    draw = call.noise(parts[1], parts[2]);
  }
  call.run([&](const rfk_device& device) {
    return rfk_linear_step(&device, vx, &c0, views, factors, static_cast<int32_t>(count), &draw, &scale, vo, vc);
  });
}

rfk_noise noise_unless(Call& call, const rfk_tensor* given, py::handle seed, py::handle offset) {
  return given != nullptr || seed.is_none() ? rfk_noise{} : call.noise(seed, offset);
}

void interpolate(py::object x1, py::object x0, py::object t, int32_t path, py::object custom, py::object seed,
                 py::object offset, py::object xt, py::object target, py::object x0_out) {
  Call call("interpolate");
  const rfk_tensor* v1 = call.tensor(x1, "x1");
  const rfk_tensor* v0 = call.tensor(x0, "x0");
  const rfk_tensor* vt = call.tensor(xt, "xt");
  const rfk_tensor* vg = call.tensor(target, "target");
  const rfk_tensor* vs = call.tensor(x0_out, "x0_out");
  rfk_scalar coefficients[4]{};
  if (path == RFK_PATH_CUSTOM) {
    const py::tuple parts(custom);
    if (parts.size() != 4) throw py::value_error("interpolate: a custom path needs four coefficients");
    for (size_t k = 0; k < 4; ++k) coefficients[k] = call.scalar(parts[k], "path coefficients");
  }
  const rfk_scalar time = call.scalar(t, "t");
  const rfk_noise noise = noise_unless(call, v0, seed, offset);
  call.run([&](const rfk_device& device) {
    return rfk_interpolate(&device, v1, v0, &noise, &time, path, coefficients, vt, vg, vs);
  });
}

void flow_loss(py::object prediction, py::object target, py::object x0, py::object x1, py::object seed,
               py::object offset, py::object weight, int32_t kind, double c, double grad_scale, py::object losses,
               py::object grad, uintptr_t workspace) {
  Call call("flow_loss");
  const rfk_tensor* vp = call.tensor(prediction, "prediction");
  const rfk_tensor* vt = call.tensor(target, "target");
  const rfk_tensor* v0 = call.tensor(x0, "x0");
  const rfk_tensor* v1 = call.tensor(x1, "x1");
  const rfk_tensor* vl = call.tensor(losses, "losses");
  const rfk_tensor* vg = call.tensor(grad, "grad");
  const rfk_scalar factor = call.scalar(weight, "weight");
  const bool weighted = !weight.is_none();
  const rfk_noise noise = noise_unless(call, vt != nullptr ? vt : v0, seed, offset);
  std::vector<double> own;  // on the CPU; device memory is the caller's
  double* sums = reinterpret_cast<double*>(workspace);
  if (sums == nullptr && vp != nullptr && vp->ndim > 0 && call.device().type == RFK_CPU) {
    int64_t elements = 1;
    for (int32_t d = 1; d < vp->ndim; ++d) elements *= vp->shape[d];
    own.resize(static_cast<size_t>(rfk_flow_loss_workspace(vp->shape[0], elements)));
    sums = own.data();
  }
  call.run([&](const rfk_device& device) {
    return rfk_flow_loss(&device, vp, vt, v0, v1, &noise, weighted ? &factor : nullptr, kind, c, grad_scale, vl, vg, sums);
  });
}

void random_fill(py::object out, py::object seed, py::object offset, int32_t distribution) {
  Call call("random");
  const rfk_tensor* view = call.tensor(out, "out");
  const rfk_noise noise = call.noise(seed, offset);
  call.run([&](const rfk_device& device) { return rfk_random(&device, &noise, distribution, view); });
}

py::tuple philox4x32(py::tuple counter, py::tuple key) {
  uint32_t c[4], k[2], w[4];
  for (size_t i = 0; i < 4; ++i) c[i] = counter[i].cast<uint32_t>();
  for (size_t i = 0; i < 2; ++i) k[i] = key[i].cast<uint32_t>();
  rfk_philox4x32(c, k, w);
  return py::make_tuple(w[0], w[1], w[2], w[3]);
}

py::dict launch_counts() {
  py::dict counts;
  for (int32_t op = 0; op < RFK_OP_COUNT; ++op) {
    for (int32_t isa = 0; isa < RFK_ISA_COUNT; ++isa) {
      if (isa == RFK_ISA_AMX && op != RFK_OP_QUANTIZE && op != RFK_OP_ATTENTION) continue;  // nothing of these for the tile unit
      counts[py::make_tuple(kOpNames[op], kIsaNames[isa])] = rfk_launch_count(op, isa);
    }
    counts[py::make_tuple(kOpNames[op], "cuda")] = rfk_launch_count(op, -1);
  }
  return counts;
}

void cap_isa(const std::string& level) {
  if (rfk_isa_cap(index_of("isa level", level, kIsaNames, RFK_ISA_COUNT)) != RFK_OK) {
    throw py::value_error(rfk_last_error());
  }
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of rfkernels; the public functions are in rfkernels.ops.";
  m.def("euler_step", &euler_step);
  m.def("taylor_step", &taylor_step);
  m.def("linear_step", &linear_step);
  m.def("interpolate", &interpolate);
  m.def("flow_loss", &flow_loss);
  m.def("random", &random_fill);
  rfk_python::define_attention(m);
  rfk_python::define_projected_update(m);
  rfk_python::define_fast_step(m);
  m.def("fast_interpolate", &rfk_python::fast_interpolate);
  m.def("flow_loss_workspace", &rfk_flow_loss_workspace, "Doubles of workspace that flow_loss needs.");
  m.def("philox4x32", &philox4x32, "The four words of one counter.");
  m.def("launch_counts", &launch_counts, "How often each launcher ran: {(op, isa or 'cuda'): count}.");
  m.def("isa_detected", [] { return std::string(kIsaNames[rfk_isa_detected()]); });
  m.def("isa_used", [] { return std::string(kIsaNames[rfk_isa_used()]); });
  m.def("attention_isa", [] { return std::string(kIsaNames[rfk_attention_isa()]); });
  m.def("cap_isa", &cap_isa, "Lower the instruction set level; 'amx' lifts the cap.");
  m.def("max_threads", &rfk_max_threads);
  m.def("has_openmp", [] { return rfk_has_openmp() != 0; });
  m.def("has_cuda", [] { return rfk_has_cuda() != 0; });
  m.def("cuda_archs", [] { return std::string(rfk_cuda_archs()); });
  m.def("use_exchange_api", &rfk_python::use_exchange_api, "Tensors by DLPack's C table (default) or by attributes.");
  m.def("exchange_api_in_use", &rfk_python::exchange_api_in_use);
  m.attr("MAX_DIMS") = RFK_MAX_DIMS;
}
