// One token of one row, the whole decoder in one kernel. It is compiled behind w4_matmul.cu and uses what stands there.
//
// A step at batch 1 reads every weight once and does little else; launched as some 18 kernels a layer it mostly waits, for
// each one's start and for the first bytes to arrive. Here one block a multiprocessor stays for the whole step. Each layer
// is five stages, and before each of them all blocks wait for each other:
//
//   1  RMSNorm, q/k/v, RoPE, into the cache
//   2  attention, each head's keys in up to SPLITS parts
//   3  the parts of a head joined, o, residual
//   4  RMSNorm, gate/up, silu
//   5  down, residual
//
// Weights do not depend on the stage before: every warp asks for its next weights first, and then waits for the others, so
// that the memory goes on working through the wait.

const int WARPS = 8, THREADS = 32 * WARPS, WIDEST = 20480, SPLITS = 16, AT_ONCE = 4;

struct Matrix { const void* weight; const u16* scales; const u8* zeros; };     // bfloat16 [N, K]; or as repack lays it
struct Layer {                                          // addresses alone: decode_cuda.py writes them as int64
    const u16 *norm, *bias;                             // [D], [(H + 2K) E]
    Matrix qkv, o;                                      // [(H + 2K) E, D], [D, H E]
    const u16* second_norm;                             // [D]
    Matrix gate_up, down;                               // [2I, D], [D, I]
    u16 *keys, *values;                                 // [K, S, E]
};
struct Step {
    const Layer* layers;
    u16* x;                                             // [D] the residual stream: the token's embedding at first
    u16 *q, *wide;                                      // [H, E], [I] between two stages
    float* parts;                                       // [H, SPLITS, E + 2] softmax over a part of the keys
    const u16 *cos, *sin;                               // [S, E]
    long long* slot;                                    // [1] where the token's key goes; one further at the end
    u32* arrived;                                       // [1] of wait_for_all; 0 at first
    int L, D, I, H, K, E, S, group;
    float eps;
};
struct alignas(16) Shared {
    union { u16 in[WIDEST]; float sums[WARPS * 258]; }; // a product's input; attention's sums, a warp each
    float part[WARPS][32];                              // of a product's outputs
    Layer layer[2];                                     // this one's addresses, and the next one's
};

#ifndef W4_ON_CPU

// What another block may have written: from the L2, past this multiprocessor's own cache.
__device__ __forceinline__ Words load_fresh(const Words* p) {
    Words v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u16 load_fresh(const u16* p) {
    u16 v;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ float load_fresh(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
// As load_once, zeros where not `there`.
__device__ __forceinline__ Words load_once_if(bool there, const Words* p) {
    Words v;
    asm volatile("{.reg .pred there; setp.ne.u32 there, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
                 "@there ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];}"
                 : "=&r"(v.w[0]), "=&r"(v.w[1]), "=&r"(v.w[2]), "=&r"(v.w[3]) : "l"(p), "r"((u32)there));
    return v;
}
__device__ __forceinline__ u32 add_release(u32* p, u32 value) {         // whoever acquires sees what was written before
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(value) : "memory");
    return before;
}
__device__ __forceinline__ u32 load_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void wait_for_team(int team, int threads) {  // barrier 0 is the block's
    asm volatile("bar.sync %0, %1;" :: "r"(team + 1), "r"(threads) : "memory");
}

#endif

__device__ __forceinline__ float rounded(float f) { return bf16(to_bf16(f)); }
__device__ __forceinline__ float value(Words v, int i) { return i % 2 ? high(v.w[i / 2]) : low(v.w[i / 2]); }

// Until all blocks have come.  Each adds 1, the first one what is lacking to 2^31: so the last to come turns the topmost
// bit, and the rest of the count is 0 again for the next time.
__device__ __forceinline__ void wait_for_all(u32* arrived) {
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 before = add_release(arrived, blockIdx.x ? 1 : 0x80000000u - (gridDim.x - 1));
        while (!((before ^ load_acquire(arrived)) >> 31));
    }
    __syncthreads();
}

// ---- products of a weight and the vector in shared memory
//
// A team of warps takes PAIR runs of RUN outputs, `gap` apart; its warps take turns along their inputs, a UNIT at a time.

struct Bf16 {
    static const int RUN = 1, UNIT = 256;
    template <int PAIR> struct Ring { static const int DEPTH = 8 / PAIR; Words w[DEPTH][PAIR]; };
    template <int PAIR> struct Sum { float v[PAIR]; };
    const u16* weight;
    int K;

    __device__ Bf16(Matrix matrix, int N, int K, int group) : weight((const u16*)matrix.weight), K(K) {}

    template <int PAIR> __device__ __forceinline__ void fetch(Ring<PAIR>& ring, int d, int n, int gap, int unit) const {
        int k = unit * UNIT + threadIdx.x % 32 * 8;
#pragma unroll
        for (int p = 0; p < PAIR; p++)
            ring.w[d][p] = load_once_if(k < K, (const Words*)(weight + (long long)(n + p * gap) * K + k));
    }
    template <int PAIR> __device__ __forceinline__ void add(Sum<PAIR>& sum, const Ring<PAIR>& ring, int d, const u16* in,
                                                            int unit) const {
        Words x = *(const Words*)(in + unit * UNIT + threadIdx.x % 32 * 8);
#pragma unroll
        for (int p = 0; p < PAIR; p++)
#pragma unroll
            for (int i = 0; i < 8; i++) sum.v[p] += value(ring.w[d][p], i) * value(x, i);
    }
    template <int PAIR> __device__ __forceinline__ void show(const Sum<PAIR>& sum, float* part) const {
#pragma unroll
        for (int p = 0; p < PAIR; p++) {
            float v = sum.v[p];
            for (int mask = 16; mask; mask /= 2) v += __shfl_xor_sync(~0u, v, mask);
            if (threadIdx.x % 32 == 0) part[p] = v;
        }
    }
};

struct Int4 {                                           // as `tensor` in w4_matmul.cu; of the 8 rows of x one is real
    static const int RUN = 16, UNIT = 128;
    template <int PAIR> struct Ring {
        static const int DEPTH = 4 / PAIR;
        Words w[DEPTH][PAIR][2];
        u32 grid[DEPTH][PAIR][2];                       // the scale in the lower half, the zero in the upper one
    };
    template <int PAIR> struct Sum { float v[PAIR][2]; };
    const Words* words;
    const u16* scales;
    const u8* zeros;
    int blocks, stride, group;

    __device__ Int4(Matrix matrix, int N, int K, int group) : words((const Words*)matrix.weight), scales(matrix.scales),
        zeros(matrix.zeros), blocks(round_up(K, 128) / 128), stride(round_up(N, 16)), group(group) {}

    template <int PAIR> __device__ __forceinline__ void fetch(Ring<PAIR>& ring, int d, int n, int gap, int unit) const {
        int lane = threadIdx.x % 32, row = unit * 128 / group * stride + lane / 4;
#pragma unroll
        for (int p = 0; p < PAIR; p++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int first = n + p * gap, at = row + first + h * 8;
                ring.w[d][p][h] = load_once(words + ((long long)(first / 16) * blocks + unit) * 64 + h * 32 + lane);
                ring.grid[d][p][h] = scales[at] | (zeros ? zeros[at] : 8) << 16;
            }
    }
    template <int PAIR> __device__ __forceinline__ void add(Sum<PAIR>& sum, const Ring<PAIR>& ring, int d, const u16* in,
                                                            int unit) const {
        int lane = threadIdx.x % 32;
        u32 mask = in_register(0x000f000fu), top = in_register(0x43004300u);
        float part[PAIR][4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            Words x = {};
            if (lane < 4) x = *(const Words*)(in + unit * 128 + j * 32 + lane * 8);
#pragma unroll
            for (int i = 0; i < 4; i += 2)
#pragma unroll
                for (int p = 0; p < PAIR; p++) {
                    u32 a[4];
#pragma unroll
                    for (int q = 0; q < 4; q++)
                        a[q] = minus_pair(merge(ring.w[d][p][q % 2].w[j] >> 4 * (i + q / 2), mask, top),
                                          top | (ring.grid[d][p][q % 2] >> 16) * 0x10001u);
                    mma(part[p], a, x.w + i);
                }
        }
#pragma unroll
        for (int p = 0; p < PAIR; p++)
#pragma unroll
            for (int h = 0; h < 2; h++) sum.v[p][h] += half_to_float((u16)ring.grid[d][p][h]) * part[p][2 * h];
    }
    template <int PAIR> __device__ __forceinline__ void show(const Sum<PAIR>& sum, float* part) const {
        int lane = threadIdx.x % 32;
        if (lane % 4 == 0)                              // column 0 of the product
#pragma unroll
            for (int p = 0; p < PAIR; p++)
                for (int h = 0; h < 2; h++) part[p * 16 + h * 8 + lane / 4] = sum.v[p][h];
    }
};

// ready()        waits for the stage before and puts the product's input, K values and zeros after them, in shared memory
// done(n, a, b)  takes the outputs n and, of a pair, n + gap
template <class Weights, int PAIR, class Ready, class Done>
__device__ __forceinline__ void product(Shared& shared, Matrix matrix, int N, int K, int gap, int group, Ready ready,
                                        Done done) {
    const int RUN = Weights::RUN, DEPTH = Weights::template Ring<PAIR>::DEPTH;
    Weights weights(matrix, N, K, group);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tasks = N / (PAIR * RUN);
    int units = round_up(K, Weights::UNIT) / Weights::UNIT, split = 1;
    // Several warps a team only while no team has two tasks: so a task's parts are not written over while they are read.
    while (split < WARPS && 2 * split <= units && 2 * split * tasks <= WARPS * (int)gridDim.x) split *= 2;
    int team = warp / split, rank = warp % split, teams = WARPS / split * gridDim.x;

    struct At { int task, unit; } first = {team * (int)gridDim.x + (int)blockIdx.x, rank}, ahead = first;
    auto next = [&](At& at) {
        at.unit += split;
        if (at.unit >= units) at = {at.task + teams, rank};
    };
    auto output = [&](int task) {                       // a pair's first run, of `gap` after `gap` every other
        int run = task * RUN;
        return PAIR == 1 ? run : run / gap * 2 * gap + run % gap;
    };
    typename Weights::template Ring<PAIR> ring;
    auto fetch = [&](int d) {
        if (ahead.task < tasks) weights.fetch(ring, d, output(ahead.task), gap, ahead.unit);
        next(ahead);
    };
#pragma unroll
    for (int d = 0; d < DEPTH; d++) fetch(d);
    ready();

    typename Weights::template Sum<PAIR> sum = {};
    for (At now = first; now.task < tasks;)
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {               // unrolled, so that the ring lies in registers
            if (now.task >= tasks) break;
            weights.add(sum, ring, d, shared.in, now.unit);
            fetch(d);
            if (now.unit + split >= units) {            // the last of this task
                weights.show(sum, shared.part[warp]);
                sum = {};
                if (split > 1) wait_for_team(team, 32 * split);
                else __syncwarp();
                if (rank == 0 && lane < RUN) {
                    float a = 0, b = 0;
                    for (int w = warp; w < warp + split; w++) {
                        a += shared.part[w][lane];
                        if (PAIR == 2) b += shared.part[w][RUN + lane];
                    }
                    done(output(now.task) + lane, a, b);
                }
            }
            next(now);
        }
}

// ---- what stands between

// x / rms(x) * weight, into shared memory.  RMSNorm eq. (4).  D <= 16 THREADS
__device__ __forceinline__ void normalise(Shared& shared, const u16* x, const u16* weight, int D, float eps) {
    int first = threadIdx.x * 8, warp = threadIdx.x / 32;
    Words mine[2] = {}, gain[2] = {};
    float sum = 0;
#pragma unroll
    for (int c = 0; c < 2; c++) {
        int at = first + c * 8 * THREADS;
        if (at < D) mine[c] = load_fresh((const Words*)(x + at)), gain[c] = load_if(true, (const Words*)(weight + at));
        for (int i = 0; i < 8; i++) sum += value(mine[c], i) * value(mine[c], i);
    }
    for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    if (threadIdx.x % 32 == 0) shared.part[warp][0] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < WARPS; w++) sum += shared.part[w][0];
    float inverse = rsqrtf(sum / D + eps);
#pragma unroll
    for (int c = 0; c < 2; c++) {
        int at = first + c * 8 * THREADS;
        if (at >= round_up(D, 256)) break;
        Words out;
        for (int i = 0; i < 4; i++)
            out.w[i] = to_bf16(low(gain[c].w[i]) * rounded(low(mine[c].w[i]) * inverse))
                       | (u32)to_bf16(high(gain[c].w[i]) * rounded(high(mine[c].w[i]) * inverse)) << 16;
        *(Words*)(shared.in + at) = out;
    }
    __syncthreads();
}

// Two softmax sums over different keys, each relative to its own greatest score, become one.
__device__ __forceinline__ float join(float& most, float& mass, float other_most, float other_mass, float& other_share) {
    float top = fmaxf(most, other_most), share = __expf(most - top);
    other_share = __expf(other_most - top);
    mass = mass * share + other_mass * other_share, most = top;
    return share;
}

// One head's softmax over a part of the keys, by one block: 8 values of a key a lane, AT_ONCE keys on their way.
__device__ __forceinline__ void attend(Shared& shared, const Step& s, const Layer& layer, int head, int begin, int end,
                                       float* out) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, lanes = s.E / 8, keys = 32 / lanes, column = lane % lanes * 8;
    long long base = (long long)(head / (s.H / s.K)) * s.S;
    Words q = load_fresh((const Words*)(s.q + head * s.E + column));
    float most = -1e30f, mass = 0, sum[8] = {}, scale = rsqrtf(s.E), share, other;
    for (int first = begin + warp * keys * AT_ONCE; first < end; first += WARPS * keys * AT_ONCE) {
        Words k[AT_ONCE] = {}, v[AT_ONCE] = {};
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            int at = first + u * keys + lane / lanes;
            if (at < end) {
                k[u] = load_fresh((const Words*)(layer.keys + (base + at) * s.E + column));
                v[u] = load_fresh((const Words*)(layer.values + (base + at) * s.E + column));
            }
        }
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            float score = 0;
            for (int i = 0; i < 8; i++) score += value(q, i) * value(k[u], i);
            for (int mask = lanes / 2; mask; mask /= 2) score += __shfl_xor_sync(~0u, score, mask);
            if (first + u * keys + lane / lanes >= end) continue;
            share = join(most, mass, score * scale, 1, other);
            for (int i = 0; i < 8; i++) sum[i] = sum[i] * share + other * value(v[u], i);
        }
    }
    for (int mask = 16; mask >= lanes; mask /= 2) {     // the keys that other lanes of the warp saw
        float other_most = __shfl_xor_sync(~0u, most, mask), other_mass = __shfl_xor_sync(~0u, mass, mask);
        share = join(most, mass, other_most, other_mass, other);
        for (int i = 0; i < 8; i++) sum[i] = sum[i] * share + other * __shfl_xor_sync(~0u, sum[i], mask);
    }
    float* mine = shared.sums + warp * (s.E + 2);
    for (int i = 0; i < 8 && lane < lanes; i++) mine[column + i] = sum[i];
    if (lane == 0) mine[s.E] = most, mine[s.E + 1] = mass;
    __syncthreads();
    int e = threadIdx.x;
    if (e < s.E) {                                      // and other warps
        most = -1e30f, mass = 0;
        float v = 0;
        for (int w = 0; w < WARPS; w++) {
            const float* theirs = shared.sums + w * (s.E + 2);
            share = join(most, mass, theirs[s.E], theirs[s.E + 1], other);
            v = v * share + other * theirs[e];
        }
        out[e] = v;
        if (e == 0) out[s.E] = most, out[s.E + 1] = mass;
    }
    __syncthreads();
}

// The parts of each head's keys, as one: attention's output [H E], into shared memory.
__device__ __forceinline__ void gather(Shared& shared, const Step& s, int splits) {
    for (int i = threadIdx.x; i < round_up(s.H * s.E, 256); i += THREADS) {
        float most = -1e30f, mass = 0, v = 0, other;
#pragma unroll 4
        for (int p = 0; p < splits && i < s.H * s.E; p++) {
            const float* part = s.parts + (i / s.E * SPLITS + p) * (s.E + 2);
            float share = join(most, mass, load_fresh(part + s.E), load_fresh(part + s.E + 1), other);
            v = v * share + other * load_fresh(part + i % s.E);
        }
        shared.in[i] = i < s.H * s.E ? to_bf16(v / mass) : 0;
    }
    __syncthreads();
}

__device__ __forceinline__ void read_layer(Shared& shared, const Step& s, int l) {
    typedef unsigned long long Address;
    if (l < s.L && threadIdx.x < sizeof(Layer) / 8)
        ((Address*)&shared.layer[l % 2])[threadIdx.x] = ((const Address*)(s.layers + l))[threadIdx.x];
}

template <class Weights>
__device__ __forceinline__ void decode(Shared& shared, const Step& s) {
    int slot = *s.slot, half = s.E / 2, heads = s.H + 2 * s.K, span = WARPS * AT_ONCE * 256 / s.E;
    int splits = min(SPLITS, round_up(slot + 1, span) / span);
    read_layer(shared, s, 0);
    __syncthreads();
    for (int l = 0; l < s.L; l++) {
        const Layer& layer = shared.layer[l % 2];
        product<Weights, 2>(shared, layer.qkv, heads * s.E, s.D, half, s.group,
            [&] { wait_for_all(s.arrived), normalise(shared, s.x, layer.norm, s.D, s.eps); },
            [&](int n, float a, float b) {              // the two that RoPE turns together
                int head = n / s.E, i = n % s.E;
                a = rounded(a + bf16(layer.bias[n])), b = rounded(b + bf16(layer.bias[n + half]));
                float cos = bf16(s.cos[slot * s.E + i]), sin = bf16(s.sin[slot * s.E + i]);
                u16* to = head < s.H ? s.q + head * s.E : head < s.H + s.K
                    ? layer.keys + ((long long)(head - s.H) * s.S + slot) * s.E
                    : layer.values + ((long long)(head - s.H - s.K) * s.S + slot) * s.E;
                if (head >= s.H + s.K) cos = 1, sin = 0;
                to[i] = to_bf16(a * cos - b * sin), to[i + half] = to_bf16(b * cos + a * sin);      // RoPE eq. (34)
            });
        read_layer(shared, s, l + 1);
        wait_for_all(s.arrived);
        for (int i = blockIdx.x; i < s.H * splits; i += gridDim.x) {
            int head = i / splits, part = i % splits, each = round_up(slot + 1, splits) / splits;
            attend(shared, s, layer, head, part * each, min(slot + 1, (part + 1) * each),
                   s.parts + (head * SPLITS + part) * (s.E + 2));
        }
        product<Weights, 1>(shared, layer.o, s.D, s.H * s.E, 0, s.group,
            [&] { wait_for_all(s.arrived), gather(shared, s, splits); },
            [&](int n, float a, float) { s.x[n] = to_bf16(bf16(load_fresh(s.x + n)) + rounded(a)); });
        product<Weights, 2>(shared, layer.gate_up, 2 * s.I, s.D, s.I, s.group,
            [&] { wait_for_all(s.arrived), normalise(shared, s.x, layer.second_norm, s.D, s.eps); },
            [&](int n, float gate, float up) {          // SwiGLU eq. (6)
                gate = rounded(gate);
                s.wide[n] = to_bf16(rounded(gate / (1 + __expf(-gate))) * rounded(up));
            });
        product<Weights, 1>(shared, layer.down, s.D, s.I, 0, s.group,
            [&] {
                wait_for_all(s.arrived);
                for (int at = threadIdx.x * 8; at < round_up(s.I, 256); at += THREADS * 8)
                    *(Words*)(shared.in + at) = at < s.I ? load_fresh((const Words*)(s.wide + at)) : Words{};
                __syncthreads();
            },
            [&](int n, float a, float) { s.x[n] = to_bf16(bf16(load_fresh(s.x + n)) + rounded(a)); });
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *s.slot = slot + 1;        // all have read it: they waited since
}

#define DECODE(NAME, WEIGHTS) \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(Step s) { \
        __shared__ Shared shared; \
        decode<WEIGHTS>(shared, s); \
    }
DECODE(decode_bf16, Bf16)
DECODE(decode_w4, Int4)
