// A warp for g++: 32 threads that meet at every shuffle, vote and reduction. For device code that computes with integers only.
#include <algorithm>
#include <barrier>
#include <thread>
#include <vector>
typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;
using std::max;
using std::min;
#define __device__
#define __forceinline__ inline

inline std::barrier<> together(32);
inline int given[32];
inline thread_local struct { int x; } threadIdx;

template <typename F> int exchange(int mine, F of) {
    given[threadIdx.x] = mine;
    together.arrive_and_wait();
    const int result = of();
    together.arrive_and_wait();
    return result;
}
inline void __syncwarp() { together.arrive_and_wait(); }
inline u32 __reduce_add_sync(u32, u32 v) { return exchange(v, [] { int sum = 0; for (int g : given) sum += g; return sum; }); }
inline int __reduce_max_sync(u32, int v) { return exchange(v, [] { return *std::max_element(given, given + 32); }); }
inline int __any_sync(u32, int v) { return exchange(v, [] { return (int)std::any_of(given, given + 32, [](int g) { return g; }); }); }
inline int __shfl_sync(u32, int v, int lane) { return exchange(v, [=] { return given[lane]; }); }
inline int __shfl_up_sync(u32, int v, int by) { const int lane = threadIdx.x; return exchange(v, [=] { return given[lane >= by ? lane - by : lane]; }); }

template <typename F> void warp(F work) {
    std::vector<std::thread> lanes;
    for (int lane = 0; lane < 32; ++lane) lanes.emplace_back([=] { threadIdx.x = lane; work(); });
    for (auto& lane : lanes) lane.join();
}
