"""upsample_blur, cosine_map and farthest_point in native code: instruction sets, threads, shapes, NaN."""

import pytest
import torch
from drawing import DRAWN, DTYPES
from hypothesis import given
from hypothesis import strategies as st

from dinofast import ops
from dinofast.ops.registry import OPS
from dinofast.ops.upsample_blur import BOUNDARIES, MODES, resample_matrix, resample_weights
from dinofast.testing import assert_kernel, cast_inputs

native = pytest.importorskip("dinofast._native", reason="built without native kernels")
NAMES = ("upsample_blur", "cosine_map", "farthest_point")
SIDE = st.integers(1, 40)


def kernel(name):
    return next(k for k in OPS[name].kernels if k.backend == "cpu")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_sample(isa, name, dtype):
    for sample in OPS[name].samples():
        assert_kernel(OPS[name], kernel(name), cast_inputs(OPS[name], sample.args, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_for_any_number_of_threads(isa, threads, name):
    args = {
        "upsample_blur": (torch.randn(3, 33, 31), [448, 450], 4.0, "bilinear", "reflect"),
        "cosine_map": (torch.randn(2, 33, 31, 96), torch.randn(150, 96), [448, 450], None),
        "farthest_point": (torch.randn(3001, 96).round(), torch.full((3001,), 12.5), torch.tensor(7)),
    }[name]
    found = []
    for count in (1, 2, 3):
        threads(count)
        result = kernel(name).run(*args)
        found.append(result if isinstance(result, tuple) else (result,))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_farthest_point_gives_the_same_bits_on_every_instruction_set(monkeypatch):
    for d in (1, 15, 16, 33, 384):
        rows, near = torch.randn(500, d), torch.full((500,), torch.inf)
        found = []
        for name in native.available_isas():
            monkeypatch.setenv("DINOFAST_ISA", name)
            found.append(kernel("farthest_point").run(rows, near, torch.tensor(3)))
        for other in found[1:]:
            assert torch.equal(other[0], found[0][0])
            assert torch.equal(other[1], found[0][1])


def test_farthest_point_refuses_a_center_outside():
    for index in (-1, 5):
        with pytest.raises(RuntimeError, match=f"index {index} is outside \\[0, 5\\)"):
            ops.farthest_point(torch.ones(5, 2), torch.ones(5), torch.tensor(index))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_broken_patch_reaches_its_pixels_and_no_others(name):
    maps = torch.zeros(1, 8, 8)
    maps[0, 3, 4] = torch.nan
    with ops.backend(name):
        pixels = ops.upsample_blur(maps, (80, 80), sigma=0.0)[0]
        blurred = ops.upsample_blur(maps, (80, 80), sigma=2.0)[0]
        unchanged = ops.upsample_blur(maps, (8, 8), sigma=0.0)
    # patch centers are 10 pixels apart: the weight of patch 3 ends where 2 and 4 have all, at 24.5 and 44.5
    expected = torch.zeros(80, 80, dtype=torch.bool)
    expected[25:45, 35:55] = True
    assert torch.equal(pixels.isnan(), expected)
    expected[17:53, 27:63] = True
    assert torch.equal(blurred.isnan(), expected)
    assert torch.equal(unchanged.isnan(), maps.isnan())


def test_infinite_patches_stay_infinite_and_opposite_ones_meet_in_nan():
    maps = torch.tensor([[[torch.inf, 0.0, -torch.inf]]])
    for name in ("cpu", "reference"):
        with ops.backend(name):
            pixels = ops.upsample_blur(maps, (1, 3), sigma=0.3)[0, 0]
        assert pixels[0] == torch.inf
        assert pixels[1].isnan()
        assert pixels[2] == -torch.inf


def test_cosine_map_equals_interpolation_of_the_distances():
    features, prototypes = torch.randn(2, 7, 9, 16), torch.randn(5, 16)
    distance = 1 - ops.cosine_max(features.view(-1, 16), prototypes)[0].view(2, 1, 7, 9)
    for size in ((7, 9), (50, 33), (5, 4)):
        theirs = torch.nn.functional.interpolate(distance, size=size, mode="bilinear")[:, 0]
        torch.testing.assert_close(ops.cosine_map(features, prototypes, size), theirs, rtol=0, atol=1e-6)


@DRAWN
@given(
    source=SIDE,
    target=st.integers(1, 90),
    sigma=st.sampled_from([0.0, 0.13, 1.0, 9.0, 60.0]),
    mode=st.sampled_from(MODES),
    boundary=st.sampled_from(BOUNDARIES),
)
def test_the_pixels_of_a_patch_are_contiguous_and_weights_sum_to_one(source, target, sigma, mode, boundary):
    matrix = torch.from_numpy(resample_matrix(source, target, sigma, mode, boundary))
    torch.testing.assert_close(matrix.sum(1), torch.ones(target, dtype=torch.float64), rtol=0, atol=1e-12)
    _, patches = resample_weights(source, target, sigma, mode, boundary)
    assert bool((patches.weight > 0).all())
    for begin, end in zip(patches.start.tolist(), patches.start[1:].tolist(), strict=False):
        pixels = patches.index[begin:end].tolist()
        assert pixels == list(range(pixels[0], pixels[0] + len(pixels))) if pixels else True
