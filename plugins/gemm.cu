// Matrix products for Hopper (sm_90a): weights and tokens arrive by TMA, are multiplied by wgmma, and leave with bias,
// activation, gate and residual applied. float16 or bfloat16 in and out, sums in float32.
//
//   narrow   few tokens. A block owns 64 features (32 with a gate) of BN tokens; the blocks of a cluster share the inner
//            dimension and add up through distributed shared memory. Weights are fetched before the preceding kernel ends.
//   wide     many tokens. Persistent blocks of 128 tokens x BN features, one warpgroup fetching, two multiplying.
//
// Both take up to three products of the same tokens (Q, K, V), which then share one launch. Weights lie [features, inner].
// ACTIVATION and GATED are constants, so that every variant is a module of its own; KERNEL at the end names it.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"; CUDA Driver API, tensor maps.
#include "overlap.cuh"
#include "sixteen.cuh"
#include "hopper.cuh"
#include "products.cuh"
#include "cluster.cuh"

struct Call { Job job[3]; int jobs, tokens, inner, tokenTiles, featureTiles, stages; };

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
template <int BN, int STAGES>
__device__ __forceinline__ void wide(const TensorMap& x, const TensorMap& w0, const TensorMap& w1, const TensorMap& w2, const Call& c) {
    constexpr int STAGE = 16384 + BN * 128, GROUP = 16, WIDTH = GATED ? BN / 2 : BN;
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

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    multiply(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w0, const __grid_constant__ TensorMap w1, const __grid_constant__ TensorMap w2, const __grid_constant__ Call c) {
    KERNEL(x, w0, w1, w2, c);
}
