// The handler of backend jax-cuda for functions that run on a CPU: all but the driver's calls is its own.
#include <atomic>
#include <mutex>
#include <unordered_map>

#include "plan_handler.h"

using Function = int (*)(void**, unsigned, unsigned, unsigned);
static std::unordered_map<std::string, Function> functions;
static std::mutex one_at_a_time;  // a function has one place for its threads
static std::atomic<int64_t> launched{0};

#define MHC_PUBLIC extern "C" __attribute__((visibility("default")))

struct Cpu {
    std::string enter(const XLA_FFI_CallFrame*) { return ""; }
    std::string launch(std::string_view digest, unsigned x, unsigned y, unsigned threads, unsigned, void** arguments) {
        std::lock_guard<std::mutex> lock(one_at_a_time);
        const auto found = functions.find(std::string(digest));
        if (found == functions.end()) return "the function " + std::string(digest) + " is not known";
        launched++;
        return found->second(arguments, x, y, threads) ? "a vector is misaligned" : "";
    }
};

MHC_PUBLIC XLA_FFI_Error* mhc_plan(XLA_FFI_CallFrame* frame) { return mhc::run<Cpu>(frame); }
MHC_PUBLIC void mhc_add(const char* digest, Function function) {
    std::lock_guard<std::mutex> lock(one_at_a_time);
    functions[digest] = function;
}
MHC_PUBLIC void mhc_forget() {
    std::lock_guard<std::mutex> lock(one_at_a_time);
    functions.clear();
}
MHC_PUBLIC int64_t mhc_launched() { return launched; }
