"""The command line as a person meets it: exit codes, messages, files; never a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from twinformer.checkpoint import write_model
from twinformer.cli import app
from twinformer.config import ModelConfig
from twinformer.initializers import initial_weights
from twinformer.parity.case import telling_weights
from twinformer.parity.rungs import BY_DEFAULT, LADDER
from twinformer.presets import preset


def twinformer(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "twinformer.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"COLUMNS": "160"} | environment,
    )


def here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same without a process of its own, for what is refused before anything runs."""
    done = CliRunner().invoke(app, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def small_config() -> ModelConfig:
    return preset("gpt2").replace(context_length=16, num_layers=1)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    told = "".join(done.stderr.split())  # lines are broken anywhere
    for word in words:
        assert "".join(word.split()) in told, done.stderr


def test_agreement_is_exit_code_0_with_a_table_and_json(tmp_path):
    write_model(tmp_path / "model", small_config(), telling_weights(small_config(), 0))
    file, page = tmp_path / "report.json", tmp_path / "report.html"
    done = twinformer("parity", str(tmp_path / "model"), "--json", str(file), "--html", str(page))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "verdict: agree" in done.stdout
    assert "not run: long, rounding, compilation, adapters, accumulation, beams, resumption, sharding" in done.stdout
    report = json.loads(file.read_text())
    assert report["verdict"] == "agree"
    verdicts = {rung["name"]: rung["verdict"] for rung in report["rungs"]}
    assert verdicts == {step.name: "agree" if step.name in BY_DEFAULT else "not run" for step in LADDER}
    assert report["rungs"][1]["comparisons"]
    assert "<title>model: agree</title>" in page.read_text(encoding="utf-8")
    assert report["command"].startswith("twinformer parity ")


def test_disagreement_is_exit_code_1(tmp_path):
    """The command itself, with a fault planted in one twin before it runs."""
    write_model(tmp_path / "model", small_config(), telling_weights(small_config(), 0))
    script = (
        "import sys, torch, torch_impl.feedforward as f\n"
        "f.activate = lambda X, name: torch.nn.functional.gelu(X)\n"
        "from twinformer.cli import main\n"
        f"sys.argv = ['twinformer', 'parity', {str(tmp_path / 'model')!r}, '--rungs', 'parameters,forward']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=os.environ | {"COLUMNS": "160"}
    )
    assert done.returncode == 1, done.stderr + done.stdout
    assert "verdict: differ" in done.stdout
    assert "culprit: stack.blocks.0.feedforward" in done.stdout


def test_fresh_initial_weights_are_judged_too(tmp_path):
    write_model(tmp_path / "model", small_config(), initial_weights(small_config(), 0))
    done = twinformer("parity", str(tmp_path / "model"), "--rungs", "forward")
    assert done.returncode == 0, done.stderr + done.stdout


def test_what_cannot_be_judged_is_exit_code_2(tmp_path):
    refused(twinformer("parity", "no-such-model"), "no-such-model", "textbook-encoder")
    refused(here("parity", "gpt2", "--rungs", "forwards,shards"), "forwards", "shards", "2 problems")
    refused(here("parity", "gpt2", "--witness", "transformers"), "published")
    files = ("--json", str(tmp_path / "absent" / "x.json"), "--html", str(tmp_path))
    refused(here("parity", "gpt2", *files), "absent", "got a directory")
    refused(here("parity", str(tmp_path)), "config.json")


def test_damaged_weights_are_one_message_that_names_all(tmp_path):
    weights = telling_weights(small_config(), 0)
    del weights["stack.final_norm.bias"]
    weights["surplus"] = np.ones(3, np.float32)
    weights["stack.final_norm.weight"] = np.ones(7, np.float32)
    weights["stack.blocks.0.attention.key.bias"][3] = np.nan
    write_model(tmp_path / "model", small_config(), weights)
    refused(
        here("parity", str(tmp_path / "model")),
        "stack.final_norm.bias",
        "surplus",
        "(7,)",
        "stack.blocks.0.attention.key.bias",
    )


def test_a_config_that_contradicts_itself_is_exit_code_2(tmp_path):
    write_model(tmp_path / "model", small_config(), telling_weights(small_config(), 0))
    values = small_config().to_dict() | {"num_kv_heads": 2, "norm_eps": -1.0}
    values.pop("gated")
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    refused(here("parity", str(tmp_path / "model")), "num_kv_heads", "norm_eps", "gated: missing")


def test_the_configuration_of_a_preset_is_printed_whole():
    done = twinformer("config", "llama")
    assert done.returncode == 0
    assert ModelConfig.from_json(done.stdout) == preset("llama")
    refused(here("config", "lama"), "lama", "llama")


def test_a_missing_framework_is_said_plainly(tmp_path):
    """Run where jax cannot be found: a directory of that name that is no package hides nothing, so block the finder."""
    script = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'jax' else find(name, *rest)\n"
        "from twinformer.cli import main\n"
        "sys.argv = ['twinformer', 'parity', 'gpt2']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    refused(done, "jax", "pip install")


def test_a_defect_is_never_taken_for_a_verdict():
    script = (
        "import importlib, sys\n"
        "j = importlib.import_module('twinformer.parity.judge')\n"
        "j.judge = lambda *a, **k: 1 / 0\n"
        "from twinformer.cli import main\n"
        "sys.argv = ['twinformer', 'parity', 'gpt2']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    refused(done, "ZeroDivisionError", "nothing was judged")


@pytest.mark.parametrize("arguments", [["--help"], ["parity", "--help"]])
def test_help_is_there(arguments):
    done = twinformer(*arguments)
    assert done.returncode == 0
    assert "parity" in done.stdout


def test_the_command_is_installed():
    assert (Path(sys.executable).parent / "twinformer").is_file()
