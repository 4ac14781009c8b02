"""Arpeggio tablature as batches, in a form for each architecture.

| form | the model is given | it says |
|---|---|---|
| ``encoder`` | the pitches | for each its string, ids 0 to 5 |
| ``encoder-decoder`` | source: the pitches; target: ``<begin>`` and the tab so far | the next ``string:fret`` |
| ``decoder`` | pitches, ``<begin>``, the tab so far, one after the other | the next ``string:fret`` |

Tokens that do not sound the pitch are never allowed, so that the pitch is right by construction and what is learned is
the choice of the string. The end of the tab is no choice either (one position a note) and is not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from twinformer.config import ModelConfig
from twinformer.data.batch import Batch, Part
from twinformer.data.guitar.arpeggio import MAX_NOTES, Arpeggio, ambiguity, sequences, varied_sequences
from twinformer.data.guitar.chords import PARTS, PartName, load_chords
from twinformer.data.guitar.dice import Dice
from twinformer.data.guitar.fretboard import FRETS, STANDARD, STRINGS, playable_range, strings_for
from twinformer.data.guitar.vocabulary import Vocabulary
from twinformer.errors import InputError, Problems

Form = Literal["encoder", "encoder-decoder", "decoder"]
FORMS: tuple[Form, ...] = ("encoder", "encoder-decoder", "decoder")

PAD, BEGIN, END = "<pad>", "<begin>", "<end>"
_LOW, _HIGH = playable_range()
_PITCHES = tuple(f"pitch:{pitch}" for pitch in range(_LOW, _HIGH + 1))
_POSITIONS = tuple(f"{string}:{fret}" for string in range(STRINGS) for fret in range(FRETS + 1))
#: batches are padded to a multiple of this, so that few programs are compiled
_STEP = 8
#: so many batches are sorted by length among themselves, so that little is padding
_POOL = 16

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def vocabularies(form: Form) -> dict[str, Vocabulary]:
    """``target``, what the model says; ``source`` as well where there are two vocabularies.

    The encoder's strings have the ids 0 to 5.
    """
    match form:
        case "encoder":
            return {"target": Vocabulary((*(f"string:{string}" for string in range(STRINGS)), PAD, *_PITCHES))}
        case "encoder-decoder":
            return {"source": Vocabulary((PAD, *_PITCHES)), "target": Vocabulary((PAD, BEGIN, END, *_POSITIONS))}
        case "decoder":
            return {"target": Vocabulary((PAD, BEGIN, END, *_PITCHES, *_POSITIONS))}
    raise InputError("arpeggio", [f"form: expected one of {', '.join(FORMS)}, got {form!r}"])


def suggested_config(form: Form) -> ModelConfig:
    """A model of half a million to 1.2 million parameters that learns the task within minutes on a CPU."""
    words = {name: len(vocabulary) for name, vocabulary in vocabularies(form).items()}
    sizes: dict[str, Any] = {
        "architecture": form,
        "vocab_size": words["target"],
        "context_length": 2 * MAX_NOTES + _STEP if form == "decoder" else MAX_NOTES + _STEP,
        "model_dim": 120,
        "key_dim": 24,
        "hidden_dim": 480,
        "num_heads": 5,
        "num_layers": 3,
        "activation": "gelu",
        "positions": "rotary",
        "head": "untied",
    }
    if form == "encoder-decoder":
        sizes |= {"source_vocab_size": words["source"], "num_encoder_layers": 3, "positions": "sinusoidal"}
    return ModelConfig(**sizes)


class ArpeggioTabs:
    """Batches of arpeggio tablature: a ``twinformer.data.batch.Dataset``.

    Training batches come shuffled anew in each epoch, of sequences of like length; with ``shuffle=False``, the
    default of the other parts, they come in order. The last batch is filled with rows that do not count. ``size``
    takes the first sequences of the part only. With ``variety`` (training only) every epoch has other sequences, in
    which so large a share of the chords are variations of the table's shapes, or inventions like them.
    Raises InputError naming every argument that is wrong.
    """

    def __init__(
        self,
        part: PartName,
        form: Form = "encoder",
        *,
        batch_size: int = 64,
        seed: int = 0,
        size: int | None = None,
        shuffle: bool | None = None,
        variety: float = 0.0,
    ) -> None:
        problems = Problems("ArpeggioTabs", InputError)
        problems.expect(part in PARTS, f"part: expected one of {', '.join(PARTS)}, got {part!r}")
        problems.expect(form in FORMS, f"form: expected one of {', '.join(FORMS)}, got {form!r}")
        problems.expect(batch_size >= 1, f"batch_size: expected at least 1, got {batch_size}")
        problems.expect(0 <= variety <= 1, f"variety: expected a share from 0 to 1, got {variety}")
        problems.expect(variety == 0 or part == "train", f"variety: expected 0 with part={part!r}, got {variety}")
        problems.raise_if_any()
        self.variety = variety
        self.form: Form = form
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = part == "train" if shuffle is None else shuffle
        self.sequences = sequences(part, size)
        words = vocabularies(form)
        self.vocabulary = words["target"]
        self.source_vocabulary = words.get("source")
        self.pad_id = self.vocabulary.id(PAD)
        #: what the tab begins after; an encoder has none
        self.begin_id = None if form == "encoder" else self.vocabulary.id(BEGIN)
        self.end_id = None if form == "encoder" else self.vocabulary.id(END)
        self._part = part
        self._order = functools.lru_cache(maxsize=2)(self._order_of)
        self._epoch = functools.lru_cache(maxsize=2)(self._sequences_of)

    @property
    def part(self) -> Part:
        notes = (
            f"{ambiguity(self.sequences):.1%} of the notes can be played on more than one string",
            f"{len(load_chords().left_out)} records of the chord table left out: wrong fingers or notes",
        )
        return Part(self._part, len(self.sequences), notes)

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.sequences) // self.batch_size)

    def batch(self, step: int) -> Batch:
        """The batch of ``step``, counted from 0 over all epochs. Raises InputError below 0."""
        if step < 0:
            raise InputError("ArpeggioTabs", [f"step: expected a whole number from 0, got {step}"])
        epoch, place = divmod(step, self.steps_per_epoch)
        drawn = self._epoch(epoch)
        return self.batch_of([drawn[i] for i in self._order(epoch)[place]])

    def batch_of(self, chosen: Sequence[Arpeggio]) -> Batch:
        """These sequences, at most ``batch_size``, as a batch of ``batch_size`` rows.

        Rows: the encoder's ``[B, n]``, the encoder-decoder's source and target ``[B, n]``, the decoder's ``[B, 2 n]``
        (n pitches, ``<begin>``, n - 1 positions), n rounded up.
        """
        if not 1 <= len(chosen) <= self.batch_size:
            raise InputError("ArpeggioTabs", [f"sequences: expected 1 to {self.batch_size}, got {len(chosen)}"])
        rows = [*chosen, *[chosen[0]] * (self.batch_size - len(chosen))]
        built = [self._row(sequence) for sequence in rows]
        width = -(-max(len(targets) for _, targets, _ in built) // _STEP) * _STEP
        B = self.batch_size
        targets = np.full((B, width), self.pad_id, np.int64)
        real = np.zeros((B, width), np.bool_)
        allowed = np.zeros((B, width, self.vocab_size), np.bool_)
        allowed[:, :, self.pad_id] = True  # where nothing counts, so that a softmax there is one
        lengths = np.array([len(inputs) for inputs, _, _ in built])
        mask = np.arange(width) < lengths[:, None]
        tokens = np.full((B, width), self.pad_id, np.int64)
        for b, (inputs, wanted, first) in enumerate(built):
            tokens[b, : len(inputs)] = inputs
            targets[b, first : len(wanted)] = wanted[first:]
            real[b, first : len(wanted)] = b < len(chosen)
            allowed[b, first : len(wanted)] = self.allowed(rows[b].pitches)
        if self.source_vocabulary is None:
            return Batch({"tokens": tokens, "padding_mask": mask}, targets, real, allowed)
        source = np.full((B, width), self.source_vocabulary.id(PAD), np.int64)
        for b, sequence in enumerate(rows):
            source[b, : len(sequence.pitches)] = self.source(sequence.pitches)
        inputs_by_name = {"source": source, "target": tokens, "source_padding_mask": mask, "target_padding_mask": mask}
        return Batch(inputs_by_name, targets, real, allowed)

    def source(self, pitches: Sequence[int]) -> Ids:
        """``[n]``: the ids that the model is given for pitches: a source, an encoder's tokens, a decoder's prompt
        without ``<begin>``. Raises InputError for a pitch outside the playable range."""
        return (self.source_vocabulary or self.vocabulary).encode([f"pitch:{pitch}" for pitch in pitches])

    def allowed(self, pitches: Sequence[int]) -> Flags:
        """``[n, V]``: for each pitch the tokens that sound it."""
        return self._sounding[np.asarray(pitches, np.int64) - _LOW]

    def positions(self, pitches: Sequence[int], ids: Sequence[int]) -> list[tuple[int, int]]:
        """(string, fret) of each note from the tokens that the model said, one a note.

        Raises InputError for a token that is no position or does not sound the pitch.
        """
        problems = Problems("tablature", InputError)
        problems.expect(len(ids) == len(pitches), f"tokens: expected one a note, {len(pitches)}, got {len(ids)}")
        found = []
        for place, (pitch, token) in enumerate(zip(pitches, self.vocabulary.decode(ids), strict=False)):
            options = {self._token(pitch, string): string for string in strings_for(pitch)}
            wanted = ", ".join(options)
            if problems.expect(token in options, f"note {place}: expected one of {wanted}, got {token!r}"):
                found.append((options[token], pitch - STANDARD[options[token]]))
        problems.raise_if_any()
        return found

    def _row(self, sequence: Arpeggio) -> tuple[Ids, Ids, int]:
        """Inputs, what should have been said after each, and the first place that counts."""
        tab = self.vocabulary.encode(
            [self._token(pitch, string) for pitch, string in zip(sequence.pitches, sequence.strings, strict=True)]
        )
        if self.form == "encoder":
            return self.source(sequence.pitches), tab, 0
        begun = np.concatenate([[self.begin_id], tab[:-1]]).astype(np.int64)
        if self.form == "encoder-decoder":
            return begun, tab, 0
        prompt = self.source(sequence.pitches)
        return np.concatenate([prompt, begun]), np.concatenate([prompt, tab]), len(prompt)

    def _token(self, pitch: int, string: int) -> str:
        return f"string:{string}" if self.form == "encoder" else f"{string}:{pitch - STANDARD[string]}"

    @functools.cached_property
    def _sounding(self) -> Flags:
        table = np.zeros((_HIGH - _LOW + 1, self.vocab_size), np.bool_)
        for pitch in range(_LOW, _HIGH + 1):
            table[pitch - _LOW, [self.vocabulary.id(self._token(pitch, string)) for string in strings_for(pitch)]] = (
                True
            )
        return table

    def _sequences_of(self, epoch: int) -> Sequence[Arpeggio]:
        if not self.variety:
            return self.sequences
        return varied_sequences(epoch, self.variety, len(self.sequences), self.seed)

    def _order_of(self, epoch: int) -> list[Ids]:
        """The numbers of the sequences in each batch of an epoch."""
        count = len(self.sequences)
        if not self.shuffle:
            return [np.arange(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]
        dice = Dice(self.seed, f"order/{epoch}")
        order = dice.permutation(count)
        lengths = np.array([len(sequence.pitches) for sequence in self._epoch(epoch)])
        batches = []
        for start in range(0, count, pool := self.batch_size * _POOL):
            some = order[start : start + pool]
            some = some[np.argsort(lengths[some], kind="stable")]
            batches += [some[i : i + self.batch_size] for i in range(0, len(some), self.batch_size)]
        return [batches[i] for i in dice.permutation(len(batches))]
