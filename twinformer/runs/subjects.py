"""What is measured: a model of a run, or a model directory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinformer import pretrained, shipped
from twinformer.checkpoint import CONFIG_FILE, Tensors, read_model
from twinformer.config import ModelConfig
from twinformer.data.batch import Dataset
from twinformer.errors import CheckpointError, ConfigError
from twinformer.learning import Evaluation, TrainingConfig
from twinformer.runs import backends, session
from twinformer.runs.checkpoints import CheckpointStore
from twinformer.runs.options import OPTIONS_FILE, RunOptions, read_toml


@dataclass(frozen=True)
class Subject:
    """A model to measure. ``run``: the directory of the run it is of, if it is of one."""

    directory: Path
    config: ModelConfig
    weights: Tensors
    run: Path | None = None
    options: RunOptions | None = None
    step: int | None = None


def find(place: Path, *, checkpoint: str = "best", tell: Callable[[str], None] = lambda _: None) -> Subject:
    """A run's ``best`` (if it has none, last) checkpoint, its ``last``, that of a step; a model directory; or, by its
    name, a model that comes with the package.
    """
    if not place.is_dir():
        place = shipped.directory(str(place)) or place
    if not (place / session.RUN_FILE).is_file():
        if not (place / CONFIG_FILE).is_file():
            raise CheckpointError(str(place), ["expected a run or a model directory, got neither"])
        if pretrained.is_published(place):
            published = pretrained.read(place)
            return Subject(place, published.config, dict(published.tensors))
        return Subject(place, *read_model(place))
    store = CheckpointStore(place / session.CHECKPOINTS, run=session.read_run(place)["run"], tell=tell)
    if checkpoint == "best":
        found = store.best() or store.last()
    elif checkpoint == "last":
        found = store.last()
    elif checkpoint.isdecimal():
        found = store.at(int(checkpoint))
    else:
        raise ConfigError("checkpoint", [f"expected best, last or a step, got {checkpoint!r}"])
    if found is None:
        raise CheckpointError(str(place), ["expected a run with a checkpoint, got one that has none yet"])
    config, weights = read_model(found.directory)
    options = RunOptions.from_dict(read_toml(place / OPTIONS_FILE))
    return Subject(found.directory, config, weights, place, options, found.step)


def total(subject: Subject, backend: str, batches: Iterable[Any]) -> Evaluation:
    """Sums over batches by the twin's own trainer."""
    trainer = backends.make_trainer(backend, subject.config, TrainingConfig())
    state = trainer.init(subject.weights)
    found = Evaluation()
    for batch in batches:
        found += trainer.evaluate(state, batch)
    return found


def batches(dataset: Dataset, limit: int | None) -> Iterable[Any]:
    return (dataset.batch(number) for number in range(min(dataset.steps_per_epoch, limit or dataset.steps_per_epoch)))
