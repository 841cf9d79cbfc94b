// A block of CUDA threads on one CPU thread, slowly: enough to run minikd/w4_matmul.cu and check its every number without a
// GPU. Each CUDA thread is a fiber; a barrier passes the turn to the next fiber until all have come. What the hardware does
// for a warp (shuffles, tensor-core products) is done from a table that every lane writes its part of, as the PTX manual
// draws the fragments. It checks indexing, bounds, arithmetic and missing barriers that matter in this order of turns; it cannot
// see races between barriers that another order would show, nor speed.
#include <cmath>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define W4_ON_CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __shared__ static                               // one block runs at a time

struct Dim { int x, y; };
static Dim blockIdx, blockDim, threadIdx;               // threadIdx is set anew whenever a fiber goes on
using std::size_t;
static int min(int a, int b) { return a < b ? a : b; }

struct Fiber { ucontext_t context; std::vector<char> stack; int waits; bool done; };
static std::vector<Fiber> fibers;
static ucontext_t outside;
static int turn;

static void pass_on() {                                 // to the next fiber that is not done
    int from = turn;
    do turn = (turn + 1) % fibers.size(); while (fibers[turn].done && turn != from);
    if (turn == from) return;
    threadIdx.x = turn;
    swapcontext(&fibers[from].context, &fibers[turn].context);
}
struct Barrier {
    int arrived = 0, round = 0;
    void wait(int count) {
        int mine = round;
        if (++arrived == count) arrived = 0, round++;
        else while (round == mine) pass_on();
    }
};
static Barrier of_block, of_warp[32];
static float table[32][32][16];                         // [warp][lane]: what a lane shows to the others

static void __syncthreads() { of_block.wait(blockDim.x); }
static float* show(const float* values, int count) {    // all lanes' values, once all are there
    int warp = threadIdx.x / 32;
    std::memcpy(table[warp][threadIdx.x % 32], values, 4 * count);
    of_warp[warp].wait(32);
    return &table[warp][0][0];
}
static void seen() { of_warp[threadIdx.x / 32].wait(32); }

static float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
static float __shfl_xor_sync(unsigned, float v, int mask) {
    float other = show(&v, 1)[(threadIdx.x % 32 ^ mask) * 16];
    seen();
    return other;
}
static unsigned short to_bf16(float f) {                // to nearest, ties to even
    unsigned u = __float_as_uint(f);
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static float half_to_float(unsigned short h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) return NAN;                     // or infinite: no scale is
    float f = exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : std::ldexp((float)mantissa, -24);
    return h >> 15 ? -f : f;
}
static size_t x_first, x_end, words_first, words_end;
static int faults;                                      // loads that are odd or outside; a GPU would stop, or read what is there
template <class W> static W load(const W* p, size_t first, size_t end) {
    size_t at = (size_t)p;
    bool good = at % 16 == 0 && at >= first && at + 16 <= end;
    faults += !good;
    return good ? *p : W{};
}
template <class W> static W load_if(bool there, const W* p) { return there ? load(p, x_first, x_end) : W{}; }
template <class W> static W load_once(const W* p) { return load(p, words_first, words_end); }
static unsigned merge(unsigned a, unsigned mask, unsigned top) { return (a & mask) | top; }
static unsigned in_register(unsigned value) { return value; }
static unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
static unsigned minus_pair(unsigned a, unsigned b) {
    unsigned lower = to_bf16(__uint_as_float(a << 16) - __uint_as_float(b << 16));
    return lower | (unsigned)to_bf16(__uint_as_float(a & 0xffff0000u) - __uint_as_float(b & 0xffff0000u)) << 16;
}
static void mma(float* c, const unsigned* a, const unsigned* b) {
    float mine[12];                                     // 8 values of a, 4 of b
    for (int i = 0; i < 12; i++) {
        unsigned pair = i < 8 ? a[i / 2] : b[(i - 8) / 2];
        mine[i] = __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
    }
    const float (*lanes)[16] = (const float (*)[16])show(mine, 12);
    int lane = threadIdx.x % 32;
    for (int q = 0; q < 4; q++) {
        int row = lane / 4 + q / 2 * 8, column = lane % 4 * 2 + q % 2;
        for (int k = 0; k < 16; k++) {                  // a[row, k] lies with lane (row % 8, k % 8 / 2), b[k, column] ...
            float left = lanes[row % 8 * 4 + k % 8 / 2][k / 8 * 4 + row / 8 * 2 + k % 2];
            float right = lanes[column * 4 + k % 8 / 2][8 + k / 8 * 2 + k % 2];
            c[q] += left * right;
        }
    }
    seen();
}

#include W4_SOURCE

typedef void (*Kernel)(ARGUMENTS);
static Kernel kernel;
static struct { const Words* words; const u16* scales; const u8* zeros; const u16* x; const u16* bias; u16* y;
                int M, N, K, group; } arguments;

static void body() {
    auto& a = arguments;
    kernel(a.words, a.scales, a.zeros, a.x, a.bias, a.y, a.M, a.N, a.K, a.group);
    fibers[turn].done = true;
    for (auto& fiber : fibers)
        if (!fiber.done) pass_on();                     // never comes back
    setcontext(&outside);
}

extern "C" int launch(Kernel which, int grid_x, int grid_y, int threads, ARGUMENTS) {
    kernel = which;
    arguments = {words, scales, zeros, x, bias, y, M, N, K, group};
    blockDim.x = threads;
    faults = 0;
    x_first = (size_t)x, x_end = (size_t)(x + (size_t)M * K), words_first = (size_t)words;
    words_end = (size_t)(words + (size_t)((N + 15) / 16) * ((K + 127) / 128) * 64);
    for (blockIdx.y = 0; blockIdx.y < grid_y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < grid_x; blockIdx.x++) {
            fibers.resize(threads);
            for (auto& fiber : fibers) {
                fiber.stack.resize(64 << 10);
                fiber.done = false;
                getcontext(&fiber.context);
                fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
                makecontext(&fiber.context, body, 0);
            }
            turn = threadIdx.x = 0;
            swapcontext(&outside, &fibers[0].context);
        }
    return faults;
}
