// Sums over the ranks of one host, each with a GPU, in one launch: float16 or bfloat16 values, added in float32 in the order of the
// ranks, then bias and residual; every rank gets the same bits. Each rank has a workspace that the others have mapped (CUDA IPC):
//
//     u32 epoch, u32 done                    sums made so far; blocks of the running one that are through
//     u32 flags[RANKS][BLOCKS]      at 1 KB  of `pull`: the epoch whose values a block of another rank has laid ready
//     uint4 slots[2][RANKS][2 * capacity]    of `push`: values of the others, each word beside the epoch it is of
//     uint4 ready[2][capacity]               of `pull`: own values, for the others to read
//
// Sums alternate between two halves. Whoever writes a half again has ended the sum between, for which all others had begun it, and so
// ended the one before: nobody reads that half any more. A rank that waits for 10 s ends with an error.
#include "overlap.cuh"
#include "sixteen.cuh"

constexpr int RANKS = 8, BLOCKS = 132, FLAGS = 1024, SLOTS = 8192;
constexpr u64 PATIENCE = 10000000000ull;  // nanoseconds

struct Peers { char *mine, *at[RANKS]; };  // own workspace, and those of all ranks: each index a constant, so that they stay in registers

__device__ __forceinline__ u64 now() {
    u64 t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}
struct Patience {
    u64 since = 0;
    u32 polls = 0;
    __device__ __forceinline__ void check() {
        if (++polls & 4095) return;
        if (!since) since = now();
        else if (now() - since > PATIENCE) __trap();
    }
};

// Words and their epoch travel together: a store of 16 bytes arrives in halves of 8 at worst.
__device__ __forceinline__ void put(uint4* to, u32 a, u32 b, u32 epoch) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" :: "l"(to), "r"(a), "r"(epoch), "r"(b), "r"(epoch) : "memory");
}
__device__ __forceinline__ uint2 get(const uint4* from, u32 epoch) {
    u32 a, b, e, f;
    Patience patience;
    while (true) {
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(e), "=r"(b), "=r"(f) : "l"(from) : "memory");
        if (e == epoch && f == epoch) return {a, b};
        patience.check();
    }
}
__device__ __forceinline__ void release(u32* flag, u32 epoch) { asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(flag), "r"(epoch) : "memory"); }
// Until a flag has come to this epoch: the other rank may have gone on to the next one.
__device__ __forceinline__ void await(const u32* flag, u32 epoch) {
    Patience patience;
    while (true) {
        u32 found;
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
        if ((int)(found - epoch) >= 0) return;
        patience.check();
    }
}

__device__ __forceinline__ u32 begin(const Peers& peers) { return *(volatile u32*)peers.mine + 1; }
__device__ __forceinline__ void end(const Peers& peers, u32 epoch) {
    __syncthreads();
    if (threadIdx.x) return;
    u32* mine = (u32*)peers.mine;
    if (atomicAdd(mine + 1, 1) + 1 < gridDim.x) return;
    mine[1] = 0;
    *(volatile u32*)mine = epoch;
}
__device__ __forceinline__ uint4* slot(char* base, u32 epoch, int from, int capacity, int i) {
    return (uint4*)(base + SLOTS) + ((long long)(epoch & 1) * RANKS + from) * 2 * capacity + 2 * i;
}
__device__ __forceinline__ uint4* ready(char* base, u32 epoch, int capacity) {
    return (uint4*)(base + SLOTS) + (4ll * RANKS + (epoch & 1)) * capacity;
}

__device__ __forceinline__ void add(float (&sum)[8], uint4 v) {
    const u32 word[4] = {v.x, v.y, v.z, v.w};
    #pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float2 f = unpack(word[j]);
        sum[2 * j] += f.x, sum[2 * j + 1] += f.y;
    }
}
__device__ __forceinline__ uint4 narrow(const float (&v)[8]) { return {pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])}; }

// Give the others a vector of 8 values; add up theirs and it.
template <int WORLD>
__device__ __forceinline__ void give(uint4 v, const Peers& peers, int rank, u32 epoch, int capacity, int i) {
    #pragma unroll
    for (int r = 0; r < WORLD; ++r) {
        if (r == rank) continue;
        uint4* to = slot(peers.at[r], epoch, rank, capacity, i);
        put(to, v.x, v.y, epoch), put(to + 1, v.z, v.w, epoch);
    }
}
template <int WORLD>
__device__ __forceinline__ void take(float (&sum)[8], uint4 v, const Peers& peers, int rank, u32 epoch, int capacity, int i) {
    #pragma unroll
    for (int r = 0; r < WORLD; ++r) {
        uint4 theirs = v;
        if (r != rank) {
            const uint4* from = slot(peers.mine, epoch, r, capacity, i);
            const uint2 low = get(from, epoch), high = get(from + 1, epoch);
            theirs = {low.x, low.y, high.x, high.y};
        }
        add(sum, theirs);
    }
}
__device__ __forceinline__ void finish(float (&sum)[8], const uint4* bias, const uint4* residual, int i, int width) {
    if (bias) add(sum, __ldg(bias + i % width));
    if (residual) add(sum, residual[i]);
}

// y = sum over ranks of x + bias + residual, by values pushed to the others. `vectors` of 8 values, `width` of them a row.
template <int WORLD>
__device__ __forceinline__ void push(uint4* y, const uint4* x, const uint4* bias, const uint4* residual, Peers peers, int rank, int capacity, int vectors, int width) {
    letNextKernelStart();
    waitForPrecedingKernel();
    const u32 epoch = begin(peers);
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
        const uint4 v = x[i];
        float sum[8] = {};
        give<WORLD>(v, peers, rank, epoch, capacity, i);
        take<WORLD>(sum, v, peers, rank, epoch, capacity, i);
        finish(sum, bias, residual, i, width);
        y[i] = narrow(sum);
    }
    end(peers, epoch);
}

// The same, and z = the RMS norm of y's rows times `scale`: one block a row at a time, VECTORS of 8 values a thread.
template <int WORLD, int VECTORS>
__device__ __forceinline__ void pushNorm(uint4* y, uint4* z, const uint4* x, const uint4* bias, const uint4* residual, const uint4* scale, float epsilon, Peers peers, int rank, int capacity, int rows, int width) {
    __shared__ float sums[16];
    letNextKernelStart();
    waitForPrecedingKernel();
    const u32 epoch = begin(peers);
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        float v[VECTORS][8], square = 0.f;
        uint4 own[VECTORS];
        #pragma unroll
        for (int n = 0; n < VECTORS; ++n) {
            const int at = threadIdx.x + n * blockDim.x, i = row * width + at;
            if (at >= width) continue;
            own[n] = x[i];
            give<WORLD>(own[n], peers, rank, epoch, capacity, i);
        }
        #pragma unroll
        for (int n = 0; n < VECTORS; ++n) {
            const int at = threadIdx.x + n * blockDim.x, i = row * width + at;
            #pragma unroll
            for (int j = 0; j < 8; ++j) v[n][j] = 0.f;
            if (at >= width) continue;
            take<WORLD>(v[n], own[n], peers, rank, epoch, capacity, i);
            finish(v[n], bias, residual, i, width);
            const uint4 rounded = narrow(v[n]);
            y[i] = rounded;
            #pragma unroll
            for (int j = 0; j < 8; ++j) v[n][j] = 0.f;
            add(v[n], rounded);  // the norm sees what is stored
            #pragma unroll
            for (int j = 0; j < 8; ++j) square += v[n][j] * v[n][j];
        }
        #pragma unroll
        for (int o = 16; o; o >>= 1) square += __shfl_xor_sync(~0u, square, o);
        __syncthreads();
        if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = square;
        __syncthreads();
        square = 0.f;
        for (int i = 0; i < blockDim.x >> 5; ++i) square += sums[i];
        const float by = 1.f / sqrtf(square / (8 * width) + epsilon);
        #pragma unroll
        for (int n = 0; n < VECTORS; ++n) {
            const int at = threadIdx.x + n * blockDim.x;
            if (at >= width) continue;
            float factor[8] = {};
            add(factor, __ldg(scale + at));
            #pragma unroll
            for (int j = 0; j < 8; ++j) v[n][j] *= by * factor[j];
            z[row * width + at] = narrow(v[n]);
        }
    }
    end(peers, epoch);
}

// The same as push, by values that the others read: each block lays its part ready, tells the same block of the others, waits for them.
template <int WORLD>
__device__ __forceinline__ void pull(uint4* y, const uint4* x, const uint4* bias, const uint4* residual, Peers peers, int rank, int capacity, int vectors, int width) {
    letNextKernelStart();
    waitForPrecedingKernel();
    const u32 epoch = begin(peers);
    const int stride = gridDim.x * blockDim.x, first = blockIdx.x * blockDim.x + threadIdx.x;
    uint4* mine = ready(peers.mine, epoch, capacity);
    for (int i = first; i < vectors; i += stride) mine[i] = x[i];
    __syncthreads();
    #pragma unroll
    for (int r = 0; r < WORLD; ++r) {
        if (threadIdx.x != r || r == rank) continue;
        __threadfence_system();
        release((u32*)(peers.at[r] + FLAGS) + rank * BLOCKS + blockIdx.x, epoch);
        await((const u32*)(peers.mine + FLAGS) + r * BLOCKS + blockIdx.x, epoch);
    }
    __syncthreads();
    for (int i = first; i < vectors; i += stride) {
        uint4 v[WORLD];
        #pragma unroll
        for (int r = 0; r < WORLD; ++r) v[r] = r == rank ? x[i] : __ldcv(ready(peers.at[r], epoch, capacity) + i);
        float sum[8] = {};
        #pragma unroll
        for (int r = 0; r < WORLD; ++r) add(sum, v[r]);
        finish(sum, bias, residual, i, width);
        y[i] = narrow(sum);
    }
    end(peers, epoch);
}

// y += bias + residual, for a sum that was made elsewhere.
extern "C" __global__ void __launch_bounds__(256) addRest(uint4* y, const uint4* bias, const uint4* residual, long long vectors, int width) {
    letNextKernelStart();
    waitForPrecedingKernel();
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < vectors; i += (long long)gridDim.x * blockDim.x) {
        float sum[8] = {};
        add(sum, y[i]);
        if (bias) add(sum, __ldg(bias + i % width));
        if (residual) add(sum, residual[i]);
        y[i] = narrow(sum);
    }
}

#define FOR(WORLD) \
    extern "C" __global__ void __launch_bounds__(512, 1) push_##WORLD(uint4* y, const uint4* x, const uint4* bias, const uint4* residual, Peers peers, int rank, int capacity, int vectors, int width) { \
        push<WORLD>(y, x, bias, residual, peers, rank, capacity, vectors, width); } \
    extern "C" __global__ void __launch_bounds__(512, 1) pull_##WORLD(uint4* y, const uint4* x, const uint4* bias, const uint4* residual, Peers peers, int rank, int capacity, int vectors, int width) { \
        pull<WORLD>(y, x, bias, residual, peers, rank, capacity, vectors, width); } \
    NORM(WORLD, 1) NORM(WORLD, 2) NORM(WORLD, 4)
#define NORM(WORLD, VECTORS) \
    extern "C" __global__ void __launch_bounds__(512, 1) push_norm_##VECTORS##_##WORLD(uint4* y, uint4* z, const uint4* x, const uint4* bias, const uint4* residual, const uint4* scale, float epsilon, Peers peers, int rank, int capacity, int rows, int width) { \
        pushNorm<WORLD, VECTORS>(y, z, x, bias, residual, scale, epsilon, peers, rank, capacity, rows, width); }
FOR(2) FOR(4) FOR(8)
