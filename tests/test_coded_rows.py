"""Rows behind codes: the scan of codes never changes a result. Triton's interpreter runs it, no GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SETUP = """
import warnings
import numpy as np
import torch
warnings.filterwarnings("ignore", "(invalid value|overflow) encountered")  # numpy, on rows beyond float32
from dinofast import kernels, ops
from dinofast.errors import InputError
from dinofast.kernels import knn_topk_coded
from dinofast.ops import coded_rows, providers
from dinofast.ops.coded_rows import CodedRows

CPU = torch.device("cpu")
draw = torch.Generator().manual_seed(3)

def randn(*shape):
    return torch.randn(*shape, generator=draw)

def unit(rows, metric):
    rows = rows.float()
    if metric != "cosine":
        return rows.numpy()
    first, second = providers.unit_factors(rows)
    return (rows * first[:, None] * second[:, None]).numpy()

def truth(x, y, k, metric):
    '''The k smallest (distance, index) of all direct differences in float32, summed by halves of 64 lanes.'''
    x, y = unit(x, metric), unit(y, metric)
    gap = x[:, None] - y[None]
    squares = np.zeros((*gap.shape[:2], 64), np.float32)
    for start in range(0, gap.shape[2], 64):
        part = gap[:, :, start : start + 64]
        squares[:, :, : part.shape[2]] += part * part
    while squares.shape[2] > 1:
        squares = squares[:, :, ::2] + squares[:, :, 1::2]
    found = squares[:, :, 0]
    if metric == "cosine":
        either = ~(x != 0).any(1)[:, None] | ~(y != 0).any(1)[None]
        found = np.minimum(np.where(either, np.float32(1), found / np.float32(2)), np.float32(2))
    elif metric == "euclidean":
        found = np.sqrt(found)
    index = np.argsort(found, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(found, index, 1), index

def hold(label, x, y, k, metric, kind, gathers=False):
    coded = CodedRows(y, metric, kind, CPU)
    coded._gathers = gathers  # as it does where rows are on the host and the device is another
    distance, index = coded.search(x, k)
    wanted, at = truth(x, y, k, metric)
    assert (distance.numpy() == wanted).all(), (label, kind, k, metric, distance, wanted)
    assert (index.numpy() == at).all(), (label, kind, k, metric, index, at)
    assert coded.used.shape == (len(x),) and bool((coded.used >= k).all()), (label, coded.used)
    return coded.used

forced = ops.backend("triton")  # kept, or it ends
forced.__enter__()
"""


def interpret(code):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SETUP + code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "sqeuclidean"])
def test_all_codes_give_the_smallest_direct_differences(metric):
    interpret(
        f"metric = {metric!r}"
        + """
x, y = randn(5, 70), randn(150, 70)
clusters = randn(4, 70)[torch.arange(150) % 4] + 0.01 * y
tied = y.clone()
tied[40:80] = tied[3]
tied[100:] = tied[:50]
near = y[:1] + 3e-7 * y  # distances differ by roundings alone
cases = {
    "random": (x, y),
    "clusters": (clusters[:5] + 0.01 * x, clusters),
    "tied": (torch.cat([tied[:2] + 0.1 * x[:2], tied[3:6]]), tied),
    "near ties": (torch.cat([y[:1] + 1e-6 * x[:2], x[:3]]), near),
}
for label, (queries, rows) in cases.items():
    for k, kind in ((1, torch.int8), (7, torch.float32)) if label != "tied" else ((7, torch.int8),):
        hold(label, queries, rows, k, metric, kind)
        half = rows.bfloat16()
        hold(label, queries, half, 8 - k, metric, torch.bfloat16)
hold("most", x[:2], y, 64, metric, torch.int8)
hold("bank of k", x[:2], y[:3], 3, metric, torch.int8)
hold("half queries", x[:2].bfloat16(), y.bfloat16(), 2, metric, torch.bfloat16)
"""
    )


def test_few_candidates_are_decided_and_a_full_list_is_never_cut():
    interpret("""
x, y = randn(6, 96), randn(600, 96)
used = hold("random", x, y, 2, "cosine", torch.int8)
assert float(used.float().mean()) < 12, used
dense = y[:1] + 1e-4 * randn(600, 96)
queries = torch.cat([y[:2] + 1e-4 * x[:2], x[:2]])
knn_topk_coded.ROOM = 8
used = hold("dense", queries, dense, 2, "euclidean", torch.int8)
assert int(used.max()) == 600, used
coded_rows.CODED, coded_rows.GATHERED = 96 * 250, 3  # several blocks, several slices
used = hold("dense on the host", queries[1:], dense, 2, "cosine", torch.int8, True)
used = hold("random on the host", x[:3], y.bfloat16(), 2, "sqeuclidean", torch.int8, True)
assert int(used.max()) < 60, used
""")


def test_a_bank_searches_by_codes_and_tells_bytes_and_candidates(tmp_path):
    interpret(
        f"path = {str(tmp_path)!r}"
        + """
x, y = randn(3, 384), randn(200, 384)
lowp = ops.Bank(y, strategy="lowp")
half = ops.Bank(y.bfloat16())
plain = ops.Bank(y)
assert [b.strategy for b in (lowp, half, plain)] == ["lowp", "lowp", "float32"], plain.reason
assert ops.Bank(y, strategy="pruned").reason == "'pruned' runs on the CPU only"
assert half.rows.dtype == torch.bfloat16 and half.rows.data_ptr() == half._coded.codes.codes.data_ptr()
BRATS, GB = 7_680_000 / 200, 1e9
rows = lowp.rows.nbytes
assert (lowp.nbytes_by_device["cpu"] - rows) * BRATS <= 3.5 * GB, "codes on the device, rows on the host"
assert half.nbytes * BRATS <= 6.5 * GB and half.nbytes == sum(half.nbytes_by_device.values())
assert lowp.candidates != lowp.candidates  # NaN
found = [ops.knn_topk(x, bank, 2) for bank in (lowp, plain)]
assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
mean, most = lowp.candidates
assert 2 <= mean <= most < 100 and lowp.visited_share == 1, (mean, most)
lowp.add(x).remove(torch.arange(10))
distance, index = lowp.search(x, 1)
assert index.flatten().tolist() == [190, 191, 192] and float(distance.max()) < 1e-6
half.add(x.bfloat16())
assert half.search(x.bfloat16(), 1)[1].flatten().tolist() == [200, 201, 202]
try:
    half.add(x)
except InputError as error:
    assert "keeps torch.bfloat16" in str(error)
else:
    raise SystemExit("float32 rows were rounded")
half.save(path + "/bank")
assert ops.Bank.load(path + "/bank").search(x.bfloat16(), 1)[1].flatten().tolist() == [200, 201, 202]
np.save(path + "/rows.npy", y.numpy())
mapped = ops.Bank(np.load(path + "/rows.npy", mmap_mode="r"), "euclidean", "lowp", device="cpu")
mapped._coded._gathers = True
assert mapped.mapped and mapped.strategy == "lowp"
wanted, at = truth(x, y, 3, "euclidean")
distance, index = mapped.search(x, 3)
assert (distance.numpy() == wanted).all() and (index.numpy() == at).all()
with ops.backend("reference"):
    assert torch.equal(lowp.search(x, 2)[1], ops.Bank(lowp.rows).search(x, 2)[1])
    try:
        ops.Bank(y, device="cuda")
    except InputError as error:
        assert "cannot be searched on cuda:0" in str(error)
    else:
        raise SystemExit("a device without kernels was taken")
for wrong in (lambda: lowp.search(x[:, :5], 1), lambda: lowp.search(x, 0), lambda: lowp.search(x, 500)):
    try:
        wrong()
    except RuntimeError as error:
        assert str(error).startswith("knn_topk: "), error
    else:
        raise SystemExit("taken")
"""
    )


def test_zero_broken_tiny_and_huge_rows_and_queries():
    interpret("""
y = randn(90, 40)
y[[3, 50]] = 0
x = torch.cat([torch.zeros(1, 40), randn(2, 40), y[4:5] * 1e-30, y[5:6] * 1e30])
scales = 10.0 ** torch.linspace(-37, 37, 90)
for kind in (torch.int8, torch.float32):
    hold("zero rows", x[1:], y, 90 - 26, "cosine", kind)
    hold("scales", x[1:], y * scales[:, None], 3, "cosine", kind)
    hold("zero and scales", x[:4], y * 1e-3 * scales[:, None].clamp(1e-20, 1e15), 3, "sqeuclidean", kind)
    coded = CodedRows(y, "cosine", kind, CPU)
    x[1, 3] = torch.nan
    x[2, 3] = torch.inf
    distance, index = coded.search(x, 2)
    assert distance[0].tolist() == [1, 1] and index[:3].tolist() == [[0, 1]] * 3
    assert bool(distance[1:3].isnan().all()) and not bool(distance[3:].isnan().any())
    assert coded.used.tolist()[:3] == [0, 0, 0]
    assert coded.search(x[:0], 2)[0].shape == (0, 2)
    x[1:3] = randn(2, 40)
""")


def test_every_score_lies_within_its_bounds():
    interpret("""
for metric in ("cosine", "sqeuclidean"):
    x, y = randn(30, 50) * 3, randn(200, 50) + 2
    for kind in (torch.int8, torch.bfloat16, torch.float32):
        factors = [providers.unit_factors(rows) if metric == "cosine" else None for rows in (x, y)]
        center = y.mean(0) / (14 if metric == "cosine" else 1) if kind == torch.int8 else None
        a, b = (coded_rows.encode(r, f, center, kind, False) for r, f in zip((x, y), factors))
        gamma, tiny = coded_rows.rounding(50)
        values = [r.codes.double() * r.scale.double()[:, None] for r in (a, b)]
        score = values[0] @ values[1].T - b.half.double()
        slack = a.rest[:, None].double() * b.norm + a.norm[:, None].double() * b.rest
        slack += gamma * (a.norm[:, None].double() ** 2 + b.norm.double() ** 2) + 2 * tiny
        p, q = (torch.from_numpy(unit(r, metric)).double() for r in (x, y))
        middle = 0 if center is None else center.double()
        exact = ((p - middle).square().sum(1)[:, None] - (p[:, None] - q).square().sum(2)) / 2
        assert bool(((score - exact).abs() <= slack).all()), (metric, kind)
        assert bool((slack <= 0.04 * a.norm[:, None] * b.norm + 1e-3 * (a.norm.max() + b.norm) ** 2).all())
""")
