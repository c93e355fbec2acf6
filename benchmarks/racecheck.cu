// What racecheck (compute-sanitizer 2025.3) reports of a program that has no race:
//
//     mkdir -p out && nvcc -gencode=arch=compute_90a,code=sm_90a -o out/racecheck benchmarks/racecheck.cu
//     compute-sanitizer --tool racecheck out/racecheck
//
// The first warp writes eight bytes of shared memory, all warps of the block meet at barrier 1, and each warp but the
// first four reads a byte. So Triton starts the roles of a warp-specialized kernel. Nothing is reported of that, unless
// the first four warps have met at barrier 0 before, while the others wait at barrier 1 already.
#include <cstdio>

template <int MEETINGS>
__global__ void __launch_bounds__(384, 1) start(int *out) {
    __shared__ unsigned char role[8];
    __shared__ int own[128];
    if (threadIdx.x < 128) {
        for (int i = 0; i < MEETINGS; i++) {
            own[threadIdx.x] = i;
            asm volatile("bar.sync 0, 128;" ::: "memory");
        }
    }
    if (threadIdx.x < 8) role[threadIdx.x] = threadIdx.x + 1;
    asm volatile("bar.sync 1, 384;" ::: "memory");
    const int warp = threadIdx.x / 32;
    out[threadIdx.x] = warp < 4 ? 0 : *static_cast<volatile unsigned char *>(role + warp - 4);
}

template <int MEETINGS>
bool right() {
    int *out, found[384];
    cudaMalloc(&out, sizeof found);
    start<MEETINGS><<<1, 384>>>(out);
    cudaMemcpy(found, out, sizeof found, cudaMemcpyDeviceToHost);
    bool same = cudaGetLastError() == cudaSuccess;
    for (int i = 0; i < 384; i++) same = same && found[i] == (i < 128 ? 0 : i / 32 - 3);
    std::printf("start<%d>, %d barriers of the first four warps before: %s\n", MEETINGS, MEETINGS,
                same ? "right" : "WRONG");
    std::fflush(stdout);
    return same;
}

int main() { return right<0>() & right<8>() & right<16>() ? 0 : 1; }
