// Calls functions of the CPU library for another process (emulated.py), which runs on another
// architecture and holds the memory: arguments come through standard input, results go through
// standard output. One call after the other:
//
//     call       uint32 length of the name, name, uint32 number of arguments, arguments
//     argument   uint8 kind, then
//                0 number     int64
//                1 memory     uint64 address over there, uint64 size, bytes; size 0: null
//                2 structure  the same, uint32 number of pointers in it; of each: uint32 place in
//                             bytes, argument
//                3 float      float
//     result     int64 result, then the bytes of all memory, in the order in which it came
//
// A result that is a text (moepress_instruction_sets) comes as uint32 length and bytes.
//
//     driver LIBRARY

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

void fail(const char* what) {
    std::fprintf(stderr, "driver: %s\n", what);
    std::exit(1);
}

void read_bytes(void* to, size_t size) {
    if (std::fread(to, 1, size, stdin) != size) fail("the call ends early");
}
template <class T>
T read_one() {
    T value;
    read_bytes(&value, sizeof value);
    return value;
}
void write_bytes(const void* from, size_t size) {
    if (std::fwrite(from, 1, size, stdout) != size) fail("nobody reads the result");
}

// Memory of the other process, at the same place within a cache line.
struct Memory {
    std::unique_ptr<uint8_t[]> whole;
    uint8_t* at;
    size_t size;

    Memory(uint64_t address, size_t size) : whole(new uint8_t[size + 128]), size(size) {
        const uint64_t start = reinterpret_cast<uint64_t>(whole.get());
        at = whole.get() + ((address - start) & 63);
        read_bytes(at, size);
    }
};

// An argument of kind 0, 1 or 2.
uint64_t read_argument(uint8_t kind, std::vector<Memory>& memory, std::vector<Memory>& structures) {
    if (kind == 0) return read_one<uint64_t>();
    const uint64_t address = read_one<uint64_t>(), size = read_one<uint64_t>();
    if (size == 0) return 0;
    std::vector<Memory>& all = kind == 1 ? memory : structures;
    all.emplace_back(address, size);
    uint8_t* at = all.back().at;
    if (kind == 2)
        for (uint32_t left = read_one<uint32_t>(); left > 0; --left) {
            const uint32_t place = read_one<uint32_t>();
            const uint64_t pointer = read_argument(read_one<uint8_t>(), memory, structures);
            std::memcpy(at + place, &pointer, sizeof pointer);
        }
    return reinterpret_cast<uint64_t>(at);
}

// The procedure call standard of ARM passes numbers of 32 and 64 bits and pointers alike: eight in
// registers, the others in eight bytes each on the stack. So a function may get more arguments than
// it takes. Floats have eight registers of their own, wherever they stand among the arguments.
constexpr size_t kMost = 32, kMostFloats = 2;
using Function = int32_t (*)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                             uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                             uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                             uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                             uint64_t, uint64_t, uint64_t, uint64_t, float, float);
int32_t call(void* function, const uint64_t* a, const float* f) {
    return reinterpret_cast<Function>(function)(
        a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13],
        a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25], a[26],
        a[27], a[28], a[29], a[30], a[31], f[0], f[1]);
}

}  // namespace

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (library == nullptr) fail(dlerror());
    for (;;) {
        uint32_t length;
        if (std::fread(&length, sizeof length, 1, stdin) != 1) return 0;  // no more calls
        std::string name(length, ' ');
        read_bytes(&name[0], length);
        std::vector<Memory> memory, structures;
        memory.reserve(2 * kMost);
        structures.reserve(2 * kMost);  // `at` points into them
        uint64_t values[kMost] = {};
        float floats[kMostFloats] = {};
        size_t whole = 0, real = 0;
        const uint32_t count = read_one<uint32_t>();
        if (count > kMost) fail("too many arguments");
        for (uint32_t i = 0; i < count; ++i) {
            const uint8_t kind = read_one<uint8_t>();
            if (kind == 3 && real == kMostFloats) fail("too many floats");
            if (kind == 3)
                floats[real++] = read_one<float>();
            else
                values[whole++] = read_argument(kind, memory, structures);
        }
        void* function = dlsym(library, name.c_str());
        if (function == nullptr) fail(name.c_str());
        if (name == "moepress_instruction_sets") {
            const char* text = reinterpret_cast<const char* (*)()>(function)();
            const uint32_t size = uint32_t(std::strlen(text));
            write_bytes(&size, sizeof size);
            write_bytes(text, size);
        } else {
            const int64_t result = call(function, values, floats);
            write_bytes(&result, sizeof result);
            for (const Memory& one : memory) write_bytes(one.at, one.size);
        }
        std::fflush(stdout);
    }
}
