// Adam's direction and moments for one element (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR
// 2019, algorithm 2). Host and device; sculpt_ops/reference.py computes the same, operation by operation.
#pragma once
#include <cmath>

#include "common/bits.h"

namespace sculpt {

// What one step has the same for all elements of a tensor. rate, root: lr over, and the square root of, the bias
// corrections 1 - beta^count. decay: lr times weight decay. Computed in double, since 1 - 0.999 in float is off by 2^-14.
struct AdamStep {
  float rest1, beta2, rest2, rate, root, eps, decay, sign;

  SCULPT_HOST_DEVICE static AdamStep of(double lr, double beta1, double beta2, double eps, double weight_decay,
                                        bool maximize, double count) {
    return {float(1.0 - beta1),
            float(beta2),
            float(1.0 - beta2),
            float(lr / (1.0 - pow(beta1, count))),
            float(sqrt(1.0 - pow(beta2, count))),
            float(eps),
            float(lr * weight_decay),
            maximize ? -1.0f : 1.0f};
  }
};

SCULPT_HOST_DEVICE inline float adam_direction(float grad, float& first, float& second, const AdamStep& step) {
  grad *= step.sign;
  first += step.rest1 * (grad - first);
  second = step.beta2 * second + step.rest2 * grad * grad;
  return -(step.rate * first) / (sqrtf(second) / step.root + step.eps);
}

}  // namespace sculpt
