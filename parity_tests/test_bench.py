"""The benchmark's own arithmetic: known effects are found, absent ones are not, derived numbers follow from samples.

No test here looks at a clock: samples are drawn with known effects.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import torch_impl
from benchmarks import cases, figures, machine, protocol, records, run, worker
from benchmarks.cases import Case
from benchmarks.figures import Ratio
from benchmarks.protocol import AGAIN, Visited, errors_of
from benchmarks.systems import SYSTEMS, by_name
from benchmarks.work import work_of
from twinformer.parameters import model_parameters


def visits(effect, seed, *, rounds=5, samples=5, noise=0.01, drift=0.2):
    """Samples of a system: a machine that drifts by round, noise within a visit, and the effect."""
    rng = np.random.default_rng(seed)
    speed = 1 + drift * np.random.default_rng(99).random(rounds)  # common to all systems of a round
    return (effect * speed[:, None] * (1 + noise * rng.standard_normal((rounds, samples)))).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_slowdown_is_found_and_none_is_not(seed):
    reference = visits(1.0, 100 + seed)
    slower = figures.ratio(visits(1.05, 200 + seed), reference)
    assert figures.verdict(slower) == "slower"
    assert slower.low <= 1.05 <= slower.high or abs(slower.value - 1.05) < 0.01
    assert figures.verdict(figures.ratio(visits(1.0, 300 + seed), reference)) == "same"
    assert figures.verdict(figures.ratio(visits(0.9, 400 + seed), reference)) == "faster"


def test_pairing_takes_the_drift_out():
    """Without it a machine that is 20 % slower in some rounds would drown 5 %."""
    one, other = visits(1.05, 1), visits(1.0, 2)
    assert figures.ratio(one, other).half_width < 0.02
    turned = [*other[2:], *other[:2]]
    assert figures.ratio(one, turned).half_width > 0.04


def test_noise_gives_no_verdict():
    found = figures.ratio(visits(1.0, 1, noise=0.3), visits(1.0, 2, noise=0.3))
    assert figures.verdict(found) == "cannot tell"


@pytest.mark.parametrize(
    ("ratio", "is_significant", "expected"),
    [
        (Ratio(1.0, 0.98, 1.02, 0.9), True, "same"),
        (Ratio(1.0, 0.96, 1.02, 0.9), True, "cannot tell"),
        (Ratio(0.9, 0.88, 0.92, 0.001), True, "faster"),
        (Ratio(0.9, 0.88, 0.92, 0.001), False, "cannot tell"),
        (Ratio(1.1, 1.08, 1.2, 0.001), True, "slower"),
        (Ratio(1.1, 0.99, 1.2, 0.06), True, "cannot tell"),
    ],
)
def test_verdicts(ratio, is_significant, expected):
    assert figures.verdict(ratio, is_significant=is_significant) == expected


def test_holm():
    """Holm 1979: 0.01 <= 0.05 / 3 holds, 0.03 <= 0.05 / 2 does not, and then nothing after it does."""
    assert figures.holm({"b": 0.03, "a": 0.01, "c": 0.031}) == {"b": False, "a": True, "c": False}
    assert figures.holm({"a": 0.01, "b": 0.02, "c": 0.05}) == {"a": True, "b": True, "c": True}


def test_outliers_are_counted_and_kept():
    samples = [[1.0, 1.01, 0.99, 1.0, 5.0]]
    assert figures.outliers(samples) == 1
    assert figures.median(samples) == 1.0


# ---- what is counted


@pytest.mark.parametrize("name", ["encoder-forward", "decoder-train", "seq2seq-train"])
def test_operations_against_pytorchs_counter(name):
    """PyTorch counts the whole square of attention, and products alone, as ``flops_full`` does."""
    case = next(case for case in cases.QUICK if case.name == name)
    model = torch_impl.build(case.config)
    inputs = {key: torch.from_numpy(value) for key, value in case.inputs().items()}
    with torch_impl.fused.explicit_formulas(), FlopCounterMode(display=False) as counter:
        logits = model(**inputs)
        if case.kind == "train":
            logits.sum().backward()
    counted, expected = counter.get_total_flops(), work_of(case).flops_full
    assert abs(counted / expected - 1) < 0.01, (counted, expected)


def test_bytes_of_decoding():
    """Every matrix of the decoder once a token, the table of the head, and the keys and values written so far."""
    case = next(case for case in cases.FULL if case.name == "decode-1")
    config = case.config
    weights = sum(
        int(np.prod(parameter.shape))
        for path, parameter in model_parameters(config).items()
        if path != "embedding.tokens.weight"
    )
    places = sum(range(case.T, case.T + case.new))
    cached = places * config.num_layers * 2 * config.num_heads * config.key_dim
    assert work_of(case).bytes == 4 * (case.new * weights + cached)


# ---- the gate


def test_errors_of_outputs():
    truth = {"logits": np.array([1.0, -4.0]), "tokens": np.array([1, 2, 3, 4])}
    assert errors_of({"logits": np.array([1.0, -4.4]), "tokens": np.array([1, 2, 0, 4])}, truth) == {
        "logits": pytest.approx(0.1),
        "tokens": 0.25,
    }
    for wrong in ({}, {"logits": np.array([1.0, np.nan])}, {"logits": np.zeros(3)}):
        assert errors_of(wrong, {"logits": truth["logits"]}) == {"logits": float("inf")}


_TINY = Case("decoder-train", "train", cases.QUICK[2].config.replace(num_layers=1), B=2, T=8)


def test_every_peer_starts_from_the_same_weights():
    """PyTorch's layers and the twin: the same outputs, so the weights went where they belong."""
    weights = protocol.weights_of(_TINY)
    truth = protocol.truth_of(_TINY, weights)
    for name in ("torch_impl", "torch.nn", "transformers sdpa"):
        errors = errors_of(by_name(name).make(_TINY, weights).outputs(), truth)
        assert max(errors.values()) < 1e-5, (name, errors)
    swapped = weights | {
        "stack.blocks.0.attention.query.weight": weights["stack.blocks.0.attention.key.weight"],
    }
    errors = errors_of(by_name("torch.nn").make(_TINY, swapped).outputs(), truth)
    assert errors["logits"] > _TINY.bound


# in a process of its own: Keras has one backend a process, and a library's warnings are not ours
_ERRORS = """
import json, sys
from benchmarks import cases, protocol
from benchmarks.systems import by_name
system, found = by_name(sys.argv[1]), {}
for case in cases.QUICK:
    if case.name in system.cases:
        weights = protocol.weights_of(case)
        truth = protocol.truth_of(case, weights)
        found[case.name] = protocol.errors_of(system.make(case, weights).outputs(), truth)
        path = next(path for path in weights if path.endswith("blocks.0.attention.query.weight"))
        swapped = weights | {path: weights[path.replace("query", "key")]}
        found[case.name]["swapped"] = max(protocol.errors_of(system.make(case, swapped).outputs(), truth).values())
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "name",
    [
        *("transformers eager", "transformers sdpa", "transformers tuned"),
        *("x-transformers", "x-transformers tuned", "keras-hub torch", "keras-hub jax"),
    ],
)
def test_peers_in_every_case_of_theirs(name):
    """The truth with our weights, something else with a weight in a wrong place."""
    system = by_name(name)
    if system.absent():
        pytest.skip(f"absent: {', '.join(system.absent())}; `make bench` installs what is missing")
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _ERRORS, name],
        cwd=protocol.ROOT,
        env=environment | dict(system.settings),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(system.cases) & {case.name for case in cases.QUICK}
    for case, errors in found.items():
        assert errors.pop("swapped") > 1e-2, case
        assert max(errors.values()) < 1e-5, (case, errors)


def test_the_settings_of_tuned_systems_reach_jax(monkeypatch):
    """In a worker's process, by the way that it goes; an option that JAX does not have, JAX itself refuses."""
    told = []
    monkeypatch.setattr(jax.config, "update", lambda *given: told.append(given))
    monkeypatch.setattr("benchmarks.cases.FULL", ())  # far enough: the settings are made before the case is looked up
    for name in ("flax_impl", "torch_impl tuned", "flax_impl tuned", "flax_impl scan tuned", "linen tuned"):
        told.append(name)
        with monkeypatch.context() as patch:
            for variable, value in by_name(name).settings:
                patch.setenv(variable, value)
            with pytest.raises(KeyError):
                worker.start(argparse.Namespace(case="none", quick=False, threads=1))
    synchronous = ("jax_cpu_enable_async_dispatch", False)
    assert told == [
        *("flax_impl", "torch_impl tuned"),
        *("flax_impl tuned", synchronous, "flax_impl scan tuned", synchronous, "linen tuned", synchronous),
    ]


def test_every_system_has_its_adapter():
    """None is listed as absent for want of our own code."""
    for system in SYSTEMS:
        assert importlib.util.find_spec(f"benchmarks.systems.{system.module}") is not None, system.name


def test_a_system_that_computes_something_else_is_not_timed(tmp_path, monkeypatch):
    """Its row says why, with the figure, and it has no samples."""
    real = protocol.truth_of
    monkeypatch.setattr(
        protocol, "truth_of", lambda *a: {name: value + (name == "logits") for name, value in real(*a).items()}
    )
    case = next(case for case in cases.QUICK if case.name == "dispatch-forward")
    found = protocol.measure(case, [by_name("torch_impl")], rounds=2, samples=1, threads=1, quick=True)
    assert [one.visits for one in found] == [[], []]
    assert all("does not agree with the float64 truth: logits" in (one.problem or "") for one in found)


def test_absent_peers_are_listed(monkeypatch):
    case = next(case for case in cases.QUICK if case.name == "dispatch-forward")
    monkeypatch.setattr("benchmarks.systems.importlib.util.find_spec", lambda name: None)
    found = protocol.measure(case, [by_name("torch_impl")], rounds=2, samples=1, threads=1, quick=True)
    assert [one.problem for one in found] == ["absent: torch not installed"]


# ---- rows


def rows(tmp_path, *, effect=1.3, busy=0.0):
    case = next(case for case in cases.QUICK if case.name == "decode-1")
    system = by_name("torch_impl")

    def visited(name, factor, seed):
        samples = [[{"wall": x, "cpu": x, "faults": 0.0, "system": 0.0} for x in v] for v in visits(factor, seed)]
        start = {"made": 1.0, "outputs": 2.0, "first_run": 0.1}
        return Visited(name, system, {"tokens": 0.0}, None, start, 10**8, samples, [busy] * len(samples))

    return records.rows_of(
        case,
        [
            visited("torch_impl", 1.0, 1),
            visited("other", effect, 2),
            Visited("absent", system, problem="absent: x"),
            visited("torch_impl" + AGAIN, 1.0, 3),
        ],
        run="now",
        environment=machine.environment(),
        threads=1,
        quick=True,
        ceiling={"flops": 1e11, "bytes": 1e10, "copy": 1e10, "products": {}},
    )


def test_rows_say_what_follows(tmp_path):
    found = rows(tmp_path)
    other = found[1]["derived"]
    assert other["wall_ratio"]["verdict"] == "slower"
    assert other["wall_ratio"]["to"] == "torch_impl"
    work = found[1]["work"]
    assert other["of_bandwidth"] == pytest.approx(work["bytes"] / other["wall"] / 1e10)
    assert found[2]["derived"] is None
    assert found[3]["derived"]["wall_ratio"]["verdict"] == "same"


def test_a_busy_machine_gives_no_verdict(tmp_path):
    assert rows(tmp_path, busy=0.2)[1]["derived"]["wall_ratio"]["verdict"] == "busy"


def test_verify_finds_every_number_that_was_changed(tmp_path):
    file = tmp_path / "results.jsonl"
    records.write(file, rows(tmp_path))
    kept = records.read(file)
    assert records.verify(kept) == []
    for change in ("wall", "of_bandwidth", "outliers"):
        forged = copy.deepcopy(kept)
        forged[1]["derived"][change] *= 1.001
        forged[1]["derived"][change] += 1
        assert records.verify(forged), change
    forged = copy.deepcopy(kept)
    forged[1]["visits"][0][0]["wall"] *= 0.5
    assert any("other" in problem for problem in records.verify(forged))


def test_compare_two_runs(tmp_path):
    before = rows(tmp_path)
    verdicts = {row["system"]: row["verdict"] for row in records.compare(before, rows(tmp_path, effect=1.5))}
    assert verdicts == {"other": "slower", "torch_impl" + AGAIN: "same"}
    assert all(row["verdict"] == "same" for row in records.compare(before, rows(tmp_path)))


def test_reading_names_every_bad_line(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"schema": 1}\nnot json\n{"schema": 7}\n')
    with pytest.raises(ValueError, match=r"(?s)line 2: .*\nline 3: expected a row of schema 1, got 7"):
        records.read(file)


def test_a_page_is_whole(tmp_path):
    from benchmarks.report import as_html

    page = as_html(rows(tmp_path))
    assert page.count("<svg") >= 3
    assert "absent: x" in page
    for outside in ("http://", "https://"):
        assert outside not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "").replace(
            "http://purl.org", ""
        ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")


def test_choosing():
    names = [(case.name, [system.name for system in systems]) for case, systems in run.chosen(["beam"], [], quick=True)]
    assert names[0][0] == "beam"
    assert "torch_impl compiled" not in names[0][1]
    with pytest.raises(ValueError, match=r"(?s)case: expected one of .*'nothing'.*\nsystem: .*'nobody'"):
        run.chosen(["nothing"], ["nobody"], quick=True)
    known = {case.name for case in (*cases.FULL, *cases.QUICK)}
    assert all(set(system.cases) <= known for system in SYSTEMS)


def test_results_that_are_kept_follow_from_their_samples():
    """Every file under benchmarks/results."""
    files = sorted((protocol.ROOT / "benchmarks" / "results").glob("bench*.jsonl"))
    for file in files:
        assert records.verify(records.read(file)) == [], file.name
        assert all(json.loads(line)["environment"] for line in file.read_text().splitlines())
