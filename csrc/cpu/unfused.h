// No product and sum are fused from here to where the file that includes it pops the options, or its end: for results that
// are the same to the bit with every instruction set. Headers whose code may be fused come before.
#pragma once
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif
