// What a generator does between two steps on the GPU: the batch of the next token, and copies of blocks of the cache.
#include "overlap.cuh"

typedef long long i64;

struct Rows {
    const i64* chosen;            // [rows]: the sampler's tokens
    i64 *tokens, *positions;      // [rows]: of the step that was, and then of the next
    int *slots, *lengths;         // [rows]; a negative slot: padding
    const int* tables;            // [rows, table]
    const int* stops;             // [rows, stop]: tokens that end a row's text, -1 where there are fewer
    int* step;                    // how many steps were done, and
    int* ended;                   // [rows]: whether a text is over
    int* left;                    // [steps], in the host's memory: how many texts go on after each step
    int rows, table, stop, block, steps;
};

// One block. The tokens that were chosen become those of the next step, one position on.
extern "C" __global__ void __launch_bounds__(1024) advance(const Rows r) {
    letNextKernelStart();
    waitForPrecedingKernel();
    __shared__ int alive;
    if (threadIdx.x == 0) alive = 0;
    const int step = min(*r.step, r.steps - 1);
    __syncthreads();
    for (int i = threadIdx.x; i < r.rows; i += blockDim.x) {
        const i64 token = r.chosen[i];
        if (r.slots[i] < 0) continue;
        bool over = r.ended[i];
        for (int j = 0; j < r.stop; ++j) over |= token == r.stops[i * r.stop + j];
        r.ended[i] = over;
        if (!over) atomicAdd(&alive, 1);
        const i64 position = r.positions[i] + 1;
        const int column = (int)min(position / r.block, (i64)r.table - 1);
        r.tokens[i] = token;
        r.positions[i] = position;
        r.lengths[i] += 1;
        r.slots[i] = r.tables[(i64)i * r.table + column] * r.block + (int)(position % r.block);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        r.left[step] = alive;
        *r.step = step + 1;
    }
}

struct Cache {
    char* at;
    i64 bytes;  // of a block
};

// Blocks (pair, cache): copies block pairs[2 i] to pairs[2 i + 1].
extern "C" __global__ void __launch_bounds__(256) copyBlocks(const Cache* caches, const int* pairs) {
    waitForPrecedingKernel();
    const Cache cache = caches[blockIdx.y];
    const char* from = cache.at + pairs[2 * blockIdx.x] * cache.bytes;
    char* to = cache.at + pairs[2 * blockIdx.x + 1] * cache.bytes;
    if (cache.bytes % 16 == 0)
        for (i64 i = threadIdx.x; i < cache.bytes / 16; i += blockDim.x) ((uint4*)to)[i] = ((const uint4*)from)[i];
    else
        for (i64 i = threadIdx.x; i < cache.bytes; i += blockDim.x) to[i] = from[i];
}
