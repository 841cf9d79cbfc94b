// One token of one row, the whole decoder and the head in one kernel. It uses w4_matmul.cu's digits.
//
// A step at batch 1 reads every weight once and does little else. Launched as nine kernels or more per layer, it mostly waits:
// for kernels to start and for their first bytes to arrive. Here one block per multiprocessor runs for the whole step, through
// four products a layer; each needs what all blocks computed before it:
//
//   QKV      q/k/v of RMSNorm(x), RoPE; keys and values go into the cache; then attention, each head's keys in up to SPLITS parts
//   O        o of the joined parts, residual
//   GATE_UP  gate/up of RMSNorm(x), silu
//   DOWN     down, residual; after the last layer HEAD, the logits of RMSNorm(x)
//
// There is no barrier between blocks. A value is sent in one word together with a tag, which counts the layers, and a block that
// needs it polls the word until the tag is right: one round trip through the L2, where a barrier takes three (the values, the
// count of arrivals, the values again). Measured on an H200: see benchmarks/results/gpu.txt.
//
// Weights do not depend on the product before. So the copies of a warp's weights are one stream through all its tasks of all
// products, into a ring of slots in shared memory (10 KB a warp, 160 a multiprocessor; at 4 bits 8 and 134): where a slot has
// been read, the copy of the stream's next unit begins, and the memory stays busy while warps wait for words. What runs once a
// product takes as long as what runs for every unit of weights: so all products have one code, which is short, a block has one
// barrier of its own between two products, and what does not need the inputs is computed before they arrive, or after the
// outputs are sent.

namespace one_kernel {

const int WARPS = 16, THREADS = 32 * WARPS;
const int WIDEST = 20480, NARROW = 8 * THREADS, HEADS = 5120, LAYERS = 64;      // most inputs; D; outputs of q/k/v; layers
const int TURNS = 6, EMPTY = 3;                         // most tasks whose sums a team holds, and slots that a warp leaves empty
const int SPLITS = 8, PART = 132;                       // most parts of a head's keys; words of one, see `attend`
const int KEYS = 2, AT_ONCE = 4;                        // what a lane asks for at once: keys, each with its value; words
enum { QKV, O, GATE_UP, DOWN, HEAD };

struct Matrix { const void* weight; const u16* scales; const u8* zeros; };     // bfloat16 [N, K], or as repack lays it out
struct Layer {                                          // only addresses: decode_cuda.py writes them as int64
    Matrix matrices[4];                                 // [(H + 2K) E, D], [D, H E], [2I, D], [D, I]
    const u16 *norms[2], *bias;                         // [D] before q/k/v, [D] before gate/up, [(H + 2K) E]
    u16 *keys, *values;                                 // [K, S, E]
};
struct Product {                                        // of a matrix [N, K]; decode_cuda.py plans it
    int tasks, K, units, bits;                          // units: of a task; bits: log2 of the warps per team, see `Team`
    int gap, pairs;                                     // see `output`
};
struct Step {
    const Layer* layers;                                // [L + 1]; the last has the head [V, D] and its norm in q/k/v's places
    const u16* table;                                   // [V, D] the embedding
    const long long* token;                             // [1] the newest token, a row of it
    u16 *y, *logits;                                    // [D] the residual stream after the last layer; or, with HEAD, [V]
    u32 *heads, *middle, *wide;                         // words: [(H + 2K) E] q/k/v's, [D] o's, [2, I] gate/up's outputs
    u32* last;                                          // words: [D] the embedding, then down's outputs
    u32* parts;                                         // words: [H, SPLITS, PART], see `attend`
    const u16 *cos, *sin;                               // [S, E]
    long long* slot;                                    // [1] the token's slot in the cache; the kernel adds 1 at its end
    Product products[5];
    int L, D, I, H, K, E, S, zeros;                     // zeros: whether codes have zero points other than 8
    u32 inverse, head, count;                           // inverse: see `Int4`; count: of products, 4L or with the head 4L + 1;
    float one_by_D, eps;                                // head: 4L, the head's number
};
template <class Weights> struct alignas(16) Shared {
    char ring[WARPS][Weights::DEPTH * Weights::SLOT];   // each warp's weights in flight
    char narrow[NARROW / Weights::BLOCK * Weights::STRIDE];             // the inputs [D] of q/k/v, gate/up and the head
    union {
        char wide[WIDEST / Weights::BLOCK * Weights::STRIDE];           // those of down
        struct {
            char heads[HEADS / Weights::BLOCK * Weights::STRIDE];       // those of o
            float sums[2][WARPS * 130];                 // in attention, each warp's sums [E + 2], of a part and of the next one
        };
    };
    float part[TURNS][16][17], squares[2][WARPS];       // each warp's sums: of a task's 16 outputs (17: other banks); of x^2
    u16 cos[128], sin[128];                             // RoPE's factors of this step's slot
    Layer layers[LAYERS + 1];
};

// ---- words: what a block sends to all others
//
// A word's upper bits hold a value: a bfloat16 or, in attention's parts, a float32 without its last 8 bits. Its lower bits hold
// the tag, from 1 to 255. Until a word is sent anew, it is 0 or has the tag of one to three layers before. Relaxed accesses see
// a word whole, old or new, and need no fence: no other memory is read because of it.
//
// When may words be overwritten? A warp polls only what it needs itself, but a block's warps meet before each product: a block
// that sends outputs of a product has read all that product's inputs and all words before. Every block computes a part of `wide`
// in each layer. So a block that has all of layer l's `wide` knows that every block has read heads, parts and middle of layer l
// and last of layer l - 1, and only then are these sent anew. Layer l's `wide` itself may still be read by a slow block while
// others send that of l + 1: so there are two buffers. A block sends that of l + 2 only once it has all of l + 1's, and each
// block sends l + 1's only after it has read l's.  For each of its outputs, o reads a word of `last` again, and down one of
// `middle`: the next value of that word depends on this output.
//
// Why does every poll end? All blocks run at the same time, a product's inputs depend only on products before it, and a warp
// sends its outputs of these before it polls.

__device__ __forceinline__ Words load_relaxed(const u32* p) {
    Words v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ Pair load_pair(const u32* p) {
    Pair v;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u32 load_word(const u32* p) {
    u32 word;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(p) : "memory");
    return word;
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
__device__ __forceinline__ bool carries(const Pair& v, u32 tag) { return !(((v.w[0] ^ tag) | (v.w[1] ^ tag)) & 255); }
__device__ __forceinline__ Pair values(const Words& v) {
    return Pair{{v.w[0] >> 16 | (v.w[1] & 0xffff0000u), v.w[2] >> 16 | (v.w[3] & 0xffff0000u)}};
}
// Asks `ready` until it is true; after some seconds an error is better than a GPU that hangs.
template <class Ready> __device__ __forceinline__ void wait_until(Ready ready) {
    for (u32 polls = 0; !ready(); polls++)
        if (polls == 1u << 22) asm volatile("trap;");
}

// ---- weights: bfloat16 or 4-bit
//
// A warp reads a unit at a time, which fills a slot: 2 parts of 8 outputs x BLOCK inputs. With a gap the parts are two runs of
// outputs, `gap` apart, that are needed together (RoPE's two halves of a head, gate and up); without, two blocks of inputs of
// the same outputs.  begin takes the addresses of a task's first unit, fetch starts a unit's copies, put writes a thread's 4 of
// 4 THREADS inputs to shared memory, STRIDE bytes a block, add adds a unit's products to a lane's sums, and finish writes a
// warp's sums of a task: 8 of each part.  Both kinds use tensor cores. The order of an mma's inputs is free if it is the same in
// both operands, and so is what its rows and columns stand for.  slot: with this lane's offset of 16 bytes;  left: inputs from
// the unit's first one to the end;  shift: inputs, or bytes of `in`, from the first part's to the second's, 0 with a gap

// A lane's 16 bytes, 8 inputs of one row, are an mma's left operand as they are: the pairs 0 and 2 of inputs in row g, 1 and 3 in
// row g + 8. So column 0 of the right operand has the inputs' pairs 0 and 2, column 1 the others; the sums are c[0] and c[3] of
// the lanes (g, 0). A lane reads only what it copied itself, so it waits for no other lane.
struct Bf16 {
    static const int BLOCK = 64, STRIDE = 128, SLOT = 2048, DEPTH = 5, PUTS = 4;
    struct Sum { float upper[4], lower[4]; };
    const char* at;                                     // where this lane's next copies begin: in row g of the first part
    int other;                                          // bytes from there to its place in the second part

    __device__ __forceinline__ Bf16(const Step&) : at(nullptr), other(0) {}
    __device__ __forceinline__ void begin(const Matrix& matrix, const Product& product, int n, int k) {
        int lane = threadIdx.x % 32;
        at = (const char*)matrix.weight + 2 * ((long long)(n + lane / 4) * product.K + k + lane % 4 * 8);
        other = 2 * (product.gap ? product.gap * product.K : BLOCK);
    }
    __device__ __forceinline__ void fetch(char* slot, int left, int shift) const {
        left -= threadIdx.x % 4 * 8;
        copy_async<16>(left > 0, slot, at);
        copy_async<16>(left > 32, slot + 512, at + 64);
        copy_async<16>(left > shift, slot + 1024, at + other);
        copy_async<16>(left > shift + 32, slot + 1536, at + other + 64);
    }
    __device__ __forceinline__ void advance(int inputs) { at += 2 * inputs; }

    // A block's order is [t][column][half][pair / 2]: a lane's 16 bytes are its operands of two products.
    static __device__ __forceinline__ void put(char* in, Pair v, bool) {
        u32 at = threadIdx.x;
        char* to = in + at / 16 * STRIDE + at / 2 % 4 * 32 + at / 8 % 2 * 8 + at % 2 * 4;
        *(u32*)to = v.w[0], *(u32*)(to + 16) = v.w[1];
    }
    __device__ __forceinline__ void add(Sum& sum, const char* slot, const char* in, int shift, bool) const {
        int lane = threadIdx.x % 32, mine = lane % 4 * 32 + min(lane / 4, 1) * 16;              // columns 2 to 7 are not used
        const Words* w = (const Words*)slot;
        Words x = *(const Words*)(in + mine), y = *(const Words*)(in + shift + mine);
        Words a = w[0], b = w[32], c = w[64], d = w[96];
        mma(sum.upper, a.w, x.w), mma(sum.lower, c.w, y.w);
        mma(sum.upper, b.w, x.w + 2), mma(sum.lower, d.w, y.w + 2);
    }
    static __device__ __forceinline__ void finish(const Sum& sum, float (*part)[17]) {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        if (lane % 4) return;
        part[lane / 4][warp] = sum.upper[0] + sum.upper[3], part[8 + lane / 4][warp] = sum.lower[0] + sum.lower[3];
    }
};

// A part is half a tile of w4_matmul.cu's layout. As there, int8 tensor cores multiply, with the inputs in three digits: the
// first part's are columns 0 to 2, for rows 0 to 7, the second's columns 4 to 6, for rows 8 to 15, even if they are the same.
// A block's inputs: 384 bytes of digits, its unit / 16, the sum of its inputs.
struct Int4 {
    static const int BLOCK = 128, STRIDE = 400, SLOT = 1072, DEPTH = 8, PUTS = 1;
    struct Sum { float v; };                            // of row g, or in lanes with t >= 2 of row g + 8
    const Words* at;                                    // of this lane in the first part
    const char* quants;                                 // lanes 0 and 1 copy the parts' scales, 2 and 3 zero points, if any
    int other, block, n, stride;                        // other: bytes; block, n, stride: of scales [blocks in groups, stride]
    u32 inverse, top;                                   // inverse: of the blocks per group, as in `Copies`

    __device__ __forceinline__ Int4(const Step& s) : at(nullptr), quants(nullptr), other(0), block(0), n(0), stride(0),
        inverse(s.inverse), top(in_register(0x80808080u)) {}
    __device__ __forceinline__ void begin(const Matrix& matrix, const Product& product, int first, int k) {
        int lane = threadIdx.x % 32, blocks = ceil_div(product.K, 128), second = first + product.gap;
        block = k / 128, quants = lane < 2 ? (const char*)matrix.scales : (const char*)matrix.zeros;
        stride = round_up(product.tasks * (product.gap ? 16 : 8), 16);
        at = (const Words*)matrix.weight + ((first >> 4) * blocks + block) * 64 + (first & 8) * 4 + lane;   // 32 bits suffice
        other = product.gap ? ((second >> 4) - (first >> 4)) * blocks * 1024 + ((second & 8) - (first & 8)) * 64 : 1024;
        n = lane % 2 ? second : first;
        if (!product.gap) block += lane % 2;
    }
    __device__ __forceinline__ void fetch(char* slot, int left, int shift) const {
        int lane = threadIdx.x % 32, p = lane % 2;
        copy_async<16>(left > 0, slot, at);
        copy_async<16>(left > shift, slot + 512, (const char*)at + other);
        slot -= lane * 16;
        u32 quant = (inverse ? __umulhi(block, inverse) : block) * stride + n;
        bool there = left > p * shift;
        if (lane < 2) copy_async<16>(there, slot + 1024 + p * 16, quants + 2 * quant);          // of 8 outputs
        else if (lane < 4 && quants) copy_async<8>(there, slot + 1056 + p * 8, quants + quant);
    }
    __device__ __forceinline__ void advance(int inputs) { at += inputs / 2, block += inputs / 128; }

    // By a whole warp, for one block. Like w4_matmul.cu's `convert`, where a lane has 8 inputs: here two lanes share 8, and each
    // makes one of the two words that a digit of these takes.
    static __device__ __forceinline__ void put(char* in, Pair v, bool with_totals) {
        int lane = threadIdx.x % 32, odd = lane % 2;
        u32 most = 0;
        for (u32 pair : v.w) most = larger(most, pair);
        most = __reduce_max_sync(~0u, most);            // one instruction: 4-bit is 2 to 3% faster than with five shuffles
        float total = 0;
        if (with_totals) total = warp_sum(low(v.w[0]) + high(v.w[0]) + low(v.w[1]) + high(v.w[1]));
        Unit unit(most);
        u32 other = __shfl_xor_sync(~0u, odd ? v.w[0] : v.w[1], 1);
        u32 a = odd ? other : v.w[0], b = odd ? v.w[1] : other;         // inputs 0 1 and 4 5, or 2 3 and 6 7
        Words d = digits_of(low(a), low(b), high(a), high(b), unit.inverse);
        char* to = in + threadIdx.x / 32 * STRIDE;
        char* digits = to + lane / 16 * 192 + lane % 8 / 2 * 16 + lane / 8 % 2 * 8 + odd * 4;
#pragma unroll
        for (int digit = 0; digit < 3; digit++) *(u32*)(digits + digit * 64) = d.w[digit];
        if (lane == 0) *(float*)(to + 384) = unit.sixteenth, *(float*)(to + 388) = total;
    }
    __device__ __forceinline__ void add(Sum& sum, const char* slot, const char* in, int shift, bool with_zeros) const {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, p = t / 2, c[4] = {};
        const char *digits = in + g / 4 * shift + min(g % 4, 2) * 64 + t * 16, *of_block = in + p * shift + 384;
        __syncwarp();                                   // other lanes copied the scales
        Words w[2] = {((const Words*)slot)[0], ((const Words*)slot)[32]}, x;
        slot -= lane * 16;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 a[4];
            operand(a, w, j, 0xf0f0f0f0u, top);
            if (j % 2 == 0) x = *(const Words*)(digits + j / 2 * 192);
            mma(c, a, x.w + j % 2 * 2);
        }
        float scale = half_to_float(*(const u16*)(slot + 1024 + p * 16 + g * 2));
        int second = t % 2 ? 0 : 256;                   // a lane with d2 has no digit in its other column
        sum.v += scale * *(const float*)of_block * ((p ? c[2] : c[0]) + second * (p ? c[3] : c[1]));
        if (with_zeros && t % 2 == 0)
            sum.v += scale * (8 - (int)*(const u8*)(slot + 1056 + p * 8 + g)) * *(const float*)(of_block + 4);
        __syncwarp();                                   // all lanes have read what is overwritten next
    }
    static __device__ __forceinline__ void finish(const Sum& sum, float (*part)[17]) {
        int lane = threadIdx.x % 32;
        float v = lane % 2 ? sum.v * 65536 : sum.v;     // d2's sum
        v += __shfl_xor_sync(~0u, v, 1);
        if (lane % 2 == 0) part[lane % 4 * 4 + lane / 4][threadIdx.x / 32] = v;
    }
};

// ---- products of a weight and the vector in shared memory
//
// A task is 8 outputs, or 8 pairs of outputs; a team of 2^bits warps computes one at a time, its warps taking turns along the
// inputs, a unit each. decode_cuda.py chooses `bits`.
struct Team {
    int split, rank, number, first, teams;              // first: its first task; teams: in all blocks
    __device__ __forceinline__ Team(int bits) {
        int warp = threadIdx.x / 32;
        split = 1 << bits, rank = warp & split - 1, number = warp >> bits;
        first = number * gridDim.x + blockIdx.x, teams = (WARPS >> bits) * gridDim.x;
    }
    __device__ __forceinline__ void meet() const {      // barrier 0 is that of __syncthreads
        if (split == 1) __syncwarp();
        else asm volatile("bar.sync %0, %1;" :: "r"(number + 1), "r"(32 * split) : "memory");
    }
};
// The first of a task's outputs. Pair n is the outputs m = n + (n & pairs) and m + gap; pairs = -gap (gap a power of two) skips
// the second half of every 2 gap outputs, 0 skips none.
__device__ __forceinline__ int output(const Product& product, int task) { return task * 8 + (task * 8 & product.pairs); }

// A warp's copies of weights, from its first task of the first product to its last one of the last.
template <class Weights> struct Stream {
    static const int ROUND = Weights::DEPTH * Weights::SLOT;
    const Step& s;
    const Layer* layers;
    char* ring;                                         // this lane's place in its first slot
    int oldest;                                         // the slot that is read next, in bytes from there
    Weights next;                                       // the addresses of the unit that is copied next
    u32 count;                                          // its product's number
    int turn, left, step, shift;                        // which of the team's tasks; inputs from the unit's first one to the end,
                                                        // to this warp's next unit, to the second part
    __device__ __forceinline__ Stream(const Step& s, const Layer* layers, char* ring)
        : s(s), layers(layers), ring(ring + threadIdx.x % 32 * 16), oldest(0), next(s), count(0), turn(-1), left(0), step(0),
          shift(0) {
#pragma unroll 1
        for (int empty = Weights::DEPTH; empty; empty--) fetch(empty);
    }
    // Goes to this warp's next task, of this product or a later one. After the last one, nothing is left to copy.
    __device__ __forceinline__ void seek() {
#pragma unroll 1
        for (; count < s.count; count++, turn = -1) {
            const Product& product = s.products[count == s.head ? HEAD : count % 4];
            Team team(product.bits);
            int task = team.first + ++turn * team.teams, inputs = product.gap ? Weights::BLOCK : 2 * Weights::BLOCK;
            if (task >= product.tasks || team.rank >= product.units) continue;
            shift = inputs - Weights::BLOCK, step = inputs << product.bits, left = product.K - team.rank * inputs;
            return next.begin(layers[count / 4].matrices[count % 4], product, output(product, task), team.rank * inputs);
        }
    }
    // Starts the next unit's copies. `empty` slots before the oldest one have been read and await theirs.
    __device__ __forceinline__ void fetch(int empty) {
        if (left <= 0) seek();
        int slot = oldest - empty * Weights::SLOT;
        next.fetch(ring + (slot < 0 ? slot + ROUND : slot), left, shift);
        next.advance(step), left -= step;
        commit_group();
    }
    // -> the oldest slot, once its copies are there
    __device__ __forceinline__ const char* read(int empty) {
        if (empty == 0) wait_for_copies<Weights::DEPTH - 1>();
        else if (empty == 1) wait_for_copies<Weights::DEPTH - 2>();
        else wait_for_copies<Weights::DEPTH - 3>();
        const char* slot = ring + oldest;
        oldest = oldest == ROUND - Weights::SLOT ? 0 : oldest + Weights::SLOT;
        return slot;
    }
};

// A warp's part in a product y [N] = W [N, K] in, and all that it can compute of it before the inputs arrive.
template <class Weights> struct Run {
    const Product& product;
    Team team;
    const char* first;                                  // the inputs of its first unit
    int shift, each, tasks, units;                      // bytes to the second part's, to the next unit's; its units of a task
    u32 ours;                                           // bit w for each warp w of the team, in odd lanes shifted down by 8

    // in  K inputs, then zeros up to a multiple of 256
    __device__ __forceinline__ Run(const Product& product, const char* in) : product(product), team(product.bits) {
        shift = in_register(product.gap ? 0 : Weights::STRIDE), tasks = in_register(product.tasks);
        int unit = Weights::STRIDE + shift;
        first = in + in_register(team.rank * unit), each = in_register(unit << product.bits);
        units = in_register((product.units - team.rank + team.split - 1) >> product.bits);
        team.split = in_register(team.split), team.rank = in_register(team.rank), team.number = in_register(team.number);
        ours = in_register((1u << team.split) - 1 << team.number * team.split >> threadIdx.x % 2 * 8);
    }
    __device__ __forceinline__ int task(int turn) const { return team.first + turn * team.teams; }
    // The output of a turn's task whose sum this lane gets, if it gets one: the even ones of 16 lanes do.
    __device__ __forceinline__ int output_of(int turn) const { return output(product, task(turn)) + threadIdx.x % 32 / 2; }
    __device__ __forceinline__ bool gets(int turn) const { return !(threadIdx.x & 17) && task(turn) < tasks; }

    // done(a, b, next)  a lane's sum and that of the pair's other output, or without a gap the rest of the sum; next: the turn
    // whose sums this warp adds after this one's.  Others wait for these: so a warp fills up to EMPTY slots only afterwards.
    template <class Done>
    __device__ __forceinline__ void run(Stream<Weights>& stream, float (*part)[16][17], bool zeros, Done done) const {
        int lane = threadIdx.x % 32, empty = 0;
#pragma unroll 1
        for (int base = 0, turn = 0; task(base) < tasks; base += TURNS) {
#pragma unroll 1
            for (turn = base; turn < base + TURNS && task(turn) < tasks; turn++) {
                typename Weights::Sum sum = {};
                const char* in = first;
#pragma unroll 1
                for (int left = units; left > 0; left--, in += each, empty++) {
                    if (empty == EMPTY) stream.fetch(empty--);
                    stream.next.add(sum, stream.read(empty), in, shift, zeros);
                }
                Weights::finish(sum, part[turn - base]);
            }
            team.meet();
#pragma unroll 1
            for (int mine = base + team.rank; mine < turn; mine += team.split) {
                const float* sums = part[mine - base][lane / 2] + lane % 2 * 8;         // two lanes add the sums of an output
                float of[8] = {};                       // all are read at once: a loop took 6% of the step at 0.5B
#pragma unroll
                for (int w = 0; w < 8; w++)
                    if (ours >> w & 1) of[w] = sums[w];
                float total = ((of[0] + of[1]) + (of[2] + of[3])) + ((of[4] + of[5]) + (of[6] + of[7]));
                total += __shfl_xor_sync(~0u, total, 1);
                float other = __shfl_xor_sync(~0u, total, 16);
                done(total, other, mine + team.split < turn ? mine + team.split : base + TURNS + team.rank);
            }
            if (task(base + TURNS) < tasks) team.meet();        // before the sums are overwritten
        }
#pragma unroll 1
        for (; empty; empty--) stream.fetch(empty);
    }
};

// ---- between the products: what a warp puts into shared memory for its block

// Receives a thread's share of `count` words: v[r] are the four from 4 (threadIdx.x + (first + r) THREADS) on; past the end 0.
template <int R> __device__ __forceinline__ void poll(const u32* words, int first, int count, u32 tag, Words* v) {
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
// Puts K inputs into shared memory as their words arrive: x * gain, and in `squares` a warp's sum of x^2; without a norm only x.
// RMSNorm's factor is the same for all inputs, so that the product's sums are multiplied by it instead.  RMSNorm eq. (4)
// The first words are polled alone, the others follow a few at a time: until the first have arrived, more loads would only crowd
// the path to the L2.
template <class Weights>
__device__ __forceinline__ void receive(char* in, const u32* words, int K, u32 tag, const u16* norm, float* squares, bool zeros) {
    int last = round_up(K, 256);
    Pair gain[2] = {{{0x3f803f80u, 0x3f803f80u}}, {{0x3f803f80u, 0x3f803f80u}}};               // ones
    for (int r = 0; r < 2; r++)                         // K <= NARROW if there is a norm
        if (int at = 4 * (threadIdx.x + r * THREADS); norm && at < K) gain[r] = *(const Pair*)(norm + at);
    float square = 0;
#pragma unroll 1
    for (int first = 0, rounds = 1; first * 4 * THREADS < last; first += rounds, rounds = AT_ONCE) {
        Words v[AT_ONCE] = {};
        if (first == 0) poll<1>(words, first, K, tag, v);
        else poll<AT_ONCE>(words, first, K, tag, v);
#pragma unroll Weights::PUTS
        for (int r = 0; r < AT_ONCE; r++) {
            if (r == rounds || 4 * (threadIdx.x + (first + r) * THREADS) >= last) break;
            float x[4];
            for (int i = 0; i < 4; i++) x[i] = high(v[0].w[i]), square += x[i] * x[i];
            Weights::put(in + (first + r) * (4 * THREADS / Weights::BLOCK * Weights::STRIDE),
                         Pair{{to_bf16_pair(x[0] * low(gain[0].w[0]), x[1] * high(gain[0].w[0])),
                               to_bf16_pair(x[2] * low(gain[0].w[1]), x[3] * high(gain[0].w[1]))}}, zeros);
            gain[0] = gain[1];
#pragma unroll
            for (int i = 1; i < AT_ONCE; i++) v[i - 1] = v[i];          // registers cannot be indexed
        }
    }
    if (!norm) return;
    square = warp_sum(square);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
}

// One head's attention over a part of its keys, by one block: a key takes `lanes` lanes, 8 values each, and a warp reads `keys`
// keys at once, with KEYS such loads in flight, the first before the query has arrived. This step's own key and value come as
// words.  -> out [PART], words: the sum of exp(score - most) value; most; the sum of exp(score - most)
__device__ __forceinline__ void attend(float* sums, const Step& s, const Layer& layer, int slot, int head, int begin, int end,
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
        }
        for (int mask = lanes / 2; mask; mask /= 2)
#pragma unroll
            for (int u = 0; u < KEYS; u++) score[u] += __shfl_xor_sync(~0u, score[u], mask);
#pragma unroll
        for (int u = 0; u < KEYS; u++) {
            if (first + u * keys + lane / lanes >= end) score[u] = LEAST;
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
    for (int mask = 16; mask >= lanes; mask /= 2) mass += __shfl_xor_sync(~0u, mass, mask);
#pragma unroll
    for (int count = 4; count; count /= 2) {            // a lane gives half of its sums to another and gets its keys' other half
        if (4 * count < lanes) break;
        bool upper = lane & 4 * count;
#pragma unroll
        for (int i = 0; i < count; i++) {
            float given = upper ? sum[i] : sum[i + count], kept = upper ? sum[i + count] : sum[i];
            sum[i] = kept + __shfl_xor_sync(~0u, given, 4 * count);
        }
        column += upper ? count : 0;
    }
    float* mine = sums + warp * (s.E + 2);
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i < s.E / 32) mine[column + i] = sum[i];
    if (lane == 0) mine[s.E] = top, mine[s.E + 1] = mass;
    __syncthreads();
    if (warp >= s.E / 32) return;                       // the other warps combine all 16: a lane knows the share of one,
    const float* theirs = sums + lane % WARPS * (s.E + 2) + s.E;
    most = top = theirs[0];
    for (int mask = WARPS / 2; mask; mask /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
    top = cut(__float_as_uint(top));                    // as it will be sent: the sums must be relative to exactly this
    share = __expf(most - top), mass = share * theirs[1];
    for (int mask = WARPS / 2; mask; mask /= 2) mass += __shfl_xor_sync(~0u, mass, mask);
    float joined = 0;                                   // and each thread sums one of the E values
#pragma unroll
    for (int w = 0; w < WARPS; w++) joined += __shfl_sync(~0u, share, w) * sums[w * (s.E + 2) + threadIdx.x];
    send_float(out + threadIdx.x, joined, tag);
    if (threadIdx.x < 2) send_float(out + 128 + threadIdx.x, threadIdx.x ? mass : top, tag);
}

// Joins each head's parts: attention's output [H E], o's inputs. A thread takes 4 adjacent values, of up to MOST parts at once.
template <class Weights, int MOST> __device__ __forceinline__ void gather(char* in, const Step& s, int splits, u32 tag) {
#pragma unroll 1
    for (int at = 4 * threadIdx.x; at < round_up(s.H * s.E, 256); at += 4 * THREADS) {
        int head = at >> 31 - __clz(s.E), e = at & s.E - 1;
        const u32* parts = s.parts + head * SPLITS * PART;
        u32 least = __float_as_uint(LEAST) & ~255u | tag;
        Words sums[MOST];
        Pair scales[MOST];                              // most, mass
        wait_until([&] {
            bool ready = true;
#pragma unroll
            for (int p = 0; p < MOST; p++) {            // a part that is not there has mass 0
                bool there = p < splits && head < s.H;
                sums[p] = there ? load_relaxed(parts + e + p * PART) : Words{{tag, tag, tag, tag}};
                scales[p] = there ? load_pair(parts + 128 + p * PART) : Pair{{least, tag}};
            }
#pragma unroll
            for (int p = 0; p < MOST; p++) ready &= carries(sums[p], tag) & carries(scales[p], tag);
            return ready;
        });
        __syncwarp();
        float top = LEAST, mass = 0, v[4] = {};
#pragma unroll
        for (int p = 0; p < MOST; p++) top = fmaxf(top, cut(scales[p].w[0]));
#pragma unroll
        for (int p = 0; p < MOST; p++) {
            float share = __expf(cut(scales[p].w[0]) - top);
            mass += share * cut(scales[p].w[1]);
            for (int i = 0; i < 4; i++) v[i] += share * cut(sums[p].w[i]);
        }
        Pair out = {};
        float one = __fdividef(1, mass);
        if (head < s.H)
            for (int i = 0; i < 2; i++) out.w[i] = to_bf16_pair(v[2 * i] * one, v[2 * i + 1] * one);
        Weights::put(in + (at - 4 * threadIdx.x) / Weights::BLOCK * Weights::STRIDE, out, s.zeros);
    }
}

// ---- the whole step

template <class Weights> struct Decoder {
    Shared<Weights>& shared;
    const Step& s;
    int slot, half, heads;                              // half: of a head's values; heads: of q/k/v

    __device__ __forceinline__ u32 tag(int l) const { return ((u32)slot * (s.L + 1) + l + 1) % 255 + 1; }   // -1: the embedding

    // What a product's output n is joined with: a bias for it and one for its pair, or the residual stream in the upper half.
    __device__ __forceinline__ u32 read(int p, const Layer& layer, int n) const {
        if (p == QKV) return layer.bias[n] | layer.bias[n + half] << 16;
        return p == O ? load_word(s.last + n) : p == DOWN ? load_word(s.middle + n) : 0;
    }
    __device__ __forceinline__ void write_qkv(const Layer& layer, int n, float a, float b, u32 bias, u32 tag) const {
        int head = n >> 31 - __clz(s.E), i = n & s.E - 1;       // a and b are the two that RoPE rotates together
        a = rounded(a + low(bias)), b = rounded(b + high(bias));
        float cos = bf16(shared.cos[i]), sin = bf16(shared.sin[i]);
        if (head >= s.H + s.K) cos = 1, sin = 0;        // values are not rotated
        float first = a * cos - b * sin, second = b * cos + a * sin;            // RoPE eq. (34)
        send(s.heads + n, first, tag), send(s.heads + n + half, second, tag);
        if (head < s.H) return;
        u16* to = head < s.H + s.K ? layer.keys + ((long long)(head - s.H) * s.S + slot) * s.E
                                   : layer.values + ((long long)(head - s.H - s.K) * s.S + slot) * s.E;
        to[i] = to_bf16(first), to[i + half] = to_bf16(second);
    }
    // A product's output n, or n and its pair's.
    __device__ __forceinline__ void write(int p, int l, int n, float a, float b, u32 extra, u32 tag) const {
        float sum = high(extra) + rounded(a + b);       // with the residual
        if (p == QKV) write_qkv(shared.layers[l], n, a, b, extra, tag);
        else if (p == O) send(s.middle + n, sum, tag);
        else if (p == GATE_UP) {                        // SwiGLU eq. (6)
            a = rounded(a);
            send(s.wide + l % 2 * s.I + n, rounded(__fdividef(a, 1 + __expf(-a))) * rounded(b), tag);
        } else if (p == HEAD) s.logits[n] = to_bf16(a), s.logits[n + 8] = to_bf16(b);
        else {
            send(s.last + n, sum, tag);
            if (l == s.L - 1) s.y[n] = to_bf16(sum);
        }
    }
    // 1 / rms(x) from all warps' sums
    __device__ __forceinline__ float inverse_rms(const float* squares) const {
        float sum[4];
#pragma unroll
        for (int w = 0; w < 4; w++) sum[w] = (squares[w] + squares[w + 4]) + (squares[w + 8] + squares[w + 12]);
        return rsqrtf(((sum[0] + sum[1]) + (sum[2] + sum[3])) * s.one_by_D + s.eps);
    }
    // Attention, the parts of this block.
    __device__ __forceinline__ void attention(const Layer& layer, int splits, u32 tag) const {
        // The last blocks take the first parts if they have no task in q/k/v: they are waiting here already.
        int first = s.products[QKV].tasks < gridDim.x ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
        int each = ceil_div(slot + 1, splits);
        for (int i = first, turn = 0; i < s.H * splits; i += gridDim.x, turn ^= 1) {
            int head = i / splits, part = i % splits;
            attend(shared.sums[turn], s, layer, slot, head, part * each, min(slot + 1, (part + 1) * each),
                   s.parts + (head * SPLITS + part) * PART, tag);
        }
    }
    __device__ __forceinline__ void copy_layers() const {
        for (int at = 8 * threadIdx.x; at < (s.L + 1) * sizeof(Layer); at += 8 * THREADS)
            copy_async<8>(true, (char*)shared.layers + at, (const char*)s.layers + at);
        commit_group();
        wait_for_copies<0>();
        __syncthreads();
    }
    // Sends the token's embedding, and leaves RoPE's factors for `write_qkv`, after the next barrier.
    __device__ __forceinline__ void embed() const {
        int tid = threadIdx.x;
        for (int n = blockIdx.x * THREADS + tid; n < s.D; n += gridDim.x * THREADS)
            send(s.last + n, bf16(s.table[*s.token * s.D + n]), tag(-1));
        if (tid < s.E) shared.cos[tid] = s.cos[slot * s.E + tid], shared.sin[tid] = s.sin[slot * s.E + tid];
    }
    // Brings what is read only once, and late, into the L2: the biases and norms of a layer.
    __device__ __forceinline__ void prefetch_layer(const Layer& layer) const {
        int line = (blockIdx.x * THREADS + threadIdx.x) * 64;   // 64 values are a cache line
        if (line < s.D) prefetch(layer.norms[0] + line), prefetch(layer.norms[1] + line);
        if (line < heads * s.E) prefetch(layer.bias + line);
    }
    __device__ __forceinline__ void run() {
        copy_layers();
        Stream<Weights> stream(s, shared.layers, shared.ring[threadIdx.x / 32]);
        embed();
        int span = WARPS * KEYS * 256 / s.E;            // keys that a block reads at once
        int splits = min(ceil_div(slot + 1, span), min(SPLITS, max(1, gridDim.x / s.H)));
#pragma unroll 1
        for (u32 count = 0; count < s.count; count++) {
            int l = count / 4, p = count == s.head ? HEAD : count % 4;
            u32 now = tag(l);
            const Layer& layer = shared.layers[l];
            if (p == O) attention(layer, splits, now);
            if (p == QKV && l + 1 < s.L) prefetch_layer(shared.layers[l + 1]);
            // Two places for inputs: at the barrier before a product all warps have finished the one before it, and so do not
            // read the other place any more. The sums of squares have two places for the same reason.
            bool normed = p != O && p != DOWN;
            char* in = normed ? shared.narrow : shared.wide;
            float* squares = shared.squares[p / 2 % 2];
            Run<Weights> work(s.products[p], in);
            int n;
            bool mine;                                  // of its team's outputs this lane sends n; and read(n) arrives while the
            u32 extra;                                  // warp polls or sends the one before
            auto expect = [&](int turn) {
                n = in_register(work.output_of(turn)), mine = work.gets(turn);
                extra = mine ? read(p, layer, n) : 0;
            };
            expect(work.team.rank);
            bool zeros = in_register(s.zeros && layer.matrices[p % 4].zeros);
            if (p == O && splits <= 3) gather<Weights, 3>(in, s, splits, now);
            else if (p == O) gather<Weights, SPLITS>(in, s, splits, now);
            else {
                const u32* words = p == DOWN ? s.wide + l % 2 * s.I : p == GATE_UP ? s.middle : s.last;
                const u16* norm = normed ? layer.norms[p == GATE_UP] : nullptr;
                receive<Weights>(in, words, work.product.K, p == QKV || p == HEAD ? tag(l - 1) : now, norm, squares, s.zeros);
            }
            __syncthreads();
            work.run(stream, shared.part, zeros, [&](float a, float b, int next) {
                float factor = inverse_rms(squares);
                if (!normed) factor = 1;
                if (mine) write(p, l, n, a * factor, b * factor, extra, now);
                expect(next);
            });
        }
        wait_for_copies<0>();
        if (blockIdx.x == 0 && threadIdx.x == 0) *(volatile long long*)s.slot = slot + 1;       // all read it: they sent `wide`
    }
};

#define DECODE(NAME, WEIGHTS) \
    static_assert(sizeof(Shared<WEIGHTS>) <= 227 << 10, "decode_cuda.py asks for so many bytes"); \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ Step s) { \
        int slot = *(volatile long long*)s.slot; \
        Decoder<WEIGHTS>{*(Shared<WEIGHTS>*)shared_memory, s, slot, s.E / 2, s.H + 2 * s.K}.run(); \
    }
DECODE(decode_bf16, Bf16)
DECODE(decode_w4, Int4)

}
