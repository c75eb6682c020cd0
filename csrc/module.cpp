// The Python module _soflow_C: launchers over addresses, a device and a stream, all integers. Callers check.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "multi_tensor.h"

namespace py = pybind11;
using Address = uint64_t;

namespace {

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

soflow::Tables tables(Address records, Address gradients, Address averages, Address chunks, Address steps,
                      Address groups, Address profiles, Address policy, Address partials, Address counters,
                      Address norms, int64_t num_tensors, int64_t num_averages, int64_t num_chunks) {
  return {pointer<const soflow::Record>(records),
          pointer<const uint64_t>(gradients),
          pointer<const uint64_t>(averages),
          pointer<const soflow::Chunk>(chunks),
          pointer<float>(steps),
          pointer<const soflow::Group>(groups),
          pointer<const soflow::Profile>(profiles),
          pointer<const soflow::Policy>(policy),
          pointer<double>(partials),
          pointer<soflow::Counters>(counters),
          pointer<soflow::Norms>(norms),
          num_tensors,
          num_averages,
          num_chunks};
}

void norm(const soflow::Tables& tables, int device, Address stream) {
  soflow::launch_norm(tables, device, pointer<void>(stream));
}

void update(const soflow::Tables& tables, bool norm_known, int device, Address stream) {
  soflow::launch_update(tables, norm_known, device, pointer<void>(stream));
}

void write_words(Address to, const std::vector<uint64_t>& words, int device, Address stream) {
  soflow::launch_write(pointer<uint64_t>(to), words.data(), static_cast<int64_t>(words.size()), device,
                       pointer<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_soflow_C, module) {
  module.doc() = "CUDA launchers of soflow.kernels.multi_tensor, which checks their arguments.";
  module.attr("__version__") = SOFLOW_VERSION;
  module.attr("CHUNK") = soflow::kChunk;
  module.attr("MAX_AVERAGES") = soflow::kMaxAverages;
  py::class_<soflow::Tables>(module, "Tables", "Addresses of the tables in device memory; see csrc/tables.h.")
      .def(py::init(&tables), py::kw_only(), py::arg("records"), py::arg("gradients"), py::arg("averages"),
           py::arg("chunks"), py::arg("steps"), py::arg("groups"), py::arg("profiles"), py::arg("policy"),
           py::arg("partials"), py::arg("counters"), py::arg("norms"), py::arg("num_tensors"), py::arg("num_averages"),
           py::arg("num_chunks"));
  module.def("norm", &norm, py::arg("tables"), py::arg("device"), py::arg("stream"),
             "Launch the gradient norm, with the factor of clipping and the decision to skip.");
  module.def("update", &update, py::arg("tables"), py::arg("norm_known"), py::arg("device"), py::arg("stream"),
             "Launch the update of every tensor; it finds the norm itself unless norm_known.");
  module.def("write", &write_words, py::arg("to"), py::arg("words"), py::arg("device"), py::arg("stream"),
             "Launch the writing of 64-bit words to device memory.");
}
