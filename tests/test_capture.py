"""Capture: what is recorded, how it is fed, and what makes it useless; the graph itself needs a GPU."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lanes import AtOnce, Lanes
from textures import save, spoiled, weave
from torch.nn import functional as F

from dinofast import Detector, backbone, data, models, ops
from dinofast.backbone import Backbone
from dinofast.capture import CudaRecorder
from dinofast.data.sample import Sample
from dinofast.errors import InputError, KernelError
from dinofast.text_vectors import TextVectors
from dinofast.types import Prediction

needs_native = pytest.mark.skipif(
    "cpu" in ops.MISSING,
    reason="without native kernels a search other than for the largest cosine waits",
)
SEARCHED = ("patchcore", "support_kmeans")
CAPTURED = [
    pytest.param(name, marks=[needs_native] * (name in SEARCHED))
    for name in models.names()
    if name != "zero_shot"
]

NORMAL = [weave(i) for i in range(4)]
IMAGES = [spoiled(i) for i in range(20, 29)]
SMALL: dict[str, dict[str, Any]] = {
    "dpmm": {"n_components": 5, "n_epochs": 2},
    "spatial_ar": {"n_epochs": 2, "hidden": 8, "n_layers": 2, "dilations": 1},
    "support_kmeans": {"match_descriptor": "mean_foreground_patch", "foreground": "otsu"},
    "patchcore": {"compat": "anomalib-patchcore", "coreset_ratio": 0.5},
}


@pytest.fixture
def fitted(lite0: Backbone) -> Detector:
    return Detector(lite0).fit(NORMAL)


def same(found: list[Prediction], expected: list[Prediction]) -> None:
    assert [p.source for p in found] == [p.source for p in expected]
    assert [p.score for p in found] == [p.score for p in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.map, other.map)


def close(found: list[Prediction], expected: list[Prediction], atol: float = 1e-5) -> None:
    """Other batches take other blocks in matrix products: float32 rounding, in units of the scores here."""
    assert [p.source for p in found] == [p.source for p in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.score == pytest.approx(other.score, abs=atol)
        torch.testing.assert_close(one.map, other.map, rtol=0, atol=atol)


# Equality with predict


@pytest.mark.parametrize("name", CAPTURED)
def test_a_capture_gives_the_bits_of_predict(lite0: Backbone, name: str) -> None:
    detector = Detector(lite0, models.create(name, **SMALL.get(name, {}))).fit(NORMAL)
    captured = detector.capture((96, 96), batch=3, recorder=Lanes())
    same(list(captured.predict(IMAGES)), list(detector.predict(IMAGES, batch_size=3)))


@needs_native
def test_real_slices_and_thresholds(lite0: Backbone) -> None:
    brain = data.demo.load("brain")
    detector = Detector(lite0, "patchcore").fit(brain.fit)
    detector.calibrate(brain.fit, cross_fit=3)
    size = brain.test[0].load().shape[:2]
    captured = detector.capture(size, batch=4, recorder=Lanes(1))
    detector.calibrate(brain.fit, cross_fit=3, level="image", fpr=0.1)
    found, expected = list(captured.predict(brain.test)), list(detector.predict(brain.test, batch_size=4))
    n = len(brain.test) // 4 * 4
    assert n >= 4
    same(found[:n], expected[:n])
    close(found, expected)
    assert found[0].mask is not None
    assert torch.equal(found[0].mask, expected[0].mask)
    assert [p.is_anomalous for p in found] == [p.is_anomalous for p in expected]


@pytest.mark.parametrize("model", [pytest.param("support_kmeans", marks=needs_native), "zero_shot"])
def test_class_tokens_and_gray_are_on_the_path(model: str, tmp_path: File) -> None:
    dino = backbone.load("random:dinov2-small", device="cpu", size=70, layers=(2, 11))
    params: dict[str, Any] = {}
    images: list[Any] = list(NORMAL)
    if model == "zero_shot":
        pair = F.normalize(torch.randn(2, 16), dim=1)
        TextVectors({"cloth": pair}, "0" * 64, "a toy").save(tmp_path / "text")
        params = {"class_name": "cloth", "text": str(tmp_path / "text"), "n_taps": 2, "n_epochs": 1}
        params |= {"image_score": "mean"}
        images = [
            Sample(f"{i}", lambda i=i: weave(i), mask_reader=lambda: np.zeros((96, 96), np.bool_))
            for i in range(4)
        ]
    detector = Detector(dino, models.create(model, **params)).fit(images)
    captured = detector.capture((96, 96), batch=2, recorder=Lanes())
    same(list(captured.predict(IMAGES[:4])), list(detector.predict(IMAGES[:4], batch_size=2)))


@pytest.mark.parametrize("seed", range(6))
def test_no_order_of_the_lanes_mixes_batches(fitted: Detector, seed: int) -> None:
    recorder = Lanes(seed)
    captured = fitted.capture([(96, 96), (120, 96)], batch=2, recorder=recorder)
    sizes = [(96, 96)] * 7 + [(120, 96)] * 3 + [(96, 96), (120, 96), (96, 96), (96, 96)]
    images = [spoiled(i, size) for i, size in enumerate(sizes)]
    close(list(captured.predict(images)), list(fitted.predict(images)))


@pytest.mark.parametrize("seed", range(4))
def test_two_runs_at_once_keep_their_results(fitted: Detector, seed: int) -> None:
    captured = fitted.capture((96, 96), batch=1, recorder=Lanes(seed))
    one, other = captured.predict(IMAGES), captured.predict(IMAGES[::-1])
    found: list[list[Prediction]] = [[], []]
    for a, b in zip(one, other, strict=True):
        found[0].append(a)
        found[1].append(b)
    close(found[0], list(fitted.predict(IMAGES)))
    close(found[1], list(fitted.predict(IMAGES[::-1])))


def test_the_next_batch_is_copied_while_one_computes(fitted: Detector) -> None:
    class Late(Lanes):
        def _given(self, lane: str, work: Any, after: Any) -> Any:
            before, self._step = self._step, lambda: False  # type: ignore[method-assign]
            try:
                return super()._given(lane, work, after)
            finally:
                self._step = before  # type: ignore[method-assign]

    recorder = Late()
    captured = fitted.capture((96, 96), batch=1, recorder=recorder)
    assert len(list(captured.predict(IMAGES))) == 9
    assert recorder.busy == 8


def test_the_path_runs_twice_aside_before_it_is_recorded(
    fitted: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = AtOnce()
    network = fitted.backbone.network
    handle = network.register_forward_hook(lambda *_: recorder.events.append("run"))
    try:
        fitted.capture((96, 96), batch=2, recorder=recorder)
    finally:
        handle.remove()
    assert recorder.events == ["aside", "run", "run", "record", "run"]


def test_predictions_stream(fitted: Detector) -> None:
    reads: list[int] = []

    def sample(i: int) -> Sample:
        return Sample(f"{i}", lambda: (reads.append(i), IMAGES[i])[1])

    captured = fitted.capture((96, 96), batch=2, recorder=Lanes())
    for i, prediction in enumerate(captured.predict([sample(i) for i in range(9)])):
        assert prediction.source == f"{i}"
        assert len(reads) <= 2 * (i // 2 + 2)


# Sizes


def test_an_image_of_another_size_is_named_with_the_sizes_that_exist(fitted: Detector) -> None:
    captured = fitted.capture([(96, 96), (120, 96)], recorder=Lanes())
    assert captured.sizes == ((96, 96), (120, 96))
    assert repr(captured) == "Captured(MemoryBank(), 96x96, 120x96, batch=1)"
    found = captured.predict([IMAGES[0], weave(1, (100, 96)), IMAGES[1]])
    assert next(found).source == "array[0]"
    with pytest.raises(InputError, match=r"array\[1\]: 100x96 pixels, and captured are 96x96, 120x96"):
        next(found)


def test_other_sizes_run_eagerly_when_asked(fitted: Detector) -> None:
    captured = fitted.capture((96, 96), batch=4, recorder=Lanes())
    images = [IMAGES[0], weave(1, (100, 96)), IMAGES[1], IMAGES[2], weave(3, (130, 110))]
    found = list(captured.predict(images, other_sizes="eager"))
    close(found, list(fitted.predict(images)))
    with pytest.raises(InputError, match="unknown other_sizes 'skip'; one of error, eager"):
        captured.predict(images, other_sizes="skip")


def test_maps_come_at_the_size_of_the_image_not_of_the_pixels(fitted: Detector) -> None:
    image = spoiled(3, (200, 150))
    captured = fitted.capture((200, 150), recorder=Lanes())
    (found,) = captured.predict(image)
    assert found.map.shape == (200, 150)
    same([found], list(fitted.predict(image)))


@pytest.mark.parametrize(
    ("size", "batch", "words"),
    [
        ((96, 96), 0, "batch must be a whole number, at least 1, got 0"),
        ((96, 0), 1, r"a size is \(H, W\), each at least 1, got \(96, 0\)"),
        (
            (96, True),
            1,
            r"a size is \(H, W\) of the images as they are read, two whole numbers, got \(96, True",
        ),
        (96, 1, r"a size is \(H, W\) of the images as they are read, two whole numbers, got 96"),
        ([(96, 96), (1, 2, 3)], 1, r"two whole numbers, got \(1, 2, 3\)"),
        ((8, 96), 1, "8x96 pixels: smaller than one patch of 16x16"),
    ],
)
def test_sizes_that_cannot_be(fitted: Detector, size: Any, batch: int, words: str) -> None:
    recorder = Lanes()
    with pytest.raises(InputError, match=words):
        fitted.capture(size, batch, recorder=recorder)


def test_sizes_may_be_numbers_of_numpy(fitted: Detector) -> None:
    captured = fitted.capture((np.int64(96), np.int32(96)), recorder=Lanes())
    assert captured.sizes == ((96, 96),)
    assert len(list(captured.predict(IMAGES[:1]))) == 1


# Bad images


def test_bad_images_are_raised_after_those_before_or_passed_over(
    fitted: Detector, tmp_path: File, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    captured = fitted.capture((96, 96), batch=2, recorder=Lanes())
    files = [save(tmp_path / f"{i}.png", image) for i, image in enumerate(IMAGES[:4])]
    listed = [*files[:3], bad, files[3]]
    found: list[Prediction] = []
    with pytest.raises(InputError, match=r"bad\.png"):
        found.extend(captured.predict(listed))
    assert [p.source for p in found] == [str(f) for f in files[:3]]
    assert len(list(captured.predict(listed, skip_bad=True))) == 4
    assert "skipped" in caplog.text


def test_tokens_that_are_nan_are_an_error_of_their_image(fitted: Detector) -> None:
    captured = fitted.capture((96, 96), batch=2, recorder=Lanes())

    def break_second(module: Any, args: Any, result: Any) -> Any:
        tokens, cls = result
        tokens = tokens.clone()
        if len(tokens) > 1:
            tokens[1, 2, 3, 7] = torch.nan
        return tokens, cls

    handle = fitted.backbone.network.register_forward_hook(break_second)
    try:
        found = captured.predict(IMAGES[:3])
        assert next(found).source == "array[0]"
        with pytest.raises(InputError, match=r"array\[1\]: 1 of its tokens are NaN or infinite"):
            next(found)
        (alone,) = captured.predict(IMAGES[0])  # what is broken is the unused place
        assert np.isfinite(alone.score)
    finally:
        handle.remove()


def test_progress_is_told(fitted: Detector) -> None:
    told: list[tuple[str, int, int | None]] = []
    captured = fitted.capture((96, 96), batch=2, recorder=Lanes())
    list(captured.predict(IMAGES[:3], progress=lambda *what: told.append(what)))
    assert told == [("predict", i, 3) for i in range(4)]


def test_bad_images_of_other_sizes_are_passed_over_and_read_once(fitted: Detector) -> None:
    reads: list[str] = []

    def sample(name: str, image: Any) -> Sample:
        return Sample(name, lambda: (reads.append(name), image)[1])

    captured = fitted.capture((96, 96), recorder=Lanes())
    images = [
        sample("own", IMAGES[0]),
        sample("small", IMAGES[0][:8]),
        sample("other", weave(1, (100, 96))),
        sample("last", IMAGES[1]),
    ]
    found = list(captured.predict(images, other_sizes="eager", skip_bad=True))
    assert [p.source for p in found] == ["own", "other", "last"]
    assert reads == ["own", "small", "other", "last"]
    running = captured.predict(images, other_sizes="eager")
    assert next(running).source == "own"
    with pytest.raises(InputError, match="small: 8x96 pixels: smaller than one patch"):
        next(running)


def test_class_tokens_that_the_model_does_not_read_may_be_nan() -> None:
    dino = backbone.load("random:dinov2-small", device="cpu", size=70)
    detector = Detector(dino).fit(NORMAL)
    handle = dino.network.register_forward_hook(
        lambda module, args, result: (result[0], torch.nan * result[1])
    )
    try:
        captured = detector.capture((96, 96), recorder=Lanes())
        same(list(captured.predict(IMAGES[:2])), list(detector.predict(IMAGES[:2], batch_size=1)))
    finally:
        handle.remove()


# What ends a capture


def test_learning_or_loading_ends_it(lite0: Backbone) -> None:
    other = Detector(lite0).fit(IMAGES[:2]).model.state()
    changes: list[Any] = [
        lambda d: d.fit(NORMAL),
        lambda d: d.model.load_state(other),
        lambda d: d.model.merge(copy.deepcopy(d.model)),
        lambda d: setattr(d, "model", copy.deepcopy(d.model)),
        lambda d: setattr(d.model, "sigma", 2.0),
    ]
    for change in changes:
        detector = Detector(lite0).fit(NORMAL)
        captured = detector.capture((96, 96), recorder=Lanes())
        running = captured.predict(IMAGES)
        next(running)
        change(detector)
        with pytest.raises(InputError, match=r"after it was captured, and .* call capture again"):
            captured.predict(IMAGES)
        with pytest.raises(InputError, match="call capture again"):
            next(running)
        (again,) = detector.capture((96, 96), recorder=Lanes()).predict(IMAGES[0])
        same([again], list(detector.predict(IMAGES[0])))


def test_another_precision_ends_it() -> None:
    own = backbone.load("efficientnet-lite0", size=96, device="cpu")
    detector = Detector(own).fit(NORMAL)
    captured = detector.capture((96, 96), recorder=Lanes())
    own.to(torch.bfloat16)
    with pytest.raises(InputError, match="moved its backbone, or changed its precision"):
        captured.predict(IMAGES)


def test_another_preprocessing_ends_it() -> None:
    own = backbone.load("efficientnet-lite0", size=96, device="cpu")
    detector = Detector(own).fit(NORMAL)
    captured = detector.capture((96, 96), recorder=Lanes())
    running = captured.predict(IMAGES)
    next(running)
    own.preprocess = backbone.Preprocess(128, own.patch_size)
    for call in (lambda: captured.predict(IMAGES), lambda: next(running)):
        with pytest.raises(InputError, match="got another preprocessing after it was captured"):
            call()


def test_nothing_of_a_batch_comes_after_the_detector_learned(fitted: Detector) -> None:
    captured = fitted.capture((96, 96), batch=4, recorder=Lanes())
    running = captured.predict(IMAGES[:8])
    next(running)
    fitted.fit(IMAGES[:2])
    with pytest.raises(InputError, match="learned or loaded something else"):
        next(running)


def test_images_of_other_sizes_are_not_scored_by_what_was_learned_later(fitted: Detector) -> None:
    captured = fitted.capture((96, 96), recorder=Lanes())
    running = captured.predict([IMAGES[0], weave(1, (100, 96))], other_sizes="eager")
    next(running)
    fitted.fit(IMAGES[:2])
    with pytest.raises(InputError, match="learned or loaded something else"):
        next(running)


def test_thresholds_are_those_of_the_start_of_a_batch(fitted: Detector) -> None:
    captured = fitted.capture((96, 96), batch=2, recorder=Lanes())
    running = captured.predict(IMAGES[:8])
    found = [next(running)]
    fitted.calibrate(NORMAL, cross_fit=2, level="image", fpr=0.4)
    found += list(running)
    assert [p.is_anomalous is None for p in found] == [True] * 4 + [False] * 4  # two batches had been started


def test_a_batch_walks_through_the_modules_once(fitted: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = fitted.capture((96, 96), batch=4, recorder=Lanes())
    walks: list[int] = []
    whole = Backbone.parameters
    counted = lambda self, recurse=True: (walks.append(1), whole(self, recurse))[1]  # noqa: E731
    running = captured.predict(IMAGES[:8])
    monkeypatch.setattr(fitted.backbone, "parameters", counted.__get__(fitted.backbone))
    assert len(list(running)) == 8
    assert len(walks) == 2


def test_a_capture_that_is_dropped_waits_for_its_work(fitted: Detector) -> None:
    recorder = Lanes()
    step, recorder._step = recorder._step, lambda: False  # type: ignore[method-assign]
    captured = fitted.capture((96, 96), recorder=recorder)
    bucket = captured._buckets[96, 96]
    bucket.submit([IMAGES[0]])
    assert "wait" not in recorder.events
    recorder._step = step  # type: ignore[method-assign]
    gone = weakref.ref(bucket._recording.outputs[0])
    del captured, bucket
    assert recorder.events[-1] == "wait"
    assert not any(recorder._lanes.values())
    assert gone() is None


# What cannot be captured


def test_a_detector_must_be_fitted(lite0: Backbone) -> None:
    with pytest.raises(InputError, match="this memory_bank is not fitted"):
        Detector(lite0).capture((96, 96), recorder=Lanes())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            models.create("memory_bank", masking=True, mask_threshold=1.0),
            r"MemoryBank\(masking=True, .*\) cannot be captured: .*; choose masking=False",
        ),
        (
            models.create(
                "support_kmeans", match_descriptor="mean_patch", foreground="pca", mask_threshold=0.1
            ),
            r"SupportKMeans\(.*\) cannot be captured: .*; choose foreground='intensity', 'otsu' or 'none'",
        ),
    ],
)
def test_models_that_wait_are_refused_before_anything_runs(
    lite0: Backbone, model: models.base.Model, words: str
) -> None:
    recorder = Lanes()
    detector = Detector(lite0, model).fit(NORMAL)
    with pytest.raises(InputError, match=words):
        detector.capture((96, 96), recorder=recorder)
    assert recorder.events == []


def test_a_kernel_that_waits_is_refused_before_recording(lite0: Backbone) -> None:
    detector = Detector(lite0, models.create("memory_bank", n_neighbors=3)).fit(NORMAL)
    recorder = Lanes()
    words = r"n_neighbors=3\) cannot be captured: the host reads a value \(.* reference kernel of knn_topk\)"
    with ops.backend("reference"), pytest.raises(InputError, match=words):
        detector.capture((96, 96), recorder=recorder)
    assert recorder.events == ["aside"]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_with_graphs_of_their_own_are_refused(mode: str) -> None:
    own = backbone.load("efficientnet-lite0", size=96, device="cpu", compile=mode)
    plain = Detector(backbone.load("efficientnet-lite0", size=96, device="cpu")).fit(NORMAL)
    detector = Detector(own, plain.model)
    with pytest.raises(InputError, match=f"compile='{mode}', which records graphs of its own"):
        detector.capture((96, 96), recorder=Lanes())


def test_without_a_gpu_the_remedy_is_named(fitted: Detector) -> None:
    with pytest.raises(InputError, match=r"is on cpu; load its backbone with device='cuda'.*or call predict"):
        fitted.capture((96, 96))


# Recording, by a stand-in for torch.cuda


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        (RuntimeError("no\nsuch"), RuntimeError("ended"), r"graph \(no; then ended\); call predict"),
        (KeyError(), RuntimeError(), r"graph \(KeyError; then RuntimeError\); call predict"),
        (RuntimeError(" "), None, r"graph \(RuntimeError\); call predict"),
    ],
)
def test_a_recording_that_fails_says_why_and_leaves_its_stream(
    monkeypatch: pytest.MonkeyPatch, first: Exception, then: Exception | None, words: str
) -> None:
    streams = ["the caller's"]

    @contextmanager
    def graph(*_: Any) -> Iterator[None]:
        streams.append("compute")
        try:
            yield
        finally:
            if then is not None:
                raise then
        streams.pop()

    def fail(*_: Any) -> Any:
        raise first

    for name, stand_in in {
        "CUDAGraph": lambda: SimpleNamespace(replay=None),
        "synchronize": lambda device: None,
        "device": lambda device: nullcontext(),
        "graph": graph,
        "current_stream": lambda device: streams[-1],
        "set_stream": streams.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    recorder = object.__new__(CudaRecorder)
    recorder._device, recorder._pool, recorder._compute = torch.device("cuda"), None, None  # type: ignore[assignment]
    with pytest.raises(KernelError, match=words):
        recorder.record(fail, ())
    assert streams[-1] == "the caller's"


# On a GPU


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", [name for name in models.names() if name != "zero_shot"])
def test_a_graph_gives_what_predict_gives(name: str) -> None:
    there = backbone.load("efficientnet-lite0", size=96, device="cuda", compile=False)
    detector = Detector(there, models.create(name, **SMALL.get(name, {}))).fit(NORMAL)
    captured = detector.capture([(96, 96), (120, 96)], batch=3)
    images = [spoiled(i, (96, 96) if i % 5 else (120, 96)) for i in range(17)]
    expected = list(detector.predict(images))
    largest = max(float(p.map.abs().max()) for p in expected)
    for _ in range(3):
        close(list(captured.predict(images)), expected, 1e-4 * largest)


@pytest.mark.needs_cuda
def test_a_graph_of_a_compiled_transformer() -> None:
    there = backbone.load("random:dinov2-small", size=224, device="cuda", compile="default")
    detector = Detector(there).fit(NORMAL)
    captured = detector.capture((96, 96), batch=2)
    close(list(captured.predict(IMAGES)), list(detector.predict(IMAGES, batch_size=2)), 1e-4)


@pytest.mark.needs_cuda
def test_a_replay_outlives_the_memory_of_others(fitted: Detector) -> None:
    there = backbone.load("efficientnet-lite0", size=96, device="cuda", compile=False)
    detector = Detector(there).fit(NORMAL)
    captured = detector.capture((96, 96))
    expected = list(captured.predict(IMAGES))
    held = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(8)]
    same(list(captured.predict(IMAGES)), expected)
    del held


@pytest.mark.needs_cuda
def test_a_recorder_wants_a_gpu_of_this_machine() -> None:
    recorder = CudaRecorder(torch.device("cuda"))
    assert recorder.host((2, 3), torch.uint8).is_pinned()
