"""What AD-DINOv3 refuses, and what it bears."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from zero_shot_truth import CHANNELS, SIZE, TAPS, fitted, images, random

from dinofast import artifact, models
from dinofast.errors import ArtifactError, InputError
from dinofast.models.zero_shot import ZeroShot

# What is refused


BAD_PARAMS = [
    ({"class_name": ""}, "class name '': give a noun"),
    ({"class_name": " "}, "give a noun"),
    ({"n_taps": 0}, "n_taps must be a whole number, at least 1, got 0"),
    ({"n_epochs": 1.5}, "n_epochs must be"),
    ({"batch_size": -1}, "batch_size must be"),
    ({"learning_rate": 0.0}, "learning_rate must be a finite number, above 0"),
    ({"learning_rate": "x"}, "learning_rate must be a finite number, above 0, got 'x'"),
    ({"seed": -1}, "seed must be a whole number"),
    ({"weight_decay": math.inf}, "weight_decay must be a finite number, at least 0, got inf"),
    ({"image_score": "sum"}, "unknown image_score 'sum'; one of global, max, mean"),
    ({"compat": "paper"}, "unknown compat 'paper'; None or one of ad-dinov3"),
    ({"text": Path("text")}, "text must be the path"),
]


@pytest.mark.parametrize(("params", "message"), BAD_PARAMS)
def test_parameters_that_cannot_be_used(params, message) -> None:
    with pytest.raises(InputError, match=message):
        ZeroShot(**params)


def nan_cls() -> torch.Tensor:
    cls = random(3, TAPS * CHANNELS)
    cls[1, 2] = torch.nan
    return cls


BAD_BATCHES = {
    "no masks": ({"masks": None}, "a batch came without; set Features.masks, or .*from_published"),
    "masks of another size": (
        {"masks": torch.zeros(3, 9, 7, dtype=torch.bool)},
        r"masks must be bool \(B, H, W\) = \(3, 7, 9\), the images' size, got torch.bool \(3, 9, 7\)",
    ),
    "too few masks": ({"masks": torch.zeros(2, *SIZE, dtype=torch.bool)}, r"got torch.bool \(2, 7, 9\)"),
    "masks of numbers": ({"masks": torch.zeros(3, *SIZE)}, "got torch.float32"),
    "a class without prompts": ({"class_name": "heart"}, "no text vectors of class 'heart'"),
    "a class without a name": ({"class_name": "?"}, "give a noun"),
}
BAD_CLS = {
    "no class tokens": ({"cls": None}, "these features have none .cls=None.; use a DINOv3"),
    "class tokens of another width": (
        {"cls": random(3, 5)},
        r"= \(3, 6\) on cpu, got torch.float32 \(3, 5\)",
    ),
    "class tokens of whole numbers": ({"cls": torch.zeros(3, 6).long()}, "got torch.int64"),
    "NaN in a class token": ({"cls": nan_cls()}, "class tokens hold NaN"),
    "one patch": ({"tensor": random(3, 1, 1, TAPS * CHANNELS)}, "needs 2 of them, got 1"),
}


@pytest.mark.parametrize("case", BAD_BATCHES | BAD_CLS)
def test_batches_that_cannot_be_learned(case, text_file, tmp_path) -> None:
    changes, message = (BAD_BATCHES | BAD_CLS)[case]
    model = fitted(text_file)
    before = model.score(images())
    with pytest.raises(InputError, match=message):
        model.fit([images(), images(**changes)])
    with pytest.raises(InputError, match=message):
        model.fit([images()], validation=[images(**changes)])
    assert torch.equal(model.score(images()).map, before.map)


@pytest.mark.parametrize("case", BAD_CLS)
def test_images_that_cannot_be_scored(case, text_file) -> None:
    changes, message = BAD_CLS[case]
    model = fitted(text_file)
    for use in (model.score, model.global_logits, model.awareness_map):
        with pytest.raises(InputError, match=message):
            use(images(**changes))


def test_the_largest_value_needs_no_class_token(text_file) -> None:
    model = fitted(text_file, image_score="max")
    assert torch.equal(model.score(images(cls=None)).score, model.score(images()).score)


def test_what_is_missing_for_a_fit_is_said_before_the_work(text_file, tmp_path) -> None:
    def untouched():
        pytest.fail("the features were read")
        yield

    with pytest.raises(InputError, match=r"needs text vectors to fit: .*vectors\(\['object'\]\).*text=FILE"):
        ZeroShot().fit(untouched())
    with pytest.raises(InputError, match="no text vectors of class 'heart', only of lung, object"):
        ZeroShot("heart", text_file).fit(untouched())
    with pytest.raises(InputError, match="no such file"):
        ZeroShot(text=str(tmp_path / "absent")).fit(untouched())
    with pytest.raises(InputError, match="D = 6 is no multiple of n_taps = 4; load the backbone"):
        ZeroShot(text=text_file).fit([images()])


def test_a_training_that_diverges_says_so(text_file) -> None:
    with pytest.raises(
        InputError, match=r"training diverged: the loss is nan in epoch \d+; lower learning_rate"
    ):
        fitted(text_file, learning_rate=1e30, n_epochs=5)


def test_a_constant_image_is_undecided_and_finite(text_file) -> None:
    model = fitted(text_file)
    found = model.score(images(tensor=torch.ones(3, 3, 4, TAPS * CHANNELS)))
    assert torch.allclose(found.map, torch.tensor(0.5))
    flat = model.score(images(tensor=torch.full((3, 3, 4, TAPS * CHANNELS), 0.1)))
    assert flat.map.isfinite().all()


def test_other_states_are_refused(text_file) -> None:
    model = fitted(text_file)
    state = model.state()
    spoiled = [
        {n: t for n, t in state.items() if n != "class/object"},
        state | {"tower": state["tower"][:5]},
        state | {"class/lung": state["class/lung"].double()},
        state | {"patch_adapter": state["patch_adapter"][:1], "cls_adapter": state["cls_adapter"][:1]},
        state | {"more": torch.zeros(2)},
    ]
    for other in spoiled:
        with pytest.raises(
            ArtifactError, match=r"zero_shot of n_taps=2 for class 'object' holds .*this holds"
        ):
            model.load_state(other)


def test_a_file_of_another_class_name_is_refused(text_file, tmp_path) -> None:
    model = fitted(text_file)
    config = {"model": "zero_shot", "params": model.params() | {"class_name": "heart"}}
    artifact.write(tmp_path / "odd", "model", model.state(), config)
    with pytest.raises(ArtifactError, match=r"odd: a zero_shot .*for class 'heart'"):
        models.load(tmp_path / "odd")


def test_fit_works_under_inference_mode(text_file: str) -> None:
    expected = fitted(text_file).state()
    with torch.inference_mode():
        found = fitted(text_file).state()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
