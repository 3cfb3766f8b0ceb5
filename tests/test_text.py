"""Prompt sentences, a tiny CLIP text tower with a tokenizer made on the spot, and the file of its vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dinofast import artifact
from dinofast.backbone import hub, text
from dinofast.errors import ArtifactError, BackboneError, InputError
from dinofast.text_vectors import TextVectors

SHA = "ab" * 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP text tower of random weights whose tokenizer knows letters alone."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    found = tmp_path_factory.mktemp("tower")
    signs = [chr(c) for c in range(33, 127)]
    words = [*signs, *(f"{sign}</w>" for sign in signs), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        projection_dim=12,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        initializer_factor=5.0,
    )
    CLIPTextModelWithProjection(config).save_pretrained(found)
    tokenizer.save_pretrained(found)
    return found


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def test_the_ensemble_is_the_published_one() -> None:
    normal, abnormal = text.sentences("capsule")
    assert len(set(normal)) == 7 * 35
    assert len(set(abnormal)) == 5 * 35
    assert {"a bad photo of the flawless capsule.", "a photo of my capsule without damage."} <= set(normal)
    assert {"there is a damaged capsule in the scene.", "this is one capsule with flaw in the scene."} <= set(
        abnormal
    )
    assert {
        "a black and white photo of a broken capsule.",
        "a photo of the cool capsule with defect.",
    } <= set(abnormal)
    assert not any("normal" in sentence for sentence in normal)


def test_vectors_are_the_unit_mean_of_unit_vectors(folder: Path) -> None:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    found = text.load(folder).vectors(["capsule", "lung"])
    model = CLIPTextModelWithProjection.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for name in ("capsule", "lung"):
        for row, sentences in enumerate(text.sentences(name)):
            tokens = tokenizer(sentences)["input_ids"]
            total = np.zeros(12)
            for length in {len(ids) for ids in tokens}:  # together where no padding is needed
                with torch.no_grad():
                    alike = torch.tensor([ids for ids in tokens if len(ids) == length])
                    vectors = model(input_ids=alike).text_embeds.double().numpy()
                total += (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).sum(0)
            np.testing.assert_allclose(found.vectors[name][row], total / np.linalg.norm(total), atol=1e-5)
    assert found.dim == 12
    assert not torch.allclose(found.vectors["lung"], found.vectors["capsule"], atol=1e-3)
    assert not torch.allclose(found.vectors["lung"][0], found.vectors["lung"][1], atol=1e-3)


def test_a_class_is_embedded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower, calls = text.load(folder), []
    embed = tower.embed
    monkeypatch.setattr(tower, "embed", lambda texts: calls.append(len(texts)) or embed(texts))
    first, second = tower.vectors(["brain"]), tower.vectors(["liver", "brain", "liver"])
    assert calls == [245, 175, 245, 175]
    assert second.names == ["liver", "brain"]
    assert torch.equal(first.vectors["brain"], second.vectors["brain"])


def test_fingerprint_tells_towers(folder: Path, broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    save_file({n: t + 1e-3 for n, t in tensors.items()}, broken / "model.safetensors", {"format": "pt"})
    assert text.load(folder).fingerprint == text.load(folder).fingerprint != text.load(broken).fingerprint


def test_a_whole_clip_gives_its_text_tower(folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPVisionConfig

    inner = CLIPTextModelWithProjection.from_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = CLIPConfig(text_config=inner.config.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    whole = CLIPModel(config)
    whole.text_model.load_state_dict(inner.text_model.state_dict())
    whole.text_projection.load_state_dict(inner.text_projection.state_dict())
    whole.save_pretrained(tmp_path)
    for file in folder.glob("*token*"):
        shutil.copy(file, tmp_path)
    found, expected = text.load(tmp_path), text.load(folder)
    assert torch.equal(
        found.vectors(["brain"]).vectors["brain"], expected.vectors(["brain"]).vectors["brain"]
    )
    assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("name", ["", "  ", "...", " brain", "brain\n", None, 3])
def test_a_name_that_gives_no_sentence_is_refused(folder: Path, name: object) -> None:
    with pytest.raises(InputError, match=r"class name .*give a noun"):
        text.load(folder).vectors([name])  # type: ignore[list-item]


def test_other_names_that_cannot_be_used(folder: Path) -> None:
    tower = text.load(folder)
    with pytest.raises(InputError, match=r"pass \['brain'\]"):
        tower.vectors("brain")
    with pytest.raises(InputError, match="no class at all"):
        tower.vectors([])
    with pytest.raises(
        InputError, match=r"x{70}.*tokens, and .*tower.* reads 64; choose a shorter class name"
    ):
        tower.vectors(["x" * 70])


def damage_config(path: Path) -> None:
    (path / "config.json").write_text("{", encoding="utf-8")


def another_model(path: Path) -> None:
    (path / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")


def no_tokenizer(path: Path) -> None:
    for file in path.glob("*token*"):
        file.unlink()


def torn_tokenizer(path: Path) -> None:
    file = path / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8")[:200], encoding="utf-8")


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def torn_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def missing_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config, "no readable config.json"),
        (another_model, "model_type is 'bert'; dinofast loads clip"),
        (no_tokenizer, "holds no tokenizer; put vocab.json"),
        (torn_tokenizer, "its tokenizer cannot be read"),
        (no_weights, "weights are missing, torn or of another model"),
        (torn_weights, "weights are missing, torn or of another model"),
        (missing_tensor, "1 tensors are missing.*text_projection"),
    ],
)
def test_a_broken_tower_is_refused_by_name(broken: Path, damage, message: str) -> None:
    damage(broken)
    with pytest.raises(BackboneError, match=f"broken: {message}"):
        text.load(broken)


def test_a_tower_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackboneError, match="absent: no such folder; give a folder of a CLIP model"):
        text.load(tmp_path / "absent")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.5)
    with pytest.raises(BackboneError, match=r"(?s)openai/none: cannot be fetched.*local path"):
        text.load("openai/none")


def test_weights_of_other_forms_are_fetched_only_without_safetensors(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.hf_api import RepoSibling

    asked = []

    def fetch(repo, *, allow_patterns, **_):
        asked.append(allow_patterns)
        return folder

    class Info:
        siblings = (RepoSibling("config.json"), RepoSibling("pytorch_model.bin"))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: Info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert text.load("some/tower").source == "some/tower"
    Info.siblings += (RepoSibling("model.safetensors"),)
    text.load("some/tower")
    assert ["pytorch_model.bin" in patterns for patterns in asked] == [True, False]
    assert all({"vocab.json", "merges.txt", "model.safetensors"} <= set(patterns) for patterns in asked)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def test_vectors_are_shipped_without_the_tower(tmp_path: Path) -> None:
    vectors = TextVectors({"lung": unit(2, 5), "äther/7": unit(2, 5, seed=1)}, SHA, "mine")
    vectors.save(tmp_path / "a")
    loaded = TextVectors.load(tmp_path / "a")
    assert loaded.names == ["lung", "äther/7"]
    assert (loaded.tower, loaded.source) == (SHA, "mine")
    assert all(torch.equal(loaded.vectors[name], pair) for name, pair in vectors.vectors.items())
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("vectors", "tower", "message"),
    [
        ({}, SHA, "no class at all"),
        ({"": unit(2, 5)}, SHA, "give a noun"),
        ({"a": unit(3, 5)}, SHA, r"'a' must be float32 \(2, D\), got torch.float32 \(3, 5\)"),
        ({"a": unit(2, 5).double()}, SHA, "must be float32"),
        ({"a": unit(2, 5) * 2}, SHA, "not of unit length"),
        ({"a": unit(2, 5) * torch.nan}, SHA, "not of unit length"),
        ({"a": unit(2, 5), "b": unit(2, 6)}, SHA, r"several D, \[5, 6\]"),
        ({"a": unit(2, 5)}, "mine", "not a sha256"),
    ],
)
def test_vectors_that_do_not_fit_together(vectors, tower: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        TextVectors(vectors, tower, "")
    artifact.write(tmp_path / "odd", "text", vectors, {"tower": tower, "source": ""})
    with pytest.raises(ArtifactError, match=f"odd: does not hold together .*{message}"):
        TextVectors.load(tmp_path / "odd")


def test_a_file_without_its_tower_and_another_kind_of_file(tmp_path: Path) -> None:
    artifact.write(tmp_path / "odd", "text", {"a": unit(2, 5)}, {})
    with pytest.raises(ArtifactError, match=r"odd: does not hold together .'tower'"):
        TextVectors.load(tmp_path / "odd")
    artifact.write(tmp_path / "model", "model", {"a": unit(2, 5)}, {})
    with pytest.raises(ArtifactError, match="holds a model, not a text"):
        TextVectors.load(tmp_path / "model")
