// triloom._C: addresses and sizes in, errors out. Arguments are checked by native.py and philox.py,
// which own the tensors; nothing here knows torch. Every function that takes long gives up the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string_view>

#include "adamw.h"
#include "elementwise.h"
#include "heap.h"
#include "nccl.h"
#include "philox.h"
#include "pool.h"
#include "reduce.h"
#include "shm.h"

namespace py = pybind11;

namespace triloom {

void bind_optimizers(py::module_& m);  // optimizers_module.cpp
void bind_files(py::module_& m);       // files_module.cpp

namespace {

using Address = std::uintptr_t;
using Sizes = std::vector<int64_t>;
using NoGil = py::call_guard<py::gil_scoped_release>;

void* at(Address a) { return reinterpret_cast<void*>(a); }

Box box(const Sizes& sizes, const Sizes& out, const Sizes& in, const Sizes& index, uint64_t key, uint64_t base) {
    require(out.size() == sizes.size() && in.size() == sizes.size() && index.size() == sizes.size(),
            "sizes and strides must have the same length");
    Box b{{}, key, base};
    for (size_t k = 0; k < sizes.size(); ++k) b.axes.push_back({sizes[k], out[k], in[k], index[k]});
    return b;
}

void py_fill_uniform(Address out, int dtype, const Sizes& sizes, const Sizes& strides, const Sizes& index, uint64_t key,
                     uint64_t base, double low, double high, Pool* pool) {
    fill_uniform(at(out), dtype_of(dtype), box(sizes, strides, strides, index, key, base), low, high, pool);
}

void py_fill_normal(Address out, int dtype, const Sizes& sizes, const Sizes& strides, const Sizes& index, uint64_t key,
                    uint64_t base, double mean, double std, Pool* pool) {
    fill_normal(at(out), dtype_of(dtype), box(sizes, strides, strides, index, key, base), mean, std, pool);
}

void py_dropout(Address out, Address in, int dtype, const Sizes& sizes, const Sizes& out_strides,
                const Sizes& in_strides, const Sizes& index, uint64_t key, uint64_t base, uint32_t threshold,
                double scale, Pool* pool) {
    dropout(at(out), at(in), dtype_of(dtype), box(sizes, out_strides, in_strides, index, key, base), threshold, scale,
            pool);
}

void py_round_stochastic(Address out, Address in, const Sizes& sizes, const Sizes& out_strides,
                         const Sizes& in_strides, const Sizes& index, uint64_t key, uint64_t base, Pool* pool) {
    round_stochastic(at(out), at(in), box(sizes, out_strides, in_strides, index, key, base), pool);
}

void py_adamw(Address param, Address grad, Address exp_avg, Address exp_avg_sq, Address low, int state_dtype,
              int grad_dtype, int low_dtype, int64_t n, const std::array<double, 9>& x, Pool* pool) {
    adamw({at(param), at(grad), at(exp_avg), at(exp_avg_sq), at(low), dtype_of(state_dtype), dtype_of(grad_dtype),
           dtype_of(low_dtype)},
          n, {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8]}, pool);
}

bool py_partials(Address data, int dtype, int64_t n, Address partials, Pool* pool) {
    return sum_squares_partials(at(data), dtype_of(dtype), n, static_cast<double*>(at(partials)), pool);
}

void py_sqrt(Address data, int dtype, int64_t n, Pool* pool) { sqrt_in_place(at(data), dtype_of(dtype), n, pool); }

std::pair<double, double> py_wide_sum(Address data, int64_t n) {
    const Wide sum = wide_sum(static_cast<const double*>(at(data)), n);
    return {sum.high, sum.low};
}

void py_reduce_ranks(Address out, const std::vector<Address>& inputs, int dtype, int64_t n, int op, Pool* pool) {
    require(op >= 0 && op <= 2, "reduce_ranks: the operation is not 0 (sum), 1 (max) or 2 (min)");
    std::vector<const void*> pointers;
    for (Address a : inputs) pointers.push_back(at(a));
    reduce_ranks(at(out), pointers, dtype_of(dtype), n, static_cast<ReduceOp>(op), pool);
}

NcclConfig nccl_config(int blocking, int min_ctas, int max_ctas, int cga_cluster_size, int split_share) {
    NcclConfig c;
    c.blocking = blocking;
    c.min_ctas = min_ctas;
    c.max_ctas = max_ctas;
    c.cga_cluster_size = cga_cluster_size;
    c.split_share = split_share;
    return c;
}

void bind_nccl(py::module_& m) {
    const py::object base = py::module_::import("triloom.errors").attr("GroupError");
    py::register_exception<NcclError>(m, "NcclError", base);
    py::class_<NcclConfig>(m, "NcclConfig", "Configuration of a communicator, in the layout of NCCL 2.18.")
        .def(py::init(&nccl_config), py::arg("blocking") = kNcclUndefined, py::arg("min_ctas") = kNcclUndefined,
             py::arg("max_ctas") = kNcclUndefined, py::arg("cga_cluster_size") = kNcclUndefined,
             py::arg("split_share") = kNcclUndefined)
        .def("__bytes__", [](const NcclConfig& c) { return py::bytes(reinterpret_cast<const char*>(&c), sizeof c); });
    py::class_<NcclSlot>(m, "NcclSlot", "Where NCCL writes a handle, possibly after the call that asked for it.")
        .def(py::init<>())
        .def_property_readonly("value", [](const NcclSlot& s) { return reinterpret_cast<Address>(s.value); });
    py::class_<Nccl>(m, "Nccl", "A loaded NCCL; methods that return bool: whether the operation is still in progress.")
        .def(py::init<const std::string&, bool>(), py::arg("path"), py::arg("loaded_only") = false, NoGil())
        .def_property_readonly("path", &Nccl::path)
        .def_property_readonly("version", &Nccl::version)
        .def("has", &Nccl::has)
        .def("unique_id", [](const Nccl& n) { return py::bytes(n.unique_id()); })
        .def("comm_init", &Nccl::comm_init, NoGil())
        .def("comm_split", &Nccl::comm_split, NoGil())
        .def("comm_finalize", &Nccl::comm_finalize, NoGil())
        .def("comm_destroy", &Nccl::comm_destroy, NoGil())
        .def("comm_abort", &Nccl::comm_abort, NoGil())
        .def("async_error", &Nccl::async_error, NoGil())
        .def("error_text", &Nccl::error_text)
        .def("group_start", &Nccl::group_start, NoGil())
        .def("group_end", &Nccl::group_end, NoGil())
        .def("all_reduce", &Nccl::all_reduce, NoGil())
        .def("reduce_scatter", &Nccl::reduce_scatter, NoGil())
        .def("all_gather", &Nccl::all_gather, NoGil())
        .def("broadcast", &Nccl::broadcast, NoGil())
        .def("send", &Nccl::send, NoGil())
        .def("recv", &Nccl::recv, NoGil())
        .def("mem_alloc", &Nccl::mem_alloc, NoGil())
        .def("mem_free", &Nccl::mem_free, NoGil())
        .def("comm_register", &Nccl::comm_register, NoGil())
        .def("comm_deregister", &Nccl::comm_deregister, NoGil())
        .def("window_register", &Nccl::window_register, NoGil())
        .def("window_deregister", &Nccl::window_deregister, NoGil());
    m.def("exchange_capture_mode", &exchange_capture_mode);
}

ShmOpPtr shm_op(std::string_view header, int verb, int dtype, int reduce, int root, bool refused, bool ready, Address out,
                Address in, int64_t elements) {
    require(verb >= 0 && verb <= static_cast<int>(ShmVerb::transfer), "shm: no such operation");
    require(reduce >= 0 && reduce <= 2, "shm: the reduction is not 0 (sum), 1 (max) or 2 (min)");
    require(elements >= 0, "shm: the number of elements is negative");
    auto op = std::make_shared<ShmOp>();
    op->verb = static_cast<ShmVerb>(verb);
    op->dtype = dtype_of(dtype);
    op->reduce = static_cast<ReduceOp>(reduce);
    op->root = root;
    op->refused = refused;
    op->ready.store(ready);
    op->out = static_cast<char*>(at(out));
    op->in = static_cast<const char*>(at(in));
    op->elements = elements;
    op->header.fill(0);
    std::copy_n(header.data(), std::min(header.size(), op->header.size()), op->header.data());
    return op;
}

std::vector<py::bytes> shm_said(const ShmOp& op) {
    std::vector<py::bytes> said;
    for (const auto& header : op.said) said.emplace_back(header.data(), header.size());
    return said;
}

void bind_shm(py::module_& m) {
    py::class_<ShmOp, ShmOpPtr>(m, "ShmOp")
        .def(py::init(&shm_op))
        .def_property_readonly("over", &ShmOp::over)
        .def_property_readonly("state", [](const ShmOp& op) { return op.state.load(); })
        .def_property_readonly("said", &shm_said);
    py::class_<ShmEngine, std::shared_ptr<ShmEngine>>(m, "ShmEngine")
        .def(py::init<int, int, const std::vector<int>&, double>())
        .def_static("bells_bytes", &ShmEngine::bells_bytes)
        .def("wait", [](ShmEngine& e, ShmOp& op, double s) { return static_cast<int>(e.wait(op, s)); }, NoGil())
        .def("poll", &ShmEngine::poll, NoGil())
        .def("release", &ShmEngine::release, NoGil())
        .def("ended_processes", &ShmEngine::ended_processes)
        .def("stop", &ShmEngine::stop, NoGil());
    const auto layout = [](const std::array<int64_t, 4>& sizes) {
        return ShmLayout{sizes[0], sizes[1], sizes[2], sizes[3]};
    };
    py::class_<ShmChannel, std::shared_ptr<ShmChannel>>(m, "ShmChannel")
        .def(py::init([layout](std::shared_ptr<ShmEngine> engine, int fd, const std::array<int64_t, 4>& sizes, int rank,
                               std::vector<int> bells, bool check) {
            return std::make_shared<ShmChannel>(std::move(engine), fd, layout(sizes), rank, std::move(bells), check);
        }))
        .def_static("total_bytes", [layout](const std::array<int64_t, 4>& sizes) { return layout(sizes).total(); })
        .def("collective", &ShmChannel::collective, NoGil())
        .def("transfer", &ShmChannel::transfer, NoGil())
        .def("late", &ShmChannel::late)
        .def("unexpected", [](ShmChannel& channel, int peer) {
            std::vector<std::pair<int, py::bytes>> found;
            for (const auto& [kind, header] : channel.unexpected(peer)) found.emplace_back(kind, py::bytes(header));
            return found;
        })
        .def("close", &ShmChannel::close, NoGil());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of triloom; use them through triloom.native and triloom.philox.";
    const py::object base = py::module_::import("triloom.errors").attr("TriloomError");
    py::register_exception<Error>(m, "NativeError", base);
    m.attr("SUM_BLOCK") = kSumBlock;

    py::class_<Pool>(m, "Pool", "Threads that share the work of one call; pass it explicitly. Unusable after fork().")
        .def(py::init<int>(), py::arg("threads"))
        .def_property_readonly("threads", &Pool::threads, "Threads that work, the caller included.");

    m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"));
    m.def("fill_uniform", &py_fill_uniform, NoGil());
    m.def("fill_normal", &py_fill_normal, NoGil());
    m.def("dropout", &py_dropout, NoGil());
    m.def("round_stochastic", &py_round_stochastic, NoGil());
    m.def("adamw", &py_adamw, NoGil());
    m.def("sqrt", &py_sqrt, NoGil());
    m.def("sum_squares_partials", &py_partials, NoGil());
    m.def("wide_sum", &py_wide_sum, NoGil());
    m.def("keep_heap", &keep_heap);
    m.def("reduce_ranks", &py_reduce_ranks, NoGil());
    bind_shm(m);
    bind_optimizers(m);
    bind_files(m);
    bind_nccl(m);
}

}  // namespace triloom
