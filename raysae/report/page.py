"""`page`: parts in, one self-contained HTML page out.

It is one file without a single outside reference, so that it can be mailed, archived and opened offline (links to the
SAEs' own pages lead into the run directory); parts read files of the run directory only, so that it can be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysae.files import write_atomic
from raysae.report.columns import interval, is_number, label, show
from raysae.units import duration, size

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Part:
    """A section of a page."""

    anchor: str
    """Id of the section."""
    title: str
    """Its name among the page's links; empty: it has none."""
    template: Path | str
    """Jinja template of what stands in the section: a file, or the template itself. It has what `environment` gives."""
    read: Callable[[Path], Mapping[str, Any] | None]
    """From the run's folder to what the template shows; None leaves the part out. `page_title` of the first part becomes
    the page's; `links` (address, words) stand at the end of the page's links."""


def page(parts: Sequence[Part], run_dir: Path, name: str = "report.html") -> Path:
    """Write the page that `parts` make of a run's folder into it; its path. The first part stands above the links to the
    others and brings its own element, each other is a section."""
    run_dir = Path(run_dir)
    made = [(part, content) for part in parts if (content := part.read(run_dir)) is not None]
    jinja = environment()
    links = [(f"#{part.anchor}", part.title) for part, _ in made[1:] if part.title]
    texts = []
    for part, content in made:
        source = part.template.read_text(encoding="utf-8") if isinstance(part.template, Path) else part.template
        texts.append((part.anchor, jinja.filters["safe"](jinja.from_string(source).render(content))))
        links += content.get("links", ())
    run = run_dir.resolve().name
    title = made[0][1].get("page_title", run) if made else run
    text = jinja.get_template("page.html.j2").render(
        title=title, head=texts[0][1] if texts else "", sections=texts[1:], links=links
    )
    return write_text(run_dir / name, text)


def write_text(path: Path, text: str) -> Path:
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def environment() -> Environment:
    """What templates have: the numbers' formats of `columns` and `units`, and the macros of `macros.html.j2`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["capitalise"] = lambda text: text[:1].upper() + text[1:]  # Jinja's lowers the rest
    jinja.globals.update(show=show, label=label, interval=interval, duration=duration, size=size, plain=_plain)
    macros = jinja.get_template("macros.html.j2").module
    jinja.globals.update({name: getattr(macros, name) for name in ("heads", "number")})
    return jinja


def _plain(value: Any) -> str:
    """A cell's value for sorting: a number as it is, nothing where there is none."""
    return repr(float(value)) if is_number(value) else "" if value is None or value != value else str(value)
