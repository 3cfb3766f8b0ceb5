"""Published files of the autoregressive network."""

import json
import os
from pathlib import Path

import pytest
import torch
from raster_truth import SIZE, features

from dinofast import models
from dinofast.errors import ArtifactError, InputError
from dinofast.models.spatial_ar import SpatialAR
from dinofast.types import Features

KEYS = Path(__file__).parent / "keys" / "spatial_ar_causal_c384.json"


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
