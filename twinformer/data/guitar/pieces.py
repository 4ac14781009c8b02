"""Solo guitar pieces for a decoder: windows of note tokens, attributions, and nats per note.

Training: windows of T tokens, each piece transposed by −4 … +4 half-tones, drawn anew in each epoch; if asked, some of
them in other note values or with exchanged pitches.
Measuring: every token but the first of each piece is predicted once, with at least ``T - stride`` tokens before it
where the piece has them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from twinformer.checkpoint import read_text
from twinformer.config import ModelConfig
from twinformer.data.batch import Batch, Part
from twinformer.data.guitar.dice import Dice
from twinformer.data.guitar.tokens import (
    PAD,
    PIECE_END,
    PIECE_START,
    count_notes,
    exchanged,
    note_vocabulary,
    paced,
    paces,
    read_pieces,
    room,
    transpose,
)
from twinformer.errors import InputError, Problems

PUBLIC_DOMAIN = "Public Domain"
_COLUMNS = ("split", "line", "source file in the Mutopia Project", "composer", "title", "licence")
#: how far a piece is transposed in training at most, in half-tones
TRANSPOSITION = 4

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Attribution:
    """Where one line of a split comes from."""

    split: str
    line: int
    source: str
    composer: str
    title: str
    licence: str


def read_attributions(file: str | Path) -> tuple[Attribution, ...]:
    """The table of attributions. Raises InputError naming every line that does not parse or comes twice."""
    lines = read_text(Path(file)).removesuffix("\n").split("\n")
    problems = Problems(str(file), InputError)
    header = "\t".join(_COLUMNS)
    problems.expect(lines[:1] == [header], f"line 1: expected {header!r}, got {lines[0] if lines else ''!r}")
    found: dict[tuple[str, int], Attribution] = {}
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if not problems.expect(
            len(fields) == len(_COLUMNS) and fields[1].isdecimal() and all(fields),
            f"line {number}: expected {len(_COLUMNS)} fields, the second a line number, got {line!r}",
        ):
            continue
        entry = Attribution(fields[0], int(fields[1]), *fields[2:])
        key = (entry.split, entry.line)
        problems.expect(key not in found, f"line {number}: expected one entry for {key[0]} line {key[1]}, got two")
        found[key] = entry
    problems.raise_if_any()
    return tuple(found.values())


def with_licence(
    pieces: Sequence[tuple[str, ...]],
    attributions: Iterable[Attribution],
    split: str,
    licences: Sequence[str] = (PUBLIC_DOMAIN,),
) -> list[tuple[tuple[str, ...], Attribution]]:
    """The pieces of a split under these licences, each with its attribution. Line 1 is ``pieces[0]``.

    Raises InputError where a piece has no attribution or an attribution no piece: then nobody knows what is what.
    """
    by_line = {entry.line: entry for entry in attributions if entry.split == split}
    problems = Problems(f"attributions of {split}", InputError)
    lines = range(1, len(pieces) + 1)
    problems.expect(
        set(by_line) == set(lines),
        f"expected an entry for each line from 1 to {len(pieces)}, "
        f"got none for {sorted(set(lines) - set(by_line))[:10]}, others for {sorted(set(by_line) - set(lines))[:10]}",
    )
    known = {entry.licence for entry in by_line.values()}
    for licence in licences:
        problems.expect(licence in known, f"licence: expected one of {sorted(known)}, got {licence!r}")
    problems.raise_if_any()
    return [(pieces[line - 1], by_line[line]) for line in lines if by_line[line].licence in licences]


def nats_per_note(total: float, pieces: Iterable[Sequence[str]]) -> float:
    """The whole negative log-likelihood over the number of notes: comparable between encodings, unlike that per
    token.
    """
    notes = sum(count_notes(tokens) for tokens in pieces)
    if notes == 0:
        raise InputError("nats per note", ["expected pieces with notes, got none"])
    return total / notes


def suggested_config(context_length: int = 256) -> ModelConfig:
    """A decoder of 0.85 M parameters; transposition, not dropout, keeps it from learning the pieces by heart."""
    return ModelConfig(
        architecture="decoder",
        vocab_size=len(note_vocabulary()),
        context_length=context_length,
        model_dim=128,
        key_dim=32,
        hidden_dim=512,
        num_heads=4,
        num_layers=4,
        activation="gelu",
        positions="rotary",
        initializer_scale_residual=True,
    )


def _share(dice: Dice) -> float:
    """A number from 0 to less than 1."""
    return dice.below(1 << 20) / (1 << 20)


class GuitarPieces:
    """Windows over pieces of note tokens, one piece a row: a ``twinformer.data.batch.Dataset``.

    With ``training`` each epoch takes as many windows from a piece as cover it, the first at its beginning, the last at
    its end, those between shifted a little, and transposes the piece. A share ``variety`` of the pieces, where they can
    be, is written in notes half or twice as long; in the first ``exchange_epochs`` epochs (None: in all) a share
    ``exchange`` has its pitches exchanged for each other, so that only the piece itself tells what may come. All are
    functions of (seed, epoch, piece), whatever the others are.

    Without ``training`` windows advance by ``stride`` (default T / 4) and a window counts only the tokens that the one
    before it did not. Windows of pieces shorter than T are padded at their end, without a mask: a causal model
    sees nothing of what comes after a token, and attention under no mask but its own is faster. The last batch is
    filled with rows that do not count.

    Raises InputError for tokens outside the vocabulary and for every argument that is wrong.
    """

    def __init__(
        self,
        pieces: Sequence[Sequence[str]],
        *,
        context_length: int = 256,
        batch_size: int = 16,
        seed: int = 0,
        training: bool = True,
        transposition: int = TRANSPOSITION,
        variety: float = 0.0,
        exchange: float = 0.0,
        exchange_epochs: int | None = None,
        stride: int | None = None,
        name: str | None = None,
    ) -> None:
        T = context_length
        problems = Problems("GuitarPieces", InputError)
        problems.expect(len(pieces) > 0, "pieces: expected at least one, got none")
        problems.expect(T >= 2, f"context_length: expected at least 2, got {T}")
        problems.expect(batch_size >= 1, f"batch_size: expected at least 1, got {batch_size}")
        problems.expect(transposition >= 0, f"transposition: expected a whole number from 0, got {transposition}")
        for what, share in (("variety", variety), ("exchange", exchange)):
            problems.expect(0 <= share <= 1, f"{what}: expected a share from 0 to 1, got {share}")
            problems.expect(training or not share, f"{what}: expected 0 without training, got {share}")
        problems.expect(
            exchange_epochs is None or exchange_epochs >= 0,
            f"exchange_epochs: expected a whole number from 0, got {exchange_epochs}",
        )
        problems.expect(stride is None or 1 <= stride <= T, f"stride: expected 1 to {T}, got {stride}")
        for number, tokens in enumerate(pieces):
            ends = len(tokens) >= 2 and tokens[0] == PIECE_START and tokens[-1] == PIECE_END
            problems.expect(ends, f"piece {number}: expected tokens from {PIECE_START} to {PIECE_END}")
        problems.raise_if_any()
        self.vocabulary = note_vocabulary()
        self.pad_id = self.vocabulary.id(PAD)
        self.begin_id = self.vocabulary.id(PIECE_START)
        self.end_id = self.vocabulary.id(PIECE_END)
        self.context_length = T
        self.batch_size = batch_size
        self.seed = seed
        self.training = training
        self.stride = max(1, T // 4) if stride is None else stride
        self.pieces = [tuple(tokens) for tokens in pieces]
        self._ids = [self.vocabulary.encode(tokens) for tokens in self.pieces]
        self._moves = [room(ids, transposition if training else 0) for ids in self._ids]
        self.variety, self.exchange, self.exchange_epochs = variety, exchange, exchange_epochs
        self._name = name or ("train" if training else "valid")
        self._epoch = functools.lru_cache(maxsize=2)(self._windows_of)
        self._varied = functools.lru_cache(maxsize=2 * len(self.pieces))(self.varied)

    @property
    def part(self) -> Part:
        tokens = sum(map(len, self.pieces))
        notes = sum(map(count_notes, self.pieces))
        narrow = sum(len(moves) < max(map(len, self._moves)) for moves in self._moves)
        remarks = [f"{tokens} tokens, {notes} notes"] + [f"{narrow} pieces with less room to transpose"] * (narrow > 0)
        return Part(self._name, len(self.pieces), tuple(remarks))

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self._windows_count // self.batch_size)

    def batch(self, step: int) -> Batch:
        """The batch of ``step``, counted from 0 over all epochs: tokens, targets ``[B, T]``. Raises InputError below
        0.
        """
        if step < 0:
            raise InputError("GuitarPieces", [f"step: expected a whole number from 0, got {step}"])
        epoch, place = divmod(step, self.steps_per_epoch)
        chosen = self._epoch(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        B, T = self.batch_size, self.context_length
        tokens, targets = (np.full((B, T), self.pad_id, np.int64) for _ in range(2))
        real = np.zeros((B, T), np.bool_)
        for b in range(B):
            piece, start, fresh = chosen[b if b < len(chosen) else 0]
            ids = self._varied(epoch, piece)[start : start + T + 1]
            n = len(ids) - 1
            tokens[b, :n], targets[b, :n] = ids[:-1], ids[1:]
            real[b, fresh:n] = b < len(chosen)
        return Batch({"tokens": tokens}, targets, real)

    def transposition(self, epoch: int, piece: int) -> int:
        """By how many half-tones a piece is moved in an epoch."""
        return Dice(self.seed, f"transposition/{epoch}/{piece}").choice(self._moves[piece])

    def varied(self, epoch: int, piece: int) -> Ids:
        """The ids of a piece as they are in an epoch."""
        ids = transpose(self._ids[piece], self.transposition(epoch, piece))
        if not self.variety and not self.exchange:
            return ids
        dice = Dice(self.seed, f"scramble/{epoch}/{piece}")
        if (self.exchange_epochs is None or epoch < self.exchange_epochs) and _share(dice) < self.exchange:
            ids = exchanged(ids, dice.permutation)
        if self.variety:
            drawn = _share(dice)
            pace = 0.5 if drawn < self.variety / 2 else 2.0 if drawn < self.variety else 1.0
            ids = paced(ids, pace) if pace in paces(ids) else ids
        return ids

    @functools.cached_property
    def _windows_count(self) -> int:
        return sum(len(self._starts(0, piece)) for piece in range(len(self.pieces)))

    def _windows_of(self, epoch: int) -> list[tuple[int, int, int]]:
        """(piece, start, the first place that counts) of each window of an epoch."""
        windows = [(piece, *pair) for piece in range(len(self.pieces)) for pair in self._starts(epoch, piece)]
        if not self.training:
            return windows
        return [windows[i] for i in Dice(self.seed, f"order/{epoch}").permutation(len(windows))]

    def _starts(self, epoch: int, piece: int) -> list[tuple[int, int]]:
        """Where the windows of a piece begin, and which place of each is the first that counts.

        How many there are depends on the piece alone.
        """
        T = self.context_length
        last = max(0, len(self._ids[piece]) - 1 - T)  # the start of the last whole window
        if not self.training:
            starts = [*range(0, last, self.stride), last]
            return [(s, 0 if i == 0 else starts[i - 1] + T - s) for i, s in enumerate(starts)]
        count = -(-(last + T) // T)
        dice = Dice(self.seed, f"windows/{epoch}/{piece}")
        starts = [0]
        for i in range(1, count - 1):  # evenly spaced, then moved by less than half the space
            shift = _share(dice) - 0.5
            starts.append(int((i + shift) * last / (count - 1)))
        return [(start, 0) for start in (starts if count == 1 else [*starts, last])]


def load_pieces(
    file: str | Path, *, attributions: str | Path | None = None, licences: Sequence[str] = (PUBLIC_DOMAIN,)
) -> list[tuple[str, ...]]:
    """The pieces of a file of note tokens; with a table of attributions only those under the licences.

    The split is the last word of the file's name: ``mutopia_train.txt`` is ``train``.
    """
    pieces = read_pieces(file)
    if attributions is None:
        return pieces
    split = Path(file).stem.rpartition("_")[2]
    return [tokens for tokens, _ in with_licence(pieces, read_attributions(attributions), split, licences)]
