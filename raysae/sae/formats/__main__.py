"""`python -m raysae.sae.formats convert SRC DST --to FORMAT` prints one line: what it did, or what is wrong (status 2)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from raysae.errors import UserError
from raysae.sae.architectures import ARCHITECTURES
from raysae.sae.formats import READABLE, WRITABLE, read, remarks, write


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(argv: list[str]) -> None:
    parser = _Parser(prog="python -m raysae.sae.formats", description="SAEs from one format to another.")
    convert = parser.add_subparsers(dest="command", required=True).add_parser("convert", help="convert SRC to DST")
    convert.add_argument("src", type=Path, help="folder or file of an SAE")
    convert.add_argument("dst", type=Path, help="new folder")
    convert.add_argument("--to", required=True, choices=tuple(WRITABLE), help="format to write")
    convert.add_argument("--from", dest="source", choices=READABLE, help="format of SRC; unset: found out")
    convert.add_argument("--activation", metavar="relu|topk:K", help="nonlinearity of a file that does not state it")
    convert.add_argument(
        "--apply_b_dec_to_input", choices=("true", "false"), help="whether its encoder reads x - b_dec"
    )
    for name, does in (("mean", "is subtracted from"), ("std", "divides"), ("scale", "multiplies")):
        convert.add_argument(
            f"--{name}", metavar="KEY", help=f"entry of the file that {does} x; folded into the weights"
        )
    asked = parser.parse_args(argv)
    subtracts = None if asked.apply_b_dec_to_input is None else asked.apply_b_dec_to_input == "true"
    sae = read(asked.src, asked.source, asked.activation, subtracts, asked.mean, asked.std, asked.scale)
    write(sae, asked.dst, asked.to)
    config = sae.config
    k = f", k {config.k}" if config.k is not None else ""
    rescaled = asked.to == "dictionary_learning" and ARCHITECTURES[config.architecture].saelens == "standard"
    scaled = "; latents are f times their decoder norm" if rescaled else ""
    facts = f"{config.architecture}, d_in {config.d_in}, d_sae {config.d_sae}{k}{scaled}"
    print("; ".join([f"wrote {asked.dst} as {asked.to}: {facts}", *remarks(sae)]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
