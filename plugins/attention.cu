// Attention by tensor cores (mma.sync), softmax computed on the way in float32: every mask that FusedAttention takes, head
// sizes that are multiples of 16 up to 128, float16 or bfloat16. A block owns 16 MT WARPS queries of one head.
// Constants: D the head size, MT tiles of 16 queries a warp, KT keys a step, WARPS; MASK 0 none, 1 boolean, 2 added; ROWS 1 if
// all queries have the same mask; CAUSAL; CAP 1 for a soft cap; PLAIN 1 if scores need nothing but a positive scale and the mask; HOPPER 1 for
// the kernel with wgmma (MT 1, 128 queries a block).
// Source: Dao, FlashAttention-2 (2023).
#include "overlap.cuh"
#include "sixteen.cuh"
typedef long long i64;

struct Attention {
    const u16 *q, *k, *v;
    u16* y;
    const void* mask;
    i64 qs[3], ks[3], vs[3], ys[3];  // strides of batch, head, position, in elements; the last axis is packed
    i64 ms[4];                       // of the mask: batch, head, query, key
    int heads, group, queries, keys; // group: query heads of one key head
    float scale, cap, fill;          // fill to base 2
    int drop, zero, pairs;           // pairs: two neighbours of the mask may be read at once
};

#define INF __int_as_float(0x7f800000)
#define LOG2E 1.44269504f
// The mask of keys `key` and `key + 1`, packed; for a boolean one 1 where the key is seen.
__device__ __forceinline__ u32 maskOf(const Attention& c, i64 line, int key) {
    if (key >= c.keys) return 0;
    if (MASK == 2) {
        const u16* at = (const u16*)c.mask + line + key * c.ms[3];
        if (c.pairs) return *(const u32*)at;
        return at[0] | (key + 1 < c.keys ? (u32)at[c.ms[3]] << 16 : 0);
    }
    const u8* at = (const u8*)c.mask + line + key * c.ms[3];
    const u32 low = (at[0] != 0) != (bool)c.drop, high = key + 1 < c.keys && (at[c.ms[3]] != 0) != (bool)c.drop;
    return low | high << 16;
}
// To base 2. A finite -3.4e38 stays finite, so that a row of nothing else is no row of -inf.
__device__ __forceinline__ float toBase2(float v) {
    const float w = v * LOG2E;
    return BFLOAT16 && w == -INF && v != -INF ? -3e38f : w;
}

using Scores = float[MT][KT / 8][4];
using Output = float[MT][D / 8][4];
using Rows = float[MT][2];
using Masks = u32[ROWS ? 1 : MT][ROWS ? 1 : 2][KT / 8];

// What this thread needs of the mask for a step; asked for early, so that it is there when the scores are.
__device__ __forceinline__ void readMask(Masks& raw, const Attention& c, i64 masks, int step, int first, int r, int p) {
    if (MASK) {
        #pragma unroll
        for (int m = 0; m < (ROWS ? 1 : MT); ++m)
            #pragma unroll
            for (int h = 0; h < (ROWS ? 1 : 2); ++h) {
                const i64 line = masks + (ROWS ? 0 : min(first + m * 16 + r + h * 8, c.queries - 1) * c.ms[2]);
                if (ROWS && MASK == 2 && c.pairs && step * KT + KT <= c.keys) {  // loads that nothing stands between
                    const u32* at = (const u32*)((const u16*)c.mask + line + step * KT + p);
                    #pragma unroll
                    for (int n = 0; n < KT / 8; ++n) raw[m][h][n] = at[n * 4];
                } else {
                    #pragma unroll
                    for (int n = 0; n < KT / 8; ++n) raw[m][h][n] = maskOf(c, line, step * KT + n * 8 + p);
                }
            }
    }
}

// Whether the mask leaves the scores of this warp's step as they are.
__device__ __forceinline__ bool isOpen(const Masks& raw) {
    u32 shut = 0;
    #pragma unroll
    for (int m = 0; m < (ROWS ? 1 : MT); ++m)
        #pragma unroll
        for (int h = 0; h < (ROWS ? 1 : 2); ++h)
            #pragma unroll
            for (int n = 0; n < KT / 8; ++n) shut |= MASK == 1 ? raw[m][h][n] ^ 0x10001 : raw[m][h][n] & 0x7fff7fff;
    return !__any_sync(~0u, shut);
}

// The scores of a step become weights; what was summed before shrinks to the new maximum. All maxima are to base 2. RAW: scores need
// nothing but the scale, which is then part of the exponent.
template <bool RAW>
__device__ __forceinline__ void weigh(Scores& s, Output& o, Rows& top, Rows& sum, const Attention& c, int step, int start, int first, int r, int p) {
    const float by = RAW ? c.scale * LOG2E : 1.f;
    if (step * KT + KT > c.keys || (CAUSAL && step * KT + KT > start)) {
        #pragma unroll
        for (int m = 0; m < MT; ++m)
            #pragma unroll
            for (int n = 0; n < KT / 8; ++n)
                #pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int key = step * KT + n * 8 + p + (i & 1);
                    if (key >= c.keys || (CAUSAL && key > first + m * 16 + r + (i >> 1) * 8)) s[m][n][i] = -INF;
                }
    }
    #pragma unroll
    for (int m = 0; m < MT; ++m)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            float best = -INF;
            #pragma unroll
            for (int n = 0; n < KT / 8; ++n) best = fmaxf(best, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
            best = fmaxf(top[m][h], best * by);
            const float used = best == -INF ? 0.f : best, shrink = exp2(top[m][h] - used);
            top[m][h] = best;
            float total = 0.f;
            #pragma unroll
            for (int n = 0; n < KT / 8; ++n)
                #pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& x = s[m][n][2 * h + i];
                    x = exp2(RAW ? x * by - used : x - used);
                    total += x;
                }
            sum[m][h] = sum[m][h] * shrink + total;
            #pragma unroll
            for (int n = 0; n < D / 8; ++n) o[m][n][2 * h] *= shrink, o[m][n][2 * h + 1] *= shrink;
        }
}

__device__ __forceinline__ void softmax(Scores& s, Output& o, Rows& top, Rows& sum, const Masks& raw, const Attention& c, int step, int start, int first, int r, int p) {
    if (PLAIN && (MASK == 0 || isOpen(raw))) return weigh<true>(s, o, top, sum, c, step, start, first, r, p);
    #pragma unroll
    for (int n = 0; n < KT / 8; ++n)
        #pragma unroll
        for (int m = 0; m < MT; ++m)
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const u32 both = MASK ? raw[ROWS ? 0 : m][ROWS ? 0 : h][n] : 0;
                #pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& x = s[m][n][2 * h + i];
                    x = CAP ? c.cap * LOG2E * tanhf(x * c.scale / c.cap) : x * (c.scale * LOG2E);
                    if (MASK == 1) x = (i ? both >> 16 : both & 1) ? x : c.fill;
                    if (MASK == 2) x += toBase2(widen(i ? both >> 16 : both & 0xffff));
                }
            }
    weigh<false>(s, o, top, sum, c, step, start, first, r, p);
}

__device__ __forceinline__ void begin(Output& o, Rows& top, Rows& sum) {
    #pragma unroll
    for (int m = 0; m < MT; ++m) {
        top[m][0] = top[m][1] = -INF, sum[m][0] = sum[m][1] = 0.f;
        #pragma unroll
        for (int n = 0; n < D / 8; ++n) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0.f;
    }
}

__device__ __forceinline__ void finish(const Output& o, const Rows& sum, const Attention& c, int batch, int head, int first, int r, int p) {
    u16* y = c.y + batch * c.ys[0] + head * c.ys[1];
    #pragma unroll
    for (int m = 0; m < MT; ++m)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            float l = sum[m][h];
            l += __shfl_xor_sync(~0u, l, 1);
            l += __shfl_xor_sync(~0u, l, 2);
            const int row = first + m * 16 + r + h * 8;
            if (row >= c.queries) continue;
            const bool blank = c.zero && !(l > 0.f);
            const float share = 1.f / l;  // no key: 0 * inf = NaN, as softmax of nothing but -inf
            #pragma unroll
            for (int n = 0; n < D / 8; ++n) *(u32*)(y + row * c.ys[2] + n * 8 + p) = blank ? 0 : pack(o[m][n][2 * h] * share, o[m][n][2 * h + 1] * share);
        }
}

#if !HOPPER
// --- any tensor cores: mma.sync, K and V by cp.async ---------------------------------------------------------------------------
#include "mma.cuh"
// Rows [first, first + KT) of a head, row pitch D + 8 elements; what lies past the end is zero.
__device__ __forceinline__ void fetch(u16* to, const u16* from, i64 stride, int first, int rows) {
    constexpr int CHUNKS = D / 8;
    for (int e = threadIdx.x; e < KT * CHUNKS; e += WARPS * 32) {
        const int row = e / CHUNKS, chunk = e % CHUNKS, there = first + row < rows ? 16 : 0;
        const u16* source = from + (there ? (first + row) * stride : 0) + chunk * 8;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared(to + row * (D + 8) + chunk * 8)), "l"(source), "r"(there));
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) attention(const __grid_constant__ Attention c) {
    constexpr int PITCH = D + 8, TILE = KT * PITCH;
    extern __shared__ u16 tiles[];  // K and V of this step, K and V of the next
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, head = blockIdx.y, batch = blockIdx.z;
    const int start = blockIdx.x * 16 * MT * WARPS, first = start + warp * 16 * MT, r = lane >> 2, p = (lane & 3) * 2;
    const u16* q = c.q + batch * c.qs[0] + head * c.qs[1];
    const u16* k = c.k + batch * c.ks[0] + head / c.group * c.ks[1];
    const u16* v = c.v + batch * c.vs[0] + head / c.group * c.vs[1];
    const i64 masks = MASK ? batch * c.ms[0] + head * c.ms[1] : 0;
    const int end = CAUSAL ? min(c.keys, start + 16 * MT * WARPS) : c.keys, steps = (end + KT - 1) / KT;
    letNextKernelStart();
    waitForPrecedingKernel();
    fetch(tiles, k, c.ks[2], 0, c.keys);
    fetch(tiles + TILE, v, c.vs[2], 0, c.keys);
    asm volatile("cp.async.commit_group;");
    u32 a[MT][D / 16][4];
    #pragma unroll
    for (int m = 0; m < MT; ++m)
        #pragma unroll
        for (int n = 0; n < D / 16; ++n)
            #pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = first + m * 16 + r + (i & 1) * 8;
                a[m][n][i] = row < c.queries ? *(const u32*)(q + row * c.qs[2] + n * 16 + p + (i >> 1) * 8) : 0;
            }
    Output o;
    Rows top, sum;
    begin(o, top, sum);
    for (int step = 0; step < steps; ++step) {
        u16* tile = tiles + (step & 1) * 2 * TILE;
        if (step + 1 < steps) {
            u16* next = tiles + (~step & 1) * 2 * TILE;
            fetch(next, k, c.ks[2], (step + 1) * KT, c.keys);
            fetch(next + TILE, v, c.vs[2], (step + 1) * KT, c.keys);
        }
        asm volatile("cp.async.commit_group;");
        Masks raw;
        readMask(raw, c, masks, step, first, r, p);
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncthreads();
        Scores s;
        #pragma unroll
        for (int m = 0; m < MT; ++m)
            #pragma unroll
            for (int n = 0; n < KT / 8; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.f;
        #pragma unroll
        for (int d = 0; d < D / 16; ++d)
            #pragma unroll
            for (int n = 0; n < KT / 8; n += 2) {
                u32 b[4];
                load(b, tile + (n * 8 + (lane >> 4) * 8 + (lane & 7)) * PITCH + d * 16 + (lane >> 3 & 1) * 8);
                #pragma unroll
                for (int m = 0; m < MT; ++m) multiply(s[m][n], a[m][d], b[0], b[1]), multiply(s[m][n + 1], a[m][d], b[2], b[3]);
            }
        softmax(s, o, top, sum, raw, c, step, start, first, r, p);
        #pragma unroll
        for (int t = 0; t < KT / 16; ++t) {
            u32 w[MT][4];
            #pragma unroll
            for (int m = 0; m < MT; ++m) {
                w[m][0] = pack(s[m][2 * t][0], s[m][2 * t][1]);
                w[m][1] = pack(s[m][2 * t][2], s[m][2 * t][3]);
                w[m][2] = pack(s[m][2 * t + 1][0], s[m][2 * t + 1][1]);
                w[m][3] = pack(s[m][2 * t + 1][2], s[m][2 * t + 1][3]);
            }
            #pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                u32 b[4];
                loadTransposed(b, tile + TILE + (t * 16 + (lane >> 3 & 1) * 8 + (lane & 7)) * PITCH + n * 8 + (lane >> 4) * 8);
                #pragma unroll
                for (int m = 0; m < MT; ++m) multiply(o[m][n], w[m], b[0], b[1]), multiply(o[m][n + 1], w[m], b[2], b[3]);
            }
        }
        __syncthreads();
    }
    finish(o, sum, c, batch, head, first, r, p);
}

#else
// --- Hopper: wgmma, K and V by TMA ------------------------------------------------------------------------------------------
// A block owns 128 queries of one head, 64 a warpgroup. Tiles lie as TMA swizzles them: rows of D elements (blocks of 64 elements for
// D 128), for the scores K-major, for the values transposed as they are read.
#include "hopper.cuh"
#define BLOCK (D < 64 ? D : 64)  // elements of a row that a box has
#define BLOCKS (D / BLOCK)
#define ROW (BLOCK * 2)          // bytes
#define STAGES 3

// Rows [row, row + rows) of a head, in blocks of BLOCK elements one after another.
__device__ __forceinline__ void fetch(u8* to, const TensorMap* map, u64* barrier, int rows, int row, int head, int batch) {
    #pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
        fetchBox(to + n * rows * ROW, map, barrier, n * BLOCK, row, head, batch);
}
WGMMA

extern "C" __global__ void __launch_bounds__(256, D > 64 ? 1 : 2)
    attention(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const __grid_constant__ Attention c) {
    constexpr int TILE = KT * D * 2;
    extern __shared__ u8 raw_[];
    u8* queries = (u8*)(((u64)raw_ + 1023) & ~1023ull);
    u8* tiles = queries + 128 * D * 2;  // K and V of each stage
    u64* full = (u64*)(tiles + STAGES * 2 * TILE);  // one for the queries, one a stage
    u64* empty = full + 1 + STAGES;
    const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31, head = blockIdx.y, batch = blockIdx.z;
    const int start = blockIdx.x * 128, first = start + group * 64 + warp * 16, r = lane >> 2, p = (lane & 3) * 2;
    const i64 masks = MASK ? batch * c.ms[0] + head * c.ms[1] : 0;
    const int end = CAUSAL ? min(c.keys, start + 128) : c.keys, steps = (end + KT - 1) / KT;
    if (threadIdx.x == 0) {
        prepare(&q), prepare(&k), prepare(&v);
        for (int s = 0; s <= STAGES; ++s) init(full + s, 1);
        for (int s = 0; s < STAGES; ++s) init(empty + s, 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    letNextKernelStart();
    waitForPrecedingKernel();
    auto load = [&](int step) {
        const int s = step % STAGES;
        if (step >= STAGES) wait(empty + s, (step / STAGES - 1) & 1);
        expect(full + 1 + s, 2 * TILE);
        fetch(tiles + s * 2 * TILE, &k, full + 1 + s, KT, step * KT, head / c.group, batch);
        fetch(tiles + s * 2 * TILE + TILE, &v, full + 1 + s, KT, step * KT, head / c.group, batch);
    };
    if (threadIdx.x == 0) {
        expect(full, 128 * D * 2);
        fetch(queries, &q, full, 128, start, head, batch);
        for (int step = 0; step < min(steps, STAGES - 1); ++step) load(step);
    }
    Output o;
    Rows top, sum;
    begin(o, top, sum);
    wait(full, 0);
    for (int step = 0; step < steps; ++step) {
        if (threadIdx.x == 0 && step + STAGES - 1 < steps) load(step + STAGES - 1);
        __syncwarp();
        Masks raw;
        readMask(raw, c, masks, step, first, r, p);
        const u8* tile = tiles + step % STAGES * 2 * TILE;
        wait(full + 1 + step % STAGES, (step / STAGES) & 1);
        Scores s;
        float(&flat)[KT / 2] = *(float(*)[KT / 2])s;
        #pragma unroll
        for (int n = 0; n < KT / 2; ++n) flat[n] = 0.f;
        wgmmaFence();
        #pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            const int block = n * 16 / BLOCK, inside = n * 16 % BLOCK * 2;
            Wgmma<KT>::add(flat, descriptor<ROW>(queries + block * 128 * ROW + group * 64 * ROW, 16) + (inside >> 4), descriptor<ROW>(tile + block * KT * ROW, 16) + (inside >> 4));
        }
        wgmmaCommit();
        wgmmaWait<0>();
        softmax(s, o, top, sum, raw, c, step, start, first, r, p);
        u32 w[KT / 16][4];
        #pragma unroll
        for (int t = 0; t < KT / 16; ++t) {
            w[t][0] = pack(s[0][2 * t][0], s[0][2 * t][1]);
            w[t][1] = pack(s[0][2 * t][2], s[0][2 * t][3]);
            w[t][2] = pack(s[0][2 * t + 1][0], s[0][2 * t + 1][1]);
            w[t][3] = pack(s[0][2 * t + 1][2], s[0][2 * t + 1][3]);
        }
        float(&out)[D / 2] = *(float(*)[D / 2])o;
        wgmmaFence();
        #pragma unroll
        for (int t = 0; t < KT / 16; ++t) Wgmma<D>::addTransposed(out, w[t], descriptor<ROW>(tile + TILE + t * 16 * ROW, KT * ROW));
        wgmmaCommit();
        wgmmaWait<0>();
        if (lane == 0) arrive(empty + step % STAGES);
    }
    finish(o, sum, c, batch, head, first, r, p);
}
#endif
