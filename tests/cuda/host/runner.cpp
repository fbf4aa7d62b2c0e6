// Serves launches from Python over a pipe: a request is a launcher's name, its buffers and arguments; the answer is the
// launcher's error code and the buffers afterwards. Every buffer is an allocation of its own, exactly as long as the
// tensor it stands for, so that AddressSanitizer sees what lies beyond. All numbers are little-endian.
//
//   request   u32 length of name, name; u32 order, u64 seed, u32 fill
//             u32 buffers, each: u64 bytes, u64 distance of the start from a multiple of 16, the bytes
//             u32 addresses to write into buffers, each: u64 buffer, u64 byte, u64 target buffer, u64 target byte
//             u32 arguments, each: u32 kind (0 integer, 1 float, 2 address), 8 bytes, u64 byte (of an address)
//   answer    i32 code, the bytes of every buffer in order
#include <sanitizer/asan_interface.h>
#include <unistd.h>

#include <string>
#include <utility>
#include <vector>

#include "executor.h"
#include LAUNCHERS_HEADER

namespace {

struct Value {
    int64_t integer = 0;
    double real = 0.0;
    template <typename T>
    T as() const {
        if constexpr (std::is_same_v<T, double>) {
            return real;
        } else {
            return integer;
        }
    }
};

template <typename... Arguments, size_t... I>
int call(int (*launcher)(Arguments...), const std::vector<Value>& values, std::index_sequence<I...>) {
    return launcher(values[I].template as<Arguments>()...);
}
template <typename... Arguments>
int call(int (*launcher)(Arguments...), const std::string& name, std::vector<Value> values) {
    values.emplace_back();  // the stream
    if (values.size() != sizeof...(Arguments)) {
        std::fprintf(stderr, "%s takes %zu arguments and a stream, and was given %zu\n", name.c_str(),
                     sizeof...(Arguments) - 1, values.size() - 1);
        std::_Exit(97);
    }
    return call(launcher, values, std::index_sequence_for<Arguments...>{});
}

int dispatch(const std::string& name, const std::vector<Value>& values) {
#define CALL(launcher) \
    if (name == #launcher) return call(&launcher, name, values);
    FLOWMO_LAUNCHERS(CALL)
#undef CALL
    std::fprintf(stderr, "there is no launcher %s\n", name.c_str());
    std::_Exit(97);
}

void receive(void* to, size_t bytes) {
    char* p = static_cast<char*>(to);
    while (bytes > 0) {
        const ssize_t n = read(0, p, bytes);
        if (n <= 0) std::_Exit(0);
        p += n;
        bytes -= static_cast<size_t>(n);
    }
}
template <typename T>
T receive() {
    T v;
    receive(&v, sizeof(T));
    return v;
}
void send(const void* from, size_t bytes) {
    const char* p = static_cast<const char*>(from);
    while (bytes > 0) {
        const ssize_t n = write(1, p, bytes);
        if (n <= 0) std::_Exit(0);
        p += n;
        bytes -= static_cast<size_t>(n);
    }
}

struct Buffer {
    char* allocation = nullptr;
    char* start = nullptr;
    size_t bytes = 0;
};

}  // namespace

int main() {
    for (;;) {
        std::string name(receive<uint32_t>(), ' ');
        receive(&name[0], name.size());
        executor::schedule.order = static_cast<executor::Order>(receive<uint32_t>());
        executor::schedule.seed = receive<uint64_t>();
        executor::schedule.fill = static_cast<uint8_t>(receive<uint32_t>());
        std::vector<Buffer> buffers(receive<uint32_t>());
        for (Buffer& buffer : buffers) {
            buffer.bytes = receive<uint64_t>();
            const size_t offset = receive<uint64_t>();
            buffer.allocation = static_cast<char*>(std::malloc(offset + buffer.bytes));
            buffer.start = buffer.allocation + offset;
            receive(buffer.start, buffer.bytes);
            __asan_poison_memory_region(buffer.allocation, offset);
        }
        const uint32_t addresses = receive<uint32_t>();
        for (uint32_t i = 0; i < addresses; ++i) {
            const uint64_t buffer = receive<uint64_t>(), byte = receive<uint64_t>();
            const uint64_t target = receive<uint64_t>(), target_byte = receive<uint64_t>();
            const int64_t address = reinterpret_cast<int64_t>(buffers[target].start + target_byte);
            std::memcpy(buffers[buffer].start + byte, &address, 8);
        }
        std::vector<Value> values(receive<uint32_t>());
        for (Value& value : values) {
            const uint32_t kind = receive<uint32_t>();
            if (kind == 1) {
                value.real = receive<double>();
            } else {
                value.integer = receive<int64_t>();
                value.real = static_cast<double>(value.integer);
            }
            const uint64_t byte = receive<uint64_t>();
            if (kind == 2) {
                value.integer = reinterpret_cast<int64_t>(buffers[static_cast<size_t>(value.integer)].start + byte);
            }
        }
        const int32_t code = dispatch(name, values);
        send(&code, 4);
        for (Buffer& buffer : buffers) {
            send(buffer.start, buffer.bytes);
            std::free(buffer.allocation);
        }
    }
}
