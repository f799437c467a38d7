// One copy of a loop for each instruction set, chosen when the library is loaded. For loops whose results are the same
// in all: integers, and floats without a product to fuse.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__)
#define SCULPT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SCULPT_CLONES
#endif
