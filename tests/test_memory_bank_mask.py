"""The foreground mask against an independent derivation."""

import numpy as np
import pytest
import torch
from bank_truth import scene, true_mask
from sklearn.decomposition import PCA

from dinofast.errors import InputError
from dinofast.models.foreground import foreground_mask


@pytest.mark.parametrize("morphology", ["1d", "2d"])
@pytest.mark.parametrize("sides", [(16, 16), (13, 21), (1, 40), (3, 2)])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_mask_equals_an_independent_derivation(morphology, sides, seed):
    tokens = np.stack([scene(*sides, seed=seed), scene(*sides, seed=seed + 10)])
    for threshold in (0.0, 4.0):
        found = foreground_mask(torch.from_numpy(tokens), threshold, morphology).numpy()
        assert np.array_equal(found, np.stack([true_mask(t, threshold, morphology) for t in tokens]))


def test_both_signs_of_the_component_occur():
    """Guard of the test above: its scenes reach the rule's two branches and both morphologies differ."""
    kept, differ = set(), False
    for seed in range(4):
        tokens = scene(16, 16, seed)
        t = PCA(n_components=1, svd_solver="full").fit_transform(tokens.reshape(-1, 20).astype(float))
        kept.add(bool((t.reshape(16, 16)[3:12, 3:12] > 4).sum() <= 0.35 * 81))
        differ |= not np.array_equal(true_mask(tokens, 4.0, "1d"), true_mask(tokens, 4.0, "2d"))
    assert kept == {True, False}
    assert differ


def test_keep_decides_whether_the_component_is_turned():
    tokens = torch.from_numpy(scene(16, 16))[None]
    turned, straight = (foreground_mask(tokens, 4.0, "2d", keep=keep) for keep in (1.0, 0.0))
    assert not torch.equal(turned, straight)
    assert torch.equal(turned, foreground_mask(-tokens, 4.0, "2d", keep=0.0))


def test_constant_image_has_no_foreground():
    for morphology in ("1d", "2d"):
        assert not foreground_mask(torch.full((2, 6, 6, 8), 3.3), 10.0, morphology).any()
    assert foreground_mask(torch.ones(0, 6, 6, 8), 10.0).shape == (0, 6, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.full((1, 4, 4, 3), torch.nan)}, "16 patches hold NaN or infinite"),
        ({"tokens": torch.ones(4, 4, 3)}, r"\(B, h, w, D\)"),
        ({"tokens": torch.ones(1, 0, 4, 3)}, "with patches"),
        ({"threshold": float("nan")}, "threshold must be finite"),
        ({"threshold": -1.0}, "threshold must be finite"),
        ({"morphology": "3d"}, "unknown morphology '3d'; one of 1d, 2d"),
        ({"border": 0.5}, "border must lie"),
        ({"keep": 1.1}, "keep in"),
    ],
)
def test_mask_refuses_bad_input(change, message):
    arguments = {"tokens": torch.randn(1, 4, 4, 3), "threshold": 1.0} | change
    with pytest.raises(InputError, match=message):
        foreground_mask(**arguments)
