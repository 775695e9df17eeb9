// Threads that wait for work: one job at a time, divided into parts that each thread takes by its number.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace tinytl {

class Threads {
public:
    explicit Threads(int count);
    ~Threads();
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;

    int count() const { return count_; }

    // Call body(thread) once on each thread, the caller being thread 0, and wait for all. Nothing is allocated.
    template <class Body>
    void run(Body&& body) {
        run_(+[](void* data, int thread) { (*static_cast<std::remove_reference_t<Body>*>(data))(thread); }, &body);
    }

    // Call body(begin, end, thread) for neighbouring parts of [0, total), one a thread; bounds are multiples of `grain`.
    // Less than `grain` items are not divided.
    template <class Body>
    void ranges(int64_t total, int64_t grain, Body&& body) {
        const int64_t pieces = (total + grain - 1) / grain;
        if (pieces <= 1 || count_ == 1) {
            if (total > 0) body(int64_t{0}, total, 0);
            return;
        }
        run([&](int thread) {
            const int64_t begin = pieces * thread / count_ * grain;
            int64_t end = pieces * (thread + 1) / count_ * grain;
            if (end > total) end = total;
            if (begin < end) body(begin, end, thread);
        });
    }

private:
    void run_(void (*body)(void*, int), void* data);
    int count_;
    struct Pool;
    std::unique_ptr<Pool> pool_;
};

}  // namespace tinytl
