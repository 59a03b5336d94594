// Matrix products for Hopper (sm_90a): weights and tokens arrive by TMA, are multiplied by wgmma, and leave with bias,
// activation, gate and residual applied. float16 or bfloat16 in and out, sums in float32.
//
//   narrow   few tokens. A block owns 64 features (32 with a gate) of BN tokens; the blocks of a cluster share the inner
//            dimension and add up through distributed shared memory. Weights are fetched before the preceding kernel ends.
//   wide     many tokens. Persistent blocks of 128 tokens x BN features, one warpgroup fetching, two multiplying.
//   turns    the same, but each of the two has tiles of its own: while one writes its results the other multiplies. The blocks of a cluster
//            may hold whole rows and write them normalized: they tell each other mean and spread of their parts.
//
// All take up to three products of the same tokens (Q, K, V), which then share one launch. Weights lie [features, inner].
// ACTIVATION, GATED and NORM (0 none, 1 layer, 2 root mean square) are constants, so that every variant is a module of its own; KERNEL at the end names it.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"; CUDA Driver API, tensor maps.
#include "overlap.cuh"
#include "sixteen.cuh"
#include "hopper.cuh"
#include "products.cuh"
#include "cluster.cuh"

struct Norm { void* y; const void *scale, *bias; float epsilon; };
struct Call { Job job[3]; int jobs, tokens, inner, tokenTiles, featureTiles, stages; Norm norm; };

__device__ __forceinline__ float activate(float v) { return activate(v, ACTIVATION); }

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
    u64* full = (u64*)(part + BN * PITCH);
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
    uint4 biases[EARLY], others[EARLY], residuals[EARLY];
    #pragma unroll
    for (int round = 0; round < EARLY; ++round) {
        int t, f;
        const bool there = locate(round, t, f);
        biases[round] = there ? read(job.bias, feature + f) : uint4{0, 0, 0, 0};
        others[round] = there && GATED ? read(c.job[1].bias, feature + f) : uint4{0, 0, 0, 0};
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
    }
    if (RANKS > 1) clusterSync();
    else __syncthreads();
    #pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        int t, f;
        if (!locate(round, t, f)) continue;
        const long long at = place(t, f);
        const uint4 bias = round < EARLY ? biases[round % EARLY] : read(job.bias, feature + f), residual = round < EARLY ? residuals[round % EARLY] : read(job.residual, at);
        const uint4 other = !GATED ? uint4{0, 0, 0, 0} : round < EARLY ? others[round % EARLY] : read(c.job[1].bias, feature + f);
        float v[8], u[8];
        collect<RANKS>(v, part + t * PITCH + f);
        add(v, bias);
        #pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = activate(v[i]);
        if (GATED) {
            collect<RANKS>(u, part + t * PITCH + 32 + f);
            add(u, other);
            #pragma unroll
            for (int i = 0; i < 8; ++i) v[i] *= u[i];
        }
        add(v, residual);
        *(uint4*)((u16*)job.y + at) = {pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])};
    }
    if (RANKS > 1) clusterSync();  // nobody leaves while its sums are read
}

// --- many tokens --------------------------------------------------------------------------------------------------------
// Where a tile lies and whose it is. They come in groups of 16 rows of tokens, so that what is read at a time stays in the L2 cache.
__device__ __forceinline__ int locateTile(const Call& c, int index, int& token, int& tile, int width) {
    const int whole = 16 * c.featureTiles, g = index / whole, rest = index % whole, height = min(16, c.tokenTiles - g * 16);
    token = (g * 16 + rest % height) * 128;
    tile = rest / height;
    return jobOf(c, tile, width);
}

// One thread fetches what the tiles first, first + stride, ... need, in their order; the first weights before the preceding kernel ends.
template <int BN, int STAGES, typename Locate>
__device__ __forceinline__ void bring(const TensorMap& x, const TensorMap& w0, const TensorMap& w1, const TensorMap& w2, u8* base, u64* full, u64* empty, int steps, int first, int stride,
                                      int tiles, Locate locate) {
    constexpr int STAGE = 16384 + BN * 128, WIDTH = GATED ? BN / 2 : BN;
    int i = 0;
    const int ahead = min(steps, STAGES);
    for (int index = first; index < tiles; index += stride) {
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

template <int BN, int STAGES>
__device__ __forceinline__ void wide(const TensorMap& x, const TensorMap& w0, const TensorMap& w1, const TensorMap& w2, const Call& c) {
    constexpr int STAGE = 16384 + BN * 128, WIDTH = GATED ? BN / 2 : BN;
    extern __shared__ u8 raw[];
    u8* base = (u8*)(((u64)raw + 1023) & ~1023ull);
    float* biases = (float*)(base + STAGES * STAGE);  // of this tile and the next
    u64* full = (u64*)(biases + 2 * BN);
    u64* empty = full + STAGES;
    const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    const int steps = up(c.inner, 64), tiles = c.tokenTiles * c.featureTiles;
    if (threadIdx.x == 0) {
        prepare(&x), prepare(&w0);
        for (int s = 0; s < STAGES; ++s) init(full + s, 1), init(empty + s, 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    letNextKernelStart();
    auto locate = [&](int index, int& token, int& tile) { return locateTile(c, index, token, tile, WIDTH); };
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) bring<BN, STAGES>(x, w0, w1, w2, base, full, empty, steps, blockIdx.x, gridDim.x, tiles, locate);
        waitForPrecedingKernel();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        waitForPrecedingKernel();
        auto release = [&](int s) {
            if (lane == 0) arrive(empty + s);
        };
        int i = 0, turn = 0;
        for (int index = blockIdx.x; index < tiles; index += gridDim.x, turn ^= 1) {
            int token, tile;
            const int j = locate(index, token, tile);
            const Job& job = c.job[j];
            const int feature = tile * WIDTH, row = token + (group - 1) * 64 + warp * 16 + (lane >> 2), q = lane & 3;
            float* bias = biases + turn * BN;
            {
                const int t = threadIdx.x - 128, f = feature + (GATED && t >= WIDTH ? t - WIDTH : t);
                const u16* from = (const u16*)(GATED && t >= WIDTH ? c.job[1].bias : job.bias);
                if (t < BN) bias[t] = from && f < job.features ? unpack(__ldg(from + f)).x : 0.f;
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
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const bool there = row + 8 * h < c.tokens;
                const long long line = (long long)(row + 8 * h) * job.features + feature + q * 8;
                uint4 added[WIDTH / 32];
                #pragma unroll
                for (int n = 0; n < WIDTH / 32; ++n) added[n] = job.residual && there && feature + n * 32 + q * 8 < job.features ? *(const uint4*)((const u16*)job.residual + line + n * 32) : uint4{0, 0, 0, 0};
                #pragma unroll
                for (int n = 0; n < WIDTH / 32; ++n) {  // 32 features at a time
                    u32 out[4], more[4] = {added[n].x, added[n].y, added[n].z, added[n].w};
                    if (job.residual) transpose(more);
                    #pragma unroll
                    for (int m = 0; m < 4; ++m) {
                        const int at = (n * 4 + m) * 4 + 2 * h;
                        const float2 b = *(const float2*)(bias + (n * 4 + m) * 8 + 2 * q);
                        float low = activate(d[at] + b.x), high = activate(d[at + 1] + b.y);
                        if (GATED) {
                            const float2 g = *(const float2*)(bias + WIDTH + (n * 4 + m) * 8 + 2 * q);
                            low *= d[(at + BN / 4) % (BN / 2)] + g.x, high *= d[(at + 1 + BN / 4) % (BN / 2)] + g.y;
                        }
                        const float2 r = unpack(more[m]);
                        out[m] = pack(low + r.x, high + r.y);
                    }
                    transpose(out);
                    if (there && feature + n * 32 + q * 8 < job.features) *(uint4*)((u16*)job.y + line + n * 32) = {out[0], out[1], out[2], out[3]};
                }
            }
        }
    }
}

// --- many tokens, in turns ----------------------------------------------------------------------------------------------------
// d is what a thread of a warpgroup has of 128 tokens x BN features: d[half][4 n + 2 h + i] of token 64 half + 16 warp + lane / 4 + 8 h and
// feature 8 n + 2 (lane % 4) + i. 32 features of a token at a time, as words of 16-bit floats that four lanes have swapped.
template <int BN>
__device__ __forceinline__ void start(float (&d)[2][BN / 2], const Job& job, int tokens, int row, int feature, int q) {
    const u16* bias = (const u16*)job.bias + feature + 2 * q;
    #pragma unroll
    for (int n = 0; n < BN / 8; ++n) {
        const float2 b = unpack(job.bias && feature + n * 8 < job.features ? __ldg((const u32*)(bias + n * 8)) : 0);
        #pragma unroll
        for (int half = 0; half < 2; ++half) d[half][4 * n] = d[half][4 * n + 2] = b.x, d[half][4 * n + 1] = d[half][4 * n + 3] = b.y;
    }
    if (!job.residual) return;
    #pragma unroll
    for (int half = 0; half < 2; ++half)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int token = row + half * 64 + h * 8;
            const u16* from = (const u16*)job.residual + (long long)token * job.features + feature + q * 8;
            #pragma unroll
            for (int n = 0; n < BN / 32; ++n) {
                const uint4 there = token < tokens && feature + n * 32 + q * 8 < job.features ? *(const uint4*)(from + n * 32) : uint4{0, 0, 0, 0};
                u32 more[4] = {there.x, there.y, there.z, there.w};
                transpose(more);
                #pragma unroll
                for (int m = 0; m < 4; ++m) {
                    const float2 r = unpack(more[m]);
                    d[half][(n * 4 + m) * 4 + 2 * h] += r.x, d[half][(n * 4 + m) * 4 + 2 * h + 1] += r.y;
                }
            }
        }
}
template <int BN, typename Value>
__device__ __forceinline__ void write(void* y, const float (&d)[2][BN / 2], int tokens, long long features, int row, int feature, int q, Value value) {
    #pragma unroll
    for (int half = 0; half < 2; ++half)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int token = row + half * 64 + h * 8;
            u16* to = (u16*)y + (long long)token * features + feature + q * 8;
            #pragma unroll
            for (int n = 0; n < BN / 32; ++n) {
                u32 out[4];
                #pragma unroll
                for (int m = 0; m < 4; ++m) {
                    const int at = (n * 4 + m) * 4 + 2 * h;
                    out[m] = value(d[half][at], d[half][at + 1], (n * 4 + m) * 8);
                }
                transpose(out);
                if (token < tokens && feature + n * 32 + q * 8 < features) *(uint4*)(to + n * 32) = {out[0], out[1], out[2], out[3]};
            }
        }
}
// Read where it is needed: the compiler would keep what it has read in registers, which there are not.
__device__ __forceinline__ float2 pairOf(const u16* p) {
    u32 v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return unpack(v);
}
__device__ __forceinline__ float ofFour(float v) {  // the sum over four lanes
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
}

// RANKS blocks have a whole row, each BN features of it. `told` is a place for what they tell each other of it, [rank][row of the tile]:
// the mean of a part and the sum of the squares of what differs from it. Then d is centred and has a deviation of 1.
template <int BN, int RANKS>
__device__ __forceinline__ void normalize(float (&d)[2][BN / 2], float2* told, u64* barrier, u32 parity, u32 rank, int warp, int lane, float epsilon) {
    const int q = lane & 3;
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        float sum = 0.f, square = 0.f;
        if (NORM == 1) {
            #pragma unroll
            for (int n = 0; n < BN / 8; ++n) sum += d[i >> 1][4 * n + 2 * (i & 1)] + d[i >> 1][4 * n + 2 * (i & 1) + 1];
            sum = ofFour(sum) / BN;
        }
        #pragma unroll
        for (int n = 0; n < BN / 8; ++n) {
            const float a = d[i >> 1][4 * n + 2 * (i & 1)] - sum, b = d[i >> 1][4 * n + 2 * (i & 1) + 1] - sum;
            square += a * a + b * b;
        }
        square = ofFour(square);
        const float2* to = told + rank * 128 + (i >> 1) * 64 + warp * 16 + (lane >> 2) + (i & 1) * 8;
        for (int peer = q; peer < RANKS; peer += 4) tell(to, peer, sum, square);
    }
    __syncwarp();
    if (lane < RANKS) arriveAt(barrier, lane);
    waitForCluster(barrier, parity);
    const float2* from = told + (q >> 1) * 64 + warp * 16 + (lane >> 2) + (q & 1) * 8;  // a lane puts one token together
    float centre = 0.f, square = 0.f;
    if (NORM == 1) {
        #pragma unroll
        for (int r = 0; r < RANKS; ++r) centre += from[r * 128].x;
        centre /= RANKS;
    }
    #pragma unroll
    for (int r = 0; r < RANKS; ++r) {
        const float2 part = from[r * 128];
        square += part.y + BN * (part.x - centre) * (part.x - centre);
    }
    const float inverse = 1.f / sqrtf(square / (BN * RANKS) + epsilon);
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float mean = NORM == 1 ? __shfl_sync(~0u, centre, (lane & ~3) | i) : 0.f, by = __shfl_sync(~0u, inverse, (lane & ~3) | i);
        #pragma unroll
        for (int n = 0; n < BN / 8; ++n) {
            float &a = d[i >> 1][4 * n + 2 * (i & 1)], &b = d[i >> 1][4 * n + 2 * (i & 1) + 1];
            a = (a - mean) * by, b = (b - mean) * by;
        }
    }
}

template <int BN, int STAGES, int RANKS>
__device__ __forceinline__ void turns(const TensorMap& x, const TensorMap& w0, const TensorMap& w1, const TensorMap& w2, const Call& c) {
    static_assert(!GATED && (NORM || RANKS == 1), "a gate, or a cluster without a norm");
    constexpr int STAGE = 16384 + BN * 128;
    extern __shared__ u8 raw[];
    u8* base = (u8*)(((u64)raw + 1023) & ~1023ull);
    float2* told = (float2*)(base + STAGES * STAGE);  // [turn of a warpgroup][warpgroup][rank][row of a tile]
    u64* full = (u64*)(told + (NORM ? 4 * RANKS * 128 : 0));
    u64* empty = full + STAGES;
    u64* met = empty + STAGES;  // of each warp that multiplies
    u64* order = met + 8;       // whose turn it is: who waits for a stage must be the next to use it, or its parity would mislead
    const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31, q = lane & 3;
    const u32 rank = RANKS > 1 ? clusterRank() : 0;
    const int steps = up(c.inner, 64), tiles = NORM ? c.tokenTiles : c.tokenTiles * c.featureTiles, place = blockIdx.x / RANKS, places = gridDim.x / RANKS;
    if (threadIdx.x == 0) {
        prepare(&x), prepare(&w0);
        for (int s = 0; s < STAGES; ++s) init(full + s, 1), init(empty + s, 4);
        for (int n = 0; n < 8; ++n) init(met + n, RANKS);
        init(order, 4), init(order + 1, 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (RANKS > 1) clusterSync();
    else __syncthreads();
    letNextKernelStart();
    auto locate = [&](int index, int& token, int& tile) {
        if (!NORM) return locateTile(c, index, token, tile, BN);
        token = index * 128, tile = rank;
        return 0;
    };
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) bring<BN, STAGES>(x, w0, w1, w2, base, full, empty, steps, place, places, tiles, locate);
        __syncwarp();
        waitForPrecedingKernel();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        waitForPrecedingKernel();
        const int mine = group - 1;
        int i = mine * steps;  // stages before this tile's
        u32 turn = 0;
        for (int index = place + mine * places; index < tiles; index += 2 * places, i += steps, ++turn) {
            int token, tile;
            const Job& job = c.job[locate(index, token, tile)];
            const int feature = tile * BN, row = token + warp * 16 + (lane >> 2);
            float d[2][BN / 2];
            start<BN>(d, job, c.tokens, row, feature, q);  // while the other multiplies
            wait(order + mine, (turn & 1) ^ (mine == 0));
            for (int k = 0; k < steps; ++k, ++i) {
                const int s = i % STAGES;
                wait(full + s, (i / STAGES) & 1);
                const u64 a = descriptor(base + s * STAGE), other = descriptor(base + s * STAGE + 8192), b = descriptor(base + s * STAGE + 16384);
                wgmmaFence();
                #pragma unroll
                for (int n = 0; n < 4; ++n) Wgmma<BN>::add(d[0], a + 2 * n, b + 2 * n), Wgmma<BN>::add(d[1], other + 2 * n, b + 2 * n);
                wgmmaCommit();
                if (k) {
                    wgmmaWait<1>();
                    if (lane == 0) arrive(empty + (i - 1) % STAGES);
                }
            }
            if (lane == 0) arrive(order + (mine ^ 1));
            wgmmaWait<0>();
            if (lane == 0) arrive(empty + (i - 1) % STAGES);
            if (NORM) {
                if (job.y) write<BN>(job.y, d, c.tokens, job.features, row, feature, q, [](float a, float b, int) { return pack(a, b); });
                normalize<BN, RANKS>(d, told + ((turn & 1) * 2 + mine) * RANKS * 128, met + mine * 4 + warp, turn & 1, rank, warp, lane, c.norm.epsilon);
                const u16 *scale = (const u16*)c.norm.scale + feature + 2 * q, *bias = (const u16*)c.norm.bias + feature + 2 * q;
                write<BN>(c.norm.y, d, c.tokens, job.features, row, feature, q, [&](float a, float b, int n) {
                    const float2 s = pairOf(scale + n), t = c.norm.bias ? pairOf(bias + n) : float2{0.f, 0.f};
                    return pack(a * s.x + t.x, b * s.y + t.y);
                });
            } else write<BN>(job.y, d, c.tokens, job.features, row, feature, q, [](float a, float b, int) { return pack(activate(a), activate(b)); });
        }
    }
    if (RANKS > 1) clusterSync();  // nobody leaves while others tell it something
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    multiply(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w0, const __grid_constant__ TensorMap w1, const __grid_constant__ TensorMap w2, const __grid_constant__ Call c) {
    KERNEL(x, w0, w1, w2, c);
}
