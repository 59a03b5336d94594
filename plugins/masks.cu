// AttentionMask: a block for each batch row and query, written for every head. PADDING is the type of the key padding, OUT an
// unsigned integer as wide as an element of the result; the values come as its bits.
#include "overlap.cuh"
#include "sixteen.cuh"

struct Mask {
    OUT* y;
    const PADDING* padding;
    long long pitch, yb, yh, ys, yt;  // elements from one row of the padding to the next; from one batch row, head, query, key of y to the next
    int heads, keys, all, offset, causal, window, test, unmask;  // keys written, keys there are; test 0 !=, 1 ==, 2 >
    double against;
    u64 seen, fill, paddingFill, bothFill;
};

extern "C" __global__ void mask(const __grid_constant__ Mask c) {
    letNextKernelStart();
    waitForPrecedingKernel();
    const int query = blockIdx.x, batch = blockIdx.y;
    auto near = [&](int key) {
        const int distance = query + c.offset - key;
        return !(c.causal && distance < 0) && !(c.window && (distance >= c.window || -distance >= c.window));
    };
    auto kept = [&](int key) {
        if (!c.padding) return true;
        const double v = (double)c.padding[batch * c.pitch + key];
        return c.test == 0 ? v != c.against : c.test == 1 ? v == c.against : v > c.against;
    };
    bool open = false;
    if (c.unmask) {
        bool any = false;
        for (int key = threadIdx.x; key < c.all; key += blockDim.x) any |= near(key) && kept(key);
        open = !__syncthreads_or(any);
    }
    for (int key = threadIdx.x; key < c.keys; key += blockDim.x) {
        const bool close = near(key), there = kept(key);
        const u64 value = open || (close && there) ? c.seen : close ? c.paddingFill : there ? c.fill : c.bothFill;
        for (int head = 0; head < c.heads; ++head) c.y[batch * c.yb + head * c.yh + query * c.ys + key * c.yt] = (OUT)value;
    }
}
