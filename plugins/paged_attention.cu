// Attention of new tokens over a paged cache. `decode`: 16-bit floats, tensor cores; it stores the new keys and values, too. `store` and
// `plain`: any of float16, bfloat16, float32, token by token, in two launches.
// Constants: D and E elements of a key and a value, S positions of a block, REPEATS query heads of a key head, KVHEADS; CAP 1 for a soft cap; WINDOW 1
// for a window; those of rotation.cuh. For `decode`: WARPS, STAGES tiles of a warp under way, FRESH 1 if the new keys are not in the cache yet, LEAST tiles
// that a block takes, EARLY 1 if the preceding kernels write nothing but q, k, v, and angles, CLUSTER blocks of a head of a token, 0 if all work is divided.
// Source: Dao et al., Flash-Decoding (2023); Osama et al., Stream-K (2023), for the division of the work.
#include "overlap.cuh"
#include "sixteen.cuh"
#include "rotation.cuh"
typedef long long i64;
#define INF __int_as_float(0x7f800000)
#define LOG2E 1.44269504f

struct Paged {
    const scalar *q, *k, *v, *cos, *sin;
    const weight *qScale, *kScale;
    scalar *y, *keys, *values, *turnedQ;
    const int *slots, *tables, *starts, *lengths;
    float* parts;
    int* arrived;
    i64 qs[2], ks[2], vs[2], ys[2], ts[2];  // strides of head and token, in elements; of the queries that `store` writes
    i64 angles;                             // from token to token
    int tokens, sequences, width, blocks, window;
    float scale, cap, epsilon;
};

// The keys that a token sees: positions [first, last] of its sequence, those from `fresh` on new in this step. last < 0: none.
struct Seen {
    int sequence, first, last, fresh;
};
__device__ __forceinline__ Seen seenBy(const Paged& c, int t) {
    int b = min(t, c.sequences - 1), begin = 0, end = 0, length = 0;
    if (b >= 0) begin = c.starts[b], end = c.starts[b + 1], length = c.lengths[b];
    if (b >= 0 && (t < begin || t >= end)) {  // more often than not, sequence t has token t
        int low = 0, high = c.sequences;
        while (low < high) {
            const int middle = (low + high) >> 1;
            if (c.starts[middle + 1] <= t) low = middle + 1; else high = middle;
        }
        b = low < c.sequences && c.starts[low] <= t ? low : -1;
        if (b >= 0) begin = c.starts[b], end = c.starts[b + 1], length = c.lengths[b];
    }
    if (b < 0) return {0, 0, -1, 0};
    const int last = length - (end - t);
    return {b, WINDOW ? max(0, last - c.window + 1) : 0, last, max(0, length - (end - begin))};
}
__device__ __forceinline__ int slotOf(const Paged& c, int sequence, int position) {
    const int block = c.tables[(i64)sequence * c.width + min(position / S, c.width - 1)];
    return min(max(block, 0), c.blocks - 1) * S + position % S;
}
__device__ __forceinline__ float score(const Paged& c, float x) {  // to base 2
    return CAP ? c.cap * LOG2E * tanhf(x * c.scale / c.cap) : x * (c.scale * LOG2E);
}
__device__ __forceinline__ Row queryOf(const Paged& c, int t, int head) {
    return {c.q + head * c.qs[0] + t * c.qs[1], c.cos + t * c.angles, c.sin + t * c.angles, c.qScale};
}
__device__ __forceinline__ Row keyOf(const Paged& c, int t, int g) {
    return {c.k + g * c.ks[0] + t * c.ks[1], c.cos + t * c.angles, c.sin + t * c.angles, c.kScale};
}

// --- token by token ---------------------------------------------------------------------------------------------------------------
// Keys, turned, and values into the caches, turned queries beside: a warp a row.
extern "C" __global__ void __launch_bounds__(128) store(const __grid_constant__ Paged c) {
    const int t = blockIdx.x, row = blockIdx.y * 4 + (threadIdx.x >> 5), lane = threadIdx.x & 31, queries = ROTARY || NORM ? KVHEADS * REPEATS : 0;
    letNextKernelStart();
    waitForPrecedingKernel();
    if (row < queries) {
        const Row from = queryOf(c, t, row);
        const float by = factor<D>(from, c.epsilon);
        scalar* to = c.turnedQ + row * c.ts[0] + t * c.ts[1];
        for (int i = lane * PIECE; i < D; i += 32 * PIECE) *(Piece*)(to + i) = turnedPiece(from, by, i);
        return;
    }
    const int g = (row - queries) >> 1, slot = c.slots[t];
    if (g >= KVHEADS || slot < 0 || slot >= c.blocks * S) return;
    if ((row - queries) & 1) {
        const scalar* from = c.v + g * c.vs[0] + t * c.vs[1];
        for (int i = lane * PIECE; i < E; i += 32 * PIECE) *(Piece*)(c.values + ((i64)slot * KVHEADS + g) * E + i) = pieceAt(from + i);
        return;
    }
    const Row from = keyOf(c, t, g);
    const float by = factor<D>(from, c.epsilon);
    for (int i = lane * PIECE; i < D; i += 32 * PIECE) *(Piece*)(c.keys + ((i64)slot * KVHEADS + g) * D + i) = turnedPiece(from, by, i);
}

template <bool MAX>
__device__ __forceinline__ float overAll(float v, float* room) {
    #pragma unroll
    for (int o = 16; o; o >>= 1) {
        const float other = __shfl_xor_sync(~0u, v, o);
        v = MAX ? fmaxf(v, other) : v + other;
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = v;
    __syncthreads();
    v = room[0];
    for (int i = 1; i < 4; ++i) v = MAX ? fmaxf(v, room[i]) : v + room[i];
    return v;
}

// One head of one token a block, everything from the caches; q is turned already.
extern "C" __global__ void __launch_bounds__(128) plain(const __grid_constant__ Paged c) {
    __shared__ float query[D], weights[128], room[4];
    __shared__ int places[128];
    const int t = blockIdx.x, head = blockIdx.y, g = head / REPEATS, at = threadIdx.x;
    letNextKernelStart();
    waitForPrecedingKernel();
    const Seen seen = seenBy(c, t);
    for (int i = at; i < D; i += 128) query[i] = widen(c.q[head * c.qs[0] + t * c.qs[1] + i]);
    __syncthreads();
    float top = -INF, sum = 0.f, out[(E + 127) / 128] = {};
    for (int first = seen.first; first <= seen.last; first += 128) {
        const int count = min(128, seen.last - first + 1);
        float x = -INF;
        if (at < count) {
            places[at] = slotOf(c, seen.sequence, first + at);
            const scalar* key = c.keys + ((i64)places[at] * KVHEADS + g) * D;
            float dot = 0.f;
            for (int i = 0; i < D; ++i) dot += query[i] * widen(key[i]);
            x = score(c, dot);
        }
        const float best = fmaxf(top, overAll<true>(x, room)), used = best == -INF ? 0.f : best, shrink = exp2f(top - used), weight = exp2f(x - used);
        top = best;
        sum = sum * shrink + weight;
        weights[at] = weight;
        __syncthreads();
        #pragma unroll
        for (int n = 0; n < (E + 127) / 128; ++n) {
            const int i = at + n * 128;
            out[n] *= shrink;
            for (int j = 0; i < E && j < count; ++j) out[n] += weights[j] * widen(c.values[((i64)places[j] * KVHEADS + g) * E + i]);
        }
        __syncthreads();
    }
    sum = overAll<false>(sum, room);
    for (int n = 0; n < (E + 127) / 128; ++n)
        if (at + n * 128 < E) c.y[head * c.ys[0] + t * c.ys[1] + at + n * 128] = narrow(seen.last < 0 ? 0.f : out[n] / sum);
}

#if !FLOAT32
// --- all tokens of a few sequences at once -------------------------------------------------------------------------------------------
// The work is tiles of 16 positions, in the order of tokens, key heads, positions; each block takes as many of them in a row, so none waits for another
// however ragged the lengths are. In a block each warp takes every WARPS-th tile. Query heads of one key head are the rows of a product. Where several
// blocks share a token's head, each leaves its part, and the last one puts them together. With CLUSTER, for few texts, so many blocks have a head of a
// token for themselves, and put their parts together without a way through the L2 cache.
#include "mma.cuh"
#include "cluster.cuh"
#define UP(N) (((N) + 15) / 16 * 16)
#define KPITCH (UP(D) + 8)  // elements from row to row: 8 rows of 16 bytes lie in different banks
#define VPITCH (UP(E) + 8)
#define OPITCH (UP(E) + 8)
#define TILE (16 * (KPITCH + VPITCH))
#define GROUPS ((REPEATS + 15) / 16)  // of up to 16 query heads
#define HEADS (KVHEADS * GROUPS)
#define ROWS (REPEATS < 16 ? REPEATS : 16)
#define PART (ROWS * (E + 4))  // floats: sums, then the maximum and the total of each row
#define HELD (UP(D) <= 128)    // whether queries stay in registers

__device__ __forceinline__ int tilesOf(const Seen& seen) { return seen.last < 0 ? 1 : seen.last / 16 - seen.first / 16 + 1; }

// What `parts` blocks have of four columns of a row; `read` gives the maximum and total, and the sums, of the n-th.
template <typename Read>
__device__ __forceinline__ float4 join(int parts, float& all, Read read) {
    float best = -INF;
    float4 v = {0.f, 0.f, 0.f, 0.f};
    all = 0.f;
    for (int n = 0; n < parts; n += 8) {
        float2 state[8];
        float4 x[8];
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            state[i] = {-INF, 0.f}, x[i] = {0.f, 0.f, 0.f, 0.f};
            if (n + i < parts) read(n + i, state[i], x[i]);
        }
        float now = best;
        #pragma unroll
        for (int i = 0; i < 8; ++i) now = fmaxf(now, state[i].x);
        const float shrink = best == -INF ? 0.f : exp2(best - now);
        best = now;
        all *= shrink, v.x *= shrink, v.y *= shrink, v.z *= shrink, v.w *= shrink;
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float by = state[i].x == -INF ? 0.f : exp2(state[i].x - now);
            all += by * state[i].y;
            v.x += by * x[i].x, v.y += by * x[i].y, v.z += by * x[i].z, v.w += by * x[i].w;
        }
    }
    return v;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) decode(const __grid_constant__ Paged c) {
    extern __shared__ uint4 raw[];
    u16* queries = (u16*)raw;
    auto tops = (float(*)[16])(queries + 16 * KPITCH + WARPS * STAGES * TILE), sums = tops + WARPS;
    float* kept = (float*)(sums + WARPS);  // this block's part for its cluster
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, r = lane >> 2, p = (lane & 3) * 2;
    u16* mine = queries + 16 * KPITCH + warp * STAGES * TILE;
    float* output = (float*)mine;  // when the tiles are done with
    letNextKernelStart();
    if (!EARLY) waitForPrecedingKernel();

#if !CLUSTER
    // What all tokens need, and the share of this block: tiles [begin, end).
    i64 total = 0;
    int longest = 1, own = 0;
    for (int t = lane; t < c.tokens; t += 32) {
        const int n = tilesOf(seenBy(c, t));
        if (t < 32) own = n;
        total += n, longest = max(longest, n);
    }
    #pragma unroll
    for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(~0u, total, o), longest = max(longest, __shfl_xor_sync(~0u, longest, o));
    total *= HEADS;
    i64 share = max((i64)LEAST, (total + gridDim.x - 1) / gridDim.x);
    const i64 even = share >= longest ? (share + longest - 1) / longest * longest : (longest + longest / share - 1) / (longest / share);
    if (even * 8 <= share * 9) share = even;  // whole heads, or equal parts of one
    i64 begin = blockIdx.x * share;
    const i64 end = min(total, begin + share);
    if (begin >= end) return;
    int token = 0;
    i64 before = 0;  // tiles of the tokens before, of one head
    for (int t = lane;; t += 32) {
        const int n = t < 32 ? own : t < c.tokens ? tilesOf(seenBy(c, t)) : 0;
        int upTo = n;
        #pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            const int other = __shfl_up_sync(~0u, upTo, o);
            if (lane >= o) upTo += other;
        }
        const u32 beyond = __ballot_sync(~0u, (before + upTo) * HEADS > begin);
        if (beyond) {
            const int which = __ffs(beyond) - 1;
            token = t - lane + which;
            before += __shfl_sync(~0u, upTo - n, which);
            break;
        }
        before += __shfl_sync(~0u, upTo, 31);
    }
#endif

    // Columns that no copy fills.
    if (UP(D) != D)
        for (int e = lane; e < STAGES * 16; e += 32) *(uint4*)(mine + e / 16 * TILE + e % 16 * KPITCH + D) = uint4{0, 0, 0, 0};
    for (int e = threadIdx.x; e < 16 * KPITCH / 8; e += WARPS * 32) raw[e] = uint4{0, 0, 0, 0};
    __syncthreads();
    bool waited = !EARLY;

#if CLUSTER
    const int token = blockIdx.y / HEADS, head = blockIdx.y % HEADS;
    {
        const Seen seen = seenBy(c, token);
        const int tiles = tilesOf(seen), share = tiles <= WARPS ? tiles : (tiles + CLUSTER - 1) / CLUSTER, from = min((int)blockIdx.x * share, tiles), to = min(from + share, tiles);
        const bool alone = share == tiles;
        if (alone && blockIdx.x) return;  // a short text: the first block has it for itself
#else
    while (begin < end) {
        const Seen seen = seenBy(c, token);
        const int tiles = tilesOf(seen), head = (int)(begin - before * HEADS) / tiles;
        const i64 start = before * HEADS + (i64)head * tiles;
        const int from = (int)(begin - start), to = (int)min((i64)tiles, end - start);
#endif
        const int g = head / GROUPS, group = head % GROUPS, rows = min(16, REPEATS - group * 16), low = seen.first / 16;
        const int count = seen.last < 0 || from + warp >= to ? 0 : (to - from - warp + WARPS - 1) / WARPS;  // tiles of this warp
        const bool ends = seen.last < 0 ? warp == 0 && from == 0 && to == 1 : count > 0 && from + warp + (count - 1) * WARPS == tiles - 1;  // it has the token's own position
        const u16 *keys = c.keys + g * D, *values = c.values + g * E;

        int known = 0;  // block of this warp's tile of number `lane`, of the 32 at hand
        auto fetch = [&](int n) {
            u16* tile = mine + n % STAGES * TILE;
            if (n < count) {
                const int position = (low + from + warp + n * WARPS) * 16;
                int slot;
                if (S % 16 == 0) {
                    if (n % 32 == 0) known = n + lane < count ? slotOf(c, seen.sequence, position + lane * WARPS * 16) : 0;
                    slot = __shfl_sync(~0u, known, n % 32);
                } else
                    slot = slotOf(c, seen.sequence, min(position + (lane & 15), seen.last));
                #pragma unroll
                for (int first = 0; first < 16 * D / 8; first += 32) {
                    const int row = (first + lane) / (D / 8), chunk = (first + lane) % (D / 8), at = S % 16 == 0 ? slot + row : __shfl_sync(~0u, slot, row & 15);
                    const u16* source = keys + (i64)at * (KVHEADS * D) + chunk * 8;
                    if (row < 16) copy(tile + row * KPITCH + chunk * 8, source, position + row >= seen.first && position + row <= seen.last);
                }
                #pragma unroll
                for (int first = 0; first < 16 * E / 8; first += 32) {
                    const int row = (first + lane) / (E / 8), chunk = (first + lane) % (E / 8), at = S % 16 == 0 ? slot + row : __shfl_sync(~0u, slot, row & 15);
                    const u16* source = values + (i64)at * (KVHEADS * E) + chunk * 8;
                    if (row < 16) copy(tile + 16 * KPITCH + row * VPITCH + chunk * 8, source, position + row >= seen.first && position + row <= seen.last);
                }
            }
            closeGroup();
        };
        #pragma unroll
        for (int n = 0; n < STAGES - 1; ++n) fetch(n);
        if (!waited) waitForPrecedingKernel();
        waited = true;

        // The token's own key and value, to the cache and kept for its tile.
        u32 ownKey[(D + 63) / 64], ownValue[(E + 63) / 64];
        bool replace = false;
        if (FRESH && ends) {
            const int slot = c.slots[token];
            const bool stored = group == 0 && slot >= 0 && slot < c.blocks * S;
            replace = seen.last >= 0 && slot >= 0 && slot == slotOf(c, seen.sequence, seen.last);
            const Row row = keyOf(c, token, g);
            const float by = factor<D>(row, c.epsilon);
            #pragma unroll
            for (int n = 0; n < (D + 63) / 64; ++n) {
                const int i = n * 64 + lane * 2;
                if (i < D) {
                    ownKey[n] = pack(turned(row, by, i), turned(row, by, i + 1));
                    if (stored) *(u32*)(c.keys + ((i64)slot * KVHEADS + g) * D + i) = ownKey[n];
                }
            }
            #pragma unroll
            for (int n = 0; n < (E + 63) / 64; ++n) {
                const int i = n * 64 + lane * 2;
                if (i < E) {
                    ownValue[n] = *(const u32*)(c.v + g * c.vs[0] + token * c.vs[1] + i);
                    if (stored) *(u32*)(c.values + ((i64)slot * KVHEADS + g) * E + i) = ownValue[n];
                }
            }
        }
        for (int row = warp; row < rows; row += WARPS) {
            const Row query = queryOf(c, token, g * REPEATS + group * 16 + row);
            const float by = factor<D>(query, c.epsilon);
            for (int i = lane * 2; i < D; i += 64) *(u32*)(queries + row * KPITCH + i) = pack(turned(query, by, i), turned(query, by, i + 1));
        }
        __syncthreads();
        u32 a[HELD ? UP(D) / 16 : 1][4];
        const u16* fragments = queries + ((lane & 7) + (lane >> 3 & 1) * 8) * KPITCH + (lane >> 4) * 8;
        if (HELD)
            #pragma unroll
            for (int d = 0; d < UP(D) / 16; ++d) load(a[HELD ? d : 0], fragments + d * 16);
        float o[UP(E) / 8][4], top[2] = {-INF, -INF}, sum[2] = {0.f, 0.f};
        #pragma unroll
        for (int n = 0; n < UP(E) / 8; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.f;

        for (int n = 0; n < count; ++n) {
            waitForGroups<STAGES - 2>();
            __syncwarp();
            fetch(n + STAGES - 1);
            u16 *tile = mine + n % STAGES * TILE, *value = tile + 16 * KPITCH;
            const int position = (low + from + warp + n * WARPS) * 16;
            if (FRESH && position + 15 >= seen.fresh) {
                for (int other = max(position, seen.fresh); other <= min(position + 15, seen.last); ++other) {
                    u16 *key = tile + (other - position) * KPITCH, *itsValue = value + (other - position) * VPITCH;
                    if (other == seen.last && replace) {
                        #pragma unroll
                        for (int m = 0; m < (D + 63) / 64; ++m)
                            if (m * 64 + lane * 2 < D) *(u32*)(key + m * 64 + lane * 2) = ownKey[m];
                        #pragma unroll
                        for (int m = 0; m < (E + 63) / 64; ++m)
                            if (m * 64 + lane * 2 < E) *(u32*)(itsValue + m * 64 + lane * 2) = ownValue[m];
                    }
                    const int t = token - (seen.last - other);  // another new token of the sequence
                    if (other == seen.last || c.slots[t] < 0 || c.slots[t] != slotOf(c, seen.sequence, other)) continue;
                    const Row row = keyOf(c, t, g);
                    const float by = factor<D>(row, c.epsilon);
                    for (int i = lane; i < D; i += 32) key[i] = narrow(turned(row, by, i));
                    for (int i = lane; i < E; i += 32) itsValue[i] = c.v[g * c.vs[0] + t * c.vs[1] + i];
                }
                __syncwarp();
            }
            float s[2][4] = {};
            #pragma unroll
            for (int d = 0; d < UP(D) / 16; ++d) {
                u32 b[4];
                load(b, tile + ((lane >> 4) * 8 + (lane & 7)) * KPITCH + d * 16 + (lane >> 3 & 1) * 8);
                if (!HELD) load(a[0], fragments + d * 16);
                multiply(s[0], a[HELD ? d : 0], b[0], b[1]), multiply(s[1], a[HELD ? d : 0], b[2], b[3]);
            }
            const bool whole = position >= seen.first && position + 15 <= seen.last;
            float best[2] = {-INF, -INF};
            #pragma unroll
            for (int m = 0; m < 2; ++m)
                #pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int at = position + m * 8 + p + (i & 1);
                    s[m][i] = whole || (at >= seen.first && at <= seen.last) ? score(c, s[m][i]) : -INF;
                    best[i >> 1] = fmaxf(best[i >> 1], s[m][i]);
                }
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 1));
                best[h] = fmaxf(fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 2)), top[h]);
            }
            if (__any_sync(~0u, best[0] > top[0] || best[1] > top[1])) {
                #pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float shrink = top[h] == -INF ? 0.f : exp2(top[h] - best[h]);
                    top[h] = best[h];
                    sum[h] *= shrink;
                    #pragma unroll
                    for (int m = 0; m < UP(E) / 8; ++m) o[m][2 * h] *= shrink, o[m][2 * h + 1] *= shrink;
                }
            }
            #pragma unroll
            for (int m = 0; m < 2; ++m)
                #pragma unroll
                for (int i = 0; i < 4; ++i) {
                    s[m][i] = s[m][i] == -INF ? 0.f : exp2(s[m][i] - top[i >> 1]);
                    sum[i >> 1] += s[m][i];
                }
            const u32 weights[4] = {pack(s[0][0], s[0][1]), pack(s[0][2], s[0][3]), pack(s[1][0], s[1][1]), pack(s[1][2], s[1][3])};
            #pragma unroll
            for (int m = 0; m < UP(E) / 8; m += 2) {
                u32 b[4];
                loadTransposed(b, value + ((lane >> 3 & 1) * 8 + (lane & 7)) * VPITCH + m * 8 + (lane >> 4) * 8);
                multiply(o[m], weights, b[0], b[1]), multiply(o[m + 1], weights, b[2], b[3]);
            }
        }

        // The warps' sums together: over the tiles, which nobody needs any more.
        waitForGroups<0>();
        __syncwarp();
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
            sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
            if (r + 8 * h >= rows) continue;
            if ((lane & 3) == 0) tops[warp][r + 8 * h] = top[h], sums[warp][r + 8 * h] = sum[h];
            #pragma unroll
            for (int n = 0; n < UP(E) / 8; ++n) *(float2*)(output + (r + 8 * h) * OPITCH + n * 8 + p) = float2{o[n][2 * h], o[n][2 * h + 1]};
        }
        __syncthreads();
#if CLUSTER
        float* part = kept;
#else
        const bool alone = from == 0 && to == tiles;
        float* part = c.parts + (i64)(blockIdx.x * 2 + (blockIdx.x * share < start)) * PART;
#endif
        auto give = [&](int row, int column, float4 v, float all) {
            const float by = all > 0.f || all != all ? 1.f / all : 0.f;  // no key: 0; NaN stays NaN
            *(uint2*)(c.y + (g * REPEATS + group * 16 + row) * c.ys[0] + token * c.ys[1] + column) = uint2{pack(v.x * by, v.y * by), pack(v.z * by, v.w * by)};
        };
        for (int e = threadIdx.x; e < rows * (E / 4); e += WARPS * 32) {
            const int row = e / (E / 4), column = e % (E / 4) * 4;
            float best = -INF, all = 0.f;
            #pragma unroll
            for (int w = 0; w < WARPS; ++w) best = fmaxf(best, tops[w][row]);
            float4 v = {0.f, 0.f, 0.f, 0.f};
            #pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float by = tops[w][row] == -INF ? 0.f : exp2(tops[w][row] - best);
                const float4 x = *(const float4*)((const float*)(queries + 16 * KPITCH + w * STAGES * TILE) + row * OPITCH + column);
                all += by * sums[w][row];
                v.x += by * x.x, v.y += by * x.y, v.z += by * x.z, v.w += by * x.w;
            }
            if (alone) {
                give(row, column, v, all);
                continue;
            }
            *(float4*)(part + row * E + column) = v;
            if (column == 0) *(float2*)(part + ROWS * E + row * 2) = float2{best, all};
        }
#if CLUSTER
        if (alone) return;
        clusterSync();
        const int each = (rows * (E / 4) + CLUSTER - 1) / CLUSTER;
        for (int i = threadIdx.x; i < each; i += WARPS * 32) {
            const int e = blockIdx.x * each + i, row = e / (E / 4), column = e % (E / 4) * 4;
            if (row >= rows) break;
            float all;
            const float4 v = join(CLUSTER, all, [&](int block, float2& state, float4& x) {
                state = remote((const float2*)(kept + ROWS * E + row * 2), block), x = remote((const float4*)(kept + row * E + column), block);
            });
            give(row, column, v, all);
        }
        __syncwarp();
        clusterSync();  // until all have read
    }
#else
        if (!alone) {
            __threadfence();
            __syncthreads();
            const i64 firstBlock = start / share;
            const int parts = (int)((start + tiles - 1) / share - firstBlock) + 1;
            int *arrived = c.arrived + (i64)token * HEADS + head, &lastOne = *(int*)kept;
            if (threadIdx.x == 0) {
                lastOne = atomicAdd(arrived, 1) == parts - 1;
                if (lastOne) *arrived = 0;  // for the next launch
            }
            __syncthreads();
            if (lastOne) {
                __threadfence();
                for (int e = threadIdx.x; e < rows * (E / 4); e += WARPS * 32) {
                    const int row = e / (E / 4), column = e % (E / 4) * 4;
                    float all;
                    const float4 v = join(parts, all, [&](int n, float2& state, float4& x) {
                        const i64 block = firstBlock + n;
                        const float* other = c.parts + (block * 2 + (block * share < start)) * PART;
                        state = __ldcg((const float2*)(other + ROWS * E + row * 2)), x = __ldcg((const float4*)(other + row * E + column));
                    });
                    give(row, column, v, all);
                }
            }
        }
        __syncthreads();  // before the next tiles come, and the next queries
        if (UP(D) != D)
            for (int e = lane; e < STAGES * 16; e += 32) *(uint4*)(mine + e / 16 * TILE + e % 16 * KPITCH + D) = uint4{0, 0, 0, 0};
        begin = start + to;
        if (to == tiles && head == HEADS - 1) before += tiles, ++token;
    }
#endif
}
#endif
