"""Everything that a run can be told, as one value: from flags, from a TOML file, and back into the run's options.toml.

The fields of ``RunOptions`` are the flags of ``twinformer train`` (``batch_size`` is ``--batch-size``) and the keys of
the file; ``model``, ``optimizer``, ``schedule`` and ``lora`` are tables of it, whose keys are the fields of
``ModelConfig``, ``OptimizerConfig``, ``ScheduleConfig`` and ``LoraConfig``.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from twinformer.checkpoint import read_text, write_atomically
from twinformer.config import Architecture, DType, ModelConfig
from twinformer.errors import ConfigError, Problems, TwinformerError
from twinformer.learning import LoraConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from twinformer.runs.option_checks import Told, check, fits

Backend = Literal["torch", "flax", "both"]
# as twinformer.data has them; named here, so that reading options does not load tokenizers
VocabularyKind = Literal["bpe", "wordpiece", "unigram", "words", "characters"]
DocumentKind = Literal["lines", "paragraphs", "file", "jsonl"]
Mode = Literal["documents", "stream"]
BestBy = Literal["loss", "accuracy"]

OPTIONS_FILE = "options.toml"

#: what may be another when a run goes on; all else would make it another run
FREE_ON_RESUME = (
    "backend",
    "steps",
    "minutes",
    "compile",
    "valid_every",
    "save_every",
    "keep",
    "log_every",
    "patience",
    "samples",
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of a run. None: the data's own default, or none at all."""

    data: Annotated[str, Told("What to learn: guitar-tab, guitar:FILE, text:FILE, pairs:FILE or masked:FILE.")] = (
        "guitar-tab"
    )
    valid: Annotated[str | None, Told("A file for validation; left out, a part of the data is kept aside for it.")] = (
        None
    )
    architecture: Annotated[
        Architecture | None, Told("encoder, decoder or encoder-decoder, where the data has a choice.")
    ] = None
    start_from: Annotated[
        str | None,
        Told("A model directory whose weights to start from, or the config.json or preset to build a new model from."),
    ] = None
    tokenizer: Annotated[
        str | None, Told("A directory with a tokenizer for texts; left out, that of start_from, or one is trained.")
    ] = None
    vocabulary: Annotated[
        VocabularyKind, Told("The tokenizer to train: bpe, wordpiece, unigram, words (between blanks) or characters.")
    ] = "bpe"
    vocab_size: Annotated[int, Told("Tokens that a trained tokenizer has at most.", least=7)] = 2000
    documents: Annotated[
        DocumentKind | None,
        Told("What a document of a text file is: lines, paragraphs, file or jsonl; left out, lines, or jsonl by name."),
    ] = None
    mode: Annotated[
        Mode, Told("Texts: rows of documents that do not see each other (documents), or one long text (stream).")
    ] = "documents"

    backend: Annotated[Backend, Told("Which twin learns: torch, flax, or both side by side on the same batches.")] = (
        "torch"
    )
    dtype: Annotated[DType, Told("Numbers of parameters and arithmetic: float32, bfloat16, float16 or float64.")] = (
        "float32"
    )
    compile: Annotated[bool, Told("PyTorch: compile loss and gradients. Flax always does.")] = False
    seed: Annotated[int, Told("Seed of the first weights, the dropout masks and the order of the data.", least=0)] = 0

    steps: Annotated[int | None, Told("Optimizer steps of the whole run.", least=1)] = None
    minutes: Annotated[float | None, Told("Stop (resumable) after so many minutes of this call.", above=0)] = None
    batch_size: Annotated[int | None, Told("Rows of a batch.", least=1)] = None
    accumulation: Annotated[int, Told("Batches whose gradients make one optimizer step.", least=1)] = 1
    length: Annotated[int | None, Told("Tokens in a row of text, and the model's context.", least=2)] = None
    smoothing: Annotated[float, Told("Label smoothing.", least=0)] = 0.0
    z_loss: Annotated[float, Told("Weight of the squared log-partition in the loss.", least=0)] = 0.0
    dropout: Annotated[float | None, Told("Dropout rate of the residual branches and embeddings.", least=0)] = None

    variety: Annotated[
        float | None,
        Told(
            "Tablature: share of the training chords that are not the table's but varied or invented. Pieces: share "
            "of them that an epoch has in notes half or twice as long.",
            least=0,
        ),
    ] = None
    exchange: Annotated[
        float,
        Told("Pieces: share of them that an epoch has with their pitches exchanged for each other.", least=0),
    ] = 0.0
    exchange_epochs: Annotated[
        int | None, Told("Pieces: the first epochs, in which pitches are exchanged; left out, all.", least=0)
    ] = None

    valid_every: Annotated[int, Told("Validate after so many steps.", least=1)] = 100
    valid_batches: Annotated[int | None, Told("Batches of a validation; left out, all of them.", least=1)] = None
    patience: Annotated[int | None, Told("Stop after so many validations without a new best.", least=1)] = None
    best_by: Annotated[
        BestBy | None, Told("What makes a validation the best: loss or accuracy. Default: loss; tablature: accuracy.")
    ] = None
    save_every: Annotated[int, Told("Save a checkpoint after so many steps; each new best is saved too.", least=1)] = (
        500
    )
    keep: Annotated[int, Told("Checkpoints kept besides the last and the best.", least=1)] = 2
    log_every: Annotated[int, Told("Ask for the losses, and show them, after so many steps.", least=1)] = 20
    samples: Annotated[int, Told("Show so many samples of what the model writes at each validation.", least=0)] = 0

    model: Annotated[dict[str, Any], Told("Fields of ModelConfig.")] = field(default_factory=dict)
    optimizer: Annotated[dict[str, Any], Told("Fields of OptimizerConfig.")] = field(default_factory=dict)
    schedule: Annotated[dict[str, Any], Told("Fields of ScheduleConfig; total_steps is steps.")] = field(
        default_factory=dict
    )
    lora: Annotated[dict[str, Any], Told("Fields of LoraConfig: with any, only adapters learn.")] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        problems = Problems("options of the run", ConfigError)
        for name, (hint, told) in described().items():
            check(problems, name, hint, told, getattr(self, name))
        _check_tables(problems, self)
        problems.raise_if_any()

    @property
    def backends(self) -> tuple[str, ...]:
        return ("torch", "flax") if self.backend == "both" else (self.backend,)

    @property
    def batch_shape(self) -> tuple[int, int]:
        """B and T. Raises ConfigError where the data was not asked yet what it proposes."""
        if self.batch_size is None or self.length is None:
            raise ConfigError("options of the run", ["batch_size, length: expected whole numbers, got none yet"])
        return self.batch_size, self.length

    def training(self) -> TrainingConfig:
        """What a trainer is given. ``steps`` must be known by now."""
        assert self.steps is not None
        return TrainingConfig(
            optimizer=OptimizerConfig(**self.optimizer),
            schedule=ScheduleConfig(**self.schedule, total_steps=self.steps),
            accumulation=self.accumulation,
            smoothing=self.smoothing,
            z_loss=self.z_loss,
            seed=self.seed,
            lora=LoraConfig(**_as_tuples(self.lora)) if self.lora else None,
        )

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """What the data proposes, wherever nothing was said: plain values and entries of tables."""
        changes: dict[str, Any] = {}
        for name, value in defaults.items():
            mine = getattr(self, name)
            if isinstance(value, Mapping):
                changes[name] = {**value, **mine}
            elif mine is None:
                changes[name] = value
        return self.replace(**changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, without those that are None (TOML has no such value) and empty tables."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value is not None and value != {}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "options of the run") -> Self:
        """Raises one ConfigError that names every key that is none and every value that is wrong."""
        known = {one.name for one in dataclasses.fields(cls)}
        problems = Problems(where, ConfigError)
        for name in values:
            problems.expect(name in known, f"{name}: unknown option")
        try:
            options = cls(**{name: value for name, value in values.items() if name in known})
        except ConfigError as error:
            problems.found.extend(error.problems)
        problems.raise_if_any()
        return options

    def write(self, file: Path) -> None:
        import tomli_w

        text = tomli_w.dumps(self.to_dict())
        write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))


def described() -> dict[str, tuple[Any, Told]]:
    """Each option by name: its type, and what is said of it."""
    hints = typing.get_type_hints(RunOptions, include_extras=True)
    return {name: typing.get_args(hint) for name, hint in hints.items()}


def read_toml(file: str | Path) -> dict[str, Any]:
    """The keys of a TOML file, unchecked. Raises ConfigError where it is none."""
    try:
        return tomllib.loads(read_text(Path(file)))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(file), [f"expected TOML, got text that does not parse: {error}"]) from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` wins; tables are merged key by key."""
    merged = dict(base)
    for name, value in over.items():
        mine = merged.get(name)
        merged[name] = {**mine, **value} if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return merged


def assignments(texts: list[str]) -> dict[str, Any]:
    """``optimizer.beta2=0.99`` and the like as keys and tables. A value is TOML; what is none is taken as text."""
    problems = Problems("--set", ConfigError)
    found: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        *tables, name = path.strip().split(".")
        if not problems.expect(bool(equals and name) and len(tables) <= 1, f"expected KEY=VALUE, got {text!r}"):
            continue
        try:
            held = tomllib.loads(f"it = {value}")["it"]
        except tomllib.TOMLDecodeError:
            held = value.strip()
        found = merge(found, {tables[0]: {name: held}} if tables else {name: held})
    problems.raise_if_any()
    return found


def resumed(saved: RunOptions, changes: Mapping[str, Any]) -> RunOptions:
    """The options of a run that goes on. Raises ConfigError naming every change that would make it another run."""
    problems = Problems("a run that goes on", ConfigError)
    for name, value in changes.items():
        if name not in FREE_ON_RESUME:
            mine = getattr(saved, name, None)
            same = mine == value or (isinstance(value, Mapping) and merge(mine or {}, value) == mine)
            problems.expect(same, f"{name}: expected {mine!r} as the run began with, got {value!r}")
    problems.raise_if_any()
    free = {name: value for name, value in changes.items() if name in FREE_ON_RESUME}
    return RunOptions.from_dict(merge(saved.to_dict(), free))


def _check_tables(problems: Problems, options: RunOptions) -> None:
    """Every key of every table, and the values, as the configs themselves judge them."""
    # steps may not be known yet: the data proposes it, and then this is looked at again
    steps = options.steps if fits(options.steps, int) and options.steps else 2**40
    tables: dict[str, tuple[Callable[..., object] | None, tuple[str, ...], dict[str, Any]]] = {
        "model": (None, _names(ModelConfig), {}),  # its values are looked at when the data's sizes are known
        "optimizer": (OptimizerConfig, _names(OptimizerConfig), {}),
        "schedule": (ScheduleConfig, _names(ScheduleConfig), {"total_steps": steps}),
        "lora": (LoraConfig, _names(LoraConfig), {}),
    }
    for table, (make, names, given) in tables.items():
        values = getattr(options, table)
        if not isinstance(values, Mapping):
            continue  # said above
        for name in values:
            problems.expect(name in names and name not in given, f"{table}.{name}: unknown option")
        known = {name: value for name, value in _as_tuples(values).items() if name in names}
        try:
            if make is not None:
                make(**{**known, **given})
        except TwinformerError as error:
            problems.found.extend(f"{table}.{problem}" for problem in error.problems)
        except TypeError as error:
            problems.add(f"{table}: expected values of the right kind, got: {error}")
    for name in ("variety", "exchange"):
        value = getattr(options, name)
        if value is not None and fits(value, float):
            problems.expect(value <= 1, f"{name}: expected a share from 0 to 1, got {value}")
    for name in ("smoothing", "dropout"):
        value = getattr(options, name)
        if fits(value, float):
            problems.expect(value < 1, f"{name}: expected a number below 1, got {value}")


def _names(kind: type) -> tuple[str, ...]:
    return tuple(one.name for one in dataclasses.fields(kind))


def _as_tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has lists where configs have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
