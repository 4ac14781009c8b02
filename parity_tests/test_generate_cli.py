"""``twinformer generate``: text, pieces and tablature from small untrained models, in both backends."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from twinformer.checkpoint import write_model
from twinformer.cli import app
from twinformer.data.guitar.arpeggio_data import suggested_config, vocabularies
from twinformer.data.guitar.fretboard import pitch_of
from twinformer.data.guitar.pieces import suggested_config as suggested_decoder
from twinformer.data.guitar.tokens import note_vocabulary
from twinformer.data.vocabulary import train_tokenizer
from twinformer.decoding import Generated
from twinformer.initializers import initial_weights
from twinformer.presets import preset
from twinformer.runs.writing import partings

SMALL = {"model_dim": 16, "key_dim": 8, "value_dim": 8, "hidden_dim": 24, "num_heads": 2, "num_kv_heads": 2}
MELODY = "40 47 52 56 59 64"


def run(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def save(directory, config, **files):
    """A model directory with weights far from uniform, and what lies beside it."""
    weights = {path: 4 * w if w.ndim == 2 else w for path, w in initial_weights(config, 3).items()}
    write_model(directory, config, weights)
    for name, text in files.items():
        (directory / name.replace("_json", ".json")).write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    config = suggested_config("encoder-decoder").replace(
        **SMALL, rotary_dim=0, num_layers=1, num_encoder_layers=1, initializer_std=0.3
    )
    return save(tmp_path_factory.mktemp("tab") / "model", config)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    config = suggested_decoder(64).replace(**SMALL, rotary_dim=0, positions="learned", num_layers=1)
    return save(tmp_path_factory.mktemp("pieces") / "model", config, vocabulary_json=note_vocabulary().to_json())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    place = tmp_path_factory.mktemp("text") / "model"
    tokenizer = train_tokenizer("characters", ["the cat sat on the mat", "a dog ate the cat"] * 5, vocab_size=64)
    config = preset("gpt2").replace(vocab_size=tokenizer.vocab_size, num_layers=1, initializer_std=0.3)
    save(place, config)
    tokenizer.save(place)
    return place


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_tablature_sounds_the_pitches(tab, backend, tmp_path):
    """Whatever the weights: every note is on a string and fret that sound its pitch."""
    file = tmp_path / "found.json"
    found = run(tab, MELODY, "45 50", "--backend", backend, "--json", file)
    assert found.exit_code == 0, found.output
    assert found.stdout.count("twinformer tablature") == 2
    target = vocabularies("encoder-decoder")["target"]
    rows = json.loads(file.read_text())["written"][backend]
    said = target.decode(rows[0]["tokens"])[:6]
    positions = [tuple(map(int, token.split(":"))) for token in said]
    assert [pitch_of(*position) for position in positions] == [int(p) for p in MELODY.split()]


def test_both_backends_write_the_same(tab, pieces, text):
    for arguments in (
        (tab, MELODY, "43 50 55"),
        (pieces, "", "PIECE_START TS=3_8", "--max-new-tokens", 12, "--top-p", 0.9, "--seed", 5),
        (text, "the c", "a", "--max-new-tokens", 12, "--temperature", 1.5, "--dtype", "float64"),
        (text, "the c", "--max-new-tokens", 6, "--beams", 3, "--dtype", "float64"),
    ):
        found = run(*arguments, "--compare")
        assert found.exit_code == 0, found.output
        assert "both backends wrote the same" in found.output


def test_one_seed_one_text(text):
    """The stream shows what the batch gives; another seed gives another text."""
    options = ("--max-new-tokens", 30, "--temperature", 8, "--min-p", 0.05)
    whole = run(text, "the", *options, "--seed", 1, "--backend", "torch")
    again = run(text, "the", *options, "--seed", 1, "--backend", "flax")
    other = run(text, "the", *options, "--seed", 2, "--backend", "torch")
    two = run(text, "the", "a", *options, "--seed", 1, "--backend", "torch")
    assert whole.exit_code == again.exit_code == 0, whole.output + again.output
    assert len(whole.stdout) > 5
    assert whole.stdout == again.stdout != other.stdout
    assert two.stdout.startswith(whole.stdout)


@pytest.mark.parametrize("name", ["song.mid", "song.tab", "song.svg"])
def test_music_files(tab, name, tmp_path):
    found = run(tab, MELODY, "--backend", "torch", "--out", tmp_path / name)
    assert found.exit_code == 0, found.output
    assert (tmp_path / name).stat().st_size > 50


def test_where_two_part():
    """The first token that differs, and the margin by which each backend preferred its own."""
    one = Generated(np.array([[3, 1, 2]]), np.array([3]), np.array([False]), np.zeros((1, 3)))
    other = Generated(np.array([[3, 2, 2]]), np.array([3]), np.array([False]), np.zeros((1, 3)))
    scores = {"torch": np.log([0.1, 0.5, 0.3, 0.1]), "flax": np.log([0.1, 0.2, 0.6, 0.1])}
    asked = []

    def logprobs(backend, row, ids):
        asked.append((backend, row, list(ids)))
        return scores[backend]

    (part,) = partings({"torch": one, "flax": other}, logprobs)
    assert (part.row, part.place, dict(part.tokens)) == (0, 1, {"torch": 1, "flax": 2})
    assert part.margins == pytest.approx({"torch": np.log(0.5 / 0.3), "flax": np.log(0.6 / 0.2)})
    assert asked == [("torch", 0, [3]), ("flax", 0, [3])]
    assert list(partings({"torch": one, "flax": one}, logprobs)) == []


def test_parting_is_exit_code_1(text, monkeypatch):
    """Two backends that do not write the same: said with place and margins, and not by exit code 0."""
    from twinformer.runs import backends

    make = backends.make_model

    def other_weights(backend, config, weights):
        return make(backend, config, {p: -w if backend == "flax" else w for p, w in weights.items()})

    monkeypatch.setattr(backends, "make_model", other_weights)
    found = run(text, "the", "--greedy", "--compare", "--max-new-tokens", 8)
    assert found.exit_code == 1, found.output
    assert "part at token" in found.output


def test_bad_input(tab, text, pieces, tmp_path):
    for arguments, words in (
        ((tab, "40 x"), ["place 1", "'x'"]),
        ((tab, "4"), ["4"]),
        ((tab,), ["expected a prompt"]),
        ((pieces, "ON=1 BOO"), ["BOO"]),
        ((text, "the", "--greedy", "--beams", 2), ["got both"]),
        ((text, "the", "--top-p", 2), ["top_p"]),
        ((text, "the", "--out", tmp_path / "a.mid", "--backend", "torch"), ["one of text"]),
        ((tmp_path, "the"), ["neither"]),
        ((text, "the", "--backend", "tensorflow"), ["tensorflow"]),
    ):
        found = run(*arguments)
        assert found.exit_code == 2, (arguments, found.output)
        assert all(word in found.output for word in words), (arguments, found.output)
        assert "Traceback" not in found.output
