// The handler for NVIDIA GPUs. It needs no CUDA header and no CUDA library to build: the functions of the
// driver's API are looked up in libcuda, and declared as its documentation has them.
#include <dlfcn.h>

#include <atomic>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

#include "plan_handler.h"

namespace {

using Code = std::vector<char>;
enum { NAME_ROOM = 32, STATIC_MEMORY = 48 * 1024 };
enum {
    MAX_DYNAMIC_SHARED_SIZE = 8,
    MAJOR = 75,
    MINOR = 76,
    MOST_SHARED = 97,
    RELAXED = 2
};  // of the driver's enums

struct Driver {
    int (*get_context)(void**);
    int (*get_device)(int*);
    int (*get_attribute)(int*, int, int);
    int (*exchange_mode)(int*);
    int (*load)(void**, const void*);
    int (*get_function)(void**, void*, const char*);
    int (*set_attribute)(void*, int, int);
    int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                  void*, void**, void**);
    int (*error_name)(int, const char**);
    bool found = false;

    Driver() {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
        if (library == nullptr) return;
        found = take(library, "cuCtxGetCurrent", get_context) &&
                take(library, "cuCtxGetDevice", get_device) &&
                take(library, "cuDeviceGetAttribute", get_attribute) &&
                take(library, "cuThreadExchangeStreamCaptureMode", exchange_mode) &&
                take(library, "cuModuleLoadData", load) &&
                take(library, "cuModuleGetFunction", get_function) &&
                take(library, "cuFuncSetAttribute", set_attribute) &&
                take(library, "cuLaunchKernel", launch) &&
                take(library, "cuGetErrorName", error_name);
    }
    template <typename Function>
    static bool take(void* library, const char* name, Function& function) {
        function = reinterpret_cast<Function>(dlsym(library, name));
        return function != nullptr;
    }
};

const Driver& driver() {
    static const Driver one;
    return one;
}

// What this process knows. Functions belong to a context, which is one for each device.
struct Known {
    std::shared_mutex mutex;
    std::mutex loading;
    std::unordered_map<std::string, Code> codes;  // by digest and architecture
    std::unordered_map<void*, std::unordered_map<std::string_view, void*>> functions;
    int (*find)(const char*, const char*) = nullptr;
    std::atomic<int64_t> launched{0};
};

Known& known() {
    static Known& one = *new Known;  // lives as long as the process: threads may launch at its end
    return one;
}

std::string failed(const char* call, int code) {
    const char* name = nullptr;
    driver().error_name(code, &name);
    return std::string(call) + " failed: " + (name ? name : std::to_string(code));
}

// Lets this thread do, while its stream is captured, what is no part of the capture.
struct Anywhere {
    int mode = RELAXED;
    Anywhere() { driver().exchange_mode(&mode); }
    ~Anywhere() { driver().exchange_mode(&mode); }
};

struct Cuda {
    void *stream = nullptr, *context = nullptr;

    std::string enter(const XLA_FFI_CallFrame* frame) {
        if (!driver().found) return "libcuda.so.1, which NVIDIA's driver brings, cannot be loaded";
        XLA_FFI_Stream_Get_Args args{XLA_FFI_Stream_Get_Args_STRUCT_SIZE, nullptr, frame->ctx,
                                     nullptr};
        if (frame->api->XLA_FFI_Stream_Get(&args) != nullptr)
            return "XLA has no CUDA stream for a call";
        stream = args.stream;
        const int code = driver().get_context(&context);
        if (code) return failed("cuCtxGetCurrent", code);
        return context ? "" : "no CUDA context is current";
    }

    std::string launch(std::string_view digest, unsigned x, unsigned y, unsigned threads,
                       unsigned memory, void** arguments) {
        void* function = look_up(digest);
        if (function == nullptr) {
            const std::string wrong = load(digest, memory, function);
            if (!wrong.empty()) return wrong;
        }
        known().launched++;
        const int code =
            driver().launch(function, x, y, 1, threads, 1, 1, memory, stream, arguments, nullptr);
        return code ? failed("cuLaunchKernel", code) : "";
    }

    void* look_up(std::string_view digest) {
        std::shared_lock<std::shared_mutex> lock(known().mutex);
        const auto functions = known().functions.find(context);
        if (functions == known().functions.end()) return nullptr;
        const auto found = functions->second.find(digest);
        return found == functions->second.end() ? nullptr : found->second;
    }

    std::string load(std::string_view digest, unsigned memory, void*& function) {
        std::lock_guard<std::mutex> one_at_a_time(known().loading);
        if ((function = look_up(digest)) != nullptr) return "";
        int device = 0, major = 0, minor = 0, most = 0;
        driver().get_device(&device);
        driver().get_attribute(&major, MAJOR, device);
        driver().get_attribute(&minor, MINOR, device);
        driver().get_attribute(&most, MOST_SHARED, device);
        if (memory > unsigned(most))
            return "a kernel needs " + std::to_string(memory) +
                   " bytes of shared memory, and this GPU has " + std::to_string(most);
        const std::string name(digest),
            architecture = "sm_" + std::to_string(major) + std::to_string(minor);
        const Code* code = code_of(name, architecture);
        if (code == nullptr && known().find != nullptr) {
            known().find(name.c_str(), architecture.c_str());
            code = code_of(name, architecture);
        }
        if (code == nullptr)
            return "this program launches the function " + name +
                   ", whose text is neither known to this process "
                   "nor in the cache (MHC_CACHE): it was compiled in another. Call the same op "
                   "once here, or bring "
                   "the cache along";
        Anywhere anywhere;
        void* module = nullptr;
        if (const int wrong = driver().load(&module, code->data()))
            return failed("cuModuleLoadData", wrong);
        if (const int wrong = driver().get_function(&function, module, "mhc_kernel"))
            return failed("cuModuleGetFunction", wrong);
        if (memory > STATIC_MEMORY)
            if (const int wrong =
                    driver().set_attribute(function, MAX_DYNAMIC_SHARED_SIZE, int(memory)))
                return failed("cuFuncSetAttribute", wrong);
        std::unique_lock<std::shared_mutex> lock(known().mutex);
        known().functions[context].emplace(*new std::string(name), function);
        return "";
    }

    static const Code* code_of(const std::string& digest, const std::string& architecture) {
        std::shared_lock<std::shared_mutex> lock(known().mutex);
        const auto found = known().codes.find(digest + architecture);
        return found == known().codes.end() ? nullptr : &found->second;
    }
};

}  // namespace

#define MHC_PUBLIC extern "C" __attribute__((visibility("default")))

// The version of the attributes' layout and of these functions.
MHC_PUBLIC int mhc_version() { return 1; }

MHC_PUBLIC XLA_FFI_Error* mhc_plan(XLA_FFI_CallFrame* frame) { return mhc::run<Cuda>(frame); }

// The handler for CPUs: a trace for a GPU may be compiled for one, if the arrays of a call turn out to be there.
MHC_PUBLIC XLA_FFI_Error* mhc_refuse(XLA_FFI_CallFrame* frame) {
    if (mhc::describe(frame)) return nullptr;
    return mhc::error(
        frame->api, XLA_FFI_Error_Code_FAILED_PRECONDITION,
        "mhc-core: this was traced for a GPU with backend 'jax-cuda', and runs on a CPU: call it "
        "on "
        "arrays on the GPU, name backend='jax', or trace it inside jax.default_device(a CPU)");
}

// Adds a function's machine code for an architecture such as "sm_90".
MHC_PUBLIC void mhc_add(const char* digest, const char* architecture, const char* code,
                        size_t size) {
    std::unique_lock<std::shared_mutex> lock(known().mutex);
    known().codes.try_emplace(std::string(digest) + architecture, code, code + size);
}

// Sets what is called for a function that was not added; it may add it.
MHC_PUBLIC void mhc_on_missing(int (*find)(const char*, const char*)) { known().find = find; }

// The number of launches so far, each counted once where XLA captures it in a CUDA graph.
MHC_PUBLIC int64_t mhc_launched() { return known().launched; }
