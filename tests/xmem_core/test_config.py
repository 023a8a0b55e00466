from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from xmem_core.config import MemoryConfig, ModelConfig


def test_the_defaults_are_the_published_ones() -> None:
    """Except for corrections, which the published code does not have."""
    memory = dataclasses.asdict(MemoryConfig())
    assert memory == {
        "mem_every": 5,
        "deep_update_every": -1,
        "top_k": 30,
        "min_mid_term_frames": 5,
        "max_mid_term_frames": 10,
        "num_prototypes": 128,
        "max_long_term_elements": 10000,
        "enable_long_term": True,
        "max_permanent_frames": 6,
        "search_window": None,
        "forget_contradicted": True,
        "stagger_updates": None,
        "buffer_tokens": None,
        "least_area": None,
    }
    model = ModelConfig()
    assert (model.key_dim, model.value_dim, model.hidden_dim) == (64, 512, 64)
    assert (model.key_backbone, model.default_size) == ("resnet50", 480)


@pytest.mark.parametrize("later", ["search_window", "forget_contradicted"])
def test_settings_from_before_there_were_more_are_understood(later: str) -> None:
    stored = MemoryConfig().to_dict()
    del stored[later]
    assert MemoryConfig.from_dict(stored) == MemoryConfig()


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig.lite(),
        ModelConfig(hidden_dim=0, value_widths=(8, 8, 16)),
        MemoryConfig(),
        MemoryConfig(enable_long_term=False, max_mid_term_frames=None),
    ],
)
def test_a_config_comes_back_from_json(config: ModelConfig | MemoryConfig) -> None:
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MemoryConfig().top_k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"mem_every": 0}, "mem_every=0 is not allowed: at least 1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"num_prototypes": 0}, "num_prototypes=0"),
        ({"max_permanent_frames": 0}, "max_permanent_frames=0"),
        ({"deep_update_every": 0}, "deep_update_every=0"),
        ({"min_mid_term_frames": 0}, "min_mid_term_frames=0"),
        ({"min_mid_term_frames": 10}, "max_mid_term_frames=10 .* more than min_mid_term_frames=10"),
        ({"max_mid_term_frames": None}, "enable_long_term=False"),
        ({"max_long_term_elements": 128}, "more than num_prototypes=128"),
        ({"mem_every": 2.5}, r"mem_every=2\.5 is not allowed: a whole number"),
        ({"top_k": True}, "top_k=True is not allowed: a whole number"),
        ({"max_mid_term_frames": "10"}, "max_mid_term_frames='10' is not allowed: a whole number"),
    ],
)
def test_memory_settings_out_of_range_are_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MemoryConfig(**values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"key_backbone": "resnet18"}, "key_backbone='resnet18' is not allowed: choose one of resnet50"),
        ({"key_dim": 0}, "key_dim=0"),
        ({"value_stem": 0}, "value_stem=0"),
        ({"sensory_mid_dim": 0}, "sensory_mid_dim=0"),
        ({"value_dim": 15}, "value_dim=15"),
        ({"hidden_dim": -1}, "hidden_dim=-1"),
        ({"default_size": 15}, "default_size=15"),
        ({"value_widths": (8, 8)}, r"value_widths=\(8, 8\)"),
        ({"value_blocks": (1, 0, 1)}, r"value_blocks=\(1, 0, 1\)"),
        ({"decoder_dims": (8, 8, 8)}, "decoder_dims=.*the first is at least 16"),
        ({"key_dim": 64.0}, r"key_dim=64\.0 is not allowed: a whole number"),
        ({"value_widths": (8, 8, 1.5)}, "value_widths=.* is not allowed: a whole number"),
    ],
)
def test_model_settings_out_of_range_are_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ModelConfig(**values)


def test_without_long_term_its_cap_does_not_matter() -> None:
    assert MemoryConfig(enable_long_term=False, max_long_term_elements=1).max_long_term_elements == 1


@pytest.mark.parametrize("kind", [ModelConfig, MemoryConfig])
def test_an_unknown_name_is_named_with_the_known_ones(kind: type[ModelConfig] | type[MemoryConfig]) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__} has no 'men_every', 'x'; it has "):
        kind.from_dict({"x": 1, "men_every": 5})


def test_settings_that_older_versions_did_not_have_are_told_only_where_they_are_set() -> None:
    """Records, digests of snapshots and states of those versions hold neither."""
    plain, changed = MemoryConfig(), MemoryConfig(stagger_updates=3, buffer_tokens=0)
    assert not {"stagger_updates", "buffer_tokens", "least_area"} & set(plain.to_dict())
    assert "stagger" not in repr(plain)
    assert changed.to_dict() == plain.to_dict() | {"stagger_updates": 3, "buffer_tokens": 0}
    assert repr(changed) == repr(plain)[:-1] + ", stagger_updates=3, buffer_tokens=0)"
    assert MemoryConfig.from_dict(changed.to_dict()) == changed
    assert MemoryConfig.from_dict(plain.to_dict()) == plain
