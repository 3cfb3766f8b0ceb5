from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from command_line import LITE, Call, whole
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from textures import save, scan, spoiled, weave

import dinofast
from dinofast import Detector, cli, data
from dinofast.backbone import Backbone
from dinofast.ops import MISSING

COMMANDS = ("demo", "fit", "predict", "evaluate", "info")
native = pytest.mark.skipif("cpu" in MISSING, reason="built without native kernels")


# Round trips


def test_fit_predict_evaluate_a_tree_with_masks(call: Call, tree: Path, tmp_path: Path) -> None:
    saved, out = tmp_path / "d.safetensors", tmp_path / "out"
    fit = call("fit", tree / "train", *LITE, "--out", saved, "--calibrate", tree / "test" / "good", "--json")
    assert (fit.code, fit.err) == (0, "")
    said = json.loads(fit.out)
    assert (said["detector"], said["images"], said["model"]) == (str(saved), 4, "MemoryBank()")
    assert said["backbone"].startswith("efficientnet-lite0: ")
    assert said["thresholds"]["pixel"]["realized_rate"] <= 0.05
    loaded = Detector.load(saved)
    assert said["thresholds"] == {"pixel": loaded.thresholds["pixel"].to_dict()}

    predict = call("predict", saved, tree / "test", "--out", out, "--json")
    assert (predict.code, predict.err) == (0, "")
    rows = json.loads(predict.out)["images"]
    assert json.loads((out / "scores.json").read_text()) == rows
    assert set(json.loads(predict.out)["seconds"]) == {"read", "preprocess", "backbone", "model"}
    samples = data.folder(tree, "test")
    predictions = list(loaded.predict(samples))
    assert [row["source"] for row in rows] == [p.source for p in predictions]
    for row, prediction in zip(rows, predictions, strict=True):
        assert row["score"] == pytest.approx(prediction.score, abs=1e-5)
        written = np.asarray(Image.open(out / row["map"]))
        np.testing.assert_allclose(written, prediction.map, rtol=0, atol=1e-5)
    assert {p.relative_to(out).as_posix() for p in whole(out)} == {
        "scores.json",
        *(row[kind] for row in rows for kind in ("map", "overlay")),
    }
    assert rows[0]["map"] == "good__000_map.tif"

    evaluate = call("evaluate", saved, tree, "--json")
    assert (evaluate.code, evaluate.err) == (0, "")
    found = json.loads(evaluate.out)
    truth = np.concatenate([s.mask().ravel() for s in samples])  # type: ignore[union-attr]
    pixels = np.concatenate([p.map.numpy().ravel() for p in predictions])
    assert found["n_images"] == 6
    assert found["labels"] == [0, 0, 0, 1, 1, 1]
    assert found["image"]["auroc"] == roc_auc_score(found["labels"], found["scores"]) == 1
    assert found["pixel"]["auroc"] == pytest.approx(roc_auc_score(truth, pixels), abs=1e-4)
    assert found["pixel"]["average_precision"] == pytest.approx(
        average_precision_score(truth, pixels), abs=1e-4
    )
    assert found["pixel"]["n_anomalous"] == truth.sum()
    assert found["pixel"]["auroc"] > 0.95


def test_fit_predict_evaluate_for_people(call: Call, tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "tree" / "good" / f"{i}.png", weave(i))
        save(tmp_path / "tree" / "bad" / f"{i}.png", spoiled(i))
    saved = tmp_path / "d.safetensors"
    fit = call("fit", tmp_path / "tree" / "good", *LITE, "--out", saved, "--cross-fit", 3)
    assert fit.code == 0
    assert re.search(
        r"MemoryBank\(\) learned 3 images\npixel threshold .* on 3 normal images, cross-fit 3\n", fit.out
    )
    assert fit.out.splitlines()[-1] == f"detector {saved}"
    assert "calibrate: 6 of 6 in " in fit.err
    assert fit.err.count("calibrate: 6 to do") == 1

    predict = call("predict", saved, f"{tmp_path}/tree/*/*.png", "--out", tmp_path / "out")
    assert predict.code == 0
    assert predict.out.splitlines()[-1] == f"maps {tmp_path / 'out'}"
    assert len(re.findall(rf"│ {tmp_path}/tree/(?:good|bad)/\d\.png +│ 0\.\d{{4}} │", predict.out)) == 6
    assert "no overlays" not in predict.out

    evaluate = call("evaluate", saved, tmp_path / "tree")
    assert evaluate.code == 0
    assert re.search(r"│ image │ 1\.0000 │ 1\.0000 │ 1\.0000 +│ 3/3", evaluate.out)
    assert "│ pixel" not in evaluate.out
    assert evaluate.out.rstrip().endswith(" ms per image")


def test_a_detector_without_threshold_says_why_there_are_no_overlays(
    call: Call, detector: Path, tmp_path: Path
) -> None:
    found = call("predict", detector, save(tmp_path / "a.png", weave(9)), "--out", tmp_path / "out")
    assert found.code == 0
    assert (
        "no overlays: the detector has no pixel threshold (dinofast fit --calibrate or --cross-fit)"
        in found.out
    )


def test_volumes_are_read_as_in_the_fit(call: Call, lite0: Backbone, tmp_path: Path) -> None:
    first, second = scan(tmp_path / "a.nii.gz"), scan(tmp_path / "b.nii.gz", seed=30)
    saved, out = tmp_path / "d.safetensors", tmp_path / "out"
    fit = call("fit", first, *LITE, "--out", saved, "--window", 40, 200, "--axis", "axial", "--json")
    assert (fit.code, json.loads(fit.out)["images"]) == (0, 4)
    predict = call("predict", saved, second, "--out", out, "--json")
    assert predict.code == 0
    rows = json.loads(predict.out)["images"]
    assert [row["source"] for row in rows] == [f"{second}[z={i}]" for i in range(4)]
    before, after = nibabel.load(second), nibabel.load(out / "b_map.nii.gz")
    np.testing.assert_array_equal(after.affine, before.affine)
    assert after.shape == before.shape == (96, 96, 4)
    assert after.get_data_dtype() == np.float32
    opened = data.volume(second, window=(40, 200))
    opened.write(
        [p.map for p in Detector.load(saved, backbone=lite0).predict(opened)], tmp_path / "truth.nii"
    )
    truth = nibabel.load(tmp_path / "truth.nii").get_fdata()
    np.testing.assert_allclose(after.get_fdata(), truth, rtol=0, atol=1e-5)

    assert call("predict", saved, second, "--out", out, "--window", 0, 255, "--json").code == 0
    assert np.abs(nibabel.load(out / "b_map.nii.gz").get_fdata() - truth).max() > 1e-3


def test_parameters_reach_the_model(call: Call, tree: Path, tmp_path: Path) -> None:
    saved = tmp_path / "d.safetensors"
    options = (
        "--param",
        "n_neighbors=2",
        "--param",
        "metric=euclidean",
        "--param",
        "sigma=0",
        "--layers",
        "4,7",
    )
    few = ("--shots", 2, "--seed", 1, "--rotate", "--batch-size", 3)
    found = call("fit", tree / "train", *LITE, "--out", saved, *options, *few, "--json")
    assert found.code == 0
    assert json.loads(found.out)["images"] == 2
    loaded = Detector.load(saved)
    assert loaded.model.params()["n_neighbors"] == 2
    assert loaded.model.params()["metric"] == "euclidean"
    assert loaded.model.params()["sigma"] == 0
    assert loaded.backbone.layers == (4, 7)
    assert loaded.seed == 1
    assert loaded.model.state()["bank"].shape == (2 * 8 * 36, 120)


def test_bad_files_are_left_out_when_asked(call: Call, tree: Path, detector: Path, tmp_path: Path) -> None:
    (tree / "train" / "good" / "text.png").write_text("no picture")
    save(tree / "test" / "good" / "tiny.png", weave(0, (7, 7)))
    saved, out = tmp_path / "d.safetensors", tmp_path / "out"
    refused = call("fit", tree / "train", *LITE, "--out", saved)
    assert refused.code == 1
    assert "text.png: not an image" in refused.err
    assert "--skip-bad" in refused.err
    assert not saved.exists()
    found = call("fit", tree / "train", *LITE, "--out", saved, "--skip-bad", "--json")
    assert (found.code, json.loads(found.out)["images"]) == (0, 4)
    for args in (("predict", detector, tree / "test", "--out", out), ("evaluate", detector, tree)):
        assert "tiny.png: 7x7 pixels" in call(*args, "--json").err
        assert call(*args, "--json", "--skip-bad").code == 0


def test_a_calibration_that_fails_does_not_lose_the_fit(call: Call, tree: Path, tmp_path: Path) -> None:
    saved = tmp_path / "d.safetensors"
    args = ("fit", tree / "train", *LITE, "--out", saved, "--calibrate")
    assert "absent: no such file" in call(*args, tmp_path / "absent").err
    assert not saved.exists()
    found = call(*args, tree / "train")
    assert found.code == 1
    assert found.err.count("dinofast: calibrating on images that fit has seen") == 1
    assert f"{saved} was saved without a threshold" in found.err
    assert Detector.load(saved).thresholds == {}


# Exit codes and messages


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("predict", "absent.safetensors", "x.png", "--out", "out"), "absent.safetensors: no such file"),
        (("fit", "absent", "--out", "d", *LITE), "absent: no such file or folder; give a path"),
        (("fit", ".", "--out", "d", *LITE), "holds no images; looked for"),
        (("fit", "a.png", "--out", "d", *LITE, "--model", "foo"), "unknown model 'foo'; one of dpmm, "),
        (("fit", "a.png", "--out", "d", *LITE, "--param", "k=3"), "memory_bank has no parameter k; its"),
        (("fit", "a.png", "--out", "d", *LITE, "--param", "n_neighbors=0"), "n_neighbors must be a whole"),
        (("fit", "a.png", "--out", "d", "--backbone", "foo"), "'foo': no such backbone"),
        (("fit", "a.png", "--out", "d", *LITE, "--layers", "99"), "efficientnet-lite0 taps blocks 3 to 10"),
        (("fit", "absent", "--out", "a.png/d", *LITE), "a.png/d: cannot be written"),
        (("fit", "absent", "--out", ".", *LITE), ".: cannot be written (Is a directory)"),
        (("fit", "a.png", "--out", "d", *LITE, "--shots", "3"), "shots: k = 3"),
        (("evaluate", "good.safetensors", "absent"), "absent: no such folder"),
        (("demo", "--data", "liver"), "unknown demo set liver; one of brain, lung-ct"),
        (("demo", "--data", "brain", "--output", "a.png"), "cannot be written"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_message_and_exit_code_1(
    call: Call,
    detector: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if args[1] != ".":
        save(tmp_path / "a.png", weave(0))
    detector.rename(tmp_path / "good.safetensors")
    found = call(*args)
    assert found.code == 1
    assert found.out == ""
    (line,) = [line for line in found.err.splitlines() if line.startswith("dinofast: ")]
    assert message in line
    assert "Traceback" not in found.err


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("frob",),
        ("fit",),
        ("fit", "a.png"),
        ("predict", "d", "a.png"),
        ("info", "--frob"),
        ("fit", "a.png", "--out", "d", "--param", "n_neighbors"),
        ("fit", "a.png", "--out", "d", "--param", "=3"),
        ("fit", "a.png", "--out", "d", *LITE, "--param", "sigma=big"),
        ("fit", "a.png", "--out", "d", "--layers", "4,x"),
        ("fit", "a.png", "--out", "d", "--fpr", "2"),
        ("fit", "a.png", "--out", "d", "--level", "voxel"),
        ("fit", "a.png", "--out", "d", "--batch-size", "0"),
        ("fit", "a.png", "--out", "d", "--window", "1"),
        ("fit", "a.png", "--out", "d", "--calibrate", "b.png", "--cross-fit", "3"),
    ],
)
def test_a_usage_error_is_exit_code_2(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.png", weave(0))
    found = call(*args)
    assert found.code == 2
    assert ("Usage: " if len(args) < 3 else "Error") in found.out + found.err
    assert "Traceback" not in found.err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--param", "n_neighbors=9"),
        ("--out", "x.json"),
        ("--seed", "0"),
        ("--masks", "any"),
        ("--no-regions",),
        ("--regions",),
        ("--set", "brain", "--shots", "3"),
    ],
)
def test_evaluate_refuses_options_of_protocols_without_one(
    call: Call, detector: Path, tree: Path, options: tuple[str, ...], tmp_path: Path
) -> None:
    refused = call("evaluate", detector, tree, *options)
    assert refused.code == 2
    named = [option for option in options if option.startswith("--")]
    assert set(re.findall(r"--[a-z-]+(?=[,:])", refused.err)) == set(named)
    assert "only with --protocol" in refused.err
    assert not (tmp_path / "x.json").exists()


def test_evaluate_needs_both_kinds(call: Call, detector: Path, tmp_path: Path) -> None:
    save(tmp_path / "tree" / "good" / "0.png", weave(0))
    found = call("evaluate", detector, tmp_path / "tree")
    assert found.code == 1
    assert "1 images of one kind only; AUROC needs normal and anomalous ones" in found.err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_can_be_followed(call: Call, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    found = call(*filter(None, [command]), "--help")
    assert (found.code, found.err) == (0, "")
    words = {
        "": COMMANDS,
        "demo": ("--data", "--output", "--backbone", "--json", "lung-ct", "demo-output"),
        "fit": (
            "IMAGES",
            "--out",
            "--param",
            "--calibrate",
            "--cross-fit",
            "--fpr",
            "--skip-bad",
            "n_neighbors=3",
        ),
        "predict": ("DETECTOR", "IMAGES", "--out", "--batch-size", "--window", "--axis", "scores.json"),
        "evaluate": (
            "DETECTOR",
            "ROOT",
            "--split",
            "ground_truth",
            "--protocol",
            "DATASET",
            "MODEL",
            "--json",
        ),
        "info": ("--json", "instruction set"),
    }[command]
    for word in words:
        assert word.lower() in found.out.lower(), word


def test_info(call: Call) -> None:
    found = json.loads(call("info", "--json").out)
    assert found["dinofast"] == dinofast.__version__
    assert set(found["backends"]) == {"reference", "cpu", "cuda", "triton"}
    assert found["backends"]["reference"] == "found"
    assert all(reason for reason in found["backends"].values())
    assert "reference" in found["operators"]["cosine_max"]
    assert found["threads"] >= 1
    assert found["packages"]["typer"][0].isdigit()
    text = call("info").out
    assert "cosine_max" in text
    assert found["instruction_set"] in text


@pytest.mark.parametrize(
    ("variable", "value", "field", "message"),
    [
        ("DINOFAST_BACKEND", "gpu", "forced_backend", "DINOFAST_BACKEND=gpu: no such backend; one of cpu"),
        ("DINOFAST_BACKEND", "cuda", "forced_backend", "cuda"),
        pytest.param("DINOFAST_ISA", "sse9", "instruction_set", "DINOFAST_ISA=sse9: unknown", marks=native),
    ],
)
def test_settings_that_cannot_be_used(
    call: Call,
    detector: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    field: str,
    message: str,
) -> None:
    assert json.loads(call("info", "--json").out)["forced_backend"] == "none"
    monkeypatch.setenv(variable, value)
    found = call("info", "--json")
    assert found.code == 0
    assert json.loads(found.out)[field].startswith(message)
    assert message in call("info").out
    image = save(tmp_path / "a.png", weave(0))
    found = call("predict", detector, image, "--out", tmp_path / "out")
    assert (found.code, found.out) == (1, "")
    (line,) = [line for line in found.err.splitlines() if line.startswith("dinofast: ")]
    assert message in line
    assert "Traceback" not in found.err


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_packages_the_command_line_names_the_extra(
    call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == missing or n == "dinofast.commands"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        SystemExit, match=rf"dinofast: the command line needs {missing}: pip install 'dinofast\[cli\]'"
    ):
        cli.main()
