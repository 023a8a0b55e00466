"""Weights: names, shapes, files, and no unpickling."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from golden.weights import fill
from support.small_net import SMALL, SMALL_CUTIE, small_cutie, small_model

from xmem_core import Cutie, CutieConfig, ModelConfig, WeightsError, XMem, load_model
from xmem_core.cache_folder import cache_folder
from xmem_core.weights import infer_config, load_weights, save_weights

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parents[1] / "golden"


def published_shapes(hidden_dim: int = 64) -> dict[str, list[int]]:
    with torch.device("meta"):
        model = XMem(ModelConfig(hidden_dim=hidden_dim))
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


# --- names and shapes ----------------------------------------------------------------------------------


def test_the_state_dict_has_the_published_names_and_shapes_in_order() -> None:
    published = json.loads((GOLDEN / "state_dict.json").read_text())
    assert list(published_shapes().items()) == list(published.items())


@pytest.mark.parametrize(
    ("file", "config"),
    [("state_dict.json", CutieConfig()), ("state_dict_small.json", CutieConfig.small())],
)
def test_cuties_state_dict_has_the_published_names_shapes_and_types_in_order(
    file: str, config: CutieConfig
) -> None:
    with torch.device("meta"):
        own = Cutie(config).state_dict()
    published = json.loads((GOLDEN / "cutie" / file).read_text())
    assert [(n, {"shape": list(t.shape), "dtype": str(t.dtype)[6:]}) for n, t in own.items()] == list(
        published.items()
    )
    assert infer_config(own) == config


def test_without_sensory_memory_only_its_updates_are_missing() -> None:
    full, plain = published_shapes(), published_shapes(0)
    gone = set(full) - set(plain)
    assert gone
    assert all(n.startswith(("decoder.hidden_update.", "value_encoder.hidden_reinforce.")) for n in gone)
    assert not set(plain) - set(full)


@pytest.mark.parametrize(
    "config",
    [ModelConfig(), ModelConfig(hidden_dim=0), ModelConfig(key_dim=32, value_dim=256, hidden_dim=16)],
)
def test_the_config_of_a_published_checkpoint_is_read_from_its_shapes(config: ModelConfig) -> None:
    with torch.device("meta"):
        state = XMem(config).state_dict()
    assert infer_config(state) == config


# --- files ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A `.pth` as published by the authors, but narrow: a state dict without its configuration."""
    with torch.device("meta"):
        shapes = XMem(ModelConfig(key_dim=8, value_dim=16, hidden_dim=0)).state_dict()
    state = fill(shapes)
    path = tmp_path_factory.mktemp("cache") / "XMem-no-sensory.pth"
    torch.save(state, path)
    return path, state


def test_a_published_file_is_found_in_the_cache_and_loaded(
    published: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, state = published
    monkeypatch.setenv("XMEM_CACHE", str(path.parent))
    model = load_model("xmem-no-sensory")
    assert not model.training
    assert (model.config.key_dim, model.config.value_dim, model.config.hidden_dim) == (8, 16, 0)
    loaded = model.state_dict()
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("name", "file", "published_file", "config"),
    [
        ("cutie-base", "state_dict.json", "cutie-base-mega.pth", CutieConfig()),
        ("cutie-small", "state_dict_small.json", "cutie-small-mega.pth", CutieConfig.small()),
    ],
)
def test_a_file_of_cuties_published_names_and_shapes_is_loaded_strictly(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    file: str,
    published_file: str,
    config: CutieConfig,
) -> None:
    facts = json.loads((GOLDEN / "cutie" / file).read_text())
    state = {n: torch.full(f["shape"], 0.5).to(getattr(torch, f["dtype"])) for n, f in facts.items()}
    torch.save(state, tmp_path / published_file)
    monkeypatch.setenv("XMEM_CACHE", str(tmp_path))
    model = load_model(name)
    assert isinstance(model, Cutie)
    assert model.config == config
    assert not model.training
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    del state["pixel_fuser.sensory_compress.bias"]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(
        WeightsError, match=r"other\.pth does not .*pixel_fuser.sensory_compress.bias is missing$"
    ):
        load_model(tmp_path / "other.pth")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XMEM_CACHE", "/a")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("XMEM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/b/xmem")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_folder() == Path("/c/.cache/xmem")


def test_a_saved_model_comes_back_with_its_configuration(tmp_path: Path) -> None:
    model = small_model()
    path = tmp_path / "deep" / "model.safetensors"
    save_weights(model, path, torch.float32)
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]
    again = load_model(path)
    assert again.config == SMALL
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_saved_cutie_comes_back_with_its_configuration(tmp_path: Path) -> None:
    model = small_cutie()
    save_weights(model, tmp_path / "model.safetensors", torch.float32)
    again = load_model(tmp_path / "model.safetensors")
    assert again.config == SMALL_CUTIE
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match="CutieConfig has no 'colour'"):
        CutieConfig.from_dict({**SMALL_CUTIE.to_dict(), "colour": 1})


def test_half_precision_on_disk_is_fp32_in_memory(tmp_path: Path) -> None:
    model = small_model()
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_weights(model, first)
    with safetensors.safe_open(first, framework="pt") as file:
        assert file.get_tensor("decoder.pred.weight").dtype == torch.float16
        assert json.loads(file.metadata()["config"]) == SMALL.to_dict()
    again = load_model(first)
    for name, tensor in model.state_dict().items():
        loaded = again.state_dict()[name]
        assert loaded.dtype == tensor.dtype
        expected = tensor.half().float() if tensor.is_floating_point() else tensor
        assert torch.equal(loaded, expected)
    save_weights(again, second)
    assert first.stat().st_size * 1.5 < sum(t.nbytes for t in model.state_dict().values())
    reloaded = load_model(second).state_dict()
    assert all(torch.equal(t, reloaded[name]) for name, t in again.state_dict().items())


def test_the_bundled_model_is_the_lite_one() -> None:
    model = load_model()
    assert model.config == ModelConfig.lite()
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


def test_a_first_convolution_for_single_objects_is_widened_and_computes_the_same() -> None:
    model = small_model()
    state = dict(model.state_dict())
    name = "value_encoder.conv1.weight"
    narrow = state[name][:, :4].clone()
    load_weights(model, state | {name: narrow}, "a file")
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask, others = torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        got = model.value_encoder.conv1(torch.cat([image, mask, others], 1))
        expected = F.conv2d(torch.cat([image, mask], 1), narrow, None, 2, 3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"decoder.pred.bias": None},
            "here does not hold this network's weights: decoder.pred.bias is missing$",
        ),
        ({"decoder.extra": torch.zeros(1)}, "decoder.extra is unknown$"),
        (
            {"decoder.pred.weight": torch.zeros(1, 9, 3, 3)},
            r"decoder.pred.weight is \[1, 9, 3, 3\], not \[1, 8, 3, 3\]$",
        ),
        ({"value_encoder.conv1.weight": torch.zeros(8, 3, 7, 7)}, r"is \[8, 3, 7, 7\], not \[8, 5, 7, 7\]"),
        (
            {f"x{i}": torch.zeros(1) for i in range(5)},
            "x0 is unknown; x1 is unknown; x2 is unknown and 2 more$",
        ),
    ],
)
def test_another_networks_weights_name_their_first_faults(changes: dict[str, Any], says: str) -> None:
    model = small_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = {n: t for n, t in (dict(before) | changes).items() if t is not None}
    with pytest.raises(WeightsError, match=says):
        load_weights(model, state, "here")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


class Evil:
    """Runs code when unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("write", ["torch", "torch, old format", "pickle"])
def test_a_pickled_object_is_refused_and_not_run(tmp_path: Path, write: str) -> None:
    path, witness = tmp_path / "evil.pth", tmp_path / "witness"
    content = {"key_proj.key_proj.weight": Evil(witness)}
    if write == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=write == "torch")
    with pytest.raises(WeightsError, match=r"evil\.pth cannot be read as weights"):
        load_model(path)
    assert not witness.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_a_weights_error(tmp_path: Path, suffix: str) -> None:
    good = tmp_path / f"good{suffix}"
    state = {"a": torch.arange(40.0), "b": torch.zeros(3, dtype=torch.int64)}
    if suffix == ".pth":
        torch.save(state, good)
    else:
        safetensors.torch.save_file(state, good)
    content = good.read_bytes()
    damaged = [content[:n] for n in range(0, len(content), 7)]
    damaged += [bytes(64), b"\x80\x02}q\x00.", b"\x80", b"PK\x03\x04" + bytes(60), b"[1, 2]", b"\xff" * 300]
    for k, at in enumerate(range(0, len(content), 11)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << (k % 8)
        damaged.append(bytes(flipped))
    bad = tmp_path / f"bad{suffix}"
    for data in damaged:
        bad.write_bytes(data)
        with pytest.raises(
            WeightsError, match=f"bad{suffix}"
        ):  # at the latest: not a checkpoint of either network
            load_model(bad)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"config": "{"}, "model.safetensors: "),
        ({"config": "[1]"}, "model.safetensors: "),
        ({"config": '{"key_dim": 0}'}, "key_dim=0"),
        ({"config": '{"colour": 1}'}, "has no 'colour'"),
        (None, "not an XMem or Cutie checkpoint: it has no tensor"),
    ],
)
def test_a_file_with_a_bad_configuration_is_named(
    tmp_path: Path, metadata: dict[str, str] | None, says: str
) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata)
    with pytest.raises(WeightsError, match=says):
        load_model(path)


def test_a_pth_that_holds_no_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.pth"
    torch.save({"model": {"a": torch.zeros(1)}}, path)
    with pytest.raises(WeightsError, match="no state dict of tensors"):
        load_model(path)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    for name in ("xmen", str(tmp_path)):
        with pytest.raises(
            WeightsError,
            match="give one of xmem-lite, xmem, xmem-s012, xmem-s2, xmem-no-sensory, cutie-base, ",
        ):
            load_model(name)
