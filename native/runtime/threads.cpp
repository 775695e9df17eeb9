#include "threads.hpp"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace tinytl {
namespace {

// Within a step a thread waits for the next instruction, or for another's part of this one, some hundred microseconds at
// most, and to be woken takes as long as a small instruction. Longer than this it does not burn its core, and sleeps.
constexpr auto patience = std::chrono::microseconds(1000);

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether `done()` came true within `patience`.
template <class Done>
bool spin(Done done) {
    const auto end = std::chrono::steady_clock::now() + patience;
    do {
        for (int i = 0; i < 32; ++i) {
            if (done()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return done();
}

}  // namespace

// Whoever is about to sleep says so (`asleep`, `caller_asleep`) and then looks once more; whoever has news writes it and
// then looks whether somebody sleeps. Both in the one order of sequentially consistent atomics: no news is missed.
struct Threads::Pool {
    std::atomic<uint32_t> job{0};  // grows by one for each; the thread that sees it grow takes its part
    std::atomic<int> left{0};      // threads that have not finished the job
    std::atomic<int> asleep{0};
    std::atomic<bool> caller_asleep{false};
    bool stop = false;  // written before `job` grows
    void (*body)(void*, int) = nullptr;
    void* data = nullptr;
    std::mutex mutex;
    std::condition_variable called, finished;
    std::vector<std::thread> threads;

    void call() {
        job.fetch_add(1);
        if (asleep.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex);
            called.notify_all();
        }
    }

    void work(int thread) {
        for (uint32_t seen = 0;; ++seen) {
            if (!spin([&] { return job.load() != seen; })) {
                std::unique_lock<std::mutex> lock(mutex);
                asleep.fetch_add(1);
                called.wait(lock, [&] { return job.load() != seen; });
                asleep.fetch_sub(1);
            }
            if (stop) return;
            body(data, thread);
            if (left.fetch_sub(1) == 1 && caller_asleep.load()) {
                std::lock_guard<std::mutex> lock(mutex);
                finished.notify_one();
            }
        }
    }

    void wait() {
        auto done = [&] { return left.load() == 0; };
        if (spin(done)) return;
        std::unique_lock<std::mutex> lock(mutex);
        caller_asleep = true;
        finished.wait(lock, done);
        caller_asleep = false;
    }

    // On a failure to start a thread, those that run are ended and the error goes on.
    explicit Pool(int count) {
        threads.reserve(static_cast<size_t>(count - 1));
        // Signals are for the caller's threads: Python's handlers expect to interrupt its own.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (int thread = 1; thread < count; ++thread) threads.emplace_back([this, thread] { work(thread); });
        } catch (...) {
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            end();
            throw;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    void end() {
        stop = true;
        call();
        for (std::thread& thread : threads) thread.join();
    }
    ~Pool() { end(); }
};

Threads::Threads(int count) : count_(count) {
    if (count > 1) pool_ = std::make_unique<Pool>(count);
}

Threads::~Threads() = default;

void Threads::run_(void (*body)(void*, int), void* data) {
    if (!pool_) return body(data, 0);
    pool_->body = body;
    pool_->data = data;
    pool_->left = count_ - 1;
    pool_->call();
    body(data, 0);
    pool_->wait();
}

}  // namespace tinytl
