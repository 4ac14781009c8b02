"""The loop of a run with a NumPy trainer: going on bit by bit, ends, failures, logs; then with the twins themselves."""

import io
import json
import math
import shutil
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from parity_tests.numpy_trainer import NumpyTrainer, Tokens, in_memory, tiny_config
from twinformer.checkpoint import write_model
from twinformer.config import ModelConfig
from twinformer.data.batch import Batch
from twinformer.errors import CheckpointError, ConfigError
from twinformer.initializers import initial_weights
from twinformer.learning import Metrics
from twinformer.presets import preset
from twinformer.runs import backends, session
from twinformer.runs.checkpoints import CheckpointStore
from twinformer.runs.data import RunData
from twinformer.runs.events import EventFile
from twinformer.runs.flops import forward_flops, training_flops
from twinformer.runs.intervals import clustered, wilson
from twinformer.runs.log import MetricsLog, draw_curves, read_metrics
from twinformer.runs.loop import DivergedError, Run
from twinformer.runs.model import model_config
from twinformer.runs.options import RunOptions, assignments, merge, read_toml, resumed
from twinformer.runs.screen import Screen
from twinformer.runs.signals import Signals
from twinformer.runs.speed import real_tokens

USUAL = {"steps": 12, "accumulation": 2, "valid_every": 3, "save_every": 4, "log_every": 5, "schedule": {"peak": 0.5}}


@pytest.fixture
def tmp_path(tmp_path):
    with in_memory(tmp_path) as place:
        yield place


class Made:
    """A run with the NumPy trainer, what it said, and its directory."""

    def __init__(
        self, directory, *, twins=("torch",), keep=3, spoil=None, clock=None, valid=None, trainer=None, **more
    ):
        self.directory, self.said = Path(directory), io.StringIO()
        self.directory.mkdir(exist_ok=True)
        self.options = RunOptions(**USUAL | {"keep": keep} | more)
        self.train = Tokens()
        self.store = CheckpointStore(self.directory / "checkpoints", run="mine", keep=keep, tell=self._say)
        make = trainer or NumpyTrainer
        self.run = Run(
            self.options,
            config=tiny_config(),
            trainers={name: make(tiny_config(), self.options.training(), spoil=spoil) for name in twins},
            train=self.train,
            valid=valid or Tokens(seed=1, steps_per_epoch=2),
            store=self.store,
            log=lambda start: MetricsLog(self.directory, start=start, tell=self._say),
            screen=Screen(Console(file=self.said, width=200), seconds=0),
            record={"options": self.options.to_dict()},
            **({} if clock is None else {"clock": clock}),
        )

    def _say(self, text):
        self.said.write(f"{text}\n")

    def begun(self):
        self.run.start()
        return self

    def resumed(self):
        self.run.resume(self.store.last())
        return self

    def go(self, signals=None):
        return self.run.go(signals or Signals())

    @property
    def lines(self):
        """Without the speed, which no two runs share."""
        return [record for record in read_metrics(self.directory / "metrics.jsonl") if record["kind"] != "speed"]

    def state(self, twin="torch"):
        return self.run.trainers[twin].export_state(self.run.states[twin])


class At(Signals):
    """SIGTERM comes when the run has done so many steps."""

    def __init__(self, made, step):
        self._made, self._step = made, step
        super().__init__()

    @property
    def received(self):
        return signal.SIGTERM if self._made.run.step >= self._step else None

    @received.setter
    def received(self, value):
        pass


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# ---- going on


def test_a_run_stopped_after_any_step_goes_on_bit_by_bit(tmp_path):
    """The state, the best, the losses and the batches are those of the run that was never stopped."""
    whole = Made(tmp_path / "whole").begun()
    assert whole.go().reason == "finished"
    assert whole.train.asked == list(range(24))
    for step in range(1, 12):
        first = Made(tmp_path / str(step)).begun()
        ending = first.go(At(first, step))
        assert (ending.reason, ending.step) == ("signal", step)
        second = Made(tmp_path / str(step)).resumed()
        assert second.go().reason == "finished"
        assert first.train.asked + second.train.asked == list(range(24))
        assert equal(second.state(), whole.state())
        assert second.run.best == whole.run.best
        assert second.run.without_best == whole.run.without_best
        assert second.lines == whole.lines
        assert second.store.best().step == whole.store.best().step


def test_a_run_killed_between_checkpoints_does_the_steps_again(tmp_path):
    """Killed after step 7 with a checkpoint of step 6: metrics of step 7 are not there twice."""
    whole = Made(tmp_path / "whole").begun()
    whole.go()

    class Killed(NumpyTrainer):
        def step(self, state, batches):
            if state["step"] == 7:
                raise MemoryError
            return super().step(state, batches)

    dead = Made(tmp_path / "dead", trainer=Killed, log_every=1).begun()
    with pytest.raises(MemoryError):
        dead.go()
    assert [record["step"] for record in dead.lines if record["kind"] == "train"] == list(range(1, 8))
    second = Made(tmp_path / "dead").resumed()
    assert second.run.step == 6
    second.go()
    assert equal(second.state(), whole.state())
    assert second.lines == whole.lines


def test_another_twin_takes_the_state_that_is_there(tmp_path):
    whole = Made(tmp_path / "whole").begun()
    whole.go()
    first = Made(tmp_path / "run").begun()
    first.go(At(first, 5))
    second = Made(tmp_path / "run", twins=("flax",)).resumed()
    second.go()
    assert equal(second.state("flax"), whole.state())
    assert second.store.last().backends == ("flax",)
    both = Made(
        tmp_path / "run", twins=("torch", "flax"), steps=14, schedule={"peak": 0.5, "name": "constant"}
    ).resumed()
    both.go()
    assert equal(both.state("flax"), both.state("torch"))
    assert both.run.largest_difference == 0.0


def test_a_torn_last_checkpoint_costs_the_steps_since_the_one_before(tmp_path):
    whole = Made(tmp_path / "whole").begun()
    whole.go()
    first = Made(tmp_path / "run").begun()
    first.go(At(first, 8))
    (first.store.directory / "step-00000008" / "model.safetensors").write_bytes(b"torn")
    second = Made(tmp_path / "run").resumed()
    assert second.run.step == 6
    assert "going back to the one before: step 6" in second.said.getvalue()
    second.go()
    assert equal(second.state(), whole.state())


# ---- how it ends


class Worse(NumpyTrainer):
    """Validation gets worse after step 6."""

    def evaluate(self, state, batch):
        found = super().evaluate(state, batch)
        return type(found)(found.count * abs(state["step"] - 6.0) + 1, found.count, found.correct)


def test_validation_best_and_early_stop(tmp_path):
    made = Made(tmp_path, trainer=Worse, steps=40, patience=2, save_every=100).begun()
    ending = made.go()
    assert (ending.reason, ending.step) == ("early stop", 12)
    assert ending.best["step"] == 6
    assert made.store.best().step == 6
    assert made.store.last().step == 12
    again = Made(tmp_path, trainer=Worse, steps=40, patience=2).resumed()
    assert (again.go().reason, again.run.step) == ("early stop", 12)


def test_a_best_that_could_not_be_saved_is_no_best(tmp_path, monkeypatch):
    """Validation is best after step 6, which finds no room: best.json keeps naming what is there."""
    made = Made(tmp_path, trainer=Worse).begun()
    Full(made.store, monkeypatch, {6})
    made.go()
    assert made.store.best().step == 3
    assert not (made.store.directory / "step-00000006").exists()


def test_the_best_can_be_chosen_by_accuracy(tmp_path):
    class Opposed(Worse):
        """Accuracy is best where the loss is worst: before step 6 the earlier, after it the later the better."""

        def evaluate(self, state, batch):
            found = super().evaluate(state, batch)
            return type(found)(found.total, found.count, int(abs(state["step"] - 6)))

    by_loss = Made(tmp_path / "loss", trainer=Opposed).begun()
    by_accuracy = Made(tmp_path / "accuracy", trainer=Opposed, best_by="accuracy").begun()
    assert by_loss.go().best["step"] == 6
    assert by_accuracy.go().best["step"] == 12


def test_the_time_limit_ends_a_run_that_can_go_on(tmp_path):
    ticks = iter(range(0, 10**6, 1))
    made = Made(tmp_path, clock=lambda: next(ticks), minutes=0.5, steps=10**6).begun()
    ending = made.go()
    assert ending.reason == "time"
    assert 1 < ending.step < 30
    assert made.store.last().step == ending.step


def test_signals_are_noted_once_and_interrupt_the_second_time():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert (signals.received, signals.exit_code) == (signal.SIGTERM, 143)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_during_validation_leaves_it_for_later(tmp_path):
    """Validation at step 3 is left; on going on it is done, and the run is the one that was never stopped."""
    whole = Made(tmp_path / "whole").begun()
    whole.go()
    first = Made(tmp_path / "run").begun()
    first.go(At(first, 3))
    assert not [record for record in first.lines if record["kind"] == "valid"]
    second = Made(tmp_path / "run").resumed()
    second.go()
    assert second.lines == whole.lines


# ---- what goes wrong


@pytest.mark.parametrize("what", ["loss", "gradient_norm", "weights"])
@pytest.mark.parametrize("log_every", [1, 50])
def test_what_is_not_finite_ends_the_run_and_is_never_saved(tmp_path, what, log_every):
    made = Made(tmp_path, spoil={7: what}, log_every=log_every).begun()
    with pytest.raises(DivergedError) as caught:
        made.go()
    message = str(caught.value)
    assert "the last good checkpoint is that of step 6" in message
    # a NaN in the weights alone is met when they are to be saved, after step 8
    named = {
        "loss": "loss of step 8 is nan",
        "gradient_norm": "gradient norm of step 8 is inf",
        "weights": "table.weight: expected finite values, got 1",
    }
    assert named[what] in message
    last = made.store.last()
    assert last.step == 6
    assert all(np.isfinite(tensor).all() for tensor in last.state("torch").values())
    assert [record["step"] for record in made.lines if record["kind"] == "train"] == list(
        range(1, 8 + (what == "weights"))
    )


def test_a_validation_that_is_not_finite_ends_the_run(tmp_path):
    class Nothing(Tokens):
        def batch(self, step):
            batch = super().batch(step)
            batch.real[:] = False
            return batch

    class Honest(NumpyTrainer):
        def evaluate(self, state, batch):
            found = super().evaluate(state, batch)
            return type(found)(0.0, 0, 0) if batch.count == 0 else found

    made = Made(tmp_path, valid=Nothing(), trainer=Honest).begun()
    with pytest.raises(DivergedError, match="validation loss after step 3 is nan"):
        made.go()


class Full:
    """A disk that is full for some of the saves."""

    def __init__(self, store, monkeypatch, steps):
        self.tried = []
        write = store._write

        def full(part, step, *rest):
            self.tried.append(step)
            if step in steps:
                raise OSError(28, "No space left on device")
            return write(part, step, *rest)

        monkeypatch.setattr(store, "_write", full)


def test_a_full_disk_in_the_middle_is_told_and_tried_again(tmp_path, monkeypatch):
    whole = Made(tmp_path / "whole").begun()
    whole.go()
    made = Made(tmp_path / "run").begun()
    disk = Full(made.store, monkeypatch, {3, 4, 6})
    assert made.go().reason == "finished"
    assert disk.tried == [3, 4, 6, 8, 9, 12]
    assert "not saved, the run goes on and tries again" in made.said.getvalue()
    assert "No space left on device" in made.said.getvalue()
    assert made.store.last().step == 12
    assert equal(made.state(), whole.state())
    assert made.store.best() is not None


def test_a_full_disk_at_the_end_is_an_error_and_the_run_can_go_on(tmp_path, monkeypatch):
    whole = Made(tmp_path / "whole").begun()
    whole.go()
    made = Made(tmp_path / "run").begun()
    Full(made.store, monkeypatch, {9, 12})
    with pytest.raises(CheckpointError, match=r"No space left.*(\n.*)*the last checkpoint is that of step 8"):
        made.go()
    second = Made(tmp_path / "run").resumed()
    second.go()
    assert equal(second.state(), whole.state())
    assert second.lines == whole.lines


def test_a_log_that_cannot_be_written_waits_in_memory(tmp_path, monkeypatch):
    from twinformer.runs import log

    made = Made(tmp_path).begun()
    real, calls = log.append, []

    def full(file, data):
        calls.append(file)
        if len(calls) in (1, 2):
            raise OSError(28, "No space left on device")
        real(file, data)

    monkeypatch.setattr(log, "append", full)
    made.go()
    assert [record["step"] for record in made.lines if record["kind"] == "train"] == list(range(1, 13))
    assert made.said.getvalue().count("the log cannot be written") == 1


# ---- losses are not asked for at every step


def test_losses_are_asked_for_together(tmp_path):
    asked = []

    class Late:
        def __init__(self, made, step, value):
            self.made, self.step, self.value = made, step, value

        def __float__(self):
            asked.append((self.step, self.made.run.step))
            return self.value

    class Lazy(NumpyTrainer):
        def step(self, state, batches):
            state, m = super().step(state, batches)
            return state, Metrics(m.step, Late(made, m.step, m.loss), m.gradient_norm, m.count, m.learning_rate)

    made = Made(tmp_path, trainer=Lazy, valid_every=100, save_every=100).begun()
    made.go()
    # the first alone (it compiles), then every five, and the rest at the end
    assert asked == [(0, 1), *((s, 5) for s in (1, 2, 3, 4)), *((s, 10) for s in range(5, 10)), (10, 12), (11, 12)]


def test_two_twins_are_compared_at_every_step(tmp_path):
    class Off(NumpyTrainer):
        def step(self, state, batches):
            state, m = super().step(state, batches)
            factor = 1 + 1e-6 * (m.step == 4) * (self is made.run.trainers["flax"])
            return state, Metrics(m.step, m.loss * factor, m.gradient_norm, m.count, m.learning_rate)

    made = Made(tmp_path, twins=("torch", "flax"), trainer=Off).begun()
    ending = made.go()
    apart = {record["step"]: record["difference"] for record in made.lines if record["kind"] == "train"}
    assert apart == {step: 0.0 for step in apart} | {5: pytest.approx(1e-6, rel=1e-5)}
    assert ending.largest_difference == apart[5]
    assert "apart at most 1.0e-06" in made.said.getvalue()
    assert made.store.last().backends == ("torch", "flax")


# ---- logs


def test_a_metrics_file_that_was_cut_short_is_read_to_its_last_whole_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n{"kind": "tr')
    log = MetricsLog(tmp_path, start=1)
    log.add({"kind": "train", "step": 2, "torch": {"loss": 1.5}})
    log.flush()
    assert [record.get("torch") for record in read_metrics(tmp_path / "metrics.jsonl")] == [None, {"loss": 1.5}]


def test_event_files_are_read_by_the_protocol_of_tensorboard(tmp_path):
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    file = EventFile(tmp_path, start=300)
    file.add(301, {"train/loss/torch": 1.5, "rate": 2e-9})
    file.flush()
    file.add(70_000, {"x": 3})
    file.flush()
    data, place, found = file.file.read_bytes(), 0, []
    while place < len(data):
        (size,) = struct.unpack_from("<Q", data, place)
        body = data[place + 12 : place + 12 + size]
        sums = (data[place + 8 : place + 12], data[place + 12 + size : place + 16 + size])
        assert sums == tuple(struct.pack("<I", masked_crc32c(part)) for part in (data[place : place + 8], body))
        found.append(event_pb2.Event.FromString(body))
        place += 16 + size
    version, restart, first, second = found
    assert version.file_version == "brain.Event:2"
    assert (restart.step, restart.session_log.status) == (301, event_pb2.SessionLog.START)
    assert first.step == 301
    assert [(v.tag, v.simple_value) for v in first.summary.value] == [
        ("train/loss/torch", 1.5),
        ("rate", pytest.approx(2e-9)),
    ]
    assert (second.step, second.summary.value[0].simple_value) == (70_000, 3.0)


def test_the_curves_of_two_twins_lie_over_each_other(tmp_path):
    made = Made(tmp_path, twins=("torch", "flax")).begun()
    made.go()
    records = [record | {"difference": 1e-9} if record["kind"] == "train" else record for record in made.lines]
    draw_curves(records, [tmp_path / "c.png", tmp_path / "c.svg"], title="two")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    picture = (tmp_path / "c.svg").read_text()
    assert all(colour in picture for colour in ("#d1495b", "#2e6f95", "#444444"))
    one = [{name: value for name, value in record.items() if name not in ("flax", "difference")} for record in records]
    draw_curves(one, [tmp_path / "one.svg"], title="one")
    assert "#2e6f95" not in (tmp_path / "one.svg").read_text()


# ---- options


def test_all_problems_of_options_at_once():
    with pytest.raises(ConfigError) as caught:
        RunOptions.from_dict(
            {
                "stpes": 3,
                "dtype": "float8",
                "batch_size": 0,
                "minutes": 0,
                "seed": True,
                "dropout": 1.0,
                "model": {"width": 3},
                "optimizer": {"nam": "sgd", "beta1": 2.0},
                "schedule": {"total_steps": 4, "warmup_steps": -1},
                "lora": {"targets": ["q"]},
            }
        )
    for part in (
        "stpes: unknown option",
        "dtype: expected 'float64' or",
        "batch_size: expected a whole number or nothing from 1, got 0",
        "minutes: expected a number or nothing above 0, got 0",
        "seed: expected a whole number from 0, got True",
        "dropout: expected a number below 1",
        "model.width: unknown option",
        "optimizer.nam: unknown option",
        "optimizer.beta1: expected a number in [0, 1), got 2.0",
        "schedule.total_steps: unknown option",
        "schedule.warmup_steps: expected",
        "lora.targets: expected one of",
    ):
        assert part in str(caught.value), str(caught.value)
    assert "12 problems" in str(caught.value)


def test_options_go_to_a_file_and_back(tmp_path):
    options = RunOptions(
        data="text:a", steps=7, minutes=1.5, model={"gated": True}, optimizer={"ema_decay": 0.5}, lora={"rank": 2}
    )
    options.write(tmp_path / "options.toml")
    assert RunOptions.from_dict(read_toml(tmp_path / "options.toml")) == options
    training = options.training()
    assert (training.optimizer.ema_decay, training.schedule.total_steps, training.lora.rank) == (0.5, 7, 2)
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ConfigError, match="expected TOML"):
        read_toml(tmp_path / "bad.toml")


def test_assignments_and_merging():
    found = assignments(["optimizer.beta2=0.9", "data=text:x", "model.gated=true", 'lora.targets=["up"]'])
    assert found == {
        "optimizer": {"beta2": 0.9},
        "data": "text:x",
        "model": {"gated": True},
        "lora": {"targets": ["up"]},
    }
    assert merge({"a": 1, "t": {"x": 1, "y": 2}}, {"t": {"y": 3}}) == {"a": 1, "t": {"x": 1, "y": 3}}
    with pytest.raises(ConfigError, match=r"expected KEY=VALUE, got 'steps'(\n.*)*a\.b\.c=1"):
        assignments(["steps", "a.b.c=1"])


def test_what_would_make_it_another_run_is_refused_all_at_once():
    saved = RunOptions(seed=3, steps=9, optimizer={"beta2": 0.9})
    again = resumed(saved, {"steps": 20, "backend": "flax", "seed": 3, "optimizer": {"beta2": 0.9}})
    assert (again.steps, again.backend, again.seed) == (20, "flax", 3)
    with pytest.raises(ConfigError) as caught:
        resumed(saved, {"seed": 4, "batch_size": 8, "optimizer": {"beta2": 0.8}, "minutes": 2.0})
    assert "3 problems" in str(caught.value)
    assert "seed: expected 3 as the run began with, got 4" in str(caught.value)


def test_the_model_of_a_run(tmp_path):
    asked = {"architecture": "decoder", "vocab_size": 50, "context_length": 16}
    plain, weights = model_config(RunOptions(model={"model_dim": 64}, dropout=0.2), asked, {"num_heads": 8})
    assert (plain.key_dim, plain.hidden_dim, plain.dropout, weights) == (8, 256, 0.2, None)
    llama, _ = model_config(RunOptions(start_from="llama", model={"model_dim": 24}), asked, {"num_heads": 8})
    wanted = preset("llama").replace(
        vocab_size=50,
        context_length=16,
        model_dim=24,
        key_dim=4,
        value_dim=4,
        rotary_dim=4,
        num_kv_heads=6,
        hidden_dim=96,
    )
    assert llama == wanted
    file = tmp_path / "config.json"
    file.write_text(preset("gpt2").to_json())
    assert model_config(RunOptions(start_from=str(file)), asked, {})[0] == preset("gpt2").replace(
        vocab_size=50, context_length=16
    )
    with pytest.raises(ConfigError, match=r"a model directory, a config\.json or a preset"):
        model_config(RunOptions(start_from="nothing"), asked, {})


@pytest.mark.parametrize(("name", "grows"), [("llama", True), ("gpt2", False)])
def test_a_longer_context_where_positions_are_a_formula(name, grows, tmp_path):
    """A model that was trained on short rows goes on with longer ones, unless its positions are a table."""
    config = preset(name)
    write_model(tmp_path / "model", config, initial_weights(config, 3))
    options = RunOptions(start_from=str(tmp_path / "model"))
    asked = {"architecture": "decoder", "vocab_size": config.vocab_size}
    for length, grown in ((config.context_length // 2, 0), (config.context_length * 2, config.context_length)):
        if grown and not grows:
            with pytest.raises(ConfigError, match=rf"context_length: expected {length} or more .* got {grown}"):
                model_config(options, asked | {"context_length": length}, {})
            continue
        found, weights = model_config(options, asked | {"context_length": length}, {})
        assert found == config.replace(context_length=config.context_length + grown)
        assert weights is not None


# ---- arithmetic


_LABELS = {"head": "tokens", "num_labels": 3}
_ONE_LABEL = {"head": "sequence", "num_labels": 3, "pool": "mean", "pooler": "tanh"}


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("textbook-encoder", {}),
        ("textbook-encoder-decoder", {"head_transform": True}),
        ("llama", {}),
        ("llama", {"head_transform": True}),
        ("textbook-encoder", _LABELS),
        ("textbook-encoder", _ONE_LABEL),
    ],
    ids=["encoder", "two stacks, transform", "llama", "llama, transform", "labels", "one label a row"],
)
def test_operations_are_those_that_pytorch_counts(name, choices):
    """PyTorch counts the whole square of causal attention: the half that is hidden is added here."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from torch_impl.fused import explicit_formulas

    config = preset(name).replace(context_length=32, **choices)
    model = backends.make_model("torch", config, dict(_weights(config)))
    B, S, T = 2, 9, 7
    if config.architecture == "encoder-decoder":
        inputs = {"source": torch.zeros(B, S, dtype=torch.int64), "target": torch.zeros(B, T, dtype=torch.int64)}
    else:
        inputs = {"tokens": torch.zeros(B, T, dtype=torch.int64)}
    with explicit_formulas(), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    hidden = 0
    if config.architecture != "encoder":
        pairs = T * T - T * (T + 1) // 2
        hidden = config.num_layers * 2 * B * config.num_heads * (config.key_dim + config.value_dim) * pairs
    assert forward_flops(config, inputs) + hidden == counter.get_total_flops()
    assert training_flops(config, inputs) == 3 * forward_flops(config, inputs)


def test_tokens_are_counted_without_padding():
    """By the mask, by segments, or, where a row has neither, up to the last target that counts."""
    tokens = np.ones((3, 5), np.int64)
    real = np.array([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], np.bool_)
    assert real_tokens(Batch({"tokens": tokens}, tokens, real)) == 3 + 5 + 0
    assert real_tokens(Batch({"tokens": tokens, "padding_mask": ~real}, tokens, real)) == 12
    assert real_tokens(Batch({"tokens": tokens, "segments": tokens * [1, 1, 2, 2, 0]}, tokens, real)) == 12
    pair = {"source": tokens, "source_padding_mask": real, "target": tokens}
    assert real_tokens(Batch(pair, tokens, real)) == 3 + 15


def _weights(config):
    from twinformer.initializers import initial_weights

    return initial_weights(config, 0)


def test_intervals():
    """Wilson's by hand for 8 of 10; groups that agree inside count as one case each, not as many."""
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 5)[0] == 0.0
    sizes = np.full(400, 10)
    alike = clustered(np.repeat([0, 10], 200), sizes)
    half = (alike[1] - alike[0]) / 2
    assert half == pytest.approx(1.96 * math.sqrt(0.25 / 400), rel=0.1)
    single = wilson(2000, 4000)
    assert half > 2.5 * (single[1] - single[0]) / 2


# ---- the twins themselves


def twin_options(backend, **more):
    sizes = {"model_dim": 16, "num_layers": 1, "num_heads": 2, "attention_dropout": 0.1}
    return RunOptions(
        **{
            "backend": backend,
            "dtype": "float64",
            "steps": 6,
            "accumulation": 2,
            "valid_every": 2,
            "dropout": 0.1,
            "batch_size": 4,
            "model": sizes,
            "optimizer": {"ema_decay": 0.9, "clip_norm": 0.5},
            "schedule": {"warmup_steps": 2, "peak": 1e-2},
            **more,
        }
    )


@pytest.fixture
def small_data(monkeypatch):
    asked = {"architecture": "decoder", "vocab_size": 13, "context_length": 6}
    data = RunData(Tokens(), Tokens(seed=1, steps_per_epoch=1), asked)
    monkeypatch.setattr(session, "open_data", lambda options, place: data)
    monkeypatch.setattr(session, "with_defaults", lambda options: options)
    monkeypatch.setattr(backends, "product_rate", lambda backend, dtype: 1e9)


def losses(directory):
    records = [record for record in read_metrics(directory / "metrics.jsonl") if record["kind"] == "train"]
    return [next(record[name] for name in ("torch", "flax") if name in record)["loss"] for record in records]


QUIET = Screen(Console(file=io.StringIO()))


def begun(directory, twin, stop=None):
    """A run of one twin to its end, or until it was stopped after so many steps."""
    run = session.begin(twin_options(twin), directory, screen=QUIET)
    run.go(Signals() if stop is None else At(type("Holder", (), {"run": run}), stop))
    return run


def test_a_run_of_one_twin_goes_on_in_either(tmp_path, small_data):
    """In the same twin bit by bit; in the other to 1e-13 in float64: losses, weights, averages and moments."""
    for one in ("torch", "flax"):
        whole = begun(tmp_path / one, one)
        expected = whole.trainers[one].export_state(whole.states[one])
        begun(tmp_path / f"{one}-stopped", one, stop=3)
        for other in ("torch", "flax"):
            place = tmp_path / f"{one}-{other}"
            shutil.copytree(tmp_path / f"{one}-stopped", place)
            run = session.go_on(place, {"backend": other}, screen=QUIET)
            run.go(Signals())
            found = run.trainers[other].export_state(run.states[other])
            if one == other:
                assert losses(place) == losses(tmp_path / one)
                assert equal(found, expected)
                continue
            assert losses(place) == pytest.approx(losses(tmp_path / one), rel=1e-13)
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert np.abs(found[name] - tensor).max() <= 1e-13 * max(np.abs(tensor).max(), 1e-3), name


def test_both_twins_side_by_side(tmp_path, small_data):
    run = session.begin(twin_options("both"), tmp_path, screen=Screen(Console(file=io.StringIO())))
    ending = run.go(Signals())
    assert 0 <= ending.largest_difference < 1e-13
    last = run.store.last()
    assert last.backends == ("torch", "flax")
    from twinformer.checkpoint import read_model

    config, weights = read_model(last.directory)
    for name in ("torch", "flax"):
        model = backends.make_model(name, config, weights)
        call = backends.caller(name, model)
        assert call(**Tokens().batch(0).inputs).shape == (4, 5, 13)


# ---- a run's directory


def test_a_run_refuses_a_place_that_is_taken_and_another_process(tmp_path, small_data):
    screen = Screen(Console(file=io.StringIO()))
    options = twin_options("torch")
    session.begin(options, tmp_path / "run", screen=screen)
    with pytest.raises(ConfigError, match="got a run"):
        session.begin(options, tmp_path / "run", screen=screen)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="expected an empty place"):
        session.begin(options, tmp_path / "other", screen=screen)
    with (
        session.locked(tmp_path / "run"),
        pytest.raises(ConfigError, match="got one in use"),
        session.locked(tmp_path / "run"),
    ):
        pass
    with pytest.raises(CheckpointError, match=r"without run\.json"):
        session.go_on(tmp_path / "other", {}, screen=screen)


def test_a_run_without_a_checkpoint_begins_again_and_other_data_is_refused(tmp_path, small_data, monkeypatch):
    screen = Screen(Console(file=io.StringIO()))
    session.begin(twin_options("torch"), tmp_path / "run", screen=screen)
    again = session.go_on(tmp_path / "run", {}, screen=screen)
    assert again.step == 0
    asked = {"architecture": "decoder", "vocab_size": 13, "context_length": 6}
    other = RunData(Tokens(seed=5), Tokens(seed=1, steps_per_epoch=1), asked)
    monkeypatch.setattr(session, "open_data", lambda options, place: other)
    with pytest.raises(ConfigError, match="expected the batches that the run began with"):
        session.go_on(tmp_path / "run", {}, screen=screen)


def test_the_identity_of_a_run_is_checked(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"format": 7, "run": "x", "config": {}, "data": "y"}))
    with pytest.raises(CheckpointError, match="format: expected 1, got 7"):
        session.read_run(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(CheckpointError, match="4 problems"):
        session.read_run(tmp_path)


def test_configurations_are_whole(tmp_path, small_data):
    session.begin(twin_options("torch"), tmp_path / "run", screen=Screen(Console(file=io.StringIO())))
    identity = session.read_run(tmp_path / "run")
    config = ModelConfig.from_dict(identity["config"])
    assert (config.param_dtype, config.vocab_size, config.attention_dropout) == ("float64", 13, 0.1)
