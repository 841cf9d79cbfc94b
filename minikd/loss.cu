// The losses of a token and their gradient, from rows of bfloat16 logits, in two passes; head._costs makes some twenty, over
// float32 copies. Both models' logits are read twice and the gradient is written: 10 bytes per pair of logits. This traffic takes
// the time: loss_* issues some 21 instructions per pair, and an H200 has time for 27 while it reads a pair.
//
//   loss_*        reads the student's logits s and the teacher's t once: CE of the target, the divergence D, and what the
//                 gradient needs of the row (a Row)
//   loss_grad_*   reads both again and overwrites s with  slope_ce dCE/ds + slope_kd dD/ds
//
// A block handles one row, and each thread every blockDim-th group of 8 logits. Only the logits in memory are bfloat16: every sum
// is in float32. With q and p the two softmaxes at temperature T, and q_1 the student's at 1:
//
//   dCE/ds = q_1 - onehot(target)
//   forward  D = KL(p || q) = Σ p (log p - log q)       dD/ds = (q - p) / T
//   reverse  D = KL(q || p) = Σ q (log q - log p)       dD/ds = q (log q - log p - D) / T
//   entropy  H(q) = -Σ q log q, computed as reverse with t = 0; it is only measured, so it has no gradient kernel

namespace loss {                                        // so that no name clashes with the other files'

enum { NONE, ENTROPY, FORWARD, REVERSE };               // what is measured besides CE; FORWARD and REVERSE read t
const int THREADS = 512;
const u32 TWO_LEAST = 0xf149f149u;                      // LEAST cut to bfloat16's bits, twice
const float CUT_LEAST = -9.953038e29f;                  // its value

// Sums over a part of a row that can be added up in any order ("online softmax", arXiv:1805.02867): exponents are relative to
// the largest logit of the part, because e^s itself overflows.
struct Row {
    float s_most, t_most;                               // the largest logits
    float s_mass, t_mass;                               // Σ e^((s - s_most) / T), Σ e^((t - t_most) / T)
    float plain;                                        // Σ e^(s - s_most), for CE; if T is 1, only set at the end: to s_mass
    float gap;                                          // forward: Σ e^((t - t_most) / T) ((t - t_most) - (s - s_most))
};                                                      // reverse: s and t change places.  In `rows` it is the mean

// -inf, an excluded token, becomes CUT_LEAST: then 0 log 0 is 0, where inf - inf would be NaN.
__device__ __forceinline__ Words clamp(Words v) {
    for (int i = 0; i < 4; i++) v.w[i] = max_pair(v.w[i], TWO_LEAST);
    return v;
}
__device__ __forceinline__ float largest(Words v) {
    u32 pair = max_pair(max_pair(v.w[0], v.w[1]), max_pair(v.w[2], v.w[3]));
    return fmaxf(low(pair), high(pair));
}
__device__ __forceinline__ float clamped(u16 bits) { return low(max_pair(bits, TWO_LEAST)); }

// Makes x's sums relative to larger logits. In `gap` each (t - t_most) - (s - s_most) grows by dt - ds, so the sum grows by
// dt - ds times the mass of its weights; then all sums are scaled down.
template <int KIND> __device__ __forceinline__ void raise(Row& x, float s_most, float t_most, float T) {
    float ds = x.s_most - s_most, dt = x.t_most - t_most;       // 0 or below
    float s_part = power_of_2(ds * (LOG2_E / T)), t_part = power_of_2(dt * (LOG2_E / T));
    if (KIND == FORWARD) x.gap = (x.gap + x.t_mass * (dt - ds)) * t_part;
    if (KIND == REVERSE || KIND == ENTROPY) x.gap = (x.gap + x.s_mass * (ds - dt)) * s_part;
    x.s_mass *= s_part, x.t_mass *= t_part, x.s_most = s_most, x.t_most = t_most;
    if (T != 1) x.plain *= power_of_2(ds * LOG2_E);
}
template <int KIND> __device__ __forceinline__ void merge(Row& x, Row y, float T) {
    float s_most = fmaxf(x.s_most, y.s_most), t_most = fmaxf(x.t_most, y.t_most);
    raise<KIND>(x, s_most, t_most, T), raise<KIND>(y, s_most, t_most, T);
    x.s_mass += y.s_mass, x.t_mass += y.t_mass, x.plain += y.plain, x.gap += y.gap;
}
template <int KIND> __device__ __forceinline__ void merge_lanes(Row& x, float T) {      // afterwards every lane has the sums
    for (int d = 16; d; d /= 2) {
        Row y;
        for (int i = 0; i < 6; i++) ((float*)&y)[i] = __shfl_xor_sync(~0u, ((float*)&x)[i], d);
        merge<KIND>(x, y, T);
    }
}
template <int KIND> __device__ __forceinline__ void add(Row& x, Words s, Words t, float T) {
    s = clamp(s);
    if (KIND >= FORWARD) t = clamp(t);
    raise<KIND>(x, fmaxf(x.s_most, largest(s)), KIND >= FORWARD ? fmaxf(x.t_most, largest(t)) : 0, T);
    Row part = {};                                      // sums of 8, then sums of those: rounding loses less
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float ds = value(s, j) - x.s_most, s_part = power_of_2(ds * (LOG2_E / T));
        part.s_mass += s_part;
        if (KIND >= FORWARD) {
            float dt = value(t, j) - x.t_most, t_part = power_of_2(dt * (LOG2_E / T));
            part.t_mass += t_part;
            part.gap += KIND == FORWARD ? t_part * (dt - ds) : s_part * (ds - dt);
        }
        if (KIND == ENTROPY) part.gap += s_part * ds;
    }
    x.s_mass += part.s_mass, x.t_mass += part.t_mass, x.gap += part.gap;
    if (T != 1) {
#pragma unroll
        for (int j = 0; j < 8; j++) part.plain += power_of_2((value(s, j) - x.s_most) * LOG2_E);
        x.plain += part.plain;
    }
}

template <int KIND>
__device__ __forceinline__ void costs(const u16* s, const u16* t, const long long* targets, Row* rows, float* ce, float* kd,
                                      int V, int stride, float T) {
    __shared__ alignas(16) Row parts[THREADS / 32];     // of each warp
    const int n = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, step = blockDim.x;
    s += (long long)n * stride, t += KIND >= FORWARD ? (long long)n * stride : 0;
    const Words *s8 = (const Words*)s + threadIdx.x, *t8 = (const Words*)t + threadIdx.x;
    const Row empty = {CUT_LEAST, KIND >= FORWARD ? CUT_LEAST : 0};
    Row x = empty;
    int left = V / 8 - threadIdx.x;                     // groups of 8, of which every step-th is this thread's
    Words next_s = {}, next_t = {};
    if (left > 0) next_s = load_once(s8), next_t = KIND >= FORWARD ? load_once(t8) : next_t;
    for (; left > 0; left -= step) {
        Words now_s = next_s, now_t = next_t;
        s8 += step, t8 += step;
        if (left > step) next_s = load_once(s8), next_t = KIND >= FORWARD ? load_once(t8) : next_t;    // in flight meanwhile
        add<KIND>(x, now_s, now_t, T);
    }
    if (threadIdx.x < V % 8) {                          // the rest, fewer than 8
        int v = V / 8 * 8 + threadIdx.x;
        merge<KIND>(x, Row{clamped(s[v]), KIND >= FORWARD ? clamped(t[v]) : 0, 1, 1, 1, 0}, T);
    }
    merge_lanes<KIND>(x, T);
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    if (warp) return;
    x = lane < step / 32 ? parts[lane] : empty;
    merge_lanes<KIND>(x, T);
    if (lane) return;
    if (T == 1) x.plain = x.s_mass;
    int target = targets[n];
    ce[n] = (unsigned)target < V ? logf(x.plain) - (bf16(s[target]) - x.s_most) : __int_as_float(0x7fffffff);     // NaN
    float mean = x.gap / (KIND == FORWARD ? x.t_mass : x.s_mass), ratio = x.s_mass / x.t_mass;
    float D = KIND >= FORWARD ? mean / T + logf(KIND == FORWARD ? ratio : 1 / ratio) : 0;
    if (KIND == ENTROPY) D = logf(x.plain) - mean;
    kd[n] = D > 1e10f ? infinity() : D;                 // as in losses.kl: only CUT_LEAST makes it so large
    x.gap = mean;                                       // for `gradient`
    rows[n] = x;
}

template <int KIND>
__device__ __forceinline__ void gradient(u16* s, const u16* t, const long long* targets, const Row* rows, const float* slope_ce,
                                         const float* slope_kd, int V, int stride, float T) {
    const int n = gridDim.x - 1 - blockIdx.x;           // backwards: the rows that loss_* read last are still in the L2
    s += (long long)n * stride, t += KIND >= FORWARD ? (long long)n * stride : 0;
    const Row x = rows[n];
    const int target = targets[n], step = blockDim.x;
    const float a = slope_ce[n], a_plain = a / x.plain, b = KIND ? slope_kd[n] / T : 0, scale = LOG2_E / T;
    // Times its exponential, a_plain is a q_1, b_s is b q, for REVERSE over T, and b_t is b p.
    const float b_s = b / x.s_mass / (KIND == REVERSE ? T : 1), b_t = KIND ? b / x.t_mass : 0;
    auto slope = [&](float sv, float tv, int v) {       // of the cost with respect to logit v; both logits are clamped
        float ds = sv - x.s_most, dt = tv - x.t_most;
        float s_part = power_of_2(ds * scale), g = a_plain * (T == 1 ? s_part : power_of_2(ds * LOG2_E));
        if (KIND == FORWARD) g += b_s * s_part - b_t * power_of_2(dt * scale);
        if (KIND == REVERSE) g += b_s * s_part * (ds - dt - x.gap);     // the last factor is T (log q - log p - D)
        if (sv == CUT_LEAST) g = 0;                 // an excluded token's probability is 0 whatever its logit
        return v == target ? g - a : g;
    };
    Words *s8 = (Words*)s + threadIdx.x, next_s = {}, next_t = {};
    const Words* t8 = (const Words*)t + threadIdx.x;
    int left = V / 8 - threadIdx.x, v = 8 * threadIdx.x;
    if (left > 0) next_s = *s8, next_t = KIND >= FORWARD ? load_once(t8) : next_t;
    for (; left > 0; left -= step, v += 8 * step, s8 += step) {
        Words now_s = clamp(next_s), now_t = clamp(next_t), out;
        t8 += step;
        if (left > step) next_s = s8[step], next_t = KIND >= FORWARD ? load_once(t8) : next_t;
#pragma unroll
        for (int j = 0; j < 8; j += 2)
            out.w[j / 2] = to_bf16_pair(slope(value(now_s, j), value(now_t, j), v + j),
                                        slope(value(now_s, j + 1), value(now_t, j + 1), v + j + 1));
        *s8 = out;
    }
    if (threadIdx.x < V % 8) {
        v = V / 8 * 8 + threadIdx.x;
        s[v] = to_bf16(slope(clamped(s[v]), KIND >= FORWARD ? clamped(t[v]) : 0, v));
    }
}

// ---- grid (n), one row of V logits each; rows are `stride` apart, a multiple of 8, so that loads of 16 bytes are aligned

#define COSTS(NAME, KIND) \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME( \
            const u16* s, const u16* t, const long long* targets, Row* rows, float* ce, float* kd, int V, int stride, float T) { \
        costs<KIND>(s, t, targets, rows, ce, kd, V, stride, T); \
    }
#define GRADIENT(NAME, KIND) \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME( \
            u16* s, const u16* t, const long long* targets, const Row* rows, const float* slope_ce, const float* slope_kd, \
            int V, int stride, float T) { \
        gradient<KIND>(s, t, targets, rows, slope_ce, slope_kd, V, stride, T); \
    }

COSTS(loss_ce, NONE)
COSTS(loss_entropy, ENTROPY)
COSTS(loss_forward, FORWARD)
COSTS(loss_reverse, REVERSE)
GRADIENT(loss_grad_ce, NONE)
GRADIENT(loss_grad_forward, FORWARD)
GRADIENT(loss_grad_reverse, REVERSE)

}
