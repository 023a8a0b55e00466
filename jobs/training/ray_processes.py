"""Training stages in processes of a Ray cluster, by Ray Train.

Ray Train starts the processes and their `torch.distributed` group; they then do what those of torchrun do.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jobs.cluster.connection import Resources, connected
from jobs.training.processes import WAIT
from jobs.training.settings import StageConfig
from jobs.training.stages import StageRun, train_stages
from pipeline.base.errors import UsageError, XmemError, one_line
from xmem_core.training.keep import latest_checkpoint

log = logging.getLogger(__name__)

_TRIES = 3
"""How often processes may be lost in a row without a new checkpoint."""

# On a busy machine processes may take longer to start than Ray Train's default of a minute.
_PATIENCE = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300"}


def train_on_ray(
    configs: Sequence[StageConfig],
    data_root: str | Path,
    out: str | Path,
    run: StageRun,
    *,
    address: str | None = None,
    processes: int | None = None,
    debug: bool = False,
) -> Path | None:
    """Train stages as `train_stages` does, in processes of Ray; each has a GPU, or CPUs.

    If a process or its machine is lost, all start again from the newest checkpoint.

    Args:
        configs: the stages.
        data_root: folder with the data sets; like `out`, the same path on all machines.
        out: folder of the run, shared by all machines.
        run: what to train with.
        address: Ray cluster: `auto`, `host:6379`, `ray://host:10001`. None: a local Ray.
        processes: how many. None: one per GPU of the cluster, or one on CPUs.
        debug: show the output of Ray and of the processes.

    Returns:
        The weights of the last stage; None if the training was stopped before its end.

    Raises:
        UsageError: settings, data, weights or a checkpoint that cannot be used, or more processes than the
            cluster has room for.
        XmemError: the training failed.
    """
    if not configs:
        raise UsageError("no stage to train")
    cuda = configs[0].device.startswith("cuda")
    if cuda:  # which one, Ray decides
        configs = [replace(each, device="cuda") for each in configs]
    cpus = max(1, configs[0].threads)
    with connected(address, gpus=cuda, debug=debug) as resources:
        count = _room(resources, processes, cuda, cpus)
        settings = {
            "stages": [each.to_dict() for each in configs],
            "data": _absolute(data_root),
            "out": _absolute(out),
        }
        tries, before = 0, _newest(configs, out)
        while True:
            try:
                return _fit({**settings, "run": _portable(run)}, count, cuda, cpus)
            except _LostError as lost:
                newest = _newest(configs, out)
                tries = 1 if newest != before else tries + 1
                if not run.resume:
                    raise XmemError(f"{lost}; the same command without --fresh continues") from lost
                if tries >= _TRIES:
                    raise XmemError(f"{lost}; {tries} times in a row without a new checkpoint") from lost
                before = newest
                log.warning("%s; starting again from the newest checkpoint", lost)


class _LostError(Exception):
    """A process ended without an exception of ours."""


def _fit(settings: dict[str, Any], processes: int, cuda: bool, cpus: int) -> Path | None:
    try:
        from ray.train import RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise UsageError(
            "Ray Train needs more packages: pip install 'xmem-pipeline[train]', or use torchrun"
        ) from error

    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    # What Ray Train stores itself is not needed: checkpoints are in the run's folder.
    with tempfile.TemporaryDirectory(prefix="xmem-ray-train-") as own:
        process: Any = _process  # Ray's types do not know of results
        trainer = TorchTrainer(
            process,
            train_loop_config=settings,
            torch_config=TorchConfig("nccl" if cuda else "gloo", timeout_s=int(WAIT.total_seconds())),
            scaling_config=ScalingConfig(
                num_workers=processes,
                use_gpu=cuda,
                resources_per_worker={"CPU": cpus, "GPU": 1} if cuda else {"CPU": cpus},
            ),
            run_config=RunConfig(storage_path=own),
        )
        try:
            result: Any = trainer.fit()
        except WorkerGroupError as error:
            raise _cause(error.worker_failures) from error
        except TrainingFailedError as error:
            raise XmemError(f"Ray Train stopped: {one_line(error)}") from error
    return None if result.return_value is None else Path(result.return_value)


def _process(settings: dict[str, Any]) -> str | None:
    """What each process does. Runs in a thread of a Ray worker."""
    configs = [StageConfig.from_dict(each) for each in settings["stages"]]
    logging.getLogger("jobs.training").setLevel(logging.INFO)
    weights = train_stages(configs, settings["data"], settings["out"], StageRun(**settings["run"]))
    return None if weights is None else str(weights)


def _cause(failures: dict[int, Exception]) -> Exception:
    """The exception that explains the others, which only lost their partners."""
    for _, failure in sorted(failures.items()):
        each: BaseException | None = failure
        while each is not None:
            if isinstance(each, UsageError | XmemError):
                return type(each)(one_line(each))
            each = each.__cause__
    rank, failure = sorted(failures.items())[0]
    return _LostError(f"training process {rank} failed: {one_line(failure)}")


def _room(resources: Resources, processes: int | None, cuda: bool, cpus: int) -> int:
    """The number of processes. UsageError if the cluster has no room for them: Ray would wait for it."""
    if processes is not None and processes < 1:
        raise UsageError(f"--processes {processes} is not allowed: must be at least 1")
    if cuda:
        room, what = math.floor(resources.gpus), f"{resources.gpus:g} GPUs"
    else:
        room = sum(node // cpus for node in resources.node_cpus)
        what = f"{resources.cpus} CPUs, and threads={cpus} are needed per process"
    count = processes or (max(1, room) if cuda else 1)
    if count > room:
        raise UsageError(f"{count} training processes are not allowed: the Ray cluster has {what}")
    return count


def _newest(configs: Sequence[StageConfig], out: str | Path) -> list[Path | None]:
    return [latest_checkpoint(Path(out) / f"stage-{each.stage}") for each in configs]


def _portable(run: StageRun) -> dict[str, Any]:
    """The settings with absolute paths: the processes have another working directory."""
    validation = None if run.validation is None else _absolute(run.validation)
    init = _absolute(run.init) if run.init is not None and Path(run.init).exists() else run.init
    split = run.validation_split
    if split is not None and split.endswith(".txt") and Path(split).is_file():
        split = _absolute(split)
    backbones = tuple(_absolute(each) for each in run.backbones)
    changed = replace(run, init=init, validation=validation, validation_split=split, backbones=backbones)
    return asdict(changed)


def _absolute(path: str | Path) -> str:
    return str(Path(path).absolute())
