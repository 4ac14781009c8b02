"""Damaged published directories, by chance: each is refused with one clear error, or read. Nothing in them is run.

``python -m parity_tests.damage --cases 10000 --seed 1 --out FILE``. Case ``i`` is a function of the seed and ``i``
alone, so that a defect is met again by ``--first i --cases 1``. The process has a limit of memory, each case one of
time.
"""

import argparse
import collections
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from torch_impl.pickled import open_pickled
from torch_impl.weights import from_pretrained
from twinformer.checkpoint import write_atomically
from twinformer.errors import TwinformerError
from twinformer.pretrained.convert import convert
from twinformer.pretrained.inspection import inspect

SECONDS = 8
MEMORY = 6 << 30
_HOSTILE = (
    *("1" * 5000, "[" * 100000 + "]" * 100000, '{"a":' * 3000 + "1" + "}" * 3000, "9" * 400, "1e999", "1e308"),
    *("NaN", "Infinity", "null", "true", "{}", "[]", "-1", "0", "1.5", '"x"', '"\\ud800"'),
    *('"../x.safetensors"', '"/etc/passwd"', '"a\\u0000.bin"', '".safetensors"', '"absent.bin"'),
)


class _Hung(BaseException):
    pass


class _Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def sources(place: Path) -> list[Path]:
    """Small published directories, whole, in shards and pickled."""
    sizes = {"vocab_size": 11, "max_position_embeddings": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"hidden_size": 8, "intermediate_size": 8}
    gpt2 = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    models = {
        "bert": transformers.BertModel(transformers.BertConfig(**sizes)),
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
    }
    found = []
    for name, model in models.items():
        for kind, most in {"whole": "5GB", "shards": "1KB"}.items():
            model.save_pretrained(place / f"{name}-{kind}", max_shard_size=most)
            (place / f"{name}-{kind}" / "tokenizer.json").write_text('{"version": "1.0"}')
            found.append(place / f"{name}-{kind}")
        for kind in ("bin", "bins"):
            directory = place / f"{name}-{kind}"
            directory.mkdir()
            shutil.copy(place / f"{name}-whole" / "config.json", directory)
            state = model.state_dict()
            halves = [dict(list(state.items())[part::2]) for part in (0, 1)] if kind == "bins" else [state]
            files = ["a.bin", "b.bin"] if kind == "bins" else ["pytorch_model.bin"]
            for file, half in zip(files, halves, strict=True):
                torch.save(half, directory / file)
            if kind == "bins":
                names = {tensor: file for file, half in zip(files, halves, strict=True) for tensor in half}
                (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
            found.append(directory)
    return found


def _pick(directory: Path, chance: random.Random, pattern: str = "*") -> Path | None:
    files = sorted(directory.glob(pattern))
    return chance.choice(files) if files else None


def _config(directory: Path, chance: random.Random) -> None:
    file = directory / "config.json"
    values = json.loads(file.read_text())
    values[chance.choice(sorted(values))] = "@@"
    file.write_text(json.dumps(values).replace('"@@"', chance.choice(_HOSTILE)))


def _index(directory: Path, chance: random.Random) -> None:
    file = _pick(directory, chance, "*.index.json")
    if file is None:
        _config(directory, chance)
        return
    values = json.loads(file.read_text())
    values["weight_map"][chance.choice(sorted(values["weight_map"]))] = "@@"
    file.write_text(json.dumps(values).replace('"@@"', chance.choice(_HOSTILE)))


def _twice(directory: Path, chance: random.Random) -> None:
    """A key of a JSON file stands twice, the second time with another value."""
    file = _pick(directory, chance, "*.json")
    assert file is not None
    text = file.read_text().rstrip()
    key = chance.choice(sorted(json.loads(text)))
    file.write_text(f"{text[:-1]}, {json.dumps(key)}: {chance.choice(_HOSTILE)}}}")


def _bytes(directory: Path, chance: random.Random) -> None:
    file = _pick(directory, chance)
    assert file is not None
    data = bytearray(file.read_bytes())
    end = chance.choice([len(data), min(len(data), 400)])
    for _ in range(chance.choice([1, 3, 20])):
        data[chance.randrange(end)] = chance.randrange(256)
    file.write_bytes(data)


def _cut(directory: Path, chance: random.Random) -> None:
    file = _pick(directory, chance)
    assert file is not None
    data = file.read_bytes()
    file.write_bytes(data[: chance.randrange(len(data))])


def _header(directory: Path, chance: random.Random) -> None:
    file = _pick(directory, chance, "*.safetensors")
    if file is None:
        _pickle(directory, chance)
        return
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    values = [[2**62, 8], [0], [], -1, [-1, 5], "F8_E4M3", "I64", "F64", [0, 10**15], [2**64, 1], None, "BF16", [8]]
    tensor = chance.choice(sorted(set(header) - {"__metadata__"}))
    header[tensor][chance.choice(["dtype", "shape", "data_offsets"])] = chance.choice(values)
    text = json.dumps(header).encode()
    size = chance.choice([len(text), len(text), 2**63, 2**40])
    file.write_bytes(struct.pack("<Q", size) + text + data[8 + length :])


def _gone(directory: Path, chance: random.Random) -> None:
    file = _pick(directory, chance)
    assert file is not None
    file.unlink()
    if chance.random() < 0.5:
        file.symlink_to(chance.choice(["/dev/zero", "/etc/passwd", file.name, "/proc/self/mem", "/"]))


def _pickle(directory: Path, chance: random.Random) -> None:
    for file in [*directory.glob("*.safetensors*"), *directory.glob("*.bin*")]:
        file.unlink()
    runs = _Runs(directory.parent / "canary")
    wide, far = torch.zeros(2).expand(10**9, 2), torch.empty(10**10, device="meta")
    kinds = (wide, far, torch.zeros(2).to_sparse(), torch.zeros(2, dtype=torch.complex64), 1, runs)
    value = chance.choice([runs, [1], {1: torch.zeros(2)}, *({"a": kind} for kind in kinds)])
    plain = chance.random() < 0.3 and (value is runs or value == [1])
    if plain:
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps(value))
    else:
        torch.save(value, directory / "pytorch_model.bin")


DAMAGES = (_config, _index, _twice, _bytes, _cut, _header, _gone, _pickle)


def case(number: int, seed: int, found: list[Path], place: Path) -> tuple[str, str | None]:
    """What became of a case (its damage and outcome) and its defect, if it has one."""
    chance = random.Random(f"{seed}/{number}")
    source, damage = chance.choice(found), chance.choice(DAMAGES)
    scratch = place / "case"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    directory, out = scratch / "in", scratch / "out"
    shutil.copytree(source, directory)
    damage(directory, chance)
    calls: dict[str, Callable[[], object]] = {
        "convert": lambda: convert(directory, out, to="ours", open_pickled=open_pickled),
        "inspect": lambda: inspect(directory, open_pickled=open_pickled),
        "from_pretrained": lambda: from_pretrained(directory),
    }
    name = chance.choice(sorted(calls))
    outcome, defect = "read", None
    signal.alarm(SECONDS)
    try:
        calls[name]()
    except TwinformerError:
        outcome = "refused"
    except _Hung:
        defect = "hung"
    except BaseException as error:  # whatever else leaves a call is what is looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        defect = f"{type(error).__name__}: {str(error)[:80]} at {Path(last.filename).name}:{last.lineno}"
    finally:
        signal.alarm(0)
    left = {file.name for file in scratch.iterdir()} - {"in"}
    if (place / "case" / "canary").exists():
        defect = f"{defect or ''} something in the file was run"
    if left != ({"out"} if name == "convert" and outcome == "read" and defect is None else set()):
        defect = f"{defect or ''} left behind or missing: {sorted(left)}"
    where = f"{name} {damage.__name__.strip('_')} {source.name}"
    return f"{name} {outcome}", None if defect is None else f"{where}: {defect}"


def run(cases: int, seed: int, first: int = 0) -> dict[str, Any]:
    """Counts of outcomes, and each defect with the first case that showed it. Raises nothing for a defect."""

    def stop(*_: object) -> None:
        raise _Hung

    before = signal.signal(signal.SIGALRM, stop)
    outcomes: collections.Counter[str] = collections.Counter()
    defects: dict[str, int] = {}
    try:
        with tempfile.TemporaryDirectory() as place:
            found = sources(Path(place))
            for number in range(first, first + cases):
                outcome, defect = case(number, seed, found, Path(place))
                outcomes["defect" if defect else outcome] += 1
                if defect:
                    defects.setdefault(defect, number)
    finally:
        signal.signal(signal.SIGALRM, before)
    return {
        "cases": cases,
        "seed": seed,
        "first": first,
        "outcomes": dict(sorted(outcomes.items())),
        "defects": defects,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    summary = run(asked.cases, asked.seed, asked.first)
    write_atomically(asked.out, lambda file: file.write_text(json.dumps(summary, indent=2) + "\n"))
    raise SystemExit(1 if summary["defects"] else 0)
