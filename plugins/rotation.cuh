// A row of a head as attention reads it: normalized and turned. Constants: FLOAT32; NORM 1 for an RMS norm with weights of
// the same type, 2 with weights of float32; ROTARY 0 nothing is turned, 1 halves,
// 2 pairs; TURN elements are turned, by ANGLES (TURN, or half as many) cosines and sines. PIECE elements that `turnedPiece` reads and writes at a time.
#if FLOAT32
typedef float scalar;
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float narrow(float v) { return v; }
#else
typedef u16 scalar;
__device__ __forceinline__ u16 narrow(float v) { return (u16)pack(v, 0.f); }
#endif

#if NORM == 2
typedef float weight;
__device__ __forceinline__ float widenWeight(float v) { return v; }
#else
typedef scalar weight;
__device__ __forceinline__ float widenWeight(scalar v) { return widen(v); }
#endif

struct Row {
    const scalar *x, *cos, *sin;
    const weight* scale;
};
// What the norm of a row of COUNT elements multiplies with, by a warp.
template <int COUNT>
__device__ __forceinline__ float factor(const Row& row, float epsilon) {
#if NORM
    float sum = 0.f;
    for (int i = threadIdx.x & 31; i < COUNT; i += 32) {
        const float v = widen(row.x[i]);
        sum += v * v;
    }
    #pragma unroll
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    return 1.f / sqrtf(sum / COUNT + epsilon);
#else
    return 1.f;
#endif
}
__device__ __forceinline__ float normal(const Row& row, float by, int i) {
#if NORM
    return widen(row.x[i]) * by * widenWeight(row.scale[i]);
#else
    return widen(row.x[i]);
#endif
}
__device__ __forceinline__ float turned(const Row& row, float by, int i) {
    const float v = normal(row, by, i);
#if ROTARY
    if (i >= TURN) return v;
    const bool first = ROTARY == 1 ? i < TURN / 2 : !(i & 1);
    const int other = ROTARY == 2 ? i ^ 1 : first ? i + TURN / 2 : i - TURN / 2, angle = ANGLES == TURN ? i : ROTARY == 1 ? i % (TURN / 2) : i / 2;
    const float w = normal(row, by, other) * widen(row.sin[angle]);
    return v * widen(row.cos[angle]) + (first ? -w : w);
#else
    return v;
#endif
}

#ifdef PIECE
struct alignas(PIECE * sizeof(scalar)) Piece {
    scalar v[PIECE];
};
__device__ __forceinline__ Piece pieceAt(const scalar* from) { return *(const Piece*)from; }
// Elements i to i + PIECE - 1 of the row, to the last bit those of `turned`.
__device__ __forceinline__ Piece turnedPiece(const Row& row, float by, int i) {
    Piece made;
#if ROTARY == 1
    if (i < TURN) {
        const bool first = i < TURN / 2;
        const int other = first ? i + TURN / 2 : i - TURN / 2, angle = ANGLES == TURN ? i : i % (TURN / 2);
        const Piece x = pieceAt(row.x + i), y = pieceAt(row.x + other), cos = pieceAt(row.cos + angle), sin = pieceAt(row.sin + angle);
        #pragma unroll
        for (int n = 0; n < PIECE; ++n) {
#if NORM
            const float v = widen(x.v[n]) * by * widenWeight(row.scale[i + n]), w = widen(y.v[n]) * by * widenWeight(row.scale[other + n]) * widen(sin.v[n]);
#else
            const float v = widen(x.v[n]), w = widen(y.v[n]) * widen(sin.v[n]);
#endif
            made.v[n] = narrow(v * widen(cos.v[n]) + (first ? -w : w));
        }
        return made;
    }
#endif
    #pragma unroll
    for (int n = 0; n < PIECE; ++n) made.v[n] = narrow(turned(row, by, i + n));
    return made;
}
#endif
