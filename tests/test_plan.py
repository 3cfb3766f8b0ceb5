"""dinofast plan: what it tells is what runs take, and it computes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Call
from textures import weave

import dinofast
from dinofast import Detector, backbone, models, ops
from dinofast.backbone import Backbone
from dinofast.backbone.efficientnet import EfficientNetLite0
from dinofast.errors import ArtifactError, InputError
from dinofast.ops import MISSING, OPS, bank_size, providers
from dinofast.ops.bank import STRATEGIES
from dinofast.ops.bank_size import groups_pay

NORMAL = [weave(i) for i in range(4)]
MIB = 1 << 20
CASES: list[tuple[str, dict[str, Any]]] = [
    ("memory_bank", {}),
    ("memory_bank", {"masking": True, "mask_threshold": 0.0}),
    ("patchcore", {"compat": "anomalib-patchcore"}),
    ("dpmm", {"n_components": 6, "n_epochs": 1, "scoring": "mixture"}),
    ("dpmm", {"n_components": 3, "n_epochs": 1, "scoring": "mahalanobis", "covariance_type": "full"}),
    ("spatial_ar", {"n_epochs": 1, "hidden": 8, "n_layers": 2, "dilations": 1}),
    ("support_kmeans", {"match_descriptor": "mean_patch"}),
    (
        "support_kmeans",
        {"match_descriptor": "mean_foreground_patch", "foreground": "pca", "mask_threshold": 0.0},
    ),
]


@pytest.fixture
def saved(lite0: Backbone, tmp_path: Path) -> Path:
    path = tmp_path / "detector.safetensors"
    Detector(lite0).fit(NORMAL).save(path)
    return path


@pytest.mark.skipif("cpu" in MISSING, reason="the workspaces told are those of native kernels")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell peaks")
@pytest.mark.parametrize(("name", "params"), [CASES[0], CASES[2], CASES[3]])
def test_runs_take_no_more_than_a_tenth_above_what_was_told(
    tmp_path: Path, name: str, params: dict[str, Any]
) -> None:
    own = backbone.load("efficientnet-lite0", size=256, device="cpu")
    path = tmp_path / "detector.safetensors"
    Detector(own, models.create(name, **params)).fit(NORMAL[:2]).save(path)
    # large blocks come from the system and go back at once, so that the peak is what is asked for
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    environment["OMP_NUM_THREADS"] = "1"
    script = Path(__file__).parent / "measured_peak.py"
    command = [sys.executable, str(script), str(path), "256", "320", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    embedding, scoring = json.loads(done.stdout)
    told = dinofast.plan(path, (256, 320), 4, device="cpu")
    assert embedding <= told.backbone_workspace / 0.9 + MIB
    assert scoring <= told.model_workspace / 0.9 + MIB
    assert told.backbone_workspace <= 1.5 * embedding + MIB
    assert told.model_workspace <= 3 * scoring + 4 * MIB


@pytest.mark.parametrize(("name", "params"), CASES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_model_is_told(
    lite0: Backbone, tmp_path: Path, name: str, params: dict[str, Any], device: str
) -> None:
    detector = Detector(lite0, models.create(name, **params)).fit(NORMAL)
    path = tmp_path / "detector.safetensors"
    detector.save(path)
    one, four = (dinofast.plan(path, (200, 150), batch, device=device) for batch in (1, 4))
    assert (one.size, one.pixels, one.batch, one.device) == ((200, 150), (128, 96), 1, device)
    assert one.model == repr(detector.model)
    assert one.backbone_bytes == sum(x.nbytes for x in [*lite0.parameters(), *lite0.buffers()])
    assert one.model_bytes == sum(x.nbytes for x in detector.model.state().values())
    assert four.backbone_workspace > 3.5 * one.backbone_workspace
    maps = 4 * 200 * 150
    assert four.model_workspace >= max(one.model_workspace, 4 * maps)
    both = max(one.backbone_workspace, one.model_workspace)
    assert one.preparing_bytes == one.prepared_bytes  # these banks are too small to be prepared
    assert one.peak_bytes == one.backbone_bytes + one.model_bytes + one.prepared_bytes + both
    json.dumps(one.to_dict())


@pytest.mark.skipif(bool(providers.no_codes(232)), reason=str(providers.no_codes(232)))
@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("m", [5000, 30_000])
def test_a_bank_that_a_cpu_prepares_is_told_within_a_tenth(tmp_path: Path, m: int, clustered: bool) -> None:
    model = models.create("memory_bank")
    model.load_state({"bank": bank_rows(m, 232, clustered)})
    path = tmp_path / "model.safetensors"
    model.save(path)
    cpu, cuda = (dinofast.plan(path, (96, 96), backbone=name, device=device) for name, device in (
        ("efficientnet-lite0", "cpu"), ("efficientnet-lite0", "cuda"),
    ))  # fmt: skip
    assert cuda.prepared_bytes == 0
    assert cuda.preparing_bytes == 0
    assert cpu.model_bytes == cuda.model_bytes == 4 * m * 232
    found = model._searched("cosine")
    assert not isinstance(found, torch.Tensor)
    assert (found.strategy == "pruned") == clustered
    held = found.nbytes - found.rows.nbytes
    assert 0.9 * held <= cpu.prepared_bytes <= 1.1 * held
    assert cpu.peak_bytes >= cpu.backbone_bytes + cpu.model_bytes + cpu.preparing_bytes


@pytest.mark.skipif(bool(providers.no_codes(64)), reason=str(providers.no_codes(64)))
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("m", [300, 9000])
def test_banks_of_every_strategy_are_told_within_a_tenth(m: int, metric: str) -> None:
    for clustered in (True, False):
        rows = bank_rows(m, 64, clustered)
        grouped = groups_pay(rows, metric)
        for strategy in STRATEGIES:
            bank = ops.Bank(rows, metric, strategy)
            told = ops.bank_bytes(m, 64, metric, strategy, grouped=grouped)
            assert set(told) == {"cpu"}
            assert 0.9 * bank.nbytes <= told["cpu"] <= 1.1 * bank.nbytes, (strategy, bank.strategy)
            assert grouped == (m >= 4096 and clustered)
            if strategy in ("float32", "lowp"):
                assert told["cpu"] == bank.nbytes
        half = ops.bank_bytes(m, 64, metric, "lowp", torch.bfloat16)["cpu"]  # a CPU keeps float32
        assert ops.Bank(rows.bfloat16(), metric, "lowp").nbytes == half


@pytest.mark.skipif(bool(providers.no_codes(8)), reason=str(providers.no_codes(8)))
@pytest.mark.parametrize("m", [1, 33, 65, 127])
def test_banks_of_one_group_are_told_within_a_tenth(m: int) -> None:
    bank = ops.Bank(bank_rows(m, 8, False), strategy="pruned")
    assert ops.bank_bytes(m, 8, strategy="pruned")["cpu"] == pytest.approx(bank.nbytes, rel=0.1)


@pytest.mark.skipif(not providers.has_int8(), reason="no int8 instructions here")
def test_making_a_bank_takes_no_less_than_keeping_it() -> None:
    for m, d in ((5000, 384), (200_000, 512), (7_680_000, 384)):
        kept = ops.bank_bytes(m, d, grouped=False)["cpu"] - 4 * m * d
        assert bank_size.building_bytes(m, d) >= kept > 0


def test_rows_that_no_bank_takes_are_refused_before() -> None:
    if not providers.no_codes(64):
        with pytest.raises(InputError, match="the norm of row"):
            groups_pay(2 * bank_rows(6000, 64, False), "cosine")


def test_a_sample_leaves_it_open_whether_groups_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "no_codes", lambda d: "")
    monkeypatch.setattr(providers, "has_int8", lambda: True)
    for many, few, wanted in ((0.7, 9.9, True), (0.9, 0.9, False), (0.9, 1.5, True), (1.4, 1.5, False)):
        costs = {bank_size.SAMPLED: many, bank_size.SAMPLED // 4: few}
        monkeypatch.setattr(bank_size, "_cost", lambda rows, most, *_, costs=costs: costs[most])
        assert groups_pay(torch.empty(100_000, 8, device="meta"), "cosine") == wanted, (many, few)


DEVICES = """
from dinofast.ops import Bank, backend, bank_bytes
import torch
with backend("triton"):
    for m, d in ((70, 20), (200, 48)):
        for metric in ("cosine", "euclidean"):
            for dtype in (torch.float32, torch.bfloat16):
                for strategy in ("auto", "float32", "lowp"):
                    rows = torch.randn(m, d).to(dtype)
                    bank = Bank(rows, metric, strategy)
                    told = bank_bytes(m, d, metric, strategy, dtype, "cuda")
                    assert told == {"cuda": bank.nbytes}, (m, metric, dtype, strategy, told, bank.nbytes)
                codes = Bank(rows, metric, "lowp")
                if dtype == torch.float32:  # the codes of rows on the host are the same, on the device
                    told = bank_bytes(m, d, metric, "lowp", dtype, "cpu", "cuda")
                    assert told == {"cpu": rows.nbytes, "cuda": codes.nbytes - rows.nbytes}
told = bank_bytes(7_680_000, 384, strategy="lowp", device="cuda")
assert told["cuda"] <= 3.5e9 and told["cpu"] == 4 * 7_680_000 * 384
assert bank_bytes(7_680_000, 384, dtype=torch.bfloat16, rows_on="cuda")["cuda"] <= 6.5e9
half = bank_bytes(100, 384, "cosine", "lowp", torch.bfloat16, "cpu", "cuda")
assert half == {"cpu": 2 * 100 * 384, "cuda": 100 * 384 + 4 * (6 * 100 + 384)}
"""


def test_banks_on_a_device_are_told_exactly() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", "-c", DEVICES]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.bank_bytes(0, 8),
        lambda: ops.bank_bytes(8, 8, "dot"),
        lambda: ops.bank_bytes(8, 8, device="tpu"),
        lambda: ops.bank_bytes(8, 8, strategy="exact"),
        lambda: ops.bank_bytes(8, 8, dtype=torch.int32),
    ],
)
def test_banks_that_cannot_be_are_not_told(call: Any) -> None:
    with pytest.raises(InputError, match="bank_bytes: no Bank of"):
        call()


@pytest.mark.skipif(bool(providers.no_codes(232)), reason=str(providers.no_codes(232)))
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell peaks")
@pytest.mark.parametrize("clustered", [False, True])
def test_preparing_and_searching_a_bank_take_what_was_told(tmp_path: Path, clustered: bool) -> None:
    m, path = 50_000, tmp_path / "model.safetensors"
    model = models.create("memory_bank")
    model.load_state({"bank": bank_rows(m, 232, clustered)})
    model.save(path)
    told = dinofast.plan(path, (96, 96), backbone="efficientnet-lite0", device="cpu")
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    environment["OMP_NUM_THREADS"] = "1"
    script = Path(__file__).parent / "measured_peak.py"
    command = [sys.executable, str(script), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    measured = json.loads(done.stdout)
    assert 0.75 * measured <= told.preparing_bytes <= 1.25 * measured
    assert measured >= told.prepared_bytes


def test_tensors_stay_in_the_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("copied")

    monkeypatch.setattr(torch.Tensor, "clone", refuse)
    assert dinofast.artifact.read(saved, None, mapped=True)[0]["model.bank"].shape == (144, 232)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plan_runs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    path = tmp_path / "detector.safetensors"
    own = backbone.load("efficientnet-lite0", size=96, device="cpu", dtype=dtype)
    Detector(own).fit(NORMAL[:2]).save(path)
    ran: list[str] = []
    whole = EfficientNetLite0.forward

    def watched(self: EfficientNetLite0, pixels: torch.Tensor, position: torch.Tensor) -> Any:
        ran.append(pixels.device.type)
        return whole(self, pixels, position)

    monkeypatch.setattr(EfficientNetLite0, "forward", watched)
    told = dinofast.plan(path, (np.int64(96), 96))
    assert told.size == (96, 96)
    assert set(ran) == {"meta"}
    assert told.backbone == f"efficientnet-lite0, {str(dtype).removeprefix('torch.')}"
    assert told.backbone_bytes == sum(x.nbytes for x in [*own.parameters(), *own.buffers()])


def test_bad_questions(saved: Path, tmp_path: Path, lite0: Backbone) -> None:
    for words, call in (
        ("unknown device 'tpu'; one of cpu, cuda", lambda: dinofast.plan(saved, (96, 96), device="tpu")),
        ("batch must be a whole number, at least 1, got 0", lambda: dinofast.plan(saved, (96, 96), 0)),
        ("8x96 pixels: smaller than one patch", lambda: dinofast.plan(saved, (8, 96))),
        ("two whole numbers, got 448", lambda: dinofast.plan(saved, 448)),
        ("two whole numbers, got None", lambda: dinofast.plan(saved, None)),
        (r"two whole numbers, got \(96,\)", lambda: dinofast.plan(saved, (96,))),
        ("two whole numbers, got '448'", lambda: dinofast.plan(saved, "448")),
        (r"two whole numbers, got \(96.7, 96\)", lambda: dinofast.plan(saved, (96.7, 96))),
        ("no such file", lambda: dinofast.plan(tmp_path / "absent", (96, 96))),
    ):
        with pytest.raises(InputError, match=words):
            call()
    model = tmp_path / "model.safetensors"
    Detector(lite0).fit(NORMAL).model.save(model)
    with pytest.raises(InputError, match="holds a model without its backbone; name that of the fit"):
        dinofast.plan(model, (96, 96))
    with pytest.raises(InputError, match="fitted on D = 232, and random:dinov2-small:0 gives D = 384"):
        dinofast.plan(model, (96, 96), backbone="random:dinov2-small")
    other = backbone.load("efficientnet-lite0", size=64, device="cpu")
    with pytest.raises(ArtifactError, match="was fitted with efficientnet-lite0"):
        dinofast.plan(saved, (96, 96), backbone=other)


def bank_rows(m: int, d: int, clustered: bool) -> torch.Tensor:
    """Unit rows by a seed: far from each other, or 50 clusters."""
    draw = torch.Generator().manual_seed(0)
    made = torch.randn(m, d, generator=draw)
    if clustered:
        made = torch.randn(50, d, generator=draw)[torch.arange(m) % 50].add_(made, alpha=0.05)
    return torch.nn.functional.normalize(made, dim=1)


def rows(n: int) -> torch.Tensor:
    return torch.empty(n, 384, device="meta")


@pytest.mark.parametrize("multiprocessors", [1, 78, 132, 148])
@pytest.mark.parametrize(("n", "m"), [(1, 100_000), (1024, 100_000), (9000, 100_000), (80_000, 400_000)])
def test_searches_on_a_gpu_take_what_is_told_without_values(
    n: int, m: int, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = pytest.importorskip("dinofast.kernels.knn_topk")
    tiles = pytest.importorskip("dinofast.kernels.cosine_max")
    schedule = pytest.importorskip("dinofast.kernels.schedule")
    monkeypatch.setattr(schedule, "INTERPRETED", multiprocessors)
    parts = schedule.schedule(torch.device("cpu"), tiles.LAUNCHES[torch.float32], n, m).parts
    told = OPS["cosine_max"].workspace("cuda", rows(n), rows(m))
    assert 0 <= told - 8 * n * parts - 8 * n < 8 * m + MIB
    for dtype in (torch.float32, torch.bfloat16):
        for k, slots in ((1, 1), (3, 4), (64, 64)):
            parts = schedule.schedule(torch.device("cpu"), searches.LAUNCHES[dtype, k > 1], n, m).parts
            told = OPS["knn_topk"].workspace("cuda", rows(n).to(dtype), rows(m), k, "cosine")
            assert 0 <= told - 8 * n * parts * slots - 8 * n <= 16 * k * max(n, 1 << 16)


def test_searches_on_a_cpu_take_a_block_of_columns() -> None:
    few, many, more = (OPS["cosine_max"].workspace("cpu", rows(1024), rows(m)) for m in (150, 4150, 10**6))
    assert 1 <= (many - few) / (4000 * 384 * (4 + 4 + 1)) < 1.2  # packed, at unit length, as codes
    assert many < more < 32 * MIB
    assert OPS["cosine_max"].workspace("cpu", rows(1024), rows(10**7)) == more
    assert OPS["knn_topk"].workspace("cpu", rows(1024), rows(10**6), 3, "cosine") == more + 8 * 1024 * 384


def test_maps_take_rows_that_are_still_to_be_combined() -> None:
    for b, h, width in ((5, 32, 448), (1, 28, 640)):
        asked = torch.empty(b, h, h, device="meta"), [448, width], 4.0, "bilinear", "reflect"
        assert OPS["upsample_blur"].workspace("cuda", *asked) == b * h * width * 4
        assert OPS["upsample_blur"].workspace("cpu", *asked) == 2 * h * width * 4


def test_the_command(saved: Path, call: Call) -> None:
    arguments = ["plan", str(saved), "--size", "96", "128", "--batch", "2", "--device", "cuda"]
    command = [sys.executable, "-m", "dinofast.cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == dinofast.plan(saved, (96, 128), 2, device="cuda").to_dict()
    said = call(*arguments)
    assert said.code == 0
    assert "MemoryBank() on efficientnet-lite0, float32, cuda" in said.out
    assert "2 images of 96x128" in said.out
    assert "peak bytes" in said.out
