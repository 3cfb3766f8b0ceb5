"""One harness for all operators, kernels, samples and dtypes.

Truth, tolerance and the meaning of "same" are in dinofast.testing. Instruction sets are forced in
test_isa.py, Triton's interpreter in test_kernels.py; a GPU, where there is one, joins as a device here.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dinofast import ops
from dinofast.ops.registry import OPS
from dinofast.ops.rows import BLOCK
from dinofast.testing import as_tuple, assert_kernel, cast_inputs


def to_device(args, device):
    return tree_map_only(torch.Tensor, lambda x: x.to(device), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_every_kernel_on_every_sample(name, dtype):
    op = OPS[name]
    for sample in op.samples():
        args = cast_inputs(op, sample.args, dtype)
        for kernel in op.kernels:
            if "cpu" in kernel.devices and kernel.refuse(*args) is None:
                try:
                    assert_kernel(op, kernel, args)
                except AssertionError as error:
                    pytest.fail(f"{kernel.backend} on {sample.name}, {dtype}: {error}")


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_every_cuda_kernel_on_every_sample(name, dtype):
    op = OPS[name]
    for sample in op.samples():
        args = to_device(cast_inputs(op, sample.args, dtype), "cuda")
        for kernel in op.kernels:
            if "cuda" in kernel.devices and kernel.refuse(*args) is None:
                try:
                    assert_kernel(op, kernel, args)
                except AssertionError as error:
                    pytest.fail(f"{kernel.backend} on {sample.name}, {dtype}: {error}")


@pytest.mark.parametrize("name", OPS)
def test_every_operator_keeps_its_samples_unchanged(name):
    op = OPS[name]
    for sample in op.samples():
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in sample.args]
        getattr(torch.ops.dinofast, name)(*sample.args)
        for old, new in zip(before, sample.args, strict=True):
            if isinstance(old, torch.Tensor):
                torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    op = OPS[name]
    chosen = [s for s in op.samples() if "NaN" not in s.name and "huge" not in s.name][:8]
    for sample in chosen:
        torch.library.opcheck(getattr(torch.ops.dinofast, name).default, sample.args)


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.differentiable])
def test_opcheck_with_an_input_that_requires_grad(name):
    sample = small_sample(name)
    args = tuple(
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in sample.args
    )
    torch.library.opcheck(getattr(torch.ops.dinofast, name).default, args)


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.differentiable])
def test_gradcheck(name):
    sample = small_sample(name)
    args = tuple(
        x.double().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in sample.args
    )
    call = getattr(torch.ops.dinofast, name)
    assert torch.autograd.gradcheck(lambda *a: as_tuple(call(*a))[0], args)


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.differentiable])
def test_gradient_equals_the_reference_whatever_kernel_ran_forward(name):
    op, sample = OPS[name], small_sample(name)
    grads = []
    for call in (getattr(torch.ops.dinofast, name), op.reference):
        args = tuple(
            x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in sample.args
        )
        as_tuple(call(*args))[0].square().sum().backward()
        grads.append([x.grad for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()])
    for ours, theirs in zip(*grads, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if not op.differentiable])
def test_without_a_gradient_an_input_that_requires_one_is_refused(name):
    sample = OPS[name].samples()[1]
    args = (sample.args[0].clone().requires_grad_(), *sample.args[1:])
    call = getattr(torch.ops.dinofast, name)
    with pytest.raises(RuntimeError, match=f"{name}: has no gradient"):
        call(*args)
    with torch.no_grad():
        call(*args)


@pytest.mark.parametrize("name", OPS)
def test_torch_compile_sees_one_node(name):
    sample = small_sample(name)
    call = getattr(torch.ops.dinofast, name).default
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *args: call(*args), fullgraph=True, backend=keep)
    for got, expected in zip(as_tuple(compiled(*sample.args)), as_tuple(call(*sample.args)), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert targets.count(call) == 1
    assert all(target is call or "getitem" in str(target) for target in targets), targets


def small_sample(name):
    """The first sample that has elements, no NaN and no ties, small enough for a numerical gradient."""
    plain = [
        s for s in OPS[name].samples() if not any(w in s.name for w in ("NaN", "zero", "ties", "huge", "k="))
    ]
    fitting = [s for s in plain if s.args[0].numel() > 4]
    return min(fitting, key=lambda s: abs(s.args[0].numel() - 165))


class LargestTensor(TorchDispatchMode):
    """Remembers the element count of the largest tensor that any torch call returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in as_tuple(result) if not isinstance(result, list) else result:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("name", ["cosine_max", "knn_topk", "dpm_stats", "kmeans_step"])
def test_references_hold_no_large_matrix(name):
    """The whole matrix would have 16 times the elements of the largest block allowed."""
    n = 8 * int(BLOCK**0.5)
    rows, few = torch.randn(n, 4), torch.randn(n // 4, 4)
    args = {
        "cosine_max": (rows, few),
        "knn_topk": (few, rows, 3, "cosine"),
        "dpm_stats": (rows, few, torch.ones_like(few), torch.zeros(n // 4), "diag"),
        "kmeans_step": (rows, few),
    }[name]
    with LargestTensor() as largest:
        OPS[name].reference(*args)
    assert BLOCK / 2 < largest.elements <= 1.1 * BLOCK


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.cosine_max(torch.ones(2, 3), torch.ones(2, 4)),
            "cosine_max: D differs, features 3 and pro",
        ),
        (lambda: ops.cosine_max(torch.ones(2, 3), torch.ones(0, 3)), "cosine_max: prototypes has no rows"),
        (lambda: ops.cosine_max(torch.ones(3), torch.ones(1, 3)), "cosine_max: features must be a matrix"),
        (lambda: ops.cosine_max(torch.ones(2, 0), torch.ones(2, 0)), "cosine_max: D is 0"),
        (lambda: ops.cosine_max(torch.ones(2, 3).int(), torch.ones(2, 3)), "must be floating point"),
        (lambda: ops.cosine_max(torch.ones(2, 3), torch.ones(2, 3).half()), "dtype differs"),
        (lambda: ops.knn_topk(torch.ones(2, 3), torch.ones(4, 3), 5), "k = 5 exceeds the bank's 4 rows"),
        (lambda: ops.knn_topk(torch.ones(2, 3), torch.ones(4, 3), -1), "k must be at least 1, got -1"),
        (lambda: ops.knn_topk(torch.ones(2, 3), torch.ones(0, 3)), "bank has no rows"),
        (lambda: ops.knn_topk(torch.ones(2, 3), torch.ones(4, 3), 1, "l2"), "unknown metric 'l2'"),
        (lambda: ops.cosine_map(torch.ones(1, 2, 2, 3), torch.ones(1, 3), (0, 4)), "size must be"),
        (lambda: ops.cosine_map(torch.ones(2, 2, 3), torch.ones(1, 3), (4, 4)), "must be \\(B, h, w, D\\)"),
        (
            lambda: ops.cosine_map(torch.ones(1, 2, 2, 3), torch.ones(1, 3), (4, 4), torch.ones(1, 2, 2)),
            "mask must be bool",
        ),
        (
            lambda: ops.cosine_map(torch.ones(1, 2, 2, 3), torch.ones(1, 3), (4, 4), torch.ones(2, 2) > 0),
            "mask is \\(2, 2\\), the grid \\(1, 2, 2\\)",
        ),
        (lambda: ops.upsample_blur(torch.ones(2, 2), (4, 4)), "map must be"),
        (lambda: ops.upsample_blur(torch.ones(1, 2, 2), (4, 4), -1.0), "sigma must be finite"),
        (lambda: ops.upsample_blur(torch.ones(1, 2, 2), (4, 4), 1.0, "cubic"), "unknown mode 'cubic'"),
        (
            lambda: ops.farthest_point(torch.ones(3, 2), torch.ones(2), torch.tensor(0)),
            "farthest_point: min_distance is",
        ),
        (
            lambda: ops.kmeans_step(torch.ones(3, 2), torch.ones(1, 3)),
            "kmeans_step: D differs, rows 2 and centers 3",
        ),
        (lambda: ops.kmeans_step(torch.ones(3, 2), torch.ones(0, 2)), "kmeans_step: centers has no rows"),
        (lambda: ops.kmeans_step(torch.ones(3, 2), torch.ones(1, 2).half()), "centers must be torch.float32"),
        (
            lambda: ops.dpm_stats(torch.ones(3, 2), torch.ones(1, 2), torch.ones(2), torch.ones(1)),
            "precisions must be \\(1, 2\\), got \\(2,\\)",
        ),
        (
            lambda: ops.dpm_stats(torch.ones(3, 2), torch.ones(1, 2), -torch.ones(1, 2), torch.ones(1)),
            "precisions must be positive",
        ),
        (
            lambda: ops.dpm_stats(
                torch.ones(3, 2), torch.ones(1, 2), -torch.ones(1, 2, 2), torch.ones(1), "full"
            ),
            "component 0 are not positive definite",
        ),
    ],
)
def test_bad_arguments_say_what_and_the_values(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_knn_ties_go_to_the_smallest_index():
    bank = torch.eye(3)[torch.tensor([1, 0, 0, 2, 0, 1])]
    distance, index = ops.knn_topk(torch.eye(3)[:1] * 5, bank, k=5)
    assert index.tolist() == [[1, 2, 4, 0, 3]]
    assert distance.tolist() == [[0, 0, 0, 1, 1]]


def test_knn_broken_bank_never_looks_normal():
    bank = torch.eye(3)
    bank[1, 1] = torch.nan
    for metric in ("cosine", "euclidean", "sqeuclidean"):
        distance, index = ops.knn_topk(torch.eye(3), bank, 2, metric)
        assert bool(distance.isnan().all())
        assert index.tolist() == [[0, 1]] * 3


def test_upsample_blur_equals_interpolation_then_scipy():
    from scipy.ndimage import gaussian_filter

    patches = torch.rand(1, 32, 32, dtype=torch.float64)
    for size in ((448, 448), (250, 301)):
        up = torch.nn.functional.interpolate(patches[None], size=size, mode="bilinear")[0, 0]
        theirs = gaussian_filter(up.numpy(), sigma=4.0, mode="reflect", truncate=4.0)
        assert abs(ops.upsample_blur(patches, size, 4.0)[0].numpy() - theirs).max() < 1e-12
        assert abs(ops.upsample_blur(patches.float(), size, 4.0)[0].numpy() - theirs).max() < 1e-6


def test_upsample_nearest_mirror_equals_torch_padding_and_convolution():
    patches = torch.rand(1, 1, 7, 9, dtype=torch.float64)
    up = torch.nn.functional.interpolate(patches, size=(60, 50), mode="nearest")
    offsets = torch.arange(-16, 17, dtype=torch.float64)
    taps = torch.exp(-0.5 * (offsets / 4) ** 2)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    padded = torch.nn.functional.pad(up, (16, 16, 16, 16), mode="reflect")
    theirs = torch.nn.functional.conv2d(padded, kernel[None, None])[:, 0]
    ours = ops.upsample_blur(patches[:, 0], (60, 50), 4.0, "nearest", "mirror")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_dpm_stats_equals_scikit_learn():
    from sklearn.mixture import GaussianMixture

    x = torch.randn(200, 5, dtype=torch.float64) * torch.arange(1, 6)
    for kind in ("diag", "spherical", "full"):
        theirs = GaussianMixture(3, covariance_type=kind, random_state=0).fit(x.numpy())
        means, weights = torch.from_numpy(theirs.means_), torch.from_numpy(theirs.weights_).log()
        log_likelihood, count, first, second = ops.dpm_stats(
            x, means, torch.from_numpy(theirs.precisions_), weights, kind
        )
        r = torch.from_numpy(theirs.predict_proba(x.numpy()))
        torch.testing.assert_close(log_likelihood, torch.from_numpy(theirs.score_samples(x.numpy())))
        torch.testing.assert_close(count, r.sum(0))
        torch.testing.assert_close(first, r.T @ x)
        expected = {
            "diag": r.T @ x.square(),
            "spherical": r.T @ x.square().sum(1),
            "full": torch.einsum("nk,nd,ne->kde", r, x, x),
        }[kind]
        torch.testing.assert_close(second, expected)


def test_farthest_point_selects_the_greedy_coreset():
    rows = torch.randn(300, 6)
    distance, index, picked = torch.full((300,), torch.inf), torch.tensor(17), []
    for _ in range(20):
        picked.append(int(index))
        distance, index = ops.farthest_point(rows, distance, index)
    greedy = [17]
    for _ in range(19):
        gaps = torch.cdist(rows.double(), rows[greedy].double()).amin(1)
        greedy.append(int(gaps.argmax()))
    assert picked == greedy


def test_kmeans_step_repeated_equals_scikit_learn():
    from sklearn.cluster import KMeans

    centers = 4 * torch.randn(7, 5, dtype=torch.float64)
    rows = centers[torch.randint(7, (300,))] + torch.randn(300, 5, dtype=torch.float64)
    theirs = KMeans(7, init=rows[:7].numpy(), n_init=1, max_iter=5, tol=0, algorithm="lloyd").fit(
        rows.numpy()
    )
    ours = rows[:7]
    for _ in range(5):
        _, sq_distance, sums, counts = ops.kmeans_step(rows, ours)
        ours = sums / counts[:, None]
    torch.testing.assert_close(ours, torch.from_numpy(theirs.cluster_centers_))
    index, sq_distance, _, _ = ops.kmeans_step(rows, ours)
    assert index.tolist() == theirs.labels_.tolist()
    assert float(sq_distance.sum()) == pytest.approx(theirs.inertia_)


def test_kmeans_step_leaves_broken_rows_out():
    rows = torch.tensor([[0.0, 1.0], [torch.nan, 0.0], [2.0, 2.0], [torch.inf, 1.0]])
    index, sq_distance, sums, counts = ops.kmeans_step(rows, torch.zeros(2, 2))
    assert index.tolist() == [0, -1, 0, -1]
    assert sq_distance.isnan().tolist() == [False, True, False, True]
    assert sums.tolist() == [[2, 3], [0, 0]]
    assert counts.tolist() == [2, 0]
