// Bindings of the update rules: addresses and sizes in, errors out. Arguments are checked by optim/kernels.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "optimizers.h"

namespace py = pybind11;

namespace triloom {

void bind_optimizers(py::module_& m);

namespace {

using Address = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

void* at(Address a) { return reinterpret_cast<void*>(a); }

// param, grad, low; their dtype codes; the number of elements.
using Parts = std::tuple<Address, Address, Address, int, int, int, int64_t>;

Piece piece(const Parts& p) {
    const auto& [param, grad, low, own, grad_dtype, low_dtype, n] = p;
    return {at(param), at(grad), at(low), dtype_of(own), dtype_of(grad_dtype), dtype_of(low_dtype), n};
}

void py_sgd(const Parts& p, Address momentum, bool nesterov, const std::array<double, 4>& x, Pool* pool) {
    sgd(piece(p), at(momentum), nesterov, {x[0], x[1], x[2], x[3]}, pool);
}

void py_lion(const Parts& p, Address exp_avg, const std::array<double, 7>& x, Pool* pool) {
    lion(piece(p), at(exp_avg), {x[0], x[1], x[2], x[3], x[4], x[5], x[6]}, pool);
}

void py_adamw8(const Parts& p, const std::array<Address, 4>& s, Address tables, const std::array<double, 9>& x,
               Pool* pool) {
    adamw8(piece(p), {static_cast<uint8_t*>(at(s[0])), at(s[1]), static_cast<uint8_t*>(at(s[2])), at(s[3]), at(tables)},
           {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8]}, pool);
}

}  // namespace

void bind_optimizers(py::module_& m) {
    m.def("sgd", &py_sgd, NoGil());
    m.def("lion", &py_lion, NoGil());
    m.def("adamw8", &py_adamw8, NoGil());
}

}  // namespace triloom
