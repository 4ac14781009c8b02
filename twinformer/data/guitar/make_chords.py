"""Make ``chords.tsv`` from the npm package ``@tombatossals/chords-db`` (MIT), file ``lib/guitar.json``.

``python -m twinformer.data.guitar.make_chords guitar.json [chords.tsv]``. Every record goes in as it is, faulty ones
included: judging them is the loader's work. Frets count from the base fret, as in the package, lowest string first;
``x`` is not played.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinformer.checkpoint import read_text, write_atomically
from twinformer.errors import InputError

HEADER = ("root", "suffix", "base fret", "frets", "fingers")
TABLE = Path(__file__).parent / "chords.tsv"


def rows(package: Any) -> Iterator[tuple[str, ...]]:
    """One row a fingering, in the package's order. Raises InputError where the JSON is not the package's."""
    try:
        for group in package["chords"].values():  # its keys spell C# as Csharp; the records' own say C#
            for chord in group:
                for position in chord["positions"]:
                    yield (
                        str(chord["key"]),
                        str(chord["suffix"]),
                        str(int(position["baseFret"])),
                        "".join(_digit(fret) for fret in position["frets"]),
                        "".join(_digit(finger) for finger in position["fingers"]),
                    )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError("chords-db", [f"expected lib/guitar.json of the package, got: {error!r}"]) from error


def _digit(number: Any) -> str:
    if not isinstance(number, int) or not -1 <= number <= 9:
        raise ValueError(f"expected a whole number from -1 to 9, got {number!r}")
    return "x" if number == -1 else str(number)


def make(source: Path, target: Path = TABLE) -> int:
    """Write the table; gives the number of fingerings."""
    try:
        package = json.loads(read_text(source))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(str(source), [f"expected JSON, got: {error}"]) from None
    lines = ["\t".join(row) for row in (HEADER, *rows(package))]
    write_atomically(target, lambda part: part.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    return len(lines) - 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the table of chords from chords-db's lib/guitar.json.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?", default=TABLE)
    given = parser.parse_args()
    make(given.source, given.target)
