// One step of AdamW (arXiv:1711.05101, Algorithm 2) for all weights, in two kernels: adamw_norm adds up the squares of the
// gradient, adamw_step clips it by its norm, updates the weights, and writes the bfloat16 copies that training's graphs read
// (graphs.Copies). A step takes the time of its traffic: weights and moments are read once and written once, 12 bytes each way
// per weight, a gradient of 2 or 4 is read by both kernels, a copy of 2 is written.
//
//   g = min(1, most / (|gradient| + 1e-6)) gradient      m += (1 - beta1) (g - m)      v = beta2 v + (1 - beta2) g^2
//   w = w - lr decay w - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

namespace adamw {

const int CHUNK = 16384, LANES = 4;                     // values that a block handles; that a thread does at once

struct Piece {                                          // a weight, its moments, its gradient
    float *weight, *first, *second;
    const void* gradient;                               // float, or bfloat16 if `low`
    u16* copy;                                          // null if there is none
    long long size;                                     // a multiple of LANES
    int low;
    float decay;
};
struct alignas(16) Four { float of[LANES]; };

__device__ __forceinline__ Four gradient_at(const Piece& piece, long long i) {
    if (!piece.low) return ((const Four*)piece.gradient)[i / LANES];
    Pair pair = ((const Pair*)piece.gradient)[i / LANES];
    return Four{{low(pair.w[0]), high(pair.w[0]), low(pair.w[1]), high(pair.w[1])}};
}

// ---- grid (chunks), each a piece and the number of the CHUNK within it

extern "C" __global__ void __launch_bounds__(256) adamw_norm(const Piece* pieces, const int* chunks, float* squares) {
    __shared__ alignas(16) float parts[8];
    const Piece piece = pieces[chunks[2 * blockIdx.x]];
    long long begin = (long long)chunks[2 * blockIdx.x + 1] * CHUNK, end = min(begin + CHUNK, piece.size);
    float sum = 0;
#pragma unroll 4
    for (long long i = begin + LANES * threadIdx.x; i < end; i += LANES * blockDim.x) {
        Four g = gradient_at(piece, i);
        for (int j = 0; j < LANES; j++) sum += g.of[j] * g.of[j];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    for (int w = 1; w < blockDim.x / 32; w++) sum += parts[w];
    squares[blockIdx.x] = sum;
}

// factors: what the gradient is multiplied by; lr / (1 - beta1^t); 1 / sqrt(1 - beta2^t).  rest1 is 1 - beta1
extern "C" __global__ void __launch_bounds__(256) adamw_step(const Piece* pieces, const int* chunks, const float* factors,
                                                             float lr, float rest1, float beta2, float rest2, float eps) {
    const Piece piece = pieces[chunks[2 * blockIdx.x]];
    long long begin = (long long)chunks[2 * blockIdx.x + 1] * CHUNK, end = min(begin + CHUNK, piece.size);
    const float scale = factors[0], rate = factors[1], root = factors[2], shrink = 1 - lr * piece.decay;
#pragma unroll 2
    for (long long i = begin + LANES * threadIdx.x; i < end; i += LANES * blockDim.x) {
        Four *weight = (Four*)(piece.weight + i), *first = (Four*)(piece.first + i), *second = (Four*)(piece.second + i);
        Four w = *weight, m = *first, v = *second, g = gradient_at(piece, i);
        for (int j = 0; j < LANES; j++) {
            float clipped = scale * g.of[j];
            m.of[j] += rest1 * (clipped - m.of[j]);
            v.of[j] = beta2 * v.of[j] + rest2 * clipped * clipped;
            w.of[j] = shrink * w.of[j] - rate * m.of[j] / (sqrtf(v.of[j]) * root + eps);
        }
        *weight = w, *first = m, *second = v;
        if (piece.copy) *(Pair*)(piece.copy + i) = Pair{{to_bf16_pair(w.of[0], w.of[1]), to_bf16_pair(w.of[2], w.of[3])}};
    }
}

}
