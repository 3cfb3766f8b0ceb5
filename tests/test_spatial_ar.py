"""The autoregressive network against its equations in float64, its reach, its options."""

import math

import numpy as np
import pytest
import torch
from raster_truth import SEEN, SIZE, error_of, features, kernel_of, tiny, with_weights

from dinofast import models
from dinofast.errors import ArtifactError, InputError
from dinofast.models import raster_net
from dinofast.models.spatial_ar import SpatialAR
from dinofast.types import Features


@pytest.mark.parametrize("small", [0, raster_net.SMALL_PRODUCT])
@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("dilations", [1, 2, [2, 4, 3], [3, 1]])
@pytest.mark.parametrize("mode", list(SEEN))
def test_patch_scores_are_those_of_the_equations(monkeypatch, mode, dilations, loss, small):
    monkeypatch.setattr(raster_net, "SMALL_PRODUCT", small)
    model = with_weights(tiny(mode=mode, dilations=dilations, n_layers=4, direction="mean", loss=loss))
    x = features(2, h=6, w=8)
    truth = np.stack(
        [[error_of(model, image, d) for d in ("forward", "backward")] for image in x.tensor.double().numpy()]
    )
    np.testing.assert_allclose(model.patch_scores(x), truth.mean(1), rtol=2e-5, atol=1e-6)
    least = SpatialAR(**model.params() | {"direction": "min"})
    least.load_state(model.state())
    np.testing.assert_allclose(least.patch_scores(x), truth.min(1), rtol=2e-5, atol=1e-6)
    one = SpatialAR(**model.params() | {"direction": "forward"})
    one.load_state({n: t for n, t in model.state().items() if n.startswith("forward")})
    np.testing.assert_allclose(one.patch_scores(x), truth[:, 0], rtol=2e-5, atol=1e-6)


def test_published_size_equals_a_masked_convolution():
    model = with_weights(SpatialAR(), d=384)
    for name in list(model.state()):
        model.state()[name].mul_(0.1)
    for h, w in ((28, 28), (13, 22)):
        x = torch.randn(2, h, w, 384, generator=torch.Generator().manual_seed(3))
        y = x.double().permute(0, 3, 1, 2)
        for i in range(5):
            kernel = torch.from_numpy(kernel_of(model.state()[f"forward.{i}.weight"], "causal", i))
            bias = model.state()[f"forward.{i}.bias"].double()
            y = torch.nn.functional.conv2d(y, kernel.permute(3, 2, 0, 1), bias, padding=4, dilation=4)
            y = y.relu() if i < 4 else y
        truth = (y.permute(0, 2, 3, 1) - x.double()).square().mean(3)
        found = model.patch_scores(Features(x, None, SIZE)).double()
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)


def test_map_is_bilinear_without_blur_and_score_the_top_percent():
    model = with_weights(tiny())
    x = features(2, h=15, w=14)
    patches, scores = model.patch_scores(x), model.score(x)
    truth = torch.nn.functional.interpolate(patches[:, None], size=SIZE, mode="bilinear")[:, 0]
    torch.testing.assert_close(scores.map, truth, rtol=1e-5, atol=1e-6)
    top = np.sort(patches.flatten(1).numpy())[:, -2:].mean(1)
    np.testing.assert_allclose(scores.score, top, rtol=1e-6)


def reached(model, h, w, y, x):
    """List the places whose values change the prediction at (y, x): by gradients in float64."""
    net = model._net("forward", model.n_channels)
    weights = {n: t.double().abs() for n, t in with_weights(model).state().items()}
    weights = {n.removeprefix("forward."): t for n, t in weights.items() if n.startswith("forward")}
    source = torch.ones(1, h, w, model.n_channels, dtype=torch.float64, requires_grad=True)
    target = torch.zeros_like(source)
    [grad] = torch.autograd.grad(net.errors(weights, source, target, "mse")[0, y, x], source)
    return {tuple(place) for place in grad[0].abs().sum(2).nonzero().tolist()}


@pytest.mark.parametrize("dilations", [1, 2, 4, [2, 4, 4, 8], [3, 2]])
def test_causal_network_never_sees_the_patch_itself_or_one_after_it(dilations):
    model = with_weights(SpatialAR(dilations=dilations, hidden=4), d=5)
    h, w = 23, 45
    for y, x in ((22, 22), (11, 0), (11, 44), (0, 0), (0, 30)):
        seen = reached(model, h, w, y, x)
        assert all(place < (y, x) for place in seen)
        if isinstance(dilations, int):
            assert all((y - a) % dilations == 0 == (x - b) % dilations for a, b in seen)
    assert reached(model, h, w, 0, 0) == set()
    assert min(reached(model, h, w, 0, 30))[0] == 0


@pytest.mark.parametrize("dilation", [1, 4])
def test_reach_of_the_published_networks_is_50_patches(dilation):
    model = with_weights(SpatialAR(dilations=dilation, hidden=4), d=5)
    seen = {(a - 20, b - 20) for a, b in reached(model, 21, 45, 20, 20)}
    assert len(seen) == 50
    assert (min(a for a, _ in seen), max(a for a, _ in seen)) == (-5 * dilation, 0)
    assert (min(b for _, b in seen), max(b for _, b in seen)) == (-5 * dilation, 5 * dilation)


def test_bidirectional_and_standard_networks_leak_the_patch_itself():
    for mode, n_layers, leaks in (
        ("bidirectional", 1, False),
        ("bidirectional", 2, True),
        ("standard", 1, True),
        ("causal", 5, False),
    ):
        model = with_weights(tiny(mode=mode, n_layers=n_layers, dilations=2))
        assert ((6, 6) in reached(model, 13, 13, 6, 6)) == leaks, (mode, n_layers)
    model = with_weights(tiny(mode="bidirectional", n_layers=2, dilations=[2, 1]))
    assert (6, 6) not in reached(model, 13, 13, 6, 6)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mode", "raster", "unknown mode 'raster'; one of causal, bidirectional, standard"),
        ("direction", ["mean"], r"unknown direction \['mean'\]"),
        ("loss", "l1", "unknown loss"),
        ("init", "zeros", "unknown init"),
        ("keep", "first", "unknown keep"),
        ("dilations", 0, "dilations must be .*got 0"),
        ("dilations", [], "dilations must be"),
        ("dilations", [1] * 6, "1 to 5 of them"),
        ("dilations", [1, 2.5], "dilations must be"),
        ("n_layers", 0, "n_layers must be"),
        ("hidden", 1.5, "hidden must be"),
        ("n_epochs", 0, "n_epochs must be"),
        ("batch_size", True, "batch_size must be"),
        ("seed", -1, "seed must be"),
        ("learning_rate", 0, "learning_rate must be a finite number, above 0"),
        ("learning_rate", math.nan, "learning_rate must be"),
        ("noise_probability", 1.1, r"noise_probability must be .*\[0, 1\]"),
        ("noise_scale", -1, "noise_scale must be"),
        ("dropout", 1.0, "dropout must be"),
        ("clip_norm", 0.0, "clip_norm must be"),
        ("clip_norm", "1", "clip_norm must be"),
    ],
)
def test_parameters_out_of_range_are_refused(name, value, message):
    with pytest.raises(InputError, match=message):
        SpatialAR(**{name: value})


def test_dilations_may_be_a_tuple_and_survive_the_file(tmp_path):
    model = tiny(dilations=(2, 1)).fit([features()])
    model.save(tmp_path / "a")
    assert models.load(tmp_path / "a").params() == model.params()


def test_grid_too_small_for_a_dilation_is_refused():
    message = r"the patch grid is 6 × 7, too small for a dilation of 6: .*lower dilations below 6"
    with pytest.raises(InputError, match=message):
        tiny(dilations=6).fit([features()])
    with pytest.raises(InputError, match="grid is 3 × 7"):
        tiny(dilations=4).fit([features(h=9)], validation=[features(h=3)])
    with pytest.raises(InputError, match="grid is 6 × 2"):
        tiny(dilations=2).fit([features()]).score(features(w=2))


def test_one_normal_image_is_enough():
    assert tiny().fit([features(1)]).score(features(2)).map.isfinite().all()


def test_diverging_training_says_so_and_changes_nothing():
    model = tiny().fit([features()])
    before = model.state()
    model.learning_rate, model.n_epochs = 1e30, 3
    with pytest.raises(InputError, match=r"diverged: .*lower learning_rate \(1e\+30\), or set clip_norm"):
        model.fit([features()])
    assert model.state() == before


def test_state_of_other_parameters_is_refused():
    state = tiny().fit([features()]).state()
    for model, message in (
        (
            tiny(mode="standard"),
            r"forward.0.weight .* must be float32 \(9, 5, 6\), this is torch.float32 \(4,",
        ),
        (tiny(hidden=7), r"must be float32 \(4, 5, 7\)"),
        (tiny(direction="min"), "holds .*backward.0.bias"),
        (tiny(n_layers=3), "forward.2.bias"),
    ):
        with pytest.raises(ArtifactError, match=message):
            model.load_state(state)
    with pytest.raises(ArtifactError, match=r"forward\.1\.bias holds NaN"):
        tiny().load_state(state | {"forward.1.bias": torch.full((5,), torch.nan)})
    with pytest.raises(ArtifactError, match=r"holds forward\.0\.weight"):
        tiny().load_state({"bank": torch.ones(2, 3)})
