// A handler of XLA's FFI that runs launches of a plan, on whatever device a Launcher launches. The
// attributes of a call say all about them, and name each function by a digest of its text:
//   functions: these digests, of 64 characters each
//   launches:  64-bit numbers, for each launch: the function's index, the grid's x and y, the threads,
//              the bytes of shared memory, the number of arguments, and two numbers for each argument:
//              the index of a buffer among operands and results, and an offset in bytes; or -1 and a
//              number to pass as it is
// Only parts of the C API are used that are the same in all versions of it since the first (JAX 0.4.31).
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "xla/ffi/api/c_api.h"

namespace mhc {

enum { DIGEST = 64, HEAD = 6 };

inline XLA_FFI_Error* error(const XLA_FFI_Api* api, XLA_FFI_Error_Code code,
                            const std::string& text) {
    XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, text.c_str(),
                                   code};
    return api->XLA_FFI_Error_Create(&args);
}

// Answers XLA's question about the handler: its version of the API, and that a CUDA graph may capture it.
inline bool describe(const XLA_FFI_CallFrame* frame) {
    const auto* extension = frame->extension_start;
    if (extension == nullptr || extension->type != XLA_FFI_Extension_Metadata) return false;
    auto* data = reinterpret_cast<const XLA_FFI_Metadata_Extension*>(extension)->metadata;
    const XLA_FFI_Api* api = frame->api;
    const bool same = api != nullptr && api->api_version.major_version == XLA_FFI_API_MAJOR;
    data->api_version.major_version = XLA_FFI_API_MAJOR;
    data->api_version.minor_version = same ? api->api_version.minor_version : XLA_FFI_API_MINOR;
    data->traits = XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE;
    return true;
}

struct Plan {
    std::string_view functions;
    const int64_t* launches = nullptr;
    size_t size = 0;  // of launches, in numbers
};

inline bool read(const XLA_FFI_Attrs& attributes, Plan& plan) {
    for (int64_t k = 0; k < attributes.size; k++) {
        const std::string_view name(attributes.names[k]->ptr, attributes.names[k]->len);
        if (name == "functions" && attributes.types[k] == XLA_FFI_AttrType_STRING) {
            const auto* text = static_cast<const XLA_FFI_ByteSpan*>(attributes.attrs[k]);
            plan.functions = {text->ptr, text->len};
        } else if (name == "launches" && attributes.types[k] == XLA_FFI_AttrType_ARRAY) {
            const auto* array = static_cast<const XLA_FFI_Array*>(attributes.attrs[k]);
            if (array->dtype != XLA_FFI_DataType_S64) return false;
            plan.launches = static_cast<const int64_t*>(array->data), plan.size = array->size;
        }
    }
    return plan.launches != nullptr && plan.functions.size() % DIGEST == 0;
}

// Launcher: enter(frame) and launch(digest, x, y, threads, memory, arguments) return an empty string, or
// what went wrong.
template <typename Launcher>
XLA_FFI_Error* run(const XLA_FFI_CallFrame* frame) {
    enum { MOST = 64 };  // arguments of one launch
    if (describe(frame)) return nullptr;
    Plan plan;
    const char* broken = "mhc-core: the attributes of a call are not those of this handler";
    if (!read(frame->attrs, plan))
        return error(frame->api, XLA_FFI_Error_Code_INVALID_ARGUMENT, broken);
    const int64_t operands = frame->args.size, buffers = operands + frame->rets.size;
    const auto address = [&](int64_t place) {
        void* one = place < operands ? frame->args.args[place] : frame->rets.rets[place - operands];
        return uint64_t(static_cast<const XLA_FFI_Buffer*>(one)->data);
    };
    Launcher launcher;
    std::string wrong = launcher.enter(frame);
    const int64_t *next = plan.launches, *end = next + plan.size;
    while (wrong.empty() && next < end) {
        const int64_t *head = next, count = end - next < HEAD ? -1 : head[5];
        if (count < 0 || count > MOST || end - next < HEAD + 2 * count || head[0] < 0 ||
            size_t(head[0]) >= plan.functions.size() / DIGEST)
            return error(frame->api, XLA_FFI_Error_Code_INVALID_ARGUMENT, broken);
        next += HEAD;
        uint64_t values[MOST];
        void* arguments[MOST];
        for (int64_t k = 0; k < count; k++, next += 2) {
            if (next[0] >= buffers)
                return error(frame->api, XLA_FFI_Error_Code_INVALID_ARGUMENT, broken);
            values[k] = next[0] < 0 ? uint64_t(next[1]) : address(next[0]) + uint64_t(next[1]);
            arguments[k] = &values[k];
        }
        wrong = launcher.launch(plan.functions.substr(size_t(head[0]) * DIGEST, DIGEST),
                                unsigned(head[1]), unsigned(head[2]), unsigned(head[3]),
                                unsigned(head[4]), arguments);
    }
    if (wrong.empty()) return nullptr;
    return error(frame->api, XLA_FFI_Error_Code_INTERNAL, "mhc-core: " + wrong);
}

}  // namespace mhc
