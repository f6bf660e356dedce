"""One frozen, validated object per job, from YAML files plus dotted overrides on the command line.

pydantic checks the values and pydantic-settings reads the command line. A wrong or unknown field raises `UserError` with
one line that names the field, the value and what is allowed.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from raysae.config.sections import Section
from raysae.errors import UserError

J = TypeVar("J", bound=Section)


def load_config(job: type[J], argv: list[str] | None = None, config: str | Path | None = None) -> J:
    """The job's config from `--config FILE ...` (or `config`) and dotted overrides; a file, or a shipped one by its name.

    Of several files a later one wins over an earlier, and the command line over all.

    Raises UserError with one line for a wrong field, value or file; `--help` prints a line per field and exits 0.
    """
    argv = [] if argv is None else argv
    parser = _Parser(
        prog=Path(sys.argv[0]).name, description=job.__doc__, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config", type=Path, nargs="+", default=[Path(config)] if config else [],
        help="YAML files (or names of shipped ones) with any of the fields below; a later one wins, as a recipe does",
    )  # fmt: skip
    settings = type(job.__name__, (BaseSettings, job), {"model_config": SettingsConfigDict(**job.model_config)})  # type: ignore[typeddict-item]
    source = CliSettingsSource[_Parser](
        settings,
        root_parser=parser,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="null",
        cli_prog_name=parser.prog,
    )
    parser.fields = frozenset(name for action in parser._actions for name in action.option_strings)
    arguments = parser.parse_args(argv)
    files = vars(arguments).pop("config")
    values: dict[str, Any] = {}
    for file in files:
        values = _merge(values, read_yaml("config", locate("config", file)))
    try:
        overrides = source(parsed_args=vars(arguments))()
    except SettingsError as error:
        said = " ".join(str(error).removeprefix("Parsing error encountered for ").split())
        raise UserError(f"{said}; write '[1,2]' for a list, '{{\"name\": 1}}' for a section") from None
    except RecursionError:
        raise UserError("command line: a value is nested too deeply") from None
    return validate(job, _merge(values, overrides), where=", ".join(map(str, files)) or None)


def validate(job: type[J], values: dict[str, Any], where: str | None = None) -> J:
    """`values` as a `job`, or a UserError of one line naming the first wrong field."""
    try:
        return job.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(job, error.errors()) + (f" (in {where})" if where else "")) from None


def dump_yaml(config: Section) -> str:
    """The resolved config as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40, width=120)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the closest field where one is unknown."""

    fields: frozenset[str] = frozenset()

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            name, *value = message.removeprefix("unrecognized arguments: ").split()
            name, _, attached = name.partition("=")
            message = (
                f"unknown field {name.lstrip('-')}{_given(' '.join(value) or attached)}; {_closest(name, self.fields)}"
            )
        raise UserError(message)


def _given(value: str) -> str:
    return f" (given {value})" if value else ""


def _closest(name: str, fields: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(fields), n=1, cutoff=0.4)
    return f"did you mean {close[0].lstrip('-')}? --help lists all fields" if close else "--help lists all fields"


PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = next((folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir()), PACKAGE)
"""Shipped configs, recipes and gates: inside an installed package, beside the package in a checkout."""


def locate(field: str, path: Path) -> Path:
    """`path`; where there is no such file, the shipped gate (`field` gate), config or recipe of that name: `quickstart`,
    `recipes/topk_gao`, `gates/default`, with or without `configs/` and `.yaml`. UserError lists the names.
    """
    path = Path(os.path.expanduser(path))
    if path.is_file():
        return path
    files = {file.relative_to(SHIPPED).with_suffix("").as_posix(): file for file in sorted(SHIPPED.rglob("*.yaml"))}
    folders = ("gates",) if field == "gate" else (SHIPPED.name, "recipes")
    names = {name: file for name, file in files.items() if file.parent.name in folders}
    name = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    if name not in names:
        raise UserError(f"{field}: {path} is not a file, and none is shipped by that name; shipped: {', '.join(names)}")
    return names[name]


def read_yaml(field: str, path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or one line that names the `field` and the file."""
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise UserError(f"{field}: {path} is not a file")
    try:
        if path.stat().st_size > YAML_BYTES:
            raise yaml.YAMLError(f"it is larger than {YAML_BYTES:,} bytes")
        values = yaml.load(path.read_text("utf-8-sig"), _Loader)  # a SafeLoader
    except OSError as error:
        raise UserError(f"{field}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{field}: {path} is not UTF-8 text; save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a ValueError: a date or number that is none
        raise UserError(f"{field}: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{field}: {path} must hold a mapping of fields, got {type(values).__name__}")
    return values


YAML_BYTES, YAML_DEPTH, YAML_NODES = 1_000_000, 50, 100_000
"""Most bytes of a YAML file, levels of nesting, and nodes once every alias stands for what it names."""


class _Loader(yaml.SafeLoader):
    """Refuses what a config never needs and a mistake, or malice, brings: keys given twice, of which the last would win;
    nesting beyond the interpreter's stack; aliases that make a small file endless."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > YAML_DEPTH:
            raise yaml.YAMLError(f"it nests deeper than {YAML_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                where = f"in line {line}" if lines[key.value] == line else f"in lines {lines[key.value]} and {line}"
                raise yaml.YAMLError(f"{key.value} stands twice, {where}, and one would drop the other; join them")
            lines[key.value] = line
        return node

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        known: dict[int, tuple[float, float]] = {}

        def extent(node: yaml.Node) -> tuple[float, float]:
            """(nodes, levels) at and below a node."""
            if isinstance(node, yaml.ScalarNode):
                return 1, 1
            if id(node) not in known:
                known[id(node)] = float("inf"), float("inf")  # of a node within itself
                pairs = node.value if isinstance(node, yaml.MappingNode) else [(item,) for item in node.value]
                below = [extent(part) for pair in pairs for part in pair] or [(0, 0)]
                known[id(node)] = 1 + sum(n for n, _ in below), 1 + max(levels for _, levels in below)
            return known[id(node)]

        if root is not None and (extent(root)[0] > YAML_NODES or extent(root)[1] > YAML_DEPTH):
            raise yaml.YAMLError(f"its aliases stand for more than {YAML_NODES:,} values or {YAML_DEPTH} levels")
        return root


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _one_line(job: type[BaseModel], errors: Sequence[Any]) -> str:
    """The first error in words; where a field may be one of several types, what each of them asks."""
    error = errors[0]
    loc = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        section = _section(job, loc[:-1])
        return f"{'.'.join(loc)}: unknown field; {_closest(loc[-1], set(section.model_fields))}; allowed: " + ", ".join(
            section.model_fields
        )
    field, message = _field(error), error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{field}: {message}" if field else message
    allowed = " or ".join(e["msg"][0].lower() + e["msg"][1:] for e in errors if _field(e) == field)
    return f"{field}: {_shown(error['input'])} is not allowed; {allowed}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _field(error: Any) -> str:
    """The dotted name of the field, without pydantic's names for the types it tried."""
    parts = (str(part) for part in error["loc"])
    return ".".join(part for part in parts if "[" not in part and part not in ("constrained-int", "constrained-float"))


def _section(job: type[BaseModel], loc: list[str]) -> type[BaseModel]:
    for name in loc:
        if name not in job.model_fields:  # the place in a list
            continue
        annotation = job.model_fields[name].annotation
        found = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not found:
            return job
        job = found[0]
    return job
