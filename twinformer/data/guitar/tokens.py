"""Pieces as note tokens: ``PIECE_START TS=3_8 BAR_START ON=45 ON=64 TD=4 OFF=64 … BAR_END … PIECE_END``.

``ON``/``OFF`` a MIDI pitch, ``TD`` the time until the next event in twelfths of a quarter. In a moment come first
``OFF``, then ``ON``, each by pitch. Notes are split at bar lines, and silence before a bar line is not written. A
pitch that is on twice (two strings) is off twice.

Read as well: the spelling of the multi-track music machine (Ens & Pasquier 2020, arXiv:2008.06048), of one track:
``TIME_SIGNATURE= BPM= TRACK_START INST= DENSITY= NOTE_ON= TIME_DELTA=0.5 NOTE_OFF= … TRACK_END``. Its deltas carry
the noise of floating point; they are rounded to twelfths, so that 0.33333 and 0.33334 are one token.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from twinformer.checkpoint import read_text
from twinformer.data.guitar.notes import QUARTER, Note, Piece, bar_length
from twinformer.data.guitar.vocabulary import Vocabulary
from twinformer.errors import InputError, Problems

PAD = "<pad>"
PIECE_START, PIECE_END, BAR_START, BAR_END = "PIECE_START", "PIECE_END", "BAR_START", "BAR_END"
#: two octaves below a guitar's lowest string to E7, so that transposed and retuned pieces have room
PITCHES = range(24, 101)
#: longer waits are written as several
LONGEST = 96
TIME_SIGNATURES = tuple(f"{beats}_{unit}" for unit in (2, 4, 8, 16) for beats in (*range(1, 10), 12))
#: twelfths in one ``TIME_DELTA``: the published guitar set counts sixteenth notes
MMM_UNIT = QUARTER / 4
_MMM_HEADERS = ("BPM", "INST", "DENSITY", "GENRE", "STYLE")
_SHOWN = 20


@functools.cache
def note_vocabulary() -> Vocabulary:
    """The same for every file, so that a model can be measured on any: it does not depend on what was read."""
    return Vocabulary(
        (
            *(PAD, PIECE_START, PIECE_END, BAR_START, BAR_END),
            *(f"TS={signature}" for signature in TIME_SIGNATURES),
            *(f"TD={twelfths}" for twelfths in range(1, LONGEST + 1)),
            *(f"ON={pitch}" for pitch in PITCHES),
            *(f"OFF={pitch}" for pitch in PITCHES),
        )
    )


def read_pieces(file: str | Path, *, mmm_unit: float = MMM_UNIT) -> list[tuple[str, ...]]:
    """The tokens of each piece of a text file, one a line, in either spelling.

    Raises InputError naming line and place of what is wrong, CheckpointError where the file does not read. Empty
    lines are an error too, since attributions go by line number.
    """
    text = read_text(Path(file))
    problems = Problems(str(file), InputError)
    problems.expect(bool(text.strip()), "expected one piece a line, got an empty file")
    problems.raise_if_any()
    pieces = []
    lines = text.removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            pieces.append(parse(line, mmm_unit=mmm_unit))
        except InputError as error:
            for problem in error.problems:
                problems.add(f"line {number}: {problem}")
    if len(problems.found) > _SHOWN:
        problems.found[_SHOWN:] = [f"and {len(problems.found) - _SHOWN} more"]
    problems.raise_if_any()
    return pieces


def parse(line: str, *, mmm_unit: float = MMM_UNIT) -> tuple[str, ...]:
    """The tokens of one piece, checked and put into the order and the spelling above. Raises InputError."""
    return tokens_of(piece_of(line.split(), mmm_unit=mmm_unit))


def piece_of(tokens: Sequence[str], *, mmm_unit: float = MMM_UNIT) -> Piece:
    """The piece that tokens of either spelling stand for. Raises InputError naming every place that is wrong.

    Tokens do not say how long the silence before a bar line is: a bar lasts what the time signature says, or longer
    where its notes do; only the first one, an upbeat, may be shorter.
    """
    reading = _Reading(mmm_unit)
    for place, token in enumerate(tokens):
        reading.take(place, token)
    return reading.piece(len(tokens))


def tokens_of(piece: Piece) -> tuple[str, ...]:
    """The tokens of a piece. Raises InputError for a pitch or a time signature that the vocabulary lacks."""
    signature = "{}_{}".format(*piece.time_signature)
    problems = Problems("note tokens", InputError)
    problems.expect(signature in TIME_SIGNATURES, f"time signature: expected one of {TIME_SIGNATURES}, got {signature}")
    for i, note in enumerate(piece.notes):
        problems.expect(
            note.pitch in PITCHES, f"note {i}: expected a pitch from {PITCHES[0]} to {PITCHES[-1]}, got {note.pitch}"
        )
    problems.raise_if_any()
    written = [PIECE_START, f"TS={signature}"]
    first = 0
    notes = piece.notes
    held: list[Note] = []
    for start, end in zip(piece.bars, piece.bar_ends, strict=True):
        while first < len(notes) and notes[first].start < end:
            held.append(notes[first])
            first += 1
        events = sorted(
            event
            for note in held
            for event in ((max(note.start, start), 1, note.pitch), (min(note.end, end), 0, note.pitch))
        )
        held = [note for note in held if note.end > end]
        written.append(BAR_START)
        now = start
        for time, is_on, pitch in events:
            written += _waits(time - now)
            written.append(f"{'ON' if is_on else 'OFF'}={pitch}")
            now = time
        written.append(BAR_END)
    return (*written, PIECE_END)


@functools.cache
def moves(semitones: int) -> npt.NDArray[np.int64]:
    """``[V]``: the id of each token of ``note_vocabulary`` after transposition, −1 where the vocabulary ends."""
    vocabulary = note_vocabulary()
    table = np.arange(len(vocabulary))
    for name in ("ON", "OFF"):
        for pitch in PITCHES:
            moved = f"{name}={pitch + semitones}"
            table[vocabulary.id(f"{name}={pitch}")] = vocabulary.id(moved) if moved in vocabulary else -1
    table.setflags(write=False)
    return table


def transpose(ids: npt.NDArray[np.int64], semitones: int) -> npt.NDArray[np.int64]:
    """``[T]`` ids of ``note_vocabulary`` with every pitch moved. Raises InputError where one leaves the vocabulary."""
    moved = moves(semitones)[ids]
    if (moved < 0).any():
        lost = note_vocabulary().decode(sorted(set(ids[moved < 0].tolist())))
        wanted = f"pitches that stay within {PITCHES[0]} to {PITCHES[-1]} when moved by {semitones}"
        raise InputError("transpose", [f"expected {wanted}, got {', '.join(lost)}"])
    return moved


def room(ids: npt.NDArray[np.int64], most: int) -> tuple[int, ...]:
    """The transpositions from −most to +most that keep a piece within the vocabulary."""
    used = np.unique(ids)
    return tuple(move for move in range(-most, most + 1) if (moves(move)[used] >= 0).all())


@functools.cache
def _paces(factor: float) -> npt.NDArray[np.int64]:
    """``[V]``: the id of each token where all lasts ``factor`` times as long, −1 where there is none."""
    vocabulary = note_vocabulary()
    table = np.arange(len(vocabulary))
    for wait in range(1, LONGEST + 1):
        other = f"TD={wait * factor:g}"
        table[vocabulary.id(f"TD={wait}")] = vocabulary.id(other) if other in vocabulary else -1
    for signature in TIME_SIGNATURES:
        beats, _, unit = signature.partition("_")
        other = f"TS={beats}_{int(unit) / factor:g}"
        table[vocabulary.id(f"TS={signature}")] = vocabulary.id(other) if other in vocabulary else -1
    table.setflags(write=False)
    return table


def paced(ids: npt.NDArray[np.int64], factor: float) -> npt.NDArray[np.int64]:
    """``[T]`` ids of the same piece written in notes ``factor`` (1/2 or 2) times as long, its beats with them.

    Raises InputError where the vocabulary has no such duration or time signature.
    """
    written = _paces(factor)[ids]
    if (written < 0).any():
        lost = note_vocabulary().decode(sorted(set(ids[written < 0].tolist())))
        raise InputError("paced", [f"expected tokens that there are {factor:g} times as long, got {', '.join(lost)}"])
    return written


def paces(ids: npt.NDArray[np.int64]) -> tuple[float, ...]:
    """Those of 1/2 and 2 in which a piece can be written."""
    used = np.unique(ids)
    return tuple(factor for factor in (0.5, 2.0) if (_paces(factor)[used] >= 0).all())


@functools.cache
def _sounds() -> npt.NDArray[np.int64]:
    """``[V, 2]``: 1 for ``ON``, 2 for ``OFF``, 0 for all else; and the pitch."""
    vocabulary = note_vocabulary()
    table = np.zeros((len(vocabulary), 2), np.int64)
    for kind, name in enumerate(("ON", "OFF"), start=1):
        for pitch in PITCHES:
            table[vocabulary.id(f"{name}={pitch}")] = kind, pitch
    table.setflags(write=False)
    return table


def exchanged(ids: npt.NDArray[np.int64], order: Callable[[int], npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """``[T]`` ids of a piece with its n pitches exchanged for each other.

    The i-th lowest becomes the ``order(n)[i]``-th lowest. What begins, or ends, at once stands in rising order
    afterwards too.
    """
    vocabulary = note_vocabulary()
    kinds, pitches = _sounds()[ids].T
    used = np.unique(pitches[kinds > 0])
    others = dict(zip(used.tolist(), used[order(len(used))].tolist(), strict=True))
    out = ids.copy()
    for kind, name in enumerate(("ON", "OFF"), start=1):
        for pitch, other in others.items():
            out[(kinds == kind) & (pitches == pitch)] = vocabulary.id(f"{name}={other}")
    together = np.cumsum(np.diff(kinds, prepend=kinds[:1]) != 0)
    return out[np.lexsort((np.where(kinds > 0, out, np.arange(len(out))), together))]


def count_notes(tokens: Iterable[str]) -> int:
    """How many notes begin: the ``ON`` tokens."""
    return sum(token.startswith("ON=") for token in tokens)


def mend(tokens: Iterable[str]) -> tuple[Piece, Counter[str]]:
    """What a model wrote, made a piece: what does not fit is left out, notes still on are ended at the bar line.

    Gives the piece and how often each repair was made; none where all was right.
    """
    reading = _Reading(MMM_UNIT, repair=True)
    place = -1
    for place, token in enumerate(tokens):
        reading.take(place, token)
        if token == PIECE_END:
            break
    return reading.piece(place + 1), reading.repairs


class _Reading:
    """Reads tokens one by one. With ``repair`` what is wrong is left out and counted, else it is a problem."""

    def __init__(self, mmm_unit: float, *, repair: bool = False) -> None:
        self.unit = mmm_unit
        self.repair = repair
        self.repairs: Counter[str] = Counter()
        self.problems = Problems("note tokens", InputError)
        self.signature: tuple[int, int] | None = None
        self.tempo = 120.0
        self.notes: list[Note] = []
        self.bars: list[int] = []
        self.end = 0  # of the bars so far
        self.now = 0.0  # twelfths since the bar began; whole numbers but for deltas that are yet to be rounded
        self.in_bar = self.begun = self.over = self.is_mmm = False
        self.on: dict[int, list[int]] = {}  # pitch: where notes of it began, the oldest first
        self.remarks: Counter[str] = Counter()

    def take(self, place: int, token: str) -> None:
        name, equals, value = token.partition("=")
        name = {"TIME_SIGNATURE": "TS", "NOTE_ON": "ON", "NOTE_OFF": "OFF", "TIME_DELTA": "TD"}.get(name, name)
        self.is_mmm |= equals != "" and token.startswith(("TIME_SIGNATURE=", "NOTE_", "TIME_DELTA="))
        wrong = self._do(name, value)
        if wrong and self.repair:
            self.repairs[f"left out {name}"] += 1
        elif wrong:
            self.problems.add(f"token {place}, {token!r}: {wrong}")

    def _do(self, name: str, value: str) -> str | None:
        """What is wrong with a token here, or None."""
        if self.over:
            return "expected nothing after the end of the piece"
        if name == PIECE_START:
            again, self.begun = self.begun, True
            return "expected once, at the beginning" if again else None
        if not self.begun and not self.repair:
            self.begun = True  # said once
            return f"expected {PIECE_START} first"
        self.begun = True
        match name:
            case "TS":
                return self._take_signature(value)
            case "ON" | "OFF" | "TD":
                return self._take_event(name, value) if self.in_bar else f"expected {BAR_START} before it"
            case "BAR_START":
                if self.in_bar:
                    return f"expected {BAR_END} before it"
                self.bars.append(self.end)
                self.in_bar, self.now = True, 0.0
            case "BAR_END":
                if not self.in_bar:
                    return f"expected {BAR_START} before it"
                return self._end_bar()
            case "PIECE_END" | "TRACK_END":
                self.over = name == PIECE_END
                return f"expected {BAR_END} before it" if self.in_bar else None
            case "TRACK_START":
                return None if not self.bars else "expected one track"
            case "BPM":
                number = _number(value)
                if number is None or not 0 < number < 1e4:
                    return "expected a tempo in beats a minute"
                self.tempo = number
            case _ if name in _MMM_HEADERS:
                pass
            case _:
                return "expected a token of one of the two spellings"
        return None

    def _take_signature(self, value: str) -> str | None:
        if self.signature is not None or self.bars:
            return "expected one time signature, before the first bar"
        if value not in TIME_SIGNATURES:
            return f"expected a time signature from {TIME_SIGNATURES[0]} to {TIME_SIGNATURES[-1]}"
        beats, unit = value.split("_")
        self.signature = int(beats), int(unit)
        return None

    def _take_event(self, name: str, value: str) -> str | None:
        if name == "TD":
            number = _number(value)
            if number is None or not 0 < number <= 1e4 or not (self.is_mmm or number == int(number)):
                return "expected a positive time" + ("" if self.is_mmm else ", a whole number of twelfths")
            self.now += number * self.unit if self.is_mmm else number
            return None
        if not value.isdecimal() or int(value) not in PITCHES:
            return f"expected a pitch from {PITCHES[0]} to {PITCHES[-1]}"
        now = self.bars[-1] + round(self.now)
        if name == "ON":
            self.on.setdefault(int(value), []).append(now)
            return None
        begun = self.on.get(int(value), [])
        if not begun:
            return "expected a note of this pitch to be on"
        return self._end_note(int(value), begun.pop(0), now)

    def _end_note(self, pitch: int, start: int, end: int) -> str | None:
        if end == start and self.is_mmm:
            self.remarks["notes shorter than a twelfth of a quarter made that long"] += 1
            end += 1
        if end == start:
            return "expected some time between its ON and its OFF"
        self.notes.append(Note(start, pitch, end - start))
        return None

    def _end_bar(self) -> str | None:
        start, written = self.bars[-1], round(self.now)
        self.in_bar = False
        whole = bar_length(self.signature or (4, 4))
        is_upbeat = len(self.bars) == 1 and 0 < written < whole
        self.end = start + (written if is_upbeat else max(whole, written))
        if self.is_mmm and not self.repair:  # notes may be held over the bar line
            return None
        held = sorted((pitch, begun) for pitch, starts in self.on.items() for begun in starts)
        self.on.clear()
        if not held:
            return None
        if not self.repair:
            return f"expected OFF before it for {', '.join(str(pitch) for pitch, _ in held)}"
        for pitch, begun in held:
            self._end_note(pitch, begun, start + written)
        self.repairs["ended at the bar line"] += len(held)
        return None

    def piece(self, length: int) -> Piece:
        """What was read. Raises InputError with every problem."""
        if self.in_bar and self.repair:
            self.repairs[f"added {BAR_END}"] += 1
            self._end_bar()
        if not self.repair:
            self.problems.expect(self.begun, f"expected {PIECE_START} first, got no token")
            ended = self.over or (self.is_mmm and not self.in_bar)
            self.problems.expect(ended, f"expected {PIECE_END} at the end, got none in {length} tokens")
            self.problems.expect(
                self.signature is not None or self.is_mmm, "expected TS= before the first bar, got none"
            )
            for pitch in sorted(pitch for pitch, starts in self.on.items() if starts):
                self.problems.add(f"expected OFF={pitch} before the end, got none")
        if self.signature is None:
            self.remarks["no time signature: taken to be 4/4"] += 1
        if len(self.bars) == 1 and self.end < bar_length(self.signature or (4, 4)):
            self.end = bar_length(self.signature or (4, 4))  # a single bar is no upbeat
        self.problems.raise_if_any()
        remarks = tuple(f"{count} × {text}" for text, count in sorted(self.remarks.items()) if count)
        end = max(self.end, max((note.end for note in self.notes), default=0))
        return Piece(
            tuple(self.notes), self.signature or (4, 4), tuple(self.bars), end, tempo=self.tempo, remarks=remarks
        )


def _waits(twelfths: int) -> list[str]:
    whole, rest = divmod(twelfths, LONGEST)
    return [f"TD={LONGEST}"] * whole + ([f"TD={rest}"] if rest else [])


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
