// The next token of each row of logits [N, V], float32 or 16 bits: what runtime/sampling.py does, in its order, for Hopper (sm_90).
//
// A cluster of blocks shares a row. Each block keeps its part in shared memory: first the logits, then, once the largest is known,
// how far below it each one is after the temperature, its *depth*; infinite, where the token is excluded.
//
//   restrictions   top-k, top-p and typical-p keep what comes first in an order until it weighs enough, and all that equals the
//                  last of these. So each is an edge of a number, which is found by a histogram of weights over all blocks, its
//                  bin's elements, and if those are few (FEW) comparing each with each; else by another histogram within that
//                  bin, down to a single number. Where few tokens are left, one block goes on with a list of them.
//   sums           of weights are whole numbers, exp(-depth) times a power of 2, so that no result depends on the order of adding,
//                  and none on how many blocks share a row; those of a histogram fit into 32 bits.
//   draw           the largest of -depth - log(E), with Philox4x32-10 (docs/generation.md). Tokens whose random bits cannot win
//                  against the best of the block so far need no logarithm.
//
// Then one block writes the token and its record, and counts it, so that the next launch draws the next token of the same row.
// THREADS a block (a power of 2), HEAD bytes of shared memory before the logits, LOGITS: 32 or 16 bits.
#include "overlap.cuh"
#include "sixteen.cuh"
#include "cluster.cuh"

#ifndef FEW
#define FEW 512
#define BINS 1024
#endif
#define INFINITE __int_as_float(0x7f800000)
#define LARGEST_FLOAT __int_as_float(0x7f7fffff)
constexpr u32 WARPS = THREADS / 32, NONE = ~0u, MOST_RANKS = 8, MOST_LOGPROBS = 64;

// ROW in runtime/cuda_sampling.py.
struct Row {
    double topP, typicalP;
    int* history;  // the tokens in order
    int2* seen;    // each token of interest once: token, how often it was generated
    const int2* bias;
    const int* words;  // where each begins and its length, then the tokens
    const int* stops;
    const u32* mask;
    u32* record;   // steps done; `stride` words on, the token of the first step, and so on
    u32* chances;  // of each step the token's log-probability, and the likeliest tokens with theirs
    float* out;
    u64 seed;
    u32 index, length, prompt, choice, step, steps, topK, ngram, minNew, seenCount, biasCount, wordCount, stopCount;
    int logprobs;
    float temperature, minP, repetition, presence, frequency;
    u32 dead, stride, unused;
};

struct Shared {
    Row row;
    u32 histogram[2][BINS];  // used in turn
    u64 warp[2][32], block[2][2], top[MOST_LOGPROBS];
    u32 count, edgeCount, keptCount, bound, foundBin, foundBefore;
    // Lists: of all that may stay, of those at the edge, of all blocks' edges, and of what one block goes on with.
    float value[FEW], edgeDepth[FEW], depth[FEW], kept[FEW];
    u32 token[FEW], edgeWeight[FEW], weight[FEW], keptToken[FEW];
};
static_assert(sizeof(Shared) <= HEAD && sizeof(Row) == 184, "cuda_sampling.py says otherwise");
static_assert(MOST_RANKS * MOST_LOGPROBS * 8 <= sizeof(Shared::histogram) || FEW < 512, "likeliest tokens of all blocks lie there");

struct Team { u32 ranks, rank, page, turn; };
struct Part { float* line; const u32* tokens; u32 first, size; };  // token i is tokens[i], or without a list first + i

extern __shared__ __align__(16) u8 memory[];
__device__ __forceinline__ Shared& common() { return *(Shared*)memory; }
__device__ __forceinline__ u32 lane() { return threadIdx.x & 31; }
__device__ __forceinline__ bool finite(float v) { return fabsf(v) < INFINITE; }
__device__ __forceinline__ void meet(const Team& team) {
    if (team.ranks == 1) return __syncthreads();
    clusterArrive();
    clusterWait();
}

// Numbers in the order of floats, -0 as 0, and what is no number above all.
__device__ __forceinline__ u32 order(float v) {
    const u32 bits = __float_as_uint(v + 0.f);
    return v != v ? NONE : bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unorder(u32 o) { return __uint_as_float(o >> 31 ? o & 0x7fffffffu : ~o); }
__device__ __forceinline__ u64 key(float v, u32 token) { return (u64)order(v) << 32 | (u32)~token; }  // of equal values the lowest token is the largest
__device__ __forceinline__ float valueOf(u64 key) { return unorder((u32)(key >> 32)); }
__device__ __forceinline__ u32 tokenOf(u64 key) { return ~(u32)key; }

// --- sums and maxima ------------------------------------------------------------------------------------------------------
template <bool LARGEST> __device__ __forceinline__ u64 joined(u64 a, u64 b) { return LARGEST ? (a > b ? a : b) : a + b; }
template <bool LARGEST> __device__ __forceinline__ u64 overLanes(u64 v, int width = 32) {
    for (int o = width / 2; o; o >>= 1) v = joined<LARGEST>(v, __shfl_xor_sync(~0u, v, o));
    return v;
}
// Of all threads of the block, for all of them. Another one may come after a barrier.
template <bool LARGEST, int N> __device__ __forceinline__ void overBlock(u64 (&v)[N]) {
    #pragma unroll
    for (int n = 0; n < N; ++n) {
        v[n] = overLanes<LARGEST>(v[n]);
        if (lane() == 0) common().warp[n][threadIdx.x >> 5] = v[n];
    }
    __syncthreads();
    #pragma unroll
    for (int n = 0; n < N; ++n) v[n] = overLanes<LARGEST>(lane() < WARPS ? common().warp[n][lane()] : 0);
}
template <bool LARGEST, int N> __device__ __forceinline__ void overCluster(Team& team, u64 (&v)[N]) {
    overBlock<LARGEST>(v);
    if (team.ranks == 1) return __syncthreads();
    u64* mine = common().block[team.turn];
    team.turn ^= 1;  // so that nobody overwrites what others still read
    if (threadIdx.x == 0)
        for (int n = 0; n < N; ++n) mine[n] = v[n];
    meet(team);
    #pragma unroll
    for (int n = 0; n < N; ++n) {
        v[n] = overLanes<LARGEST>(lane() < team.ranks ? remote(mine + n, lane()) : 0, MOST_RANKS);
        v[n] = __shfl_sync(~0u, v[n], 0);
    }
}

// --- lists ------------------------------------------------------------------------------------------------------------------
// A place in a list for each thread that wants one. All threads of a warp call it; `full`: the list was too short, and is lost.
__device__ __forceinline__ u32 slot(bool wanted, u32* count, bool& full) {
    if (full) return NONE;
    const u32 who = __ballot_sync(~0u, wanted);
    if (!who) return NONE;
    u32 start = 0;
    if (lane() == 0) start = atomicAdd(count, __popc(who));
    start = __shfl_sync(~0u, start, 0);
    full = start >= FEW;
    const u32 place = start + __popc(who & ((1u << lane()) - 1));
    return wanted && place < FEW ? place : NONE;
}
// The lists of all blocks, one after the other: `end` in the lane of a rank is where its own ends.
struct Lists {
    u32 end, total;
    __device__ __forceinline__ Lists(const Team& team, const u32* count) {
        end = lane() < team.ranks ? remote(count, lane()) : 0;
        for (u32 o = 1; o < MOST_RANKS; o *= 2) {
            const u32 before = __shfl_up_sync(~0u, end, o);
            if (lane() >= o) end += before;
        }
        total = __shfl_sync(~0u, end, team.ranks - 1);
    }
    // The rank that has place i, which becomes the place in its own list. All threads of a warp call it.
    __device__ __forceinline__ u32 find(const Team& team, u32& i) const {
        u32 rank = 0, start = 0;
        for (u32 r = 0; r + 1 < team.ranks; ++r) {
            const u32 e = __shfl_sync(~0u, end, r);
            if (i >= e) rank = r + 1, start = e;
        }
        i -= start;
        return rank;
    }
};

// --- restrictions -------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ float asFloat(const u32* p, u32 rank) { return __uint_as_float(remote(p, rank)); }

// The edge among the candidates in `depth` and `weight`: the largest depth that less than `target` comes before.
__device__ __forceinline__ float edgeOfFew(u32 size, u32 before, u32 target) {
    const Shared& c = common();
    if (!size) return LARGEST_FLOAT;  // all of them weigh less
    u32 width = 1;
    while (width < size) width *= 2;
    const u32 split = min(32u, max(1u, THREADS / width));  // so many threads share a candidate
    u64 edge[1] = {0};
    for (u32 from = 0; from < size; from += THREADS / split) {
        const u32 i = from + threadIdx.x / split;
        const float mine = i < size ? c.depth[i] : 0.f;
        u32 sum = 0;
        if (i < size) {
            #pragma unroll 4
            for (u32 j = threadIdx.x % split; j < size; j += split) sum += c.depth[j] < mine ? c.weight[j] : 0;
        }
        for (u32 o = 1; o < split; o *= 2) sum += __shfl_xor_sync(~0u, sum, o);
        if (i < size && before + sum < target) edge[0] = max(edge[0], (u64)__float_as_uint(mine));
    }
    overBlock<true>(edge);
    __syncthreads();
    return __uint_as_float((u32)edge[0]);
}

// Adds up the bins of all blocks and notes the one in which `target` is reached, and what is before it. Returns the sum of all.
__device__ __forceinline__ u32 findBin(const Team& team, const u32* histogram, u32 before, u32 target) {
    Shared& c = common();
    constexpr u32 PER = (BINS + THREADS - 1) / THREADS;
    u32 sums[PER], all = 0;
    #pragma unroll
    for (u32 n = 0; n < PER; ++n) {
        const u32 bin = threadIdx.x * PER + n;
        sums[n] = 0;
        #pragma unroll (THREADS < 1024 ? 4 : 8)
        for (u32 r = 0; r < MOST_RANKS; ++r) {  // a rank may be asked again, so that no question waits for an answer
            const u32 v = remote(histogram + min(bin, BINS - 1u), min(r, team.ranks - 1));
            sums[n] += r < team.ranks && bin < BINS ? v : 0;
        }
        all += sums[n];
    }
    u32 until = all;  // inclusive
    for (u32 o = 1; o < 32; o *= 2) {
        const u32 left = __shfl_up_sync(~0u, until, o);
        if (lane() >= o) until += left;
    }
    if (lane() == 31) c.warp[0][threadIdx.x >> 5] = until;
    __syncthreads();
    const u64 warps = lane() < WARPS ? c.warp[0][lane()] : 0;
    const u32 whole = before + (u32)overLanes<false>(warps);
    u32 at = before + (u32)overLanes<false>(lane() < threadIdx.x >> 5 ? warps : 0) + until - all;
    #pragma unroll
    for (u32 n = 0; n < PER; ++n) {
        if (at < target && target <= at + sums[n]) c.foundBin = threadIdx.x * PER + n, c.foundBefore = at;
        at += sums[n];
    }
    if (threadIdx.x == 0) c.count = c.edgeCount = 0;
    __syncthreads();
    return whole;
}

struct Four {
    float each[4];
    __device__ __forceinline__ Four() : each{INFINITE, INFINITE, INFINITE, INFINITE} {}
    __device__ __forceinline__ Four(const float* line, u32 group) {
        const float4 v = ((const float4*)line)[group];
        each[0] = v.x, each[1] = v.y, each[2] = v.z, each[3] = v.w;
    }
};

// The edge in all blocks: the largest depth that less than `target` comes before. `reach`: where it is expected at most; the bins are
// chosen by it, and not the result. `few`: the lists of all blocks hold all that is within the edge. COUNT: all weigh 1.
template <bool COUNT, class Depth, class Weight>
__device__ __forceinline__ float findEdge(Team& team, const Part& part, u32 target, float reach, Depth depth, Weight weight, bool& few) {
    Shared& c = common();
    if (team.ranks == 1 && part.size <= FEW) {
        __syncthreads();
        for (u32 i = threadIdx.x; i < part.size; i += THREADS) c.depth[i] = depth(part.line[i]), c.weight[i] = COUNT ? 1 : weight(part.line[i]);
        __syncthreads();
        return edgeOfFew(part.size, 0, target);
    }
    const float scale = BINS / fmaxf(reach, 1e-30f);
    u32 before = 0, bin = NONE, low = 0, high = __float_as_uint(LARGEST_FLOAT);
    for (bool first = true;; first = false) {
        u32* histogram = c.histogram[team.page];
        team.page ^= 1;
        for (u32 i = threadIdx.x; i < BINS; i += THREADS) histogram[i] = 0;
        if (threadIdx.x == 0) c.foundBin = NONE;
        __syncthreads();
        u32 shift = 0;
        while ((high - low) >> shift >= BINS) ++shift;
        for (u32 g = threadIdx.x; g < part.size / 4; g += THREADS) {
            const Four v(part.line, g);
            #pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const float d = depth(v.each[j]), at = d * scale;
                u32 b = __float2uint_rz(at);
                if (first) {
                    if (!(at < BINS - 1)) continue;  // beyond reach, as most of them, perhaps
                } else {
                    const u32 bits = __float_as_uint(d);
                    if (min(b, BINS - 1u) != bin || bits < low || bits > high) continue;
                    b = (bits - low) >> shift;
                }
                atomicAdd(histogram + b, COUNT ? 1 : weight(v.each[j]));
            }
        }
        meet(team);
        const u32 whole = findBin(team, histogram, before, target);
        const u32 found = c.foundBin;
        if (first) {
            bin = found == NONE ? BINS - 1 : found;
            before = found == NONE ? whole : c.foundBefore;
            low = __float_as_uint(bin / scale * 0.99999f);
            if (bin < BINS - 1) high = min(high, __float_as_uint((bin + 1) / scale * 1.00001f));
        } else {
            if (found == NONE) return LARGEST_FLOAT;  // all of them weigh less
            before = c.foundBefore;
            low += found << shift;
            high = min(high, low + (1u << shift) - 1);
            if (shift == 0) return __uint_as_float(low);
        }
        bool full = false, edgeFull = false;
        for (u32 from = 0; from < part.size / 4; from += THREADS) {
            const Four v = from + threadIdx.x < part.size / 4 ? Four(part.line, from + threadIdx.x) : Four();
            bool near = false;
            #pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const float d = depth(v.each[j]);
                near |= d <= __uint_as_float(high) && (!full || d >= __uint_as_float(low));
            }
            if (!__any_sync(~0u, near)) continue;
            #pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const float d = depth(v.each[j]);
                const u32 b = min(__float2uint_rz(d * scale), BINS - 1u), bits = __float_as_uint(d);
                const bool inside = b < bin || (b == bin && bits <= high), edge = b == bin && bits >= low && bits <= high;
                u32 place = slot(inside, &c.count, full);
                if (place != NONE) c.value[place] = v.each[j], c.token[place] = part.first + 4 * (from + threadIdx.x) + j;
                place = slot(edge, &c.edgeCount, edgeFull);
                if (place != NONE) c.edgeDepth[place] = d, c.edgeWeight[place] = COUNT ? 1 : weight(v.each[j]);
            }
        }
        meet(team);
        const Lists all(team, &c.count), edges(team, &c.edgeCount);
        few = all.total <= FEW;
        if (edges.total > FEW) continue;
        for (u32 from = 0; from < edges.total; from += THREADS) {
            u32 i = from + threadIdx.x;
            const u32 rank = edges.find(team, i);
            if (from + threadIdx.x >= edges.total) continue;
            c.depth[from + threadIdx.x] = asFloat((const u32*)c.edgeDepth + i, rank);
            c.weight[from + threadIdx.x] = remote(c.edgeWeight + i, rank);
        }
        __syncthreads();
        return edgeOfFew(edges.total, before, target);
    }
}

// Excludes what is beyond the edge. False: another block goes on with the few that are left, and this one is done.
template <bool COUNT, class Depth, class Weight>
__device__ __forceinline__ bool restrictTo(Team& team, Part& part, u32 target, float reach, Depth depth, Weight weight) {
    Shared& c = common();
    bool few = false;
    const float edge = findEdge<COUNT>(team, part, target, reach, depth, weight, few);
    if (!few) {
        for (u32 i = threadIdx.x; i < part.size; i += THREADS)
            if (!(depth(part.line[i]) <= edge)) part.line[i] = INFINITE;
        return true;
    }
    if (team.rank == 0) {
        const Lists all(team, &c.count);
        if (threadIdx.x == 0) c.keptCount = 0;
        __syncthreads();
        bool full = false;
        for (u32 from = 0; from < all.total; from += THREADS) {
            u32 i = from + threadIdx.x;
            const bool there = i < all.total;
            const u32 rank = all.find(team, i);
            const float v = there ? asFloat((const u32*)c.value + i, rank) : INFINITE;
            const u32 place = slot(there && depth(v) <= edge, &c.keptCount, full);
            if (place != NONE) c.kept[place] = v, c.keptToken[place] = remote(c.token + i, rank);
        }
    }
    meet(team);  // nobody leaves while its lists are read
    if (team.rank) return false;
    team.ranks = 1;
    part = {c.kept, c.keptToken, 0, c.keptCount};
    return true;
}

// --- logits -----------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ float logitAt(const void* logits, u64 i) {
#if LOGITS == 32
    return ((const float*)logits)[i];
#else
    return widen(((const u16*)logits)[i]);
#endif
}
// Four logits from place i of a row that begins at `start`; -inf where the row, or the block's part, has ended.
__device__ __forceinline__ float4 four(const void* logits, u64 start, u32 i, u32 end, bool aligned) {
    if (aligned && i + 4 <= end) {
#if LOGITS == 32
        return *(const float4*)((const float*)logits + start + i);
#else
        const uint2 raw = *(const uint2*)((const u16*)logits + start + i);
        const float2 a = unpack(raw.x), b = unpack(raw.y);
        return make_float4(a.x, a.y, b.x, b.y);
#endif
    }
    float v[4];
    #pragma unroll
    for (u32 j = 0; j < 4; ++j) v[j] = i + j < end ? logitAt(logits, start + i + j) : -INFINITE;
    return make_float4(v[0], v[1], v[2], v[3]);
}

// Everything before the temperature, on tokens first to first + count.
__device__ __forceinline__ void change(const Row& row, float* line, u32 first, u32 count) {
    for (u32 i = threadIdx.x; i < row.biasCount; i += THREADS) {
        const int2 e = row.bias[i];
        const u32 at = e.x - first;
        if (at < count) line[at] = __fadd_rn(line[at], __int_as_float(e.y));
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < row.seenCount; i += THREADS) {
        const int2 e = __ldcg(row.seen + i);
        const u32 at = e.x - first;
        if (at >= count) continue;
        float v = line[at];
        if (row.repetition != 1.f) v = v < 0.f ? __fmul_rn(v, row.repetition) : __fdiv_rn(v, row.repetition);
        if (e.y) v = __fsub_rn(v, __fadd_rn(row.presence, __fmul_rn(row.frequency, (float)e.y)));
        line[at] = v;
    }
    __syncthreads();
    const u32 length = row.length;
    const auto ban = [&](int token) {
        if ((u32)token - first < count) line[(u32)token - first] = -INFINITE;
    };
    if (row.ngram && length >= row.ngram) {
        const u32 last = row.ngram - 1;
        for (u32 i = threadIdx.x; i + last < length; i += THREADS) {
            u32 j = last;
            while (j && __ldcg(row.history + i + j - 1) == __ldcg(row.history + length - last + j - 1)) --j;
            if (!j) ban(__ldcg(row.history + i + last));
        }
    }
    for (u32 i = threadIdx.x; i < row.wordCount; i += THREADS) {
        const int* word = row.words + row.words[2 * i];
        u32 j = row.words[2 * i + 1] - 1;
        const u32 last = j;
        if (last > length) continue;
        while (j && word[j - 1] == __ldcg(row.history + length - last + j - 1)) --j;
        if (!j) ban(word[last]);
    }
    if (length - row.prompt < row.minNew)
        for (u32 i = threadIdx.x; i < row.stopCount; i += THREADS) ban(row.stops[i]);
    __syncthreads();
}
__device__ __forceinline__ bool allowed(const Row& row, u32 token) { return row.mask[token >> 5] >> (token & 31) & 1; }

// The largest of a part, with its token; what is no number counts as the largest.
__device__ __forceinline__ u64 best(const float* line, u32 first, u32 count) {
    u64 found = 0;
    for (u32 i = threadIdx.x; i < count; i += THREADS) found = max(found, key(line[i], first + i));
    return found;
}

// --- draws ------------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ uint4 philox(u32 a, u32 b, u32 c, u64 seed) {
    u32 d = 0, k = (u32)seed, m = (u32)(seed >> 32);
    #pragma unroll
    for (int n = 0; n < 10; ++n) {
        const u64 x = (u64)a * 0xD2511F53u, y = (u64)c * 0xCD9E8D57u;
        a = (u32)(y >> 32) ^ b ^ k, b = (u32)y, c = (u32)(x >> 32) ^ d ^ m, d = (u32)x;
        k += 0x9E3779B9u, m += 0xBB67AE85u;
    }
    return make_uint4(a, b, c, d);
}
// What the noise -log(E) of a word is at most; the smaller the word, the more.
__device__ __forceinline__ float most(u32 word) { return 0.6932f * (__clz(word) + 1) + 1e-4f; }
__device__ __forceinline__ void tryToken(float depth, u32 token, u32 word, u64& winner) {
    if (!finite(depth) || order(most(word) - depth) < *(volatile u32*)&common().bound) return;
    const float v = fminf(__fmul_rn(__fadd_rn(__uint2float_rn(word), 0.5f), 0x1p-32f), 0x1.fffffep-1f);
    const u64 mine = key(__fsub_rn(-depth, logf(-log1pf(-v))), token);
    if (mine <= winner) return;
    winner = mine;
    atomicMax(&common().bound, (u32)(mine >> 32));
}
__device__ __forceinline__ u64 draw(const Row& row, const Part& part) {
    u64 winner = 0;
    const u32 length = row.length, choice = row.choice;
    const u64 seed = row.seed;
    if (part.tokens) {
        for (u32 i = threadIdx.x; i < part.size; i += THREADS) {
            const u32 token = part.tokens[i];
            const uint4 w = philox(token / 4, length, choice, seed);
            tryToken(part.line[i], token, token & 2 ? (token & 1 ? w.w : w.z) : (token & 1 ? w.y : w.x), winner);
        }
        return winner;
    }
    for (u32 g = threadIdx.x; g < part.size / 4; g += THREADS) {
        const float4 d = ((const float4*)part.line)[g];
        // 22.9: the largest noise there is
        const float nearest = fminf(fminf(d.x, d.y), fminf(d.z, d.w));
        if (!finite(nearest) || order(22.9f - nearest) < *(volatile u32*)&common().bound) continue;
        const u32 token = part.first + 4 * g;
        const uint4 w = philox(token / 4, length, choice, seed);
        if (order(most(min(min(w.x, w.y), min(w.z, w.w))) - nearest) < *(volatile u32*)&common().bound) continue;
        tryToken(d.x, token, w.x, winner);
        tryToken(d.y, token + 1, w.y, winner);
        tryToken(d.z, token + 2, w.z, winner);
        tryToken(d.w, token + 3, w.w, winner);
    }
    return winner;
}

// What is recorded of this step.
__device__ __forceinline__ u32* recorded(const Row& row) { return row.record + (row.step + 1) * row.stride; }
__device__ __forceinline__ u32* chances(const Row& row) { return row.chances + row.step * (1 + 2 * row.logprobs); }

// --- the end of a row, in one block -------------------------------------------------------------------------------------------------
// token: NONE, if there is none.
__device__ __forceinline__ void finish(Row* global, void* tokens, bool wide, u32 token, float logprob) {
    const Row& row = common().row;
    if (threadIdx.x == 0) {
        const u32 fed = token == NONE ? 0 : token;
        if (wide) ((long long*)tokens)[blockIdx.y] = fed;
        else ((int*)tokens)[blockIdx.y] = fed;
        *recorded(row) = token;
        if (row.chances) *chances(row) = __float_as_uint(logprob);
        row.record[0] = global->step = row.step + 1;
        if (token == NONE) global->dead = 1;
        else global->length = row.length + 1;
        if (token != NONE && row.history) row.history[row.length] = token;
    }
    if (!row.seen || token == NONE) return;
    bool found = false;
    for (u32 i = threadIdx.x; i < row.seenCount; i += THREADS) {
        const int2 e = __ldcg(row.seen + i);
        if (e.x != (int)token) continue;
        row.seen[i].y = e.y + 1;
        found = true;
    }
    if (__syncthreads_or(found) || threadIdx.x) return;
    row.seen[row.seenCount] = make_int2(token, 1);
    global->seenCount = row.seenCount + 1;
}

extern "C" __global__ void __launch_bounds__(THREADS) choose(const void* logits, void* tokens, Row* rows, int vocabulary, int partSize, int wide) {
    letNextKernelStart();
    waitForPrecedingKernel();
    Shared& c = common();
    Row* global = rows + blockIdx.y;
    for (u32 i = threadIdx.x; i < sizeof(Row) / 4; i += THREADS) ((u32*)&c.row)[i] = __ldcg((const u32*)global + i);
    if (threadIdx.x == 0) c.bound = 0;
    __syncthreads();
    const Row& row = c.row;
    if (!row.steps) return;
    if (row.dead || row.step >= row.steps) {
        if (blockIdx.x || threadIdx.x) return;
        if (row.step < row.steps) *recorded(row) = NONE;
        row.record[0] = global->step = row.step + 1;
        return;
    }
    Team team{gridDim.x, blockIdx.x, 0, 0};
    const u32 first = team.rank * partSize, count = max(0, min(partSize, vocabulary - (int)first)), size = (count + 3) / 4 * 4;
    float* line = (float*)(memory + HEAD);
    const bool changed = row.bias || row.seen || row.ngram || row.wordCount || row.stopCount || row.mask;
    const bool model = row.logprobs >= 0 || row.out;
    const bool plain = row.temperature == 0.f && !changed && !model;

    // The part of this block, and the largest in it.
    const u64 start = (u64)row.index * vocabulary;
    const bool aligned = vocabulary % 4 == 0 && (u64)logits % 16 == 0;
    float top = -INFINITE;
    u32 at = NONE;
    bool wrong = false;
    for (u32 from = threadIdx.x; from < size / 4; from += 4 * THREADS) {
        float4 v[4];
        #pragma unroll
        for (u32 k = 0; k < 4; ++k) v[k] = four(logits, start + first, 4 * (from + k * THREADS), count, aligned);
        #pragma unroll
        for (u32 k = 0; k < 4; ++k) {
            const u32 i = 4 * (from + k * THREADS);
            if (i >= size) break;
            if (!plain) *(float4*)(line + i) = v[k];
            const float each[4] = {v[k].x, v[k].y, v[k].z, v[k].w};
            #pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                if (each[j] > top) top = each[j], at = first + i + j;
                wrong |= each[j] != each[j];
            }
        }
    }
    u64 winner[1] = {wrong ? (u64)NONE << 32 : key(top, at)};

    // Log-probabilities of the model itself: of all tokens to `out`, or of the chosen and the likeliest ones.
    float highest = 0.f, logTotal = 0.f;
    if (model) {
        u64 whole[1] = {winner[0]};
        overCluster<true>(team, whole);
        highest = valueOf(whole[0]);
        whole[0] = 0;
        if (finite(highest))
            for (u32 i = threadIdx.x; i < size; i += THREADS) whole[0] += __float2ull_rn(expf(line[i] - highest) * 0x1p40f);
        overCluster<false>(team, whole);
        logTotal = finite(highest) ? logf((float)((double)whole[0] * 0x1p-40)) : __int_as_float(0x7fc00000);
        if (row.logprobs > 0) {
            // Each block finds its likeliest, one after the other, and one block those of all.
            u64 mine = best(line, first, count);
            for (int k = 0; k < row.logprobs; ++k) {
                u64 next[1] = {mine};
                overBlock<true>(next);
                if (threadIdx.x == 0) c.top[k] = next[0];
                if (next[0] && mine == next[0]) {
                    mine = 0;
                    for (u32 i = threadIdx.x; i < count; i += THREADS) {
                        const u64 other = key(line[i], first + i);
                        if (other < next[0]) mine = max(mine, other);
                    }
                }
                __syncthreads();
            }
            meet(team);
            u64* all = (u64*)c.histogram;
            const u32 found = team.ranks * row.logprobs;
            if (team.rank == 0)
                for (u32 i = threadIdx.x; i < found; i += THREADS) all[i] = remote(c.top + i % row.logprobs, i / row.logprobs);
            meet(team);
            u32* said = chances(row) + 1;
            if (team.rank == 0)
                for (u32 i = threadIdx.x; i < found; i += THREADS) {
                    int place = 0;
                    for (u32 j = 0; j < found; ++j) place += all[j] > all[i];
                    if (place < row.logprobs && all[i]) said[2 * place] = tokenOf(all[i]), said[2 * place + 1] = __float_as_uint(valueOf(all[i]) - highest - logTotal);
                }
        }
        if (row.out)
            for (u32 i = threadIdx.x; i < count; i += THREADS) line[i] = line[i] - highest - logTotal;
    }

    if (changed) {
        __syncthreads();
        change(row, line, first, count);
        if (row.mask)
            for (u32 i = threadIdx.x; i < count; i += THREADS)
                if (!allowed(row, first + i)) line[i] = -INFINITE;
        winner[0] = best(line, first, count);
    }
    overCluster<true>(team, winner);
    if (row.mask && valueOf(winner[0]) == -INFINITE) {  // all that is allowed is impossible: it becomes possible
        for (u32 i = threadIdx.x; i < count; i += THREADS)
            if (allowed(row, first + i)) line[i] = 0.f;
        winner[0] = best(line, first, count);
        overCluster<true>(team, winner);
    }
    if (row.out)
        for (u32 i = threadIdx.x; i < count; i += THREADS) row.out[first + i] = line[i];

    const float largest = valueOf(winner[0]);
    const bool possible = finite(row.out ? highest : largest);
    if (possible && row.temperature > 0.f && !row.out) {
        const float temperature = row.temperature;
        const bool fewest = row.topK && row.topK < (u32)vocabulary, mass = row.topP != 1. && !fewest;
        u64 sums[2] = {0, 0};
        float together = 0.f;
        for (u32 g = threadIdx.x; g < size / 4; g += THREADS) {
            Four v(line, g);
            #pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                v.each[j] = fabsf(v.each[j] - largest);
                if (temperature != 1.f) v.each[j] = __fdiv_rn(v.each[j], temperature);
                if (mass) sums[0] += __float2uint_rn(__expf(-v.each[j]) * 0x1p31f);
                if (fewest && finite(v.each[j])) together += fminf(v.each[j], 1e5f), ++sums[1];
            }
            ((float4*)line)[g] = make_float4(v.each[0], v.each[1], v.each[2], v.each[3]);
        }
        __syncthreads();
        Part part{line, nullptr, first, size};
        const auto depth = [](float v) { return v; };
        if (fewest) {
            sums[0] = __float2ull_rn(together * 1024.f);
            overCluster<false>(team, sums);
            const float mean = (float)sums[0] / 1024.f / (float)sums[1];
            if (!restrictTo<true>(team, part, row.topK, mean, depth, depth)) return;
        }
        if (row.topP != 1.) {
            u64 total[1] = {sums[0]};
            if (fewest) {
                total[0] = 0;
                for (u32 i = threadIdx.x; i < part.size; i += THREADS) total[0] += __float2uint_rn(__expf(-part.line[i]) * 0x1p31f);
            }
            overCluster<false>(team, total);
            u32 shift = 0;
            while (total[0] >> shift >> 31) ++shift;
            const float scale = __uint_as_float((127 + 31 - shift) << 23);  // 2^(31 - shift)
            const auto weight = [=](float v) { return __float2uint_rn(__expf(-v) * scale); };
            const double whole = (double)total[0] * 0x1p-31;
            // those below a share of (1 - p) / V have less than 1 - p together, so none of them stays
            const float reach = -logf((float)((1. - row.topP) * whole / vocabulary));
            if (!restrictTo<false>(team, part, (u32)ceil(row.topP * whole * scale), reach + 1e-3f, depth, weight)) return;
        }
        if (row.minP > 0.f)
            for (u32 i = threadIdx.x; i < part.size; i += THREADS)
                if (!(expf(-part.line[i]) >= row.minP)) part.line[i] = INFINITE;
        if (row.typicalP != 1.) {
            u64 total[2] = {0, 0};
            for (u32 i = threadIdx.x; i < part.size; i += THREADS) {
                const float v = part.line[i], e = expf(-v);
                if (finite(v)) total[0] += __float2ull_rn(e * 0x1p40f), total[1] += __float2ull_rn(e * v * 0x1p40f);
            }
            overCluster<false>(team, total);
            const float log = logf((float)((double)total[0] * 0x1p-40)), entropy = (float)((double)total[1] / (double)total[0]) + log;
            const float reach = fmaxf(entropy, logf((float)(vocabulary / (1. - row.typicalP))) - entropy);
            const auto distance = [=](float v) { return fabsf(v + log - entropy); };
            const auto probability = [=](float v) { return __float2uint_rn(__expf(-v - log) * 0x1p31f); };
            if (!restrictTo<false>(team, part, (u32)ceil(row.typicalP * 0x1p31), reach + 1e-3f, distance, probability)) return;
        }
        __syncthreads();
        winner[0] = draw(row, part);
        overCluster<true>(team, winner);
    }
    // The others leave when their share of the result has been read.
    if (team.ranks > 1) clusterArrive();
    if (team.rank == 0) {
        const u32 token = !possible ? NONE : row.out ? 0 : tokenOf(winner[0]);
        const float logprob = possible && row.logprobs >= 0 ? logitAt(logits, start + token) - highest - logTotal : 0.f;
        finish(global, tokens, wide, token, logprob);
    }
    __syncwarp();
    if (team.ranks > 1) clusterWait();
}
