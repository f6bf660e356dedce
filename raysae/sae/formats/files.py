"""SAE files as data: JSON, safetensors, and `.pt` files by torch's weights-only reader. Code in a file is never run.

A file gets no more memory than it has bytes: what it says of sizes is checked against what it holds before it is read.
"""

from __future__ import annotations

import json
import pickletools
import reprlib
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from raysae.errors import UserError

# The origin studies' configs hold paths. Read as pure ones, they are data like any string.
PATHS: list[Any] = [(PurePosixPath, "pathlib.PosixPath"), (PurePosixPath, "pathlib._local.PosixPath")]

PLAIN = {
    "collections.OrderedDict", "pathlib.PosixPath", "pathlib._local.PosixPath", "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_sparse_tensor", "torch.serialization._get_layout",
    "torch._utils._rebuild_meta_tensor_no_storage", "torch.Size", "torch.device", "__builtin__.set", "builtins.set",
    *(f"torch.{kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte",
                                         "Bool", "ComplexFloat", "ComplexDouble")),
    *(f"torch.{kind}" for kind in ("float64", "float32", "float16", "bfloat16", "int64", "int32")),
}  # fmt: skip
"""What tensors and plain values need of a pickle. torch allows more, such as `bytearray(n)` and quantized tensors, which
take as much memory as they say."""

MAX_CONFIG_BYTES, MAX_DEPTH = 16 << 20, 50
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, by its own library


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, or one clear line where it is something else, such as a pickle."""
    try:
        return load_file(file)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"sae: {file} {_why_no_safetensors(file, error)}") from None


def _why_no_safetensors(file: Path, error: Exception) -> str:
    """From its first 8 bytes, the length of a header that is JSON, and from where the header says that the tensors end."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        header = opened.read(length) if length < size else b""
    if length > MAX_HEADER_BYTES:
        pickled = start[:2] == b"PK" or start[:1] == b"\x80"
        called = "is a pickle, not a safetensors file; pickles are never loaded: convert it" if pickled else ""
        return called or "is not a safetensors file"
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        said = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        said = 8 + length  # at least
    if size < said:
        return f"is cut short: {size:,} bytes of {said:,} or more; copy it again"
    return f"is not a safetensors file, or is damaged ({shown(str(error))})"


def load_pt(file: Path) -> dict[str, Any]:
    """What `torch.save` wrote, if it is a dictionary of tensors and plain values; refused if it needs more."""
    if not file.is_file():
        raise UserError(f"sae: {file} is not a file")
    try:
        needs = sorted(_globals_of(file) - PLAIN)
    except Exception:  # a damaged file can fail anywhere in a reader of archives
        raise UserError(f"sae: {file} is not a file that torch.save wrote since torch 1.6, or is damaged") from None
    if needs:
        raise UserError(
            f"sae: {file} holds pickled code ({needs[0]}), which is never run; save dense tensors and plain values"
        )
    try:
        with torch.serialization.safe_globals(PATHS):
            data = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        raise UserError(f"sae: {file} is not a file that torch.save wrote, or is damaged") from None
    if not isinstance(data, dict):
        raise UserError(f"sae: {file} holds a {type(data).__name__}, not a dictionary of tensors")
    return data


def _globals_of(file: Path) -> set[str]:
    """What the pickle in a `.pt` archive names of Python, read without running it; ValueError for a packed archive."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > file.stat().st_size:
            raise ValueError("torch.save packs nothing, and what is packed may take any memory")
        pickled = archive.read(next(m for m in members if m.filename.split("/")[-1] == "data.pkl"))
    named = ((code.name, argument) for code, argument, _ in pickletools.genops(pickled))
    return {str(argument).replace(" ", ".") for name, argument in named if name in ("GLOBAL", "STACK_GLOBAL", "INST")}


def load_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file."""
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"sae: {file} has {file.stat().st_size:,} bytes; a config has at most {MAX_CONFIG_BYTES:,}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"sae: {file} is not JSON") from None
    except RecursionError:
        too_deep, values = True, None
    else:
        too_deep = _deeper_than(MAX_DEPTH, values)
    if too_deep:
        raise UserError(f"sae: {file} is nested deeper than {MAX_DEPTH} levels, which no config is")
    if not isinstance(values, dict):
        raise UserError(f"sae: {file} must hold a mapping, got {type(values).__name__}")
    return values


def _deeper_than(depth: int, value: Any) -> bool:
    level = [value]
    for _ in range(depth):
        level = [x for v in level if isinstance(v, (dict, list)) for x in (v.values() if isinstance(v, dict) else v)]
    return bool(level)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def shown(value: Any) -> str:
    """A value of a file in an error's one line: its repr, cut where it is long, deep or wide."""
    return _SHORT.repr(value)
