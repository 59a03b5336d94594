// A kernel may start while the one before it still runs: what it reads of that one's results it reads after waiting. GPUs before
// Hopper know neither; there a kernel starts when the one before it is done.
__device__ __forceinline__ void waitForPrecedingKernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void letNextKernelStart() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
