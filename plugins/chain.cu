// A chain of matrix products of few tokens in one launch, each reading what the one before it made: the output product of an
// attention, the gated product, the one after it, queries, keys and values of the next layer. float16 or bfloat16, sums in float32.
//
// One block a multiprocessor. A warp fetches weights in the order of the chain, through all of it and as far ahead as shared memory
// holds; they depend on nothing, so memory never rests while a product waits for the one before it. A second warp fetches tokens
// when they are there, a warpgroup multiplies, a second one does all that comes after, so that the first never stops. Work is dealt
// in `grain` steps of 64 inner elements, evenly: where several blocks share a tile of 64 features (32 with a gate), the last to come
// adds up the parts, in the blocks' order.
//
// A root-mean-square norm between two products costs nothing: the first one also writes its result times the norm's scale, and the
// squares of each tile; the second one reads the former and divides its sums by the root of the mean of the latter.
// Source: the same as gemm.cu; the dealing is "Stream-K" (Osama et al., 2023).
#include "overlap.cuh"
#include "sixteen.cuh"
#include "hopper.cuh"
#include "products.cuh"

struct alignas(64) Link {
    TensorMap x, w[3];
    Job job[3];
    void* scaled;         // with a norm behind it: y * scale
    const void* scale;
    float* squares;       // [tiles, BN], of y
    const float* normed;  // the squares of the link before, if x was only scaled
    float epsilon;
    int normedTiles, jobs, inner, tiles, gated, activated, grain;
};
struct Chain {
    const Link* link;
    int count, tokens, stages, room;  // room: parts that a tile may have
    int *ready, *arrived, *finished;  // by link: tiles done; by tile: parts that are there; blocks done. All 0 before and after.
    float* parts;                     // [tile, part, token, 64]
};
WGMMA

__device__ __forceinline__ void waitFor(const int* count, int wanted) {
    int v;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(count) : "memory");
    while (v < wanted);
}
__device__ __forceinline__ void together() { asm volatile("bar.sync 1, 128;" ::: "memory"); }  // the warpgroup that finishes
// What copies by TMA read was written by ordinary stores: they are different ways to memory.
__device__ __forceinline__ void fenceCopies() { asm volatile("fence.proxy.async;" ::: "memory"); }

// What this block does of a link: steps from `first` up to `end`, counted through all tiles.
struct Share {
    int steps, grains, grain, units, blocks, first, end;
    __device__ Share(const Link& l) {
        steps = up(l.inner, 64), grain = l.grain, grains = up(steps, grain), units = l.tiles * grains, blocks = min((int)gridDim.x, units);
        first = begin(blockIdx.x), end = begin(blockIdx.x + 1);
    }
    __device__ int begin(int block) const {
        const int unit = (int)((long long)units * min(block, blocks) / blocks);
        return unit / grains * steps + min(unit % grains * grain, steps);
    }
    __device__ int owner(int unit) const { return (int)(((long long)(unit + 1) * blocks + units - 1) / units) - 1; }  // the block that does it
};
struct Ring {  // a place in the ring of stages, and how often it was passed
    int stage = 0, parity = 0;
    __device__ void advance(int stages) { if (++stage == stages) stage = 0, parity ^= 1; }
};

template <int BN>
__device__ __forceinline__ void chain(const Chain& c) {
    constexpr int STAGE = 8192 + BN * 128, PITCH = 68, ROUNDS = BN / 16;
    extern __shared__ u8 raw[];
    u8* base = (u8*)(((u64)raw + 1023) & ~1023ull);
    float* part = (float*)(base + c.stages * STAGE);
    float* factor = part + 2 * BN * PITCH;
    int* last = (int*)(factor + BN);
    int* reached = last + 1;  // how many links' tokens are there
    u64* full = (u64*)(last + 4);
    u64* arrived = full + c.stages;
    u64* empty = arrived + c.stages;
    u64 *given = empty + c.stages, *taken = given + 2;  // the two sides of `part`, from one warpgroup to the other
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (threadIdx.x == 0) {
        for (int s = 0; s < c.stages; ++s) init(full + s, 1), init(arrived + s, 1), init(empty + s, 4);
        for (int s = 0; s < 2; ++s) init(given + s, 4), init(taken + s, 1);
        *reached = 0;
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    auto locate = [&](const Link& l, int& tile) {  // the product that a tile belongs to; `tile` becomes its place there
        int j = 0;
        while (j + 1 < l.jobs && tile >= up((int)l.job[j].features, 64)) tile -= up((int)l.job[j++].features, 64);
        return j;
    };
    if (warp == 4 && lane == 0) {
        Ring at, old;
        bool again = false;  // stages were used before
        int issued = 0;
        for (int n = 0; n < c.count; ++n) {
            const Link& l = c.link[n];
            const Share share(l);
            for (int step = share.first; step < share.end;) {
                int tile = step / share.steps;
                const int stop = min(share.end, (tile + 1) * share.steps);
                int k = step - tile * share.steps;
                const int j = locate(l, tile), feature = tile * (l.gated ? 32 : 64);
                const TensorMap *w = l.w + j, *half = l.gated ? l.w + 1 : w;
                for (; step < stop; ++step, ++k) {
                    if (again) wait(empty + at.stage, at.parity ^ 1);
                    if (issued++ >= WINDOW) wait(full + old.stage, old.parity), old.advance(c.stages);
                    u8* to = base + at.stage * STAGE;
                    expect(full + at.stage, 8192);
                    fetch(to, w, full + at.stage, k * 64, feature);
                    fetch(to + 4096, half, full + at.stage, k * 64, l.gated ? feature : feature + 32);
                    at.advance(c.stages);
                    again |= !at.stage;
                }
            }
        }
    } else if (warp == 5 && lane == 0) {
        Ring at;
        bool again = false;
        for (int n = 0; n < c.count; ++n) {
            const Link& l = c.link[n];
            if (n) waitFor(c.ready + n - 1, c.link[n - 1].tiles);
            else waitForPrecedingKernel();
            fenceCopies();
            asm volatile("st.release.cta.shared.s32 [%0], %1;" ::"r"(shared(reached)), "r"(n + 1) : "memory");
            if (n == c.count - 1) letNextKernelStart();  // all blocks run by now, so none of the next kernel's can keep one out
            const Share share(l);
            int k = share.first % share.steps;
            for (int step = share.first; step < share.end; ++step) {
                if (again) wait(empty + at.stage, at.parity ^ 1);
                expect(arrived + at.stage, BN * 128);
                fetch(base + at.stage * STAGE + 8192, &l.x, arrived + at.stage, k * 64, 0);
                at.advance(c.stages);
                again |= !at.stage;
                if (++k == share.steps) k = 0;
            }
        }
    } else if (warp < 4) {
        Ring at;
        int segment = 0;
        for (int n = 0; n < c.count; ++n) {
            const Share share(c.link[n]);
            for (int step = share.first; step < share.end; ++segment) {
                const int stop = min(share.end, (step / share.steps + 1) * share.steps), start = step;
                float d[BN / 2];
                #pragma unroll
                for (int i = 0; i < BN / 2; ++i) d[i] = 0.f;
                int before = 0;
                for (; step < stop; ++step) {
                    wait(full + at.stage, at.parity);
                    wait(arrived + at.stage, at.parity);
                    const u64 a = descriptor(base + at.stage * STAGE), b = descriptor(base + at.stage * STAGE + 8192);
                    wgmmaFence();
                    #pragma unroll
                    for (int k = 0; k < 4; ++k) Wgmma<BN>::add(d, a + 2 * k, b + 2 * k);
                    wgmmaCommit();
                    if (step > start) {
                        wgmmaWait<1>();
                        if (lane == 0) arrive(empty + before);
                    }
                    before = at.stage;
                    at.advance(c.stages);
                }
                wgmmaWait<0>();
                if (lane == 0) arrive(empty + before);
                const int side = segment & 1;
                if (segment > 1) wait(taken + side, (segment >> 1) - 1 & 1);
                float* to = part + side * (BN * PITCH) + 2 * (lane & 3) * PITCH + warp * 16 + (lane >> 2);  // rows are tokens
                #pragma unroll
                for (int i = 0; i < BN / 8; ++i, to += 8 * PITCH) {
                    to[0] = d[4 * i];
                    to[PITCH] = d[4 * i + 1];
                    to[8] = d[4 * i + 2];
                    to[PITCH + 8] = d[4 * i + 3];
                }
                __syncwarp();
                if (lane == 0) arrive(given + side);
            }
        }
    } else if (warp > 5) {
        const int thread = threadIdx.x - 192;
        waitForPrecedingKernel();
        int segment = 0;
        for (int n = 0; n < c.count; ++n) {
            const Link& l = c.link[n];
            const Share share(l);
            if (share.first == share.end) continue;
            const int chunks = l.gated ? 4 : 8, bits = l.gated ? 2 : 3;
            int there;
            do asm volatile("ld.acquire.cta.shared.s32 %0, [%1];" : "=r"(there) : "r"(shared(reached)) : "memory");
            while (there <= n);  // all that earlier links made is there
            if (l.normed) {
                constexpr int PER = 128 / BN;  // threads a token
                float sum = 0.f;
                for (int i = thread % PER; i < l.normedTiles; i += PER) sum += __ldcg(l.normed + i * BN + thread / PER);
                #pragma unroll
                for (int o = 1; o < PER; o *= 2) sum += __shfl_xor_sync(~0u, sum, o);
                if (thread % PER == 0) factor[thread / PER] = rsqrtf(sum / l.inner + l.epsilon);
                together();
            }
            for (int step = share.first; step < share.end; ++segment) {
                const int whole = step / share.steps;
                step = min(share.end, (whole + 1) * share.steps);
                int tile = whole;
                const Job& job = l.job[locate(l, tile)];
                const int feature = tile * 8 * chunks;
                uint4 residuals[ROUNDS];
                #pragma unroll
                for (int round = 0; round < ROUNDS; ++round) {
                    const int e = round * 128 + thread, t = e >> bits, f = (e & chunks - 1) * 8;
                    const bool inside = job.residual && t < c.tokens && feature + f < job.features;
                    residuals[round] = inside ? __ldcg((const uint4*)((const u16*)job.residual + t * job.features + feature + f)) : uint4{0, 0, 0, 0};
                }
                const int side = segment & 1;
                const float* mine = part + side * (BN * PITCH);
                wait(given + side, segment >> 1 & 1);
                const int opening = share.owner(whole * share.grains), parts = share.owner((whole + 1) * share.grains - 1) - opening + 1;
                const long long places = (long long)whole * c.room;
                if (parts > 1) {
                    float* slot = c.parts + (places + blockIdx.x - opening) * (BN * 64);
                    for (int e = thread; e < c.tokens * 16; e += 128) __stcg((float4*)slot + e, *(const float4*)(mine + (e >> 4) * PITCH + (e & 15) * 4));
                    together();
                    if (thread == 0) {
                        arrive(taken + side);
                        int old;
                        asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(old) : "l"(c.arrived + whole) : "memory");
                        *last = old == parts - 1;
                        if (*last) c.arrived[whole] = 0;
                    }
                    together();
                    if (!*last) continue;
                }
                auto sums = [&](float (&v)[8], int t, int f) {
                    if (parts == 1) {
                        const float4 a = *(const float4*)(mine + t * PITCH + f), b = *(const float4*)(mine + t * PITCH + f + 4);
                        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
                        return;
                    }
                    #pragma unroll
                    for (int i = 0; i < 8; ++i) v[i] = 0.f;
                    const float* from = c.parts + places * (BN * 64) + t * 64 + f;
                    #pragma unroll 8
                    for (int p = 0; p < parts; ++p, from += BN * 64) {
                        const float4 a = __ldcg((const float4*)from), b = __ldcg((const float4*)from + 1);
                        v[0] += a.x, v[1] += a.y, v[2] += a.z, v[3] += a.w, v[4] += b.x, v[5] += b.y, v[6] += b.z, v[7] += b.w;
                    }
                };
                #pragma unroll
                for (int round = 0; round < ROUNDS; ++round) {
                    const int e = round * 128 + thread, t = e >> bits, f = (e & chunks - 1) * 8;
                    if (t >= BN) break;  // whole warps
                    float square = 0.f;
                    if (t < c.tokens && feature + f < job.features) {
                        const float by = l.normed ? factor[t] : 1.f;
                        const long long place = t * job.features + feature + f;
                        float v[8], u[8];
                        sums(v, t, f);
                        #pragma unroll
                        for (int i = 0; i < 8; ++i) v[i] *= by;
                        add(v, read(job.bias, feature + f));
                        if (l.activated) {
                            #pragma unroll
                            for (int i = 0; i < 8; ++i) v[i] = activate(v[i], ACTIVATION);
                        }
                        if (l.gated) {
                            sums(u, t, 32 + f);
                            #pragma unroll
                            for (int i = 0; i < 8; ++i) u[i] *= by;
                            add(u, read(l.job[1].bias, feature + f));
                            #pragma unroll
                            for (int i = 0; i < 8; ++i) v[i] *= u[i];
                        }
                        add(v, residuals[round]);
                        const u32 y[4] = {pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])};
                        *(uint4*)((u16*)job.y + place) = {y[0], y[1], y[2], y[3]};
                        if (l.scaled) {
                            const uint4 raws = *(const uint4*)((const u16*)l.scale + feature + f);
                            const u32 scales[4] = {raws.x, raws.y, raws.z, raws.w};
                            u32 z[4];
                            #pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                const float2 a = unpack(y[i]), s = unpack(scales[i]);
                                square += a.x * a.x + a.y * a.y;
                                z[i] = pack(a.x * s.x, a.y * s.y);
                            }
                            *(uint4*)((u16*)l.scaled + place) = {z[0], z[1], z[2], z[3]};
                        }
                    }
                    if (l.scaled) {
                        for (int o = 1; o < chunks; o *= 2) square += __shfl_xor_sync(~0u, square, o);
                        if ((e & chunks - 1) == 0) l.squares[whole * BN + t] = square;
                    }
                }
                fenceCopies();
                together();
                if (thread == 0) {
                    if (parts == 1) arrive(taken + side);
                    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(c.ready + n) : "memory");
                }
            }
        }
    }
    __syncwarp();
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(c.finished, 1) != gridDim.x - 1) return;
        for (int n = 0; n < c.count; ++n) c.ready[n] = 0;
        *c.finished = 0;
    }
}

extern "C" __global__ void __launch_bounds__(320, 1) multiply(const __grid_constant__ Chain c) { chain<TOKENS>(c); }
