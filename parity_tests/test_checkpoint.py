"""Model directories: bit for bit, whole or not at all, and clear about what is wrong with them."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from twinformer import checkpoint
from twinformer.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_model, write_atomically, write_model
from twinformer.errors import CheckpointError, ConfigError
from twinformer.parity.case import telling_weights
from twinformer.presets import preset

CONFIG = preset("gpt2").replace(context_length=8, num_layers=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, dtype):
    tensors = {path: tensor.astype(dtype) for path, tensor in telling_weights(CONFIG, 0).items()}
    write_model(tmp_path / "a" / "model", CONFIG, tensors)
    config, read = read_model(tmp_path / "a" / "model")
    assert config == CONFIG
    assert list(read) == sorted(tensors) or set(read) == set(tensors)
    for path, tensor in tensors.items():
        assert read[path].dtype == tensor.dtype
        assert read[path].tobytes() == tensor.tobytes(), path


def test_transposed_views_are_written_in_their_own_order(tmp_path):
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_model(tmp_path / "model", CONFIG, {"x": matrix.T})
    assert np.array_equal(read_model(tmp_path / "model")[1]["x"], matrix.T)


def test_nothing_else_is_left_in_the_directory_or_beside_it(tmp_path):
    for _ in range(2):
        write_model(tmp_path / "model", CONFIG, {"x": np.ones(2, np.float32)})
    assert sorted(os.listdir(tmp_path)) == ["model"]
    assert sorted(os.listdir(tmp_path / "model")) == [CONFIG_FILE, WEIGHTS_FILE]


def test_a_write_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    write_model(tmp_path / "model", CONFIG, {"x": np.ones(2, np.float32)})

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_model(tmp_path / "model", CONFIG, {"x": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match="No space left"):
        write_model(tmp_path / "new", CONFIG, {"x": np.zeros(2, np.float32)})
    assert sorted(os.listdir(tmp_path)) == ["model"]
    assert sorted(os.listdir(tmp_path / "model")) == [CONFIG_FILE, WEIGHTS_FILE]
    assert np.array_equal(read_model(tmp_path / "model")[1]["x"], np.ones(2))


def test_a_save_interrupted_between_the_two_files_is_noticed(tmp_path, monkeypatch):
    write_model(tmp_path / "model", CONFIG, {"x": np.ones(2, np.float32)})
    original = checkpoint.write_atomically

    def stops_at_the_config(file, write):
        if file.name == CONFIG_FILE:
            raise KeyboardInterrupt
        original(file, write)

    monkeypatch.setattr(checkpoint, "write_atomically", stops_at_the_config)
    with pytest.raises(KeyboardInterrupt):
        write_model(tmp_path / "model", CONFIG.replace(norm_eps=1e-6), {"x": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match="norm_eps"):
        read_model(tmp_path / "model")


def test_a_partial_file_never_takes_the_name(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("old")

    def dies(part):
        part.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(file, dies)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]


def damaged(directory, what):
    write_model(directory, CONFIG, {"x": np.ones(64, np.float32)})
    weights = directory / WEIGHTS_FILE
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "no header":
        weights.write_bytes(b"\x00" * 4)
    elif what == "lying header":
        data = bytearray(weights.read_bytes())
        data[:8] = (2**40).to_bytes(8, "little")
        weights.write_bytes(bytes(data))
    elif what == "pickle":
        weights.write_bytes(b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00exittR.")
    elif what == "no weights":
        weights.unlink()
    elif what == "no config":
        (directory / CONFIG_FILE).unlink()
    elif what == "binary config":
        (directory / CONFIG_FILE).write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    "what", ["truncated", "no header", "lying header", "pickle", "no weights", "no config", "binary config"]
)
def test_damaged_directories_are_a_clear_error(tmp_path, what):
    damaged(tmp_path / "model", what)
    with pytest.raises(CheckpointError, match="expected"):
        read_model(tmp_path / "model")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"architecture": NaN}'])
def test_a_config_that_is_no_object_is_a_clear_error(tmp_path, text):
    write_model(tmp_path / "model", CONFIG, {"x": np.ones(2, np.float32)})
    (tmp_path / "model" / CONFIG_FILE).write_text(text)
    with pytest.raises(ConfigError):
        read_model(tmp_path / "model")


def test_weights_written_by_others_need_no_metadata(tmp_path):
    (tmp_path / CONFIG_FILE).write_text(json.dumps(CONFIG.to_dict()))
    save_file({"x": np.ones(2, np.float32)}, tmp_path / WEIGHTS_FILE)
    assert read_model(tmp_path)[0] == CONFIG
