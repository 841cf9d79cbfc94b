// W4A16 on CUDA: y = x W^T + b with W in 4-bit codes, x and y in bfloat16, sums in float32. No header is included, so that
// NVRTC compiles this file on a machine that has only torch's own CUDA libraries. From naive to fast:
//
//   w4_naive        one thread an output, one code at a time: what the others must give
//   w4_matvec_*     1 to 4 rows: every lane takes 16 bytes of codes at once and multiplies them out by hand; the step in
//                   between, not launched unless it is measured to be faster (w4_cuda.MATVEC_ROWS)
//   w4_mma_*        up to 64 rows: the same 16 bytes are operands of tensor-core products as they come; tiles arrive in
//                   shared memory, several ahead
//   w4_dequantise   more rows: W in bfloat16, once, for cuBLAS
//
// The layout, made at load by w4_cuda.repack. W [N, K] is cut into tiles of 16 outputs x 128 inputs, padded with 8 (x and
// the scales are 0 there); a tile is 1,024 bytes in a row, read by one warp in two loads of 16 bytes a lane, without gaps:
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

__device__ __forceinline__ Words load_once(const Words* p) {    // weights are kept out of the L1: nobody reads them twice
    Words v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
    return v;
}
__device__ __forceinline__ Words load(const Words* p) {         // x stays in the L1: every warp of the block reads it
    Words v;
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
    return v;
}
// Zeros where not `there`; a predicate costs less than a branch.
__device__ __forceinline__ Words load_if(bool there, const Words* p) {
    Words v;
    asm("{.reg .pred there; setp.ne.u32 there, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
        "@there ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];}"
        : "=&r"(v.w[0]), "=&r"(v.w[1]), "=&r"(v.w[2]), "=&r"(v.w[3]) : "l"(p), "r"((u32)there));
    return v;
}
// From global to shared memory without a register, and without waiting; zeros where not `there`.
template <int BYTES> __device__ __forceinline__ void copy(bool there, void* to, const void* from) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    int bytes = there ? BYTES : 0;
    if (BYTES == 16)                                    // past the L1, which is possible for 16 bytes alone
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(at), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" :: "r"(at), "l"(from), "n"(BYTES), "r"(bytes) : "memory");
}
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most COUNT of this thread's latest groups of copies are on their way.
template <int COUNT> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(COUNT) : "memory");
}
__device__ __forceinline__ u32 minus_pair(u32 a, u32 b) {       // a - b, two bfloat16 at once; there is an fma, no sub
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xbf80bf80u), "r"(a));
    return d;
}
__device__ __forceinline__ u32 merge(u32 a, u32 mask, u32 top) {        // (a & mask) | top: one instruction, not two, if
    u32 d;                                                              // mask and top are in registers
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(top));
    return d;
}
__device__ __forceinline__ u32 in_register(u32 value) {
    asm volatile("" : "+r"(value));                     // the compiler no longer knows it for a constant
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
// b[2t.., g], b[2t+8.., g];  c[g, 2t], c[g, 2t+1], c[g+8, 2t], c[g+8, 2t+1].
__device__ __forceinline__ void mma(float* c, const u32* a, const u32* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ float bf16(u32 bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// code - zero of inputs (2i, 2i + 1), exactly.  bfloat16 has 7 bits after the leading one, so that 0x4300 | code is
// 128 + code: no conversion, one logical instruction for two codes; `zero` holds 128 + zero twice.
__device__ __forceinline__ u32 decode_pair(u32 word, int i, u32 zero) {
    return minus_pair(((word >> 4 * i) & 0x000f000fu) | 0x43004300u, zero);
}

struct Grid { float scale; u32 zero; };

__device__ __forceinline__ Grid grid_of(const u16* scales, const u8* zeros, int at) {
    u32 zero = zeros ? zeros[at] : 8;
    return Grid{half_to_float(scales[at]), 0x43004300u | zero | zero << 16};
}

#define ARGUMENTS const Words* words, const u16* scales, const u8* zeros, const u16* x, const u16* bias, u16* y, \
                  int M, int N, int K, int group
#define PASS words, scales, zeros, x, bias, y, M, N, K, group

__device__ __forceinline__ int round_up(int n, int to) { return (n + to - 1) / to * to; }

// ---- naive: grid (N / 128, M), one output a thread

extern "C" __global__ void w4_naive(ARGUMENTS) {
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
// A block has 16 outputs; its WARPS warps take turns along K and add up at the end, in a fixed order, so that the result
// does not depend on who comes first.  EACH: words of a lane between two looks at the scales, 4 where groups are multiples
// of 128 inputs, else 1.

const int SLOTS = 32, MEMORY = SLOTS * 1216;            // tiles that a block holds at once, and their bytes

#define KERNEL(NAME, BODY, WARPS, COLUMNS) \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) NAME(ARGUMENTS) { \
        __shared__ Words memory[MEMORY / 16];           /* tiles, and at the end the warps' sums */ \
        if (group % 128) BODY<COLUMNS, WARPS, 1>(memory, PASS); \
        else BODY<COLUMNS, WARPS, 4>(memory, PASS); \
    }

// sum [WARPS][16][COLUMNS + 1] -> y, neighbouring threads writing neighbouring outputs
template <int COLUMNS, int WARPS>
__device__ __forceinline__ void write_out(const float* sum, const u16* bias, u16* y, int M, int N) {
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * COLUMNS; i += 32 * WARPS) {
        int n = blockIdx.x * 16 + i % 16, m = i / 16;
        if (n >= N || m >= M) continue;
        float v = bias ? bf16(bias[n]) : 0;
        for (int w = 0; w < WARPS; w++) v += sum[(w * 16 + i % 16) * (COLUMNS + 1) + m];
        y[(long long)m * N + n] = to_bf16(v);
    }
}

// ---- matrix-vector: grid (N / 16)

template <int ROWS, int WARPS, int EACH>
__device__ __forceinline__ void matvec(Words* memory, ARGUMENTS) {
    float* sum = (float*)memory;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int blocks = round_up(K, 128) / 128, stride = round_up(N, 16);
    const Words* tile = words + (long long)blockIdx.x * blocks * 64 + lane;
    float total[2][ROWS] = {};                          // outputs g and g + 8 of the tile
    Words next[2];
    if (warp < blocks) next[0] = load_once(tile + warp * 64), next[1] = load_once(tile + warp * 64 + 32);
    for (int b = warp; b < blocks; b += WARPS) {
        Words now[2] = {next[0], next[1]};
        if (b + WARPS < blocks) {                       // the next tile is on its way while this one is multiplied
            next[0] = load_once(tile + (b + WARPS) * 64);
            next[1] = load_once(tile + (b + WARPS) * 64 + 32);
        }
        float part[2][ROWS] = {};                       // of one group
        Grid grid[2] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int k = b * 128 + j * 32;
            if (j % EACH == 0 && k < K)
                for (int h = 0; h < 2; h++)
                    grid[h] = grid_of(scales, zeros, k / group * stride + blockIdx.x * 16 + h * 8 + g);
            Words in[ROWS];
#pragma unroll
            for (int m = 0; m < ROWS; m++) in[m] = load_if(m < M && k + 8 * t < K, (const Words*)(x + m * K + k + 8 * t));
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    u32 pair = decode_pair(now[h].w[j], i, grid[h].zero);
#pragma unroll
                    for (int m = 0; m < ROWS; m++) {
                        part[h][m] += low(pair) * low(in[m].w[i]);
                        part[h][m] += high(pair) * high(in[m].w[i]);
                    }
                }
            if ((j + 1) % EACH == 0) {                  // the scale once a group, not once a weight
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int m = 0; m < ROWS; m++) total[h][m] += grid[h].scale * part[h][m], part[h][m] = 0;
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int m = 0; m < ROWS; m++) {
            float v = total[h][m];
            v += __shfl_xor_sync(~0u, v, 1);            // the four lanes of an output
            v += __shfl_xor_sync(~0u, v, 2);
            if (t == 0) sum[(warp * 16 + h * 8 + g) * (ROWS + 1) + m] = v;
        }
    write_out<ROWS, WARPS>(sum, bias, y, M, N);
}

KERNEL(w4_matvec_1, matvec, 8, 1)
KERNEL(w4_matvec_2, matvec, 8, 2)
KERNEL(w4_matvec_4, matvec, 8, 4)

// ---- tensor cores: grid (N / 16); 8 COLUMNS rows of x
//
// A product sums over 16 inputs in any order, if both operands keep it. So a lane's own 8 inputs, 32 j + 8 t + 0..7, serve
// as they lie: 0..3 for the first product of word j, 4..7 for the second. No shuffle.
//
// Tiles and their scales come by asynchronous copies, DEPTH - 1 ahead. Loads into registers would not do: the hardware
// counts them together, and a warp that waits for the first waits for the last as well.

// Pairs i and i + 1 of word j, of rows g (w[0], zero[0]) and g + 8 (w[1], zero[1]): a product's left operand.
__device__ __forceinline__ void operand(u32* a, const Words* w, int j, int i, const u32* zero, u32 mask, u32 top) {
#pragma unroll
    for (int q = 0; q < 4; q++) a[q] = minus_pair(merge(w[q % 2].w[j] >> 4 * (i + q / 2), mask, top), zero[q % 2]);
}

template <int COLUMNS, int WARPS, int EACH>
__device__ __forceinline__ void tensor(Words* memory, ARGUMENTS) {
    const int GRIDS = 4 / EACH, SLOT = 1024 + 48 * GRIDS, DEPTH = SLOTS / WARPS;
    static_assert(WARPS * 16 * (8 * COLUMNS + 1) * 4 <= MEMORY, "the sums");
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int blocks = round_up(K, 128) / 128, stride = round_up(N, 16), per = group / 32, last = K / group - 1;
    u32 inverse = 0xffffffffu / per + 1;                        // a division becomes one multiplication; 0 for per = 1
    u32 mask = in_register(0x000f000fu), top = in_register(0x43004300u);
    const Words* tile = words + (long long)blockIdx.x * blocks * 64;
    char* ring = (char*)memory + warp * DEPTH * SLOT;
    float total[COLUMNS][4] = {};
    const u16* at = x + warp * 128 + 8 * t;
    int row[COLUMNS];                                   // past the last row of x a lane reads that one again, for columns of
#pragma unroll                                          // the product that nobody looks at
    for (int c = 0; c < COLUMNS; c++) row[c] = min(8 * c + g, M - 1) * K;
    auto fetch = [&](int d, int b) {
        char* slot = ring + d * SLOT;
        if (b < blocks) {
            for (int h = 0; h < 2; h++) copy<16>(true, slot + h * 512 + lane * 16, tile + b * 64 + h * 32 + lane);
            int j = lane / 3, part = lane % 3;          // of each group: 16 rows' scales, 32 bytes, and zeros, 16 bytes
            int grid = inverse ? __umulhi(4 * b + j * EACH, inverse) : 4 * b + j * EACH;
            if (EACH == 1) grid = min(grid, last);      // the last tile may reach past the last group
            grid = grid * stride + blockIdx.x * 16;
            if (j < GRIDS && (part < 2 || zeros))
                copy<16>(true, slot + 1024 + lane * 16, part < 2 ? (const void*)(scales + grid + part * 8) : zeros + grid);
        }
        close_group();                                  // an empty one too: groups are counted
    };
    for (int d = 0; d < DEPTH - 1; d++) fetch(d, warp + d * WARPS);
    int d = 0;
#pragma unroll 1
    for (int b = warp; b < blocks; b += WARPS) {
        wait_for_copies<DEPTH - 2>();
        __syncwarp();                                   // what other lanes copied, too; and they have read the slot before
        fetch(d ? d - 1 : DEPTH - 1, b + (DEPTH - 1) * WARPS);
        const char* slot = ring + d * SLOT;
        d = d + 1 == DEPTH ? 0 : d + 1;
        Words w[2] = {((const Words*)slot)[lane], ((const Words*)slot)[32 + lane]};
        float part[COLUMNS][4] = {}, scale[2];          // of one group
        u32 zero[2];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j % EACH == 0)
                for (int h = 0; h < 2; h++) {
                    const char* grid = slot + 1024 + j / EACH * 48;
                    scale[h] = half_to_float(((const u16*)grid)[h * 8 + g]);
                    zero[h] = top | (zeros ? (u8)grid[32 + h * 8 + g] : 8) * 0x10001u;
                }
            Words in[COLUMNS];
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {         // groups of 128 and more end where a tile does
                const Words* from = (const Words*)(at + row[c]) + j * 4;
                in[c] = EACH == 4 ? load(from) : load_if(b * 128 + j * 32 + 8 * t < K, from);
            }
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                u32 a[4];
                operand(a, w, j, i, zero, mask, top);
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) mma(part[c], a, in[c].w + i);
            }
            if ((j + 1) % EACH == 0) {                  // codes are exact in bfloat16; the scale comes in in float32
#pragma unroll
                for (int c = 0; c < COLUMNS; c++)
#pragma unroll
                    for (int q = 0; q < 4; q++) total[c][q] += scale[q / 2] * part[c][q], part[c][q] = 0;
            }
        }
        at += WARPS * 128;
    }
    wait_for_copies<0>();
    __syncthreads();                                    // the sums lie where the tiles lay
    float* sum = (float*)memory;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int q = 0; q < 4; q++)
            sum[(warp * 16 + q / 2 * 8 + g) * (8 * COLUMNS + 1) + 8 * c + 2 * t + q % 2] = total[c][q];
    write_out<8 * COLUMNS, WARPS>(sum, bias, y, M, N);
}

KERNEL(w4_mma_8, tensor, 8, 1)
KERNEL(w4_mma_16, tensor, 8, 2)
KERNEL(w4_mma_32, tensor, 8, 4)
KERNEL(w4_mma_64, tensor, 8, 8)
KERNEL(w4_mma_8_few, tensor, 16, 1)                     // few outputs: more warps along K instead
KERNEL(w4_mma_16_few, tensor, 16, 2)

// ---- dequantise: grid (N / 16, K / 1024), a warp a tile; y is W [N, K], padding left out

extern "C" __global__ void __launch_bounds__(256) w4_dequantise(ARGUMENTS) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, blocks = round_up(K, 128) / 128;
    int b = blockIdx.y * 8 + threadIdx.x / 32;
    if (b >= blocks) return;
    for (int h = 0; h < 2; h++) {
        int n = blockIdx.x * 16 + h * 8 + g;
        Words codes = load_once(words + ((long long)blockIdx.x * blocks + b) * 64 + h * 32 + lane);
        for (int j = 0; j < 4; j++) {
            int k = b * 128 + j * 32 + 8 * t;
            if (n >= N || k >= K) continue;
            Grid grid = grid_of(scales, zeros, k / group * round_up(N, 16) + n);
            Words out;
            for (int i = 0; i < 4; i++) {
                u32 pair = decode_pair(codes.w[j], i, grid.zero);
                out.w[i] = to_bf16(grid.scale * low(pair)) | (u32)to_bf16(grid.scale * high(pair)) << 16;
            }
            *(Words*)(y + (long long)n * K + k) = out;
        }
    }
}
