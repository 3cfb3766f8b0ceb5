"""Triton kernels: one `@triton.jit` and one launcher an operator.

A launcher takes the operator's arguments, already checked and with contiguous channels, and the results to
fill, on a CUDA device (or on the CPU under TRITON_INTERPRET=1). It launches on the current stream,
never synchronises, never tunes itself (block sizes come from a small table), and can be captured in a CUDA
graph after a first call. Products of float32 are computed in float32, never in TF32. NaN is carried
explicitly, because `tl.max` drops it.

`python -m dinofast.kernels --arch 90 --json` compiles every kernel ahead of time, without a GPU.
"""
