"""Native kernels for the CPU, built from csrc/bind.cpp."""

FLOAT32: int
BFLOAT16: int
FLOAT16: int
OPENMP: bool
MAX_K: int
INT8_COLUMNS: int
INT8_MAX_D: int

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
def int8_isa() -> str: ...
def unit_rows(rows: int, m: int, stride: int, d: int, element: int, out: int, threads: int, /) -> int: ...
def quantize_bank(
    packed: list[int], m: int, columns: int, groups: int, depth: int, d: int, metric: int, threads: int, /
) -> None: ...
def knn_topk_bank(
    queries: int,
    q: int,
    queries_stride: int,
    d: int,
    element: int,
    packed: list[int],
    m: int,
    columns: int,
    groups: int,
    depth: int,
    k: int,
    metric: int,
    probes: int,
    distance: int,
    index: int,
    visited: int,
    threads: int,
    /,
) -> None: ...
def upsample_blur(
    maps: int,
    batch: int,
    h: int,
    rows: tuple[int, int, int, int],
    columns: tuple[int, int, int, int],
    width: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def cosine_map(
    features: int,
    n: int,
    features_stride: int,
    prototypes: int,
    k: int,
    prototypes_stride: int,
    d: int,
    element: int,
    mask: int,
    h: int,
    rows: tuple[int, int, int, int],
    columns: tuple[int, int, int, int],
    width: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def farthest_point(
    rows: int,
    n: int,
    stride: int,
    d: int,
    element: int,
    min_distance: int,
    center: int,
    nearest: int,
    threads: int,
    /,
) -> int: ...

class KCenter:
    def __init__(
        self,
        rows: int,
        n: int,
        stride: int,
        d: int,
        starts: list[int],
        mean: bool,
        limit: int,
        threads: int,
        /,
    ) -> None: ...
    def select(self, count: int, index: int, threads: int, /) -> None: ...

def kmeans_step(
    rows: int,
    n: int,
    stride: int,
    d: int,
    element: int,
    centers: int,
    k: int,
    centers_stride: int,
    index: int,
    sq_distance: int,
    sums: int,
    counts: int,
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
) -> tuple[int, int, float]: ...
