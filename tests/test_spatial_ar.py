"""The autoregressive network against its equations in float64, its reach, its training, its files."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dinofast import models
from dinofast.errors import ArtifactError, InputError
from dinofast.models import raster_net, raster_training
from dinofast.models.feature_store import FeatureStore
from dinofast.models.spatial_ar import SpatialAR
from dinofast.types import Features

SIZE = (48, 60)
KEYS = Path(__file__).parent / "keys" / "spatial_ar_causal_c384.json"
SEEN = {  # rows of a kernel, x a tap that is there: of the first layer, of the others
    "causal": ("xxx x.. ...", "xxx xx. ..."),
    "bidirectional": ("xxx x.x xxx", "xxx xxx xxx"),
    "standard": ("xxx xxx xxx", "xxx xxx xxx"),
}


def features(b=4, h=6, w=7, d=5, seed=0):
    """Smooth, so that neighbors tell of each other."""
    draw = torch.Generator().manual_seed(seed)
    place = torch.linspace(0, 3, h)[:, None, None] + torch.linspace(0, 2, w)[:, None] * torch.rand(
        d, generator=draw
    )
    noise = torch.randn(b, h, w, d, generator=draw)
    return Features(torch.sin(place) + 0.1 * noise, None, SIZE)


def tiny(**params):
    return SpatialAR(**{"dilations": 1, "n_layers": 2, "hidden": 6, "n_epochs": 2, "batch_size": 2} | params)


def with_weights(model, d=5, seed=1):
    """Give a model random weights, as if fitted."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for direction in ("forward", "backward")[: 1 + (model.direction != "forward")]:
        widths = [d] + [model.hidden] * (model.n_layers - 1) + [d]
        for i in range(model.n_layers):
            taps = SEEN[model.mode][i > 0].count("x")
            state[f"{direction}.{i}.weight"] = 0.4 * torch.randn(taps, *widths[i : i + 2], generator=draw)
            state[f"{direction}.{i}.bias"] = torch.randn(widths[i + 1], generator=draw)
    model.load_state(state)
    return model


def kernel_of(weight, mode, layer):
    """Put tap matrices (T, C_in, C_out) where their taps are: (3, 3, C_in, C_out), zeros elsewhere."""
    rows = SEEN[mode][layer > 0].split()
    taps = [(y, x) for y in range(3) for x in range(3) if rows[y][x] == "x"]
    kernel = np.zeros((3, 3, *weight.shape[1:]))
    for (y, x), matrix in zip(taps, np.asarray(weight, dtype=np.float64), strict=True):
        kernel[y, x] = matrix
    return kernel


def convolve(x, kernel, bias, step):
    """One layer on one map (h, w, C_in), tap by tap and patch by patch."""
    h, w = x.shape[:2]
    out = np.tile(bias, (h, w, 1))
    for y in range(h):
        for c in range(w):
            for ky in range(3):
                for kx in range(3):
                    sy, sx = y + (ky - 1) * step, c + (kx - 1) * step
                    if 0 <= sy < h and 0 <= sx < w:
                        out[y, c] += x[sy, sx] @ kernel[ky, kx]
    return out


def predict(x, kernels, biases, steps):
    for i, (kernel, bias, step) in enumerate(zip(kernels, biases, steps, strict=True)):
        x = convolve(x, kernel, bias, step)
        if i < len(kernels) - 1:
            x = np.maximum(x, 0)
    return x


def error_of(model, x, direction):
    """Patch scores (h, w) of one map by one network of a model, in float64."""
    state = {n: t.double().numpy() for n, t in model.state().items()}
    kernels = [kernel_of(state[f"{direction}.{i}.weight"], model.mode, i) for i in range(model.n_layers)]
    biases = [state[f"{direction}.{i}.bias"] for i in range(model.n_layers)]
    given = model.dilations if isinstance(model.dilations, list) else [model.dilations]
    steps = [*given, *[given[-1]] * model.n_layers][: model.n_layers]
    turned = x[::-1, ::-1] if direction == "backward" else x
    found = predict(turned, kernels, biases, steps)
    if direction == "backward":
        found = found[::-1, ::-1]
    if model.loss == "mse":
        return ((found - x) ** 2).mean(2)
    return 1 - (found * x).sum(2) / np.sqrt((found**2).sum(2) * (x**2).sum(2))


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


def gradients(kernels, biases, steps, source, target, seen):
    """Derive the mean squared error of maps (B, h, w, C) by hand: loss, kernel and bias gradients."""
    to_kernel, to_bias = [np.zeros_like(k) for k in kernels], [np.zeros_like(b) for b in biases]
    loss = 0.0
    for x, wanted in zip(source, target, strict=True):
        inputs = [x]
        for i, (kernel, bias, step) in enumerate(zip(kernels, biases, steps, strict=True)):
            out = convolve(inputs[-1], kernel, bias, step)
            inputs.append(np.maximum(out, 0) if i < len(kernels) - 1 else out)
        difference = inputs[-1] - wanted
        loss += (difference**2).sum() / target.size
        slope = 2 * difference / target.size
        h, w = x.shape[:2]
        for i in reversed(range(len(kernels))):
            if i < len(kernels) - 1:
                slope = slope * (inputs[i + 1] > 0)
            to_bias[i] += slope.sum((0, 1))
            back = np.zeros_like(inputs[i])
            for y, c, ky, kx in np.ndindex(h, w, 3, 3):
                sy, sx = y + (ky - 1) * steps[i], c + (kx - 1) * steps[i]
                if seen[i][ky, kx] and 0 <= sy < h and 0 <= sx < w:
                    to_kernel[i][ky, kx] += np.outer(inputs[i][sy, sx], slope[y, c])
                    back[sy, sx] += kernels[i][ky, kx] @ slope[y, c]
            slope = back
    return loss, to_kernel, to_bias


class AdamW:
    """As published: decay first, then the step, moments corrected for their start."""

    def __init__(self, values, rate):
        self.values, self.rate, self.t = values, rate, 0
        self.m, self.v = [np.zeros_like(a) for a in values], [np.zeros_like(a) for a in values]

    def step(self, slopes):
        self.t += 1
        for value, slope, m, v in zip(self.values, slopes, self.m, self.v, strict=True):
            m[:] = 0.9 * m + 0.1 * slope
            v[:] = 0.999 * v + 0.001 * slope**2
            value *= 1 - self.rate * 0.01
            value -= self.rate * (m / (1 - 0.9**self.t)) / (np.sqrt(v / (1 - 0.999**self.t)) + 1e-8)


@pytest.mark.parametrize(
    ("mode", "params"),
    [
        ("causal", {}),
        ("bidirectional", {"dilations": [2, 1]}),
        ("standard", {"clip_norm": 0.05}),
        ("causal", {"noise_probability": 1.0, "noise_scale": 0.5}),
    ],
)
def test_first_steps_of_training_follow_the_equations(mode, params):
    """Weights, order and noise are drawn again as documented; forward, backward and AdamW are by hand."""
    model = tiny(mode=mode, n_epochs=3, batch_size=2, learning_rate=1e-2, **params)
    data = features(3, h=4, w=5)
    x = data.tensor.double().numpy()
    seed = int(torch.randint(2**31, (2,), generator=torch.Generator().manual_seed(42))[0])
    draw = torch.Generator().manual_seed(seed)
    kernels, biases = [], []
    for i, (c_in, c_out) in enumerate(((5, 6), (6, 5))):
        taps, bound = SEEN[mode][i > 0].count("x"), 1 / math.sqrt(9 * c_in)
        kernels.append(
            kernel_of(torch.empty(taps, c_in, c_out).uniform_(-bound, bound, generator=draw), mode, i)
        )
        biases.append(torch.empty(c_out).uniform_(-bound, bound, generator=draw).double().numpy())
    seen = [np.array([list(r) for r in SEEN[mode][i > 0].split()]) == "x" for i in range(2)]
    given = params.get("dilations", 1)
    steps = given if isinstance(given, list) else [given] * 2
    start = [k.copy() for k in kernels]
    descent = AdamW([*kernels, *biases], 1e-2)
    for _ in range(3):
        order = int(torch.randint(2**31, (), generator=draw))
        images = torch.randperm(3, generator=torch.Generator().manual_seed(order)).tolist()
        for batch in (images[:2], images[2:]):
            noisy = torch.rand((), generator=draw).item() < params.get("noise_probability", 0.2)
            source = x[batch]
            if noisy:
                noise = torch.randn(len(batch), 4, 5, 5, generator=draw).double().numpy()
                spread = source.std((1, 2), ddof=1, keepdims=True)
                source = source + params.get("noise_scale", 0.03) * spread * noise
            _, to_kernel, to_bias = gradients(kernels, biases, steps, source, x[batch], seen)
            slopes = [*to_kernel, *to_bias]
            norm = math.sqrt(sum((s**2).sum() for s in slopes))
            if "clip_norm" in params:
                assert norm > params["clip_norm"]
                slopes = [s * params["clip_norm"] / norm for s in slopes]
            descent.step(slopes)
    state = model.fit([data]).state()
    for i in range(2):
        assert np.abs(kernels[i] - start[i]).max() > 0.02
        np.testing.assert_allclose(kernel_of(state[f"forward.{i}.weight"], mode, i), kernels[i], atol=1e-5)
        np.testing.assert_allclose(state[f"forward.{i}.bias"], biases[i], atol=1e-5)


def test_gradients_hold_for_cosine_and_unequal_dilations():
    for mode in SEEN:
        net = raster_net.RasterNet(mode, (1, 2, 4), (2, 3, 3, 2), sign=-1)
        drawn = net.draw("active", torch.Generator().manual_seed(0))
        weights = {n: t.double().requires_grad_() for n, t in drawn.items()}
        x = features(1, h=3, w=5, d=2).tensor.double()

        def errors(*tensors, net=net, names=tuple(weights), x=x):
            return net.errors(dict(zip(names, tensors, strict=True)), x, x, "cosine")

        assert torch.autograd.gradcheck(errors, tuple(weights.values()))


def test_batches_larger_than_a_pass_and_of_several_grids_are_one_step(monkeypatch):
    mixed = [features(3), features(2, h=9, w=4, seed=1)]
    model = tiny(batch_size=5, noise_probability=0.0)
    whole = model.fit(mixed).state()
    monkeypatch.setattr(raster_training, "PASS_PATCHES", 45)
    for name, tensor in tiny(batch_size=5, noise_probability=0.0).fit(mixed).state().items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-5)


def test_init_counts_all_taps_or_the_active_ones():
    for mode, init, fan_in in (
        ("causal", "full", 9),
        ("causal", "active", 4),
        ("bidirectional", "active", 8),
    ):
        net = raster_net.RasterNet(mode, (1, 1), (7, 300, 7))
        drawn = net.draw(init, torch.Generator().manual_seed(0))
        for name in ("0.weight", "0.bias"):
            largest = drawn[name].abs().max().item() * math.sqrt(7 * fan_in)
            assert 0.95 < largest <= 1 + 1e-6, (mode, init, name)


def test_training_learns_and_dropout_changes_it():
    tensor = features(12).tensor
    data, held_back = [Features(tensor[:8], None, SIZE)], Features(tensor[8:], None, SIZE)
    untrained, trained = (tiny(n_epochs=n, learning_rate=1e-2).fit(data) for n in (1, 60))
    losses = [m.patch_scores(held_back).mean().item() for m in (untrained, trained)]
    assert losses[1] < 0.3 * losses[0]
    dropped = tiny(dropout=0.3).fit(data).state()
    plain = tiny().fit(data).state()
    assert not torch.equal(dropped["forward.0.weight"], plain["forward.0.weight"])


def test_dropout_keeps_the_mean_and_zeroes_its_share():
    net = raster_net.RasterNet("causal", (1, 1), (2, 4000, 1))
    weights = {n: torch.zeros(s) for n, s in net.shapes().items()}
    weights["0.bias"] += 1
    weights["1.weight"][4] = 1 / 4000
    x = torch.zeros(1, 2, 2, 1)
    source = torch.zeros(1, 2, 2, 2)
    found = net.errors(weights, source, x, "mse", 0.25, torch.Generator().manual_seed(0)).sqrt()
    assert found.sub(1).abs().max() < 0.03
    assert found.sub(1).abs().min() > 0


def test_best_epoch_on_validation_is_kept_or_the_last():
    data, validation = [features(4)], [features(4, seed=3)]

    def judged(model):
        return model.patch_scores(validation[0]).mean().item()

    params = {"learning_rate": 0.3, "noise_probability": 0.0}
    losses = [judged(tiny(n_epochs=n, **params).fit(data)) for n in range(1, 9)]
    best = min(losses)
    assert best < losses[-1]
    chosen = tiny(n_epochs=8, **params).fit(data, validation=validation)
    assert judged(chosen) == best
    assert judged(tiny(n_epochs=8, keep="last", **params).fit(data, validation=validation)) == losses[-1]


def test_forward_network_is_the_same_with_and_without_the_other():
    one, both = tiny().fit([features()]).state(), tiny(direction="min").fit([features()]).state()
    assert all(torch.equal(both[name], one[name]) for name in one)
    assert len(both) == 2 * len(one)
    assert not torch.equal(both["forward.0.weight"], both["backward.0.weight"])


def test_backward_network_learns_the_map_turned_by_180_degrees():
    recipe = raster_training.Recipe("mse", 2, 0.01, 0.0, 0.0, 0.0, None, "full")
    found = []
    for sign, tensor in ((-1, features().tensor), (1, features().tensor.flip(1, 2))):
        net = raster_net.RasterNet("causal", (1, 2), (5, 6, 5), sign)
        run = raster_training.Run(net, recipe, 3, torch.device("cpu"))
        with FeatureStore.of([Features(tensor, None, SIZE)]) as store:
            for _ in range(3):
                run.epoch(store)
        found.append(run.result())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-4, atol=1e-5)


def test_seed_decides_and_the_global_generator_plays_no_part():
    torch.manual_seed(1)
    first = tiny(dropout=0.2).fit([features()]).state()
    before = torch.get_rng_state()
    torch.manual_seed(2)
    second = tiny(dropout=0.2).fit([features()]).state()
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(2).get_state())
    torch.set_rng_state(before)
    assert all(torch.equal(second[name], first[name]) for name in first)
    other = tiny(dropout=0.2, seed=7).fit([features()]).state()
    assert not torch.equal(other["forward.0.weight"], first["forward.0.weight"])


def test_fit_works_under_no_grad_and_inference_mode():
    expected = tiny().fit([features()]).state()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = tiny().fit([features()]).state()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


RESUMED = {"n_epochs": 5, "dropout": 0.2, "direction": "mean", "noise_probability": 0.5, "learning_rate": 0.1}


def killed_run(path):
    """Run in a process of its own: SIGKILL in the third epoch."""
    calls = []
    step = raster_training.Run._step

    def deadly(self, store, images):
        calls.append(images)
        if len(calls) == 11:  # two networks, two batches an epoch: the second network's second batch
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, store, images)

    raster_training.Run._step = deadly
    tiny(**RESUMED).fit([features()], validation=[features(seed=3)], checkpoint=path)


def test_killed_run_goes_on_to_the_same_bytes(tmp_path):
    code = f"import runpy; runpy.run_path({__file__!r})['killed_run']({str(tmp_path / 'run')!r})"
    folder = str(Path(__file__).parent)
    killed = subprocess.run([sys.executable, "-c", code], cwd=folder)
    assert killed.returncode == -signal.SIGKILL
    told = []
    resumed = tiny(**RESUMED).fit(
        [features()],
        validation=[features(seed=3)],
        checkpoint=tmp_path / "run",
        progress=lambda *a: told.append(a),
    )
    assert told == [("train", n, 5) for n in (3, 4, 5)]
    resumed.save(tmp_path / "a")
    tiny(**RESUMED).fit([features()], validation=[features(seed=3)]).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    finished = tiny(**RESUMED).fit([features()], validation=[features(seed=3)], checkpoint=tmp_path / "run")
    finished.save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


def published(seed=0):
    """Build a checkpoint from the list of names and shapes of the published code."""
    draw = torch.Generator().manual_seed(seed)
    listed = json.loads(KEYS.read_text(encoding="utf-8"))
    state = {}
    for name, shape in listed["tensors"].items():
        if name.endswith("mask"):
            state[name] = torch.zeros(shape)
            state[name][:, :, 0] = 1
            state[name][:, :, 1, : 1 if name.startswith("net.0.") else 2] = 1
        else:
            state[name] = torch.randn(shape, generator=draw) * 0.02
    return {"model_state_dict": state, "img_size": 448}


def test_published_checkpoint_loads_and_scores_as_masked_convolutions(tmp_path):
    file = published()
    torch.save(file, tmp_path / "model.pth")
    model = SpatialAR.from_published(tmp_path / "model.pth")
    assert repr(model) == "SpatialAR()"
    assert model.n_channels == 384
    state = file["model_state_dict"]
    x = torch.randn(1, 14, 17, 384, generator=torch.Generator().manual_seed(3))
    y = x.double().permute(0, 3, 1, 2)
    for i in range(0, 10, 2):
        kernel = (state[f"net.{i}.weight"] * state[f"net.{i}.mask"]).double()
        bias = state[f"net.{i}.bias"].double()
        y = torch.nn.functional.conv2d(y, kernel, bias, padding=4, dilation=4)
        y = y.relu() if i < 8 else y
    truth = (y.permute(0, 2, 3, 1) - x).square().mean(3)
    torch.testing.assert_close(
        model.patch_scores(Features(x, None, SIZE)).double(), truth, rtol=1e-5, atol=1e-6
    )
    model.save(tmp_path / "ours")
    assert (tmp_path / "ours").stat().st_size < 0.6 * sum(
        4 * t.numel() for n, t in state.items() if not n.endswith("mask")
    )
    again = models.load(tmp_path / "ours")
    assert torch.equal(
        again.patch_scores(Features(x, None, SIZE)), model.patch_scores(Features(x, None, SIZE))
    )


def test_published_pair_loads_with_its_options(tmp_path):
    for seed in (0, 1):
        torch.save(published(seed), tmp_path / f"{seed}.pth")
    forward, backward = tmp_path / "0.pth", tmp_path / "1.pth"
    assert repr(SpatialAR.from_published(forward, backward)) == "SpatialAR(direction='mean')"
    model = SpatialAR.from_published(forward, backward, direction="min", dilations=[2, 4, 4, 8])
    turned = features(1, h=12, w=12, d=384)
    straight = Features(turned.tensor.flip(1, 2), None, SIZE)
    first = SpatialAR.from_published(forward, dilations=[2, 4, 4, 8]).patch_scores(turned)
    second = SpatialAR.from_published(backward, dilations=[2, 4, 4, 8]).patch_scores(straight).flip(1, 2)
    torch.testing.assert_close(model.patch_scores(turned), torch.minimum(first, second))


@pytest.mark.parametrize("mode", ["bidirectional", "standard"])
def test_published_checkpoint_of_other_modes(tmp_path, mode):
    file = published()
    state = {n: t for n, t in file["model_state_dict"].items() if not n.endswith("mask")}
    if mode == "bidirectional":
        state["net.0.mask"] = torch.ones_like(state["net.0.weight"])
        state["net.0.mask"][:, :, 1, 1] = 0
    torch.save({"model_state_dict": state}, tmp_path / "model.pth")
    model = SpatialAR.from_published(tmp_path / "model.pth")
    assert model.mode == mode
    found = model.state()["forward.2.weight"]
    torch.testing.assert_close(found[5], state["net.4.weight"][:, :, 1, 2].T)


def without(name):
    file = published()
    del file["model_state_dict"][name]
    return file


def changed(name, value):
    file = published()
    file["model_state_dict"][name] = value(file["model_state_dict"].get(name))
    return file


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


WRONG = {
    "bare": (lambda: published()["model_state_dict"], "has no model_state_dict"),
    "a list": (lambda: [1], "has no model_state_dict"),
    "empty": (lambda: {"model_state_dict": {}}, "is empty"),
    "code": (lambda: {"model_state_dict": {}, "more": Harmful()}, "not a torch file of plain tensors"),
    "no bias": (lambda: without("net.4.bias"), "net.4 has mask, weight, but a layer has weight and bias"),
    "no layer": (lambda: changed("head.weight", lambda _: torch.ones(1)), "holds 'head.weight'"),
    "kernel": (
        lambda: changed("net.2.weight", lambda t: t[:, :, :2]),
        r"net.2 has weight \(256, 256, 2, 3\)",
    ),
    "width": (lambda: changed("net.2.weight", lambda t: t[:, :255]), "the layer before gives, 256"),
    "mask": (lambda: changed("net.2.mask", lambda t: t * torch.rand(256, 1, 1, 1)), "one pattern of 0 and 1"),
    "half mask": (lambda: changed("net.2.mask", lambda t: t / 2), "one pattern of 0 and 1"),
    "mode": (lambda: changed("net.2.mask", torch.ones_like), r"\[4, 9, 5, 5, 5\] taps"),
    "NaN": (lambda: changed("net.2.bias", lambda t: t * torch.nan), "net.2 holds NaN"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_published_checkpoint_is_refused_by_name(tmp_path, monkeypatch, case):
    make, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    torch.save(make(), tmp_path / "odd.pth")
    with pytest.raises(ArtifactError, match=f"odd.pth.*{message}"):
        SpatialAR.from_published(tmp_path / "odd.pth")
    assert not (tmp_path / "harm").exists()


def test_torn_or_missing_published_checkpoint_says_so(tmp_path):
    with pytest.raises(InputError, match=r"none.pth: no such file"):
        SpatialAR.from_published(tmp_path / "none.pth")
    torch.save({"model_state_dict": {"net.0.weight": torch.ones(3, 3, 3, 3)}}, tmp_path / "torn.pth")
    whole = (tmp_path / "torn.pth").read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        (tmp_path / "torn.pth").write_bytes(part)
        with pytest.raises(ArtifactError, match=r"torn.pth: torn, or not"):
            SpatialAR.from_published(tmp_path / "torn.pth")


def test_published_arguments_that_do_not_fit_are_refused(tmp_path):
    torch.save(published(), tmp_path / "a.pth")
    other = {n: t for n, t in published()["model_state_dict"].items() if not n.endswith("mask")}
    torch.save({"model_state_dict": other}, tmp_path / "b.pth")
    with pytest.raises(InputError, match="tells hidden, mode itself"):
        SpatialAR.from_published(tmp_path / "a.pth", mode="causal", hidden=3)
    with pytest.raises(InputError, match="direction 'min' wants 2 checkpoints, got 1"):
        SpatialAR.from_published(tmp_path / "a.pth", direction="min")
    with pytest.raises(InputError, match="direction 'forward' wants 1 checkpoints, got 2"):
        SpatialAR.from_published(tmp_path / "a.pth", tmp_path / "a.pth", direction="forward")
    with pytest.raises(ArtifactError, match=r"do not fit together: causal .* and standard"):
        SpatialAR.from_published(tmp_path / "a.pth", tmp_path / "b.pth")


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
