"""The fingerprint of weights from a file is kept, and used only for the same, unchanged weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from support.small_net import small_model

from xmem_core import XMem, fingerprint, load_model
from xmem_core.fingerprint import model_fingerprint
from xmem_core.weights import save_weights


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of weights; models of any size have their fingerprints kept."""
    monkeypatch.setenv("XMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_LEAST_BYTES", 0)
    save_weights(small_model(), tmp_path / "m.safetensors", torch.float32)
    return tmp_path / "m.safetensors"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The models that are hashed as a whole."""
    whole = fingerprint._of_all
    models: list[object] = []

    def noted(model: torch.nn.Module) -> str:
        models.append(model)
        return whole(model)

    monkeypatch.setattr(fingerprint, "_of_all", noted)
    return models


def kept(weights: Path) -> list[Path]:
    return sorted((weights.parent / "cache" / "fingerprints").glob("*"))


def test_a_second_start_does_not_hash_again(weights: Path, hashed: list[object]) -> None:
    first = model_fingerprint(load_model(weights))
    assert first == model_fingerprint(small_model())  # that of the tensors, wherever they come from
    assert len(hashed) == 2
    assert model_fingerprint(load_model(weights)) == first
    assert len(hashed) == 2
    assert len(kept(weights)) == 1


def test_changed_tensors_are_hashed(weights: Path, hashed: list[object]) -> None:
    first = model_fingerprint(load_model(weights))
    changed = load_model(weights)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[1] += 1
    assert model_fingerprint(changed) != first
    replaced = load_model(weights)
    assert isinstance(replaced, XMem)
    projection = replaced.key_proj.key_proj
    projection.weight = torch.nn.Parameter(projection.weight + 1)
    assert model_fingerprint(replaced) != first
    unseen = load_model(weights)
    for parameter in unseen.parameters():
        parameter.data.mul_(2)  # torch counts no change
    assert model_fingerprint(unseen) != first
    assert len(hashed) == 4


def test_another_file_at_the_same_place_is_hashed(weights: Path, hashed: list[object]) -> None:
    first = model_fingerprint(load_model(weights))
    other = small_model()
    with torch.no_grad():
        next(other.decoder.pred.parameters()).add_(1)
    save_weights(other, weights, torch.float32)
    assert model_fingerprint(load_model(weights)) != first
    assert len(hashed) == 2


def test_a_file_that_changes_while_it_is_read_is_not_noted(weights: Path) -> None:
    model = load_model(weights)
    identity = fingerprint.file_identity(weights)
    del model.__dict__[fingerprint._ATTRIBUTE]
    os.utime(weights, ns=(1, 1))
    fingerprint.note_source(model, weights, identity)
    weights.unlink()
    fingerprint.note_source(model, weights, fingerprint.file_identity(weights))
    assert fingerprint._ATTRIBUTE not in model.__dict__


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"file": 1, "sample": 2, "fingerprint": 3}'])
def test_a_damaged_entry_is_replaced(weights: Path, hashed: list[object], content: str) -> None:
    first = model_fingerprint(load_model(weights))
    kept(weights)[0].write_text(content)
    assert model_fingerprint(load_model(weights)) == first
    assert json.loads(kept(weights)[0].read_text())["fingerprint"] == first
    assert len(hashed) == 2


def test_without_a_folder_to_write_to_it_is_hashed(
    weights: Path, hashed: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (weights.parent / "file").touch()
    monkeypatch.setenv("XMEM_CACHE", str(weights.parent / "file"))
    assert model_fingerprint(load_model(weights)) == model_fingerprint(load_model(weights))
    assert len(hashed) == 2


def test_of_small_models_nothing_is_kept(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XMEM_CACHE", str(weights.parent / "cache"))
    model_fingerprint(load_model(weights))
    assert not kept(weights)
