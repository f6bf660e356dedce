"""SAE files as data: JSON, safetensors, and `.pt` files by torch's weights-only reader. Code in a file is never run."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from raysae.errors import UserError
from raysae.files import plain as plain
from raysae.files import whole_folder as whole_directory  # noqa: F401
from raysae.files import write_json as save_json  # noqa: F401

# The origin studies' configs hold paths. Read as pure ones, they are data like any string.
PATHS: list[Any] = [(PurePosixPath, "pathlib.PosixPath"), (PurePosixPath, "pathlib._local.PosixPath")]


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, or one clear line where it is something else, such as a pickle."""
    try:
        return load_file(file)
    except SafetensorError:
        raise UserError(f"{file.name}: {file} is not a safetensors file; pickles are never loaded") from None


def load_pt(file: Path) -> dict[str, Any]:
    """What `torch.save` wrote, if it is a dictionary of tensors and plain values; refused if it needs more."""
    if not file.is_file():
        raise UserError(f"sae: {file} is not a file")
    try:
        with torch.serialization.safe_globals(PATHS):
            data = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needs = re.search(r"GLOBAL ([\w.]+)", str(error))
        named = f" ({needs[1]})" if needs else ""
        raise UserError(
            f"sae: {file} holds pickled code{named}, which is never run; save tensors and plain values"
        ) from None
    except Exception:  # a damaged file can fail anywhere in torch's reader
        raise UserError(f"sae: {file} is not a file that torch.save wrote, or is damaged") from None
    if not isinstance(data, dict):
        raise UserError(f"sae: {file} holds a {type(data).__name__}, not a dictionary of tensors")
    return data


def load_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file."""
    try:
        values = json.loads(file.read_text())
    except ValueError:
        raise UserError(f"sae: {file} is not JSON") from None
    if not isinstance(values, dict):
        raise UserError(f"sae: {file} must hold a mapping, got {type(values).__name__}")
    return values
