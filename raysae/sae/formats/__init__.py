"""SAEs on disk: SAELens' layout is our own (`save`, `load`); others are read and written for exchange (`read`, `write`).

`python -m raysae.sae.formats convert SRC DST --to FORMAT` does both. Files are read as data and never unpickled.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from raysae.errors import UserError
from raysae.sae.formats import dictionary_learning, openai, saelens, sparsify, state_dict
from raysae.sae.formats.assemble import Activation, Stated
from raysae.sae.formats.files import load_pt, load_tensors
from raysae.sae.formats.saelens import load, save
from raysae.sae.sae import SAE

FOLDERS: dict[str, tuple[str, Callable[[Path], SAE]]] = {
    "saelens": (saelens.WEIGHTS, saelens.load),
    "sparsify": (sparsify.WEIGHTS, sparsify.read),
    "dictionary_learning": (dictionary_learning.WEIGHTS, dictionary_learning.read),
}
"""Formats that are a folder, by name: the file that tells them apart, and their reader."""
FILES = {"openai": openai.read, "state_dict": state_dict.read}
"""Formats that are one `.pt` (or safetensors) file."""
READABLE = (*FOLDERS, *FILES)
WRITABLE: dict[str, Callable[[SAE, Path], None]] = {
    "saelens": saelens.save,
    "sparsify": sparsify.write,
    "dictionary_learning": dictionary_learning.write,
}

__all__ = ["READABLE", "WRITABLE", "load", "load_tensors", "read", "remarks", "save", "write"]


def read(
    path: str | Path,
    format: str | None = None,
    activation: str | None = None,
    apply_b_dec_to_input: bool | None = None,
    mean: str | None = None,
    std: str | None = None,
    scale: str | None = None,
) -> SAE:
    """The SAE at `path`, a folder or a file, in the `format` that it says it is if none is named.

    The others are for a file that does not state them. `activation`: relu or topk:K. `apply_b_dec_to_input`: whether the
    encoder reads x - b_dec. `mean`, `std`, `scale`: names of entries of the file by which x was normalised, as
    (x - mean) · scale / std; they are folded into the weights.

    Raises UserError for a file that leaves it open, contradicts what is stated, does what no architecture here does, holds
    what is no weight, is damaged, or holds pickled code; before memory is taken for more than is in the file.
    """
    path = Path(path)
    if path.is_file() and path.name in [weights for weights, _ in FOLDERS.values()]:
        path = path.parent  # one file of a folder; its config lies beside it
    if format is None and path.is_dir():  # SAELens' loader says what is missing from a folder of none of them
        format = next((name for name, (weights, _) in FOLDERS.items() if (path / weights).is_file()), "saelens")
    stated = Stated(Activation.parse(activation) if activation else None, apply_b_dec_to_input, mean, std, scale)
    if format in FOLDERS:
        for field, value in stated._asdict().items():
            if value is not None:
                raise UserError(f"{field}: {path} is in {format} format, which says its own")
        return FOLDERS[format][1](path)
    if format not in (None, *FILES):
        raise UserError(f"from: {format!r} is not a format; known: {', '.join(READABLE)}")
    data = load_tensors(path) if path.suffix == ".safetensors" and path.is_file() else load_pt(path)
    return FILES[format or ("openai" if "pre_bias" in data else "state_dict")](path, data, stated)


def remarks(sae: SAE) -> list[str]:
    """What whoever reads `sae` from a foreign file should know of it."""
    found = [f"assumed: {sae.metadata['raysae_assumed']}"] if "raysae_assumed" in sae.metadata else []
    threshold = sae.parameters.get("threshold")
    if threshold is not None and threshold.item() < 0:
        found.append(f"threshold {threshold.item():g} is below zero: every positive latent passes, whatever k is")
    return found


def write(sae: SAE, path: str | Path, format: str) -> None:
    """Write `sae` to the new folder `path`, whole or not at all. Raises UserError where the format cannot hold it."""
    path = Path(path)
    if format not in WRITABLE:
        raise UserError(f"to: {format!r} is not a format that is written; known: {', '.join(WRITABLE)}")
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"dst: {path} exists already; name a new folder")
    WRITABLE[format](sae, path)
