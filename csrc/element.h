// What happens to one element of one tensor, and the scalars it needs: the same source for the device and, in the
// tests, for the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SOFLOW_INLINE __host__ __device__ __forceinline__
#else
#define SOFLOW_INLINE inline
#endif

namespace soflow {

// The hyper-parameters of one param group. radam: 1 for RAdam, 0 for AdamW.
struct Group {
  double lr, beta1, beta2, eps, weight_decay, radam;
};

// One average. gamma >= 0: a power-function profile; below 0: the constant `decay` of one update. in_double: 0 or 1.
struct Profile {
  double decay, every, gamma, in_double;
};

// AdamW and RAdam are one update with other scalars:
//   w = decay w;  g = g + l2 w;  m, v moments;  w = w + m (adaptive / (sqrt(v) root + eps) + plain)
struct Coefficients {
  float decay, l2, weight1, beta2, weight2, eps, root, adaptive, plain;
};

// The scalars of the `step`-th update of a tensor, from 1, as torch.optim.AdamW and torch.optim.RAdam define them.
SOFLOW_INLINE Coefficients coefficients(const Group& group, double step) {
  const double power2 = pow(group.beta2, step);
  const double bias1 = 1.0 - pow(group.beta1, step);
  const double bias2 = 1.0 - power2;
  double decay = 1.0, l2 = 0.0, root = 1.0, adaptive = 0.0, plain = 0.0;
  if (group.radam == 0.0) {
    decay = 1.0 - group.lr * group.weight_decay;
    root = 1.0 / sqrt(bias2);
    adaptive = -group.lr / bias1;
  } else {
    l2 = group.weight_decay;
    const double rho_inf = 2.0 / (1.0 - group.beta2) - 1.0;
    const double rho = rho_inf - 2.0 * step * power2 / bias2;
    if (rho > 5.0) {
      const double rect = sqrt((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho));
      adaptive = -group.lr * rect * sqrt(bias2) / bias1;
    } else {
      plain = -group.lr / bias1;
    }
  }
  return {static_cast<float>(decay),
          static_cast<float>(l2),
          static_cast<float>(1.0 - group.beta1),
          static_cast<float>(group.beta2),
          static_cast<float>(1.0 - group.beta2),
          static_cast<float>(group.eps),
          static_cast<float>(root),
          static_cast<float>(adaptive),
          static_cast<float>(plain)};
}

// The decay of an average in the update after `finished` ones, or -1 where it does not move.
SOFLOW_INLINE double decay_at(const Profile& profile, long long finished) {
  const long long every = static_cast<long long>(profile.every);
  if (finished % every != 0) return -1.0;
  if (profile.gamma < 0.0) return profile.decay;
  const double rest = 1.0 - profile.every / static_cast<double>(finished + 1);
  return rest > 0.0 ? pow(rest, profile.gamma + 1.0) : 0.0;
}

// What the gradient is multiplied with so that its norm is at most `clip_norm` (infinity: no bound).
SOFLOW_INLINE float clip_scale(double clip_norm, double norm) {
  const double scale = clip_norm / (norm + 1e-6);
  return scale >= 1.0 ? 1.0f : static_cast<float>(scale);  // of a norm that is no number: NaN, as in PyTorch
}

SOFLOW_INLINE void update_element(const Coefficients& c, float g, float& w, float& m, float& v) {
  w *= c.decay;
  g += c.l2 * w;
  // of the two forms of the interpolation the one that is exact at its nearer end
  m = c.weight1 < 0.5f ? m + c.weight1 * (g - m) : g - (g - m) * (1.0f - c.weight1);
  v = c.beta2 * v + c.weight2 * g * g;
  w += m * (c.adaptive / (sqrtf(v) * c.root + c.eps) + c.plain);
}

SOFLOW_INLINE float average_element(double decay, bool in_double, float average, float w) {
  if (in_double) return static_cast<float>(decay * average + (1.0 - decay) * w);
  // as for m: factors rounded apart do not sum to 1, and the average would be of another size than the weights
  const float weight = static_cast<float>(1.0 - decay);
  return weight < 0.5f ? average + weight * (w - average) : w - (w - average) * static_cast<float>(decay);
}

SOFLOW_INLINE float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof(value));
  return value;
}

// Rounds to nearest, ties to even.
SOFLOW_INLINE uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN, which rounding could make infinite
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace soflow
