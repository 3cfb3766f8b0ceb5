"""The native dpm_stats: its screen rules out nothing that matters, on every instruction set."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import mixture

from dinofast import ops
from dinofast.ops.dpm_stats import negligible_nats, pairs_evaluated
from dinofast.ops.registry import OPS
from dinofast.testing import assert_kernel, cast_inputs

native = pytest.importorskip("dinofast._native", reason="built without native kernels")
OP = OPS["dpm_stats"]
KERNEL = next(kernel for kernel in OP.kernels if kernel.backend == "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("diag", "spherical", "full")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_sample(isa, dtype):
    for sample in OP.samples():
        assert_kernel(OP, KERNEL, cast_inputs(OP, sample.args, dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.5, 5.0])
def test_overlapping_and_separate_components(isa, kind, spread):
    for d in (1, 31, 33, 130):
        assert_kernel(OP, KERNEL, mixture(150, 29, d, kind, spread))


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_one_block(isa, kind):
    assert_kernel(OP, KERNEL, mixture(2500, 13, 17, kind, 2.0))


def test_more_responsibilities_than_are_kept(isa):
    assert_kernel(OP, KERNEL, mixture(2500, 300, 3, "full", 0.0))


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_number_of_threads(isa, kind, restored_threads):
    args = mixture(1500, 40, 100, kind, 0.3)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((*ops.dpm_stats(*args), torch.tensor(pairs_evaluated(*args))))
    for results in found[1:]:
        for one, other in zip(results, found[0], strict=True):
            assert torch.equal(one, other)


def truth(x, means, precisions, log_weights, kind):
    """Log-likelihoods and responsibilities from differences in float64; for few rows and components."""
    v = x.double()[:, None] - means.double()
    wide = precisions.double()
    if kind == "full":
        form = torch.einsum("nki,kij,nkj->nk", v, wide, v)
        half_log_det = 0.5 * torch.linalg.slogdet(wide)[1]
    else:
        wide = wide if kind == "diag" else wide[:, None].expand(means.shape)
        form = (v.square() * wide).sum(2)
        half_log_det = 0.5 * wide.log().sum(1)
    joint = log_weights.double() + half_log_det - 0.5 * means.shape[1] * math.log(2 * math.pi) - 0.5 * form
    return joint.logsumexp(1), joint.softmax(1)


def assert_within_stated_error(args):
    """Left out: less than 2^-32 of a row. Taken from float32 sums: only what is proven within 2^-12 nats."""
    log_likelihood, r = truth(*args)
    found = ops.dpm_stats(*args)
    digit = torch.finfo(torch.float32).eps
    slack = 2**-12 + 2**-32 + digit * log_likelihood.abs()
    same = found[0] == log_likelihood.float()  # −inf where float32 ends
    assert bool((same | ((found[0].double() - log_likelihood).abs() <= slack)).all())
    slack = 2 * 2**-12 + digit * math.sqrt(len(r))
    count = r.sum(0)
    assert bool(((found[1].double() - count).abs() <= slack * count + len(r) * 2**-32).all())
    x, first = args[0].double(), r.T @ args[0].double()
    allowed = slack * (r.T @ x.abs()) + len(r) * 2**-32 * x.abs().max() + 1e-30
    assert bool(((found[2].double() - first).abs() <= allowed).all())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 40),
    st.integers(1, 30),
    st.sampled_from([1, 2, 15, 32, 49, 97, 130]),
    st.floats(-6, 3),
    st.floats(-3, 3),
    st.floats(-2, 4),
    st.integers(0, 1000),
)
def test_stated_error_at_any_scale(kind, n, k, d, log_variance, log_spread, log_offset, seed):
    variance = 10**log_variance
    spread = 10**log_spread * variance**0.5
    x, means, precisions, log_weights, _ = mixture(n, k, d, kind, spread, variance, seed)
    offset = 10**log_offset
    assert_within_stated_error((x + offset, means + offset, precisions, log_weights, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_stated_error_where_the_screen_must_decide(isa, kind):
    """One row at the mean of a component, the others about where their log-probability stops counting."""
    k, d = 200, 96
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, d, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(k, d, generator=generator), dim=1)
    nats = torch.linspace(0.9, 1.1, k) * negligible_nats(k)
    nats[0] = 0
    means = x[:1] + direction * (2 * nats[:, None]).sqrt() * 1e-3
    precisions = {"diag": torch.ones(k, d), "spherical": torch.ones(k), "full": torch.eye(d).repeat(k, 1, 1)}
    args = (x, means, 1e6 * precisions[kind], torch.full((k,), -math.log(k)), kind)
    assert_within_stated_error(args)
    assert kind == "full" or 0 < pairs_evaluated(*args) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_what_the_operator_states(isa, kind):
    nats = negligible_nats(4) * torch.tensor([0.0, 0.999, 1.001, 2.0])
    means = (2 * nats).sqrt()[:, None]
    precisions = {"diag": torch.ones(4, 1), "spherical": torch.ones(4), "full": torch.ones(4, 1, 1)}[kind]
    _, count, _, _ = ops.dpm_stats(torch.zeros(1, 1), means, precisions, torch.zeros(4), kind)
    assert (count > 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-30, 1e15, 1e30])
def test_rows_out_of_range_of_float32_products(isa, kind, size):
    x, means, precisions, log_weights, _ = mixture(20, 6, 5, kind)
    x[::3] *= size
    assert_within_stated_error((x, means, precisions, log_weights, kind))


def test_column_major_precisions(isa):
    """As torch.linalg gives inverses: the same bits without a copy."""
    x, means, precisions, log_weights, kind = mixture(200, 6, 33, "full")
    columns = precisions.mT.contiguous().mT
    assert not columns.is_contiguous()
    found = ops.dpm_stats(x, means, columns, log_weights, kind)
    for one, other in zip(found, ops.dpm_stats(x, means, precisions, log_weights, kind), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("broken", ["means", "log_weights"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_broken_parameters_make_everything_nan(kind, value, broken):
    args = mixture(20, 3, 4, kind)
    (args[1][2] if broken == "means" else args[3])[1] = value
    for backend in ("cpu", "reference"):
        with ops.backend(backend):
            assert all(bool(result.isnan().all()) for result in ops.dpm_stats(*args)), backend


def test_no_possible_component():
    args = mixture(5, 3, 4, "diag")
    args[3].fill_(-torch.inf)
    log_likelihood, *sums = ops.dpm_stats(*args)
    assert log_likelihood.tolist() == [-math.inf] * 5
    assert all(bool((s == 0).all()) for s in sums)


def test_share_of_pairs_evaluated():
    args = mixture(300, 50, 64, "diag", spread=5.0)
    assert 1 / 50 <= pairs_evaluated(*args) < 1.5 / 50
    assert pairs_evaluated(*mixture(300, 50, 64, "diag", spread=0.0)) > 0.5
    with pytest.raises(RuntimeError, match="x has no rows"):
        pairs_evaluated(args[0][:0], *args[1:])
    with pytest.raises(RuntimeError, match="wants float32, bfloat16 or float16"):
        pairs_evaluated(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_tiles_not_rows_by_components():
    code = """
import ctypes, torch
from dinofast import ops
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
torch.set_num_threads(1)
n, d, k = 50000, 32, 400
x, means = torch.randn(n, d), torch.zeros(k, d)
args = means, torch.ones(k, d), torch.zeros(k)
ops.dpm_stats(x[:2000], *args)
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
ops.dpm_stats(x, *args)
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert 1 < float(run.stdout) < 8, "N x K float32 is 76 MiB"
