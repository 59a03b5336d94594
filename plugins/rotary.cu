// Rotary embedding: float16, bfloat16 or float32, any strides but of the last axis. A warp turns a row of SIZE elements.
#include "overlap.cuh"
#include "sixteen.cuh"
#include "rotation.cuh"
typedef long long i64;

struct Rotary {
    scalar* y;
    const scalar *x, *cos, *sin;
    int sizes[4];                    // of the axes before the last
    i64 ys[4], xs[4], cs[4], ss[4];  // strides in elements, 0 where angles serve a whole axis
};

extern "C" __global__ void __launch_bounds__(128) rotary(const __grid_constant__ Rotary c) {
    i64 row = (i64)blockIdx.x * 4 + (threadIdx.x >> 5), y = 0, x = 0, cos = 0, sin = 0;
    #pragma unroll
    for (int n = 3; n >= 0; --n) {
        const i64 at = row % c.sizes[n];
        row /= c.sizes[n];
        y += at * c.ys[n], x += at * c.xs[n], cos += at * c.cs[n], sin += at * c.ss[n];
    }
    letNextKernelStart();
    waitForPrecedingKernel();
    if (row) return;
    const Row from = {c.x + x, c.cos + cos, c.sin + sin, nullptr};
    #pragma unroll
    for (int i = threadIdx.x & 31; i < SIZE; i += 32) c.y[y + i] = narrow(turned(from, 1.f, i));
}
