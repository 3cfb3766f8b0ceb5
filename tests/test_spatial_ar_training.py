"""Training of the autoregressive network against its equations, and runs that go on."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from raster_truth import SEEN, SIZE, convolve, features, kernel_of, tiny

from dinofast.models import raster_net, raster_training
from dinofast.models.feature_store import FeatureStore
from dinofast.types import Features


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
