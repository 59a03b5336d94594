// Attention of packed new tokens over a paged cache, for Hopper (sm_90a): prompts, chunks of prompts and single tokens in one launch.
// Keys and values arrive by TMA, a page at a time; products by wgmma, softmax on the way in float32, float16 or bfloat16 in and out.
//
// A tile is SPAN tokens of one sequence by the PACK query heads that share a key head: WGS warpgroups of 64 rows. Blocks stay on
// their multiprocessor and take tile after tile, those with most keys first: one warp fetches, the others multiply, one warpgroup
// while another computes its softmax. Steps of KT keys, from the last to the first, so that only the first ones need the causal mask.
// Constants: D the head size, PAGE positions of a cache block, KT, WGS, STAGES, PACK; CAP 1 for a soft cap.
// Source: Shah et al., FlashAttention-3 (2024).
#include "overlap.cuh"
#include "sixteen.cuh"
#include "hopper.cuh"
typedef long long i64;

struct Prefill {
    u16* y;
    const int *tables, *starts, *lengths;
    i64 head, token;               // strides of y, in elements
    int tokens, batch, columns;    // columns of the block tables
    int slices, share;             // parts of PACK heads, and how many of them have the same key head
    int window;                    // keys that a query sees at most
    float by, squash;              // scores * by are to base 2; CAP: tanh(scores * squash) * by
};
// What a block does next: `tokens` tokens from `token`, the first of them at `position`, over the steps [first, end) of a sequence
// of `length` keys; nothing is left where `tokens` is 0.
struct Tile { int token, tokens, position, length, sequence, slice, first, end; };

#define INF __int_as_float(0x7f800000)
#define LOG2E 1.44269504f
#define ROWS (64 * WGS)
#define SPAN (ROWS / PACK)
#define BLOCK (D % 64 ? 32 : 64)  // elements of a row that a box has
#define ROW (BLOCK * 2)           // bytes
#define BOX ((PAGE | KT) & -(PAGE | KT))  // positions that a box has: what divides both, 16 at least
#define AHEAD (D > 128 ? 1 : 2)   // tiles whose queries are in shared memory
#define BOXES (KT / BOX * (D / BLOCK))
__device__ __forceinline__ float tanh(float x) {  // within 1e-6
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.f + exp2(x * (2.f * LOG2E))));
    return 1.f - 2.f * y;
}
WGMMA

// --- which tile ---------------------------------------------------------------------------------------------------------
// Sequence `batch` is what lies behind the last one: tokens without keys, which become zeros.
struct Sequence { int start, tokens, length; };
__device__ __forceinline__ Sequence sequenceOf(const Prefill& c, int b) {
    const int start = c.starts[b], end = b < c.batch ? c.starts[b + 1] : c.tokens;
    return {start, end - start, b < c.batch ? c.lengths[b] : 0};
}
// The tiles of a sequence whose keys reach into step `step` - 1 or further: its last ones.
__device__ __forceinline__ int tilesFrom(const Sequence& s, int step) {
    const int tiles = (s.tokens + SPAN - 1) / SPAN;
    if (step <= 0) return tiles;
    const int keys = (step - 1) * KT;
    return s.length <= keys ? 0 : tiles - max(0, keys - s.length + s.tokens) / SPAN;
}

// What a lane of the fetching warp knows of the batch: one sequence, and how far any tile of all reaches.
struct Batch { Sequence mine; int tiles, steps; };
__device__ __forceinline__ int tilesOfAll(const Prefill& c, const Sequence& mine, int step) {
    const int lane = threadIdx.x & 31;
    int count = lane <= c.batch ? tilesFrom(mine, step) : 0;
    #pragma unroll 1
    for (int b = lane + 32; b <= c.batch; b += 32) count += tilesFrom(sequenceOf(c, b), step);
    return (int)__reduce_add_sync(~0u, (u32)count);
}
__device__ __forceinline__ Batch survey(const Prefill& c) {
    const int lane = threadIdx.x & 31;
    const Sequence mine = sequenceOf(c, min(lane, c.batch));
    int longest = mine.length;
    #pragma unroll 1
    for (int b = lane + 32; b < c.batch; b += 32) longest = max(longest, c.lengths[b]);
    longest = __reduce_max_sync(~0u, longest);
    return {mine, tilesOfAll(c, mine, 0), min((longest + KT - 1) / KT, (c.window + SPAN) / KT + 2)};  // a window makes a tile its steps and two long at most
}
// Writes the index-th of all tiles, the ones with most keys first, where `to` is. One warp does it together.
__device__ __forceinline__ void find(const Prefill& c, const Batch& all, int index, Tile* to) {
    const int lane = threadIdx.x & 31;
    int rank = index / c.slices;
    if (rank >= all.tiles) {
        if (lane == 0) to->tokens = to->first = to->end = 0;
        return __syncwarp();
    }
    int low = 0, high = all.steps + 1, further = 0;  // `low` becomes the last step that more than `rank` tiles reach
    while (high - low > 1) {
        const int middle = (low + high) / 2, count = tilesOfAll(c, all.mine, middle);
        if (count > rank) low = middle;
        else high = middle, further = count;
    }
    rank -= further;
    for (int b = lane;; b += 32) {
        const Sequence s = b == lane ? all.mine : sequenceOf(c, min(b, c.batch));
        const int reach = tilesFrom(s, low), count = b > c.batch ? 0 : further ? reach - tilesFrom(s, high) : reach;
        int sum = count;
        #pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const int left = __shfl_up_sync(~0u, sum, o);
            if (lane >= o) sum += left;
        }
        if (sum > rank && sum - count <= rank) {
            const int place = (tilesFrom(s, 0) - reach + rank - (sum - count)) * SPAN, tokens = min(SPAN, s.tokens - place), position = s.length - s.tokens + place;
            *to = {s.start + place, tokens, position, s.length, b, index % c.slices, max(0, position - c.window + 1) / KT, (max(0, position + tokens) + KT - 1) / KT};
        }
        if (__any_sync(~0u, sum > rank)) return __syncwarp();
        rank -= __shfl_sync(~0u, sum, 31);
    }
}

// --- products and softmax -------------------------------------------------------------------------------------------------
// A thread has the columns 8 n + p and 8 n + p + 1 of the rows r and r + 8 of its warp's 16: element 4 n + 2 (row) + (column).
using Scores = float[KT / 2];
using Output = float[D / 2];
template <int N> __device__ __forceinline__ void hold(float (&d)[N]) {  // the compiler may not look at them before
    #pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
__device__ __forceinline__ void score(Scores& s, u64 queries, u64 keys) {
    wgmmaFence();
    #pragma unroll
    for (int n = 0; n < D / 16; ++n) {
        const int block = n * 16 / BLOCK, inside = n * 16 % BLOCK * 2;
        const u64 a = queries + ((block * ROWS * ROW + inside) >> 4), b = keys + ((block * KT * ROW + inside) >> 4);
        if (n == 0) Wgmma<KT>::set(s, a, b);
        else Wgmma<KT>::add(s, a, b);
    }
    wgmmaCommit();
}
__device__ __forceinline__ void weigh(Output& o, const u32 (&w)[KT / 16][4], u64 values) {
    wgmmaFence();
    #pragma unroll
    for (int n = 0; n < KT / 16; ++n) Wgmma<D>::addTransposed(o, w[n], values + (n * 16 * ROW >> 4));
    wgmmaCommit();
}
// The maximum that weights are taken to, to base 2, is an old one while the new one is not above it by more than LEAP: weights are
// up to 2^LEAP then, and what was summed before needs no shrinking.
#define LEAP 8.f
// Scores become weights, not divided by their sum; `shrink` is what everything before is to be multiplied by. `distance` is from the
// first of the keys to the query in row r, `further` from there to the one in row r + 8.
__device__ __forceinline__ void softmax(Scores& s, float (&top)[2], float (&sum)[2], float (&shrink)[2], const Prefill& c, bool masked, int distance, int further, int p) {
    if (CAP) {
        #pragma unroll
        for (int i = 0; i < KT / 2; ++i) s[i] = tanh(s[i] * c.squash);
    }
    if (masked) {
        #pragma unroll
        for (int i = 0; i < KT / 2; ++i)
            if ((u32)(distance + (i & 2 ? further : 0) - (i / 4 * 8 + p + (i & 1))) >= (u32)c.window) s[i] = -INF;
    }
    #pragma unroll
    for (int h = 0; h < 2; ++h) {
        float best = fmaxf(s[2 * h], s[2 * h + 1]), other = fmaxf(s[4 + 2 * h], s[5 + 2 * h]);
        #pragma unroll
        for (int i = 8; i < KT / 2; i += 8) {
            best = fmaxf(best, fmaxf(s[i + 2 * h], s[i + 2 * h + 1]));
            other = fmaxf(other, fmaxf(s[i + 4 + 2 * h], s[i + 5 + 2 * h]));
        }
        best = fmaxf(best, other);
        best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
        best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
        best *= c.by;
        if (best - top[h] <= LEAP) best = top[h];
        const float used = best == -INF ? 0.f : best;
        shrink[h] = exp2(top[h] - used);
        top[h] = best;
        float total = 0.f, more = 0.f;
        #pragma unroll
        for (int i = 0; i < KT / 2; i += 4) {
            s[i + 2 * h] = exp2(s[i + 2 * h] * c.by - used), total += s[i + 2 * h];
            s[i + 2 * h + 1] = exp2(s[i + 2 * h + 1] * c.by - used), more += s[i + 2 * h + 1];
        }
        sum[h] = sum[h] * shrink[h] + (total + more);
    }
}
__device__ __forceinline__ void round(u32 (&w)[KT / 16][4], const Scores& s) {
    #pragma unroll
    for (int i = 0; i < KT / 4; ++i) w[i / 4][i % 4] = pack(s[2 * i], s[2 * i + 1]);
}

// --- the kernel -----------------------------------------------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(128 * (WGS + 1), 1)
    prefill(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const __grid_constant__ Prefill c) {
    constexpr int TILE = KT * D * 2, QUERIES = ROWS * D * 2;
    static_assert(BOXES <= 32 && BOX % 16 == 0 && SPAN > 0 && D % 32 == 0, "a lane has a box");
    extern __shared__ u8 raw[];
    u8* queries = (u8*)(((u64)raw + 1023) & ~1023ull);
    u8* keys = queries + AHEAD * QUERIES;
    u8* values = keys + STAGES * TILE;
    u64 *given = (u64*)(values + STAGES * TILE), *taken = given + AHEAD;  // a tile and its queries
    u64 *keysFull = taken + AHEAD, *keysEmpty = keysFull + STAGES, *valuesFull = keysEmpty + STAGES, *valuesEmpty = valuesFull + STAGES;
    Tile* tiles = (Tile*)(valuesEmpty + STAGES);  // AHEAD of them with queries, and the one that is looked for
    const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    if (threadIdx.x == 0) {
        prepare(&q), prepare(&k), prepare(&v);
        for (int s = 0; s < AHEAD; ++s) init(given + s, 1), init(taken + s, 4 * WGS);
        for (int s = 0; s < STAGES; ++s) init(keysFull + s, 1), init(keysEmpty + s, 4 * WGS), init(valuesFull + s, 1), init(valuesEmpty + s, 4 * WGS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    letNextKernelStart();
    waitForPrecedingKernel();
    if (group == WGS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WGS == 2 ? 56 : 32));
        if (warp == 0) {
            const int column = lane % (D / BLOCK) * BLOCK, key = lane / (D / BLOCK) * BOX, place = lane % (D / BLOCK) * KT * ROW + key * ROW;
            const Batch all = survey(c);
            int i = 0;
            for (int turn = 0;; ++turn) {  // every other turn backwards: who had more to do has less now
                const Tile& t = tiles[turn % (AHEAD + 1)];
                const int slot = turn % AHEAD;
                find(c, all, turn * gridDim.x + (turn & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x), tiles + turn % (AHEAD + 1));
                if (turn >= AHEAD) wait(taken + slot, (turn / AHEAD - 1) & 1);
                const int first = t.first, end = t.end, length = t.length, head = t.slice / c.share;
                if (lane == 0 && first < end) {
                    expect(given + slot, SPAN * PACK * D * 2);
                    #pragma unroll
                    for (int n = 0; n < D / BLOCK; ++n) fetchBox(queries + slot * QUERIES + n * ROWS * ROW, &q, given + slot, n * BLOCK, t.slice * PACK, t.token);
                } else if (lane == 0) arrive(given + slot);
                __syncwarp();
                if (t.tokens == 0) break;
                const int* table = c.tables + (i64)t.sequence * c.columns;
                auto load = [&](u8* to, const TensorMap* map, u64* full, u64* empty, int at, int step, int block) {
                    const int s = at % STAGES;
                    if (at >= STAGES) wait(empty + s, (at / STAGES - 1) & 1);
                    if (lane == 0) expect(full + s, TILE);
                    __syncwarp();
                    if (lane < BOXES) fetchBox(to + s * TILE + place, map, full + s, column, head, (step * KT + key) % PAGE, block);
                    __syncwarp();
                };
                for (int step = end, block = 0; step >= first && end; --step) {  // the keys of the next step, then the values of this one
                    const int now = block, next = step - 1;
                    if (next >= first) {  // where no key is: outside of the cache, which is read as zeros
                        block = lane < BOXES && next * KT + key < length ? table[(next * KT + key) / PAGE] : -1;
                        load(keys, &k, keysFull, keysEmpty, i, next, block);
                    }
                    if (step < end) load(values, &v, valuesFull, valuesEmpty, i - 1, step, now);
                    if (next >= first) ++i;
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WGS == 2 ? 224 : 160));
        const int r = warp * 16 + (lane >> 2) + group * 64, p = (lane & 3) * 2, further = (r + 8) / PACK - r / PACK;
        auto release = [&](u64* barrier) {
            if (lane == 0) arrive(barrier);
        };
        // Warpgroups take turns at the tensor cores: barrier 1 + n lets the n-th issue its products.
        auto myTurn = [&]() { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); };
        auto yourTurn = [&]() { asm volatile("bar.arrive %0, 256;" ::"r"(1 + (group + 1 == WGS ? 0 : group + 1)) : "memory"); };
        if (group == 0) asm volatile("bar.arrive 1, 256;" ::: "memory");
        int i = 0;
        for (int turn = 0;; ++turn) {
            const int slot = turn % AHEAD;
            wait(given + slot, turn / AHEAD & 1);
            const Tile t = tiles[turn % (AHEAD + 1)];
            if (t.tokens == 0) break;
            float top[2] = {-INF, -INF}, sum[2] = {0.f, 0.f}, shrink[2];
            Output o;
            #pragma unroll
            for (int n = 0; n < D / 2; ++n) o[n] = 0.f;
            if (t.first < t.end) {
                Scores s;
                u32 w[KT / 16][4];
                auto weights = [&](int step) {
                    const int begin = step * KT;
                    softmax(s, top, sum, shrink, c, begin + KT - 1 > t.position || begin <= t.position + SPAN - 1 - c.window, t.position + r / PACK - begin, further, p);
                };
                const u64 query = descriptor<ROW>(queries + slot * QUERIES + group * 64 * ROW, 16);
                int step = t.end - 1;
                wait(keysFull + i % STAGES, i / STAGES & 1);
                score(s, query, descriptor<ROW>(keys + i % STAGES * TILE, 16));
                wgmmaWait<0>();
                hold(s);
                release(keysEmpty + i % STAGES);
                if (step == t.first) release(taken + slot);
                weights(step);
                round(w, s);
                // What a page holds past the end of its sequence is anything, and 0 * NaN is no 0.
                const int last = t.length - step * KT, rest = (last + BOX - 1) / BOX * BOX - last;
                if (last < KT && rest) {
                    wait(valuesFull + i % STAGES, i / STAGES & 1);
                    for (int e = threadIdx.x & 127; e < rest * (D / 8); e += 128) {
                        const int row = last + e / (D / 8), chunk = e % (D / 8);
                        *(uint4*)(values + i % STAGES * TILE + (chunk / (BLOCK / 8) * KT + row) * ROW + chunk % (BLOCK / 8) * 16) = uint4{0, 0, 0, 0};
                    }
                    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                    asm volatile("bar.sync %0, 128;" ::"r"(1 + WGS + group) : "memory");
                }
                for (--step; step >= t.first; --step, ++i) {
                    const int now = i % STAGES, coming = (i + 1) % STAGES;
                    wait(keysFull + coming, (i + 1) / STAGES & 1);
                    myTurn();
                    score(s, query, descriptor<ROW>(keys + coming * TILE, 16));
                    wait(valuesFull + now, i / STAGES & 1);
                    weigh(o, w, descriptor<ROW>(values + now * TILE, KT * ROW));
                    yourTurn();
                    wgmmaWait<1>();
                    hold(s);
                    release(keysEmpty + coming);
                    if (step == t.first) release(taken + slot);
                    weights(step);
                    if (sum[0] < 0.f || sum[1] < 0.f) __trap();  // never: without a use of it here, ptxas puts the softmax off until the product is there
                    wgmmaWait<0>();
                    hold(o);
                    release(valuesEmpty + now);
                    if (__any_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f)) {
                        #pragma unroll
                        for (int n = 0; n < D / 2; ++n) o[n] *= shrink[n >> 1 & 1];
                    }
                    round(w, s);
                }
                wait(valuesFull + i % STAGES, i / STAGES & 1);
                weigh(o, w, descriptor<ROW>(values + i % STAGES * TILE, KT * ROW));
                wgmmaWait<0>();
                hold(o);
                release(valuesEmpty + i % STAGES);
                ++i;
            } else {
                __syncwarp();  // all lanes have read what to do
                release(taken + slot);
            }
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                float total = sum[h];
                total += __shfl_xor_sync(~0u, total, 1);
                total += __shfl_xor_sync(~0u, total, 2);
                const float part = total > 0.f ? 1.f / total : 0.f;  // who sees no key gets zeros
                const int row = r + 8 * h, token = row / PACK;
                u16* y = c.y + (t.token + token) * c.token + (t.slice * PACK + row % PACK) * c.head + (lane & 3) * 8;
                #pragma unroll
                for (int n = 0; n < D / 32; ++n) {  // 32 columns at a time
                    u32 out[4];
                    #pragma unroll
                    for (int m = 0; m < 4; ++m) out[m] = pack(o[(n * 4 + m) * 4 + 2 * h] * part, o[(n * 4 + m) * 4 + 2 * h + 1] * part);
                    transpose(out);
                    if (token < t.tokens) *(uint4*)(y + n * 32) = uint4{out[0], out[1], out[2], out[3]};
                }
            }
        }
    }
}
