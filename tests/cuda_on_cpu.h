// Enough of CUDA to run a kernel of one cluster on a CPU, one thread after the other: each thread is a fiber that runs until its
// next barrier (of its warp, block or cluster), and which one runs next is drawn at random, so that a missing barrier shows.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
using std::max;
using std::min;
inline int max(int a, u32 b) { return std::max(a, (int)b); }

struct Barrier {
    int members = 0, arrived = 0;
    u64 turn = 0;
    void pass() { if (arrived == members) arrived = 0, ++turn; }
};
struct Warp { Barrier barrier; u64 value[32]; };
struct Block { Barrier barrier; std::vector<Warp> warps; u8* bytes; bool any = false, told = false; };
struct Place { u32 x, y; };
struct Fiber { Place thread, block; ucontext_t start; jmp_buf here; bool begun = false, done = false; Barrier* waits = nullptr; u64 turn = 0, clusterTurn = 0; std::unique_ptr<u8[]> stack; };

static Fiber* fiber;
static std::vector<Block> blocks;
static Barrier cluster;
static Place grid;
static jmp_buf scheduler;
#define threadIdx (fiber->thread)
#define blockIdx (fiber->block)
#define gridDim grid
#define memory (blocks[fiber->block.x].bytes)

inline void until(Barrier& barrier, u64 turn) {
    if (barrier.turn != turn) return;
    fiber->waits = &barrier, fiber->turn = turn;
    if (!_setjmp(fiber->here)) _longjmp(scheduler, 1);
}
inline u64 arrive(Barrier& barrier) {
    const u64 turn = barrier.turn;
    ++barrier.arrived;
    barrier.pass();
    return turn;
}
inline void sync(Barrier& barrier) { until(barrier, arrive(barrier)); }
inline Block& block() { return blocks[fiber->block.x]; }
inline Warp& warp() { return block().warps[fiber->thread.x / 32]; }

inline void __syncthreads() { sync(block().barrier); }
inline void __syncwarp() { sync(warp().barrier); }
inline int __syncthreads_or(int v) {
    block().any |= v != 0;
    sync(block().barrier);
    const int any = block().any;
    sync(block().barrier);
    block().any = false;
    sync(block().barrier);
    return any;
}
inline void clusterArrive() { fiber->clusterTurn = arrive(cluster); }
inline void clusterWait() { until(cluster, fiber->clusterTurn); }
template <class T> T remote(const T* mine, u32 rank) {
    if (rank >= blocks.size()) abort();
    T v;
    memcpy(&v, blocks[rank].bytes + ((const u8*)mine - memory), sizeof v);
    return v;
}
inline void waitForPrecedingKernel() {}
inline void letNextKernelStart() {}

template <class T> T exchange(T v, int from) {
    Warp& w = warp();
    memcpy(&w.value[fiber->thread.x & 31], &v, sizeof v);
    sync(w.barrier);
    memcpy(&v, &w.value[from & 31], sizeof v);
    sync(w.barrier);
    return v;
}
template <class T> T __shfl_xor_sync(u32, T v, int o) { return exchange(v, (fiber->thread.x & 31) ^ o); }
template <class T> T __shfl_up_sync(u32, T v, int o) { const int lane = fiber->thread.x & 31; return exchange(v, lane < o ? lane : lane - o); }
template <class T> T __shfl_sync(u32, T v, int from) { return exchange(v, from); }
inline u32 __ballot_sync(u32, bool v) {
    Warp& w = warp();
    w.value[fiber->thread.x & 31] = v;
    sync(w.barrier);
    u32 bits = 0;
    for (int i = 0; i < 32; ++i) bits |= (u32)w.value[i] << i;
    sync(w.barrier);
    return bits;
}

inline bool __any_sync(u32, bool v) { return __ballot_sync(~0u, v); }

inline float __expf(float x) { return expf(x); }
inline float __int_as_float(int v) { float f; memcpy(&f, &v, 4); return f; }
inline float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
inline u32 __float_as_uint(float f) { u32 v; memcpy(&v, &f, 4); return v; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __uint2float_rn(u32 v) { return (float)v; }
inline u32 __float2uint_rn(float f) { return !(f > 0) ? 0 : f >= 4294967296.f ? ~0u : (u32)llrintf(f); }
inline u32 __float2uint_rz(float f) { return !(f > 0) ? 0 : f >= 4294967296.f ? ~0u : (u32)f; }
inline u64 __float2ull_rn(float f) { return !(f > 0) ? 0 : (u64)llrintf(f); }
inline int __popc(u32 v) { return __builtin_popcount(v); }
inline int __clz(u32 v) { return v ? __builtin_clz(v) : 32; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T, class U> T atomicAdd(T* p, U v) { const T old = *p; *p += v; return old; }
template <class T> T atomicMax(T* p, T v) { const T old = *p; *p = std::max(old, v); return old; }
inline float widen(u16 v) { return __uint_as_float((u32)v << 16); }  // bfloat16
inline float2 unpack(u32 v) { return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)}; }

template <class Body> void runCluster(u32 ranks, u32 rows, u32 row, u32 threads, size_t bytes, u32 seed, Body body) {
    static Body* now;
    now = &body;
    grid = {ranks, rows};
    cluster = {(int)(ranks * threads)};
    blocks.assign(ranks, {});
    std::vector<std::unique_ptr<u8[]>> room;
    std::vector<std::unique_ptr<Fiber>> fibers;
    for (u32 r = 0; r < ranks; ++r) {
        room.emplace_back(new u8[bytes + 16]);
        memset(room.back().get(), 0xcd, bytes + 16);  // shared memory begins with what another kernel left
        blocks[r].bytes = (u8*)(((uintptr_t)room.back().get() + 15) / 16 * 16);
        blocks[r].barrier.members = threads;
        blocks[r].warps.resize(threads / 32);
        for (Warp& w : blocks[r].warps) w.barrier.members = 32;
        for (u32 t = 0; t < threads; ++t) {
            fibers.emplace_back(new Fiber);
            fibers.back()->thread = {t, 0}, fibers.back()->block = {r, row};
        }
    }
    std::mt19937 random(seed);
    size_t left = fibers.size();
    while (left) {
        std::shuffle(fibers.begin(), fibers.end(), random);
        bool moved = false;
        for (auto& f : fibers) {
            if (f->done || (f->waits && f->waits->turn == f->turn)) continue;
            moved = true;
            fiber = f.get();
            fiber->waits = nullptr;
            if (!_setjmp(scheduler)) {
                if (fiber->begun) _longjmp(fiber->here, 1);
                fiber->begun = true;
                fiber->stack.reset(new u8[64 << 10]);
                getcontext(&fiber->start);
                fiber->start.uc_stack.ss_sp = fiber->stack.get(), fiber->start.uc_stack.ss_size = 64 << 10, fiber->start.uc_link = nullptr;
                makecontext(&fiber->start, (void (*)()) + [] {
                    (*now)();
                    fiber->done = true;
                    _longjmp(scheduler, 1);
                }, 0);
                setcontext(&fiber->start);
            }
            if (!fiber->done) continue;
            --left;
            for (Barrier* b : {&warp().barrier, &block().barrier, &cluster}) --b->members, b->members ? b->pass() : (void)0;
        }
        if (!moved) abort();  // all wait for each other
    }
}
