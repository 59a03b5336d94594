// Matrix products for Hopper (sm_90a): weights and tokens arrive by TMA, are multiplied by wgmma, and leave with bias,
// activation, gate and residual applied. float16 or bfloat16 in and out, sums in float32.
//
//   narrow   few tokens. A block owns 64 features (32 with a gate) of BN tokens; the blocks of a cluster share the inner
//            dimension and add up through distributed shared memory. Weights are fetched before the preceding kernel ends.
//   wide     many tokens. Persistent blocks of 128 tokens x BN features, one warpgroup fetching, two multiplying.
//
// Both take up to three products of the same tokens (Q, K, V), which then share one launch. Weights lie [features, inner].
// ACTIVATION, GATED, NORMED and TELLS are constants, so that every variant is a module of its own; KERNEL at the end names it.
//
// A norm between two products needs no pass of its own. The first one (TELLS) writes z = y * scale * by, and of each token and tile of
// features the sum of y and its squares around their mean. The second one has z for tokens (NORMED 1) or for its residual (NORMED 2):
//   ((y - mean) * rate * scale + bias) w = rate / by * (z w - mean * by * (scale w)) + bias w
// whose scale w and bias w are constants. `by`, a power of two, keeps z from becoming larger than y.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"; CUDA Driver API, tensor maps.
#include "overlap.cuh"
#include "sixteen.cuh"
#include "hopper.cuh"
#include "products.cuh"
#include "cluster.cuh"

struct Norm {  // of rows of `width`; centred 0: a root-mean-square norm, whose mean is taken to be 0
    const float2* rows;                // [part, token] of y: sum, squares
    const float *shift[3], *bias[3];   // NORMED 1, of each product: by * (scale w), bias w and its own bias
    const void *scale, *offset;        // NORMED 2: of the norm
    int parts, part, width, centred;   // part: features of a part
    float epsilon, by, back, share;     // back: 1 / by; share: 1 / width
};
struct Told { float2* rows; void* z; const void* scale; float by; };
struct Call { Job job[3]; int jobs, tokens, inner, tokenTiles, featureTiles, stages; Norm norm; Told told; };

__device__ __forceinline__ float activate(float v) { return activate(v, ACTIVATION); }
__device__ __forceinline__ float at(const float* array, long long i) { return array ? __ldg(array + i) : 0.f; }
__device__ __forceinline__ float at16(const void* array, long long i) { return array ? unpack(__ldg((const u16*)array + i)).x : 0.f; }

// The parts of a token's row, asked for early; then the mean of its y, and rate / by. Without divisions, whose rare cases are a function that needs more
// registers than the warps that fetch have.
template <int HELD>
struct Parts {
    float2 held[HELD];
    const float2* rows;
    __device__ __forceinline__ void ask(const Call& c, int token) {
        rows = token < c.tokens ? c.norm.rows + token : nullptr;
        #pragma unroll
        for (int p = 0; p < HELD; ++p) held[p] = rows && p < c.norm.parts ? rows[(long long)p * c.tokens] : float2{0.f, 0.f};
    }
    __device__ __forceinline__ float2 finish(const Call& c) const {
        const Norm& n = c.norm;
        float mean = 0.f, square = 0.f;
        if (!rows) return {0.f, 0.f};
        if (n.centred) {
            #pragma unroll
            for (int p = 0; p < HELD; ++p) mean += held[p].x;
            for (int p = HELD; p < n.parts; ++p) mean += rows[(long long)p * c.tokens].x;
            mean *= n.share;
        }
        auto join = [&](float2 v, int p) {
            const float count = min(n.part, n.width - p * n.part), apart = __fdividef(v.x, count) - mean;
            square += v.y + count * apart * apart;
        };
        #pragma unroll
        for (int p = 0; p < HELD; ++p) if (p < n.parts) join(held[p], p);
        for (int p = HELD; p < n.parts; ++p) join(rows[(long long)p * c.tokens], p);
        return {mean, rsqrtf(square * n.share + n.epsilon) * n.back};
    }
};
// 8 neighbouring elements of a norm, rounded, from z.
__device__ __forceinline__ uint4 normed(uint4 z, const float (&scale)[8], const float (&offset)[8], float2 row) {
    u32 v[4] = {z.x, z.y, z.z, z.w};
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 f = unpack(v[i]);
        v[i] = pack(row.y * (f.x - row.x * scale[2 * i]) + offset[2 * i], row.y * (f.y - row.x * scale[2 * i + 1]) + offset[2 * i + 1]);
    }
    return {v[0], v[1], v[2], v[3]};
}
__device__ __forceinline__ void widen(float (&v)[8], uint4 u) {
    #pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = 0.f;
    add(v, u);
}
__device__ __forceinline__ void scale(float (&v)[8], float by) {
    #pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= by;
}

// The product a tile of features belongs to; `tile` becomes its place there.
__device__ __forceinline__ int jobOf(const Call& c, int& tile, int width) {
    int j = 0;
    while (j + 1 < c.jobs && tile >= up((int)c.job[j].features, width)) tile -= up((int)c.job[j++].features, width);
    return j;
}
WGMMA

// --- few tokens ---------------------------------------------------------------------------------------------------------
// 8 neighbouring sums of a token, over the blocks of the cluster.
template <int RANKS>
__device__ __forceinline__ void collect(float (&v)[8], const float* part) {
    float4 p[RANKS][2];
    #pragma unroll
    for (int r = 0; r < RANKS; ++r)
        #pragma unroll
        for (int h = 0; h < 2; ++h) p[r][h] = RANKS == 1 ? *(const float4*)(part + 4 * h) : remote((const float4*)(part + 4 * h), r);
    #pragma unroll
    for (int r = 0; r < RANKS; ++r)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float4 q = p[r][h];
            v[4 * h] = (r ? v[4 * h] : 0.f) + q.x, v[4 * h + 1] = (r ? v[4 * h + 1] : 0.f) + q.y;
            v[4 * h + 2] = (r ? v[4 * h + 2] : 0.f) + q.z, v[4 * h + 3] = (r ? v[4 * h + 3] : 0.f) + q.w;
        }
}

template <int BN, int RANKS>
__device__ __forceinline__ void narrow(const TensorMap& x, const TensorMap& w0, const TensorMap& w1, const TensorMap& w2, const Call& c) {
    constexpr int STAGE = 8192 + BN * 128, PITCH = 68, WIDTH = GATED ? 32 : 64;
    extern __shared__ u8 raw[];
    const int stages = c.stages;
    u8* base = (u8*)(((u64)raw + 1023) & ~1023ull);
    float* part = (float*)(base + stages * STAGE);
    float2* rows = (float2*)(part + BN * PITCH);  // of the norm, of this block's tokens
    u64* full = (u64*)(rows + BN);
    u64* empty = full + stages;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const u32 rank = RANKS > 1 ? clusterRank() : 0;
    int tile = blockIdx.y;
    const int j = jobOf(c, tile, WIDTH);
    const int feature = tile * WIDTH, token = blockIdx.z * BN;
    const int steps = up(c.inner, 64), per = up(steps, RANKS), first = min((int)rank * per, steps), count = min(per, steps - first);
    if (threadIdx.x == 0) {
        prepare(&x), prepare(&w0);
        for (int s = 0; s < stages; ++s) init(full + s, 1), init(empty + s, 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    letNextKernelStart();
    // What this thread will write: 8 features of a token in each round. Bias and residual of the first rounds are read early.
    const Job& job = c.job[j];
    constexpr int ROWS = BN / RANKS, CHUNKS = WIDTH / 8, ROUNDS = (ROWS * CHUNKS + 159) / 160, EARLY = ROUNDS < 2 ? ROUNDS : 2;
    auto locate = [&](int round, int& t, int& f) {
        const int e = round * 160 + threadIdx.x;
        t = rank * ROWS + e / CHUNKS, f = e % CHUNKS * 8;
        return e < ROWS * CHUNKS && token + t < c.tokens && feature + f < job.features;
    };
    auto place = [&](int t, int f) { return (long long)(token + t) * job.features + feature + f; };
    uint4 residuals[EARLY];
    struct Terms {  // what is added to the sums of 8 features, and what the mean is multiplied by
        uint4 added;
        float bias[8], shift[8];  // NORMED 1
        __device__ __forceinline__ void read(const Call& c, int j, int f, bool there) {
            added = there && NORMED != 1 ? ::read(c.job[j].bias, f) : uint4{0, 0, 0, 0};
            #pragma unroll
            for (int i = 0; NORMED == 1 && i < 8; ++i) bias[i] = there ? at(c.norm.bias[j], f + i) : 0.f, shift[i] = there ? at(c.norm.shift[j], f + i) : 0.f;
        }
        __device__ __forceinline__ void finish(float (&v)[8], float2 row) const {
            add(v, added);
            #pragma unroll
            for (int i = 0; NORMED == 1 && i < 8; ++i) v[i] = row.y * (v[i] - row.x * shift[i]) + bias[i];
        }
    };
    struct Gains { uint4 scale, offset, told; };  // of the norm of the residual; of the norm that follows
    Terms terms[EARLY], others[EARLY];
    Gains gains[EARLY];
    auto readGains = [&](int f, bool there) -> Gains {
        const uint4 none = {0, 0, 0, 0};
        return {there && NORMED == 2 ? read(c.norm.scale, feature + f) : none, there && NORMED == 2 ? read(c.norm.offset, feature + f) : none, there && TELLS ? read(c.told.scale, feature + f) : none};
    };
    #pragma unroll
    for (int round = 0; round < EARLY; ++round) {
        int t, f;
        const bool there = locate(round, t, f);
        terms[round].read(c, j, feature + f, there);
        if (GATED) others[round].read(c, 1, feature + f, there);
        gains[round] = readGains(f, there);
    }
    auto readResiduals = [&]() {
        waitForPrecedingKernel();
        #pragma unroll
        for (int round = 0; round < EARLY; ++round) {
            int t, f;
            residuals[round] = locate(round, t, f) ? read(job.residual, place(t, f)) : uint4{0, 0, 0, 0};
        }
    };
    if (warp == 4) {
        if (lane == 0) {
            const TensorMap* w = j == 0 ? &w0 : j == 1 ? &w1 : &w2;
            const TensorMap* half = GATED ? &w1 : w;
            const int second = GATED ? feature : feature + 32;
            auto weights = [&](int i) {
                u8* to = base + (i % stages) * STAGE;
                expect(full + i % stages, STAGE);
                fetch(to, w, full + i % stages, (first + i) * 64, feature);
                fetch(to + 4096, half, full + i % stages, (first + i) * 64, second);
            };
            auto tokens = [&](int i) { fetch(base + (i % stages) * STAGE + 8192, &x, full + i % stages, (first + i) * 64, token); };
            const int ahead = min(count, stages);
            for (int i = 0; i < ahead; ++i) weights(i);
            waitForPrecedingKernel();
            for (int i = 0; i < ahead; ++i) tokens(i);
            for (int i = ahead; i < count; ++i) {
                wait(empty + i % stages, (i / stages - 1) & 1);
                weights(i);
                tokens(i);
            }
        }
        __syncwarp();
        readResiduals();
    } else {
        readResiduals();
        Parts<NORMED ? 12 : 1> parts;  // which are here when all products are done
        const bool counts = NORMED && threadIdx.x < ROWS;
        if (counts) parts.ask(c, token + rank * ROWS + threadIdx.x);
        float d[BN / 2];
        #pragma unroll
        for (int i = 0; i < BN / 2; ++i) d[i] = 0.f;
        for (int i = 0; i < count; ++i) {
            const int s = i % stages;
            wait(full + s, (i / stages) & 1);
            const u64 a = descriptor(base + s * STAGE), b = descriptor(base + s * STAGE + 8192);
            wgmmaFence();
            #pragma unroll
            for (int k = 0; k < 4; ++k) Wgmma<BN>::add(d, a + 2 * k, b + 2 * k);
            wgmmaCommit();
            if (i) {
                wgmmaWait<1>();
                if (lane == 0) arrive(empty + (i - 1) % stages);
            }
        }
        wgmmaWait<0>();
        keep<BN, PITCH>(part, d, warp, lane);
        if (counts) rows[threadIdx.x] = parts.finish(c);
    }
    if (RANKS > 1) clusterSync();
    else __syncthreads();
    #pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        int t, f;
        const bool there = locate(round, t, f);
        const long long place_ = place(t, f);
        float v[8] = {}, u[8];
        if (there) {
            if (round >= EARLY) {
                residuals[round % EARLY] = read(job.residual, place_), terms[round % EARLY].read(c, j, feature + f, true), gains[round % EARLY] = readGains(f, true);
                if (GATED) others[round % EARLY].read(c, 1, feature + f, true);
            }
            const Gains& gain = gains[round % EARLY];
            const float2 row = NORMED ? rows[t - rank * ROWS] : float2{0.f, 0.f};
            uint4 residual = residuals[round % EARLY];
            if (NORMED == 2) {
                float by[8], offset[8];
                widen(by, gain.scale), widen(offset, gain.offset), scale(by, c.norm.by);
                residual = normed(residual, by, offset, row);
            }
            collect<RANKS>(v, part + t * PITCH + f);
            terms[round % EARLY].finish(v, row);
            #pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = activate(v[i]);
            if (GATED) {
                collect<RANKS>(u, part + t * PITCH + 32 + f);
                others[round % EARLY].finish(u, row);
                #pragma unroll
                for (int i = 0; i < 8; ++i) v[i] *= u[i];
            }
            add(v, residual);
            const uint4 y = {pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])};
            if (!TELLS || job.y) *(uint4*)((u16*)job.y + place_) = y;
            if (TELLS) {
                widen(v, y), widen(u, gain.told), scale(u, c.told.by);
                *(uint4*)((u16*)c.told.z + place_) = {pack(v[0] * u[0], v[1] * u[1]), pack(v[2] * u[2], v[3] * u[3]), pack(v[4] * u[4], v[5] * u[5]), pack(v[6] * u[6], v[7] * u[7])};
            }
        }
        if (TELLS) {  // the 8 neighbouring lanes of a token
            auto total = [&](float sum) {
                #pragma unroll
                for (int o = 1; o < 8; o *= 2) sum += __shfl_xor_sync(~0u, sum, o);
                return sum;
            };
            float sum = 0.f, square = 0.f;
            #pragma unroll
            for (int i = 0; i < 8; ++i) sum += there ? v[i] : 0.f;
            sum = total(sum);
            const float mean = __fdividef(sum, min(64, (int)job.features - feature));
            #pragma unroll
            for (int i = 0; i < 8; ++i) square += there ? (v[i] - mean) * (v[i] - mean) : 0.f;
            square = total(square);
            if (there && f == 0) c.told.rows[(long long)tile * c.tokens + token + t] = {sum, square};
        }
    }
    if (RANKS > 1) clusterSync();  // nobody leaves while its sums are read
}

// --- many tokens --------------------------------------------------------------------------------------------------------
template <int BN, int STAGES>
__device__ __forceinline__ void wide(const TensorMap& x, const TensorMap& w0, const TensorMap& w1, const TensorMap& w2, const Call& c) {
    constexpr int STAGE = 16384 + BN * 128, GROUP = 16, WIDTH = GATED ? BN / 2 : BN;
    extern __shared__ u8 raw[];
    u8* base = (u8*)(((u64)raw + 1023) & ~1023ull);
    float* biases = (float*)(base + STAGES * STAGE);  // of this tile and the next
    float* shifts = biases + 2 * BN;   // NORMED 1: of the sums; 2: of the residual
    float* offsets = shifts + 2 * BN;  // NORMED 2
    float* scales = offsets + 2 * BN;  // TELLS
    float2* rows = (float2*)(scales + 2 * BN);
    u64* full = (u64*)(rows + 2 * 128);
    u64* empty = full + STAGES;
    u64 *given = empty + STAGES, *taken = given + 2;  // rows, from the warps that have nothing to fetch to those that multiply
    const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    const int steps = up(c.inner, 64), tiles = c.tokenTiles * c.featureTiles;
    if (threadIdx.x == 0) {
        prepare(&x), prepare(&w0);
        for (int s = 0; s < STAGES; ++s) init(full + s, 1), init(empty + s, 8);
        for (int s = 0; NORMED && s < 2; ++s) init(given + s, 3), init(taken + s, 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    letNextKernelStart();
    // Tiles in groups of GROUP rows of tokens, so that what is read at a time stays in the L2 cache.
    auto locate = [&](int index, int& token, int& tile) {
        const int whole = GROUP * c.featureTiles, g = index / whole, rest = index % whole, height = min(GROUP, c.tokenTiles - g * GROUP);
        token = (g * GROUP + rest % height) * 128;
        tile = rest / height;
        return jobOf(c, tile, WIDTH);
    };
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) {
            int i = 0;
            const int ahead = min(steps, STAGES);
            for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
                int token, tile;
                const int j = locate(index, token, tile);
                const TensorMap* w = j == 0 ? &w0 : j == 1 ? &w1 : &w2;
                const TensorMap* half = GATED ? &w1 : w;
                const int feature = tile * WIDTH, second = GATED ? feature : feature + BN / 2;
                auto weights = [&](int k, int s) {
                    u8* to = base + s * STAGE + 16384;
                    expect(full + s, STAGE);
                    fetch(to, w, full + s, k * 64, feature);
                    fetch(to + BN * 64, half, full + s, k * 64, second);
                };
                int k = 0;
                if (i == 0) {
                    for (; k < ahead; ++k) weights(k, k);
                    waitForPrecedingKernel();
                    for (; i < ahead; ++i) fetch(base + i * STAGE, &x, full + i, i * 64, token);
                }
                for (; k < steps; ++k, ++i) {
                    const int s = i % STAGES;
                    if (i >= STAGES) wait(empty + s, (i / STAGES - 1) & 1);
                    weights(k, s);
                    fetch(base + s * STAGE, &x, full + s, k * 64, token);
                }
            }
        }
        waitForPrecedingKernel();
        if (NORMED && warp) {
            int count = 0;
            for (int index = blockIdx.x; index < tiles; index += gridDim.x, ++count) {
                int token, tile;
                locate(index, token, tile);
                const int side = count & 1;
                if (count > 1) wait(taken + side, (count >> 1) - 1 & 1);
                Parts<4> first, second;  // 128 rows by 96 threads
                const int t = threadIdx.x - 32;
                first.ask(c, token + t);
                if (t < 32) second.ask(c, token + 96 + t);
                rows[side * 128 + t] = first.finish(c);
                if (t < 32) rows[side * 128 + 96 + t] = second.finish(c);
                __syncwarp();
                if (lane == 0) arrive(given + side);
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        waitForPrecedingKernel();
        auto release = [&](int s) {
            if (lane == 0) arrive(empty + s);
        };
        int i = 0, count = 0;
        for (int index = blockIdx.x; index < tiles; index += gridDim.x, ++count) {
            const int turn = count & 1;
            int token, tile;
            const int j = locate(index, token, tile);
            const Job& job = c.job[j];
            const int feature = tile * WIDTH, row = token + (group - 1) * 64 + warp * 16 + (lane >> 2), q = lane & 3;
            float *bias = biases + turn * BN, *shift = shifts + turn * BN, *offset = offsets + turn * BN, *factor = scales + turn * BN;
            {
                const int t = threadIdx.x - 128, f = feature + (GATED && t >= WIDTH ? t - WIDTH : t), of = GATED && t >= WIDTH ? 1 : j;
                const bool there = f < job.features;
                if (t < BN) {
                    bias[t] = !there ? 0.f : NORMED == 1 ? at(c.norm.bias[of], f) : at16(c.job[of].bias, f);
                    if (NORMED == 1) shift[t] = there ? at(c.norm.shift[of], f) : 0.f;
                    if (NORMED == 2) shift[t] = there ? at16(c.norm.scale, f) * c.norm.by : 0.f, offset[t] = there ? at16(c.norm.offset, f) : 0.f;
                    if (TELLS) factor[t] = there ? at16(c.told.scale, f) * c.told.by : 0.f;
                }
            }
            if (job.residual) {
                #pragma unroll
                for (int n = 0; n < WIDTH / 32; ++n)
                    #pragma unroll
                    for (int h = 0; h < 2; ++h)
                        if (row + 8 * h < c.tokens && feature + n * 32 < job.features)
                            asm volatile("prefetch.global.L2 [%0];" ::"l"((const u16*)job.residual + (long long)(row + 8 * h) * job.features + feature + n * 32));
            }
            float d[BN / 2];
            #pragma unroll
            for (int n = 0; n < BN / 2; ++n) d[n] = 0.f;
            for (int k = 0; k < steps; ++k, ++i) {
                const int s = i % STAGES;
                wait(full + s, (i / STAGES) & 1);
                const u64 a = descriptor(base + s * STAGE + (group - 1) * 8192), b = descriptor(base + s * STAGE + 16384);
                wgmmaFence();
                #pragma unroll
                for (int n = 0; n < 4; ++n) Wgmma<BN>::add(d, a + 2 * n, b + 2 * n);
                wgmmaCommit();
                if (k) {
                    wgmmaWait<1>();
                    release((i - 1) % STAGES);
                }
            }
            wgmmaWait<0>();
            release((i - 1) % STAGES);
            asm volatile("bar.sync 1, 256;" ::: "memory");  // the bias is there
            if (NORMED) wait(given + turn, count >> 1 & 1);
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const bool there = row + 8 * h < c.tokens;
                const float2 norm = NORMED ? rows[turn * 128 + row - token + 8 * h] : float2{0.f, 0.f};
                float sum = 0.f;
                const long long line = (long long)(row + 8 * h) * job.features + feature + q * 8;
                uint4 added[WIDTH / 32];
                #pragma unroll
                for (int n = 0; n < WIDTH / 32; ++n) added[n] = job.residual && there && feature + n * 32 + q * 8 < job.features ? *(const uint4*)((const u16*)job.residual + line + n * 32) : uint4{0, 0, 0, 0};
                #pragma unroll
                for (int n = 0; n < WIDTH / 32; ++n) {  // 32 features at a time
                    if (NORMED == 2) {
                        float by[8], term[8];
                        #pragma unroll
                        for (int i = 0; i < 8; ++i) by[i] = shift[n * 32 + q * 8 + i], term[i] = offset[n * 32 + q * 8 + i];
                        added[n] = normed(added[n], by, term, norm);
                    }
                    u32 out[4], z[4], more[4] = {added[n].x, added[n].y, added[n].z, added[n].w};
                    if (job.residual) transpose(more);
                    #pragma unroll
                    for (int m = 0; m < 4; ++m) {
                        const int at = (n * 4 + m) * 4 + 2 * h, f = (n * 4 + m) * 8 + 2 * q;
                        auto finished = [&](int at, int f) -> float2 {
                            const float2 b = *(const float2*)(bias + f);
                            if (NORMED != 1) return {d[at] + b.x, d[at + 1] + b.y};
                            const float2 s = *(const float2*)(shift + f);
                            return {norm.y * (d[at] - norm.x * s.x) + b.x, norm.y * (d[at + 1] - norm.x * s.y) + b.y};
                        };
                        const float2 v = finished(at, f), r = unpack(more[m]);
                        float low = activate(v.x), high = activate(v.y);
                        if (GATED) {
                            const float2 g = finished((at + BN / 4) % (BN / 2), (WIDTH + f) % BN);
                            low *= g.x, high *= g.y;
                        }
                        out[m] = pack(low + r.x, high + r.y);
                        if (TELLS) {
                            const float2 y = unpack(out[m]), by = *(const float2*)(factor + f);
                            d[at] = y.x, d[at + 1] = y.y, sum += y.x + y.y;
                            z[m] = pack(y.x * by.x, y.y * by.y);
                        }
                    }
                    const bool inside = there && feature + n * 32 + q * 8 < job.features;
                    if (!TELLS || job.y) {
                        transpose(out);
                        if (inside) *(uint4*)((u16*)job.y + line + n * 32) = {out[0], out[1], out[2], out[3]};
                    }
                    if (TELLS) {
                        transpose(z);
                        if (inside) *(uint4*)((u16*)c.told.z + line + n * 32) = {z[0], z[1], z[2], z[3]};
                    }
                }
                if (TELLS) {
                    auto total = [](float v) { return v += __shfl_xor_sync(~0u, v, 1), v + __shfl_xor_sync(~0u, v, 2); };
                    sum = total(sum);
                    const float mean = __fdividef(sum, min(BN, (int)job.features - feature));
                    float square = 0.f;
                    #pragma unroll
                    for (int e = 0; e < BN / 8; ++e)
                        if (feature + e * 8 < job.features) square += (d[e * 4 + 2 * h] - mean) * (d[e * 4 + 2 * h] - mean) + (d[e * 4 + 2 * h + 1] - mean) * (d[e * 4 + 2 * h + 1] - mean);
                    square = total(square);
                    if (there && q == 0) c.told.rows[(long long)tile * c.tokens + row + 8 * h] = {sum, square};
                }
            }
            if (NORMED) {
                __syncwarp();
                if (lane == 0) arrive(taken + turn);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    multiply(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w0, const __grid_constant__ TensorMap w1, const __grid_constant__ TensorMap w2, const __grid_constant__ Call c) {
    KERNEL(x, w0, w1, w2, c);
}
