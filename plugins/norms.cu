// LayerNormalization and RMSNormalization over the last axis, float16 or bfloat16, sums in float32. WARPS warps share a row, which
// each thread keeps in registers, 8 elements at a time: the row is read once.
#include "overlap.cuh"
#include "sixteen.cuh"

template <int WARPS>
__device__ __forceinline__ float total(float v) {
    #pragma unroll
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    if (WARPS == 1) return v;
    __shared__ float sums[WARPS];
    __syncthreads();
    if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = v;
    __syncthreads();
    v = 0.f;
    #pragma unroll
    for (int i = 0; i < WARPS; ++i) v += sums[i];
    return v;
}

template <int VECTORS, int WARPS, bool CENTRED>
__device__ __forceinline__ void norm(u16* y, const u16* x, const u16* scale, const u16* bias, int rows, int width, float epsilon) {
    constexpr int THREADS = WARPS * 32;
    const int row = WARPS == 1 ? blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5) : blockIdx.x, at = threadIdx.x % THREADS;
    letNextKernelStart();
    // Weights do not depend on the preceding kernel.
    uint4 scales[VECTORS], biases[VECTORS];
    #pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        const int i = at + n * THREADS;
        scales[n] = i * 8 < width ? __ldg((const uint4*)scale + i) : uint4{0, 0, 0, 0};
        biases[n] = bias && i * 8 < width ? __ldg((const uint4*)bias + i) : uint4{0, 0, 0, 0};
    }
    waitForPrecedingKernel();
    if (row >= rows) return;
    const uint4* from = (const uint4*)(x + (long long)row * width);
    float v[VECTORS][8];
    float sum = 0.f;
    #pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        const int i = at + n * THREADS;
        const uint4 raw = i * 8 < width ? from[i] : uint4{0, 0, 0, 0};
        const u32 word[4] = {raw.x, raw.y, raw.z, raw.w};
        #pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 f = unpack(word[j]);
            v[n][2 * j] = f.x, v[n][2 * j + 1] = f.y;
            sum += f.x + f.y;
        }
    }
    const float mean = CENTRED ? total<WARPS>(sum) / width : 0.f;
    float square = 0.f;
    #pragma unroll
    for (int n = 0; n < VECTORS; ++n)
        #pragma unroll
        for (int j = 0; j < 8; ++j) {
            if ((at + n * THREADS) * 8 >= width) break;
            v[n][j] -= mean;
            square += v[n][j] * v[n][j];
        }
    const float by = 1.f / sqrtf(total<WARPS>(square) / width + epsilon);
    #pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        const int i = at + n * THREADS;
        if (i * 8 >= width) break;
        const uint4 s = scales[n], b = biases[n];
        const u32 factors[4] = {s.x, s.y, s.z, s.w}, terms[4] = {b.x, b.y, b.z, b.w};
        u32 out[4];
        #pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 f = unpack(factors[j]), t = unpack(terms[j]);
            out[j] = pack(v[n][2 * j] * by * f.x + t.x, v[n][2 * j + 1] * by * f.y + t.y);
        }
        ((uint4*)(y + (long long)row * width))[i] = {out[0], out[1], out[2], out[3]};
    }
}

#define NORM(NAME, VECTORS, WARPS, CENTRED) \
    extern "C" __global__ void __launch_bounds__(WARPS == 1 ? 128 : WARPS * 32) NAME##_##VECTORS##_##WARPS(u16* y, const u16* x, const u16* scale, const u16* bias, int rows, int width, float epsilon) { \
        norm<VECTORS, WARPS, CENTRED>(y, x, scale, bias, rows, width, epsilon); }
#define BOTH(VECTORS, WARPS) NORM(layer, VECTORS, WARPS, true) NORM(rms, VECTORS, WARPS, false)
BOTH(1, 1) BOTH(2, 1) BOTH(3, 1) BOTH(4, 1) BOTH(1, 8) BOTH(2, 8) BOTH(4, 8) BOTH(8, 8)
