// Reads a golden case of combine, computes it in float32 and writes the answer: what an author of
// kernels does whose language cannot import Python. Usage: golden_combine CASE.safetensors
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <regex>
#include <string>
#include <vector>

struct Array { std::string dtype, shape; std::vector<float> values; };

// A file is the length of its header, the header and the numbers. The header is JSON:
// {"NAME": {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 128]}, ...}
static Array read(const std::string &file, const std::string &name) {
    uint64_t length;
    std::memcpy(&length, file.data(), 8);
    const std::string header = file.substr(8, length);
    const std::regex entry('"' + name + R"re(": \{"dtype": "(\w+)", "shape": \[(.*?)\], )re" +
                           R"re("data_offsets": \[(\d+), (\d+)\])re");
    std::smatch at;
    std::regex_search(header, at, entry);
    Array array{at[1], at[2], {}};
    const size_t start = 8 + length, size = array.dtype == "F32" ? 4 : 2;
    for (size_t byte = std::stoul(at[3]); byte < std::stoul(at[4]); byte += size) {
        char bits[4] = {};  // of a bfloat16, the upper half of a float
        std::memcpy(bits + 4 - size, file.data() + start + byte, size);
        std::memcpy(&array.values.emplace_back(), bits, 4);
    }
    return array;
}

int main(int, char **argv) {
    const std::string name(argv[1]), stem = name.substr(0, name.rfind(".safetensors"));
    std::ifstream in(name, std::ios::binary);
    const std::string file((std::istreambuf_iterator<char>(in)), {});
    const Array x = read(file, "in.x"), y = read(file, "in.y");
    const Array post = read(file, "in.h_post"), res = read(file, "in.h_res");
    size_t T, n, C;
    std::sscanf(x.shape.c_str(), "%zu, %zu, %zu", &T, &n, &C);
    std::string numbers;
    for (size_t row = 0; row < T * n; ++row)  // a stream of a token
        for (size_t t = row / n, c = 0; c < C; ++c) {
            float sum = post.values[row] * y.values[t * C + c];
            for (size_t j = 0; j < n; ++j)
                sum += res.values[row * n + j] * x.values[(t * n + j) * C + c];
            uint32_t bits;
            std::memcpy(&bits, &sum, 4);
            const bool narrow = x.dtype == "BF16";
            if (narrow) bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest
            numbers.append(reinterpret_cast<char *>(&bits), narrow ? 2 : 4);
        }
    const std::string header = "{\"out.x\": {\"dtype\": \"" + x.dtype + "\", \"shape\": [" +
        x.shape + "], \"data_offsets\": [0, " + std::to_string(numbers.size()) + "]}}";
    const uint64_t length = header.size();
    std::ofstream out(stem + ".answer.safetensors", std::ios::binary);
    out.write(reinterpret_cast<const char *>(&length), 8) << header << numbers;
    return out ? 0 : 1;
}
