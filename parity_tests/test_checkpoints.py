"""Checkpoints: whole or absent at every moment, found again, refused when torn or foreign; full disks lose nothing."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from parity_tests.numpy_trainer import in_memory, tiny_config
from twinformer.checkpoint import read_model
from twinformer.errors import CheckpointError, WeightsError
from twinformer.runs import checkpoints
from twinformer.runs.checkpoints import CheckpointStore
from twinformer.runs.records import RECORD_FILE, STATE_FILE, digest, verify

ROOT = Path(__file__).resolve().parents[1]
PROGRESS = {"progress": {"best": {"step": 1, "loss": 0.1 + 0.2}}}


def tensors(step):
    rng = np.random.default_rng(step)
    return {"a.weight": rng.normal(size=(3, 5)), "b.weight": rng.normal(size=(2,)).astype(ml_dtypes.bfloat16)}


def state(step):
    return {**{f"parameters/{k}": v for k, v in tensors(step).items()}, "optimizer/step": np.array(step, np.int64)}


def save(store, step, **changes):
    arguments = {"weights": tensors(step), "states": {"torch": state(step)}, "record": PROGRESS, "best_step": 1}
    return store.save(step, config=tiny_config(), **arguments | changes)


def same(one, other):
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and one[k].shape == other[k].shape and one[k].tobytes() == other[k].tobytes()
        for k in one
    )


def holds(checkpoint, step):
    """The checkpoint is that of the step, bit for bit."""
    config, weights = read_model(checkpoint.directory)
    assert checkpoint.step == step
    assert same(weights, tensors(step))
    assert same(checkpoint.state("torch"), state(step))
    assert config == tiny_config()
    return True


@pytest.fixture
def told():
    return []


@pytest.fixture
def tmp_path(tmp_path):
    with in_memory(tmp_path) as place:
        yield place


@pytest.fixture
def store(tmp_path, told):
    return CheckpointStore(tmp_path / "checkpoints", run="mine", keep=2, beside={"x.json": b"{}"}, tell=told.append)


# ---- there and back


def test_what_was_saved_is_found_bit_for_bit(store, tmp_path):
    assert store.last() is None
    assert store.best() is None
    save(store, 1)
    save(store, 2, best_step=2)
    found = store.last()
    assert holds(found, 2)
    assert found.record["progress"] == PROGRESS["progress"]
    assert (found.directory / "x.json").read_bytes() == b"{}"
    assert store.best().step == 2
    assert holds(store.at(1), 1)
    assert [json.loads((store.directory / f"{name}.json").read_text())["step"] for name in ("last", "best")] == [2, 2]
    assert sorted(place.name for place in store.directory.iterdir()) == [
        "best.json",
        "last.json",
        "step-00000001",
        "step-00000002",
    ]


def test_two_twins_have_a_state_each_and_either_reads_the_others(store):
    both = {"torch": state(3), "flax": state(4)}
    found = save(store, 3, states=both)
    assert found.backends == ("torch", "flax")
    assert same(found.state("torch"), state(3))
    assert same(found.state("flax"), state(4))
    alone = save(store, 5, states={"torch": state(5)})
    assert same(alone.state("flax"), state(5))


def test_the_last_the_best_and_some_before_are_kept(store):
    for step in range(1, 9):
        save(store, step, best_step=min(step, 2))
    assert [step for step, _ in store._directories()] == [8, 7, 6, 2]
    with pytest.raises(CheckpointError, match="one of the steps 8, 7, 6, 2, got 4"):
        store.at(4)


# ---- torn and foreign


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", STATE_FILE, RECORD_FILE, "x.json"])
def test_a_torn_checkpoint_is_told_and_the_one_before_is_taken(store, told, name, harm):
    save(store, 1)
    save(store, 2)
    harm(store.directory / "step-00000002" / name)
    assert holds(store.last(), 1)
    assert len(told) == 2
    assert "step-00000002" in told[0]
    assert name in told[0]
    assert "going back to the one before: step 1" in told[1]
    save(store, 2)  # the run comes by that step again
    assert holds(store.last(), 2)


def test_a_checkpoint_of_another_run_is_refused(store, told, tmp_path):
    save(store, 1)
    other = CheckpointStore(tmp_path / "other", run="theirs")
    save(other, 9)
    shutil.copytree(tmp_path / "other" / "step-00000009", store.directory / "step-00000009")
    assert holds(store.last(), 1)
    assert "expected run mine, got one of run theirs" in told[0]


def test_a_file_of_another_checkpoint_is_found_by_its_hash(store, told):
    save(store, 1)
    save(store, 2)
    shutil.copy(store.directory / "step-00000001" / STATE_FILE, store.directory / "step-00000002" / STATE_FILE)
    assert store.last().step == 1
    assert f"{STATE_FILE}: expected sha256" in told[0]


def test_a_renamed_checkpoint_is_not_of_that_step(store, told):
    save(store, 1)
    save(store, 2)
    (store.directory / "step-00000002").rename(store.directory / "step-00000007")
    assert store.last().step == 1
    assert "expected that of the step, got 2" in told[0]


def test_where_every_checkpoint_is_torn_all_are_named(store):
    for step in (1, 2):
        save(store, step)
        flip(store.directory / f"step-{step:08d}" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        store.last()
    assert "expected a complete checkpoint, found none" in str(caught.value)
    assert "step-00000001" in str(caught.value)
    assert "step-00000002" in str(caught.value)


def test_a_record_that_names_files_elsewhere_reads_none_of_them(store, tmp_path):
    save(store, 1)
    file = store.directory / "step-00000001" / RECORD_FILE
    record = json.loads(file.read_text())
    record["states"] = {"torch": "../../secret"}
    record["files"]["../../secret"] = "0" * 64
    record["digest"] = digest(record)
    file.write_text(json.dumps(record))
    (tmp_path / "secret").write_text("x")
    with pytest.raises(CheckpointError, match=r"\.\./\.\./secret: missing"):
        verify(file.parent)


def test_a_best_that_is_torn_is_told(store, told):
    save(store, 1)
    save(store, 2)
    flip(store.directory / "step-00000001" / STATE_FILE)
    assert store.best() is None
    assert "the best checkpoint cannot be used" in told[0]


# ---- what is refused


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("leaf", ["a.weight", "b.weight"])
def test_what_is_not_finite_is_never_written(store, leaf, value):
    save(store, 1)
    broken = {**tensors(2), leaf: tensors(2)[leaf].copy()}
    broken[leaf].flat[1] = value
    with pytest.raises(WeightsError, match=f"weights: {leaf}: expected finite values, got 1 that are not"):
        save(store, 2, weights=broken)
    with pytest.raises(WeightsError, match="state of torch: "):
        save(store, 2, states={"torch": {**state(2), f"parameters/{leaf}": broken[leaf]}})
    assert holds(store.last(), 1)
    assert not list(store.directory.glob(".*"))


class Dead(BaseException):
    """The process is gone: nothing that comes after this is done."""


class Disk:
    """Every operation that changes the disk, counted; the one with number ``at`` fails, with ``error``.

    After ``Dead`` all others fail too: a process that was killed tidies nothing up.
    """

    OPERATIONS = (
        (os, "fsync"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "mkdir"),
        (tempfile, "mkdtemp"),
        (shutil, "rmtree"),
        (checkpoints, "save_file"),
    )

    def __init__(self, monkeypatch, at, error):
        self.count, self.at, self.error, self.dead = 0, at, error, False
        for owner, name in self.OPERATIONS:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, operation):
        def counted(*args, **kwargs):
            if self.dead and operation.__name__ != "unlink":
                return None if operation.__name__ == "rmtree" else self._fail()
            self.count += 1
            if self.count == self.at:
                self.dead = isinstance(self.error, Dead)
                self._fail()
            return operation(*args, **kwargs)

        return counted

    def _fail(self):
        raise self.error


def failure(call):
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return None


def operations_of_a_save(tmp_path):
    """How many there are, so that each can fail once."""
    with pytest.MonkeyPatch.context() as patch:
        store = CheckpointStore(tmp_path / "counted", run="mine", keep=1)
        for step in (1, 2, 3):
            save(store, step, best_step=step)
        disk = Disk(patch, -1, Dead())
        save(store, 4, best_step=4)
        return disk.count


def test_death_at_every_operation_loses_nothing(tmp_path):
    """A save is cut off before each of its operations in turn; a reader finds the old or the new checkpoint, whole."""
    count = operations_of_a_save(tmp_path)
    assert count > 15
    ends = set()
    for at in range(1, count + 1):
        store = CheckpointStore(tmp_path / str(at), run="mine", keep=1)
        for step in (1, 2, 3):
            save(store, step, best_step=step)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, at, Dead())
            with pytest.raises(Dead):
                save(store, 4, best_step=4)
        found = CheckpointStore(tmp_path / str(at), run="mine", keep=1)
        last = found.last()
        assert last.step in (3, 4)
        assert holds(last, last.step)
        assert found.best() is not None
        ends.add(last.step)
        found.sweep(last)
        assert not list(found.directory.glob(".*"))
        assert json.loads((found.directory / "last.json").read_text())["step"] == last.step
        save(found, 5, best_step=5)
        assert holds(found.last(), 5)
    assert ends == {3, 4}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_at_every_operation_is_one_message(tmp_path, code):
    count = operations_of_a_save(tmp_path)
    failed = 0
    for at in range(1, count + 1):
        store = CheckpointStore(tmp_path / str(at), run="mine", keep=1)
        for step in (1, 2, 3):
            save(store, step, best_step=step)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, at, OSError(code, os.strerror(code)))
            message = failure(lambda store=store: save(store, 4, best_step=4))
        if message is not None:
            failed += 1
            assert os.strerror(code) in message
            assert "MB are free" in message
            assert "the last checkpoint is that of step" in message
        last = store.last()
        assert holds(last, last.step)
        assert not list(store.directory.glob(".saving-*"))
        save(store, 5)
        assert holds(store.last(), 5)
    assert failed > 12


# ---- killed for good


def kills(*arguments):
    place = ["--directory", "/dev/shm"] if Path("/dev/shm").is_dir() else []
    return subprocess.run(
        [sys.executable, "-m", "parity_tests.kill_checkpoints", *arguments, *place],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_kills_while_saving_lose_nothing():
    done = kills("--kills", "10")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("10 kills after ")


def test_the_kills_find_a_store_that_is_wrong():
    """The script has two more such faults."""
    done = kills("--kills", "60", "--fault", "one-behind")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "a complete checkpoint was lost or changed" in done.stdout
