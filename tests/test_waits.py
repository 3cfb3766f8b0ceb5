"""Triton kernels never wait for the device: run by the interpreter, with all that would wait refused."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from waits import interpret, nothing_waits, told

from dinofast import ops
from dinofast.errors import InputError
from dinofast.ops.registry import OPS
from dinofast.testing import as_tuple

pytest.importorskip("triton")


def release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


interpretable = pytest.mark.skipif(
    release("triton") < (3, 9) and release("numpy") >= (2, 4),
    reason="the interpreter of Triton before 3.9 cannot count a loop's rounds under NumPy 2.4 and later",
)

SAMPLES = {
    "cosine_max": ["5x2x33", "NaN and inf rows"],
    "cosine_map": ["down 9x11 to 4x5", "masked"],
    "knn_topk": ["5x2x33", "NaN and inf rows, k=2 sqeuclidean", "33x7x33, k=2 euclidean"],
    "upsample_blur": ["no blur", "bilinear reflect"],
    "farthest_point": ["first center, 33x7x33", "second center", "NaN row"],
    "kmeans_step": ["33x7x33", "NaN and inf rows", "center without rows"],
    "dpm_stats": ["diag variance 1e-6", "spherical NaN row", "full dead component"],
}


@pytest.mark.parametrize(
    "read",
    [
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.cpu,
        torch.Tensor.numpy,
        torch.Tensor.nonzero,
        bool,
        float,
        int,
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0),
    ],
)
def test_what_waits_is_refused(read) -> None:  # type: ignore[no-untyped-def]
    x = torch.ones(())
    with nothing_waits():
        torch.where(x > 0, x, -x).sum().expand(3).contiguous()
    refusal = pytest.raises((AssertionError, InputError), match=r"waits for the device|cannot be captured")
    with refusal, nothing_waits():
        read(x)


@pytest.fixture(scope="module")
def waits_of_operators() -> dict[str, str]:
    """What waited in each operator; nothing where nothing did."""
    return told(f"""
offered = {{name for name, op in OPS.items() if any(k.backend == "triton" for k in op.kernels)}}
assert offered == {set(SAMPLES)!r}, offered

def run(name, labels):
    op = OPS[name]
    kernel = next(kernel for kernel in op.kernels if kernel.backend == "triton")
    samples = {{sample.name: sample.args for sample in op.samples()}}
    for label in labels:
        wanted = as_tuple(kernel.run(*samples[label]))  # fills what is cached for a device
        with nothing_waits(label):
            found = as_tuple(kernel.run(*samples[label]))
        for one, other in zip(found, wanted):
            assert torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0)), label

tell({SAMPLES!r}, run)
""")


@interpretable
@pytest.mark.parametrize("name", SAMPLES)
def test_no_operator_waits(waits_of_operators: dict[str, str], name: str) -> None:
    assert waits_of_operators[name] == ""


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", SAMPLES)
def test_every_operator_is_recorded_in_a_graph(name: str) -> None:
    op, device = OPS[name], torch.device("cuda")
    kernel = next(kernel for kernel in op.kernels if kernel.backend == "triton")
    samples = {sample.name: sample.args for sample in op.samples()}
    for label in SAMPLES[name]:
        args = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in samples[label])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                wanted = as_tuple(kernel.run(*args))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with ops.keeping() as tables, torch.cuda.graph(graph):
            found = as_tuple(kernel.run(*args))
        for result in found:
            result.fill_(7)
        graph.replay()
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        del tables


@interpretable
def test_statistics_of_several_chunks_do_not_wait_and_their_memory_is_bounded() -> None:
    interpret("""
import triton.runtime.interpreter as interpreter
from dinofast.kernels import dpm_stats
from dinofast.memory_plan import _Counting
kernel = next(kernel for kernel in OPS["dpm_stats"].kernels if kernel.backend == "triton")

SHAPES = {"diag": "kd", "spherical": "k", "full": "kdd"}

def shapes(n, k, d, kind):
    wide = [{"k": k, "d": d}[letter] for letter in SHAPES[kind]]
    return (n, d), (k, d), wide, (k,)

for kind in SHAPES:
    x, means, precisions, weights = (torch.rand(shape, generator=draw) for shape in shapes(70, 3, 2, kind))
    precisions = precisions @ precisions.mT + torch.eye(2) if kind == "full" else precisions
    args = x, means, precisions, weights, kind
    whole = kernel.run(*args)
    sizes = dict(dpm_stats.PAIRS)
    dpm_stats.PAIRS.update(diagonal=1, full=1)  # chunks of 64 rows
    with nothing_waits(kind):
        found = kernel.run(*args)
    dpm_stats.PAIRS.update(sizes)
    assert torch.equal(found[0], whole[0])
    torch.testing.assert_close(found[1:], whole[1:])

interpreter.InterpretedFunction.__getitem__ = lambda self, grid: lambda *args, **options: None

def peak(n, k, d, kind, dtype):
    x, *parameters = (torch.empty(shape, device="meta") for shape in shapes(n, k, d, kind))
    x = x.to(dtype)
    with _Counting("cuda") as counting:
        results = kernel.run(x, *parameters, kind)
    return counting.peak

MIB = 1 << 20
for kind in ("diag", "spherical"):
    for dtype in (torch.float32, torch.bfloat16):
        took = peak(12288, 500, 384, kind, dtype)
        pairs = 12288 * 500 * (4 + 2)  # where all pairs of a chunk have their place
        assert pairs < took < pairs + 4 * MIB <= 64 * MIB, (kind, dtype, took / MIB)
        assert peak(120_000, 500, 384, kind, dtype) <= 64 * MIB
        assert peak(12288, 20_000, 8, kind, dtype) <= 64 * MIB
""")


@interpretable
def test_loops_of_selection_and_searches_of_banks_do_not_wait() -> None:
    interpret("""
from dinofast.models.coreset import _one_by_one, k_center
rows = torch.randn(90, 12, generator=draw)
with ops.backend("triton"):
    select, index = _one_by_one(rows, torch.tensor([4]), False), torch.empty(20, dtype=torch.int64)
    with nothing_waits("k_center"):
        select(index)
    wanted = k_center(rows, 21, start=4)
    assert wanted.tolist() == [4, *index.tolist()]
    for bank in (ops.Bank(rows, strategy="lowp"), ops.Bank(rows.bfloat16()), ops.Bank(rows)):
        wanted = ops.knn_topk(rows[:7] + 0.1, bank, 3)
        with nothing_waits("Bank"):
            found = ops.knn_topk(rows[:7] + 0.1, bank, 3)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted))
        assert bank.candidates[0] >= 3
""")


DETECTOR = """
from pathlib import Path as File
from lanes import Lanes
from textures import weave
from dinofast import Detector, backbone, models
from dinofast.capture.path import Path
from dinofast.errors import InputError
from waits import Reads
lite0 = backbone.load("efficientnet-lite0", size=64, device="cpu")
"""
SCORED = {
    "memory_bank": ["", "n_neighbors=3", "metric='euclidean'"],
    "patchcore": ["coreset_ratio=0.5"],
    "dpmm": [f"n_components=3, n_epochs=1, scoring={how!r}" for how in ("cosine", "euclidean", "mixture")],
    "spatial_ar": ["n_epochs=1, hidden=8, n_layers=2, dilations=1"],
    "support_kmeans": ["match_descriptor='mean_foreground_patch', foreground='otsu'"],
}


@pytest.fixture(scope="module")
def waits_of_paths() -> dict[str, str]:
    """What waited on the path of each model."""
    return told(
        DETECTOR
        + f"""
def run(name, choices):
    for params in choices:
        model = eval(f"models.create({{name!r}}, {{params}})")
        detector = Detector(lite0, model).fit([weave(i, (64, 64)) for i in range(3)])
        path, pixels = Path(lite0, detector.model, (64, 64)), torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
        with ops.backend("triton"):
            path(pixels)  # fills what is cached for a device
            with Reads():
                path.check(pixels)

tell({SCORED!r}, run)
"""
    )


@interpretable
@pytest.mark.parametrize("name", SCORED)
def test_no_scoring_path_of_a_captured_model_waits(waits_of_paths: dict[str, str], name: str) -> None:
    assert waits_of_paths[name] == ""


@interpretable
def test_a_bank_whose_rows_are_on_the_host_is_refused_before_recording() -> None:
    interpret(
        DETECTOR
        + """
detector = Detector(lite0, models.create("memory_bank", n_neighbors=2))
detector.fit([weave(i, (64, 64)) for i in range(3)])
with ops.backend("triton"):
    bank = ops.Bank(detector.model.bank, strategy="lowp")
type(detector.model)._searched = lambda self, metric: bank
recorder = Lanes()
with ops.backend("triton"):
    captured = detector.capture((64, 64), recorder=recorder)
    bank._coded._gathers = True  # as it does where rows are on the host and the device is another
    recorder.events.clear()
    try:
        detector.capture((64, 64), recorder=recorder)
    except InputError as error:
        assert "Bank: cannot be captured: its rows are on cpu, from where the host" in str(error), error
    else:
        raise SystemExit("it was captured")
    assert recorder.events == ["aside"], recorder.events
    bank.search(detector.model.bank[:3], 2)  # without a graph it may
"""
    )
