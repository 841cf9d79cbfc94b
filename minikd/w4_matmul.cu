// W4A16 on CUDA: y = x W^T + b with W in 4-bit codes, x and y in bfloat16, sums in float32. From naive to fast:
//
//   w4_naive        one thread per output, one code at a time: the reference for the others
//   w4_mma_*        up to 64 rows: codes become operands of tensor-core products in bfloat16, without a shuffle; asynchronous
//                   copies bring them into shared memory, several tiles ahead
//   w4_int8_2       up to 2 rows and many outputs, or one row of many inputs: int8 tensor cores take fewer instructions, and are
//                   as exact with x split into three digits; one block per multiprocessor, whose copies never pause
//   w4_dequantise   more rows: writes W in bfloat16, and cuBLAS multiplies
//
// The layout, made at first use by w4_cuda.repack. W [N, K] is cut into tiles of 16 outputs x 128 inputs, padded with codes of 8
// (past K, x is read as 0; past N, scales are 0); a tile is 1,024 contiguous bytes, two loads of 16 bytes per lane of a warp:
//
//   tile (n/16, k/128) = [half: output n%16 / 8][lane 0..31][word 0..3],   lane = 4 (n % 8) + t
//   word j of lane (g, t) holds 8 consecutive inputs  k = 32 j + 8 t + 0..7  of output  8 half + g:
//
//     bits   31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0
//     input    7       5       3       1       6       4       2       0
//
//   so that (word >> 4i) & 0x000f000f is the pair of inputs (2i, 2i + 1), one in each half of a register.
//
// scales [groups, N'] float16 and, unless all zeros are 8, zeros [groups, N'] uint8, N' = N padded to 16; a group is 32, 64
// or a multiple of 128 consecutive inputs. K is a multiple of 8.

__device__ __forceinline__ u32 minus_pair(u32 a, u32 b) {       // two bfloat16 a - b, as b * -1 + a: sm_80 has no sub.bf16x2
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xbf80bf80u), "r"(a));
    return d;
}
__device__ __forceinline__ u32 merge(u32 a, u32 mask, u32 top) {        // (a & mask) | top, whose truth table is 0xea: one
    u32 d;                                                              // instruction, not two, if mask and top are registers
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(top));
    return d;
}
// code - zero of inputs (2i, 2i + 1), exactly.  0x4300 is 128 in bfloat16, and the last of its 7 mantissa bits is worth 1: so
// 0x4300 | code is 128 + code, and one logical instruction converts two codes.  `zero` holds 128 + zero twice.
__device__ __forceinline__ u32 decode_pair(u32 word, int i, u32 zero) {
    return minus_pair(((word >> 4 * i) & 0x000f000fu) | 0x43004300u, zero);
}

#define PARAMETERS const Words* words, const u16* scales, const u8* zeros, const u16* x, const u16* bias, u16* y, \
                   int M, int N, int K, int group
#define ARGUMENTS words, scales, zeros, x, bias, y, M, N, K, group

// ---- naive: grid (N / 128, M), one output per thread

extern "C" __global__ void w4_naive(PARAMETERS) {
    int n = blockIdx.x * blockDim.x + threadIdx.x, m = blockIdx.y, blocks = ceil_div(K, 128);
    if (n >= N) return;
    float sum = 0;
    for (int k = 0; k < K; k++) {
        const Words* tile = words + ((long long)(n / 16) * blocks + k / 128) * 64;
        u32 word = tile[n % 16 / 8 * 32 + n % 8 * 4 + k % 32 / 8].w[k % 128 / 32];
        int code = word >> (k % 8 / 2 * 4 + k % 2 * 16) & 15, at = k / group * round_up(N, 16) + n;
        sum += half_to_float(scales[at]) * (code - (zeros ? zeros[at] : 8)) * bf16(x[(long long)m * K + k]);
    }
    y[(long long)m * N + n] = to_bf16(sum + (bias ? bf16(bias[n]) : 0));
}

// ---- what the two fast ones share

__device__ __forceinline__ char* shared_at(int bytes) { return (char*)shared_memory + bytes; }

// Copies tiles to shared memory, by all lanes of a warp: 1,024 bytes of codes, then SETS times 16 scales and 16 zeros.
template <int SETS> struct Copies {
    const char* quant;                                  // three lanes per set copy 2 x 8 outputs' scales and 16 outputs' zeros
    u32 size, stride, inverse, last;                    // size: bytes per output of what this lane copies, 0: only codes
    int lane, set;

    __device__ __forceinline__ Copies(const u16* scales, const u8* zeros, int N, int K, int group) {
        lane = in_register(threadIdx.x % 32), set = lane / 3, stride = round_up(N, 16), last = K / group - 1;
        int which = lane % 3, per = group / 32;
        inverse = 0xffffffffu / per + 1;                // 2^32 / per rounded up: __umulhi(n, inverse) is n / per; 0 for per = 1
        quant = which < 2 ? (const char*)(scales + which * 8) : (const char*)zeros;
        size = set >= SETS || !quant ? 0 : which < 2 ? 2 : 1;
    }
    // codes: where this lane's first 16 are; block, column: the tile's inputs / 128 and its first output
    __device__ __forceinline__ void start(char* slot, const Words* codes, u32 block, u32 column) const {
        u32 at = 4 * block + set * (4 / SETS);
        if (inverse) at = __umulhi(at, inverse);        // which group
        if (SETS == 4) at = min(at, last);              // the last tile may reach past the last group
        for (int h = 0; h < 2; h++) copy_async<16>(true, slot + h * 512 + lane * 16, codes + h * 32);
        if (size) copy_async<16>(true, slot + 1024 + lane * 16, quant + (at * stride + column) * size);
    }
};

// ---- tensor cores: grid (N / 16); 8 EIGHTS rows of x, which are the columns of EIGHTS mma
//
// A block computes 16 outputs. Its WARPS warps take the tiles along K in turn, and at the end their sums are added in a fixed
// order, so that the result does not depend on which warp is first.  EACH: how many words a lane multiplies before it loads
// scales again, 4 if a group is a multiple of 128 inputs, else 1.
//
// An mma sums over 16 inputs, in any order that is the same in both operands. So a lane's own 8 inputs 32 j + 8 t + 0..7 can
// stay in that lane: 0..3 go into the first mma of word j, 4..7 into the second. No shuffle is needed.
//
// Each warp has a ring of DEPTH slots in shared memory; asynchronous copies bring tiles and their scales, DEPTH - 1 ahead.
// Loads into registers would not do: the hardware counts them together, so that waiting for the first waits for the last too.

// An mma's left operand: pairs i and i + 1 of word j, of outputs g (w[0], zero[0]) and g + 8 (w[1], zero[1]).
__device__ __forceinline__ void operand(u32* a, const Words* w, int j, int i, const u32* zero, u32 mask, u32 top) {
#pragma unroll
    for (int q = 0; q < 4; q++) a[q] = minus_pair(merge(w[q % 2].w[j] >> 4 * (i + q / 2), mask, top), zero[q % 2]);
}

template <int EIGHTS, int WARPS, int EACH>
__device__ __forceinline__ void tensor(PARAMETERS) {
    const int GROUPS = 4 / EACH, SLOT = 1024 + 48 * GROUPS, DEPTH = 4, LAST = (DEPTH - 1) * SLOT;
    const int ROWS = 8 * EIGHTS, STRIDE = ROWS + 1;     // of the sums [WARPS][16][STRIDE]; the + 1: fewer bank conflicts
    const bool AHEAD = EIGHTS == 1;                     // there are registers for x of each warp's next tile
    static_assert(16 * STRIDE * 4 <= DEPTH * SLOT, "the sums fit where the tiles were");
    Copies<GROUPS> copies(scales, zeros, N, K, group);
    int lane = copies.lane, warp = threadIdx.x / 32, g = in_register(lane / 4), t = lane % 4, blocks = ceil_div(K, 128);
    u32 mask = in_register(0x000f000fu), top = in_register(0x43004300u);
    char* ring = shared_at(in_register(warp * DEPTH * SLOT));
    const u16* lane_x = x + 8 * t;
    int from[EIGHTS];                                   // offsets of rows of x; past the last, the last is read again, for
#pragma unroll                                          // columns of the product that are not written out
    for (int c = 0; c < EIGHTS; c++) from[c] = min(8 * c + g, M - 1) * K;
    auto read = [&](int b, int j, int c) {              // EACH == 4: K is a multiple of 128, so no load is past it
        const Words* p = (const Words*)(lane_x + b * 128 + from[c]) + j * 4;
        return EACH == 4 ? load(p) : load_if(b * 128 + 32 * j + 8 * t < K, p);
    };
    const Words* codes = words + ((long long)blockIdx.x * blocks + warp) * 64 + lane;
    auto fetch = [&](char* slot, int b) {
        if (b < blocks) copies.start(slot, codes, b, blockIdx.x * 16), codes += WARPS * 64;
        commit_group();
    };
    let_next_start();
    for (int d = 0; d < DEPTH - 1; d++) fetch(ring + d * SLOT, warp + d * WARPS);
    wait_for_previous(lane_x);                          // weights do not depend on the kernel before, but x does
    Words ahead[4];
    if (AHEAD)
        for (int j = 0; j < 4; j++) ahead[j] = read(min(warp, blocks - 1), j, 0);
    int at = 0, before = LAST;                          // the slot being read, and the one read before it
    float total[EIGHTS][4] = {};
#pragma unroll 1
    for (int b = warp; b < blocks; b += WARPS) {
        wait_for_copies<DEPTH - 2>();
        __syncwarp();                                   // other lanes' copies are there too, and the slot before has been read
        fetch(ring + before, b + (DEPTH - 1) * WARPS);
        const char* slot = ring + at;
        before = at, at = at == LAST ? 0 : at + SLOT;
        Words w[2] = {((const Words*)slot)[lane], ((const Words*)slot)[32 + lane]};
        float part[EIGHTS][4] = {}, scale[2];           // of one group
        u32 zero[2];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j % EACH == 0)
                for (int h = 0; h < 2; h++) {
                    const char* quant = slot + 1024 + j / EACH * 48;
                    scale[h] = half_to_float(((const u16*)quant)[h * 8 + g]);
                    zero[h] = top | (zeros ? (u8)quant[32 + h * 8 + g] : 8) * 0x10001u;
                }
            Words in[EIGHTS];
#pragma unroll
            for (int c = 0; c < EIGHTS; c++) in[c] = AHEAD ? ahead[j] : read(b, j, c);
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                u32 a[4];
                operand(a, w, j, i, zero, mask, top);
#pragma unroll
                for (int c = 0; c < EIGHTS; c++) mma(part[c], a, in[c].w + i);
            }
            if (AHEAD) ahead[j] = read(min(b + WARPS, blocks - 1), j, 0);
            if ((j + 1) % EACH == 0) {                  // operands were exact in bfloat16; the scale multiplies in float32
#pragma unroll
                for (int c = 0; c < EIGHTS; c++)
#pragma unroll
                    for (int q = 0; q < 4; q++) total[c][q] += scale[q / 2] * part[c][q], part[c][q] = 0;
            }
        }
    }
    wait_for_copies<0>();
    __syncthreads();                                    // no warp reads tiles any more: the sums overwrite them
    float* sum = (float*)shared_memory;
#pragma unroll
    for (int c = 0; c < EIGHTS; c++)
#pragma unroll
        for (int q = 0; q < 4; q++)
            sum[(warp * 16 + q / 2 * 8 + g) * STRIDE + 8 * c + 2 * t + q % 2] = total[c][q];
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * ROWS; i += 32 * WARPS) {         // consecutive threads write consecutive outputs
        int n = blockIdx.x * 16 + i % 16, m = i / 16;
        if (n >= N || m >= M) continue;
        float v = bias ? bf16(bias[n]) : 0;
        for (int w = 0; w < WARPS; w++) v += sum[(w * 16 + i % 16) * STRIDE + m];
        y[(long long)m * N + n] = to_bf16(v);
    }
}

// RESIDENT: blocks per multiprocessor, which limits registers
#define MMA(NAME, EIGHTS, WARPS, RESIDENT) \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) NAME(PARAMETERS) { \
        if (group % 128) tensor<EIGHTS, WARPS, 1>(ARGUMENTS); \
        else tensor<EIGHTS, WARPS, 4>(ARGUMENTS); \
    }
MMA(w4_mma_8, 1, 8, 4)
MMA(w4_mma_16, 2, 8, 3)
MMA(w4_mma_32, 4, 8, 2)
MMA(w4_mma_64, 8, 8, 1)
MMA(w4_mma_8_few, 1, 16, 2)                             // few outputs, so few blocks: more warps along K instead
MMA(w4_mma_16_few, 2, 16, 2)

// ---- int8 tensor cores: grid (multiprocessors); one or two rows of x
//
// Unpacking codes to bfloat16 costs more instructions than all else together. As int8 it takes one and a half per four codes:
// a nibble in the upper half of a byte, with its top bit flipped, is 16 (code - 8) in two's complement. x becomes int8 as well,
// in three digits. In each block of 128 inputs of a row, x is a power of two, `unit`, times an integer of 22 bits with its sign,
//
//   x / unit = d0 + 256 d1 + 65536 d2,   digits from -128 to 127, each in a column of its own of the product's right operand,
//
// exactly, unless x is below 2^-13 of the block's largest: then rounded, by at most 2^-21 of a largest above 2^-102. The
// products of a tile are summed exactly, in int32; scales, units and the sums over tiles are float32.
//
// A block has about N / 16 / blocks consecutive strips of 16 outputs, and so consecutive tiles. Each of its warps takes an
// equal run of tiles (the last ones less), which may begin or end inside a strip, and the copies ahead never pause: those of
// the first tiles are in flight while the block converts x, and after that no warp waits for another before the end. `part`
// gets a sum for each warp and strip that share tiles, at index warp + strip: from one such pair to the next along the tiles,
// the warp or the strip goes up, or both, so no two pairs share an index. At the end, the sums of each strip are added.
//
// One row on an H200: 22016 x 2048 takes 8.3 us beside the kernel before it, 10.0 alone, 10.1 with w4_mma_8; 37888 x 3584 takes
// 21.8 us, 75% of a copy's speed. Every block converts all of x, so w4_mma_8_few is faster if many blocks have only one strip,
// unless it is long (K of 8192 or more).

// The digits of four inputs, one digit in each of the first three words, and `inverse` = 1 / unit.  Adding 2^23 + 0x408080 to
// x / unit leaves it, plus 0x408080, in a float's low 23 bits: bytes 0 and 1 are d0 + 128 and d1 + 128, byte 2 is d2 + 64.
__device__ __forceinline__ Words digits_of(float a, float b, float c, float d, float inverse) {
    float x[4] = {a, b, c, d};
    u32 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = __float_as_uint(fmaf(x[i], inverse, 8388608.f + 0x408080));
    u32 even = __byte_perm(v[0], v[1], 0x5140), odd = __byte_perm(v[2], v[3], 0x5140);         // a 4 x 3 transpose of bytes
    u32 last = __byte_perm(__byte_perm(v[0], v[1], 0x0062), __byte_perm(v[2], v[3], 0x0062), 0x5410);
    return Words{{__byte_perm(even, odd, 0x5410) ^ 0x80808080u, __byte_perm(even, odd, 0x7632) ^ 0x80808080u,
                  (last | 0x80808080u) - 0x40404040u ^ 0x80808080u}};   // byte by byte: the set bit keeps it from borrowing
}

// From the bits of a block's largest |x|, in the upper halves: 1 / unit; and unit / 16, nan if an input is infinite or nan.
struct Unit {
    float inverse, sixteenth;
    __device__ __forceinline__ Unit(u32 largest) {
        u32 exponent = max(largest >> 23, 25u);         // |x| < 2^(exponent - 126); unit = 2^(exponent - 147)
        inverse = __uint_as_float((274 - exponent) << 23);
        sixteenth = __uint_as_float(exponent == 255 ? 0x7fc00000u : (exponent - 24) << 23);
    }
};
__device__ __forceinline__ u32 larger(u32 largest, u32 pair) {  // of it and of a pair's magnitudes
    return max(largest, max(pair & 0x7fff0000u, pair << 16 & 0x7fff0000u));
}

// c [16, 8] += a [16, 32] b [32, 8], int8 into int32.  Lane (g, t) holds a[g, 4t..], a[g+8, 4t..], a[g, 4t+16..],
// a[g+8, 4t+16..]; b[4t.., g], b[4t+16.., g]; c as above.  4t.. are four values, in one register.
__device__ __forceinline__ void mma(int* c, const u32* a, const u32* b) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ u32 flip(u32 a, u32 mask, u32 bits) {        // (a & mask) ^ bits in one instruction, as in `merge`
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
    return d;
}
// A left operand: 16 (code - 8) for word j of outputs g (w[0]) and g + 8 (w[1]).  mask = 0xf0f0f0f0, top = 0x80808080
__device__ __forceinline__ void operand(u32* a, const Words* w, int j, u32 mask, u32 top) {
#pragma unroll
    for (int q = 0; q < 4; q++) a[q] = flip(q < 2 ? w[q % 2].w[j] << 4 : w[q % 2].w[j], mask, top);
}

// x in shared memory: for each block of 128 inputs [half: words 2 half, 2 half + 1][row][digit][t][word % 2][8 bytes], so that
// a lane's 16 bytes are its operands of two products; each block's and row's unit / 16; if `with_sums`, the sums of its inputs.
struct X { int digits, units, sums, M; bool with_sums; };       // where these begin in shared memory, in bytes

// By all threads, 16 lanes per block and row; SETS sums per block, each of 128 / SETS inputs.
template <int SETS> __device__ __forceinline__ void convert(X to, const u16* x, int K, int blocks) {
    int l = threadIdx.x % 16, j = l / 4, t = l % 4, k = 8 * l, step = blockDim.x / 16;
    int two = to.M - 1;                                 // 1 if there are two rows; then they alternate
    auto read = [&](int at) {
        int b = at >> two, m = at & two;
        return load_if(b < blocks && b * 128 + k < K, (const Words*)(x + (m * K + b * 128 + k)));
    };
    Words next = read(threadIdx.x / 16);
#pragma unroll 1                                        // a warp's two halves stay together, for the shuffles
    for (int at = threadIdx.x / 16; at - threadIdx.x / 16 % 2 < blocks << two; at += step) {
        int b = at >> two, m = at & two;
        Words now = next;
        next = read(at + step);
        u32 most = 0;
#pragma unroll
        for (int w = 0; w < 4; w++) most = larger(most, now.w[w]);
        for (int mask = 8; mask; mask /= 2) most = max(most, __shfl_xor_sync(~0u, most, mask));
        float sum = 0;
        if (to.with_sums) {
            for (int w = 0; w < 4; w++) sum += low(now.w[w]) + high(now.w[w]);
            for (int mask = SETS == 4 ? 2 : 8; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
        }
        if (b >= blocks) continue;                      // an odd number of blocks: the last warp's other half
        Unit unit(most);                                // inputs in the order of a word's nibbles
        Words even = digits_of(low(now.w[0]), low(now.w[2]), high(now.w[0]), high(now.w[2]), unit.inverse);     // 0 4 1 5
        Words odd = digits_of(low(now.w[1]), low(now.w[3]), high(now.w[1]), high(now.w[3]), unit.inverse);      // 2 6 3 7
        int digits = to.digits + ((b * 2 + j / 2) * to.M + m) * 192 + t * 16 + j % 2 * 8;
#pragma unroll
        for (int digit = 0; digit < 3; digit++) *(Pair*)shared_at(digits + digit * 64) = Pair{{even.w[digit], odd.w[digit]}};
        if (l == 0) *(float*)shared_at(to.units + (b * to.M + m) * 4) = unit.sixteenth;
        if (to.with_sums && (SETS == 4 ? t : l) == 0)
            *(float*)shared_at(to.sums + ((b * SETS + (SETS == 4 ? j : 0)) * to.M + m) * 4) = sum;
    }
}

// The sums of a lane. A product's columns are d0, d1, d2 and an unused one of two rows.
template <int SETS> struct Int8 {
    float total[2] = {};                                // of outputs g and g + 8
    int lane, g;
    int digits;                                         // where this lane's column of digits begins
    int row;                                            // its sums' row; the first again if there is no second: nobody reads them
    int second;                                         // the factor of its other column: 256, or 0 beside d2
    u32 mask, top;

    __device__ __forceinline__ Int8(const X& x) {
        lane = in_register(threadIdx.x % 32), g = in_register(lane / 4);
        int t = lane % 4;
        second = in_register(t % 2 ? 0 : 256);          // a lane with d2 has no digit in its other column
        mask = in_register(0xf0f0f0f0u), top = in_register(0x80808080u);
        digits = in_register(x.digits + min(g / 4, x.M - 1) * 192 + min(g % 4, 2) * 64 + t * 16);
        row = in_register(min(t / 2, x.M - 1) * 4);
    }
    // Adds the tile in `slot` times block b of x.
    __device__ __forceinline__ void add(const char* slot, const X& x, int b) {
        Words w[2] = {((const Words*)slot)[lane], ((const Words*)slot)[32 + lane]}, in;
        int at = b * x.M, c[4] = {};
        float unit = *(const float*)shared_at(x.units + row + at * 4);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 a[4];
            operand(a, w, j, mask, top);
            if (j % 2 == 0) in = *(const Words*)shared_at(digits + at * 384 + j / 2 * x.M * 192);
            mma(c, a, in.w + j % 2 * 2);
            if ((j + 1) % (4 / SETS)) continue;
            const char* quant = slot + 1024 + (SETS == 4 ? j : 0) * 48;
            float scale[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                scale[h] = half_to_float(((const u16*)quant)[h * 8 + g]);
                total[h] += scale[h] * unit * (c[2 * h] + second * c[2 * h + 1]);
                c[2 * h] = c[2 * h + 1] = 0;
            }
            if (!x.with_sums) continue;
            float of_inputs = *(const float*)shared_at(x.sums + row + (at * SETS + (SETS == 4 ? j * x.M : 0)) * 4);
            if (second == 0) of_inputs = 0;             // once per row
#pragma unroll
            for (int h = 0; h < 2; h++) total[h] += scale[h] * (8 - (int)(u8)quant[32 + h * 8 + g]) * of_inputs;
        }
    }
    // Writes the sums to part [M][16], and resets them
    __device__ __forceinline__ void store(float* part, int M) {
        int t = lane % 4;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float v = total[h] + 65536 * __shfl_xor_sync(~0u, total[h], 1);     // d2's sum; right where t is even
            if (t % 2 == 0 && t / 2 < M) part[t / 2 * 16 + h * 8 + g] = v;
            total[h] = 0;
        }
    }
};

template <int SETS>
__device__ __forceinline__ void int8_product(PARAMETERS) {
    const int SLOT = 1024 + 48 * SETS, WARPS = 16, DEPTH = 5, LAST = (DEPTH - 1) * SLOT;
    Copies<SETS> copies(scales, zeros, N, K, group);
    int warp = threadIdx.x / 32, blocks = ceil_div(K, 128);
    u32 strips = copies.stride / 16, least = strips / gridDim.x, more = strips - least * gridDim.x; // `more` blocks have 1 more
    int begin = blockIdx.x * least + min(blockIdx.x, more), mine = least + (blockIdx.x < more);
    int run = ceil_div(mine * blocks, WARPS);
    int tile = min(warp * run, mine * blocks), end = min(tile + run, mine * blocks);        // counted from the block's first one
    char* ring = shared_at(in_register(warp * DEPTH * SLOT));
    X in;
    in.M = M, in.digits = WARPS * DEPTH * SLOT, in.units = in.digits + blocks * M * 384;
    float* part = (float*)shared_at(in.units + blocks * M * 4);         // [WARPS + mine - 1][M][16], and then the sums
    in.sums = in.units + blocks * M * 4 + (WARPS + mine) * M * 64, in.with_sums = zeros;

    int strip = (u32)tile / (u32)blocks, b = tile - strip * blocks;     // where `tile` is
    int next = b, column = (begin + strip) * 16;                        // the next copy's block of inputs and first output
    const Words* codes = words + ((long long)begin * blocks + tile) * 64 + copies.lane;
    auto fetch = [&](bool there, char* slot) {
        if (there) {
            copies.start(slot, codes, next, column);
            codes += 64;
            if (++next == blocks) next = 0, column += 16;
        }
        commit_group();
    };
    let_next_start();
#pragma unroll 1
    for (int d = 0; d < DEPTH - 1; d++) fetch(tile + d < end, ring + d * SLOT);
    wait_for_previous(x);                               // weights do not depend on the kernel before, but x does
    convert<SETS>(in, x, K, blocks);
    __syncthreads();
    Int8<SETS> sum(in);
    int slot = 0, before = LAST;
#pragma unroll 1
    for (int left = end - tile; left > 0;) {
        wait_for_copies<DEPTH - 2>();
        __syncwarp();                                   // other lanes' copies are there too, and the slot before has been read
        fetch(left >= DEPTH, ring + before);
        sum.add(ring + slot, in, b);
        before = slot, slot = slot == LAST ? 0 : slot + SLOT;
        left--;
        if (++b < blocks && left) continue;
        sum.store(part + (warp + strip) * M * 16, M);
        b = 0, strip++;
    }
    wait_for_copies<0>();
    __syncthreads();
#pragma unroll 1                                        // code that runs once should be short: it has to be fetched, too
    for (int i = threadIdx.x; i < mine * 16 * M; i += 32 * WARPS) {
        int m = i >= mine * 16, n = i - m * mine * 16, s = n / 16;
        if (begin * 16 + n >= N) continue;
        float v = bias ? bf16(bias[begin * 16 + n]) : 0;
        u32 w = (u32)(s * blocks) / run, to = (u32)(s * blocks + blocks - 1) / run;         // the warps that the strip met
        for (; w <= to; w++) v += part[((w + s) * M + m) * 16 + n % 16];
        y[(long long)m * N + begin * 16 + n] = to_bf16(v);
    }
}

// 2: the next kernel's block fits beside this one, unless x is long, and fills its rings meanwhile
extern "C" __global__ void __launch_bounds__(512, 2) w4_int8_2(PARAMETERS) {
    if (group % 128) int8_product<4>(ARGUMENTS);
    else int8_product<1>(ARGUMENTS);
}

// ---- dequantise: grid (N / 16, K / 1024), one tile per warp; y [N, K] is W without the padding

extern "C" __global__ void __launch_bounds__(256) w4_dequantise(PARAMETERS) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, blocks = ceil_div(K, 128);
    int b = blockIdx.y * 8 + threadIdx.x / 32;
    if (b >= blocks) return;
    for (int h = 0; h < 2; h++) {
        int n = blockIdx.x * 16 + h * 8 + g;
        Words codes = load_once(words + ((long long)blockIdx.x * blocks + b) * 64 + h * 32 + lane);
        for (int j = 0; j < 4; j++) {
            int k = b * 128 + j * 32 + 8 * t;
            if (n >= N || k >= K) continue;
            int at = k / group * round_up(N, 16) + n;
            u32 zero = zeros ? zeros[at] : 8;
            float scale = half_to_float(scales[at]);
            Words out;
            for (int i = 0; i < 4; i++) {
                u32 pair = decode_pair(codes.w[j], i, 0x43004300u | zero | zero << 16);
                out.w[i] = to_bf16(scale * low(pair)) | (u32)to_bf16(scale * high(pair)) << 16;
            }
            *(Words*)(y + (long long)n * K + k) = out;
        }
    }
}
