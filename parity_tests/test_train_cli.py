"""``twinformer train`` and ``twinformer evaluate`` as a person meets them: exit codes, messages, files, signals."""

import inspect
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import flax_impl
import torch_impl
from parity_tests.numpy_trainer import in_memory
from twinformer import memory
from twinformer.checkpoint import read_config, read_model, write_model
from twinformer.cli import app
from twinformer.data.guitar.arpeggio import score, sequences
from twinformer.data.guitar.baselines import lowest_fret
from twinformer.data.guitar.ngram import NGram, augmented
from twinformer.data.guitar.pieces import load_pieces
from twinformer.data.guitar.tokens import note_vocabulary
from twinformer.initializers import initial_weights
from twinformer.presets import preset
from twinformer.runs import backends, session
from twinformer.runs.adaptation import Adaptation, Reading, read_total
from twinformer.runs.data import KINDS, open_data, with_defaults
from twinformer.runs.evaluate import evaluate
from twinformer.runs.log import read_metrics
from twinformer.runs.loop import Run
from twinformer.runs.model import model_config
from twinformer.runs.options import RunOptions, described, read_toml
from twinformer.runs.subjects import find
from twinformer.tokenization import Tokenizer

SMALL = ["--steps", "4", "--valid-every", "2", "--width", "16", "--layers", "1", "--heads", "2", "--batch-size", "4"]
TEXT = [*SMALL, "--length", "16", "--vocabulary", "words", "--log-every", "1"]
FEW = {"steps": 2, "batch_size": 4, "length": 16, "vocabulary": "words"}


@pytest.fixture
def drawn():
    """Asked for by a test that wants its curves drawn."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch, request):
    monkeypatch.setattr(backends, "product_rate", lambda backend, dtype: 1e9)
    monkeypatch.setattr(memory, "keep_freed_memory", lambda **how: True)  # of the process of all tests
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(session, "draw", lambda directory: None)


@pytest.fixture
def tmp_path(tmp_path):
    with in_memory(tmp_path) as place:
        yield place


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(0)
    lines = (" ".join(f"w{(i * 7 + j) % 23}" for j in range(rng.integers(4, 20))) for i in range(80))
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "text.txt"


@pytest.fixture
def pairs(tmp_path):
    lines = (
        f"{' '.join(words)}\t{' '.join(reversed(words))}"
        for words in ([f"a{i % 9}", f"b{i % 7}", f"c{i}"] for i in range(90))
    )
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.tsv"


@pytest.fixture
def pieces(tmp_path):
    rng = np.random.default_rng(0)

    def bar(pitch):
        notes = " ".join(f"ON={one} TD={time} OFF={one}" for one, time in ((pitch, 6), (pitch + 2, 6), (pitch, 12)))
        return f"BAR_START {notes} BAR_END"

    lines = (
        f"PIECE_START TS=2_4 {' '.join(bar(int(p)) for p in rng.integers(50, 60, 6))} PIECE_END" for _ in range(30)
    )
    (tmp_path / "pieces.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "pieces.txt"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def good(*arguments):
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return done


def refused(*arguments, words, code=2):
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    for word in words:
        assert word in done.output, done.output


# ---- a run


def test_train_go_on_evaluate(tmp_path, text, drawn):
    place = tmp_path / "run"
    done = good("train", "--out", place, "--data", f"text:{text}", *TEXT, "--set", "optimizer.ema_decay=0.5")
    assert "finished after step 4, saved" in done.output
    assert f"measure it with: twinformer evaluate {place}" in done.output
    for name in ("options.toml", "run.json", "metrics.jsonl", "curves.png", "curves.svg", "tensorboard"):
        assert (place / name).exists(), name
    saved = RunOptions.from_dict(read_toml(place / "options.toml"))
    assert (saved.steps, saved.length, saved.optimizer["ema_decay"], saved.architecture) == (4, 16, 0.5, "decoder")
    last = place / "checkpoints" / "step-00000004"
    assert Tokenizer.load(last).vocab_size == read_config(last).vocab_size
    # a checkpoint is a model directory for both twins
    exported = [twin.export_weights(twin.load(last)) for twin in (torch_impl, flax_impl)]
    assert all(np.array_equal(exported[0][path], exported[1][path]) for path in exported[0])

    text.unlink()  # a run that goes on does not look at the file again
    refused(
        "train", "--resume", place, "--seed", "1", "--length", "8", words=["seed: expected 0", "length: expected 16"]
    )
    done = good("train", "--resume", place, "--steps", "6", "--log-every", "1")
    assert "going on from step 4" in done.output
    steps = [record["step"] for record in read_metrics(place / "metrics.jsonl") if record["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]

    done = good("evaluate", place, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    measures = {one["name"]: one["value"] for one in found["measures"]}
    assert measures["perplexity"] == pytest.approx(math.exp(measures["nats per target"]))
    valid = [record for record in read_metrics(place / "metrics.jsonl") if record["kind"] == "valid"]
    best = min(record["torch"]["loss"] for record in valid)
    assert measures["nats per target"] == pytest.approx(best, rel=1e-5)
    low, high = next(one["interval"] for one in found["measures"] if one["name"] == "accuracy")
    assert low <= measures["accuracy"] <= high


def test_options_from_a_file_with_flags_over_it(tmp_path, text):
    file = tmp_path / "options.toml"
    file.write_text(f'data = "text:{text}"\nsteps = 9\nseed = 5\n[model]\nmodel_dim = 8\nnum_heads = 2\n')
    place = tmp_path / "run"
    good("train", "--out", place, "--options", file, *TEXT, "--width", "24")
    saved = RunOptions.from_dict(read_toml(place / "options.toml"))
    assert (saved.steps, saved.seed, saved.model) == (4, 5, {"model_dim": 24, "num_heads": 2, "num_layers": 1})
    file.write_text("stepps = 9\nbatch = 3\n[optimizer]\nlr = 1.0\n")
    refused(
        "train", "--out", tmp_path / "no", "--options", file, words=["stepps", "batch:", "optimizer.lr", "3 problems"]
    )
    assert not (tmp_path / "no").exists()


def test_every_option_is_a_flag():
    from twinformer.commands.train import train

    flags = set(inspect.signature(train).parameters)
    assert set(described()) - {"model", "optimizer", "schedule", "lora"} <= flags


def test_what_cannot_run_is_exit_code_2(tmp_path, text):
    refused(
        "train",
        "--data",
        "texts:x",
        "--out",
        tmp_path / "a",
        words=["expected one of guitar-tab, guitar:FILE", "texts:x"],
    )
    refused("train", "--data", "text:absent", "--out", tmp_path / "a", words=["nothing by the name 'absent'"])
    refused("train", "--out", tmp_path / "a", "--resume", tmp_path, words=["got both"])
    refused("train", "--resume", tmp_path, words=["run.json"])
    refused(
        "train",
        "--out",
        tmp_path / "a",
        "--architecture",
        "decoder",
        "--data",
        f"masked:{text}",
        words=["architecture"],
    )
    refused("train", "--out", text / "x", "--data", f"text:{text}", words=["expected a place that can be written"])
    refused("evaluate", tmp_path, words=["expected a run or a model directory"])
    refused("train", "--out", tmp_path / "a", "--set", "oops", words=["expected KEY=VALUE"])


def test_divergence_is_exit_code_1_and_names_the_step(tmp_path, text):
    wild = ["--lr", "1e30", "--warmup", "0", "--set", "optimizer.name=sgd", "--save-every", "1"]
    place = tmp_path / "run"
    refused(
        "train",
        "--out",
        place,
        "--data",
        f"text:{text}",
        *TEXT,
        *wild,
        words=["training has diverged", "of step"],
        code=1,
    )
    assert (place / "metrics.jsonl").is_file()


def test_a_model_is_trained_further_on_its_own_vocabulary(tmp_path, text):
    good("train", "--out", tmp_path / "one", "--data", f"text:{text}", *TEXT)
    start = tmp_path / "one" / "checkpoints" / "step-00000004"
    place = tmp_path / "two"
    arguments = [
        "--data",
        f"text:{text}",
        "--steps",
        "3",
        "--batch-size",
        "4",
        "--length",
        "16",
        "--set",
        "lora.rank=2",
    ]
    good("train", "--out", place, "--start-from", start, *arguments)
    config, weights = read_model(place / "checkpoints" / "step-00000003")
    before = read_model(start)[1]
    changed = {path for path in weights if not np.array_equal(weights[path], before[path])}
    assert config == read_config(start)
    assert changed == {f"stack.blocks.0.attention.{name}.weight" for name in ("query", "value")}
    write_model(tmp_path / "gpt2", preset("gpt2"), initial_weights(preset("gpt2"), 0))
    refused(
        "train", "--out", tmp_path / "no", "--start-from", tmp_path / "gpt2", *arguments, words=["vocab_size: expected"]
    )


# ---- stopped


MANY = [*TEXT, "--steps", "1000000", "--valid-every", "1000000", "--save-every", "1000000"]


def test_sigterm_saves_and_says_how_to_go_on(tmp_path, text):
    """A process of its own, with curves and all."""
    place = tmp_path / "run"
    command = [sys.executable, "-m", "twinformer.cli", "train", "--out", place, "--data", f"text:{text}", *MANY]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 120
    while not ((place / "metrics.jsonl").is_file() and len(read_metrics(place / "metrics.jsonl")) > 5):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert f"go on with: twinformer train --resume {place}" in said
    (saved,) = (place / "checkpoints").glob("step-*")
    steps = [record["step"] for record in read_metrics(place / "metrics.jsonl") if record["kind"] == "train"]
    assert steps == list(range(1, int(saved.name[5:]) + 1))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_in_the_middle_of_a_step(tmp_path, text, monkeypatch, number, code):
    place, one_step = tmp_path / "run", Run._one_step

    def with_signal(self):
        if self.step == 3:
            signal.raise_signal(number)
        one_step(self)

    monkeypatch.setattr(Run, "_one_step", with_signal)
    done = run("train", "--out", place, "--data", f"text:{text}", *MANY)
    assert done.exit_code == code, done.output
    assert "stopped after step 4, saved" in done.output
    assert (place / "checkpoints" / "step-00000004").is_dir()
    monkeypatch.setattr(Run, "_one_step", one_step)
    told = "until 0.0001 minutes from now, as this run was told before"
    done = good("train", "--resume", place, "--minutes", "0.0001")
    assert "going on from step 4" in done.output
    assert "time is up after step 5, saved" in done.output
    assert told not in done.output
    done = good("train", "--resume", place)
    assert "time is up after step 6, saved" in done.output
    assert told in done.output


# ---- the kinds of data


def opened(tmp_path, spec, **more):
    options = with_defaults(RunOptions(data=spec, **FEW | more))
    (tmp_path / "data").mkdir()
    return options, open_data(options, tmp_path / "data")


@pytest.mark.parametrize("architecture", KINDS["guitar-tab"])
def test_tablature_for_each_architecture(tmp_path, architecture):
    """An untrained model: the pitch is right by construction; baselines are those of the data's own functions."""
    options = with_defaults(
        RunOptions(architecture=architecture, model={"model_dim": 16, "num_heads": 2, "num_layers": 1})
    )
    data = open_data(options, tmp_path)
    config, _ = model_config(options, data.model, data.usual)
    assert (config.architecture, config.model_dim, config.key_dim) == (architecture, 16, 8)
    assert (config.vocab_size, config.positions) == (data.train.vocab_size, data.usual["positions"])
    write_model(tmp_path / "model", config, initial_weights(config, 0))
    report = evaluate(find(tmp_path / "model"), data="guitar-tab", batch_size=6, limit=6)
    found = {(one.system, one.name): one.value for one in report.measures}
    assert found["model", "pitch right, per note"] == 1.0
    chosen = sequences("test", 6)
    lowest = score(chosen, [lowest_fret(one.pitches) for one in chosen])
    assert found["lowest fret", "string right, per note"] == lowest.accuracy
    assert found["lowest fret", "string right, whole sequence"] == lowest.whole_accuracy
    assert 0.1 < found["model", "string right, per note"] < found["viterbi", "string right, per note"]


def test_what_is_played_is_what_the_model_says_is_likeliest(tmp_path):
    """An encoder-decoder's greedy tab has, note by note, the highest logit given the tab before it."""
    from twinformer.data.guitar.arpeggio_data import ArpeggioTabs
    from twinformer.runs.guitar import predict

    options = with_defaults(
        RunOptions(architecture="decoder", model={"model_dim": 16, "num_heads": 2, "num_layers": 1})
    )
    data = open_data(options, tmp_path)
    config, _ = model_config(options, data.model, data.usual)
    model = backends.make_model("torch", config, initial_weights(config, 3))
    tabs = ArpeggioTabs("test", "decoder", batch_size=4)
    chosen = tabs.sequences[:4]
    played = predict(tabs, chosen, "torch", model)
    as_played = [
        type(one)(one.pitches, tuple(string for string, _ in found), one.shapes)
        for one, found in zip(chosen, played, strict=True)
    ]
    batch = tabs.batch_of(as_played)
    logits = np.where(batch.allowed, backends.caller("torch", model)(**batch.inputs), -np.inf)
    assert np.array_equal(logits.argmax(-1)[batch.real], batch.targets[batch.real])


def test_a_tab_marks_what_was_played_elsewhere():
    from twinformer.runs.guitar import draw_tab

    assert draw_tab([(5, 3), (0, 12), (1, 0)], [5, 1, 1]) == [
        "  e|3------|",
        "  B|-------|",
        "  G|-------|",
        "  D|-------|",
        "  A|------0|",
        "  E|--12!--|",
    ]


def test_pieces_are_measured_beside_n_grams(tmp_path, pieces):
    place = tmp_path / "run"
    good("train", "--out", place, "--data", f"guitar:{pieces}", *SMALL, "--length", "32")
    good("evaluate", place, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    values = {(one["system"], one["name"]): one["value"] for one in found["measures"]}
    for system in ("model", "unigram", "3-gram", "5-gram"):
        ratio = values[system, "nats per note"] / values[system, "nats per token"]
        assert ratio == pytest.approx(found["tokens"] / found["notes"])
    assert values["5-gram", "nats per token"] < values["unigram", "nats per token"]
    kept = [(place / "data" / f"{name}.txt").read_text().splitlines() for name in ("train", "valid")]
    assert sorted(kept[0] + kept[1]) == sorted(pieces.read_text().splitlines())
    assert not set(kept[0]) & set(kept[1])
    done = good("evaluate", place, "--data", f"guitar:{pieces}", "--train", pieces, "--limit", "3")
    assert "pieces 3" in done.output


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_pieces_are_measured_while_the_model_learns_from_them(tmp_path, pieces, backend):
    place = tmp_path / "run"
    good("train", "--out", place, "--data", f"guitar:{pieces}", *SMALL, "--length", "32")
    good("evaluate", place, "--limit", "2", "--adapt", "--backend", backend, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    values = {(one["system"], one["name"]): one["value"] for one in found["measures"]}
    assert values["model, adapting", "nats per token"] < values["model", "nats per token"]
    assert values["7-gram, adapting", "nats per token"] != values["7-gram, Kneser-Ney", "nats per token"]
    assert found["adapting"] == "stride 32, transposition 4, learning_rate 0.0002, beta2 0.98"


def test_pieces_are_measured_in_several_transpositions_at_once(tmp_path, pieces):
    """And adapting, in a context that is shorter than the stride of it would be; the n-gram does the same."""
    place = tmp_path / "run"
    good("train", "--out", place, "--data", f"guitar:{pieces}", *SMALL, "--length", "16")
    good("evaluate", place, "--limit", "2", "--transposition", "3", "--adapt", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["transposed"] == "stride 4, transposition 3"
    assert found["adapting"] == "stride 16, transposition 4, learning_rate 0.0002, beta2 0.98"
    subject, words = find(place), note_vocabulary()
    learnt, kept = (
        [words.encode(piece) for piece in load_pieces(place / "data" / f"{part}.txt")] for part in ("train", "valid")
    )
    kept = kept[:2]
    readings = {"transposed": Reading(stride=4, transposition=3), "adapting": Adaptation(stride=16)}
    ngram = NGram(augmented(learnt), len(words), 7, "kneser-ney")
    values = {(one["system"], one["name"]): one["value"] for one in found["measures"]}
    for name, reading in readings.items():
        trainer = backends.make_trainer("torch", subject.config, reading.training())
        options = {"context_length": 16, "pad_id": words.id("<pad>")}
        nats, count = read_total(trainer, subject.weights, kept, reading, **options)
        assert values[f"model, {name}", "nats per token"] == nats / count != values["model", "nats per token"]
        assert values[f"model, {name}", "nats per note"] == nats / found["notes"]
        nats, count = ngram.total(kept, transposition=reading.transposition, adapting=name == "adapting")
        assert values[f"7-gram, {name}", "nats per token"] == nats / count
    assert len({value for (_, name), value in values.items() if name == "nats per token"}) == 9


VARIED = {"variety": 0.5, "exchange": 0.25, "exchange_epochs": 3}


@pytest.mark.parametrize("asked", [{}, VARIED], ids=["by default", "asked for"])
def test_pieces_are_varied_for_training(tmp_path, pieces, asked):
    _, data = opened(tmp_path, f"guitar:{pieces}", **asked)
    plain = {"variety": 0.0, "exchange": 0.0, "exchange_epochs": None}
    for part, wanted in ((data.train, plain | asked), (data.valid, plain)):
        assert {name: getattr(part, name) for name in plain} == wanted


def test_what_cannot_be_varied_is_said_all_at_once(tmp_path, text, pieces):
    place, asked = tmp_path / "run", [*SMALL, "--variety", "0.1", "--exchange", "0.2", "--exchange-epochs", "3"]
    refused(
        *("train", "--out", place, "--data", f"text:{text}", *asked),
        words=[
            "3 problems",
            f"variety: expected 0 or nothing with data 'text:{text}' (it is for guitar-tab and guitar), got 0.1",
            "exchange: expected 0 or nothing",
            "exchange_epochs: expected 0 or nothing",
        ],
    )
    fewer = [*SMALL, *asked[-4:]]
    refused("train", "--out", place, "--data", "guitar-tab", *fewer, words=["2 problems", "(it is for guitar)"])
    refused(
        *("train", "--out", place, "--data", f"guitar:{pieces}", *SMALL, "--exchange-epochs", "3"),
        words=["exchange_epochs: expected a share to exchange with it (exchange), got 3 alone"],
    )
    assert not place.exists()
    assert with_defaults(RunOptions(data=f"guitar:{pieces}", exchange_epochs=0)).exchange == 0


def test_memory_is_kept_before_a_run_begins_or_goes_on(tmp_path, text, monkeypatch):
    seen, begin, go_on = [], session.begin, session.go_on
    monkeypatch.setattr(session, "begin", lambda *what, **how: seen.append("begun") or begin(*what, **how))
    monkeypatch.setattr(session, "go_on", lambda *what, **how: seen.append("gone on") or go_on(*what, **how))
    monkeypatch.setattr(memory, "keep_freed_memory", lambda **how: seen.append(how))
    good("train", "--out", tmp_path / "run", "--data", f"text:{text}", *TEXT)
    good("train", "--resume", tmp_path / "run", "--steps", "5")
    assert seen == [{"all_of_it": True}, "begun", {"all_of_it": True}, "gone on"]


@pytest.mark.parametrize("wrong", [["--heads", "3"], ["--start-from", "absent"], ["--batch-size", "0"]], ids=str)
def test_what_did_not_become_a_run_leaves_nothing(tmp_path, text, wrong):
    there = tmp_path / "there"
    there.mkdir()
    for place in (tmp_path / "run", there):
        refused("train", "--out", place, "--data", f"text:{text}", *TEXT, *wrong, words=["expected"])
    assert not (tmp_path / "run").exists()
    assert there.is_dir()
    good("train", "--out", there, "--data", f"text:{text}", *TEXT)


def test_only_pieces_are_transposed_and_adapted_to(tmp_path, text):
    place = tmp_path / "run"
    good("train", "--out", place, "--data", f"text:{text}", *SMALL, "--length", "32")
    wanted = "expected pieces (guitar:FILE), got data text:"
    refused(
        *("evaluate", place, "--adapt", "--transposition", "0"),
        words=["2 problems", f"adapt: {wanted}", f"transposition: {wanted}"],
    )


def test_pairs_for_both_architectures(tmp_path, pairs):
    place = tmp_path / "run"
    good("train", "--out", place, "--data", f"pairs:{pairs}", *TEXT, "--samples", "1")
    assert "nats per target" in good("evaluate", place, "--data", f"pairs:{pairs}").output
    options, data = opened(tmp_path, f"pairs:{pairs}", architecture="decoder")
    assert data.train.batch(0).inputs.keys() == {"tokens"}
    assert model_config(options, data.model, data.usual)[0].context_length == 34


def test_masked_text(tmp_path, text):
    good("train", "--out", tmp_path / "run", "--data", f"masked:{text}", *TEXT)
    assert "accuracy" in good("evaluate", tmp_path / "run", "--data", f"masked:{text}").output


def test_parts_share_no_document(tmp_path, text):
    """Equal documents come to the same side; a file for validation is taken as it is."""
    lines = text.read_text().splitlines()
    text.write_text("\n".join(lines * 2) + "\n")
    _, data = opened(tmp_path, f"text:{text}")
    documents = []
    for name in ("train", "valid"):
        from twinformer.data.tokens import TokenFile

        tokens = TokenFile(tmp_path / "data" / f"{name}.tokens")
        documents.append([tuple(tokens.document(i).tolist()) for i in range(tokens.num_documents)])
    assert len(documents[0]) + len(documents[1]) == 160
    assert documents[1]
    assert not set(documents[0]) & set(documents[1])
    again = with_defaults(RunOptions(data=f"text:{text}", **FEW))
    text.unlink()
    assert np.array_equal(open_data(again, tmp_path / "data").train.batch(3).targets, data.train.batch(3).targets)


def test_few_documents_are_cut_at_the_end(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text(" ".join(f"w{i % 11}" for i in range(400)))
    opened(tmp_path, f"text:{file}", mode="stream")
    from twinformer.data.tokens import TokenFile

    sizes = [TokenFile(tmp_path / "data" / f"{name}.tokens").num_tokens for name in ("train", "valid")]
    assert sizes == [380, 20]


# ---- what is imported


def test_help_imports_no_framework():
    script = (
        "import sys\n"
        "from twinformer.cli import app\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'jax', 'flax', 'tensorboardX', 'matplotlib') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=Path.cwd())
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
