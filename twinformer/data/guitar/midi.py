"""MIDI files in and out, through ``mido``.

Reading: every track and channel but the drums' (channel 10), rounded to twelfths of a quarter. Writing: one track,
480 ticks a quarter. Two things that MIDI has no word for are written as texts, and read again: bars that do not
follow from the time signature (a marker ``bar`` at each), and tablature (the text ``twinformer tablature`` with the
tuning; each string has a channel of its own, the highest the first, as guitar synthesizers have it).
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any

from twinformer.checkpoint import write_atomically
from twinformer.data.guitar.notes import QUARTER, Note, Piece, bar_length, bar_starts
from twinformer.errors import InputError

TICKS = 480
_PER_TWELFTH = TICKS // QUARTER
_DRUMS = 9
_BAR = "bar"
_TABLATURE = "twinformer tablature"
_MAX_BYTES = 10_000_000


def read_midi(file: str | Path) -> Piece:
    """A piece from a MIDI file. Raises InputError where it is none, broken, or has no notes."""
    import mido

    file = Path(file)
    try:
        size = file.stat().st_size
        if size > _MAX_BYTES:
            raise InputError(str(file), [f"expected at most {_MAX_BYTES} bytes, got {size}"])
        midi = mido.MidiFile(file)
    except InputError:
        raise
    except Exception as error:  # mido raises what it stumbles over: EOFError, OSError, IndexError, its own …
        raise InputError(str(file), [f"expected a MIDI file, got one that does not read: {error!r}"]) from error
    if midi.type == 2:
        raise InputError(
            str(file), ["expected a MIDI file of type 0 or 1, got type 2: its tracks are pieces of their own"]
        )
    if midi.ticks_per_beat < 1:
        raise InputError(str(file), [f"expected ticks a quarter, got the division {midi.ticks_per_beat} (SMPTE time)"])
    return _Reading(str(file), midi.ticks_per_beat).piece(midi.tracks)


def write_midi(piece: Piece, file: str | Path, *, program: int = 24, velocity: int = 80) -> None:
    """Write a piece; ``program`` 24 is a nylon-string guitar."""
    import mido

    has_tab = piece.has_tab and len(piece.tuning) <= _DRUMS
    events: list[tuple[int, int, Any]] = []  # time, rank within the moment, message
    beats, unit = piece.time_signature
    meta = [
        mido.MetaMessage("track_name", name=piece.title.encode("latin1", "replace").decode("latin1")),
        mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(piece.tempo)),
        mido.MetaMessage("time_signature", numerator=beats, denominator=unit),
    ]
    if has_tab:
        meta.append(mido.MetaMessage("text", text=" ".join((_TABLATURE, *map(str, piece.tuning)))))
    channels = range(len(piece.tuning) if has_tab else 1)
    meta += [mido.Message("program_change", program=program, channel=channel) for channel in channels]
    events += [(0, -2, message) for message in meta]
    length = bar_length(piece.time_signature)
    if piece.bars != tuple(range(0, piece.end, length)) or piece.end % length:
        events += [(start, -1, mido.MetaMessage("marker", text=_BAR)) for start in piece.bars]
    for note in piece.notes:
        channel = len(piece.tuning) - 1 - note.string if has_tab and note.string is not None else 0
        events.append((note.end, 0, mido.Message("note_off", note=note.pitch, channel=channel)))
        events.append((note.start, 1, mido.Message("note_on", note=note.pitch, velocity=velocity, channel=channel)))
    track = mido.MidiTrack()
    now = 0
    for time, _, message in [
        *sorted(events, key=lambda event: event[:2]),
        (piece.end, 2, mido.MetaMessage("end_of_track")),
    ]:
        track.append(message.copy(time=(time - now) * _PER_TWELFTH))
        now = time
    midi = mido.MidiFile(type=0, ticks_per_beat=TICKS, tracks=[track])
    write_atomically(Path(file), lambda part: midi.save(part))


class _Reading:
    def __init__(self, name: str, ticks: int) -> None:
        self.name, self.ticks = name, ticks
        self.notes: list[Note] = []
        self.signatures: list[tuple[int, tuple[int, int]]] = []
        self.markers: list[int] = []
        self.tempo: float | None = None
        self.tuning: tuple[int, ...] | None = None
        self.title = ""
        self.remarks: Counter[str] = Counter()

    def piece(self, tracks: list[Any]) -> Piece:
        end = max((self._track(track) for track in tracks), default=0)
        if not self.notes:
            raise InputError(self.name, ["expected a MIDI file with notes, got none"])
        last = max(note.end for note in self.notes)
        signatures = sorted(dict(self.signatures).items())
        if not signatures or signatures[0][0] > 0:
            signatures.insert(0, (0, (4, 4)))
        if self.markers:
            bars, end = tuple(sorted({0, *self.markers})), max(end, last)
        else:
            bars, end = bar_starts(signatures, max(last, end - end % max(1, bar_length(signatures[-1][1]))))
        remarks = tuple(f"{count} × {text}" for text, count in sorted(self.remarks.items()) if count)
        if len(signatures) > 1:
            remarks = (
                *remarks,
                f"{len(signatures)} time signatures: the bars follow them, the piece is given the first",
            )
        choices: dict[str, Any] = {} if self.tuning is None else {"tuning": self.tuning}
        return Piece(
            tuple(self.notes),
            signatures[0][1],
            bars,
            end,
            self.tempo or 120.0,
            title=self.title,
            remarks=remarks,
            **choices,
        )

    def _track(self, track: list[Any]) -> int:
        """Take a track's notes; gives its end."""
        import mido

        on: defaultdict[tuple[int, int], deque[int]] = defaultdict(deque)  # the oldest of a pitch ends first
        ticks = 0
        for message in track:
            ticks += message.time
            match message.type:
                case "note_on" | "note_off" if message.channel == _DRUMS:
                    self.remarks["notes of drums left out"] += message.type == "note_on" and message.velocity > 0
                case "note_on" if message.velocity > 0:
                    on[message.channel, message.note].append(ticks)
                case "note_on" | "note_off":
                    begun = on[message.channel, message.note]
                    if begun:
                        self._note(begun.popleft(), ticks, message.note, message.channel)
                case "time_signature":
                    self.signatures.append((self._time(ticks), (message.numerator, message.denominator)))
                case "set_tempo" if self.tempo is None and message.tempo > 0:
                    self.tempo = round(mido.tempo2bpm(message.tempo), 3)
                case "marker" if message.text == _BAR:
                    self.markers.append(self._time(ticks))
                case "track_name" if not self.title:
                    self.title = message.name
                case "text" if message.text.startswith(_TABLATURE):
                    numbers = message.text[len(_TABLATURE) :].split()
                    if numbers and all(number.isdecimal() and int(number) < 128 for number in numbers):
                        self.tuning = tuple(map(int, numbers))
        for (channel, pitch), starts in on.items():
            for start in starts:
                self.remarks["notes never ended: they last to the end of their track"] += 1
                self._note(start, ticks, pitch, channel)
        return self._time(ticks)

    def _note(self, start: int, end: int, pitch: int, channel: int) -> None:
        first, last = self._time(start), self._time(end)
        off = any(abs(ticks * QUARTER / self.ticks - self._time(ticks)) > 1e-6 for ticks in (start, end))
        self.remarks["notes moved to the nearest twelfth of a quarter"] += off
        string = fret = None
        if self.tuning is not None and channel < len(self.tuning):
            string = len(self.tuning) - 1 - channel
            fret = pitch - self.tuning[string]
            if fret < 0:
                self.remarks["notes below their string: left without a place"] += 1
                string = fret = None
        self.notes.append(Note(first, pitch, max(1, last - first), string, fret))

    def _time(self, ticks: int) -> int:
        return round(ticks * QUARTER / self.ticks)
