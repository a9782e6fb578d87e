// fastagg._host: torch-free helpers over numpy buffers, and what the package was built with.
#include <pybind11/pybind11.h>

#include "plan.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
      PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_PATCH);
  info["version"] = FASTAGG_VERSION;
  info["torch"] = FASTAGG_TORCH_VERSION;
  info["torch_target"] = "2.11";
  info["cuda"] = FASTAGG_CUDA;  // "built", or why not
  info["cuda_architectures"] = FASTAGG_CUDA_ARCHITECTURES;
  info["nvcc"] = FASTAGG_NVCC_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Plan builder and build information of fastagg; knows nothing of torch.";
  module.def("build_plan", &fastagg::host::build_plan, pybind11::arg("tables"),
             pybind11::arg("modules"), pybind11::arg("scales"), pybind11::arg("bucket"),
             pybind11::arg("place"), pybind11::arg("lengths"),
             "Which client's factors land in which rows of which bucket's slabs.");
  module.def("build_info", &build_info, "What the compiled parts were built with and for.");
}
