"""Options that several commands have in common, with their help texts, and what is made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from xmem_core import MemoryConfig

_MEMORY = "Memory"
_NETWORK = "Network"

ModelOption = Annotated[
    str,
    typer.Option(
        help="xmem-lite, xmem, xmem-s012, xmem-s2, xmem-no-sensory, or a file.", rich_help_panel=_NETWORK
    ),
]
SizeOption = Annotated[
    int | None,
    typer.Option(
        help="Shorter side the network sees; 0: as it is. Default: the model's.", rich_help_panel=_NETWORK
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...", rich_help_panel=_NETWORK)]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16, or auto: bfloat16 where the CPU has it.", rich_help_panel=_NETWORK
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="CPU threads of the network.", rich_help_panel=_NETWORK)
]
MemEveryOption = Annotated[
    int | None, typer.Option(help="Frames between memory frames [5].", rich_help_panel=_MEMORY)
]
DeepUpdateOption = Annotated[
    int | None,
    typer.Option(help="Frames between deep updates; -1: with memory frames.", rich_help_panel=_MEMORY),
]
TopKOption = Annotated[
    int | None, typer.Option(help="Elements a query may read [30].", rich_help_panel=_MEMORY)
]
MinMidTermOption = Annotated[
    int | None, typer.Option(help="Frames left by a consolidation [5].", rich_help_panel=_MEMORY)
]
MaxMidTermOption = Annotated[
    int | None, typer.Option(help="Frames that set one off [10].", rich_help_panel=_MEMORY)
]
PrototypesOption = Annotated[
    int | None, typer.Option(help="Elements that one adds [128].", rich_help_panel=_MEMORY)
]
LongTermElementsOption = Annotated[
    int | None, typer.Option(help="Cap of long-term memory [10000].", rich_help_panel=_MEMORY)
]
PermanentOption = Annotated[
    int | None, typer.Option(help="Prompted frames kept for good [6].", rich_help_panel=_MEMORY)
]
LongTermOption = Annotated[
    bool | None,
    typer.Option("--long-term/--no-long-term", help="Long-term memory [on].", rich_help_panel=_MEMORY),
]
SearchWindowOption = Annotated[
    int | None,
    typer.Option(
        help="Look for an object only around where it was, at least so many pixels wide; 0: everywhere. "
        "Default: the model's.",
        rich_help_panel=_MEMORY,
    ),
]


def memory_config(**given: int | bool | None) -> MemoryConfig:
    """Memory settings from the options that were given; UsageError if they make no sense."""
    from xmem_core import MemoryConfig

    try:
        return MemoryConfig(**{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(str(error)) from error
