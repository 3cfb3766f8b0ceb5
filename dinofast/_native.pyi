"""Native kernels for the CPU, built from csrc/bind.cpp."""

FLOAT32: int
BFLOAT16: int
FLOAT16: int
OPENMP: bool

def isa() -> str: ...
def available_isas() -> list[str]: ...
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
    threads: int,
    /,
) -> None: ...
def dpm_stats(
    x: int,
    n: int,
    stride: int,
    d: int,
    element: int,
    means: int,
    precisions: int,
    constants: int,
    k: int,
    full: bool,
    log_likelihood: int,
    count: int,
    first: int,
    second: int,
    threads: int,
    /,
) -> tuple[int, int]: ...
