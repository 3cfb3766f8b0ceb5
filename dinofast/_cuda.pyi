"""CUDA kernels, built from csrc/cuda/bind.cpp; pointers are device pointers, the stream is its handle."""

FLOAT32: int
BFLOAT16: int
FLOAT16: int
ARCHS: tuple[int, ...]

def driver_problem() -> str: ...
def cosine_max(
    features: int,
    n: int,
    features_stride: int,
    prototypes: int,
    k: int,
    prototypes_stride: int,
    d: int,
    element: int,
    similarity: int,
    index: int,
    keys: int,
    scales: int,
    device: int,
    stream: int,
    /,
) -> None: ...
