"""VideoSegmenter: advances a state by one frame. Holds the network and settings, no stream state."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, SupportsIndex

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from xmem_core.aside import shared_with
from xmem_core.backbones import fold_batch_norms
from xmem_core.compiled import compile_parts
from xmem_core.config import AnyModelConfig, MemoryConfig, ModelConfig
from xmem_core.corrections import contradicted
from xmem_core.cutie_steps import CutieSteps
from xmem_core.fingerprint import model_fingerprint
from xmem_core.foreground import Foreground, foreground
from xmem_core.fused import fuse
from xmem_core.joint import Caller, EncodeKey, Work
from xmem_core.network import XMem, aggregate
from xmem_core.object_copy import ObjectCopy
from xmem_core.presence import PresenceConstants, presence_scores
from xmem_core.reads import ReadShare, cells_of, read_shares
from xmem_core.runs import LabelRuns, begin_runs
from xmem_core.sought import end_search, keep_searching
from xmem_core.state import TrackerState
from xmem_core.steps import Features, ModelSteps, Network, XMemSteps, padding
from xmem_core.tf32 import set_tf32
from xmem_core.transfer import on_device
from xmem_core.windows import STRIDE
from xmem_core.winograd import use_winograd

MAX_OBJECT_ID = 2**31 - 1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Frame = NDArray[np.uint8] | Tensor


@dataclass(frozen=True, eq=False)
class EncodedFrame:
    """A frame after the part of a step that needs neither memory nor masks. Made by `VideoSegmenter.encode`.

    Args:
        frame: H x W x 3 uint8 RGB.
        size: (height, width) of the network's input before padding.
        image: the network's input, (1, 3, h, w).
        features: output of the key encoder.
        fingerprint: fingerprint of the model.
    """

    frame: Frame
    size: tuple[int, int]
    image: Tensor
    features: Features
    fingerprint: str

    def __repr__(self) -> str:
        return f"EncodedFrame({self.size[1]}x{self.size[0]}, {self.features!r})"


class Prompt:
    """Masks of objects on a frame. Unknown ids start new objects, known ids correct objects.

    Args:
        masks: object id (1 .. 2^31 - 1) -> H x W, bool or 0/1, with at least one pixel set. Where masks
            overlap, the later one takes the pixel.

    Raises:
        ValueError: an id is out of range, or a mask is empty, covered, not H x W or not of 0 and 1.
    """

    def __init__(self, masks: Mapping[int, NDArray[Any] | Tensor]) -> None:
        if not masks:
            raise ValueError("a prompt without masks: give at least one, or prompt=None")
        checked: dict[int, Tensor] = {}
        for object_id, mask in masks.items():
            if not _is_object_id(object_id):
                raise ValueError(f"object id {object_id!r} is not a whole number in 1 .. {MAX_OBJECT_ID}")
            checked[int(object_id)] = _as_bool(mask, int(object_id))
        shapes = {tuple(m.shape) for m in checked.values()}
        if len(shapes) > 1:
            raise ValueError(f"masks of different sizes in one prompt: {sorted(shapes)}")
        covered = torch.zeros_like(next(iter(checked.values())))
        for object_id, mask in reversed(checked.items()):
            own = mask & ~covered
            if not bool(own.any()):
                raise ValueError(f"mask of object {object_id} is empty, or covered by later ones")
            covered |= mask
            checked[object_id] = own
        self.masks: dict[int, Tensor] = checked
        self.size: tuple[int, int] = next(iter(shapes))  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Prompt(objects={list(self.masks)}, size={self.size})"


def _is_object_id(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return False
    return 1 <= operator.index(value) <= MAX_OBJECT_ID


def _as_tensor(array: NDArray[Any] | Tensor) -> Tensor:
    """The array as a tensor, without a copy where torch can share its memory."""
    if isinstance(array, np.ndarray) and (not array.flags.writeable or min(array.strides, default=0) < 0):
        array = array.copy()  # torch warns about read-only arrays and rejects negative strides
    return torch.as_tensor(array)


def _as_bool(mask: NDArray[Any] | Tensor, object_id: int) -> Tensor:
    tensor = _as_tensor(mask)
    if tensor.ndim != 2:
        raise ValueError(f"mask of object {object_id} has shape {tuple(tensor.shape)}: need H x W")
    if tensor.dtype == torch.bool:
        return tensor
    if not bool(((tensor == 0) | (tensor == 1)).all()):
        raise ValueError(f"mask of object {object_id} has values other than 0 and 1: give mask == id")
    return tensor.bool()


class StepResult:
    """Result of a step on one frame, at the network's size; upsampled to the frame's size when read.

    Attributes:
        object_ids: the living objects, in the order of the probabilities.
        frame_size: (H, W) of the frame.
        network_probabilities: (O + 1, h, w) float32 at the network's size, background first.
        presence_constants: constants of `presence`; None if none were fitted to the weights.
        finds_runs: whether `runs` are found, where the planes are. None: on a GPU.
    """

    def __init__(
        self,
        object_ids: tuple[int, ...],
        frame_size: tuple[int, int],
        network_probabilities: Tensor,
        presence_constants: PresenceConstants | None = None,
        finds_runs: bool | None = None,
    ) -> None:
        self.object_ids = object_ids
        self.frame_size = frame_size
        self.network_probabilities = network_probabilities
        self.presence_constants = presence_constants
        self.finds_runs = network_probabilities.device.type != "cpu" if finds_runs is None else finds_runs
        self._begun_runs: Callable[[], LabelRuns] | None = None

    def __repr__(self) -> str:
        height, width = self.frame_size
        return f"StepResult(objects={list(self.object_ids)}, {width}x{height})"

    @cached_property
    def probabilities(self) -> Tensor:
        """(O + 1, H, W) float32, background first, summing to 1 at each pixel."""
        return _at_size(self.network_probabilities, self.frame_size)

    @cached_property
    def foreground(self) -> Foreground:
        """Labels and their probabilities in the part of the frame outside of which all is background.

        On a GPU that is the whole frame, on the GPU.
        """
        if self.network_probabilities.device.type == "cpu":
            return foreground(self.network_probabilities, self.frame_size, self.object_ids)
        planes = self.probabilities
        ids = on_device(torch.tensor((0, *self.object_ids), dtype=torch.int32), planes.device)
        best, index = planes.max(0)
        return Foreground(slice(0, planes.shape[1]), slice(0, planes.shape[2]), ids[index], best)

    @cached_property
    def label_map(self) -> Tensor:
        """(H, W) int32: id of the most probable object; 0 for the background."""
        rows, columns, labels, _ = self.foreground
        if tuple(labels.shape) == self.frame_size:
            return labels
        whole = torch.zeros(self.frame_size, dtype=torch.int32)
        whole[rows, columns] = labels
        return whole

    @cached_property
    def label_probabilities(self) -> Tensor:
        """(H, W) float32: probability of the label in `label_map` at each pixel."""
        rows, columns, _, best = self.foreground
        if tuple(best.shape) == self.frame_size:
            return best
        whole = _at_size(self.network_probabilities[:1], self.frame_size)[0].clone()
        whole[rows, columns] = best
        return whole

    @cached_property
    def presence(self) -> Tensor | None:
        """(O,) float32, 0 to 1: probability that each object's mask is on that object; 0 without a mask.

        Calibrated for the bundled model (see the table in its card). None for weights without fitted
        constants, such as the published ones; `python -m jobs.evaluation.suites.fitting` fits them.
        """
        if self.presence_constants is None:
            return None
        return presence_scores(self.network_probabilities, self.presence_constants)

    def begin_runs(self) -> None:
        """Start finding `runs`, beside what the device computes next. Does nothing on a CPU."""
        if self.finds_runs and self._begun_runs is None:
            self._begun_runs = begin_runs(self.label_map, self.label_probabilities, self.presence)

    @cached_property
    def runs(self) -> LabelRuns | None:
        """What rows are made of, in place of labels and probabilities of all pixels; None on a CPU.

        Reading it waits for what `begin_runs` began.
        """
        self.begin_runs()
        return None if self._begun_runs is None else self._begun_runs()


def _at_size(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """(O, h, w) -> (O, H, W), bilinearly."""
    if tuple(planes.shape[1:]) == size:
        return planes
    full: Tensor = F.interpolate(planes.unsqueeze(0), size, mode="bilinear", align_corners=False)[0]
    return full


@dataclass(eq=False)
class _Step:
    """A step that has begun: nothing of its state is changed yet.

    Args:
        state, frame, prompt: as given, the frame as H x W x 3.
        size: (height, width) of the network's input before padding.
        image, keys: the network's input and what the key encoder made of it; None where nothing is tracked.
    """

    state: TrackerState
    frame: Frame
    prompt: Prompt | None
    size: tuple[int, int]
    image: Tensor | None = None
    keys: Features | None = None


class VideoSegmenter:
    """Tracks objects frame by frame with a model, under given memory settings.

    One segmenter serves any number of streams: each has its own `TrackerState`, passed to every step.

    Args:
        model: the network; the segmenter keeps a copy prepared for inference, see `keep_model`.
        memory_config: memory settings. Default: the published ones, with the model's own search window.
        size: shorter side of the network's input; frames are downscaled to it, never upscaled. None: not
            resized.
        dtype: float32, or bfloat16 / float16 to run the network under autocast; with bfloat16 a small trunk
            and its keys stay in float32. Memory is searched in float32; with bfloat16 on a CPU, candidates
            among very many elements are found in bfloat16. On a GPU values are held in this precision (XMem).
        allow_tf32: on a GPU, whether float32 arithmetic may be done in TF32, which is faster and rounds to 10
            bits of mantissa. The setting is the process's: the segmenter that was made last decides.
        keep_model: False: the model itself is prepared for inference, which saves the copy's time and memory;
            it cannot be used otherwise afterwards.
        batch_streams: whether `step_many` and `step_each` put the objects of several streams into one batch.
            None: on a GPU.
        compile: whether the encoders and the decoder are compiled by `torch.compile` for each shape of input,
            on a GPU into CUDA graphs, see `xmem_core.compiled`. On a CPU this replaces the fused operators
            and Winograd's convolutions, and whole frames are searched: windows have too many sizes.

    Attributes:
        batches_streams: whether they do.
        compiled: whether the network is compiled; False also if it was asked for and is impossible here.
        aside: a thread that may do parts of a step on a CPU; None, as at first: the caller does it all. It
            must have as many threads of torch as the threads that call `step`: results are then the same. It
            is shared by all streams.

    Raises:
        ValueError: size is under 16, dtype is none of these, or a search window is to be compiled.
    """

    def __init__(
        self,
        model: Network,
        memory_config: MemoryConfig | None = None,
        *,
        size: int | None = None,
        dtype: torch.dtype = torch.float32,
        allow_tf32: bool = False,
        keep_model: bool = True,
        batch_streams: bool | None = None,
        compile: bool = False,
    ) -> None:
        if size is not None and size < STRIDE:
            raise ValueError(f"size={size} is not allowed: at least {STRIDE} pixels, or None")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype} is not allowed: choose one of {', '.join(map(str, _DTYPES))}")
        self.size = size
        self.aside: Executor | None = None
        self.dtype = dtype
        self.config = model.config
        self.fingerprint = model_fingerprint(model)
        self.device = next(model.parameters()).device
        set_tf32(self.device, allow_tf32)
        presence = model.config.presence
        self._presence = None if presence is None else PresenceConstants.from_list(presence)
        steps = steps_of(model.config)
        settings = memory_config or MemoryConfig()
        if compile:
            settings = _without_windows(settings, self.device)
        self.memory_config = steps.resolve(settings, model.config, self.device)
        network = (copy.deepcopy(model) if keep_model else model).eval().requires_grad_(False)
        layout = torch.channels_last
        on_cpu = self.device.type == "cpu"
        self.batches_streams = not on_cpu if batch_streams is None else batch_streams
        self._most_rows: dict[Hashable, int] = {}  # see `Caller`
        if isinstance(network, XMem):
            fold_batch_norms(network)
        elif on_cpu:
            # No folding for Cutie: where several objects saturate, aggregation turns a difference in the last
            # bit of a probability into 0.4 of a logit, and other kernels or folded norms differ from the
            # authors' results in more last bits.
            layout = torch.contiguous_format
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)
        if (on_cpu or compile) and isinstance(network, XMem):
            network.split_shared()
        # With the 8 bits of bfloat16 the small trunk's keys are too coarse to tell far people apart: masks of
        # vtest.avi have a mean IoU of 0.978 with those in float32, and of 0.999 if only keys are exact.
        exact: set[nn.Module] = set()
        if dtype == torch.bfloat16 and isinstance(network, XMem) and not network.config.published:
            exact = {*network.key_encoder.modules(), *network.key_proj.modules()}
            network.exact_keys = True
        if dtype != torch.float32:
            # Autocast caches casts of trained parameters only, so it would cast these on every call.
            for module in network.modules():
                if isinstance(module, nn.Conv2d | nn.Linear) and module not in exact:
                    module.to(dtype)
        self.compiled = compile and compile_parts(network, self.device)
        if not compile and on_cpu and isinstance(network, XMem):
            if dtype == torch.float32:
                use_winograd(network)
            if dtype in (torch.float32, torch.bfloat16):
                fuse(network)
        self._network = network
        self._steps = steps(network, self.memory_config, self.device, dtype, layout)

    @property
    def weights_bytes(self) -> int:
        """Device memory of the weights, in bytes."""
        tensors = [*self._network.parameters(), *self._network.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def new_state(self) -> TrackerState:
        """An empty state for a new stream."""
        return TrackerState(self.memory_config, self.fingerprint, self.size)

    @torch.no_grad()
    def encode(self, frame: Frame, network_size: tuple[int, int] | None = None) -> EncodedFrame:
        """Do the part of a step that needs neither memory nor masks: resize the frame and encode its keys.

        It may run in another thread while `step` is at the frame before: with as many threads of torch, the
        results of `step` are bit-identical.

        Args:
            frame: H x W x 3 uint8 RGB.
            network_size: the state's `network_size`; None: that of a new state.

        Raises:
            ValueError: it is no such frame.
        """
        size = self._network_size(frame, network_size)
        image = self._prepare(frame, size)
        with self._steps.autocast():
            features = self._network.encode_key(image)
        return EncodedFrame(frame, size, image, features, self.fingerprint)

    def step(
        self, state: TrackerState, frame: Frame | EncodedFrame, prompt: Prompt | None = None
    ) -> StepResult:
        """Track one stream's objects on its next frame, and update its memory.

        Args:
            state: the stream's; changed in place.
            frame: H x W x 3 uint8 RGB, or what `encode` made of it.
            prompt: masks given on this frame, at its size.

        Returns:
            the objects' probabilities and label map; before the first prompt, all background.

        Raises:
            ValueError: frame, prompt or state are invalid or do not match. The state is unchanged then.
            PoisonedStateError: an earlier step failed and left this state half-changed.
        """
        return self.step_many([(state, frame, prompt)])[0]

    @torch.no_grad()
    def reads(
        self, state: TrackerState, frame: Frame | EncodedFrame, where: NDArray[Any] | Tensor | None = None
    ) -> dict[int, list[ReadShare]]:
        """From which remembered frames `step` would read the objects on the next frame. Nothing changes.

        The weights are those of the readout: the softmax over the best `top_k` elements, averaged over the
        positions that are asked about. The masks of a prompt are not read from memory.

        Args:
            state: the stream's, before the step on this frame.
            frame: H x W x 3 uint8 RGB, or what `encode` made of it.
            where: (H, W) bool: the pixels that are asked about; None: everywhere.

        Returns:
            by object the shares, the largest first, summing to 1. Empty where the object is not read: outside
            its search window, or while it is not searched for.

        Raises:
            ValueError: as for `step`, or `where` is of another size or empty.
        """
        plain, size = self._check(state, frame, None)
        asked = None if where is None else _as_tensor(where).to(self.device).bool()
        if asked is not None and (asked.shape != plain.shape[:2] or not bool(asked.any())):
            raise ValueError(f"where is {tuple(asked.shape)}, or empty: need pixels of {plain.shape[:2]}")
        if state.memory is None or not state.object_ids:
            return {}
        done = frame if isinstance(frame, EncodedFrame) and frame.size == size else None
        keys = (done or self.encode(plain, size)).features
        choices = self._steps.choices(state, keys)
        if asked is None:
            return read_shares(choices)
        left, _, top, _ = padding(size)
        grid = (int(keys.key.shape[2]), int(keys.key.shape[3]))
        return read_shares(choices, cells_of(asked, size, left, top, grid))

    @torch.no_grad()
    def step_many(
        self, steps: Sequence[tuple[TrackerState, Frame | EncodedFrame, Prompt | None]]
    ) -> list[StepResult]:
        """`step` for several streams at once.

        With `batches_streams`, the objects of all streams of one size share a pass of each network; memory is
        read stream by stream. Masks then equal those of `step` but for rounding, see `docs/operations.md`.
        Otherwise nothing is batched, and a stream's results do not depend on the other streams to the bit.

        All input is checked before any state changes. If a step fails, its state is poisoned and the error
        raised; without `batches_streams` the streams after it are unchanged, with it all others advance. Use
        `step_each` to keep their results.
        """
        todo = self._begun(steps)
        for error in self._encode_keys(todo):
            if error is not None:
                raise error
        if not self.batches_streams:
            return [self._finish(step) for step in todo]
        outcomes = self._finish_together(todo)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, StepResult)]

    @torch.no_grad()
    def step_each(
        self, steps: Sequence[tuple[TrackerState, Frame | EncodedFrame, Prompt | None]]
    ) -> list[StepResult | Exception]:
        """`step_many` with the error of a stream in place of its result: the other streams advance.

        A batch that fails, such as for want of memory, is done again stream by stream.

        Raises:
            ValueError: a state is there twice.
        """
        _check_distinct([state for state, _, _ in steps])
        outcomes: list[StepResult | Exception | None] = [None] * len(steps)
        todo: dict[int, _Step] = {}
        for i, given in enumerate(steps):
            try:
                todo[i] = self._begin(*given)
            except Exception as error:
                outcomes[i] = error
        for i, failed in zip(list(todo), self._encode_keys(list(todo.values())), strict=True):
            if failed is not None:
                outcomes[i] = failed
                del todo[i]
        if self.batches_streams:
            for i, outcome in zip(todo, self._finish_together(list(todo.values())), strict=True):
                outcomes[i] = outcome
        else:
            for i, step in todo.items():
                try:
                    outcomes[i] = self._finish(step)
                except Exception as error:
                    outcomes[i] = error
        return [outcome for outcome in outcomes if outcome is not None]

    def network_size(self, height: int, width: int, size: int | None = None) -> tuple[int, int]:
        """(height, width) at which a stream is seen whose first frame has this size, before padding.

        Args:
            size: shorter side in place of the segmenter's own.
        """
        shorter = size or self.size
        if shorter is None or min(height, width) <= shorter:
            return height, width
        return self._steps.network_size(height, width, shorter)

    def adopt(
        self, state: TrackerState, object_id: int, copy: ObjectCopy, frame_size: tuple[int, int]
    ) -> None:
        """Start an object from what another state of this model remembers of it, see `TrackerState.adopt`.

        Args:
            frame_size: (height, width) of the next frame.

        Raises:
            ValueError: as there.
        """
        state.adopt(object_id, copy, self.network_size(*frame_size), self.device)

    # --- input -----------------------------------------------------------------------------------

    def _check(
        self, state: TrackerState, given: Frame | EncodedFrame, prompt: Prompt | None
    ) -> tuple[Frame, tuple[int, int]]:
        """Validate the input; returns the frame and the network size, (height, width)."""
        state.check_usable()
        for name, own, other in (
            ("model", self.fingerprint, state.model_fingerprint),
            ("memory settings", self.memory_config, state.memory_config),
            ("size", self.size, state.size),
        ):
            if own != other:
                raise ValueError(f"state of another {name}: it has {other}, this segmenter has {own}")
        frame = given.frame if isinstance(given, EncodedFrame) else given
        if isinstance(given, EncodedFrame) and given.fingerprint != self.fingerprint:
            raise ValueError(
                f"frame encoded by another model: it has {given.fingerprint}, this segmenter has "
                f"{self.fingerprint}"
            )
        size = self._network_size(frame, state.network_size)
        if prompt is not None and not isinstance(prompt, Prompt):
            raise ValueError(f"prompt is a {type(prompt).__name__}: need a Prompt, or None")
        shape = tuple(frame.shape[:2])
        if prompt is not None and prompt.size != shape:
            raise ValueError(f"prompt masks are {prompt.size}, the frame is {shape} (height, width)")
        return frame, size

    def _network_size(self, frame: Frame, known: tuple[int, int] | None) -> tuple[int, int]:
        """Validate a frame; returns its network size, (height, width): the stream's if that is known."""
        if not isinstance(frame, np.ndarray | Tensor):
            raise ValueError(f"frame is a {type(frame).__name__}: need H x W x 3 uint8, numpy or tensor")
        shape = tuple(frame.shape)
        dtype = str(frame.dtype).removeprefix("torch.")
        if len(shape) != 3 or shape[2] != 3 or min(shape) < 1 or dtype != "uint8":
            raise ValueError(f"frame of shape {shape} and type {dtype}: need H x W x 3 uint8, RGB")
        return known or self.network_size(int(shape[0]), int(shape[1]))

    def _prepare(self, frame: Frame, size: tuple[int, int]) -> Tensor:
        """Network input of a frame: (1, 3, h, w), normalised, resized and padded to the stride."""
        # H x W x 3 in memory is a (3, H, W) image in channels-last order already.
        image = on_device(_as_tensor(frame), self.device).permute(2, 0, 1).unsqueeze(0)
        return self._steps.network_input(image, size)

    # --- several streams -------------------------------------------------------------------------

    def _begun(
        self, steps: Sequence[tuple[TrackerState, Frame | EncodedFrame, Prompt | None]]
    ) -> list[_Step]:
        """Check the input of all steps."""
        _check_distinct([state for state, _, _ in steps])
        checked = [self._check(*given) for given in steps]
        return [self._begin(*given, checked=done) for given, done in zip(steps, checked, strict=True)]

    def _begin(
        self,
        state: TrackerState,
        given: Frame | EncodedFrame,
        prompt: Prompt | None,
        *,
        checked: tuple[Frame, tuple[int, int]] | None = None,
    ) -> _Step:
        """Check a step's input, and prepare its image."""
        frame, size = checked or self._check(state, given, prompt)
        step = _Step(state, frame, prompt, size)
        if state.object_ids or prompt:
            if isinstance(given, EncodedFrame) and given.size == size:
                step.image, step.keys = given.image, given.features
            else:
                step.image = self._prepare(frame, size)
        return step

    def _encode_keys(self, steps: Sequence[_Step]) -> list[Exception | None]:
        """Encode the images that are not yet; of each step the error, if it failed."""
        errors: list[Exception | None] = [None] * len(steps)
        calls = {i: EncodeKey(s.image) for i, s in enumerate(steps) if s.image is not None and s.keys is None}
        caller = self._caller()
        if self.batches_streams:
            made = caller.made(list(calls.values()))
        else:
            made = [caller.made([call])[0] for call in calls.values()]
        for i, found in zip(calls, made, strict=True):
            if isinstance(found, Exception):
                errors[i] = found
            else:
                steps[i].keys = found
        return errors

    def _caller(self) -> Caller:
        return Caller(self._network, self._steps.autocast, self._most_rows)

    def _finish(self, step: _Step) -> StepResult:
        try:
            with shared_with(self.aside):
                return self._caller().alone(self._advance(step))
        except BaseException as error:
            step.state.poisoned = f"{type(error).__name__}: {error}"
            raise

    def _finish_together(self, steps: Sequence[_Step]) -> list[StepResult | Exception]:
        try:
            outcomes = self._caller().together([self._advance(step) for step in steps])
        except BaseException as error:
            for step in steps:
                step.state.poisoned = f"{type(error).__name__}: {error}"
            raise
        for step, outcome in zip(steps, outcomes, strict=True):
            if isinstance(outcome, Exception):
                step.state.poisoned = f"{type(outcome).__name__}: {outcome}"
        return outcomes

    # --- one stream ------------------------------------------------------------------------------

    def _advance(self, step: _Step) -> Work[StepResult]:
        state, prompt, size, image, keys = step.state, step.prompt, step.size, step.image, step.keys
        state.network_size = size
        frame_size = (int(step.frame.shape[0]), int(step.frame.shape[1]))
        if state.time >= 0 or prompt is not None or state.object_ids:
            state.time += 1
        if image is None or keys is None:
            return StepResult((), frame_size, torch.ones(1, *size, device=self.device), self._presence)
        given = self._fit_masks(prompt, size)
        settings = self.memory_config
        known = state.object_ids
        is_memory_frame = bool(given) or state.time - state.last_memory_time >= settings.mem_every
        deep_update = self._steps.deep_update_due(state, is_memory_frame)

        probabilities: dict[int, Tensor] = {}
        if not given or self._steps.predicts(known, given):
            update = self._steps.keeps_update(state, deep_update)
            hidden = state.hidden
            decoded = yield from self._steps.decode(state, keys, update)
            wrong = contradicted(decoded, known, given) if settings.forget_contradicted and given else []
            if wrong:
                self._forget(state, wrong, hidden)
                decoded = yield from self._steps.decode(state, keys, update)
            probabilities = dict(zip(known, decoded[1:], strict=True))
        elif known and settings.forget_contradicted:
            hidden = state.hidden
            shown = yield from self._steps.decode(state, keys, False, count_use=False)
            self._forget(state, contradicted(shown, known, given), hidden)
        if given:
            claimed = torch.stack(list(given.values())).any(0)
            probabilities = {i: p.masked_fill(claimed, 0) for i, p in probabilities.items()}
            probabilities.update({i: mask.float() for i, mask in given.items()})
        object_ids = (*known, *(i for i in given if i not in known))
        if given:
            joint = torch.stack([probabilities[i] for i in object_ids])
            final = torch.softmax(aggregate(joint.unsqueeze(0)), 1)[0]
        else:
            final = decoded
        self._steps.look_next(state, object_ids, final[1:])
        end_search(state, object_ids, final, given, self._presence)
        if is_memory_frame:
            yield from self._steps.remember(
                state, image, keys, final[1:], object_ids, tuple(given), deep_update
            )
            state.last_memory_time = state.time
            if deep_update:
                state.last_deep_time = state.time
            seen = final[1:].flatten(1).amax(1) > 0.5
            state.once_known(seen, partial(_note_sure, state, object_ids, tuple(given), state.time))
        keep_searching(state, object_ids)
        top, left = padding(size)[2], padding(size)[0]
        cut = final[:, top : top + size[0], left : left + size[1]].contiguous()
        return StepResult(object_ids, frame_size, cut, self._presence)

    def _fit_masks(self, prompt: Prompt | None, size: tuple[int, int]) -> dict[int, Tensor]:
        """The prompt's masks at the padded network size, (H', W') bool."""
        if prompt is None:
            return {}
        fitted: dict[int, Tensor] = {}
        saved: list[Tensor] = []
        for object_id, mask in prompt.masks.items():
            small = on_device(mask, self.device)[None, None].float()
            vanished = False
            if prompt.size != size:
                nearest = F.interpolate(small, size, mode="nearest-exact")
                # An object thinner than the grid would vanish; then every cell that it touches counts.
                vanished = not bool(nearest.any())
                small = F.adaptive_max_pool2d(small, size) if vanished else nearest
            fitted[object_id] = F.pad(small, padding(size))[0, 0] > 0
            if vanished:
                saved.append(fitted[object_id])
        for object_id, mask in fitted.items() if saved else ():
            rest = mask & ~torch.stack(saved).any(0)
            # It takes these pixels from other objects, as long as these keep at least one.
            if bool(rest.any()):
                fitted[object_id] = rest
        return fitted

    def _forget(self, state: TrackerState, wrong: list[int], hidden: Tensor | None) -> None:
        """Bar objects from memory since they were last sure; `hidden`: sensory memory before the step."""
        assert state.memory is not None
        if hidden is not None:
            hidden = hidden.clone()
            hidden[[state.object_ids.index(i) for i in wrong]] = 0
        state.hidden = hidden
        if state.masks is not None and wrong:
            state.masks = state.masks.clone()
            state.masks[[state.object_ids.index(i) for i in wrong]] = 0
        for i in wrong:
            state.memory.doubt(i, state.sure.get(i, state.memory.first_time[i]))
            state.windows.pop(i, None)


def _without_windows(settings: MemoryConfig, device: torch.device) -> MemoryConfig:
    """Settings for a compiled network. Raises ValueError if they name a search window."""
    if settings.search_window:
        raise ValueError(
            f"search_window={settings.search_window} is not allowed with compile: windows have too many "
            "sizes to compile the decoder for each; use search_window=0, or compile=False"
        )
    # On a GPU whole frames are searched anyway, and None is what states made there have.
    return replace(settings, search_window=0) if device.type == "cpu" else settings


def _check_distinct(states: Sequence[TrackerState]) -> None:
    if len({id(state) for state in states}) < len(states):
        raise ValueError("the same state twice in one call: one frame of a stream at a time")


def _note_sure(
    state: TrackerState, object_ids: tuple[int, ...], given: tuple[int, ...], time: int, seen: list[bool]
) -> None:
    """Note of which objects the masks of a memory frame are right: they were given, or there is no mask."""
    sure = [i for i, there in zip(object_ids, seen, strict=True) if i in given or not there]
    state.sure.update(dict.fromkeys(sure, time))


def steps_of(config: AnyModelConfig) -> type[ModelSteps[Any, Any]]:
    """The steps of the model that a configuration describes."""
    return XMemSteps if isinstance(config, ModelConfig) else CutieSteps
