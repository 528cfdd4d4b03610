// Reads a golden case of combine, computes it in float32 and writes the answer: what an author of
// kernels does whose language cannot import Python. Usage: golden_combine CASE.safetensors
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <regex>
#include <string>
#include <vector>

struct Array {
    std::string dtype;
    std::vector<size_t> shape;
    const char *data;
};

// The header is JSON: {"NAME": {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 128]}, ...}
static std::map<std::string, Array> read(const std::string &file) {
    uint64_t length;
    std::memcpy(&length, file.data(), 8);
    const std::string header = file.substr(8, length);
    const std::regex entry(
        R"re("([^"]+)": \{"dtype": "(\w+)", "shape": \[([^\]]*)\], "data_offsets": \[(\d+))re");
    std::map<std::string, Array> found;
    for (std::sregex_iterator at(header.begin(), header.end(), entry), end; at != end; ++at) {
        Array array{(*at)[2], {}, file.data() + 8 + length + std::stoul((*at)[4])};
        const std::string sizes = (*at)[3];
        const std::regex number(R"(\d+)");
        for (std::sregex_iterator n(sizes.begin(), sizes.end(), number); n != end; ++n)
            array.shape.push_back(std::stoul(n->str()));
        found[(*at)[1]] = array;
    }
    return found;
}

static std::vector<float> floats(const Array &array) {
    size_t count = 1;
    for (size_t size : array.shape) count *= size;
    std::vector<float> values(count);
    for (size_t i = 0; i < count; ++i) {
        uint32_t bits = 0;  // of a bfloat16, the upper half of a float
        if (array.dtype == "F32") std::memcpy(&bits, array.data + 4 * i, 4);
        else std::memcpy(reinterpret_cast<char *>(&bits) + 2, array.data + 2 * i, 2);
        std::memcpy(&values[i], &bits, 4);
    }
    return values;
}

int main(int, char **argv) {
    std::ifstream in(argv[1], std::ios::binary);
    const std::string file((std::istreambuf_iterator<char>(in)), {});
    auto arrays = read(file);
    const Array &streams = arrays.at("in.x");
    const size_t T = streams.shape[0], n = streams.shape[1], C = streams.shape[2];
    const auto x = floats(streams), y = floats(arrays.at("in.y"));
    const auto post = floats(arrays.at("in.h_post")), res = floats(arrays.at("in.h_res"));
    std::string numbers;
    for (size_t t = 0; t < T; ++t)
        for (size_t i = 0; i < n; ++i)
            for (size_t c = 0; c < C; ++c) {
                float sum = post[t * n + i] * y[t * C + c];
                for (size_t j = 0; j < n; ++j)
                    sum += res[(t * n + i) * n + j] * x[(t * n + j) * C + c];
                uint32_t bits;
                std::memcpy(&bits, &sum, 4);
                const bool narrow = streams.dtype == "BF16";
                if (narrow) bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest
                numbers.append(reinterpret_cast<char *>(&bits), narrow ? 2 : 4);
            }
    const std::string header = "{\"out.x\": {\"dtype\": \"" + streams.dtype + "\", \"shape\": [" +
                               std::to_string(T) + ", " + std::to_string(n) + ", " +
                               std::to_string(C) + "], \"data_offsets\": [0, " +
                               std::to_string(numbers.size()) + "]}}";
    const std::string name(argv[1]);
    std::ofstream out(name.substr(0, name.rfind(".safetensors")) + ".answer.safetensors",
                      std::ios::binary);
    const uint64_t length = header.size();
    out.write(reinterpret_cast<const char *>(&length), 8);
    out << header << numbers;
    return out ? 0 : 1;
}
