// One binary for all CPUs: a plain loop marked TRILOOM_CLONES is compiled for several instruction
// sets and the loader picks one. Kernels use only + - * / sqrt and integer operations and are built
// with -ffp-contract=off, so every clone gives the same bits.
#pragma once

#include <cstdlib>  // defines __GLIBC__, which tells whether the loader can pick (ifunc)

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(TRILOOM_NO_CLONES)
#if __GNUC__ >= 12
#define TRILOOM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TRILOOM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define TRILOOM_CLONES
#endif

// A body shared by several clones must be inlined into each, or it would be compiled only once,
// for the oldest CPU.
#if defined(__GNUC__)
#define TRILOOM_INLINE inline __attribute__((always_inline))
#else
#define TRILOOM_INLINE inline
#endif
