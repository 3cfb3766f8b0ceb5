"""Native kernels for the CPU, built from csrc/bind.cpp."""

FLOAT32: int
BFLOAT16: int
FLOAT16: int
OPENMP: bool
MAX_K: int

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
def knn_topk(
    queries: int,
    q: int,
    queries_stride: int,
    bank: int,
    m: int,
    bank_stride: int,
    d: int,
    element: int,
    prepared: bool,
    k: int,
    metric: int,
    distance: int,
    index: int,
    threads: int,
    /,
) -> None: ...
