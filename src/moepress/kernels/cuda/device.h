// Everything that kernels need from a card beyond plain C++. The only file with inline PTX.
//
// Compiled by NVRTC (without headers of the host) or nvcc, this file is the CUDA side. Compiled by
// a C++ compiler, it is tests/kernels/cuda/emulator.h, which offers the same names and runs the
// threads of a grid on the CPU. Fused multiply-adds are off in both: write fmaf where one is wanted.
//
// Beside the names below, kernels may use CUDA's own: threadIdx, blockIdx, blockDim, gridDim,
// __syncthreads, __syncwarp, __shfl_*_sync, __ballot_sync, __any_sync, __all_sync,
// __reduce_add_sync, __reduce_max_sync, __byte_perm, __funnelshift_l and _r, __dp4a, __popc, __clz,
// __ffs, __umulhi, __ldg, __ldcg, __threadfence, atomicAdd on int, __float_as_uint and the like,
// functions of floats such as expf, uint2, uint4, float2, float4, int2, int4 and their make_
// functions, and on pairs of 16-bit integers __vadd2, __vaddus2, __vsub2, __vsubus2, __vsubss2,
// __vaddss2, __vminu2, __vmins2, __vmaxu2, __vmaxs2, __vcmpeq2, __vcmpltu2, __vcmpgtu2, __vcmpleu2,
// __viaddmin_u16x2, __viaddmin_s16x2, __vimin3_u16x2, __vimin3_s16x2, __vibmin_u16x2.
#pragma once

#ifndef __CUDACC__
#include "emulator.h"
#else

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

#define DEVICE __device__ __forceinline__

// The dynamic shared memory of the block, aligned to 1024 bytes.
template <class T>
DEVICE T* shared_memory() {
    extern __shared__ __align__(1024) unsigned char moepress_shared[];
    return reinterpret_cast<T*>(moepress_shared);
}

DEVICE int lane_id() { return int(threadIdx.x & 31); }
DEVICE int warp_id() { return int(threadIdx.x >> 5); }

// Wait until the kernel before this one on the stream has ended, where this one was launched without
// waiting (OVERLAP in launch.py), and let the next one come to the card. Every kernel does this before
// it writes anything, and before it reads what the kernel before it wrote. What earlier kernels wrote
// can be read before, but past L1 (__ldcg): the kernel before this one had waited for them when it
// let this one come. A block without work does it too: otherwise a kernel could end too soon.
// Never read through __ldg what the kernel before wrote, unless begin() is the first statement: the
// compiler takes such memory for constant and may move the load before the wait.
DEVICE void begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE void trap() { __trap(); }

// Fails the launch as assert() does: the message is printed, with block and thread.
extern "C" __device__ void __assertfail(const char*, const char*, unsigned, const char*, size_t);
DEVICE void fail(const char* message) { __assertfail(message, __FILE__, __LINE__, "moepress", 1); }

// Barrier `id` (1 to 15) of `threads` threads of the block, whole warps. Barrier 0: __syncthreads.
DEVICE void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Count as one of the `threads` that barrier `id` waits for, and go on. What this thread wrote before is
// visible to threads that wait there.
DEVICE void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Loads of data that is read once: past L1, through the read-only path.
DEVICE uint32_t load_stream_4(const void* p) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
DEVICE uint2 load_stream_8(const void* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(p));
    return v;
}
DEVICE uint4 load_stream_16(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
// Zeros and no read, unless `given`; through L1.
DEVICE uint4 load_16_or_zero(const void* p, bool given) {
    uint4 v;
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %5, 0; "
        "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0; "
        "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(p), "r"(int(given))
        : "memory");
    return v;
}
// Zeros and no read, unless `given`.
DEVICE uint4 load_stream_16_or_zero(const void* p, bool given) {
    uint4 v;
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %5, 0; "
        "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0; "
        "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(p), "r"(int(given)));
    return v;
}

DEVICE uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The same, in a register: compilers would compute it again and again.
DEVICE uint32_t kept_shared_address(const void* p) {
    uint32_t kept;
    asm volatile("mov.b32 %0, %1;" : "=r"(kept) : "r"(shared_address(p)));
    return kept;
}

// Asynchronous copies from global to shared memory. Their data is there after cp_async_wait, for
// this thread; for other threads after a barrier too.
DEVICE void cp_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(global)
                 : "memory");
}
DEVICE void cp_async_4(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)),
                 "l"(global)
                 : "memory");
}
// The same to a shared_address. Zeros and no read, unless `given`.
DEVICE void cp_async_16(uint32_t shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
DEVICE void cp_async_16_or_zero(uint32_t shared, const void* global, bool given) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(given ? 16 : 0)
                 : "memory");
}
DEVICE void cp_async_4_or_zero(uint32_t shared, const void* global, bool given) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global),
                 "r"(given ? 4 : 0)
                 : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are under way.
template <int pending>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit values. Lane l gives the address of row l % 8 of matrix l / 8 (16
// bytes); register i gets columns 2 (l % 4), + 1 of row l / 4 of matrix i.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d += A B: A [16, 32] bytes, B [32, 8] bytes. With g = lane / 4 and t = lane % 4:
//   a[0], a[1]: columns 4t .. 4t + 3 of rows g, g + 8; a[2], a[3]: columns 16 more
//   b[0]: rows 4t .. 4t + 3 of column g; b[1]: rows 16 more
//   d[0], d[1]: columns 2t, 2t + 1 of row g; d[2], d[3]: of row g + 8
DEVICE void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d = c + A B.
DEVICE void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const int (&c)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]),
          "r"(c[2]), "r"(c[3]));
}

// d += A B: A [16, 16], B [16, 8] of float16 (mma_f16) or bfloat16 (mma_bf16), two a register, the
// lower column or row in the lower half. With g and t as above:
//   a[0], a[1]: columns 2t, 2t + 1 of rows g, g + 8; a[2], a[3]: columns 8 more
//   b[0]: rows 2t, 2t + 1 of column g; b[1]: rows 8 more; d as above
DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Products of a warpgroup, 4 warps, which run beside other instructions. Only where the compiler
// builds for compute capability 9.0 itself (sm_90a).
//
// d = A B, or d += A B where `add`: A [64, 32] unsigned bytes, the 16 rows of each warp in its
// registers as in mma_u8s8; B [32, 128] signed bytes in shared memory, as warpgroup_columns says;
// d[c] as in mma_u8s8, columns 8 c .. 8 c + 7. Registers of a and d must stay as they are until
// warpgroup_wait; warpgroup_begin comes before a product that uses registers which other instructions
// wrote.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MOEPRESS_WARPGROUP 1

// Where B is: 128 bytes of each column follow each other, 1024 bytes aligned; the 16-byte pieces of
// column n are permuted: piece i is at i ^ n % 8. `rows`: of those 128 bytes, where the 32 begin.
DEVICE uint64_t warpgroup_columns(const void* shared, int rows) {
    const uint64_t start = (shared_address(shared) + rows) >> 4 & 0x3FFF;
    return start | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
DEVICE void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
DEVICE void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Copies that this thread waited for become visible to the products.
DEVICE void warpgroup_see_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void warpgroup_u8s8(int (&d)[16][4], const uint32_t (&a)[4], uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %69, 0; "
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p;}"
        : "+r"(d[0][0]), "+r"(d[0][1]), "+r"(d[0][2]), "+r"(d[0][3]), "+r"(d[1][0]), "+r"(d[1][1]), "+r"(d[1][2]), "+r"(d[1][3]),
          "+r"(d[2][0]), "+r"(d[2][1]), "+r"(d[2][2]), "+r"(d[2][3]), "+r"(d[3][0]), "+r"(d[3][1]), "+r"(d[3][2]), "+r"(d[3][3]),
          "+r"(d[4][0]), "+r"(d[4][1]), "+r"(d[4][2]), "+r"(d[4][3]), "+r"(d[5][0]), "+r"(d[5][1]), "+r"(d[5][2]), "+r"(d[5][3]),
          "+r"(d[6][0]), "+r"(d[6][1]), "+r"(d[6][2]), "+r"(d[6][3]), "+r"(d[7][0]), "+r"(d[7][1]), "+r"(d[7][2]), "+r"(d[7][3]),
          "+r"(d[8][0]), "+r"(d[8][1]), "+r"(d[8][2]), "+r"(d[8][3]), "+r"(d[9][0]), "+r"(d[9][1]), "+r"(d[9][2]), "+r"(d[9][3]),
          "+r"(d[10][0]), "+r"(d[10][1]), "+r"(d[10][2]), "+r"(d[10][3]), "+r"(d[11][0]), "+r"(d[11][1]), "+r"(d[11][2]), "+r"(d[11][3]),
          "+r"(d[12][0]), "+r"(d[12][1]), "+r"(d[12][2]), "+r"(d[12][3]), "+r"(d[13][0]), "+r"(d[13][1]), "+r"(d[13][2]), "+r"(d[13][3]),
          "+r"(d[14][0]), "+r"(d[14][1]), "+r"(d[14][2]), "+r"(d[14][3]), "+r"(d[15][0]), "+r"(d[15][1]), "+r"(d[15][2]), "+r"(d[15][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}
#endif

// c + the sum over four bytes of a (unsigned) times b (signed).
DEVICE int dp4a_us(uint32_t a, uint32_t b, int c) {
    int d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// x * factor, kept as a multiplication by compilers that would shift: other units do it.
DEVICE uint32_t multiplied(uint32_t x, uint32_t factor) {
    uint32_t y;
    asm("mul.lo.u32 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(factor));
    return y;
}

// float16 and bfloat16 as their bits; rounding to nearest, half to even.
DEVICE float half_to_float(uint16_t h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
DEVICE uint16_t float_to_half(float f) {
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
DEVICE float bfloat_to_float(uint16_t b) { return __uint_as_float(uint32_t(b) << 16); }
DEVICE uint16_t float_to_bfloat(float f) {
    uint16_t b;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(f));
    return b;
}
// Two of them in a register, the first one in the lower half.
DEVICE uint32_t floats_to_bfloats(float low, float high) {
    uint32_t two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
}

#endif
