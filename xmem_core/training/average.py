"""Weight averaging: the mean of several models' weights as one model.

    python -m xmem_core.training.average --out mean.safetensors RUN1/weights-ema.safetensors
    RUN2/weights-ema.safetensors

Meant for weights that were trained on from one another (Wortsman et al. 2022, "Model soups"). The mean of two
unrelated runs is useless: corresponding channels have different functions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xmem_core import Cutie, XMem, load_model
from xmem_core.weight_files import WeightsError
from xmem_core.weights import mean_state, save_weights


def average_models(paths: Sequence[str | Path]) -> XMem | Cutie:
    """Return the network with the mean of the weights at `paths`.

    It has no presence constants, which must be refitted.

    Raises:
        WeightsError: there are fewer than two, one cannot be read, or their shapes differ.
    """
    if len(paths) < 2:
        raise WeightsError(f"a mean needs at least two models, not {len(paths)}")
    models = [load_model(path) for path in paths]
    first = models[0]
    for path, model in zip(paths[1:], models[1:], strict=True):
        if model.config != first.config:
            raise WeightsError(
                f"{path} and {paths[0]} have different shapes: only weights of the same network have a mean"
            )
    first.load_state_dict(mean_state([model.state_dict() for model in models]))
    first.config = replace(first.config, presence=None)
    return first


def main() -> None:
    """Entry point of `python -m xmem_core.training.average --out FILE WEIGHTS WEIGHTS [WEIGHTS ...]`: writes
    the mean of weights in fp16."""
    parser = argparse.ArgumentParser(prog="xmem_core.training.average", description=main.__doc__)
    parser.add_argument("weights", nargs="+", help=".safetensors files or model names")
    parser.add_argument("--out", required=True, help=".safetensors file to write")
    args = parser.parse_args()
    if Path(args.out).suffix != ".safetensors":
        parser.error(f"--out {args.out} is not allowed: its name must end in .safetensors")
    try:
        save_weights(average_models(args.weights), args.out)
    except (WeightsError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
