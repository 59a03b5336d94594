// A GPU's thread blocks on the CPU: each thread a context of its own, warps in lockstep at what they do together.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <algorithm>
#include <vector>
#include <ucontext.h>
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64;
struct dim3 { unsigned x, y, z; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static dim3 threadIdx, blockIdx, gridDim, blockDim;
struct Copy { u16* to; const u16* from; bool there; };
struct Thread {
    ucontext_t context; std::vector<char> stack; bool done; dim3 id; int calls, syncs;
    std::deque<std::vector<Copy>> groups; std::vector<Copy> open;
};
static std::vector<Thread> threads; static ucontext_t mainContext; static int current;
static void yield() { swapcontext(&threads[current].context, &mainContext); }
// --- what a warp does together
struct Slot { u32 words[8]; };
static Slot bank[2][1024];
static const Slot* gather(const Slot& mine) {  // the operands of all 32 lanes
    Thread& me = threads[current];
    const int which = me.calls & 1, first = current & ~31;
    bank[which][current] = mine;
    const int call = ++me.calls;
    for (;;) {
        bool all = true;
        for (int l = first; l < first + 32; ++l) {
            if (threads[l].done && threads[l].calls < call) { fprintf(stderr, "a lane has left its warp\n"); abort(); }
            all &= threads[l].calls >= call;
        }
        if (all) break;
        yield();
    }
    return bank[which] + first;
}
static void __syncwarp(u32 = ~0u) { gather({}); }
static void __syncthreads() {
    Thread& me = threads[current];
    const int call = ++me.syncs;
    for (;;) {
        bool all = true;
        for (auto& t : threads) {
            if (t.done && t.syncs < call) { fprintf(stderr, "a thread has left before a barrier\n"); abort(); }
            all &= t.syncs >= call;
        }
        if (all) return;
        yield();
    }
}
template <typename T> static Slot packed(T v) { Slot s{}; memcpy(s.words, &v, sizeof v); return s; }
template <typename T> static T unpacked(const Slot& s) { T v; memcpy(&v, s.words, sizeof v); return v; }
template <typename T> static T __shfl_sync(u32, T v, int lane) { return unpacked<T>(gather(packed(v))[lane & 31]); }
template <typename T> static T __shfl_xor_sync(u32, T v, int by) { return unpacked<T>(gather(packed(v))[(current & 31) ^ by]); }
template <typename T> static T __shfl_up_sync(u32, T v, int by) { const Slot* s = gather(packed(v)); const int l = current & 31; return unpacked<T>(s[l >= by ? l - by : l]); }
static u32 __ballot_sync(u32, bool v) { const Slot* s = gather(packed<u32>(v)); u32 m = 0; for (int l = 0; l < 32; ++l) m |= s[l].words[0] << l; return m; }
static bool __any_sync(u32 m, bool v) { return __ballot_sync(m, v) != 0; }
static int __ffs(u32 v) { return __builtin_ffs(v); }
static void __threadfence() {}
static int atomicAdd(int* at, int v) { int old = *at; *at += v; return old; }
template <typename T> static T __ldcg(const T* p) { return *p; }
template <typename T> static T __ldg(const T* p) { return *p; }
static float __int_as_float(int v) { float f; memcpy(&f, &v, 4); return f; }
static float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
static int min(int a, int b) { return a < b ? a : b; } static int max(int a, int b) { return a > b ? a : b; }
static long long min(long long a, long long b) { return a < b ? a : b; } static long long max(long long a, long long b) { return a > b ? a : b; }
static void waitForPrecedingKernel() {} static void letNextKernelStart() {}
// --- 16-bit floats
static float widen(u16 v) {
#if BFLOAT16
    return __uint_as_float((u32)v << 16);
#else
    _Float16 h; memcpy(&h, &v, 2); return (float)h;
#endif
}
static u16 narrow16(float f) {
#if BFLOAT16
    u32 b; memcpy(&b, &f, 4); if (f != f) return 0x7fff; return (b + 0x7fff + (b >> 16 & 1)) >> 16;
#else
    _Float16 h = (_Float16)f; u16 v; memcpy(&v, &h, 2); return v;
#endif
}
static float2 unpack(u32 v) { return {widen(v & 0xffff), widen(v >> 16)}; }
static u32 pack(float low, float high) { return narrow16(low) | (u32)narrow16(high) << 16; }
static float exp2(float x) { return std::exp2f(x); }
// --- tensor cores
static void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const Slot* s = gather({{a[0], a[1], a[2], a[3], b0, b1}});
    const int lane = current & 31, r = lane >> 2, p = (lane & 3) * 2;
    auto A = [&](int row, int k) { const u32 w = s[(row & 7) * 4 + (k & 7) / 2].words[(row >> 3) + (k >> 3) * 2]; return k & 1 ? unpack(w).y : unpack(w).x; };
    auto B = [&](int k, int n) { const u32 w = s[n * 4 + (k & 7) / 2].words[4 + (k >> 3)]; return k & 1 ? unpack(w).y : unpack(w).x; };
    for (int i = 0; i < 4; ++i) for (int k = 0; k < 16; ++k) d[i] += A(r + (i >> 1) * 8, k) * B(k, p + (i & 1));
}
static void load(u32 (&r)[4], const u16* at) {
    if ((uintptr_t)at % 16) { fprintf(stderr, "ldmatrix of an address that is not aligned\n"); abort(); }
    const Slot* s = gather(packed(at)); const int lane = current & 31;
    for (int i = 0; i < 4; ++i) memcpy(&r[i], unpacked<const u16*>(s[i * 8 + lane / 4]) + lane % 4 * 2, 4);
}
static void loadTransposed(u32 (&r)[4], const u16* at) {
    if ((uintptr_t)at % 16) { fprintf(stderr, "ldmatrix of an address that is not aligned\n"); abort(); }
    const Slot* s = gather(packed(at)); const int lane = current & 31;
    for (int i = 0; i < 4; ++i) {
        const u16 low = unpacked<const u16*>(s[i * 8 + lane % 4 * 2])[lane / 4], high = unpacked<const u16*>(s[i * 8 + lane % 4 * 2 + 1])[lane / 4];
        r[i] = low | (u32)high << 16;
    }
}
static void copy(u16* to, const u16* from, bool there) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) { fprintf(stderr, "cp.async of an address that is not aligned\n"); abort(); }
    threads[current].open.push_back({to, from, there});
}
static void closeGroup() { Thread& t = threads[current]; t.groups.push_back(std::move(t.open)); t.open.clear(); }
template <int LEFT> static void waitForGroups() {  // no copy is there before it has been waited for
    Thread& t = threads[current];
    while ((int)t.groups.size() > LEFT) {
        for (auto& c : t.groups.front()) { if (c.there) memcpy(c.to, c.from, 16); else memset(c.to, 0, 16); }
        t.groups.pop_front();
    }
}
alignas(16) static u8 dynamicMemory[232448];
// --- a grid, block after block
static void (*body)();
static void enter() {
    body();
    threads[current].done = true;
    swapcontext(&threads[current].context, &mainContext);
}
static void runGrid(unsigned x, unsigned y, unsigned z, unsigned block, bool backwards) {
    gridDim = {x, y, z}, blockDim = {block, 1, 1};
    threads.resize(block);
    const unsigned total = x * y * z;
    for (unsigned i = 0; i < total; ++i) {
        const unsigned b = backwards ? total - 1 - i : i;
        memset(dynamicMemory, 0xff, sizeof dynamicMemory);
        for (unsigned t = 0; t < block; ++t) {
            Thread& thread = threads[t];
            thread.stack.resize(1 << 16), thread.done = false, thread.id = {t, 0, 0}, thread.calls = thread.syncs = 0;
            thread.groups.clear(), thread.open.clear();
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size(), thread.context.uc_link = &mainContext;
            makecontext(&thread.context, enter, 0);
        }
        for (bool left = true; left;) {
            left = false;
            for (unsigned t = 0; t < block; ++t) {
                if (threads[t].done) continue;
                left = true, current = t, threadIdx = threads[t].id, blockIdx = {b % x, b / x % y, b / x / y};
                swapcontext(&mainContext, &threads[t].context);
            }
        }
    }
}
