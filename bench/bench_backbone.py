"""The backbone at batch 1, eager and compiled, beside ONNX Runtime and OpenVINO on the exported graph."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.measure import OURS, PEER_TOLERANCE, Call, Group, Measure
from bench.peers import has_compiler
from dinofast import backbone

SIZES = {"random:dinov2-small": 448, "efficientnet-lite0": 256}
"""Backbone -> pixels of a side."""


def _onnxruntime(module: nn.Module, pixels: Tensor) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone.onnx"
        torch.onnx.export(module, (pixels,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    [given, outputs] = {session.get_inputs()[0].name: pixels.numpy()}, [session.get_outputs()[0].name]
    return lambda: session.run(outputs, given)[0]


def _openvino(module: nn.Module, pixels: Tensor) -> Call:
    import openvino

    model = openvino.convert_model(torch.export.export(module, (pixels,)))
    threads, precise = torch.get_num_threads(), "f32"  # its own choice may be bfloat16
    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precise}
    request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()
    given = pixels.numpy()
    return lambda: request.infer([given], share_inputs=True, share_outputs=True)[0]


PEERS: dict[str, tuple[tuple[str, ...], Callable[[nn.Module, Tensor], Call]]] = {
    "onnxruntime": (("onnxruntime", "onnx", "onnxscript"), _onnxruntime),
    "openvino": (("openvino",), _openvino),
}
"""Name -> packages without which it is left out, what makes its call."""

CONTENDERS = [
    OURS,
    *([f"{OURS}-compiled"] if has_compiler() else []),
    *(name for name, (needs, _) in PEERS.items() if all(map(importlib.util.find_spec, needs))),
]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("name", SIZES)
def bench_backbone(measure: Measure, name: str, contender: str) -> None:
    group = f"Backbone {name.removeprefix('random:')}_{SIZES[name]}"
    measure(group, contender, lambda: _prepare(name))


@torch.no_grad()
def _prepare(name: str) -> Group:
    side = SIZES[name]
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    eager = backbone.load(name, device="cpu", compile=False)
    module = eager.export_module(side, side).eval()
    truth = copy.deepcopy(module).double()(pixels.double())[0]
    calls: dict[str, Call] = {OURS: lambda: eager(pixels).tensor}
    if f"{OURS}-compiled" in CONTENDERS:
        compiled = backbone.load(name, device="cpu", compile=True)
        calls[f"{OURS}-compiled"] = lambda: compiled(pixels).tensor
    for peer in CONTENDERS[len(calls) :]:
        calls[peer] = PEERS[peer][1](module, pixels)
    facts = {}
    for contender, call in calls.items():
        found = torch.as_tensor(call()).double()
        assert found.shape == truth.shape, f"{contender}: shape {tuple(found.shape)}"
        error = (found - truth).abs()
        worst = (error / (1 + truth.abs())).max().item()
        assert worst <= PEER_TOLERANCE, f"{contender} errs by {worst:.3g}, relative"
        facts[contender] = {
            "backend": "torch" if contender.startswith(OURS) else contender,
            "device": "cpu",
            "dtype": "float32",
            "sizes": [list(pixels.shape)],
            "largest_error": error.max().item(),
        }
    return Group(calls, facts)
