// A block of CUDA threads on one CPU thread, slowly: enough to run minikd/*.cu and check their every number without a GPU.
// Each CUDA thread is a fiber; at a barrier another one goes on, until all have come. Blocks run one after another or, where
// they wait for each other, each on a CPU thread of its own. What the hardware does for a warp (shuffles, tensor-core products)
// is done from a table that every lane writes its part of, as the PTX manual draws the fragments. It checks indexing, bounds,
// arithmetic, and barriers that are missing where two warps far apart would meet; it cannot see every race, nor speed.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <sched.h>
#include <thread>
#include <ucontext.h>
#include <utility>
#include <vector>

#define W4_ON_CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define A_BLOCK static thread_local                     // has its own
#define __shared__ A_BLOCK

struct Dim { int x, y; };
static Dim gridDim, blockDim;
A_BLOCK Dim blockIdx, threadIdx;                           // threadIdx is set anew whenever a fiber goes on
using std::size_t;
static int min(int a, int b) { return a < b ? a : b; }

struct Barrier;
struct Copy {
    char* to; const char* from; int bytes, zeros;
    void make() const { std::memcpy(to, from, bytes), std::memset(to, 0, zeros); }
};
struct Fiber {
    ucontext_t context; std::vector<char> stack;
    Barrier* at; int round;                             // where it waits, if it does
    std::deque<std::vector<Copy>> groups;               // its asynchronous copies
    bool done;
};
A_BLOCK std::vector<Fiber> fibers;
A_BLOCK ucontext_t outside;
A_BLOCK int turn;
static std::atomic<int> faults;                         // loads that are odd or outside; a GPU would stop, or read what is there
static void pass_on();

struct Barrier {
    int arrived = 0, round = 0;
    void wait(int count) {
        if (++arrived == count) { arrived = 0, round++; return; }
        fibers[turn].at = this, fibers[turn].round = round;
        pass_on();
    }
};
// To a fiber that need not wait. In two blocks of three one of the same warp, if there is one: each warp runs as far ahead of
// the others as barriers let it, in one block the first ones first, in the next the last. In the third all take turns. So one
// that lacks a barrier, or room of its own, finds what it reads not yet written, or written over.
static void pass_on() {
    int from = turn, count = fibers.size(), order = blockIdx.x % 3;
    Fiber* all = fibers.data();
    for (int i = 0; i < 32 + count; i++) {
        int to = order == 2 ? (from + i) % count : i < 32 ? from / 32 * 32 + (from + i) % 32
                 : order == 1 ? count - 1 - (i - 32) : i - 32;
        if (to == from || all[to].done || all[to].at && all[to].at->round == all[to].round) continue;
        all[to].at = nullptr;
        threadIdx.x = turn = to;
        swapcontext(&all[from].context, &all[to].context);
        return;
    }
    for (auto& fiber : fibers) faults += !fiber.done;   // they wait for each other, for ever
    setcontext(&outside);
}
A_BLOCK Barrier of_block, of_warp[32], of_team[32];
A_BLOCK float table[32][32][16];                         // [warp][lane]: what a lane shows to the others

static void __syncthreads() { of_block.wait(blockDim.x); }
static void __syncwarp() { of_warp[threadIdx.x / 32].wait(32); }
static void wait_for_team(int team, int threads) { of_team[team + 1].wait(threads); }
static float* show(const float* values, int count) {    // all lanes' values, once all are there
    int warp = threadIdx.x / 32;
    std::memcpy(table[warp][threadIdx.x % 32], values, 4 * count);
    of_warp[warp].wait(32);
    return &table[warp][0][0];
}

static float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
static float __shfl_xor_sync(unsigned, float v, int mask) {
    float other = show(&v, 1)[(threadIdx.x % 32 ^ mask) * 16];
    __syncwarp();
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
static std::vector<std::pair<size_t, size_t>> memory;   // [first, end) of what may be read
template <class W> static W load(const W* p, size_t align = sizeof(W)) {
    size_t at = (size_t)p;
    bool good = false;
    for (auto& [first, end] : memory) good |= at % align == 0 && at >= first && at + sizeof(W) <= end;
    faults += !good;
    return good ? *p : W{};
}
template <int BYTES> static void copy(bool there, void* to, const void* from) {
    struct alignas(BYTES) Part { char bytes[BYTES]; };
    if (there) load((const Part*)from);
    faults += (size_t)to % BYTES != 0;
    Copy made = {(char*)to, (const char*)from, there ? BYTES : 0, there ? 0 : BYTES};
    if (blockIdx.x % 3 == 1) made.make();               // at once, or only when it is waited for: a GPU may do either
    else fibers[turn].groups.back().push_back(made);
}
static void close_group() { fibers[turn].groups.emplace_back(); }
template <int COUNT> static void wait_for_copies() {
    auto& groups = fibers[turn].groups;                 // the last one is still open
    for (; groups.size() > COUNT + 1; groups.pop_front())
        for (auto& copy : groups.front()) copy.make();
}
static void to_l2(const void*) {}
static void give_up() { std::abort(); }
template <class W> static W load_if(bool there, const W* p) { return there ? load(p) : W{}; }
template <class W> static W load_once(const W* p) { return load(p); }
template <class W> static W load_fresh(const W* p) { return load(p); }
static void add_release(unsigned* p, unsigned value) { __atomic_fetch_add(p, value, __ATOMIC_RELEASE); }
static unsigned load_acquire(const unsigned* p) { sched_yield(); return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
#define __expf std::exp
static float rsqrtf(float x) { return 1 / std::sqrt(x); }
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
    __syncwarp();
}

#include W4_SOURCE
A_BLOCK Words shared_memory[14528];                      // 227 KB, as a Hopper multiprocessor has
#include DECODE_SOURCE

static std::function<void()> kernel;

static void body() {
    kernel();
    fibers[turn].done = true;
    pass_on();                                          // never comes back
}
static void run_block(int x, int y) {
    blockIdx = {x, y};
    fibers.resize(blockDim.x);
    for (auto& fiber : fibers) {
        fiber.stack.resize(64 << 10);
        fiber.at = nullptr, fiber.done = false;
        fiber.groups.assign(1, {});
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
        makecontext(&fiber.context, body, 0);
    }
    std::memset(shared_memory, 0xff, sizeof shared_memory);     // NaNs: nothing there is to be used before it is written
    of_block = {};
    for (auto* barriers : {of_warp, of_team})
        for (int i = 0; i < 32; i++) barriers[i] = {};
    turn = threadIdx.x = 0;
    swapcontext(&outside, &fibers[0].context);
}

extern "C" void may_read(size_t first, size_t bytes) { memory.push_back({first, first + bytes}); }

extern "C" int launch(void (*which)(ARGUMENTS), int grid_x, int grid_y, int threads, ARGUMENTS) {
    kernel = [=] { which(PASS); };
    gridDim = {grid_x, grid_y}, blockDim = {threads, 1};
    faults = 0;
    for (int y = 0; y < grid_y; y++)
        for (int x = 0; x < grid_x; x++) run_block(x, y);
    memory.clear();
    return faults;
}

extern "C" int launch_together(void (*which)(Step), int blocks, int threads, Step step) {
    kernel = [=] { which(step); };
    gridDim = {blocks, 1}, blockDim = {threads, 1};
    faults = 0;
    std::vector<std::thread> running;
    for (int x = 0; x < blocks; x++) running.emplace_back(run_block, x, 0);
    for (auto& block : running) block.join();
    memory.clear();
    return faults;
}
