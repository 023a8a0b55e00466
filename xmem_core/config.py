"""Settings of the model and of its memory: frozen, and checked when built."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from xmem_core.presence import PresenceConstants

KEY_BACKBONES = ("resnet50", "efficientnet-lite0")
PIXEL_BACKBONES = ("resnet50", "resnet18")


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is not allowed: {allowed}")


def _require_whole(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else (value,)
        # bool is a subclass of int, but True is not a meaningful width.
        ok = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        _require(ok, name, value, "a whole number is needed")


@dataclass(frozen=True)
class ModelConfig:
    """Backbones and widths of an XMem network. The defaults are the published model's.

    Args:
        key_backbone: trunk of the key encoder, one of `KEY_BACKBONES`.
        value_stem: channels after the value encoder's first convolution.
        value_widths: channels of its three residual stages, at strides 4, 8 and 16.
        value_blocks: residual blocks in each of these stages (ResNet-18 has two).
        key_dim: C_k, channels of key and selection.
        value_dim: C_v, channels of a memory value.
        hidden_dim: C_h, channels of the sensory memory; 0 switches it off.
        decoder_dims: decoder channels at strides 16, 8 and 4.
        sensory_mid_dim: channels to which the decoder's scales are brought before the sensory update.
        default_size: shorter side of the network's input, in pixels, that the model was trained for.
        default_small_size: size for videos whose objects are small, see `pipeline.tracking.settings`; None:
            the same size.
        default_search_window: used where `MemoryConfig.search_window` is None.
        default_least_area: used where `MemoryConfig.least_area` is None.
        presence: constants of `StepResult.presence`, from `PresenceConstants.to_list`; None if none were
            fitted to the weights.

    Raises:
        ValueError: a width is not positive or the backbone is unknown.
    """

    key_backbone: str = "resnet50"
    value_stem: int = 64
    value_widths: tuple[int, int, int] = (64, 128, 256)
    value_blocks: tuple[int, int, int] = (2, 2, 2)
    key_dim: int = 64
    value_dim: int = 512
    hidden_dim: int = 64
    decoder_dims: tuple[int, int, int] = (512, 256, 256)
    sensory_mid_dim: int = 256
    default_size: int = 480
    # Excluded from comparison and fingerprint: these affect how a model is used, not its weights.
    default_small_size: int | None = field(default=None, repr=False, compare=False)
    default_search_window: int | None = field(default=None, repr=False, compare=False)
    default_least_area: float | None = field(default=None, repr=False, compare=False)
    presence: tuple[float, ...] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        _require(
            self.key_backbone in KEY_BACKBONES,
            "key_backbone",
            self.key_backbone,
            f"choose one of {', '.join(KEY_BACKBONES)}",
        )
        for name in ("value_widths", "value_blocks", "decoder_dims"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.presence is not None:
            object.__setattr__(self, "presence", tuple(PresenceConstants.from_list(self.presence).to_list()))
        optional = ("default_small_size", "default_search_window", "default_least_area", "presence")
        no_number = ("key_backbone", *optional)
        _require_whole(self, *(f.name for f in fields(self) if f.name not in no_number))
        if self.default_small_size is not None:
            _require_whole(self, "default_small_size")
            small, least = self.default_small_size, self.default_size
            _require(small > least, "default_small_size", small, f"more than default_size={least}, or None")
        # MemoryConfig has the checks for these values.
        MemoryConfig(search_window=self.default_search_window, least_area=self.default_least_area)
        for name in ("value_stem", "key_dim", "sensory_mid_dim"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a width is at least 1")
        # The channel gates of CBAM work at a sixteenth of these two widths.
        _require(self.value_dim >= 16, "value_dim", self.value_dim, "at least 16")
        _require(self.hidden_dim >= 0, "hidden_dim", self.hidden_dim, "0 (no sensory memory) or more")
        _require(self.default_size >= 16, "default_size", self.default_size, "at least 16 pixels")
        for name in ("value_widths", "value_blocks", "decoder_dims"):
            value = getattr(self, name)
            _require(len(value) == 3 and min(value) >= 1, name, value, "three numbers of at least 1")
        _require(self.decoder_dims[0] >= 16, "decoder_dims", self.decoder_dims, "the first is at least 16")

    @classmethod
    def lite(cls) -> ModelConfig:
        """Configuration of the bundled xmem-lite: EfficientNet-Lite0 trunk, narrow layers, 384 pixels."""
        return cls(
            key_backbone="efficientnet-lite0",
            value_stem=16,
            value_widths=(16, 32, 64),
            value_blocks=(1, 1, 1),
            key_dim=64,
            value_dim=128,
            hidden_dim=32,
            decoder_dims=(96, 32, 16),
            sensory_mid_dim=64,
            default_size=384,
            default_small_size=512,
            default_search_window=192,
            default_least_area=0.7,
        )

    @property
    def published(self) -> bool:
        """Whether the network is the published one, whose arithmetic is kept as the authors' code has it."""
        return self.key_backbone == "resnet50"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` takes back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from `to_dict`'s output. Raises ValueError on an unknown name."""
        _reject_unknown(cls, values)
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**known)


@dataclass(frozen=True)
class CutieConfig:
    """Backbone and widths of a Cutie network. The defaults are those of the published cutie-base.

    Args:
        pixel_backbone: trunk of the pixel encoder, one of `PIXEL_BACKBONES`; cutie-small has resnet18.
        mask_stem: channels after the mask encoder's first convolution.
        mask_widths: channels of its three residual stages, at strides 4, 8 and 16.
        mask_blocks: residual blocks in each of these stages (ResNet-18 has two).
        key_dim: C_k, channels of key and selection.
        dim: C, channels of values, sensory memory, queries and everything else at stride 16.
        decoder_dims: decoder channels at strides 8 and 4.
        queries: object queries; half of them read an object, half what surrounds it.
        heads: attention heads.
        ffn_dim: width inside the queries' feed-forward layers.
        transformer_blocks: blocks of the object transformer.
        default_size: shorter side of the network's input, in pixels, that the model was trained for.
        presence: as in `ModelConfig`.

    Raises:
        ValueError: a width is not positive or the backbone is unknown.
    """

    pixel_backbone: str = "resnet50"
    mask_stem: int = 64
    mask_widths: tuple[int, int, int] = (64, 128, 256)
    mask_blocks: tuple[int, int, int] = (2, 2, 2)
    key_dim: int = 64
    dim: int = 256
    decoder_dims: tuple[int, int] = (128, 128)
    queries: int = 16
    heads: int = 8
    ffn_dim: int = 2048
    transformer_blocks: int = 3
    default_size: int = 480
    presence: tuple[float, ...] | None = field(default=None, repr=False, compare=False)

    default_search_window: ClassVar[int | None] = None
    default_small_size: ClassVar[int | None] = None
    published: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require(
            self.pixel_backbone in PIXEL_BACKBONES,
            "pixel_backbone",
            self.pixel_backbone,
            f"choose one of {', '.join(PIXEL_BACKBONES)}",
        )
        for name, count in (("mask_widths", 3), ("mask_blocks", 3), ("decoder_dims", 2)):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            _require_whole(self, name)
            ok = len(value) == count and min(value) >= 1
            _require(ok, name, value, f"{count} numbers of at least 1")
        if self.presence is not None:
            object.__setattr__(self, "presence", tuple(PresenceConstants.from_list(self.presence).to_list()))
        numbers = ("mask_stem", "key_dim", "dim", "queries", "heads", "ffn_dim", "transformer_blocks")
        _require_whole(self, *numbers, "default_size")
        for name in numbers:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.dim % 4 == 0, "dim", self.dim, "a multiple of 4")
        _require(self.dim % self.heads == 0, "heads", self.heads, f"a divisor of dim={self.dim}")
        _require(self.queries % 2 == 0, "queries", self.queries, "an even number")
        _require(self.default_size >= 16, "default_size", self.default_size, "at least 16 pixels")

    @classmethod
    def small(cls) -> CutieConfig:
        """Configuration of the published cutie-small."""
        return cls(pixel_backbone="resnet18")

    @property
    def value_dim(self) -> int:
        """C_v, channels of a memory value."""
        return self.dim

    @property
    def hidden_dim(self) -> int:
        """C_h, channels of the sensory memory."""
        return self.dim

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` takes back; `family` tells it from `ModelConfig`'s."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"family": "cutie", **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CutieConfig:
        """Build from `to_dict`'s output. Raises ValueError on an unknown name."""
        values = {k: v for k, v in values.items() if k != "family"}
        _reject_unknown(cls, values)
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**known)


AnyModelConfig = ModelConfig | CutieConfig


@dataclass(frozen=True)
class MemoryConfig:
    """Memory settings: when frames are stored and how many are kept (paper section 3.3; names as published).

    Args:
        mem_every: frames between two memory frames.
        deep_update_every: frames between deep updates of the sensory memory; below 0, on every memory frame.
        top_k: memory elements that a query position may read.
        min_mid_term_frames: frames in working memory after a consolidation, the stream's first one included.
        max_mid_term_frames: frames in working memory that trigger consolidation. None, with
            `enable_long_term` off, leaves working memory unlimited, as in the published code.
        num_prototypes: elements that one consolidation adds to long-term memory.
        max_long_term_elements: capacity of long-term memory; beyond it the least-used elements are removed.
        enable_long_term: long-term memory; without it the oldest frames are dropped instead of consolidated.
        max_permanent_frames: prompted frames that are kept whole, the stream's first one included. Beyond
            this number, frames are removed in this order: those with prompts of removed objects only, those
            whose objects were also prompted on another kept frame, then the oldest. Prompted masks of living
            objects are consolidated into long-term memory, frame by frame; with `enable_long_term` off they
            are dropped, with a warning in the log: set it to the number of frames that have prompts.
        search_window: minimum side, in pixels of the network's input, of the window around an object's last
            position in which the object is searched; 0: the whole frame; default: the model's on a CPU, the
            whole frame elsewhere. For an object out of sight the window grows up to the whole frame, which is
            then searched on every third frame only. None means the model's `default_search_window`: the whole
            frame for the published models.
        forget_contradicted: when a prompt contradicts most of an object's mask, stop reading what was
            stored for the object since its last prompt or since it was last out of sight. False: only the
            prompted frame is affected, as published.
        stagger_updates: number of frames between two memory frames on which Cutie's decoder updates the
            sensory memory, evenly spread; from mem_every on, all. Default: 5. XMem does not have it.
        buffer_tokens: elements that leave long-term memory beyond those that must, once it is full. Default,
            as published: 2000 for Cutie, or a fifth of max_long_term_elements if that is less; 0 for XMem.
        least_area: a small object (under 16 cells of 16 x 16 pixels) counts as hidden on a frame on which its
            mask has less than this share of its usual area: it does not read what is stored of that frame,
            and there is no deep update for it. 0: no object does, as published; default: the model's. None
            means the model's `default_least_area`: 0 for the published models. Cutie does not have it.

    Raises:
        ValueError: a number is out of range, or two settings contradict each other.
    """

    mem_every: int = 5
    deep_update_every: int = -1
    top_k: int = 30
    min_mid_term_frames: int = 5
    max_mid_term_frames: int | None = 10
    num_prototypes: int = 128
    max_long_term_elements: int = 10000
    enable_long_term: bool = True
    max_permanent_frames: int = 6
    search_window: int | None = None
    forget_contradicted: bool = True
    stagger_updates: int | None = None
    buffer_tokens: int | None = None
    least_area: float | None = None

    def __post_init__(self) -> None:
        optional = ("max_mid_term_frames", "search_window", "stagger_updates", "buffer_tokens", "least_area")
        no_number = ("enable_long_term", "forget_contradicted", *optional)
        _require_whole(self, *(f.name for f in fields(self) if f.name not in no_number))
        if self.stagger_updates is not None:
            _require_whole(self, "stagger_updates")
            _require(self.stagger_updates >= 1, "stagger_updates", self.stagger_updates, "at least 1")
        if self.least_area is not None:
            share = self.least_area
            number = isinstance(share, int | float) and not isinstance(share, bool)
            _require(number and 0 <= share < 1, "least_area", share, "0 to less than 1, or None")
        if self.search_window is not None:
            _require_whole(self, "search_window")
            _require(
                self.search_window == 0 or self.search_window >= 64,
                "search_window",
                self.search_window,
                "at least 64 pixels, or 0 for the whole frame",
            )
        for name in ("mem_every", "top_k", "num_prototypes", "max_permanent_frames"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.deep_update_every != 0, "deep_update_every", 0, "a number of frames, or -1")
        low, high = self.min_mid_term_frames, self.max_mid_term_frames
        _require(low >= 1, "min_mid_term_frames", low, "at least 1")
        if high is None:
            _require(
                not self.enable_long_term,
                "max_mid_term_frames",
                None,
                "consolidation needs a limit; give one, or set enable_long_term=False",
            )
        else:
            _require_whole(self, "max_mid_term_frames")
            _require(high > low, "max_mid_term_frames", high, f"more than min_mid_term_frames={low}")
        if self.enable_long_term:
            _require(
                self.max_long_term_elements > self.num_prototypes,
                "max_long_term_elements",
                self.max_long_term_elements,
                f"more than num_prototypes={self.num_prototypes}",
            )
        if self.buffer_tokens is not None:
            _require_whole(self, "buffer_tokens")
            rest = self.max_long_term_elements - self.num_prototypes
            _require(
                0 <= self.buffer_tokens <= max(0, rest),
                "buffer_tokens",
                self.buffer_tokens,
                f"0 .. {max(0, rest)} (max_long_term_elements - num_prototypes)",
            )

    def _said(self) -> dict[str, Any]:
        """The settings that a record or a digest tells: those added later only where they are set, so that
        records, snapshots and states of older versions stay equal.
        """
        return {k: v for k, v in asdict(self).items() if v is not None or k not in _ADDED_LATER}

    def __repr__(self) -> str:
        return f"MemoryConfig({', '.join(f'{k}={v!r}' for k, v in self._said().items())})"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` takes back."""
        return self._said()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MemoryConfig:
        """Build from `to_dict`'s output. Raises ValueError on an unknown name."""
        _reject_unknown(cls, values)
        return cls(**values)


_ADDED_LATER = ("stagger_updates", "buffer_tokens", "least_area")
"""Settings of `MemoryConfig` that older versions did not have."""


def _reject_unknown(cls: type, values: dict[str, Any]) -> None:
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no {', '.join(map(repr, unknown))}; it has {', '.join(sorted(known))}"
        )
