"""Music files by their names: which reader and writer a file needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twinformer.checkpoint import write_atomically
from twinformer.data.guitar.notes import Piece
from twinformer.data.guitar.tokens import piece_of, read_pieces, tokens_of
from twinformer.errors import InputError

#: what can be read, by the end of the name
READ = {
    ".mid": "MIDI",
    ".midi": "MIDI",
    ".xml": "MusicXML",
    ".musicxml": "MusicXML",
    ".mxl": "MusicXML",
    ".jams": "JAMS",
    ".gp3": "Guitar Pro",
    ".gp4": "Guitar Pro",
    ".gp5": "Guitar Pro",
    ".tab": "tablature",
    ".txt": "note tokens",
}
#: what can be written
WRITTEN = {
    ".mid": "MIDI",
    ".midi": "MIDI",
    ".tab": "tablature",
    ".txt": "note tokens",
    ".svg": "picture",
    ".png": "picture",
    ".pdf": "picture",
}


def read_music(file: str | Path, **choices: Any) -> list[Piece]:
    """The pieces of a file: one, or one a line of note tokens. ``choices`` go to the reader.

    Raises InputError where the name says no kind that is read, or the reader finds fault; CheckpointError where a
    text file is absent.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(str(file), ["expected a file, got nothing by that name"])
    match READ.get(file.suffix.lower()):
        case "MIDI":
            from twinformer.data.guitar.midi import read_midi

            return [read_midi(file, **choices)]
        case "MusicXML":
            from twinformer.data.guitar.musicxml import read_musicxml

            return [read_musicxml(file, **choices)]
        case "JAMS":
            from twinformer.data.guitar.jams import read_jams

            return [read_jams(file, **choices)]
        case "Guitar Pro":
            from twinformer.data.guitar.guitarpro import read_guitarpro

            return [read_guitarpro(file, **choices)]
        case "tablature":
            from twinformer.data.guitar.tablature import read_tab

            return [read_tab(file, **choices)]
        case "note tokens":
            return [piece_of(tokens) for tokens in read_pieces(file, **choices)]
    raise InputError(str(file), [f"expected a name that ends in one of {', '.join(READ)}, got {file.suffix!r}"])


def write_music(piece: Piece, file: str | Path, **choices: Any) -> None:
    """Write a piece as the kind that the file's name says. ``choices`` go to the writer.

    Raises InputError where the name says none, or the piece lacks what the kind needs.
    """
    file = Path(file)
    match WRITTEN.get(file.suffix.lower()):
        case "MIDI":
            from twinformer.data.guitar.midi import write_midi

            write_midi(piece, file, **choices)
        case "tablature":
            from twinformer.data.guitar.tablature import write_tab

            write_tab(piece, file, **choices)
        case "note tokens":
            text = " ".join(tokens_of(piece)) + "\n"
            write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))
        case "picture":
            from twinformer.data.guitar.picture import write_picture

            write_picture(piece, file, **choices)
        case _:
            raise InputError(
                str(file), [f"expected a name that ends in one of {', '.join(WRITTEN)}, got {file.suffix!r}"]
            )
