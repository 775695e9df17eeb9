// tinytl-step: training steps of one program without Python, and what they took.
//
//     tinytl-step PROGRAM.ttl [--steps N] [--threads T] [--lr RATE] [--seed S] [--images FILE] [--labels FILE]
//                 [--profile] [--no-check] [--json]
//
// Pixels and labels come from files (raw bytes (H, W, 3) an image; int32 a label), again from the start when they end,
// or are pseudo-random numbers that depend on the seed alone. Exit status: 0, or 2 and one line.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "tinytl.h"

namespace {

double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

[[noreturn]] void refuse(const std::string& line) {
    std::fprintf(stderr, "tinytl-step: %s\n", line.c_str());
    std::exit(2);
}

struct Options {
    const char* program = nullptr;
    const char* images = nullptr;
    const char* labels = nullptr;
    long steps = 3, threads = 0, seed = 0;
    double lr = 0.001;
    bool json = false, profile = false, check = true;
};

constexpr const char* usage =
    "usage: tinytl-step PROGRAM.ttl [--steps N] [--threads T] [--lr RATE] [--seed S] [--images FILE] [--labels FILE] "
    "[--profile] [--no-check] [--json]";

long whole(const char* option, const char* text, long least, long most) {
    char* end;
    const long value = std::strtol(text, &end, 10);
    if (!*text || *end || value < least || value > most)
        refuse(std::string(option) + " " + text + ": give a whole number from " + std::to_string(least) + " to " +
               std::to_string(most));
    return value;
}

Options parse(int count, char** words) {
    Options options;
    for (int i = 1; i < count; ++i) {
        const char* word = words[i];
        auto is = [&](const char* name) { return !std::strcmp(word, name); };
        auto value = [&]() -> const char* {
            if (i + 1 >= count) refuse(std::string(word) + " needs a value; " + usage);
            return words[++i];
        };
        if (is("--help")) {
            std::puts(usage);
            std::exit(0);
        }
        if (is("--json")) options.json = true;
        else if (is("--profile")) options.profile = true;
        else if (is("--no-check")) options.check = false;
        else if (is("--images")) options.images = value();
        else if (is("--labels")) options.labels = value();
        else if (is("--steps")) options.steps = whole(word, value(), 1, 1000000);
        else if (is("--threads")) options.threads = whole(word, value(), 0, 256);
        else if (is("--seed")) options.seed = whole(word, value(), 0, 2147483647);
        else if (is("--lr")) {
            char* end;
            const char* text = value();
            options.lr = std::strtod(text, &end);
            if (!*text || *end || !std::isfinite(options.lr)) refuse(std::string("--lr ") + text + ": give a number");
        } else if (word[0] == '-' || options.program) {
            refuse(std::string("unknown argument ") + word + "; " + usage);
        } else {
            options.program = word;
        }
    }
    if (!options.program) refuse(usage);
    return options;
}

// Bytes of a file, over and over; or pseudo-random ones.
class Source {
public:
    Source(const char* path, uint64_t seed) : path_(path), state_(seed * 2 + 1) {
        if (path && !(file_ = std::fopen(path, "rb"))) refuse(std::string(path) + ": cannot be opened: name a readable file");
    }
    ~Source() {
        if (file_) std::fclose(file_);
    }
    Source(const Source&) = delete;
    Source& operator=(const Source&) = delete;
    bool given() const { return file_; }

    // A whole number of items of `bytes` must lie in the file.
    void read(void* to, size_t items, size_t bytes) {
        for (size_t done = 0; done < items;) {
            const size_t now = std::fread(static_cast<char*>(to) + done * bytes, bytes, items - done, file_);
            done += now;
            if (now) read_ += now;
            else if (!read_) refuse(std::string(path_) + ": holds less than one item of " + std::to_string(bytes) + " bytes");
            else if (std::ferror(file_) || std::fseek(file_, 0, SEEK_SET))
                refuse(std::string(path_) + ": cannot be read again from its start: give a regular file");
        }
    }
    uint32_t next() {
        state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
        return static_cast<uint32_t>(state_ >> 33);
    }

private:
    const char* path_;
    std::FILE* file_ = nullptr;
    size_t read_ = 0;
    uint64_t state_;
};

// The most memory that this process has had resident, in bytes; -1 where the system does not tell.
long long peak_resident() {
    std::FILE* file = std::fopen("/proc/self/status", "r");
    if (!file) return -1;
    char line[256];
    long long kilobytes = -1;
    while (std::fgets(line, sizeof line, file))
        if (std::sscanf(line, "VmHWM: %lld kB", &kilobytes) == 1) break;
    std::fclose(file);
    return kilobytes < 0 ? -1 : kilobytes * 1024;
}

struct Part {
    std::string op;
    double seconds;
    long long times;
};

// Seconds by op over all streams but `evaluate`, the most first.
std::vector<Part> profile_of(tinytl_program* program) {
    std::vector<Part> parts;
    for (int stream = 0; stream < 3; ++stream) {
        std::vector<double> seconds(static_cast<size_t>(tinytl_instructions(program, stream)));
        tinytl_seconds(program, stream, seconds.data());
        for (size_t i = 0; i < seconds.size(); ++i) {
            const std::string op = tinytl_op(program, stream, static_cast<int64_t>(i));
            auto at = std::find_if(parts.begin(), parts.end(), [&](const Part& part) { return part.op == op; });
            if (at == parts.end()) at = parts.insert(parts.end(), {op, 0, 0});
            at->seconds += seconds[i];
            ++at->times;
        }
    }
    std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.seconds > b.seconds; });
    return parts;
}

struct Result {
    double open_seconds, first_seconds, median_seconds;
    std::vector<double> losses;
    std::vector<long long> correct;
    std::vector<Part> parts;
    std::vector<long long> numbers;  // of the program, by their keys

    long long number(int key) const { return numbers[static_cast<size_t>(key)]; }
};

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    const size_t half = values.size() / 2;
    return values.size() % 2 ? values[half] : 0.5 * (values[half - 1] + values[half]);
}

void print_json(const Options& options, const Result& result) {
    auto number = [&](int key) { return result.number(key); };
    const std::vector<Part>& parts = result.parts;
    std::printf("{\"isa\": \"%s\", \"threads\": %lld, \"batch\": %lld, \"micro_batch\": %lld, \"steps\": %ld, ", tinytl_isa(),
                number(TINYTL_THREADS), number(TINYTL_BATCH), number(TINYTL_MICRO_BATCH), options.steps);
    std::printf("\"open_seconds\": %.6f, \"first_step_seconds\": %.6f, \"step_seconds\": %.6f, ", result.open_seconds,
                result.first_seconds, result.median_seconds);
    std::printf("\"arena_planned_bytes\": %lld, \"arena_used_bytes\": %lld, \"state_bytes\": %lld, \"data_bytes\": %lld, "
                "\"peak_rss_bytes\": %lld, \"losses\": [", number(TINYTL_ARENA_BYTES), number(TINYTL_ARENA_USED),
                number(TINYTL_STATE_BYTES), number(TINYTL_DATA_BYTES), peak_resident());
    for (size_t i = 0; i < result.losses.size(); ++i) std::printf("%s%.9g", i ? ", " : "", result.losses[i]);
    std::printf("], \"correct\": [");
    for (size_t i = 0; i < result.correct.size(); ++i) std::printf("%s%lld", i ? ", " : "", result.correct[i]);
    std::printf("]");
    if (options.profile) {
        std::printf(", \"profile\": [");
        for (size_t i = 0; i < parts.size(); ++i)
            std::printf("%s{\"op\": \"%s\", \"instructions\": %lld, \"step_seconds\": %.6f}", i ? ", " : "",
                        parts[i].op.c_str(), parts[i].times, parts[i].seconds / static_cast<double>(options.steps));
        std::printf("]");
    }
    std::printf("}\n");
}

void print_text(const Options& options, const Result& result) {
    auto megabytes = [&](int key) { return 1e-6 * static_cast<double>(result.number(key)); };
    const double batch = static_cast<double>(result.number(TINYTL_BATCH));
    for (size_t i = 0; i < result.losses.size(); ++i)
        std::printf("step %zu: loss %.6f, %lld of %.0f right\n", i + 1, result.losses[i], result.correct[i], batch);
    std::printf("opened in %.1f ms; first step %.1f ms, median of the rest %.1f ms (%s, %lld threads)\n",
                1e3 * result.open_seconds, 1e3 * result.first_seconds, 1e3 * result.median_seconds, tinytl_isa(),
                result.number(TINYTL_THREADS));
    std::printf("arena %.3f MB planned, %.3f MB used; weights %.3f MB; this process at most %.3f MB\n",
                megabytes(TINYTL_ARENA_BYTES), megabytes(TINYTL_ARENA_USED), megabytes(TINYTL_DATA_BYTES),
                1e-6 * static_cast<double>(peak_resident()));
    if (!options.profile) return;
    for (const Part& part : result.parts)
        std::printf("%10.3f ms a step  %4lld x %s\n", 1e3 * part.seconds / static_cast<double>(options.steps), part.times,
                    part.op.c_str());
}

}  // namespace

int main(int count, char** words) {
    const Options options = parse(count, words);
    Source pixels(options.images, static_cast<uint64_t>(options.seed));
    Source classes(options.labels, static_cast<uint64_t>(options.seed) + 1);

    const double begin = seconds_now();
    tinytl_program* program;
    if (tinytl_open(options.program, static_cast<int>(options.threads), options.check, &program)) refuse(tinytl_error());
    Result result = {};
    result.open_seconds = seconds_now() - begin;
    tinytl_timing(program, options.profile);

    const size_t batch = static_cast<size_t>(tinytl_number(program, TINYTL_BATCH));
    const size_t image = static_cast<size_t>(tinytl_number(program, TINYTL_HEIGHT) * tinytl_number(program, TINYTL_WIDTH) * 3);
    const uint32_t known = static_cast<uint32_t>(tinytl_number(program, TINYTL_CLASSES));
    uint8_t* const images = tinytl_images(program);
    int32_t* const labels = tinytl_labels(program);
    std::vector<double> seconds;
    for (long step = 0; step < options.steps; ++step) {
        if (pixels.given()) pixels.read(images, batch, image);
        else
            for (size_t i = 0; i < batch * image; ++i) images[i] = static_cast<uint8_t>(pixels.next());
        if (classes.given()) classes.read(labels, batch, sizeof *labels);
        else
            for (size_t i = 0; i < batch; ++i) labels[i] = static_cast<int32_t>(classes.next() % known);
        double loss;
        int64_t correct;
        const double started = seconds_now();
        if (tinytl_step(program, static_cast<int64_t>(batch), options.lr, options.seed, &loss, &correct))
            refuse(std::string(options.program) + ", step " + std::to_string(step + 1) + ": " + tinytl_error());
        seconds.push_back(seconds_now() - started);
        result.losses.push_back(loss / static_cast<double>(batch));
        result.correct.push_back(correct);
    }
    result.first_seconds = seconds[0];
    result.median_seconds = median(seconds.size() > 1 ? std::vector<double>(seconds.begin() + 1, seconds.end()) : seconds);
    if (options.profile) result.parts = profile_of(program);
    for (int key = TINYTL_BATCH; key <= TINYTL_DATA_BYTES; ++key) result.numbers.push_back(tinytl_number(program, key));
    tinytl_close(program);  // first, so that the code that prints does not come on top of what training held
    (options.json ? print_json : print_text)(options, result);
    return 0;
}
