"""Triton kernels without a GPU: compiled ahead of time for three architectures, run by the interpreter."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")
TABLE = Path(__file__).parents[1] / "bench/results/triton-aot.json"
HELPERS = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
OTHER_SPILLS = 48
"""Bytes that a thread may spill under a Triton that the table does not record; 3.6.0 spills 44 on sm_90."""


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": HELPERS, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def release(package):
    return tuple(int(part) for part in version(package).split(".")[:2])


def names(found):
    return sorted(x["operator"] for x in found)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_ahead_of_time_to_what_the_table_records(arch):
    run = run_python("-m", "dinofast.kernels", "--arch", str(arch), "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    for name in (x for x in OPERATORS if " " not in x):
        assert any(x["operator"].startswith(f"{name}.") for x in found), name
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": "", "kernels": []}
    same_triton = table["triton"] == version("triton")
    for kernel in found:
        assert kernel["arch"] == arch
        assert 0 < kernel["registers"] <= 255
        assert kernel["shared"] <= SHARED_LIMIT[arch]
        assert kernel["spills"] <= (0 if same_triton else OTHER_SPILLS), kernel
    if not TABLE.exists():
        return  # an installed wheel, without bench/
    recorded = [x for x in table["kernels"] if x["arch"] == arch]
    assert names(recorded) == names(found), f"renew it: python -m dinofast.kernels --record {TABLE.name}"
    if same_triton:
        assert recorded == found, f"renew it: python -m dinofast.kernels --record {TABLE.name}"


@pytest.mark.skipif(not TABLE.exists(), reason="an installed wheel, without bench/")
def test_multiprocessors_hold_as_many_programs_as_launches_take_them_to():
    from dinofast.kernels.compile import variants

    taken = {v.name: (v.options["num_warps"], v.per_processor) for v in variants()}
    assert {count for _, count in taken.values()} == {1, 2}
    for kernel in json.loads(TABLE.read_text())["kernels"]:
        warps, count = taken[kernel["operator"]]
        registers = -(-kernel["registers"] // 8) * 8  # as they are given out
        assert count * warps * 32 * registers <= 65536, kernel
        assert count * (kernel["shared"] + 1024) <= SHARED_LIMIT[kernel["arch"]] + 1024, kernel


def test_a_kernel_that_does_not_compile_fails_the_run():
    code = """
import sys
from dataclasses import replace
from dinofast.kernels import __main__, compile
good = compile.variants()[-1]
compile.variants = lambda: [good, replace(good, name="broken", constants={"ROWS": 100})]
sys.argv = ["dinofast.kernels", "--json"]
sys.exit(__main__.main())
"""
    run = run_python("-c", code)
    assert run.returncode == 1, run.stderr
    assert "broken, sm_90: " in run.stderr
    assert len(json.loads(run.stdout)) == 1


INTERPRETED = """
import sys
import warnings
import torch
warnings.filterwarnings("ignore", "(invalid value|overflow) encountered")  # numpy, on the broken rows
from dinofast import ops
from dinofast.errors import KernelError
from dinofast.ops.registry import OPS
from dinofast.testing import assert_kernel, cast_inputs

def hold(name, chosen, in_half):
    op = OPS[name]
    kernel = next(kernel for kernel in op.kernels if kernel.backend == "triton")
    samples = {sample.name: sample.args for sample in op.samples()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for label in (chosen or samples) if dtype == torch.float32 else in_half:
            args = cast_inputs(op, samples[label], dtype)
            assert kernel.refuse(*args) is None, label
            try:
                assert_kernel(op, kernel, args)
            except AssertionError as error:
                sys.exit(f"{label}, {dtype}: {error}")
    print("checked", len(samples))
"""

OPERATORS = {
    "cosine_max": """
in_half = ["ties", "zero row", "NaN and inf rows", "tiny and huge rows", "strided", "transposed"]
hold("cosine_max", [], in_half)
with ops.backend("triton"):
    rows = torch.eye(3)
    assert ops.cosine_max(rows, rows[[1, 0, 0, 2, 0]].repeat(30, 1))[1].tolist() == [1, 0, 3]
    broken = torch.randn(70, 3)
    broken[66, 1] = torch.nan
    assert bool(ops.cosine_max(rows, broken)[0].isnan().all())
    similarity, index = ops.cosine_max(torch.zeros(2, 3), -rows)
    assert similarity.tolist() == [0, 0] and index.tolist() == [0, 0]
""",
    "knn_topk": """
hold(
    "knn_topk",
    [
        "0x3x33", "5x2x33", "9x2100x33", "65x37x384, k=2 euclidean", "ties, k=2 cosine",
        "zero row, k=2 cosine",
        "NaN and inf rows, k=2 sqeuclidean", "tiny and huge rows, k=2 cosine", "strided, k=2 euclidean",
        "transposed, k=2 sqeuclidean", "k=64",
    ],
    ["ties, k=2 euclidean", "NaN and inf rows, k=2 cosine", "strided, k=2 sqeuclidean"],
)
with ops.backend("triton"):
    rows = torch.eye(3)
    bank = rows[[1, 0, 0, 2, 0, 1]]
    distance, index = ops.knn_topk(5 * rows[:1], bank, k=5)
    assert (distance.tolist(), index.tolist()) == ([[0, 0, 0, 1, 1]], [[1, 2, 4, 0, 3]])
    many = torch.cat([rows[[2]].repeat(200, 1), rows[[0]].repeat(3, 1)])  # equals in several parts
    assert ops.knn_topk(rows[[2, 0]], many, 4)[1].tolist() == [[0, 1, 2, 3], [200, 201, 202, 0]]
    bank[4, 1] = torch.nan
    for metric in ("cosine", "euclidean", "sqeuclidean"):
        distance, index = ops.knn_topk(rows, bank, 2, metric)
        assert bool(distance.isnan().all()) and index.tolist() == [[0, 1]] * 3
    far = torch.full((1, 64), 1000.0)
    near = torch.cat([far + 1, far + 2**-8])  # the expanded form is off by 8 here
    distance, index = ops.knn_topk(far, near, 2, "sqeuclidean")
    assert (distance.tolist(), index.tolist()) == ([[2**-10, 64.0]], [[1, 0]])
    try:
        ops.knn_topk(rows, torch.randn(70, 3), 65)
    except KernelError as error:
        assert "triton: wants k <= 64, got 65" in str(error)
    else:
        sys.exit("k = 65 was not refused")
""",
    "knn_topk of any number of multiprocessors": """
from dinofast.kernels import knn_topk, schedule
draw = torch.Generator().manual_seed(1)
queries, bank = (torch.randn(n, 40, generator=draw) for n in (70, 700))
bank[300:364] = bank[:64]
asked = [(queries, bank, k, metric) for k, metric in ((1, "cosine"), (3, "sqeuclidean"), (20, "cosine"))]
asked.append((queries[:1].half(), bank.half(), 1, "euclidean"))
asked.append((queries[:3], bank[:130], 20, "euclidean"))  # the last part has two rows
assert all(launch.columns >= knn_topk.MAX_K for launch in knn_topk.LAUNCHES.values())
found = []
for count in (1, 3, 132):
    schedule.INTERPRETED = count
    hold("knn_topk", ["33x7x33", "ties, k=2 cosine", "NaN and inf rows, k=2 euclidean"], ["strided"])
    with ops.backend("triton"):
        found.append([x for args in asked for x in ops.knn_topk(*args)])
for others in found[1:]:
    assert all(torch.equal(a, b) for a, b in zip(found[0], others))
scaled = []
knn_topk.scale_factors = lambda rows, of=knn_topk.scale_factors: scaled.append(len(rows)) or of(rows)
with ops.backend("triton"):
    ops.knn_topk(queries, bank, 2)
assert scaled == [len(queries)], scaled  # the bank is read by the scan alone
""",
    "knn_topk and cosine_max of rows far from unit norm": """
draw = torch.Generator().manual_seed(2)
queries, bank = torch.randn(3, 40, generator=draw), torch.randn(256, 40, generator=draw)
bank[64:128] = bank[:64]
for far in (1e-30, 1e-42, 1e30):
    for at in (7, 64 + 7):  # a tile that is scaled before one that is not, and after
        rows = bank.clone()
        rows[at] *= far
        args = (torch.cat([queries, 2 * rows[[9, 73]], far * queries[:1]]), rows)
        hold_all = {"knn_topk": (*args, 4, "cosine"), "cosine_max": args}
        for name, given in hold_all.items():
            op = OPS[name]
            assert_kernel(op, next(k for k in op.kernels if k.backend == "triton"), given)
        with ops.backend("triton"):
            assert ops.knn_topk(*args, 2)[1][3:5].tolist() == [[9, 73], [9, 73]], (far, at)
            assert ops.cosine_max(*args)[1][3:5].tolist() == [9, 9], (far, at)
huge = torch.full((2, 40), 1e19)  # squares overflow: no row is broken
huge[1] = -huge[1]
with ops.backend("triton"):
    assert ops.knn_topk(queries, torch.cat([bank, huge]), 1, "sqeuclidean")[0].isfinite().all()
    huge[0, 39] = -torch.inf
    assert ops.knn_topk(queries, torch.cat([bank, huge]), 1, "sqeuclidean")[0].isnan().all()
print("checked")
""",
    "cosine_map": """
small = [s.name for s in OPS["cosine_map"].samples() if s.name != "32x32 to 112x112"]
halves = ["up 5x6 to 33x130", "masked", "strided"]
hold("cosine_map", small, halves)
from dinofast.kernels import cosine_map
assert cosine_map.ONE_WAVE > 0
cosine_map.ONE_WAVE = 0  # as for many images: two launches
hold("cosine_map", small, halves)
features, many = torch.randn(1, 4, 5, 40), torch.randn(1030, 40)  # beyond what one program compares
with ops.backend("triton"):
    got = ops.cosine_map(features, many, (9, 11))
with ops.backend("reference"):
    torch.testing.assert_close(got, ops.cosine_map(features, many, (9, 11)), rtol=0, atol=1e-6)
""",
    "upsample_blur": """
large = ("32x32 to 112x112", "NaN and inf to 63x90, sigma 1.0, bilinear")
small = [s.name for s in OPS["upsample_blur"].samples() if s.name not in large]
hold("upsample_blur", small, ["no blur", "strided", "bilinear reflect"])
""",
    "kmeans_step": """
hold(
    "kmeans_step",
    [
        "0x3x33", "33x64x33", "65x37x7", "ties", "zero row", "NaN and inf rows", "strided", "transposed",
        "tiny and huge scales", "far from the origin", "duplicate rows", "rows that are centers", "all ties",
        "center without rows", "NaN center",
    ],
    ["33x7x33", "NaN and inf rows", "duplicate rows"],
)
""",
    "dpm_stats": """
import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

def to_nearest(x, source, target, mode, truncate=interpreter._convert_float):
    if (source, target) != (tl.float32, tl.bfloat16):
        return truncate(x, source, target, mode)
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

interpreter._convert_float = to_nearest  # as a GPU does; the interpreter truncates: less comes out
hold("dpm_stats", [], ["diag strided", "spherical variance 1e-6", "full NaN row"])
import math
from dinofast.kernels import dpm_stats
from dinofast.kernels.full_covariance import Full
from dinofast.kernels import full_covariance, responsibilities
from dinofast.kernels.responsibilities import Diagonal
from dinofast.ops.dpm_stats import negligible_nats
from mixtures import mixture
op = OPS["dpm_stats"]
kernel = next(kernel for kernel in op.kernels if kernel.backend == "triton")


def assert_bounds_are_above(x, means, precisions, log_weights, kind):
    truth = [
        op.reference(*(t.double() for t in (x, means[[i]], precisions[[i]], log_weights[[i]])), kind)[0]
        for i in range(len(means))
    ]
    bounds = torch.full((len(means), 64), torch.nan)
    (Full if kind == "full" else Diagonal)(means, precisions, log_weights, 1.0).bound(x, bounds)
    truth, bounds = torch.stack(truth), bounds[:, : len(x)].double()
    assert bool((bounds >= truth).all()), kind
    return (bounds >= truth.amax(0) - negligible_nats(len(means))).double().mean()

responsibilities.WIDTH = full_covariance.WIDTH = 16
for d in (1, 2):
    for kind in ("diag", "spherical", "full"):
        assert_bounds_are_above(*mixture(60, 30, d, kind, 1.0))
for kind in ("diag", "spherical", "full"):
    for args in (
        mixture(12, 18, 35, kind, 0.3), mixture(9, 7, 70, kind, 5.0), mixture(17, 5, 9, kind, 1e-3, 1e-8),
        mixture(9, 18, 5, kind, 0.0),
    ):
        assert_kernel(op, kernel, args)
        assert_bounds_are_above(*args)
    x, means, *others = mixture(30, 20, 130, kind, 3.0)
    assert assert_bounds_are_above(x, means, *others) < 0.06
    assert_bounds_are_above(x + 100, means + 100, *others)
    assert_bounds_are_above(1e15 * x, 1e15 * means, *others)
    nats = negligible_nats(4) * torch.tensor([0.0, 0.999, 1.001, 2.0])
    ones = {"diag": torch.ones(4, 1), "spherical": torch.ones(4), "full": torch.ones(4, 1, 1)}[kind]
    count = kernel.run(torch.zeros(1, 1), (2 * nats).sqrt()[:, None], ones, torch.zeros(4), kind)[1]
    assert (count > 0).tolist() == [True, True, False, False]
    for size in (1e-30, 1e15):
        args = mixture(10, 6, 5, kind)
        args[0][::3] *= size
        assert_kernel(op, kernel, args)
    args[0][::3] *= 1e15  # beyond float32 the log-likelihood is -inf, the sums are not
    for got, wanted in zip(kernel.run(*args)[:3], op.reference(*args)):
        torch.testing.assert_close(got, wanted)
    args = mixture(66, 3, 4, kind, 0.5)
    whole = kernel.run(*args)
    assert all(torch.equal(a, b) for a, b in zip(whole, kernel.run(*args)))
    sizes = dict(dpm_stats.PAIRS)
    dpm_stats.PAIRS.update(diagonal=1, full=1)  # chunks of 64 rows
    assert_kernel(op, kernel, args)
    assert torch.equal(kernel.run(*args)[0], whole[0])
    dpm_stats.PAIRS.update(sizes)
    for position in (1, 3):
        for value in (math.nan, math.inf):
            args = mixture(9, 3, 4, kind)
            args[position].view(-1)[1] = value
            assert all(bool(result.isnan().all()) for result in kernel.run(*args)), (kind, position, value)
    args = mixture(5, 3, 4, kind)
    args[3].fill_(-torch.inf)
    log_likelihood, *sums = kernel.run(*args)
    assert log_likelihood.tolist() == [-math.inf] * 5 and not any(bool((s != 0).any()) for s in sums)
    args = mixture(5, 3, 4, kind)
    for wrong in (-args[2][1], torch.zeros_like(args[2][1])):
        args[2][1] = wrong
        assert all(bool(result.isnan().all()) for result in kernel.run(*args)), (kind, wrong)
""",
    "farthest_point": """
hold("farthest_point", [], [s.name for s in OPS["farthest_point"].samples()])
rows = torch.randn(300, 6)
picked = {}
for backend in ("triton", "reference"):
    distance, index, picked[backend] = torch.full((300,), torch.inf), torch.tensor(17), []
    with ops.backend(backend):
        for _ in range(12):
            picked[backend].append(int(index))
            distance, index = ops.farthest_point(rows, distance, index)
assert picked["triton"] == picked["reference"], picked
for outside in (-1, 300):
    with ops.backend("triton"):
        distance, index = ops.farthest_point(rows, torch.zeros(300), torch.tensor(outside))
    assert bool(distance.isnan().all()) and int(index) == 0
""",
}


SCHEDULE = """
import itertools
from dinofast.kernels import schedule

sizes = (1, 2, 16, 192, 3000), (1, 7, 1563, 120000), (1, 3, 132, 264)
for blocks, tiles, programs in itertools.product(*sizes):
    parts, share = schedule.split(blocks, tiles, programs)
    assert (parts - 1) * share < tiles <= parts * share
    assert parts == 1 or blocks * parts <= schedule.MOST_ITEMS
    time = -(-blocks * parts // programs) * share
    for p in range(1, min(tiles, max(1, schedule.MOST_ITEMS // blocks)) + 1):
        other = -(-blocks * p // programs) * -(-tiles // p)
        assert time <= 1.05 * other and (p >= parts or other > time / 1.06), (blocks, tiles, programs, p)
    if tiles >= programs >= blocks:  # none is idle for long
        assert blocks * tiles / (programs * time) > 0.85 or blocks * tiles < 2000, (blocks, tiles, programs)
"""


def test_the_bank_is_split_so_that_no_multiprocessor_is_idle():
    run = run_python("-c", SCHEDULE)
    assert run.returncode == 0, run.stdout + run.stderr


OLD_GPU = """
from types import SimpleNamespace
import torch
from dinofast.ops import OPS
torch.cuda.get_device_capability, torch.cuda.get_device_name = lambda _: (7, 5), lambda _: "Tesla T4"
old = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
for name, op in OPS.items():
    for kernel in (kernel for kernel in op.kernels if kernel.backend == "triton"):
        print(name, kernel.refuse(old))
"""


def test_every_kernel_refuses_a_gpu_that_triton_does_not_serve():
    run = run_python("-c", OLD_GPU, TRITON_INTERPRET="1")
    told = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    assert set(told) == {name for name in OPERATORS if " " not in name}, run.stderr
    assert all("Tesla T4 has compute capability 7.5" in reason for reason in told.values())


BESIDE_ZERO = """
import torch
from dinofast.ops import backend, cosine_max
row = torch.full((1, 40), 1e-4).half()
row[0, 0] = 65504
bank = torch.cat([row, torch.zeros_like(row)])
queries = torch.zeros(1, 40).half()
queries[0, 1] = 1
with backend("triton"):
    alone, beside = (cosine_max(queries, x)[0] for x in (bank[:1], bank))
    assert alone.item() == beside.item() > 0, (alone, beside)
"""


def test_a_zero_row_of_half_precision_leaves_the_others_of_its_tile_alone():
    done = run_python("-W", "ignore", "-c", BESIDE_ZERO, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


BLOCKS = """
import torch
from dinofast.kernels.resample import blocks
from dinofast.ops.providers.triton import _axis
from dinofast.ops.upsample_blur import resample_weights

for patches, pixels in [(32, 448), (16, 37), (5, 33), (37, 518), (9, 4), (7, 7), (1, 50), (200, 3)]:
    axis = _axis(resample_weights(patches, pixels, 0.0, "bilinear", "reflect")[0], torch.device("cpu"))
    for most, size in axis.blocks.items():
        touched = [set(block.flatten().tolist()) - {-1} for block in axis.index.split(size)]
        assert all(max(t) - min(t) < most for t in touched), (patches, pixels, most, size)
        double = [set(block.flatten().tolist()) - {-1} for block in axis.index.split(2 * size)]
        assert size == 64 or any(max(t) - min(t) >= most for t in double), (patches, pixels, most, size)
assert blocks(torch.tensor([[0, 1], [1, 2], [-1, 2], [2, 3]], dtype=torch.int32), 3, 4) == {3: 2, 4: 64}
"""


def test_blocks_of_pixels_touch_as_many_patches_as_they_may():
    run = run_python("-W", "error", "-c", BLOCKS, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(
    release("triton") < (3, 9) and release("numpy") >= (2, 4),
    reason="the interpreter of Triton before 3.9 cannot count a loop's rounds under NumPy 2.4 and later",
)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_interpreter_agrees_with_the_reference(name):
    run = run_python("-W", "error", "-c", INTERPRETED + OPERATORS[name], TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("checked"), run.stdout + run.stderr
