// Attention of one decoding step, one new token per row: everything between the q/k/v product and the o product in one kernel.
//
// A block has one row and one key/value head, with all query heads that share it (GQA), so that every key and value is read
// once; with few rows several blocks split the keys. It rotates queries and the new key (RoPE), writes key and value into the
// cache, and then its warps take the row's slots in turn, CHUNK at a time, up to the new token's and not to the cache's end:
//
//   scores = queries [8, E] keys^T [E, 16]       the query heads are the rows of an mma's left operand, zeros if fewer than 8
//   p      = exp(scores - most)                  online softmax: when the greatest score grows, what was summed is scaled down
//   sum^T [E, 8] += values^T [E, 16] p^T [16, 8]
//
// A lane multiplies the same 16 bytes that it copied, without a shuffle, because an mma may sum its inputs and number its outputs
// in any order: the first product sums over e = 32 j + 8 t + 0..7 in lane (g, t), and rows g and g + 8 of the second one are
// e = 8 g + 2 w and 8 g + 2 w + 1. The second one's right operand, p^T, is in exactly those lanes that hold the scores.
// Asynchronous copies bring slots into shared memory, the next CHUNK while this one is multiplied. With loads into registers, the
// compiler would move those of the values behind the first product, so that only half as many bytes would be in flight.

namespace attention {

// CHUNK: slots that a warp reads at once; FEWEST: slots of a block, but the last: joining blocks takes some microseconds
const int HEADS = 8, CHUNK = 16, FEWEST = 512;

template <int E> struct alignas(16) Shared {
    static const int WARPS = 1024 / E, THREADS = 32 * WARPS;    // with E = 128 a warp has twice the bytes in flight
    struct Chunk { Words keys[2][E / 32][32], values[E / 64][4][32]; u16 bias[CHUNK]; };
    static const int PART = HEADS * (E + 2) + 1;                // floats of what a block has summed: see `parts` of `attend`
    struct Sums { float sum[HEADS][E + 4], most[HEADS], mass[HEADS]; };         // + 4 spreads the heads over more banks
    union { Chunk chunks[2]; Sums sums; } warp[WARPS];          // each warp's own
    u16 q[HEADS][E];
    u32 earlier;                                                // blocks of this row and head that were finished before
};
static_assert(sizeof(Shared<64>) <= 133648 && sizeof(Shared<128>) == 133648, "attend_cuda.py asks for so many bytes");

__device__ __forceinline__ float load_l2(const float* p) {      // what another block wrote: this L1 may hold older values
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
// Adds 1, or resets to 0 at `last`, so that the counter is ready for the next launch; returns the value before. The block that
// gets `last` sees all that the others wrote before.
__device__ __forceinline__ u32 count_up(u32* p, u32 last) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(last) : "memory");
    return before;
}
// Joins `count` partial sums of one output, each relative to its own greatest score.
struct Joined { float sum, most, mass; };
template <class Sum, class Most, class Mass>
__device__ __forceinline__ Joined join(int count, Sum sum, Most most, Mass mass) {
    Joined all = {0, LEAST, 0};
    for (int i = 0; i < count; i++) all.most = fmaxf(all.most, most(i));
    for (int i = 0; i < count; i++) {
        float share = power_of_2(most(i) - all.most);           // 0 for a warp that had no slot
        all.sum += share * sum(i), all.mass += share * mass(i);
    }
    return all;
}

// What a block works on: the slots begin..end-1 of one row and key/value head.
struct Work {
    int row, kv, each;                                          // each: query heads that share the key/value head
    int newest, length, begin, end;                             // the new token's slot; a block's slots, a multiple of CHUNK

    __device__ __forceinline__ Work(int H, int K, int newest)
        : row(blockIdx.x / K), kv(blockIdx.x % K), each(H / K), newest(newest) {
        length = max(FEWEST, (newest / (CHUNK * (int)gridDim.y) + 1) * CHUNK);
        begin = blockIdx.y * length, end = min(begin + length, newest + 1);
    }
    __device__ __forceinline__ bool has_newest() const { return end > newest; }
};

// Writes the rotated queries (RoPE) to shared memory, and, if this block has the new slot, the rotated key and the value to the
// cache.
// in: this row's; keys, values: this row's and head's; cos, sin: all rows'.
template <int E> __device__ __forceinline__ void read_token(Shared<E>& shared, const Work& work, const u16* in, const u16* cos,
                                                            const u16* sin, u16* keys, u16* values, int H, int K) {
#pragma unroll
    for (int i = threadIdx.x; i < (HEADS + 1) * E / 2; i += Shared<E>::THREADS) {
        int head = i / (E / 2), e = i % (E / 2);                // the last head is the key
        if (head < HEADS && head >= work.each) {
            shared.q[head][e] = shared.q[head][e + E / 2] = 0;
            continue;
        }
        const u16* x = in + (head < HEADS ? work.kv * work.each + head : H + work.kv) * E + e;
        float low = bf16(x[0]), high = bf16(x[E / 2]);
#pragma unroll
        for (int half = 0; half < 2; half++) {                  // RoPE eq. (34), rounded where model.rotate's operators round
            int at = half * (E / 2);
            float angle_cos = bf16(cos[work.row * E + e + at]), angle_sin = bf16(sin[work.row * E + e + at]);
            float turned = rounded((half ? high : low) * angle_cos) + rounded((half ? low : -high) * angle_sin);
            if (head < HEADS) shared.q[head][e + at] = to_bf16(turned);
            else if (work.has_newest()) keys[work.newest * E + e + at] = to_bf16(turned);
        }
    }
    if (work.has_newest() && threadIdx.x < E) values[work.newest * E + threadIdx.x] = in[(H + K + work.kv) * E + threadIdx.x];
}

// Starts to copy the slots first..first+15: past the end the last slot is copied again, and has p = 0.
template <int E> __device__ __forceinline__ void fetch(typename Shared<E>::Chunk& to, const u16* keys, const u16* values,
                                                       const u16* bias, int first, int end) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (first < end) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u16* at = keys + min(first + 8 * h + g, end - 1) * E + 8 * t;
#pragma unroll
            for (int j = 0; j < E / 32; j++) copy_async<16>(true, &to.keys[h][j][lane], at + 32 * j);
        }
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const u16* at = values + min(first + c / 2 * 8 + 2 * t + c % 2, end - 1) * E + 8 * g;
#pragma unroll
            for (int i = 0; i < E / 64; i++) copy_async<16>(true, &to.values[i][c][lane], at + 64 * i);
        }
        int slot = first + 8 * lane;                            // the first two lanes copy the bias of 8 slots each
        if (lane < 2 && slot < end) copy_async<16>(true, &to.bias[8 * lane], bias + slot);
    }
    commit_group();
}

// Joins the sums of a block's warps; then the last block of a row and head to get here joins the sums of all its blocks.
// parts [gridDim.y, PART], out [each E]: of this row and head.
template <int E> __device__ __forceinline__ void write(Shared<E>& shared, const Work& work, float* parts, u16* out) {
    const int WARPS = Shared<E>::WARPS, THREADS = Shared<E>::THREADS, PART = Shared<E>::PART;
    int used = work.newest / work.length + 1;                   // blocks of this row and head that have slots
    for (int i = threadIdx.x; i < work.each * E; i += THREADS) {
        int head = i / E, e = i % E;
        Joined found = join(WARPS, [&](int w) { return shared.warp[w].sums.sum[head][e]; },
                            [&](int w) { return shared.warp[w].sums.most[head]; },
                            [&](int w) { return shared.warp[w].sums.mass[head]; });
        float* part = parts + blockIdx.y * PART + head * (E + 2);
        if (used == 1) out[i] = to_bf16(found.sum / found.mass);
        else part[e] = found.sum;
        if (used > 1 && e == 0) part[E] = found.most, part[E + 1] = found.mass;
    }
    if (used == 1) return;
    __syncthreads();
    if (threadIdx.x == 0) shared.earlier = count_up((u32*)parts + PART - 1, used - 1);
    __syncthreads();
    if (shared.earlier < used - 1) return;
    for (int i = threadIdx.x; i < work.each * E; i += THREADS) {        // the others' sums are in the L2
        const float* part = parts + i / E * (E + 2);
        Joined found = join(used, [&](int s) { return load_l2(part + s * PART + i % E); },
                            [&](int s) { return load_l2(part + s * PART + E); },
                            [&](int s) { return load_l2(part + s * PART + E + 1); });
        out[i] = to_bf16(found.sum / found.mass);
    }
}

// qkv [B, (H + 2K) E]; cos, sin [B, E]; bias [B, S] 0 or -inf; slot [1]; keys, values [B, K, S, E]; y [B, H E].
// parts [B K, gridDim.y, PART] the sums of a row's and head's blocks: sums [E], most and mass of each query head; the last number
// of the first block's part is the counter, 0 before the first launch.  grid (B K, blocks that split the slots)
#define ATTEND_PARAMETERS const u16 *qkv, const u16 *cos, const u16 *sin, const u16 *bias, const long long *slot, u16 *keys, \
                          u16 *values, float *parts, u16 *y, int H, int K, int S

template <int E> __device__ __forceinline__ void attend(Shared<E>& shared, ATTEND_PARAMETERS) {
    const int WARPS = Shared<E>::WARPS, PART = Shared<E>::PART;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    Work work(H, K, (int)*slot);
    int begin = work.begin, end = work.end;
    if (begin > work.newest) return;
    long long base = (long long)blockIdx.x * S * E;
    keys += base, values += base, bias += (long long)work.row * S;

    // The first slots are prefetched, 128 bytes per thread, while the queries and the new key are computed.
    if (int at = begin * E + threadIdx.x * 64; at < end * E) prefetch(keys + at), prefetch(values + at);
    read_token(shared, work, qkv + (long long)work.row * (H + 2 * K) * E, cos, sin, keys, values, H, K);
    __syncthreads();                                            // from here on the new slot is like the others

    Words q[E / 32];
#pragma unroll
    for (int j = 0; j < E / 32; j++) q[j] = *(const Words*)&shared.q[g][32 * j + 8 * t];
    float most = LEAST, mass = 0, sum[E / 64][4][4] = {}, scale = LOG2_E * rsqrtf(E);
    auto& mine = shared.warp[warp];
    int d = 0;                                                  // which of the two chunks is multiplied
    fetch<E>(mine.chunks[d], keys, values, bias, begin + warp * CHUNK, end);
    for (int first = begin + warp * CHUNK; first < end; first += WARPS * CHUNK) {
        fetch<E>(mine.chunks[d ^ 1], keys, values, bias, first + WARPS * CHUNK, end);
        wait_for_copies<1>();
        __syncwarp();                                           // other lanes copied the bias
        float p[2][2], top = most;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float c[4] = {};
#pragma unroll
            for (int j = 0; j < E / 32; j++)
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    u32 a[4] = {q[j].w[i], 0, q[j].w[i + 1], 0};        // rows 8 to 15 are no heads
                    mma(c, a, mine.chunks[d].keys[h][j][lane].w + i);
                }
#pragma unroll
            for (int i = 0; i < 2; i++) {                       // head g, slots 2t and 2t + 1 of these 8
                int slot = 8 * h + 2 * t + i;
                p[h][i] = first + slot < end ? c[i] * scale + bf16(mine.chunks[d].bias[slot]) : -infinity();
                top = fmaxf(top, p[h][i]);
            }
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));         // over the four lanes of a head
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        float share = power_of_2(most - top);
        u32 b[2];
        most = top, mass *= share;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            p[h][0] = power_of_2(p[h][0] - top), p[h][1] = power_of_2(p[h][1] - top);
            mass += p[h][0] + p[h][1];
            b[h] = to_bf16_pair(p[h][0], p[h][1]);
        }
        float left = __shfl_sync(~0u, share, 8 * t), right = __shfl_sync(~0u, share, 8 * t + 4);     // of heads 2t, 2t + 1
#pragma unroll
        for (int i = 0; i < E / 64; i++) {
            Words v[4];
            for (int c = 0; c < 4; c++) v[c] = mine.chunks[d].values[i][c][lane];
#pragma unroll
            for (int w = 0; w < 4; w++) {
                u32 a[4];                                       // of two slots' pairs e = 64 i + 8 g + 2 w + 0, 1: 0x5410 selects
#pragma unroll                                                  // the low halves, e, 0x7632 the high ones, e + 1
                for (int r = 0; r < 4; r++)
                    a[r] = __byte_perm(v[r / 2 * 2].w[w], v[r / 2 * 2 + 1].w[w], r % 2 ? 0x7632 : 0x5410);
                sum[i][w][0] *= left, sum[i][w][1] *= right, sum[i][w][2] *= left, sum[i][w][3] *= right;
                mma(sum[i][w], a, b);
            }
        }
        __syncwarp();                                           // all lanes have read what is overwritten next
        d ^= 1;
    }
    wait_for_copies<0>();

    mass += __shfl_xor_sync(~0u, mass, 1);
    mass += __shfl_xor_sync(~0u, mass, 2);
    if (t == 0) mine.sums.most[g] = most, mine.sums.mass[g] = mass;
    struct alignas(16) Four { float v[4]; };
#pragma unroll
    for (int n = 0; n < 2; n++)                                 // head 2t + n, e = 64 i + 8 g + 2 w..
#pragma unroll
        for (int i = 0; i < E / 64; i++)
#pragma unroll
            for (int w = 0; w < 4; w += 2)
                *(Four*)&mine.sums.sum[2 * t + n][64 * i + 8 * g + 2 * w] =
                    {sum[i][w][n], sum[i][w][n + 2], sum[i][w + 1][n], sum[i][w + 1][n + 2]};
    __syncthreads();
    write(shared, work, parts + (long long)blockIdx.x * gridDim.y * PART, y + (work.row * H + work.kv * work.each) * E);
}

#define ATTEND(NAME, E) \
    extern "C" __global__ void __launch_bounds__(Shared<E>::THREADS) NAME(ATTEND_PARAMETERS) { \
        attend<E>(*(Shared<E>*)shared_memory, qkv, cos, sin, bias, slot, keys, values, parts, y, H, K, S); \
    }

ATTEND(attend_64, 64)
ATTEND(attend_128, 128)

}
