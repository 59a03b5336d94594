// A chain of matrix products of few tokens in one launch, each reading what the one before it made: the output product of an
// attention, the gated product, the one after it, queries, keys and values of the next layer. float16 or bfloat16, sums in float32.
//
// One block a multiprocessor. A warp fetches weights in the order of the chain, through all of it and as far ahead as shared memory
// holds; they depend on nothing, so memory never rests while a product waits for the one before it. Some warps bring tokens when they
// are there, a warpgroup multiplies, others do all that comes after. Work is dealt in `grain` steps of 64 inner elements, evenly;
// where several blocks share a tile of 64 features (32 with a gate), the first of them adds up what the others send.
//
// Blocks talk through memory in which every word says by itself that it is there: before, it is ~0, two NaNs that no arithmetic
// makes. So there is no barrier, no flag and no fence, and what one block wrote another has a store and a load later. There are two
// such memories: a launch uses one and clears the other, which the launch before it used.
//
// A root-mean-square norm between two products costs nothing: the first one also writes its result times the norm's scale, and the
// squares of each tile; the second one reads the former and divides its sums by the root of the mean of the latter.
// Source: the same as gemm.cu; the dealing is "Stream-K" (Osama et al., 2023), words that are flags are NCCL's LL protocol.
#include "overlap.cuh"
#include "sixteen.cuh"
#include "hopper.cuh"
#include "products.cuh"

// Places in the memory between blocks are offsets in bytes; -1: none.
struct alignas(64) Link {
    TensorMap w[3];
    Job job[3];
    const void* x;                                                    // [tokens, inner], of the first link only
    const void* scale;                                                // of the norm behind it
    int from, residual, sent, scaled, squares, normed, parts, room;   // tokens; residual; y; y * scale; squares [tile, token] of y, and of the link before; parts of sums
    float epsilon;
    int normedTiles, jobs, inner, tiles, gated, activated, grain;
};
struct Chain {
    Link link[LINKS];
    int count, tokens, stages, size;  // size: bytes of one memory
    int* state;                       // which memory is the next one's; blocks that are done
    u8* memory;
};
WGMMA

constexpr u32 NOTHING = ~0u;
__device__ __forceinline__ uint4 look(const void* p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ bool isThere(uint4 v) { return v.x != NOTHING && v.y != NOTHING && v.z != NOTHING && v.w != NOTHING; }
// Who waits in vain for some ten seconds ends the launch with an error: a fault must not become a GPU that is busy for ever.
struct Patience {
    u32 looks = 0;
    __device__ __forceinline__ void look() { if (++looks >> 24) __trap(); }
};
__device__ __forceinline__ uint4 receive(const void* p) {
    Patience patience;
    uint4 v;
    for (v = look(p); !isThere(v); v = look(p)) patience.look();
    return v;
}
__device__ __forceinline__ void send(void* p, uint4 v) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// Tokens of a tile; warps of a block: 4 multiply, 1 fetches weights, LOADERS bring tokens, FINISHERS do what comes after.
constexpr int BN = 8, LOADERS = 4, FINISHERS = 2, FINISHING = FINISHERS * 32;
__device__ __forceinline__ void together() { asm volatile("bar.sync 1, %0;" ::"n"(FINISHING) : "memory"); }  // the warps that finish

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
__device__ __forceinline__ int locate(const Link& l, int& tile) {  // the product that a tile belongs to; `tile` becomes its place there
    int j = 0;
    while (j + 1 < l.jobs && tile >= up((int)l.job[j].features, 64)) tile -= up((int)l.job[j++].features, 64);
    return j;
}
struct Ring {  // a place in the ring of stages, and how often it was passed
    int stage = 0, parity = 0;
    __device__ void advance(int stages) { if (++stage == stages) stage = 0, parity ^= 1; }
};

extern "C" __global__ void __launch_bounds__(160 + 32 * (LOADERS + FINISHERS), 1) multiply(const __grid_constant__ Chain c) {
    constexpr int STAGE = 8192 + BN * 128, PITCH = 68, LOADS = 4;
    extern __shared__ u8 raw[];
    u8* base = (u8*)(((u64)raw + 1023) & ~1023ull);
    float* part = (float*)(base + c.stages * STAGE);
    float* factor = part + 2 * BN * PITCH;
    u64* full = (u64*)(factor + BN);
    u64 *arrived = full + c.stages, *empty = arrived + c.stages;
    u64 *given = empty + c.stages, *taken = given + 2;  // the two sides of `part`, from those who multiply to those who finish
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (threadIdx.x == 0) {
        for (int s = 0; s < c.stages; ++s) init(full + s, 1), init(arrived + s, 1), init(empty + s, 4);
        for (int s = 0; s < 2; ++s) init(given + s, 4), init(taken + s, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int i = threadIdx.x; i < c.stages * BN * 8; i += blockDim.x) *(uint4*)(base + i / (BN * 8) * STAGE + 8192 + i % (BN * 8) * 16) = uint4{0, 0, 0, 0};  // tokens that are none
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (warp == 4) {
        if (lane == 0) {
            Ring at, old;
            bool again = false;  // stages were used before
            int issued = 0;
            for (int n = 0; n < c.count; ++n) {
                if (n == c.count - 1) letNextKernelStart();  // it starts when all blocks say so, so none of its own keeps one of ours out
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
                keep<BN, PITCH>(part + side * (BN * PITCH), d, warp, lane);
                __syncwarp();
                if (lane == 0) arrive(given + side);
            }
        }
    } else if (warp < 5 + LOADERS) {
        // Tokens: a group of steps at a time, 16 bytes of a token's 64 elements a lane. Groups go round, through all links: a barrier tells only whether
        // the phase that is asked for or the one two before it is over, and no warp is that far ahead as long as its groups are at most c.stages apart.
        waitForPrecedingKernel();
        const u8* memory = c.memory + (*(volatile int*)c.state ? c.size : 0);
        const int wide = 8 * c.tokens, group = min(4, 32 * LOADS / wide);
        int done = 0, turn = warp - 5;  // groups until this warp's next one
        for (int n = 0; n < c.count; ++n) {
            const Link& l = c.link[n];
            const Share share(l);
            const int count = share.end - share.first, groups = up(count, group);
            const u8* x = n ? memory + l.from : (const u8*)l.x;
            for (; turn < groups; turn += LOADERS) {
                const int g = turn * group, here = min(group, count - g);
                const u8* at[LOADS];
                uint4 v[LOADS];
                #pragma unroll
                for (int u = 0; u < LOADS; ++u) {
                    const int e = u * 32 + lane, j = e / wide, row = e % wide >> 3, column = (share.first + g + j) % share.steps * 64 + (e & 7) * 8;
                    at[u] = j < here && column < l.inner ? x + (row * l.inner + column) * 2ll : nullptr;
                    v[u] = uint4{0, 0, 0, 0};
                }
                bool missing;
                Patience patience;
                do {
                    missing = false;
                    patience.look();
                    #pragma unroll
                    for (int u = 0; u < LOADS; ++u) if (at[u]) v[u] = look(at[u]);
                    #pragma unroll
                    for (int u = 0; u < LOADS; ++u) missing |= n && !isThere(v[u]);
                } while (missing);
                for (int j = 0; j < here; ++j) {
                    const int index = done + g + j, stage = index % c.stages, pass = index / c.stages;
                    if (pass) wait(empty + stage, pass - 1 & 1);
                    u8* to = base + stage * STAGE + 8192;
                    #pragma unroll
                    for (int u = 0; u < LOADS; ++u) {
                        const int e = u * 32 + lane, row = e % wide >> 3;
                        if (e / wide == j) *(uint4*)(to + row * 128 + ((e ^ row) & 7) * 16) = v[u];
                    }
                    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                    __syncwarp();
                    if (lane == 0) arrive(arrived + stage);
                }
            }
            done += count, turn -= groups;
        }
    } else {
        const int thread = threadIdx.x - 160 - 32 * LOADERS;
        waitForPrecedingKernel();
        const int which = *(volatile int*)c.state;
        u8 *memory = c.memory + (which ? c.size : 0), *other = c.memory + (which ? 0 : c.size);
        for (int i = blockIdx.x * FINISHING + thread; i < c.size / 16; i += gridDim.x * FINISHING) *((uint4*)other + i) = uint4{NOTHING, NOTHING, NOTHING, NOTHING};
        int segment = 0;
        for (int n = 0; n < c.count; ++n) {
            const Link& l = c.link[n];
            const Share share(l);
            if (share.first == share.end) continue;
            const int chunks = l.gated ? 4 : 8, bits = l.gated ? 2 : 3;
            if (l.normed >= 0) {
                constexpr int PER = FINISHING / BN;  // threads a token
                float sum = 0.f;
                #pragma unroll 8
                for (int i = thread % PER; i < l.normedTiles; i += PER) {
                    const float* from = (const float*)(memory + l.normed) + i * BN + thread / PER;
                    u32 v;
                    Patience patience;
                    do {
                        patience.look();
                        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
                    } while (v == NOTHING);
                    sum += __uint_as_float(v);
                }
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
                const int feature = tile * 8 * chunks, opening = share.owner(whole * share.grains), parts = share.owner((whole + 1) * share.grains - 1) - opening + 1;
                const int mine = blockIdx.x - opening, side = segment & 1;
                const float* sums = part + side * (BN * PITCH);
                float* sent = (float*)(memory + l.parts) + (long long)whole * l.room * c.tokens * 64;  // [part, token, 64], but for the first one's
                if (mine) {
                    wait(given + side, segment >> 1 & 1);
                    for (int e = thread; e < c.tokens * 16; e += FINISHING) send((float4*)sent + (mine - 1) * c.tokens * 16 + e, *(const uint4*)(sums + (e >> 4) * PITCH + (e & 15) * 4));
                    together();
                    if (thread == 0) arrive(taken + side);
                    continue;
                }
                const int t = thread >> bits, f = (thread & chunks - 1) * 8;
                const long long place = t * job.features + feature + f;
                const bool inside = t < c.tokens && feature + f < job.features;
                const uint4 residual = !inside ? uint4{0, 0, 0, 0} : l.residual >= 0 ? receive(memory + l.residual + place * 2) : read(job.residual, place);
                wait(given + side, segment >> 1 & 1);
                auto collect = [&](float (&v)[8], int f) {
                    const float4 a = *(const float4*)(sums + t * PITCH + f), b = *(const float4*)(sums + t * PITCH + f + 4);
                    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
                    for (int p = 0; p < parts - 1; p += 4) {
                        uint4 got[8];
                        const float* from[4];
                        #pragma unroll
                        for (int i = 0; i < 4; ++i) from[i] = sent + ((long long)min(p + i, parts - 2) * c.tokens + t) * 64 + f;
                        bool missing;
                        Patience patience;
                        do {
                            missing = false;
                            patience.look();
                            #pragma unroll
                            for (int i = 0; i < 8; ++i) got[i] = look(from[i / 2] + i % 2 * 4);
                            #pragma unroll
                            for (int i = 0; i < 8; ++i) missing |= !isThere(got[i]);
                        } while (missing);
                        #pragma unroll
                        for (int i = 0; i < 4; ++i)
                            if (p + i < parts - 1) {
                                const uint4 a = got[2 * i], b = got[2 * i + 1];
                                v[0] += __uint_as_float(a.x), v[1] += __uint_as_float(a.y), v[2] += __uint_as_float(a.z), v[3] += __uint_as_float(a.w);
                                v[4] += __uint_as_float(b.x), v[5] += __uint_as_float(b.y), v[6] += __uint_as_float(b.z), v[7] += __uint_as_float(b.w);
                            }
                    }
                };
                float square = 0.f;
                if (inside) {
                    const float by = l.normed >= 0 ? factor[t] : 1.f;
                    float v[8], u[8];
                    collect(v, f);
                    #pragma unroll
                    for (int i = 0; i < 8; ++i) v[i] *= by;
                    add(v, read(job.bias, feature + f));
                    if (l.activated) {
                        #pragma unroll
                        for (int i = 0; i < 8; ++i) v[i] = activate(v[i], ACTIVATION);
                    }
                    if (l.gated) {
                        collect(u, 32 + f);
                        #pragma unroll
                        for (int i = 0; i < 8; ++i) u[i] *= by;
                        add(u, read(l.job[1].bias, feature + f));
                        #pragma unroll
                        for (int i = 0; i < 8; ++i) v[i] *= u[i];
                    }
                    add(v, residual);
                    const uint4 y = {pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])};
                    if (l.scaled >= 0) {
                        const uint4 scale = *(const uint4*)((const u16*)l.scale + feature + f);
                        const u32 given[4] = {y.x, y.y, y.z, y.w}, scales[4] = {scale.x, scale.y, scale.z, scale.w};
                        u32 z[4];
                        #pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const float2 a = unpack(given[i]), s = unpack(scales[i]);
                            square += a.x * a.x + a.y * a.y;
                            z[i] = pack(a.x * s.x, a.y * s.y);
                        }
                        send(memory + l.scaled + place * 2, uint4{z[0], z[1], z[2], z[3]});
                    }
                    if (l.sent >= 0 && &job == l.job) send(memory + l.sent + place * 2, y);
                    if (job.y) *(uint4*)((u16*)job.y + place) = y;
                }
                if (l.scaled >= 0) {
                    for (int o = 1; o < chunks; o *= 2) square += __shfl_xor_sync(~0u, square, o);
                    if (f == 0 && t < BN) asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"((float*)(memory + l.squares) + whole * BN + t), "f"(square) : "memory");
                }
                together();
                if (thread == 0) arrive(taken + side);
            }
        }
    }
    __syncwarp();
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(c.state + 1, 1) != gridDim.x - 1) return;
        c.state[0] ^= 1;
        c.state[1] = 0;
    }
}
