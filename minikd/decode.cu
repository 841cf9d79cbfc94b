// One token of one row, the whole decoder in one kernel. It is compiled after w4_matmul.cu, as one program, and uses its helpers.
//
// A step at batch 1 reads every weight once and does little else. Launched as some 18 kernels per layer, it mostly waits: for
// kernels to start and for their first bytes to arrive. Here one block per multiprocessor runs for the whole step. A layer has
// five stages, and all blocks synchronise before each of them:
//
//   1  RMSNorm, q/k/v, RoPE; keys and values go into the cache
//   2  attention, each head's keys in up to SPLITS parts
//   3  the parts of a head are joined; o, residual
//   4  RMSNorm, gate/up, silu
//   5  down, residual
//
// Weights do not depend on the stage before. So a block signals its arrival, starts the copies of its next weights (7 KB per
// warp, 112 KB per multiprocessor), and only then waits for the other blocks: the memory stays busy during the wait.

// WIDEST: most inputs of a product; SPLITS: parts of a head's keys; AT_ONCE: keys in flight per lane; SLOT, DEPTH: the ring
const int WARPS = 16, THREADS = 32 * WARPS, WIDEST = 20480, SPLITS = 16, AT_ONCE = 4, SLOT = 1072, DEPTH = 8;

struct Matrix { const void* weight; const u16* scales; const u8* zeros; };     // bfloat16 [N, K], or as repack lays it out
struct Layer {                                          // only addresses: decode_cuda.py writes them as int64
    const u16 *norm, *bias;                             // [D], [(H + 2K) E]
    Matrix qkv, o;                                      // [(H + 2K) E, D], [D, H E]
    const u16* second_norm;                             // [D]
    Matrix gate_up, down;                               // [2I, D], [D, I]
    u16 *keys, *values;                                 // [K, S, E]
};
struct Step {
    const Layer* layers;
    u16* x;                                             // [D] the residual stream: the token's embedding at first
    u16 *q, *wide;                                      // [H, E] stage 1 to 2, [I] stage 4 to 5
    float* parts;                                       // [H, SPLITS, E + 2] stage 2 to 3: what `attend` writes
    const u16 *cos, *sin;                               // [S, E]
    long long* slot;                                    // [1] the token's slot in the cache; the kernel adds 1 at its end
    u32* arrived;                                       // [1] the counter of arrive and wait; 0 before the first launch
    int L, D, I, H, K, E, S, group;
    float eps;
};
struct alignas(16) Shared {
    char ring[WARPS][DEPTH][SLOT];                      // each warp's weights in flight
    union { u16 in[WIDEST]; float sums[WARPS * 258]; }; // a product's input; in attention, each warp's sums [E + 2]
    u16 x[8 * THREADS];                                 // the residual stream at the last RMSNorm; o or down adds to it
    float part[WARPS][16];                              // each warp's partial sums of a product's outputs
    Layer layer[2];                                     // the addresses of this layer and of the next
};
static_assert(sizeof(Shared) == 187664, "decode_cuda.py asks for so many bytes");

// For what another block may have written: loads from the L2, as this multiprocessor's L1 may hold old values.
__device__ __forceinline__ Words load_fresh(const Words* p) {
    Words v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ float load_fresh(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }
__device__ __forceinline__ void add_release(u32* p, u32 value) {        // who acquires the sum sees all that was written before
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(p), "r"(value) : "memory");
}
__device__ __forceinline__ u32 load_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void give_up() { asm volatile("trap;"); }
__device__ __forceinline__ void wait_for_team(int team, int threads) {  // barrier 0 is that of __syncthreads
    asm volatile("bar.sync %0, %1;" :: "r"(team + 1), "r"(threads) : "memory");
}

__device__ __forceinline__ float rounded(float f) { return bf16(to_bf16(f)); }
__device__ __forceinline__ float value(const Words& v, int i) { return i % 2 ? high(v.w[i / 2]) : low(v.w[i / 2]); }

// ---- a barrier of all blocks, in two halves
//
// Each block adds 1 to a counter, but block 0 adds 2^31 - (blocks - 1). The sum is 2^31: so the last arrival flips the top
// bit, and the other bits are 0 again for the next barrier. `phase` is the top bit before the flip.

__device__ __forceinline__ void arrive(u32* arrived) {
    __syncthreads();                                    // the release below covers what all threads of the block wrote
    if (threadIdx.x == 0) add_release(arrived, blockIdx.x ? 1 : 0x80000000u - (gridDim.x - 1));
}
__device__ __forceinline__ void wait(const u32* arrived, u32& phase) {
    if (threadIdx.x == 0)
        for (u32 polls = 0; load_acquire(arrived) >> 31 == phase; polls++)
            if (polls == 1u << 22) give_up();           // after some seconds: an error is better than a GPU that hangs
    phase ^= 1;
    __syncthreads();
}

// ---- products of a weight and the vector in shared memory
//
// A warp reads a unit at a time: 2 parts of RUN outputs x BLOCK inputs, 512 bytes each, 16 bytes per lane. With PAIR = 2 the
// parts are two runs of outputs, `gap` apart, that are needed together (RoPE's two halves of a head, gate and up); with
// PAIR = 1 two blocks of inputs of the same outputs.  fetch starts the copies of a part, add adds a unit's products to the
// lane's sums, store writes the warp's sums to shared memory.

struct Bf16 {
    static const int RUN = 1, BLOCK = 256;
    template <int PAIR> struct Sum { float v[PAIR]; };
    const u16* weight;
    int K;

    __device__ Bf16(Matrix matrix, int N, int K, int group) : weight((const u16*)matrix.weight), K(K) {}

    __device__ __forceinline__ void fetch(char* slot, int p, int n, int block) const {
        int lane = threadIdx.x % 32, k = block * BLOCK + lane * 8;
        copy_async<16>(k < K, slot + p * 512 + lane * 16, weight + (long long)n * K + (k < K ? k : 0));
    }
    template <int PAIR> __device__ __forceinline__ void add(Sum<PAIR>& sum, const char* slot, const u16* in) const {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int p = 0; p < 2; p++) {
            Words w = ((const Words*)slot)[p * 32 + lane], x = ((const Words*)in)[(PAIR == 1 ? p * 32 : 0) + lane];
#pragma unroll
            for (int i = 0; i < 8; i++) sum.v[p % PAIR] += value(w, i) * value(x, i);
        }
    }
    template <int PAIR> __device__ __forceinline__ void store(const Sum<PAIR>& sum, float* part) const {
#pragma unroll
        for (int p = 0; p < PAIR; p++) {
            float v = sum.v[p];
            for (int mask = 16; mask; mask /= 2) v += __shfl_xor_sync(~0u, v, mask);
            if (threadIdx.x % 32 == 0) part[p] = v;
        }
    }
};

// By tensor cores, as `tensor` in w4_matmul.cu: a part is half a tile, and the two parts are the upper and the lower 8 rows of
// an mma's left operand. x is column 0 of the right one; with PAIR = 1 the lower rows have other inputs, which are column 1.
struct Int4 {
    static const int RUN = 8, BLOCK = 128;
    template <int PAIR> struct Sum { float v[PAIR]; };
    const Words* words;
    const u16* scales;
    const u8* zeros;
    int blocks, stride;
    u32 inverse;                                        // of the blocks per group, as in `tensor`

    __device__ Int4(Matrix matrix, int N, int K, int group) : words((const Words*)matrix.weight), scales(matrix.scales),
        zeros(matrix.zeros), blocks(round_up(K, 128) / 128), stride(round_up(N, 16)), inverse(0xffffffffu / (group / 128) + 1) {}

    __device__ __forceinline__ void fetch(char* slot, int p, int n, int block) const {
        int lane = threadIdx.x % 32;
        bool there = block < blocks;
        if (!there) block = 0;
        u32 tile = (u32)n >> 4, half = (tile * blocks + block) * 64 + ((u32)n & 8) * 4 + lane;  // in 16 bytes: 32 bits suffice
        copy_async<16>(there, slot + p * 512 + lane * 16, words + half);
        u32 at = (inverse ? __umulhi(block, inverse) : block) * stride + n;
        if (lane == p) copy_async<16>(there, slot + 1024 + p * 16, scales + at);                // of 8 outputs
        if (lane == 2 + p && zeros) copy_async<8>(there, slot + 1056 + p * 8, zeros + at);
    }
    template <int PAIR> __device__ __forceinline__ void add(Sum<PAIR>& sum, const char* slot, const u16* in) const {
        int lane = threadIdx.x % 32, g = lane / 4;
        u32 mask = in_register(0x000f000fu), top = in_register(0x43004300u), zero[2];
        float scale[2], c[4] = {};
        Words w[2];
        __syncwarp();                                   // other lanes copied the scales
#pragma unroll
        for (int p = 0; p < 2; p++) {
            w[p] = ((const Words*)slot)[p * 32 + lane];
            scale[p] = half_to_float(((const u16*)(slot + 1024))[p * 8 + g]);
            zero[p] = top | (zeros ? (u8)slot[1056 + p * 8 + g] : 8) * 0x10001u;
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            Words x = {};
            if (lane < 4 * (3 - PAIR)) x = *(const Words*)(in + lane / 4 * 128 + j * 32 + lane % 4 * 8);
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                u32 a[4];
                operand(a, w, j, i, zero, mask, top);
                mma(c, a, x.w + i);
            }
        }
        sum.v[0] += scale[0] * c[0];                    // row g of column 0, in lanes with lane % 4 == 0
        sum.v[PAIR - 1] += scale[1] * c[PAIR == 1 ? 3 : 2];                     // row g + 8 of column 1 or 0
    }
    template <int PAIR> __device__ __forceinline__ void store(const Sum<PAIR>& sum, float* part) const {
        int lane = threadIdx.x % 32;
        for (int p = 0; p < PAIR; p++)
            if (lane % 4 == 0) part[p * 8 + lane / 4] = sum.v[p];
    }
};

// A task is RUN outputs, or RUN pairs of outputs; a team of `split` warps computes one at a time, its warps taking turns along
// the inputs, a unit each.
template <class Weights, int PAIR> struct Product {
    static const int RUN = Weights::RUN, INPUTS = Weights::BLOCK * (3 - PAIR);          // of a unit
    struct At { int task, unit; };
    Shared& shared;
    Weights weights;
    int gap, pairs, warp, tasks, units, split = 1, team, rank, teams;
    At first, ahead;

    // For y [N] = W [N, K] in; starts the copies of the first weights.  gap, pairs  pair n is the outputs n + (n & pairs) and
    // that plus `gap`; pairs = -gap (gap a power of two) steps over the second half of every 2 gap outputs, 0 over none
    __device__ __forceinline__ Product(Shared& shared, Matrix matrix, int N, int K, int group, int gap = 0, int pairs = 0)
        : shared(shared), weights(matrix, N, K, group), gap(gap), pairs(pairs) {
        warp = threadIdx.x / 32, tasks = N / (PAIR * RUN), units = round_up(K, INPUTS) / INPUTS;
        // A team grows only while each has at most one task: no next task's parts overwrite parts that are still read.
        int bits = 0;
        while (split < WARPS && 2 * split <= units && 2 * split * tasks <= WARPS * (int)gridDim.x) split *= 2, bits++;
        team = warp >> bits, rank = warp & split - 1, teams = (WARPS >> bits) * gridDim.x;
        first = ahead = {team * (int)gridDim.x + (int)blockIdx.x, rank};
        for (int d = 0; d < DEPTH - 1; d++) fetch(d);
    }
    __device__ __forceinline__ void next(At& at) const {
        at.unit += split;
        if (at.unit >= units) at = {at.task + teams, rank};
    }
    __device__ __forceinline__ int output(int task) const { return task * RUN + (task * RUN & pairs); }

    __device__ __forceinline__ void fetch(int d) {
        if (ahead.task < tasks) {
            int n = output(ahead.task);
            for (int p = 0; p < 2; p++)
                if (PAIR == 2) weights.fetch(shared.ring[warp][d], p, n + p * gap, ahead.unit);
                else weights.fetch(shared.ring[warp][d], p, n, 2 * ahead.unit + p);
        }
        commit_group();                                 // also an empty one: wait_for_copies counts groups
        next(ahead);
    }
    // done(n, a, b)  is given output n and, of a pair, n + gap.  shared.in holds K inputs, then zeros up to a multiple of 512
    template <class Done> __device__ __forceinline__ void run(Done done) {
        typename Weights::template Sum<PAIR> sum = {};
        int lane = threadIdx.x % 32, d = 0;
#pragma unroll 1
        for (At now = first; now.task < tasks; next(now)) {
            wait_for_copies<DEPTH - 2>();
            weights.add(sum, shared.ring[warp][d], shared.in + now.unit * INPUTS);
            fetch(d ? d - 1 : DEPTH - 1);               // into the slot that was read before this one
            d = d + 1 == DEPTH ? 0 : d + 1;
            if (now.unit + split < units) continue;     // this task has more units for this warp
            weights.store(sum, shared.part[warp]);
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
        wait_for_copies<0>();
    }
};

// ---- between the products

// shared.in = x / rms(x) * weight, shared.x = x for the residual.  RMSNorm eq. (4).  D <= 8 THREADS
__device__ __forceinline__ void normalise(Shared& shared, const u16* x, const u16* weight, int D, float eps) {
    int at = threadIdx.x * 8, warp = threadIdx.x / 32;
    Words mine = {}, gain = {};
    if (at < D) gain = load((const Words*)(weight + at)), mine = load_fresh((const Words*)(x + at));
    float sum = 0;
    for (int i = 0; i < 8; i++) sum += value(mine, i) * value(mine, i);
    for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    if (threadIdx.x % 32 == 0) shared.part[warp][0] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < WARPS; w++) sum += shared.part[w][0];
    float inverse = rsqrtf(sum / D + eps);
    if (at < round_up(D, 512)) {
        Words out;
        for (int i = 0; i < 4; i++)
            out.w[i] = to_bf16(low(gain.w[i]) * rounded(low(mine.w[i]) * inverse))
                       | (u32)to_bf16(high(gain.w[i]) * rounded(high(mine.w[i]) * inverse)) << 16;
        *(Words*)(shared.in + at) = out, *(Words*)(shared.x + at) = mine;
    }
    __syncthreads();
}

// Online softmax: joins two sums over different keys, each relative to its own greatest score (`most`); mass is the sum of
// exp(score - most).  Returns the factor for the first one's weighted values, and other_share for the second one's.
__device__ __forceinline__ float join(float& most, float& mass, float other_most, float other_mass, float& other_share) {
    float top = fmaxf(most, other_most), share = __expf(most - top);
    other_share = __expf(other_most - top);
    mass = mass * share + other_mass * other_share, most = top;
    return share;
}

// One head's attention over a part of its keys, by one block: a key takes `lanes` lanes, 8 values each, and a warp reads `keys`
// keys at once, with AT_ONCE such loads in flight.  -> out [E + 2]: the weighted values, most and mass
__device__ __forceinline__ void attend(Shared& shared, const Step& s, const Layer& layer, int head, int begin, int end,
                                       float* out) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, lanes = s.E / 8, keys = 32 / lanes, column = lane % lanes * 8;
    long long base = (long long)(head / (s.H / s.K)) * s.S * s.E + column;
    const u16 *all_keys = layer.keys + base, *all_values = layer.values + base;
    Words q = load_fresh((const Words*)(s.q + head * s.E + column));
    float most = -1e30f, mass = 0, sum[8] = {}, scale = rsqrtf(s.E), share, other;
    for (int first = begin + warp * keys * AT_ONCE; first < end; first += WARPS * keys * AT_ONCE) {
        Words k[AT_ONCE] = {}, v[AT_ONCE] = {};
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            int at = first + u * keys + lane / lanes;
            if (at < end) {
                k[u] = load_fresh((const Words*)(all_keys + at * s.E));
                v[u] = load_fresh((const Words*)(all_values + at * s.E));
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
    for (int mask = 16; mask >= lanes; mask /= 2) {     // joins the lanes of a warp that read different keys
        float other_most = __shfl_xor_sync(~0u, most, mask), other_mass = __shfl_xor_sync(~0u, mass, mask);
        share = join(most, mass, other_most, other_mass, other);
        for (int i = 0; i < 8; i++) sum[i] = sum[i] * share + other * __shfl_xor_sync(~0u, sum[i], mask);
    }
    float* mine = shared.sums + warp * (s.E + 2);
    for (int i = 0; i < 8 && lane < lanes; i++) mine[column + i] = sum[i];
    if (lane == 0) mine[s.E] = most, mine[s.E + 1] = mass;
    __syncthreads();
    int e = threadIdx.x;
    if (e < s.E) {                                      // joins the warps
        float top = -1e30f, all = 0, v = 0;
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, shared.sums[w * (s.E + 2) + s.E]);
        for (int w = 0; w < WARPS; w++) {
            const float* theirs = shared.sums + w * (s.E + 2);
            float part = __expf(theirs[s.E] - top);
            all += part * theirs[s.E + 1], v += part * theirs[e];
        }
        out[e] = v;
        if (e == 0) out[s.E] = top, out[s.E + 1] = all;
    }
    __syncthreads();
}

// Joins the parts of each head: attention's output [H E], into shared.in. One head per warp.
__device__ __forceinline__ void gather(Shared& shared, const Step& s, int splits) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = s.E + 2;
    for (int head = warp; head < s.H; head += WARPS) {
        const float* parts = s.parts + head * SPLITS * width;
        float most = -1e30f, mass = 0;                  // of part `lane`
        if (lane < splits) most = load_fresh(parts + lane * width + s.E), mass = load_fresh(parts + lane * width + s.E + 1);
        for (int e = lane; e < s.E; e += 32) {
            float some[SPLITS], v = 0;
#pragma unroll
            for (int p = 0; p < SPLITS; p++)            // all loads are in flight before the first is used
                some[p] = p < splits ? load_fresh(parts + p * width + e) : 0;
            if (e == lane) {                            // once per head: each part's share
                float top = most;
                for (int mask = SPLITS / 2; mask; mask /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
                float share = __expf(most - top), all = share * mass;
                for (int mask = SPLITS / 2; mask; mask /= 2) all += __shfl_xor_sync(~0u, all, mask);
                __syncwarp();                           // the head before no longer needs its shares
                if (lane < SPLITS) shared.part[warp][lane] = share / all;
                __syncwarp();
            }
#pragma unroll
            for (int p = 0; p < SPLITS; p++) v += shared.part[warp][p] * some[p];
            shared.in[head * s.E + e] = to_bf16(v);
        }
    }
    for (int i = s.H * s.E + threadIdx.x; i < round_up(s.H * s.E, 512); i += THREADS) shared.in[i] = 0;
    __syncthreads();
}

// Starts the copy of a layer's addresses into shared memory; they can be read after the next product and barrier.
__device__ __forceinline__ void read_layer(Shared& shared, const Step& s, int l) {
    int at = 8 * threadIdx.x;
    if (l < s.L && at < sizeof(Layer)) copy_async<8>(true, (char*)&shared.layer[l % 2] + at, (const char*)(s.layers + l) + at);
    commit_group();
}
// A layer's norms and bias into the L2: they are small, but `ring` does not bring them, and each would wait for the memory.
__device__ __forceinline__ void prefetch_layer(const Step& s, const Layer& layer) {
    int i = (blockIdx.x * THREADS + threadIdx.x) * 64, all = gridDim.x * THREADS * 64;  // 64 values are a cache line
    for (int at = i; at < s.D; at += all) prefetch(layer.norm + at), prefetch(layer.second_norm + at);
    for (int at = i; at < (s.H + 2 * s.K) * s.E; at += all) prefetch(layer.bias + at);
}

template <class Weights>
__device__ __forceinline__ void decode(Shared& shared, const Step& s) {
    int slot = *s.slot, half = s.E / 2, heads = s.H + 2 * s.K, span = WARPS * AT_ONCE * 256 / s.E;  // keys a block reads at once
    int splits = min(SPLITS, round_up(slot + 1, span) / span);
    u32 phase = load_acquire(s.arrived) >> 31;          // cannot flip before this block has arrived
    read_layer(shared, s, 0);
    wait_for_copies<0>();
    for (int l = 0; l < s.L; l++) {
        const Layer& layer = shared.layer[l % 2];
        arrive(s.arrived);
        read_layer(shared, s, l + 1);
        Product<Weights, 2> qkv(shared, layer.qkv, heads * s.E, s.D, s.group, half, -half);
        wait(s.arrived, phase);
        normalise(shared, s.x, layer.norm, s.D, s.eps);
        qkv.run([&](int n, float a, float b) {          // the two that RoPE rotates together
            int head = n / s.E, i = n % s.E;
            a = rounded(a + bf16(layer.bias[n])), b = rounded(b + bf16(layer.bias[n + half]));
            float cos = bf16(s.cos[slot * s.E + i]), sin = bf16(s.sin[slot * s.E + i]);
            u16* to = head < s.H ? s.q + head * s.E : head < s.H + s.K
                ? layer.keys + ((long long)(head - s.H) * s.S + slot) * s.E
                : layer.values + ((long long)(head - s.H - s.K) * s.S + slot) * s.E;
            if (head >= s.H + s.K) cos = 1, sin = 0;    // values are not rotated
            to[i] = to_bf16(a * cos - b * sin), to[i + half] = to_bf16(b * cos + a * sin);          // RoPE eq. (34)
        });

        arrive(s.arrived);
        Product<Weights, 1> o(shared, layer.o, s.D, s.H * s.E, s.group);
        if (l + 1 < s.L) prefetch_layer(s, shared.layer[(l + 1) % 2]);
        wait(s.arrived, phase);
        for (int i = blockIdx.x; i < s.H * splits; i += gridDim.x) {
            int head = i / splits, part = i % splits, each = round_up(slot + 1, splits) / splits;
            attend(shared, s, layer, head, part * each, min(slot + 1, (part + 1) * each),
                   s.parts + (head * SPLITS + part) * (s.E + 2));
        }

        arrive(s.arrived), wait(s.arrived, phase);
        gather(shared, s, splits);
        o.run([&](int n, float a, float) { s.x[n] = to_bf16(bf16(shared.x[n]) + rounded(a)); });

        arrive(s.arrived);
        Product<Weights, 2> gate_up(shared, layer.gate_up, 2 * s.I, s.D, s.group, s.I);
        wait(s.arrived, phase);
        normalise(shared, s.x, layer.second_norm, s.D, s.eps);
        gate_up.run([&](int n, float gate, float up) {  // SwiGLU eq. (6)
            gate = rounded(gate);
            s.wide[n] = to_bf16(rounded(gate / (1 + __expf(-gate))) * rounded(up));
        });

        arrive(s.arrived);
        Product<Weights, 1> down(shared, layer.down, s.D, s.I, s.group);
        wait(s.arrived, phase);
        for (int at = threadIdx.x * 8; at < round_up(s.I, 512); at += THREADS * 8)
            *(Words*)(shared.in + at) = at < s.I ? load_fresh((const Words*)(s.wide + at)) : Words{};
        __syncthreads();
        down.run([&](int n, float a, float) { s.x[n] = to_bf16(bf16(shared.x[n]) + rounded(a)); });
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *s.slot = slot + 1;        // all blocks read it before their first barrier
}

#define DECODE(NAME, WEIGHTS) \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(Step s) { decode<WEIGHTS>(*(Shared*)shared_memory, s); }
DECODE(decode_bf16, Bf16)
DECODE(decode_w4, Int4)
