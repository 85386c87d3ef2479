// The one error type of the extension; Python sees it as triloom._C.NativeError.
#pragma once

#include <stdexcept>
#include <string>

namespace triloom {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void require(bool ok, const char* what) {
    if (!ok) throw Error(what);
}

}  // namespace triloom
