// One token of one row, the whole decoder in one kernel. It uses w4_matmul.cu's digits.
//
// A step at batch 1 reads every weight once and does little else. Launched as nine kernels or more per layer, it mostly waits:
// for kernels to start and for their first bytes to arrive. Here one block per multiprocessor runs for the whole step. A layer
// has five stages, and each needs what all blocks computed in the one before:
//
//   1  RMSNorm, q/k/v, RoPE; keys and values go into the cache
//   2  attention, each head's keys in up to SPLITS parts
//   3  the parts of a head are joined; o, residual
//   4  RMSNorm, gate/up, silu
//   5  down, residual
//
// There is no barrier between blocks. A value is sent in one word together with a tag, which counts the layers, and a block that
// needs it polls the word until the tag is right: one round trip through the L2, where a barrier takes three (the values, the
// count of arrivals, the values again). Measured on an H200: see benchmarks/results/gpu.txt.
//
// Weights do not depend on the stage before. So a warp starts the copies of its next weights (6 KB per warp, 96 KB per
// multiprocessor; at 4 bits 7 and 117) as soon as it has done its share of a stage, and only then waits for words: the memory
// stays busy.

namespace one_kernel {

const int WARPS = 16, THREADS = 32 * WARPS;
const int WIDEST = 20480, SPLITS = 8, BIASES = 5120;    // most inputs of a product, parts of a head's keys, outputs of q/k/v
const int RING = 8576;                                  // bytes for a warp's weights: one slot is read, the others are in flight
const int KEYS = 2, AT_ONCE = 4;                        // what a lane asks for at once: keys, each with its value; words

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
    const u16* table;                                   // [V, D] the embedding
    const long long* token;                             // [1] the newest token, a row of it
    u16* y;                                             // [D] the residual stream after the last layer
    u32 *heads, *middle, *wide;                         // words: [(H + 2K) E] stage 1 to 2, [D] 3 to 4, [2, I] 4 to 5
    u32* last;                                          // words: [D] 5 to 1 of the next layer
    u32* parts;                                         // words: [H, SPLITS, E + 4] 2 to 3, see `attend`
    const u16 *cos, *sin;                               // [S, E]
    long long* slot;                                    // [1] the token's slot in the cache; the kernel adds 1 at its end
    int L, D, I, H, K, E, S, group, zeros;              // zeros: whether codes have zero points other than 8
    int bits[4];                                        // log2 of the warps per team, for each matrix: see `Product`
    int ahead[2];                                       // tasks of gate/up and down that a block brings into the L2
    float eps;
};
struct alignas(16) Shared {
    char ring[WARPS][RING];                             // each warp's weights in flight
    union {                                             // a product's input, in bfloat16 or, for codes, in digits;
        u16 in[WIDEST];
        char digits[WIDEST * 3];
        float sums[WARPS * 130];                        // in attention, each warp's sums [E + 2]
    };
    float units[WIDEST / 128], totals[WIDEST / 128];    // with digits: each block's unit / 16, and the sum of its inputs
    u16 x[8 * THREADS];                                 // the residual stream at the last RMSNorm; o or down adds to it
    u16 bias[BIASES], cos[128], sin[128];               // of this layer's q/k/v; of this step's slot
    float part[2][WARPS][16], squares[WARPS];           // each warp's partial sums: of a product's outputs, of x^2
    Layer layer[2];                                     // the addresses of this layer and of the next
};
static_assert(sizeof(Shared) == 221264, "decode_cuda.py asks for so many bytes");

// ---- words: what a block sends to all others
//
// A word's upper bits hold a value: a bfloat16 or, in attention's parts, a float32 without its last 8 bits. Its lower bits hold
// the tag, from 1 to 255. Until a word is sent anew, it is 0 or has the tag of one to three layers before. Relaxed accesses see
// a word whole, old or new, and need no fence: no other memory is read because of it.
//
// When may words be overwritten? Every block computes a part of `wide` in each layer, and sends it after it has read all words
// of the stages before. So a block that has all of layer l's `wide` knows that every block has read heads, parts and middle of
// layer l and last of layer l - 1. Layer l's `wide` itself may still be read by a slow block while others send that of l + 1:
// so there are two buffers. A block sends that of l + 2 only once it has all of l + 1's, and each block sends l + 1's only after
// it has read l's.

__device__ __forceinline__ Words load_relaxed(const u32* p) {
    Words v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void store_relaxed(u32* to, u32 word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(to), "r"(word) : "memory");
}
__device__ __forceinline__ void send(u32* to, float v, u32 tag) { store_relaxed(to, (u32)to_bf16(v) << 16 | tag); }
__device__ __forceinline__ void send_float(u32* to, float v, u32 tag) { store_relaxed(to, __float_as_uint(v) & ~255u | tag); }
__device__ __forceinline__ float cut(u32 word) { return __uint_as_float(word & ~255u); }        // the float32 that was sent
__device__ __forceinline__ bool carries(const Words& v, u32 tag) {
    return !(((v.w[0] ^ tag) | (v.w[1] ^ tag) | (v.w[2] ^ tag) | (v.w[3] ^ tag)) & 255);
}
__device__ __forceinline__ Pair values(const Words& v) {
    return Pair{{v.w[0] >> 16 | (v.w[1] & 0xffff0000u), v.w[2] >> 16 | (v.w[3] & 0xffff0000u)}};
}
// Asks `ready` until it is true; after some seconds an error is better than a GPU that hangs.
template <class Ready> __device__ __forceinline__ void wait_until(Ready ready) {
    for (u32 polls = 0; !ready(); polls++)
        if (polls == 1u << 22) asm volatile("trap;");
}

// Receives this thread's share of `count` words: v[r] are the four from 4 (threadIdx.x + (first + r) THREADS) on, as they were
// sent. Past the end their values are 0.
template <int R> __device__ __forceinline__ void receive(const u32* words, int first, int count, u32 tag, Words* v) {
    wait_until([&] {
        bool ready = true;
#pragma unroll
        for (int r = 0; r < R; r++) {                   // all loads are in flight before the first tag is looked at
            int at = 4 * (threadIdx.x + (first + r) * THREADS);
            v[r] = at < count ? load_relaxed(words + at) : Words{{tag, tag, tag, tag}};
        }
#pragma unroll
        for (int r = 0; r < R; r++) ready &= carries(v[r], tag);
        return ready;
    });
    __syncwarp();
}

// ---- products of a weight and the vector in shared memory
//
// A warp reads a unit at a time: 2 parts of 8 outputs x BLOCK inputs. With PAIR = 2 the parts are two runs of outputs, `gap`
// apart, that are needed together (RoPE's two halves of a head, gate and up); with PAIR = 1 two blocks of inputs of the same
// outputs.  put writes inputs to shared memory, fetch starts the copies of a part, add adds a unit's products to a lane's sums,
// and finish returns the sums of a task.
//
// Bf16 and Int4 use tensor cores: a part is 8 rows of an mma's left operand, and a unit's two parts are its upper and lower 8
// rows. The input is column 0 of the right operand; with PAIR = 1 the lower rows have other inputs, in column 1. The sums are
// then in the lanes (g, 0): c[0] is row g of column 0, c[2] row g + 8 of column 0, c[3] row g + 8 of column 1.
//
// The order of an mma's 16 inputs is free if it is the same in both operands: a lane's 8 consecutive inputs serve two mma.
struct Sums { float upper, lower; };
struct Bf16 {
    static const int BLOCK = 64, SLOT = 2048, DEPTH = RING / SLOT;
    struct Sum { float c[4]; };
    const u16* weight;
    int K;

    // shared.in[at..at+3] = v
    static __device__ __forceinline__ void put(Shared& shared, int at, Pair v, bool) { *(Pair*)(shared.in + at) = v; }

    __device__ Bf16(Matrix matrix, int N, int K, int group) : weight((const u16*)matrix.weight), K(K) {}

    // A row's 64 inputs are 128 contiguous bytes; in odd rows their halves are swapped, to avoid bank conflicts in `add`.
    __device__ __forceinline__ void fetch(char* slot, int p, int n, int block) const {
        int lane = threadIdx.x % 32, k = block * BLOCK + lane % 8 * 8;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = h * 4 + lane / 8;
            copy_async<16>(k < K, slot + p * 1024 + row * 128 + (lane % 8 ^ row % 2 * 4) * 16,
                           weight + (long long)(n + row) * K + (k < K ? k : 0));
        }
    }
    template <int PAIR> __device__ __forceinline__ void add(Sum& sum, const char* slot, const Shared& shared, int unit) const {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const u16* in = shared.in + (PAIR == 2 ? unit : 2 * unit + min(g, 1)) * BLOCK;  // columns 2 to 7 are not used
        __syncwarp();                                   // other lanes copied these rows
#pragma unroll
        for (int h = 0; h < 2; h++) {
            Words x = *(const Words*)(in + h * 32 + t * 8);
            const Words* w = (const Words*)(slot + g * 128) + (h * 4 + t ^ g % 2 * 4);
            Words up = w[0], down = w[64];
            u32 a[4] = {up.w[0], down.w[0], up.w[1], down.w[1]}, b[4] = {up.w[2], down.w[2], up.w[3], down.w[3]};
            mma(sum.c, a, x.w), mma(sum.c, b, x.w + 2);
        }
    }
    // For output g, in the lanes (g, 0): the sum of the upper rows, with PAIR = 1 over both blocks of inputs; and of the lower.
    template <int PAIR> static __device__ __forceinline__ Sums finish(const Sum& sum) {
        return {sum.c[0] + (PAIR == 1 ? sum.c[3] : 0), sum.c[2]};
    }
};

// A part is half a tile of w4_matmul.cu's layout. As there, int8 tensor cores multiply, with the inputs in three digits: columns
// 0 to 2 and, with PAIR = 1, columns 4 to 6 for the lower rows.
struct Int4 {
    static const int BLOCK = 128, SLOT = 1072, DEPTH = RING / SLOT;
    struct Sum { float c[2]; };                         // of the upper and the lower rows; with PAIR = 1 one of them per lane
    const Words* words;
    const u16* scales;
    const u8* zeros;
    int blocks, stride;
    u32 inverse, mask, top;                             // inverse: of the blocks per group, as in `Copies`

    // Writes the digits of inputs at..at+3; a whole warp calls it, for one block of 128 inputs. Like w4_matmul.cu's `convert`,
    // where a lane has 8 inputs: here two lanes share 8, and each makes one of the two words that a digit of these takes.
    static __device__ __forceinline__ void put(Shared& shared, int at, Pair v, bool with_totals) {
        int lane = threadIdx.x % 32, odd = lane % 2, block = at / 128;
        u32 most = 0;
        for (u32 pair : v.w) most = larger(most, pair);
        most = __reduce_max_sync(~0u, most);            // one instruction: 4-bit is 2 to 3% faster than with five shuffles
        float total = 0;
        if (with_totals) {
            total = low(v.w[0]) + high(v.w[0]) + low(v.w[1]) + high(v.w[1]);
            total = warp_sum(total);
        }
        Unit unit(most);
        u32 other = __shfl_xor_sync(~0u, odd ? v.w[0] : v.w[1], 1);
        u32 a = odd ? other : v.w[0], b = odd ? v.w[1] : other;         // inputs 0 1 and 4 5, or 2 3 and 6 7
        Words d = digits_of(low(a), low(b), high(a), high(b), unit.inverse);
        char* digits = shared.digits + block * 384 + lane / 16 * 192 + lane % 8 / 2 * 16 + lane / 8 % 2 * 8 + odd * 4;
#pragma unroll
        for (int digit = 0; digit < 3; digit++) *(u32*)(digits + digit * 64) = d.w[digit];
        if (lane) return;
        shared.units[block] = unit.sixteenth, shared.totals[block] = total;
    }

    __device__ Int4(Matrix matrix, int N, int K, int group) : words((const Words*)matrix.weight), scales(matrix.scales),
        zeros(matrix.zeros), blocks(ceil_div(K, 128)), stride(round_up(N, 16)), inverse(0xffffffffu / (group / 128) + 1),
        mask(in_register(0xf0f0f0f0u)), top(in_register(0x80808080u)) {}

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
    template <int PAIR> __device__ __forceinline__ void add(Sum& sum, const char* slot, const Shared& shared, int unit) const {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        int block = PAIR == 2 ? unit : 2 * unit + g / 4, c[4] = {};
        const char* digits = shared.digits + block * 384 + min(g % 4, 2) * 64 + t * 16;
        __syncwarp();                                   // other lanes copied the scales
        Words w[2] = {((const Words*)slot)[lane], ((const Words*)slot)[32 + lane]}, in;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 a[4];
            operand(a, w, j, mask, top);
            if (j % 2 == 0) in = *(const Words*)(digits + j / 2 * 192);
            mma(c, a, in.w + j % 2 * 2);
        }
        int second = t % 2 ? 0 : 256;                   // a lane with d2 has no digit in its other column
        auto plus = [&](float& v, int p, int c0, int c1, int block) {           // p: which part's scale and zero point
            float scale = half_to_float(((const u16*)(slot + 1024))[p * 8 + g]);
            v += scale * shared.units[block] * (c0 + second * c1);
            if (zeros && t % 2 == 0) v += scale * (8 - (int)(u8)slot[1056 + p * 8 + g]) * shared.totals[block];
        };
        if (PAIR == 2) plus(sum.c[0], 0, c[0], c[1], unit), plus(sum.c[1], 1, c[2], c[3], unit);
        else plus(sum.c[0], t / 2, t < 2 ? c[0] : c[2], t < 2 ? c[1] : c[3], 2 * unit + t / 2);
    }
    template <int PAIR> static __device__ __forceinline__ Sums finish(const Sum& sum) {
        float v[2] = {sum.c[0], sum.c[1]};
        for (int i = 0; i < PAIR; i++) {
            if (threadIdx.x % 2) v[i] *= 65536;         // d2's sum
            v[i] += __shfl_xor_sync(~0u, v[i], 1);
            if (PAIR == 1) v[i] += __shfl_xor_sync(~0u, v[i], 2);
        }
        return {v[0], v[1]};
    }
};

// A task is 8 outputs, or 8 pairs of outputs; a team of 2^bits warps computes one at a time, its warps taking turns along the
// inputs, a unit each. decode_cuda.py chooses `bits`.
__device__ __forceinline__ void wait_for_team(int team, int threads) {  // barrier 0 is that of __syncthreads
    asm volatile("bar.sync %0, %1;" :: "r"(team + 1), "r"(threads) : "memory");
}
template <class Weights, int PAIR> struct Product {
    static const int RUN = 8, INPUTS = Weights::BLOCK * (3 - PAIR), DEPTH = Weights::DEPTH;     // INPUTS: of a unit
    Shared& shared;
    Weights weights;
    int gap, pairs, warp, tasks, units, split, team, rank, teams;
    struct { int task, unit; } ahead;                   // of the next copies

    // For y [N] = W [N, K] in; starts the copies of the first weights.  gap, pairs  pair n is the outputs m = n + (n & pairs)
    // and m + gap; pairs = -gap (gap a power of two) skips the second half of every 2 gap outputs, 0 skips none
    __device__ __forceinline__ Product(Shared& shared, Matrix matrix, int N, int K, int group, int bits, int gap = 0,
                                       int pairs = 0)
        : shared(shared), weights(matrix, N, K, group), gap(gap), pairs(pairs), split(1 << bits) {
        warp = threadIdx.x / 32, tasks = N / (PAIR * RUN), units = ceil_div(K, INPUTS);
        team = warp >> bits, rank = warp & split - 1, teams = (WARPS >> bits) * gridDim.x;
        ahead = {team * (int)gridDim.x + (int)blockIdx.x, rank};
        if (rank >= units) ahead.task = tasks;          // more warps than units: this one has none
        for (int d = 0; d < DEPTH - 1; d++) fetch(d);
    }
    __device__ __forceinline__ int output(int task) const { return task * RUN + (task * RUN & pairs); }

    __device__ __forceinline__ void fetch(int d) {
        if (ahead.task < tasks) {
            int n = output(ahead.task);
            char* slot = shared.ring[warp] + d * Weights::SLOT;
            for (int p = 0; p < 2; p++)
                if (PAIR == 2) weights.fetch(slot, p, n + p * gap, ahead.unit);
                else weights.fetch(slot, p, n, 2 * ahead.unit + p);
        }
        commit_group();
        ahead.unit += split;
        if (ahead.unit >= units) ahead = {ahead.task + teams, rank};
    }
    // done(n, a, b)  a is output n, b output n + gap of a pair.  shared.in holds K inputs, then zeros up to a multiple of 512
    template <class Done> __device__ __forceinline__ void run(Done done) {
        int lane = threadIdx.x % 32, d = 0, turn = 0;
        for (int task = team * gridDim.x + blockIdx.x; task < tasks; task += teams, turn ^= 1) {
            typename Weights::Sum sum = {};
#pragma unroll 1
            for (int unit = rank; unit < units; unit += split) {
                wait_for_copies<DEPTH - 2>();
                weights.template add<PAIR>(sum, shared.ring[warp] + d * Weights::SLOT, shared, unit);
                fetch(d ? d - 1 : DEPTH - 1);           // into the slot that was read before this one
                d = d + 1 == DEPTH ? 0 : d + 1;
            }
            // There is room for two turns of sums: a warp at the next turn's barrier has added the sums of the turn before.
            Sums both = Weights::template finish<PAIR>(sum);
            float* mine = shared.part[turn][warp] + lane / 4;
            if (lane % 4 == 0) mine[0] = both.upper, mine[RUN] = both.lower;
            if (split > 1) wait_for_team(team, 32 * split);
            else __syncwarp();
            if (rank == 0) {                            // half a warp adds the 16 sums of every other warp
                float total = 0;
#pragma unroll                                          // all are read at once: a loop took 6% of the step at 0.5B
                for (int w = 0; w < WARPS; w += 2)
                    if (w + lane / 16 < split) total += shared.part[turn][warp + w + lane / 16][lane % 16];
                total += __shfl_xor_sync(~0u, total, 16);
                float other = __shfl_xor_sync(~0u, total, RUN);
                if (lane < RUN) done(output(task) + lane, total, other);
            }
        }
        wait_for_copies<0>();
    }
};

// Prefetches into the L2 the bfloat16 weights of this block's first `tasks` tasks of a later product: otherwise the memory would
// be idle while blocks wait for each other in the stages before.
__device__ __forceinline__ void prefetch_product(Matrix matrix, int N, int K, u32 tasks, int gap) {
    u32 n = (blockIdx.x + threadIdx.x * gridDim.x) * 8;
    if (threadIdx.x >= tasks || n >= N) return;
    prefetch((const u16*)matrix.weight + (long long)n * K, 16 * K);
    if (gap) prefetch((const u16*)matrix.weight + (long long)(n + gap) * K, 16 * K);
}

// ---- between the products

// Reads a norm's weights at this thread's places, before the wait for x.
__device__ __forceinline__ void read_gain(const u16* weight, int D, Pair* gain) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int at = 4 * (threadIdx.x + r * THREADS);
        gain[r] = at < D ? *(const Pair*)(weight + at) : Pair{};
    }
}

// shared.in = x / rms(x) * gain, shared.x = x for the residual.  RMSNorm eq. (4).  D <= 8 THREADS
// mine  x in the upper halves, as `receive` gives it;  gain  of the same places
template <class Weights>
__device__ __forceinline__ void normalise(Shared& shared, const Words* mine, const Pair* gain, int D, float eps, bool zeros) {
    int warp = threadIdx.x / 32;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += high(mine[i / 4].w[i % 4]) * high(mine[i / 4].w[i % 4]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) shared.squares[warp] = sum;
    __syncthreads();                                    // also: no warp reads shared.in and shared.x any more
    sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += shared.squares[w];
    float inverse = rsqrtf(__fdividef(sum, D) + eps);
    Words x = mine[0];
    Pair scale = gain[0];
#pragma unroll 1
    for (int at = 4 * threadIdx.x; at < round_up(D, 512); at += 4 * THREADS, x = mine[1], scale = gain[1]) {
        Pair out;
        for (int i = 0; i < 2; i++)
            out.w[i] = to_bf16_pair(low(scale.w[i]) * rounded(high(x.w[2 * i]) * inverse),
                                    high(scale.w[i]) * rounded(high(x.w[2 * i + 1]) * inverse));
        Weights::put(shared, at, out, zeros);
        *(Pair*)(shared.x + at) = values(x);
    }
    __syncthreads();
}

// One head's attention over a part of its keys, by one block: a key takes `lanes` lanes, 8 values each, and a warp reads `keys`
// keys at once, with KEYS such loads in flight, the first before the query has arrived. This step's own key and value come as
// words.  -> out [E + 4], words: the sum of exp(score - most) value; most; the sum of exp(score - most); these two once more
__device__ __forceinline__ void attend(Shared& shared, const Step& s, const Layer& layer, int slot, int head, int begin, int end,
                                       u32* out, u32 tag) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, lanes = s.E / 8, keys = 32 / lanes, column = lane % lanes * 8;
    int group = head / (s.H / s.K);
    long long base = (long long)group * s.S * s.E + column;
    const u16 *all_keys = layer.keys + base, *all_values = layer.values + base;
    Words own[3] = {}, k[KEYS], v[KEYS];                // own: q, and the key and the value of `slot`
    float most = LEAST, mass = 0, sum[8] = {}, q[8], share;
    for (int first = begin + warp * keys * KEYS, turn = 0; first < end; first += WARPS * keys * KEYS, turn++) {
#pragma unroll
        for (int u = 0; u < KEYS; u++) {
            int at = first + u * keys + lane / lanes;
            k[u] = v[u] = Words{};
            if (at < min(end, slot)) k[u] = *(const Words*)(all_keys + at * s.E), v[u] = *(const Words*)(all_values + at * s.E);
        }
        if (!turn) {
            const u32* from[3] = {s.heads + head * s.E + column, s.heads + (s.H + group) * s.E + column,
                                  s.heads + (s.H + s.K + group) * s.E + column};
            wait_until([&] {
                Words words[6];
                bool ready = true;
#pragma unroll
                for (int i = 0; i < 6; i++) words[i] = load_relaxed(from[i / 2] + i % 2 * 4);
#pragma unroll
                for (int i = 0; i < 6; i++) {
                    ready &= carries(words[i], tag);
                    Pair four = values(words[i]);
                    own[i / 2].w[i % 2 * 2] = four.w[0], own[i / 2].w[i % 2 * 2 + 1] = four.w[1];
                }
                return ready;
            });
            __syncwarp();
            for (int i = 0; i < 8; i++) q[i] = value(own[0], i) * rsqrtf(s.E);
        }
        float score[KEYS], top = most;
#pragma unroll
        for (int u = 0; u < KEYS; u++) {
            int at = first + u * keys + lane / lanes;
            if (at == slot) k[u] = own[1], v[u] = own[2];
            float pair[2] = {};                         // two sums: half as many steps in a row
            for (int i = 0; i < 8; i++) pair[i % 2] += q[i] * value(k[u], i);
            score[u] = pair[0] + pair[1];
            for (int mask = lanes / 2; mask; mask /= 2) score[u] += __shfl_xor_sync(~0u, score[u], mask);
            if (at >= end) score[u] = LEAST;
            top = fmaxf(top, score[u]);
        }
        share = __expf(most - top), mass *= share, most = top;         // online softmax
        for (int i = 0; i < 8; i++) sum[i] *= share;
#pragma unroll
        for (int u = 0; u < KEYS; u++) {
            float part = score[u] > LEAST ? __expf(score[u] - top) : 0;
            mass += part;
            for (int i = 0; i < 8; i++) sum[i] += part * value(v[u], i);
        }
    }
    float top = most;                                   // joins the lanes of a warp that read different keys
    for (int mask = 16; mask >= lanes; mask /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
    share = __expf(most - top), mass *= share;
    for (int i = 0; i < 8; i++) sum[i] *= share;
    for (int mask = 16; mask >= lanes; mask /= 2) {
        mass += __shfl_xor_sync(~0u, mass, mask);
        for (int i = 0; i < 8; i++) sum[i] += __shfl_xor_sync(~0u, sum[i], mask);
    }
    __syncthreads();                                    // no warp reads shared.in any more
    float* mine = shared.sums + warp * (s.E + 2);
    for (int i = 0; i < 8 && lane < lanes; i++) mine[column + i] = sum[i];
    if (lane == 0) mine[s.E] = top, mine[s.E + 1] = mass;
    __syncthreads();
    if (warp >= s.E / 32) return;                       // the other warps combine all 16: a lane knows the share of one,
    const float* theirs = shared.sums + lane % WARPS * (s.E + 2) + s.E;
    most = top = theirs[0];
    for (int mask = WARPS / 2; mask; mask /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
    top = cut(__float_as_uint(top));                    // as it will be sent: the sums must be relative to exactly this
    share = __expf(most - top), mass = share * theirs[1];
    for (int mask = WARPS / 2; mask; mask /= 2) mass += __shfl_xor_sync(~0u, mass, mask);
    float joined = 0;                                   // and each thread sums one of the E values
#pragma unroll
    for (int w = 0; w < WARPS; w++) joined += __shfl_sync(~0u, share, w) * shared.sums[w * (s.E + 2) + threadIdx.x];
    send_float(out + threadIdx.x, joined, tag);
    if (threadIdx.x < 4) send_float(out + s.E + threadIdx.x, threadIdx.x % 2 ? mass : top, tag);
}

// Combines each head's parts into attention's output [H E], in shared.in. A thread takes 4 adjacent values, of all parts at once.
template <class Weights> __device__ __forceinline__ void gather(Shared& shared, const Step& s, int splits, u32 tag) {
    __syncthreads();                                    // no warp reads shared.in any more
    for (int at = 4 * threadIdx.x; at < round_up(s.H * s.E, 512); at += 4 * THREADS) {
        int head = at >> 31 - __clz(s.E), e = at & s.E - 1;
        const u32* parts = s.parts + head * SPLITS * (s.E + 4);
        u32 least = __float_as_uint(LEAST) & ~255u | tag;
        Words sums[SPLITS], scales[SPLITS];             // scales: most, mass
        wait_until([&] {
            bool ready = true;
#pragma unroll
            for (int p = 0; p < SPLITS; p++) {          // a part that is not there has mass 0
                bool there = p < splits && head < s.H;
                sums[p] = there ? load_relaxed(parts + p * (s.E + 4) + e) : Words{{tag, tag, tag, tag}};
                scales[p] = there ? load_relaxed(parts + p * (s.E + 4) + s.E) : Words{{least, tag, least, tag}};
            }
#pragma unroll
            for (int p = 0; p < SPLITS; p++) ready &= carries(sums[p], tag) & carries(scales[p], tag);
            return ready;
        });
        __syncwarp();
        float top = LEAST, mass = 0, v[4] = {};
#pragma unroll
        for (int p = 0; p < SPLITS; p++) top = fmaxf(top, cut(scales[p].w[0]));
#pragma unroll
        for (int p = 0; p < SPLITS; p++) {
            float share = __expf(cut(scales[p].w[0]) - top);
            mass += share * cut(scales[p].w[1]);
            for (int i = 0; i < 4; i++) v[i] += share * cut(sums[p].w[i]);
        }
        Pair out = {};
        float one = __fdividef(1, mass);
        if (head < s.H)
            for (int i = 0; i < 2; i++) out.w[i] = to_bf16_pair(v[2 * i] * one, v[2 * i + 1] * one);
        Weights::put(shared, at, out, s.zeros);
    }
    __syncthreads();
}

// shared.in = wide. The first words are polled alone, the others follow a few at a time: until the first have arrived, more loads
// would only crowd the path to the L2.
template <class Weights> __device__ __forceinline__ void receive_wide(Shared& shared, const Step& s, const u32* wide, u32 tag) {
    Words v[AT_ONCE];
    receive<1>(wide, 0, s.I, tag, v);
    __syncthreads();                                    // no warp reads shared.in any more
    Weights::put(shared, 4 * threadIdx.x, values(v[0]), s.zeros);
    for (int first = 1; first * 4 * THREADS < s.I; first += AT_ONCE) {
        receive<AT_ONCE>(wide, first, s.I, tag, v);
#pragma unroll 1                                        // less code: a layer's must fit into the instruction caches
        for (int r = 0; r < AT_ONCE; r++) {
            int at = 4 * (threadIdx.x + (first + r) * THREADS);
            if (at < round_up(s.I, 512)) Weights::put(shared, at, values(v[0]), s.zeros);
#pragma unroll
            for (int i = 1; i < AT_ONCE; i++) v[i - 1] = v[i];          // registers cannot be indexed
        }
    }
    __syncthreads();
}

// Starts the copy of a layer's addresses into shared memory; they can be read after the next product and barrier.
__device__ __forceinline__ void read_layer(Shared& shared, const Step& s, int l) {
    int at = 8 * threadIdx.x;
    if (l < s.L && at < sizeof(Layer)) copy_async<8>(true, (char*)&shared.layer[l % 2] + at, (const char*)(s.layers + l) + at);
    commit_group();
}
// The same for the bias of a layer; prefetches its norms into the L2.
__device__ __forceinline__ void read_bias(Shared& shared, const Step& s, const Layer& layer) {
    int at = 8 * threadIdx.x, line = (blockIdx.x * THREADS + threadIdx.x) * 64;         // 64 values are a cache line
#pragma unroll 1
    for (int i = at; i < (s.H + 2 * s.K) * s.E; i += 8 * THREADS) copy_async<16>(true, shared.bias + i, layer.bias + i);
    if (line < s.D) prefetch(layer.norm + line), prefetch(layer.second_norm + line);
    commit_group();
}

template <class Weights>
__device__ __forceinline__ void decode(Shared& shared, const Step& s) {
    int slot = *(volatile long long*)s.slot, half = s.E / 2, log2 = 31 - __clz(s.E), heads = s.H + 2 * s.K, tid = threadIdx.x;
    int span = WARPS * KEYS * 256 / s.E;                // keys that a block reads at once
    int splits = min(ceil_div(slot + 1, span), min(SPLITS, max(1, gridDim.x / s.H)));
    const u16* x = s.table + *s.token * s.D;
    read_layer(shared, s, 0);
    if (tid < s.E) shared.cos[tid] = s.cos[slot * s.E + tid], shared.sin[tid] = s.sin[slot * s.E + tid];
    wait_for_copies<0>();
    __syncthreads();
    read_bias(shared, s, shared.layer[0]);
    wait_for_copies<0>();
    for (int l = 0; l < s.L; l++) {
        const Layer& layer = shared.layer[l % 2];
        u32* wide = s.wide + l % 2 * s.I;
        u32 tag = ((u32)slot * s.L + l) % 255 + 1, before = ((u32)slot * s.L + l + 254) % 255 + 1;
        Words mine[2] = {};
        Pair gain[2];
        read_layer(shared, s, l + 1);
        Product<Weights, 2> qkv(shared, layer.qkv, heads * s.E, s.D, s.group, s.bits[0], half, -half);
        prefetch_product(layer.gate_up, s.I, s.D, s.ahead[0], s.I);
        read_gain(layer.norm, s.D, gain);
        if (l) receive<2>(s.last, 0, s.D, before, mine);
        else
            for (int i = 0; i < 8; i++)
                if (int at = 4 * (tid + i / 4 * THREADS) + i % 4; at < s.D) mine[i / 4].w[i % 4] = (u32)x[at] << 16;
        normalise<Weights>(shared, mine, gain, s.D, s.eps, s.zeros);
        qkv.run([&](int n, float a, float b) {          // the two that RoPE rotates together
            int head = n >> log2, i = n & s.E - 1;
            a = rounded(a + bf16(shared.bias[n])), b = rounded(b + bf16(shared.bias[n + half]));
            float cos = bf16(shared.cos[i]), sin = bf16(shared.sin[i]);
            if (head >= s.H + s.K) cos = 1, sin = 0;    // values are not rotated
            float low = a * cos - b * sin, high = b * cos + a * sin;            // RoPE eq. (34)
            send(s.heads + n, low, tag), send(s.heads + n + half, high, tag);
            if (head < s.H) return;
            u16* to = head < s.H + s.K ? layer.keys + ((long long)(head - s.H) * s.S + slot) * s.E
                                       : layer.values + ((long long)(head - s.H - s.K) * s.S + slot) * s.E;
            to[i] = to_bf16(low), to[i + half] = to_bf16(high);
        });

        Product<Weights, 1> o(shared, layer.o, s.D, s.H * s.E, s.group, s.bits[1]);
        // The last blocks take the first parts if they have no task in q/k/v: they are waiting here already.
        for (int i = heads * s.E / 16 < gridDim.x ? gridDim.x - 1 - blockIdx.x : blockIdx.x; i < s.H * splits; i += gridDim.x) {
            int head = i / splits, part = i % splits, each = ceil_div(slot + 1, splits);
            attend(shared, s, layer, slot, head, part * each, min(slot + 1, (part + 1) * each),
                   s.parts + (head * SPLITS + part) * (s.E + 4), tag);
        }

        gather<Weights>(shared, s, splits, tag);
        if (l + 1 < s.L) read_bias(shared, s, shared.layer[(l + 1) % 2]);
        o.run([&](int n, float a, float) { send(s.middle + n, bf16(shared.x[n]) + rounded(a), tag); });

        prefetch_product(layer.down, s.D, s.I, s.ahead[1], 0);
        Product<Weights, 2> gate_up(shared, layer.gate_up, 2 * s.I, s.D, s.group, s.bits[2], s.I);
        read_gain(layer.second_norm, s.D, gain);
        receive<2>(s.middle, 0, s.D, tag, mine);
        normalise<Weights>(shared, mine, gain, s.D, s.eps, s.zeros);
        gate_up.run([&](int n, float gate, float up) {  // SwiGLU eq. (6)
            gate = rounded(gate);
            send(wide + n, rounded(gate / (1 + __expf(-gate))) * rounded(up), tag);
        });

        Product<Weights, 1> down(shared, layer.down, s.D, s.I, s.group, s.bits[3]);
        receive_wide<Weights>(shared, s, wide, tag);
        down.run([&](int n, float a, float) {
            a = bf16(shared.x[n]) + rounded(a);
            if (l + 1 < s.L) send(s.last + n, a, tag);
            else s.y[n] = to_bf16(a);
        });
    }
    if (blockIdx.x == 0 && tid == 0) *(volatile long long*)s.slot = slot + 1;   // all blocks have read it: they sent `wide`
}

#define DECODE(NAME, WEIGHTS) \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(Step s) { decode<WEIGHTS>(*(Shared*)shared_memory, s); }
DECODE(decode_bf16, Bf16)
DECODE(decode_w4, Int4)

}
