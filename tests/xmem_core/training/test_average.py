from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny import TINY, tiny_model

from xmem_core import load_model
from xmem_core.network import XMem
from xmem_core.training.average import average_models, main
from xmem_core.weight_files import WeightsError
from xmem_core.weights import save_weights

PRESENCE = (20.0, 0.0, 0.0, 0.0, 1.0, 0.0, -15.0)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(paths):
        model = tiny_model(seed)
        model.config = replace(model.config, presence=PRESENCE)
        save_weights(model, path, torch.float32)
    return [str(path) for path in paths]


def test_the_mean_of_three(files: list[str], tmp_path: Path) -> None:
    mean = average_models(files).state_dict()
    states = [load_model(path).state_dict() for path in files]
    changed = 0
    for name, value in mean.items():
        if value.is_floating_point():
            expected = (states[0][name] + states[1][name] + states[2][name]) / 3
            assert torch.allclose(value, expected, atol=1e-6), name
            changed += not torch.equal(value, states[0][name])
        else:
            assert torch.equal(value, states[-1][name]), name
    assert changed > 50  # norms are as they began


def test_the_command_writes_a_model_without_presence(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The constants were fitted to other weights' probabilities."""
    out = tmp_path / "new" / "mean.safetensors"
    monkeypatch.setattr("sys.argv", ["average", "--out", str(out), *files[:2]])
    main()
    model = load_model(str(out))
    assert model.config == load_model(files[0]).config
    assert model.config.presence is None
    expected = average_models(files[:2]).state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(value.float(), expected[name].float(), atol=1e-3, rtol=1e-3), name


def test_weights_of_other_shapes_are_refused(files: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_weights(XMem(replace(TINY, value_dim=32)), other)
    with pytest.raises(WeightsError, match=r"other\.safetensors and .* have different shapes"):
        average_models([files[0], other])
    with pytest.raises(WeightsError, match="at least two models, not 1"):
        average_models(files[:1])


@pytest.mark.parametrize(
    ("out", "weights", "message"),
    [
        ("mean.pth", ["a", "b"], "must end in .safetensors"),
        ("mean.safetensors", ["nowhere.safetensors", "b"], "no model 'nowhere.safetensors'"),
    ],
)
def test_the_command_says_what_is_wrong(
    out: str,
    weights: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["average", "--out", str(tmp_path / out), *weights])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
