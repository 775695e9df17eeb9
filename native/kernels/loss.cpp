// Softmax and cross entropy with label smoothing, and the gradient of its mean over the batch.
#include "elementwise.hpp"
#include "kernels.hpp"
#include "smooth_math.hpp"

namespace tinytl {
namespace TINYTL_ISA {

void softmax_loss(const Call& call) {
    const int64_t classes = call.tensor(0).elements;
    const int32_t* labels = call.at<const int32_t>(1);
    double* metrics = call.at<double>(3);
    const double smoothing = call.attribute(0), count = static_cast<double>(call.step.count);
    double loss = 0, right = 0;
    for (int64_t n = 0; n < call.images; ++n) {
        const float* logits = call.at<const float>(0) + n * classes;
        float* grad = call.at<float>(2) + n * classes;  // may be the logits
        const int64_t label = labels[n];
        int64_t best = 0;
        double sum = 0;
        for (int64_t c = 0; c < classes; ++c) {
            if (logits[c] > logits[best] || (logits[c] != logits[c] && logits[best] == logits[best])) best = c;
            sum += static_cast<double>(logits[c]);
        }
        const float highest = logits[best], wanted = logits[label];
        vectors(classes, [&](int64_t c, auto lanes) { put(grad + c, exp(get(logits + c, lanes) - highest), lanes); });
        double total = 0;
        for (int64_t c = 0; c < classes; ++c) total += static_cast<double>(grad[c]);
        // -log of the probabilities: of the label's, and of all on average
        const double log_total = __builtin_log(total) + static_cast<double>(highest);
        loss += (1 - smoothing) * (log_total - static_cast<double>(wanted)) +
                smoothing * (log_total - sum / static_cast<double>(classes));
        right += best == label;
        const float factor = static_cast<float>(1 / (total * count));
        const float everywhere = static_cast<float>(smoothing / static_cast<double>(classes) / count);
        vectors(classes, [&](int64_t c, auto lanes) {
            put(grad + c, get(grad + c, lanes) * factor - everywhere, lanes);
        });
        grad[label] -= static_cast<float>((1 - smoothing) / count);
    }
    metrics[0] += loss;
    metrics[1] += right;
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
