"""Weight averaging: the mean of several models' weights as one model.

    python -m xmem_core.training.average --out mean.safetensors RUN1/weights-ema.safetensors
    RUN2/weights-ema.safetensors

For weights of which one was trained on from another (Wortsman et al. 2022, "Model soups"). Of those of two
unrelated runs the mean is of no use: a channel of one does not do what the same channel of another does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xmem_core import Cutie, XMem, load_model
from xmem_core.weights import WeightsError, mean_state, save_weights


def average_models(paths: Sequence[str | Path]) -> XMem | Cutie:
    """The network with the mean of the weights at `paths`, and no presence: that is to be fitted anew.

    Raises:
        WeightsError: fewer than two are given, one cannot be read, or they are not of one shape.
    """
    if len(paths) < 2:
        raise WeightsError(f"a mean is of two models at least, not of {len(paths)}")
    models = [load_model(path) for path in paths]
    first = models[0]
    for path, model in zip(paths[1:], models[1:], strict=True):
        if model.config != first.config:
            raise WeightsError(
                f"{path} is not of the shape of {paths[0]}: only weights of one network have a mean"
            )
    first.load_state_dict(mean_state([model.state_dict() for model in models]))
    first.config = replace(first.config, presence=None)
    return first


def main() -> None:
    """`python -m xmem_core.training.average --out FILE WEIGHTS WEIGHTS [WEIGHTS ...]`: the mean of weights,
    in fp16."""
    parser = argparse.ArgumentParser(prog="xmem_core.training.average", description=main.__doc__)
    parser.add_argument("weights", nargs="+", help=".safetensors files, or names of models")
    parser.add_argument("--out", required=True, help="a .safetensors file, written anew")
    args = parser.parse_args()
    if Path(args.out).suffix != ".safetensors":
        parser.error(f"--out {args.out} is not allowed: its name must end in .safetensors")
    try:
        save_weights(average_models(args.weights), args.out)
    except (WeightsError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
