"""What stages share: blocks of tokens and the work on them, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raysae.errors import Fault
from raysae.placement import Placement
from raysae.progress import say
from raysae.workspace import Made

if TYPE_CHECKING:
    from raysae.bench import Bench


def blocks_of(tokens: Made, split: str) -> list[dict[str, Any]]:
    """Entries of a split's blocks in the token manifest."""
    return [block for block in tokens.manifest["blocks"] if block["split"] == split]


def names_of(blocks: Sequence[dict[str, Any]]) -> list[str]:
    """The blocks' names, which are their shards' too."""
    return [block["name"] for block in blocks]


def over_blocks(
    bench: Bench,
    works: Mapping[str, Any],
    blocks: Sequence[dict[str, Any]],
    done: Callable[[Path, str], bool],
    tokens: Path,
    model: Mapping[str, Any],
) -> dict[str, float]:
    """Do each work, by what it is called, on the blocks that are not done below its `root`. Returns what it cost.

    tokens: the folder that the blocks' files lie in. model: arguments of `ModelHost.load`.
    """
    cost = {"cpu_seconds": 0.0, "gpu_seconds": 0.0}
    for what, work in works.items():
        todo = [block for block in blocks if not done(work.root, block["name"])]
        if len(todo) < len(blocks):
            say(f"{what}: {len(blocks) - len(todo)} of {len(blocks)} shards are there already")
        seconds = bench.over_blocks(what, todo, tokens, model, work)
        names = names_of(blocks)
        refuse_partial(what, names, [name for name in names if done(work.root, name)])
        add_cost(cost, bench.hosts(len(todo)).held(seconds))
    return cost


def refuse_partial(what: str, asked: Sequence[str], there: Collection[str]) -> None:
    """Raise Fault unless all that was asked of a part of a stage is there: a stage is whole, or is not finished."""
    absent = [name for name in asked if name not in there]
    if absent:
        raise Fault(
            f"{what}: {len(absent)} of {len(asked)} are not there, such as {absent[0]}; the same command goes on from here"
        )


def of_driver(seconds: float) -> dict[str, float]:
    """Device-seconds of work in this process, on all of torch's threads."""
    threads = torch.get_num_threads()
    return Placement(1, threads, 0.0, threads).held(seconds)


def add_cost(total: dict[str, float], cost: Mapping[str, float]) -> None:
    """Add device-seconds to a total."""
    for key, value in cost.items():
        total[key] += value
