// What kernels of matrix products share: activations, tiles fetched by TMA, wgmma, 8 neighbouring elements at a time.
struct Job { void* y; const void* bias; const void* residual; long long features; };

// --- activations, in the order of ACTIVATIONS in cuda_gemm.py ------------------------------------------------------------
__device__ __forceinline__ float activate(float v, int kind) {
    switch (kind) {
        case 1: return v < 0.f ? 0.f : v;
        case 2: return v < 0.f ? 0.f : v * v;
        case 3: {  // gelu: v * Phi(v), Phi(-|v|) = 2^p(|v|) by a minimax polynomial; the error of gelu is at most 2e-6
            const float z = fabsf(v);
            float q;
            asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(q) : "f"(-1.0001281f + z * (-1.1500717f + z * (-0.46171433f + z * (-0.05012448f + z * (0.00636023f + z * -0.00036422245f))))));
            return v * (v > 0.f ? 1.f - q : q);
        }
        case 4: return __fdividef(v, 1.f + __expf(-1.5957691216f * (v + 0.044715f * v * v * v)));  // gelu_tanh: 0.5 (1 + tanh u) = sigmoid(2 u)
        case 5: return __fdividef(v, 1.f + __expf(-v));
        case 6: return __fdividef(v, 1.f + __expf(-1.702f * v));
        case 7: return tanhf(v);
        case 8: return __fdividef(1.f, 1.f + __expf(-v));
        default: return v;
    }
}

// --- tiles of two axes -------------------------------------------------------------------------------------------------
__device__ __forceinline__ void fetch(void* to, const TensorMap* map, u64* barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(shared(to)), "l"(map),
                 "r"(shared(barrier)), "r"(column), "r"(row)
                 : "memory");
}
__device__ __forceinline__ u64 descriptor(const void* tile) { return descriptor<128>(tile, 16); }  // K-major
__device__ __forceinline__ int up(int n, int d) { return (n + d - 1) / d; }
__device__ __forceinline__ uint4 read(const void* array, long long at) { return array ? *(const uint4*)((const u16*)array + at) : uint4{0, 0, 0, 0}; }
__device__ __forceinline__ void add(float (&v)[8], uint4 u) {
    const float2 a = unpack(u.x), b = unpack(u.y), c = unpack(u.z), d = unpack(u.w);
    v[0] += a.x, v[1] += a.y, v[2] += b.x, v[3] += b.y, v[4] += c.x, v[5] += c.y, v[6] += d.x, v[7] += d.y;
}
// The 64 features of BN tokens that a warpgroup's wgmma has in registers, into shared memory: a row a token.
template <int BN, int PITCH>
__device__ __forceinline__ void keep(float* part, const float (&d)[BN / 2], int warp, int lane) {
    float* to = part + 2 * (lane & 3) * PITCH + warp * 16 + (lane >> 2);
    #pragma unroll
    for (int i = 0; i < BN / 8; ++i, to += 8 * PITCH) {
        to[0] = d[4 * i];
        to[PITCH] = d[4 * i + 1];
        to[8] = d[4 * i + 2];
        to[PITCH + 8] = d[4 * i + 3];
    }
}
