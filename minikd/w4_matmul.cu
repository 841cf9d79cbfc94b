// W4A16 on CUDA: y = x W^T + b with W in 4-bit codes, x and y in bfloat16, sums in float32. No header is included, so that
// NVRTC compiles this file on a machine that has only torch's own CUDA libraries. From naive to fast:
//
//   w4_naive        one thread per output, one code at a time: the reference for the others
//   w4_matvec_*     1 to 4 rows of x: every lane loads 16 bytes of codes at once and multiplies without tensor cores; a step
//                   between naive and fast, not launched as long as w4_cuda.MATVEC_ROWS is 0
//   w4_mma_*        up to 64 rows: the same 16 bytes become operands of tensor-core products without a shuffle; asynchronous
//                   copies bring the tiles into shared memory, several tiles ahead
//   w4_dequantise   more rows: writes W in bfloat16, and cuBLAS multiplies
//
// The layout, made at load by w4_cuda.repack. W [N, K] is cut into tiles of 16 outputs x 128 inputs, padded with codes of 8
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

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

struct alignas(16) Words { u32 w[4]; };                 // 32 codes, or 8 bfloat16 values

__device__ __forceinline__ Words load_once(const Words* p) {    // does not fill the L1: every weight is read only once
    Words v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
    return v;
}
__device__ __forceinline__ Words load(const Words* p) {         // through the L1: the multiprocessor's other blocks read x too
    Words v;
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
    return v;
}
// Zeros if not `there`; a predicated load costs less than a branch.
__device__ __forceinline__ Words load_if(bool there, const Words* p) {
    Words v;
    asm("{.reg .pred there; setp.ne.u32 there, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
        "@there ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];}"
        : "=&r"(v.w[0]), "=&r"(v.w[1]), "=&r"(v.w[2]), "=&r"(v.w[3]) : "l"(p), "r"((u32)there));
    return v;
}
// Starts a copy from global to shared memory, which needs no registers; it writes zeros if not `there`.
template <int BYTES> __device__ __forceinline__ void copy_async(bool there, void* to, const void* from) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    int bytes = there ? BYTES : 0;
    if (BYTES == 16)                                    // cg bypasses the L1, and exists for 16 bytes only
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(at), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" :: "r"(at), "l"(from), "n"(BYTES), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the latest COUNT of this thread's groups of copies are in flight.
template <int COUNT> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(COUNT) : "memory");
}
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
__device__ __forceinline__ u32 in_register(u32 value) {
    asm volatile("" : "+r"(value));                     // hides from the compiler that it is a constant
    return value;
}
__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ u16 to_bf16(float f) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
// c [16, 8] += a [16, 16] b [16, 8].  Lane (g, t) holds a[g, 2t..], a[g+8, 2t..], a[g, 2t+8..], a[g+8, 2t+8..];
// b[2t.., g], b[2t+8.., g];  c[g, 2t], c[g, 2t+1], c[g+8, 2t], c[g+8, 2t+1].  2t.. are 2t and 2t + 1, in one register.
__device__ __forceinline__ void mma(float* c, const u32* a, const u32* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ float bf16(u32 bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// code - zero of inputs (2i, 2i + 1), exactly.  0x4300 is 128 in bfloat16, and the last of its 7 mantissa bits is worth 1: so
// 0x4300 | code is 128 + code, and one logical instruction converts two codes.  `zero` holds 128 + zero twice.
__device__ __forceinline__ u32 decode_pair(u32 word, int i, u32 zero) {
    return minus_pair(((word >> 4 * i) & 0x000f000fu) | 0x43004300u, zero);
}

struct Quant { float scale; u32 zero; };                // of one output and group; zero as decode_pair takes it

__device__ __forceinline__ Quant quant_of(const u16* scales, const u8* zeros, int at) {
    u32 zero = zeros ? zeros[at] : 8;
    return Quant{half_to_float(scales[at]), 0x43004300u | zero | zero << 16};
}

#define PARAMETERS const Words* words, const u16* scales, const u8* zeros, const u16* x, const u16* bias, u16* y, \
                   int M, int N, int K, int group
#define ARGUMENTS words, scales, zeros, x, bias, y, M, N, K, group

__device__ __forceinline__ int round_up(int n, int to) { return (n + to - 1) / to * to; }

// ---- naive: grid (N / 128, M), one output per thread

extern "C" __global__ void w4_naive(PARAMETERS) {
    int n = blockIdx.x * blockDim.x + threadIdx.x, m = blockIdx.y, blocks = round_up(K, 128) / 128;
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
//
// A block computes 16 outputs. Its WARPS warps take the tiles along K in turn, and at the end their sums are added in a fixed
// order, so that the result does not depend on which warp is first.  EACH: how many words a lane multiplies before it loads
// scales again, 4 if a group is a multiple of 128 inputs, else 1.

const int SLOTS = 32, MEMORY = SLOTS * 1216;            // tiles that a block holds; bytes: 1,024 of codes, 192 of scales, zeros

#define KERNEL(NAME, BODY, WARPS, SIZE) \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) NAME(PARAMETERS) { \
        __shared__ Words memory[MEMORY / 16];           /* tiles, and at the end the warps' sums */ \
        if (group % 128) BODY<SIZE, WARPS, 1>(memory, ARGUMENTS); \
        else BODY<SIZE, WARPS, 4>(memory, ARGUMENTS); \
    }

// sum [WARPS][16][ROWS + 1] -> y, written coalesced; the + 1 avoids bank conflicts
template <int ROWS, int WARPS>
__device__ __forceinline__ void write_out(const float* sum, const u16* bias, u16* y, int M, int N) {
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * ROWS; i += 32 * WARPS) {
        int n = blockIdx.x * 16 + i % 16, m = i / 16;
        if (n >= N || m >= M) continue;
        float v = bias ? bf16(bias[n]) : 0;
        for (int w = 0; w < WARPS; w++) v += sum[(w * 16 + i % 16) * (ROWS + 1) + m];
        y[(long long)m * N + n] = to_bf16(v);
    }
}

// ---- matrix-vector: grid (N / 16)

template <int ROWS, int WARPS, int EACH>
__device__ __forceinline__ void matvec(Words* memory, PARAMETERS) {
    float* sum = (float*)memory;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int blocks = round_up(K, 128) / 128, stride = round_up(N, 16);
    const Words* tile = words + (long long)blockIdx.x * blocks * 64 + lane;
    float total[2][ROWS] = {};                          // outputs g and g + 8 of the tile
    Words next[2];
    if (warp < blocks) next[0] = load_once(tile + warp * 64), next[1] = load_once(tile + warp * 64 + 32);
    for (int b = warp; b < blocks; b += WARPS) {
        Words now[2] = {next[0], next[1]};
        if (b + WARPS < blocks) {                       // the next tile is in flight while this one is multiplied
            next[0] = load_once(tile + (b + WARPS) * 64);
            next[1] = load_once(tile + (b + WARPS) * 64 + 32);
        }
        float part[2][ROWS] = {};                       // sums of one group, before its scale
        Quant quant[2] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int k = b * 128 + j * 32;
            if (j % EACH == 0 && k < K)
                for (int h = 0; h < 2; h++)
                    quant[h] = quant_of(scales, zeros, k / group * stride + blockIdx.x * 16 + h * 8 + g);
            Words in[ROWS];
#pragma unroll
            for (int m = 0; m < ROWS; m++) in[m] = load_if(m < M && k + 8 * t < K, (const Words*)(x + m * K + k + 8 * t));
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    u32 pair = decode_pair(now[h].w[j], i, quant[h].zero);
#pragma unroll
                    for (int m = 0; m < ROWS; m++) {
                        part[h][m] += low(pair) * low(in[m].w[i]);
                        part[h][m] += high(pair) * high(in[m].w[i]);
                    }
                }
            if ((j + 1) % EACH == 0) {                  // the scale multiplies the sum, not every weight
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int m = 0; m < ROWS; m++) total[h][m] += quant[h].scale * part[h][m], part[h][m] = 0;
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int m = 0; m < ROWS; m++) {
            float v = total[h][m];
            v += __shfl_xor_sync(~0u, v, 1);            // over the four lanes of an output
            v += __shfl_xor_sync(~0u, v, 2);
            if (t == 0) sum[(warp * 16 + h * 8 + g) * (ROWS + 1) + m] = v;
        }
    write_out<ROWS, WARPS>(sum, bias, y, M, N);
}

KERNEL(w4_matvec_1, matvec, 8, 1)
KERNEL(w4_matvec_2, matvec, 8, 2)
KERNEL(w4_matvec_4, matvec, 8, 4)

// ---- tensor cores: grid (N / 16); 8 EIGHTS rows of x, which are the columns of EIGHTS mma
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
__device__ __forceinline__ void tensor(Words* memory, PARAMETERS) {
    const int GROUPS = 4 / EACH, SLOT = 1024 + 48 * GROUPS, DEPTH = SLOTS / WARPS;      // GROUPS: sets of scales per tile
    static_assert(WARPS * 16 * (8 * EIGHTS + 1) * 4 <= MEMORY, "the sums fit where the tiles were");
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int blocks = round_up(K, 128) / 128, stride = round_up(N, 16), per = group / 32, last = K / group - 1;
    u32 inverse = 0xffffffffu / per + 1;                // 2^32 / per rounded up: __umulhi(n, inverse) is n / per; 0 for per = 1
    u32 mask = in_register(0x000f000fu), top = in_register(0x43004300u);
    const Words* tile = words + (long long)blockIdx.x * blocks * 64;
    char* ring = (char*)memory + warp * DEPTH * SLOT;
    float total[EIGHTS][4] = {};
    const u16* lane_x = x + warp * 128 + 8 * t;
    int row[EIGHTS];                                    // offsets of rows of x; past the last row it is read again, for columns
#pragma unroll                                          // of the product that are not written out
    for (int c = 0; c < EIGHTS; c++) row[c] = min(8 * c + g, M - 1) * K;
    auto fetch = [&](int d, int b) {
        char* slot = ring + d * SLOT;
        if (b < blocks) {
            for (int h = 0; h < 2; h++) copy_async<16>(true, slot + h * 512 + lane * 16, tile + b * 64 + h * 32 + lane);
            int j = lane / 3, part = lane % 3;          // three lanes per group: 2 x 8 outputs' scales, 16 outputs' zeros
            int at = inverse ? __umulhi(4 * b + j * EACH, inverse) : 4 * b + j * EACH;          // which group
            if (EACH == 1) at = min(at, last);          // the last tile may reach past the last group
            at = at * stride + blockIdx.x * 16;
            if (j < GROUPS && (part < 2 || zeros))
                copy_async<16>(true, slot + 1024 + lane * 16, part < 2 ? (const void*)(scales + at + part * 8) : zeros + at);
        }
        commit_group();                                 // also an empty one: wait_for_copies counts groups
    };
    for (int d = 0; d < DEPTH - 1; d++) fetch(d, warp + d * WARPS);
    int d = 0;                                          // the slot that is read
#pragma unroll 1
    for (int b = warp; b < blocks; b += WARPS) {
        wait_for_copies<DEPTH - 2>();
        __syncwarp();                                   // other lanes' copies are there too, and the slot before has been read
        fetch(d ? d - 1 : DEPTH - 1, b + (DEPTH - 1) * WARPS);
        const char* slot = ring + d * SLOT;
        d = d + 1 == DEPTH ? 0 : d + 1;
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
            for (int c = 0; c < EIGHTS; c++) {          // EACH == 4: K is a multiple of 128, so no load is past it
                const Words* from = (const Words*)(lane_x + row[c]) + j * 4;
                in[c] = EACH == 4 ? load(from) : load_if(b * 128 + j * 32 + 8 * t < K, from);
            }
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                u32 a[4];
                operand(a, w, j, i, zero, mask, top);
#pragma unroll
                for (int c = 0; c < EIGHTS; c++) mma(part[c], a, in[c].w + i);
            }
            if ((j + 1) % EACH == 0) {                  // operands were exact in bfloat16; the scale multiplies in float32
#pragma unroll
                for (int c = 0; c < EIGHTS; c++)
#pragma unroll
                    for (int q = 0; q < 4; q++) total[c][q] += scale[q / 2] * part[c][q], part[c][q] = 0;
            }
        }
        lane_x += WARPS * 128;
    }
    wait_for_copies<0>();
    __syncthreads();                                    // no warp reads tiles any more: the sums overwrite them
    float* sum = (float*)memory;
#pragma unroll
    for (int c = 0; c < EIGHTS; c++)
#pragma unroll
        for (int q = 0; q < 4; q++)
            sum[(warp * 16 + q / 2 * 8 + g) * (8 * EIGHTS + 1) + 8 * c + 2 * t + q % 2] = total[c][q];
    write_out<8 * EIGHTS, WARPS>(sum, bias, y, M, N);
}

KERNEL(w4_mma_8, tensor, 8, 1)
KERNEL(w4_mma_16, tensor, 8, 2)
KERNEL(w4_mma_32, tensor, 8, 4)
KERNEL(w4_mma_64, tensor, 8, 8)
KERNEL(w4_mma_8_few, tensor, 16, 1)                     // few outputs, so few blocks: more warps along K instead
KERNEL(w4_mma_16_few, tensor, 16, 2)

// ---- dequantise: grid (N / 16, K / 1024), one tile per warp; y [N, K] is W without the padding

extern "C" __global__ void __launch_bounds__(256) w4_dequantise(PARAMETERS) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, blocks = round_up(K, 128) / 128;
    int b = blockIdx.y * 8 + threadIdx.x / 32;
    if (b >= blocks) return;
    for (int h = 0; h < 2; h++) {
        int n = blockIdx.x * 16 + h * 8 + g;
        Words codes = load_once(words + ((long long)blockIdx.x * blocks + b) * 64 + h * 32 + lane);
        for (int j = 0; j < 4; j++) {
            int k = b * 128 + j * 32 + 8 * t;
            if (n >= N || k >= K) continue;
            Quant quant = quant_of(scales, zeros, k / group * round_up(N, 16) + n);
            Words out;
            for (int i = 0; i < 4; i++) {
                u32 pair = decode_pair(codes.w[j], i, quant.zero);
                out.w[i] = to_bf16(quant.scale * low(pair)) | (u32)to_bf16(quant.scale * high(pair)) << 16;
            }
            *(Words*)(y + (long long)n * K + k) = out;
        }
    }
}
