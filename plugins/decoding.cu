// What a generator does between two steps on the GPU: the batch of the next token, and copies of blocks of the cache.
#include "overlap.cuh"

typedef long long i64;

struct Rows {
    const i64* chosen;            // [rows]: the sampler's tokens
    i64 *tokens, *positions;      // [rows]: of the step that was, and then of the next
    int *slots, *lengths;         // [rows]; a negative slot: padding
    const int* tables;            // [rows, table]
    int rows, table, block;
};

// One block. The tokens that were chosen become those of the next step, one position on.
extern "C" __global__ void __launch_bounds__(1024) advance(const Rows r) {
    letNextKernelStart();
    waitForPrecedingKernel();
    for (int i = threadIdx.x; i < r.rows; i += blockDim.x) {
        if (r.slots[i] < 0) continue;
        const i64 position = r.positions[i] + 1;
        const int column = (int)min(position / r.block, (i64)r.table - 1);
        r.tokens[i] = r.chosen[i];
        r.positions[i] = position;
        r.lengths[i] += 1;
        r.slots[i] = r.tables[(i64)i * r.table + column] * r.block + (int)(position % r.block);
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
