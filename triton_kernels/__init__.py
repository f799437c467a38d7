"""Triton kernels of the projection ops, one file a kernel. Importing a module of this package imports triton.

Launchers take 2-d or batched 3-d tensors of any strides, check them before anything is written, and write into the
`out` they are given, which may be `grad` itself. The only memory they allocate is the scratch their docstring names.

All are checked in the interpreter (TRITON_INTERPRET=1) and compiled for sm_80, sm_90, sm_100 and gfx942; each file says
whether its kernels have run on a GPU.
"""
