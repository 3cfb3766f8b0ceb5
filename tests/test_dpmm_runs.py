"""DPMM: what is refused, how runs go on, and what stands in its state."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dpmm_truth import KINDS, images, rows

from dinofast import models
from dinofast.errors import ArtifactError, InputError
from dinofast.models.dpmm import DPMM
from dinofast.types import Features


def test_component_without_rows_fades_out():
    model = DPMM(n_components=8, init="first-rows", normalize=False)
    model.partial_fit(Features(torch.cat([rows(96), rows(4) + 500]).view(1, 10, 10, -1), None, (9, 9)))
    for seed in range(200):
        model.partial_fit(images(seed=seed))
    assert bool(model.state()["covariances"].isfinite().all())
    assert float(model.weights_.min()) < 1e-12
    assert model.score(images()).map.isfinite().all()


def nan_images():
    return Features(torch.full((2, 3, 3, 6), torch.nan), None, (9, 9))


def test_bad_batches_are_refused_and_nothing_is_lost():
    model = DPMM(n_components=5).partial_fit(images())
    before = {name: tensor.clone() for name, tensor in model.state().items()}
    for batch, message in (
        (nan_images(), "18 of 18 patches hold NaN"),
        (images(d=7), "fitted on features with D = 6, these have D = 7"),
        (Features(torch.zeros(0, 3, 3, 6), None, (9, 9)), "no images"),
    ):
        with pytest.raises(InputError, match=message):
            model.partial_fit(batch)
    with pytest.raises(InputError, match="18 of 18 patches hold NaN"):
        model.fit([images(), nan_images()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state().items())
    huge = Features(1e25 * images().tensor, None, (9, 9))
    with pytest.raises(InputError, match=r"step 0 of the mixture leaves the range .*normalize"):
        DPMM(n_components=5, normalize=False).partial_fit(huge)
    uneven = 1e5 * images().tensor[..., :1].expand(-1, -1, -1, 6)
    with pytest.raises(InputError, match=r"cannot be inverted .*raise reg_covar"):
        DPMM(n_components=5, normalize=False, covariance_type="full").fit([Features(uneven, None, (9, 9))])


def test_partial_fit_goes_on_from_a_saved_model(tmp_path):
    batches = [images(seed=seed) for seed in range(4)]
    whole = DPMM(n_components=6, schedule="exp", update_rate=0.7)
    for batch in batches:
        whole.partial_fit(batch)
    half = (
        DPMM(n_components=6, schedule="exp", update_rate=0.7).partial_fit(batches[0]).partial_fit(batches[1])
    )
    half.save(tmp_path / "half")
    loaded = models.load(tmp_path / "half")
    assert loaded.weight_concentration_ == half.weight_concentration_ != 2
    loaded.partial_fit(batches[2]).partial_fit(batches[3])
    assert loaded.n_iter_ == whole.n_iter_ == 4
    assert all(torch.equal(tensor, whole.state()[name]) for name, tensor in loaded.state().items())


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_components_by_channels_suffice_but_for_full(kind):
    model = DPMM(n_components=9, covariance_type=kind).partial_fit(images())
    sizes = {tuple(tensor.shape) for tensor in model.state().values()}
    wide = {(9, 6, 6)} if kind == "full" else set()
    assert sizes == {(9, 6), (9,), ()} | wide
    assert model.covariances_.shape == {"diag": (9, 6), "spherical": (9,), "full": (9, 6, 6)}[kind]


def test_tokens_are_normalized_before_they_are_resampled():
    wide = images(2, 4, 8)
    wide.tensor[:, :, ::2] *= 50
    model = DPMM(n_components=4, resample=4, n_epochs=1).fit([wide])
    unit = torch.nn.functional.normalize(wide.tensor, dim=3)
    pairs = (unit[:, :, ::2] + unit[:, :, 1::2]) / 2
    torch.testing.assert_close(model._prepared(wide.tensor), pairs)
    plain = DPMM(n_components=4, normalize=False, n_epochs=1).fit([Features(pairs, None, (24, 30))])
    torch.testing.assert_close(model.means_, plain.means_)
    torch.testing.assert_close(model.score(wide).map, plain.score(Features(pairs, None, (24, 30))).map)
    assert model.patch_scores(wide).shape == (2, 4, 4)
    assert model.score(Features(wide.tensor[:0], None, (24, 30))).map.shape == (0, 24, 30)
    mixed = DPMM(n_components=4, resample=4, n_epochs=1).fit([images(2, 4, 8), images(1, 7, 3)])
    assert mixed.score(images(1, 5, 5)).map.isfinite().all()


def test_map_is_the_scores_bilinear_and_the_image_score_their_top_percent():
    model = DPMM(n_components=6).fit([images()])
    query = images(2, 12, 25, seed=8)
    patches, scores = model.patch_scores(query), model.score(query)
    expected = torch.nn.functional.interpolate(patches[:, None], (24, 30), mode="bilinear")[:, 0]
    torch.testing.assert_close(scores.map, expected)
    torch.testing.assert_close(scores.score, patches.flatten(1).topk(3).values.mean(1))


def test_assignment_tells_clusters_apart_also_at_the_size_of_the_image():
    kinds = torch.eye(6)[:3] * 10
    layout = torch.randint(3, (4, 6, 5), generator=torch.Generator().manual_seed(0))
    noise = 0.1 * torch.randn(4, 6, 5, 6, generator=torch.Generator().manual_seed(1))
    model = DPMM(n_components=3, n_epochs=3).fit([Features(kinds[layout] + noise, None, (24, 10))])
    labels = model.assign(Features(kinds[layout] + noise, None, (24, 10)))
    assert labels.dtype == torch.int64
    names = {(int(a), int(b)) for a, b in zip(layout.flatten(), labels.flatten(), strict=True)}
    assert len(names) == 3
    pixels = model.assign(Features(kinds[layout] + noise, None, (24, 10)), pixels=True)
    assert torch.equal(pixels, labels.repeat_interleave(4, 1).repeat_interleave(2, 2))
    odd = model.assign(Features(kinds[layout] + noise, None, (7, 3)), pixels=True)
    assert torch.equal(odd[:, 3, 1], labels[:, 2, 1])


KILLED = """
import os, runpy, signal
from dinofast.models.dpmm import DPMM
file = runpy.run_path({file!r})
DPMM.checkpoint_steps = 2
def die(stage, done, total):
    if done == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
file["resumable"]().fit([file["images"](9)], validation={validation}, checkpoint={path!r}, progress=die)
"""


def resumable():
    return DPMM(n_components=15, n_epochs=4, batch_size=2, update_rate=0.9, seed=3)


@pytest.mark.parametrize("validated", [True, False], ids=["validated", "plain"])
def test_run_killed_within_an_epoch_goes_on_to_the_same_numbers(tmp_path, validated):
    """Of five steps an epoch, the kill comes in the fourth of the third: in step 14, saved after step 12."""
    path = str(tmp_path / "run")
    held_back = "[file['images'](3, seed=50)]" if validated else "None"
    code = KILLED.format(file=__file__, at=14, path=path, validation=held_back)
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent)
    assert killed.returncode == -signal.SIGKILL
    told = []
    validation = [images(3, seed=50)] if validated else None
    model = resumable()
    model.fit([images(9)], validation=validation, checkpoint=path, progress=lambda *a: told.append(a))
    assert [done for _, done, _ in told] == list(range(13, 21))
    expected = resumable().fit([images(9)], validation=validation)
    assert set(expected.state()) == set(model.state())
    assert all(torch.equal(tensor, model.state()[name]) for name, tensor in expected.state().items())
    finished = resumable().fit([images(9)], validation=validation, checkpoint=path)
    assert all(torch.equal(tensor, model.state()[name]) for name, tensor in finished.state().items())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_components": 0}, "n_components must be a whole number, at least 1"),
        ({"batch_size": 1.5}, "batch_size must be"),
        ({"patience": 0}, "patience must be"),
        ({"resample": True}, "resample must be"),
        ({"seed": -1}, "seed must be"),
        ({"covariance_type": "tied"}, "unknown covariance_type 'tied'; one of diag, spherical, full"),
        ({"schedule": "poly"}, "unknown schedule 'poly'; one of ema, exp, or None"),
        ({"init": "random"}, "unknown init"),
        ({"scoring": "l1"}, "unknown scoring"),
        ({"compat": "code"}, "unknown compat"),
        ({"update_rate": 0.0}, "update_rate must be a finite number, in"),
        ({"update_rate": "a"}, "update_rate must be a finite number, in .* got 'a'"),
        ({"seed": 2**63}, "seed must be"),
        ({"weight_concentration": 0.5}, "weight_concentration must be"),
        ({"weight_threshold": 1.0}, "weight_threshold must be"),
        ({"reg_covar": -1.0}, "reg_covar must be"),
        ({"eps": 0.0}, "eps must be"),
    ],
)
def test_parameters_out_of_range_are_refused(params, message):
    with pytest.raises(InputError, match=message):
        DPMM(**params)


def test_state_of_another_kind_is_refused():
    state = DPMM(n_components=5).partial_fit(images()).state()
    for model, changed, message in (
        (DPMM(n_components=6), state, "first of a mixture of 6 components must be"),
        (DPMM(n_components=5, covariance_type="full"), state, r"must be torch.float32 \(5, 6, 6\)"),
        (DPMM(n_components=5), {n: t for n, t in state.items() if n != "mass"}, "a mixture holds"),
        (DPMM(n_components=5), {n: t for n, t in state.items() if n != "lower_bound"}, "lower_bound"),
        (
            DPMM(n_components=5),
            state | {"sticks": state["sticks"].float()},
            "sticks .* must be torch.float64",
        ),
    ):
        with pytest.raises(ArtifactError, match=message):
            model.load_state(changed)


def test_a_large_seed_shuffles_epochs():
    batch = Features(torch.randn(3, 2, 2, 4, generator=torch.Generator().manual_seed(0)), None, (8, 8))
    large = DPMM(n_components=2, n_epochs=2, seed=2**63 - 1).fit([batch])
    assert large.n_iter_ == 2
    assert DPMM(n_components=2, n_epochs=2, seed=2**44).fit([batch]).n_iter_ == 2
