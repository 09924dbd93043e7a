"""The kernel families in Triton, for any GPU that Triton compiles for; inside the package they are `fastmerge._triton`.

Kernels know only Triton: pointers, lengths and numbers come in, and nothing is allocated or launched here. What they
compute is defined by the file of the same name in `fastmerge/reference/`, bit for bit, which asks for care that plain
Triton does not take by itself:

- division and root are `tl.div_rn` and `tl.sqrt_rn`: `/` and `tl.sqrt` compile to approximations;
- every launch has `enable_fp_fusion=False`, so that a product and a sum stay two roundings;
- bfloat16 is rounded by integer arithmetic: a cast rounds one way on a GPU and another in the interpreter;
- counts, offsets and the addresses made from them are 64-bit.

A mask in a load keeps the compiler from loading 16 bytes at once, so kernels take whole tiles without one, and only the
last tile with one. Lengths are not specialised on; the alignment of pointers is, which chooses the width of loads.
"""
