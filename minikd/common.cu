// What the kernels share: loads, asynchronous copies, bfloat16, tensor cores. All .cu files are compiled as one program, this one
// first. No header is included, so that NVRTC compiles them on a machine that has only torch's own CUDA libraries.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

struct alignas(16) Words { u32 w[4]; };                 // 8 bfloat16 values, or 32 codes of 4 bits
struct alignas(8) Pair { u32 w[2]; };
extern __shared__ Words shared_memory[];                // what a launch asks for besides what its kernel declares

__device__ __forceinline__ Words load_once(const Words* p) {    // does not fill the L1: for what is read only once
    Words v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
    return v;
}
__device__ __forceinline__ Words load(const Words* p) {         // through the L1: for what other blocks read too
    Words v;
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
    return v;
}
// Zeros if not `there`, without a branch.
__device__ __forceinline__ Words load_if(bool there, const Words* p) {
    Words v;
    asm("{.reg .pred there; setp.ne.u32 there, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
        "@there ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];}"
        : "=&r"(v.w[0]), "=&r"(v.w[1]), "=&r"(v.w[2]), "=&r"(v.w[3]) : "l"(p), "r"((u32)there));
    return v;
}
// Starts a copy from global to shared memory, which needs no registers; it writes zeros if not `there`. L2::128B brings the whole
// line into the L2, as the neighbours of 32 bytes of scales are read soon. (No difference was measured.)
template <int BYTES> __device__ __forceinline__ void copy_async(bool there, void* to, const void* from) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    int bytes = there ? BYTES : 0;
    if (BYTES == 16)                                    // cg bypasses the L1, and exists for 16 bytes only
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" :: "r"(at), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" :: "r"(at), "l"(from), "n"(BYTES), "r"(bytes) : "memory");
}
// The copies since the last call become a group, empty if there were none: so the last iterations of a loop, which start no
// copies, can wait for all but the latest COUNT groups like the iterations before them.
__device__ __forceinline__ void commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the latest COUNT of this thread's groups are in flight.
template <int COUNT> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(COUNT) : "memory");
}
// Programmatic dependent launch (cuda.launch's `overlap`): after let_next_start, the stream's next kernel may start beside this
// one, if it was launched that way too; wait_for_previous waits until all kernels before this one have ended and sees what they
// wrote. Reads through `written` come after it: the compiler may move loads above the asm, but not those whose address it gives.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
template <class T> __device__ __forceinline__ void wait_for_previous(const T*& written) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" : "+l"(written) :: "memory");
#endif
}
// Brings memory at p into the L2: one line; or, from Hopper on, a range of a multiple of 16 bytes in one instruction.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }
__device__ __forceinline__ void prefetch(const void* p, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(p), "r"(bytes));
#endif
}

__device__ __forceinline__ u32 in_register(u32 value) {
    asm volatile("" : "+r"(value));                     // keeps the compiler from computing it again
    return value;
}
__device__ __forceinline__ int round_up(int n, int to) { return (n + to - 1) / to * to; }
__device__ __forceinline__ int ceil_div(int n, int by) { return round_up(n, by) / by; }

const float LOG2_E = 1.4426950408889634f;               // e^x is 2^(x log2(e))
__device__ __forceinline__ float power_of_2(float x) {  // one instruction, 2^-22 off, relative; 0 for results below 2^-126
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u16 to_bf16(float f) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
__device__ __forceinline__ u32 to_bf16_pair(float first, float second) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(second), "f"(first));
    return d;
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
__device__ __forceinline__ float value(const Words& v, int i) { return i % 2 ? high(v.w[i / 2]) : low(v.w[i / 2]); }
__device__ __forceinline__ float rounded(float f) { return bf16(to_bf16(f)); }
__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ u32 max_pair(u32 a, u32 b) { // of two bfloat16 in one instruction; NaN if one is NaN
    u32 d;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
const float LEAST = -1e30f;                             // in the place of -inf, as -inf - -inf would be NaN
__device__ __forceinline__ float warp_sum(float v) {    // every lane gets it
    for (int mask = 16; mask; mask /= 2) v += __shfl_xor_sync(~0u, v, mask);
    return v;
}
