// What surrounds a decoding step's matrix products, in few kernels: each replaces two to ten of torch's, which spend most of
// their time on launching and on writing intermediate results.

namespace fused {

// ---- y [B, W] = silu(gate) up, gate_up [B, 2W].  SwiGLU eq. (6).  grid (B, W / 2048 rounded up), 256 threads

extern "C" __global__ void __launch_bounds__(256) silu_up(const u16* gate_up, u16* y, int W) {
    int at = (blockIdx.y * 256 + threadIdx.x) * 8;
    if (at >= W) return;
    const u16* row = gate_up + (long long)blockIdx.x * 2 * W + at;
    Words gate = load((const Words*)row), up = load((const Words*)(row + W)), out;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float x = value(gate, i);
        v[i] = rounded(x / (1 + power_of_2(-LOG2_E * x))) * value(up, i);       // rounded where F.silu rounds
    }
#pragma unroll
    for (int i = 0; i < 4; i++) out.w[i] = to_bf16_pair(v[2 * i], v[2 * i + 1]);
    *(Words*)(y + (long long)blockIdx.x * W + at) = out;
}

// ---- sum = x + y, normed = sum / sqrt(mean(sum^2) + eps) * weight.  RMSNorm eq. (4).  grid (B), a thread for every 8 of D

extern "C" __global__ void __launch_bounds__(1024) add_norm(const u16* x, const u16* y, const u16* weight, u16* sum, u16* normed,
                                                           int D, float eps) {
    __shared__ alignas(16) float squares[32];                   // of each warp
    int lane = threadIdx.x % 32, at = threadIdx.x * 8;
    long long row = (long long)blockIdx.x * D + at;
    float v[8] = {}, square = 0;
    Words out, gain = {};
    if (at < D) {
        Words a = load((const Words*)(x + row)), b = load((const Words*)(y + row));
        gain = load((const Words*)(weight + at));
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = rounded(value(a, i) + value(b, i)), square += v[i] * v[i];
#pragma unroll
        for (int i = 0; i < 4; i++) out.w[i] = to_bf16_pair(v[2 * i], v[2 * i + 1]);
        *(Words*)(sum + row) = out;
    }
    square = warp_sum(square);
    if (lane == 0) squares[threadIdx.x / 32] = square;
    __syncthreads();
    square = 0;
    for (int w = 0; w < blockDim.x / 32; w++) square += squares[w];
    float inverse = rsqrtf(square / D + eps);
    if (at >= D) return;
#pragma unroll
    for (int i = 0; i < 4; i++)
        out.w[i] = to_bf16_pair(v[2 * i] * inverse * low(gain.w[i]), v[2 * i + 1] * inverse * high(gain.w[i]));
    *(Words*)(normed + row) = out;
}

// ---- the next token of each of B rows, as generate.sample draws it, and what generate.Decoding does with it. Its index in the
// answer is at + 1.  at, tokens [B]: the newest token's index, and that token; drawn, logps [max_new_tokens, B]

#define ANSWERS long long* at, long long* tokens, long long* drawn, double* logps
__device__ __forceinline__ long long next_place(const long long* at) { return (at[blockIdx.x] + 1) * gridDim.x + blockIdx.x; }
__device__ __forceinline__ void append(ANSWERS, int token, float logp) {        // by one thread of a row's block
    long long place = next_place(at);
    at[blockIdx.x]++, tokens[blockIdx.x] = drawn[place] = token, logps[place] = logp;
}

// -inf in the place of the values from `left` on
__device__ __forceinline__ void cut(Words& v, int left) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        v.w[i] = 2 * i >= left ? 0xff80ff80u : 2 * i + 1 >= left ? 0xff800000u | v.w[i] & 0xffffu : v.w[i];
}

// ---- greedy: the first of the largest logits; 0 is the log-probability, NaN if that logit is infinite or one is NaN.
// grid (B), 1024 threads.  logits [B, stride], of which the first V of each row count

struct Largest { float logit; int at; };                        // at: the first of its 8 tokens
__device__ __forceinline__ Largest larger_of(Largest a, Largest b) {    // NaN is larger than any
    bool second = a.logit == a.logit && (!(b.logit <= a.logit) || b.logit == a.logit && b.at < a.at);
    return second ? b : a;
}
__device__ __forceinline__ Largest largest_of(Largest mine) {   // of a warp's lanes, in lane 0
    for (int mask = 16; mask; mask /= 2)
        mine = larger_of(mine, Largest{__shfl_xor_sync(~0u, mine.logit, mask), __shfl_xor_sync(~0u, mine.at, mask)});
    return mine;
}

extern "C" __global__ void __launch_bounds__(1024) draw_largest(const u16* logits, ANSWERS, int V, int stride) {
    __shared__ alignas(16) Largest shared[32];
    const int STEP = 8 * 1024;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Largest mine = {-infinity(), 0};
    logits += (long long)blockIdx.x * stride;
#pragma unroll 1
    for (int first = threadIdx.x * 8; first < V; first += 4 * STEP) {
        Words word[4];                                          // four loads in flight per lane
#pragma unroll
        for (int c = 0; c < 4; c++) word[c] = load_if(first + c * STEP < V, (const Words*)(logits + first + c * STEP));
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int token = first + c * STEP;
            if (token + 8 > V) cut(word[c], V - token);
            u32 pair = max_pair(max_pair(word[c].w[0], word[c].w[1]), max_pair(word[c].w[2], word[c].w[3]));
            mine = larger_of(mine, Largest{low(max_pair(pair, pair >> 16)), token});
        }
    }
    mine = largest_of(mine);
    if (lane == 0) shared[warp] = mine;
    __syncthreads();
    if (warp) return;
    mine = largest_of(shared[lane]);
    if (lane) return;
    Words word = load((const Words*)(logits + mine.at));
    int token = mine.at;
#pragma unroll
    for (int i = 7; i >= 0; i--)
        if (value(word, i) == mine.logit) token = mine.at + i;
    append(at, tokens, drawn, logps, token, mine.logit - mine.logit);
}

// ---- from softmax(logits / temperature).  grid (B), 512 threads.  u [max_new_tokens, B]; scale = log2(e) / temperature
//
// Every warp sums exp(logit - its own greatest) over its part of the row. The token is the one where the running sum passes
// u x total: the search finds first the warp's part, which it reads again, then 256 tokens of it, then 8, then the one.

const int PARTS = 16, CHUNK = 256, CHUNKS = 64;                 // tokens that a warp reads at once; most chunks in a part
struct Place { int at; double rest; };                          // which of several masses, and how far into it
struct alignas(16) Draw { float most[PARTS], mass[PARTS], chunk[CHUNKS], word[32]; Place part; double total; };

const float LN_2 = 0.6931471805599453f;
__device__ __forceinline__ float log_2(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The first of n masses at which their running sum passes `rest`. Summed again, the masses of the same tokens may round
// differently: so if none passes, the last mass above 0 is taken, and the rest is kept below that mass.
__device__ __forceinline__ Place find(const float* mass, int n, double rest) {
    int at = 0;
    double before = 0, start = 0, its = 0;
    for (int i = 0; i < n; i++) {
        double next = mass[i];
        if (next > 0 && before <= rest) at = i, start = before, its = next;
        before += next;
    }
    return {at, fmin(rest - start, its * (1 - 0x1p-52))};
}

// p[i] = 2^(scale logit - most) of 8 tokens, 0 from the vocabulary's end on
__device__ __forceinline__ float exps(float* p, const u16* logits, int token, int V, float scale, float most) {
    Words word = load_if(token < V, (const Words*)(logits + token));
    float sum = 0;
    if (token + 8 > V) cut(word, V - token);
#pragma unroll
    for (int i = 0; i < 8; i++) p[i] = power_of_2(value(word, i) * scale - most), sum += p[i];
    return sum;
}

extern "C" __global__ void __launch_bounds__(32 * PARTS) draw(const u16* logits, const double* u, ANSWERS, int V, int stride,
                                                             float scale) {
    __shared__ Draw shared;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int chunks = ((V + CHUNK - 1) / CHUNK + PARTS - 1) / PARTS, begin = warp * chunks * CHUNK + lane * 8;
    logits += (long long)blockIdx.x * stride;
    float most = LEAST, mass = 0;
#pragma unroll 1
    for (int first = 0; first < chunks; first += 4) {
        Words word[4];                                          // four loads in flight per lane
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int token = begin + (first + c) * CHUNK;
            word[c] = load_if(first + c < chunks && token < V, (const Words*)(logits + token));
        }
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int left = first + c < chunks ? V - begin - (first + c) * CHUNK : 0;
            if (left < 8) cut(word[c], left);
            float top = most;
#pragma unroll
            for (int i = 0; i < 8; i++) top = fmaxf(top, value(word[c], i) * scale);
            mass *= power_of_2(most - top), most = top;
#pragma unroll
            for (int i = 0; i < 8; i++) mass += power_of_2(value(word[c], i) * scale - top);
        }
    }
    for (int mask = 16; mask; mask /= 2) {
        float other = __shfl_xor_sync(~0u, most, mask), its = __shfl_xor_sync(~0u, mass, mask), top = fmaxf(most, other);
        mass = mass * power_of_2(most - top) + its * power_of_2(other - top), most = top;
    }
    if (lane == 0) shared.most[warp] = most, shared.mass[warp] = mass;
    __syncthreads();
    most = LEAST;
    for (int w = 0; w < PARTS; w++) most = fmaxf(most, shared.most[w]);
    if (warp == 0) {
        if (lane < PARTS) shared.mass[lane] *= power_of_2(shared.most[lane] - most);
        __syncwarp();
        double total = 0;
        for (int w = 0; w < PARTS; w++) total += shared.mass[w];
        Place part = find(shared.mass, PARTS, u[next_place(at)] * total);
        if (lane == 0) shared.part = part, shared.total = total;
    }
    __syncthreads();
    Place part = shared.part;
    float p[8];
    for (int c = warp; c < chunks; c += PARTS) {
        float sum = warp_sum(exps(p, logits, (part.at * chunks + c) * CHUNK + lane * 8, V, scale, most));
        if (lane == 0) shared.chunk[c] = sum;
    }
    __syncthreads();
    if (warp) return;
    Place chunk = find(shared.chunk, chunks, part.rest);
    int token = (part.at * chunks + chunk.at) * CHUNK + lane * 8;
    shared.word[lane] = exps(p, logits, token, V, scale, most);
    __syncwarp();
    Place word = find(shared.word, 32, chunk.rest);
    if (lane != word.at) return;
    token = min(token + find(p, 8, word.rest).at, V - 1);       // NaNs, of a model that diverged, must not run past the end
    append(at, tokens, drawn, logps, token, (bf16(logits[token]) * scale - most - log_2(shared.total)) * LN_2);
}

}
