// Bindings of files and checksums: addresses and sizes in, errors out. Arguments are checked by checkpoint/disk.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>

#include "crc32c.h"
#include "files.h"

namespace py = pybind11;

namespace triloom {

void bind_files(py::module_& m);

namespace {

using Address = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;
using Pairs = std::vector<std::pair<Address, int64_t>>;

std::pair<std::vector<uint32_t>, bool> py_write_file(const std::string& path, const Pairs& spans, const Pairs& extents,
                                                     int threads, int64_t chunk, bool direct) {
    std::vector<Span> from;
    for (const auto& [address, bytes] : spans) from.push_back({reinterpret_cast<const char*>(address), bytes});
    std::vector<Extent> ranges;
    for (const auto& [offset, bytes] : extents) ranges.push_back({static_cast<int64_t>(offset), bytes});
    Written written = write_file(path, from, ranges, {threads, chunk, direct});
    return {std::move(written.checksums), written.direct};
}

void py_copy(const std::vector<std::tuple<Address, Address, int64_t>>& moves) {
    std::vector<Move> list;
    for (const auto& [to, from, bytes] : moves)
        list.push_back({reinterpret_cast<char*>(to), reinterpret_cast<const char*>(from), bytes});
    copy_past_cache(list);
}

void py_scatter(Address to, Address from, Address target, Address source, Address bytes, int64_t n) {
    const auto numbers = [](Address a) { return reinterpret_cast<const int64_t*>(a); };
    scatter(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(from), numbers(target), numbers(source),
            numbers(bytes), n);
}

uint32_t py_crc32c(Address data, int64_t n, uint32_t crc) { return crc32c(reinterpret_cast<const void*>(data), n, crc); }

uint32_t py_crc32c_by_table(Address data, int64_t n, uint32_t crc) {
    return crc32c_by_table(reinterpret_cast<const void*>(data), n, crc);
}

// As the OSError subclass of its number (FileNotFoundError, PermissionError, ...), with the path.
void translate(std::exception_ptr error) {
    try {
        if (error) std::rethrow_exception(error);
    } catch (const FileError& e) {
        const py::object made = py::reinterpret_borrow<py::object>(PyExc_OSError)(e.number, e.what(), e.path);
        PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(made.ptr())), made.ptr());
    }
}

}  // namespace

void bind_files(py::module_& m) {
    py::register_exception_translator(&translate);
    m.attr("FILE_ALIGN") = kFileAlign;
    m.def("write_file", &py_write_file, NoGil());
    m.def("copy_past_cache", &py_copy, NoGil());
    m.def("exchange_paths", &exchange_paths, NoGil());
    m.def("scatter", &py_scatter, NoGil());
    m.def("crc32c", &py_crc32c, NoGil());
    m.def("crc32c_by_table", &py_crc32c_by_table, NoGil());
    m.def("crc32c_has_instruction", &crc32c_has_instruction);
}

}  // namespace triloom
