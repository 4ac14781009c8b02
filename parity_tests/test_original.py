"""``twinformer parity DIR --witness transformers``: every family and head that is read, and faults that it sees."""

import ast
import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.numpy import load_file, save_file
from transformers.models.auto import modeling_auto

import torch_impl.losses
from parity_tests import published_decoders as decoders
from parity_tests import published_seq2seq as seq2seq
from parity_tests import test_pretrained_encoders as encoders
from parity_tests.test_cli import here, refused
from parity_tests.test_pretrained_writing import OWN_HEAD, with_own_head
from twinformer import pretrained
from twinformer.parity.case import make_case, telling_inputs
from twinformer.parity.evidence import Evidence
from twinformer.parity.judge import CannotJudgeError
from twinformer.parity.original import Original
from twinformer.parity.report import Report
from twinformer.parity.subjects import find
from twinformer.parity.twins import TorchTwin
from twinformer.parity.witness import ask_transformers, witnesses_for

ROOT = Path(__file__).resolve().parent.parent
#: family, class or head, case
DECODERS = [(family, name) for family, kind in decoders.KINDS.items() for name in kind.classes]
SEQ2SEQ = [(family, name) for family, kind in seq2seq.KINDS.items() for name in kind.cases] + [("t5", OWN_HEAD)]
ENCODERS = [(family, head) for family in encoders.SETTINGS for head in encoders.HEADS]
RICH = {"mistral": "window", "qwen2": "window above", "qwen3": "window above", "phi3": "window"}

pytestmark = pytest.mark.usefixtures("one_thread")


def publish(family, which, place):
    """A random model as the library saves it: of a decoder a class, of an encoder a head, else a case."""
    if family in decoders.KINDS:
        kind = decoders.KINDS[family]
        model = kind.model(kind.settings(RICH.get(family, next(iter(kind.cases)))), class_name=which)
        model.save_pretrained(place)
    elif family in seq2seq.KINDS:
        model = with_own_head(place) if which == OWN_HEAD else seq2seq.KINDS[family].make(which)
        if which != OWN_HEAD:
            model.save_pretrained(place)
    else:
        model = encoders.published(family, which, place)
    return place


def asked(place, *, change=lambda read: read, length=24, twins=(TorchTwin, TorchTwin)):
    """What the witness says of PyTorch's twin, or of both. ``change``: what our reader gives, made wrong."""
    read = pretrained.read(place)
    wrong = change(read)
    inputs = telling_inputs(wrong.config, 0, length=length)
    case = make_case("model", wrong.config, wrong.tensors, inputs)
    report = Report("model", "", {}, {})
    ask_transformers(Original(place, read), Evidence(case, tuple(twin() for twin in twins)), report)
    return report.witnesses["transformers"]


@pytest.mark.parametrize(("family", "which"), [*DECODERS, *SEQ2SEQ, *ENCODERS])
def test_every_class_of_every_family(family, which, tmp_path):
    rung = asked(publish(family, which, tmp_path))
    assert rung.verdict == "agree", rung.problems
    names = {one.name.removesuffix(" of torch_impl") for one in rung.comparisons}
    stacks = {"encoder", "decoder"} if family in seq2seq.KINDS else {"stack"}
    assert {"output", *stacks} <= names
    assert ("loss" in names) == (not which.endswith(("Model", "QuestionAnswering")) or which.endswith("HeadModel"))
    config = pretrained.read(tmp_path).config
    assert sum("blocks" in name or name in stacks for name in names) == config.num_layers + config.num_encoder_layers


def test_every_family_that_is_read_is_here():
    assert {family for family, _ in [*DECODERS, *SEQ2SEQ, *ENCODERS]} == set(pretrained.FAMILIES)


# ---- faults


def _choose(**changes):
    return lambda read: dataclasses.replace(read, config=read.config.replace(**changes))


def _off(path, by=1e-7):
    """One weight of a leaf, the largest."""

    def change(read):
        leaf = read.tensors[path].copy()
        leaf.flat[np.abs(leaf).argmax()] *= 1 + by
        return dataclasses.replace(read, tensors=read.tensors | {path: leaf})

    return change


#: what is made wrong, and the first that differs
FAULTS = {
    ("llama", "LlamaForCausalLM"): [
        (_off("stack.blocks.0.attention.value.weight"), "stack.blocks.0"),
        (_off("stack.blocks.1.feedforward.down.weight"), "stack"),
        (_off("head.weight"), "output"),
        (_choose(activation="gelu"), "stack.blocks.0"),
    ],
    ("gpt2", "GPT2LMHeadModel"): [(_choose(position_counting="places"), "embedding")],
    ("mistral", "MistralModel"): [(_choose(window=5), "stack.blocks.0")],
    ("gemma2", "Gemma2ForSequenceClassification"): [(_off("head.weight"), "output"), (_choose(pool="first"), "output")],
    ("bert", "ForTokenClassification"): [(_off("head.bias"), "output")],
    ("bert", "ForMaskedLM"): [(_off("head.transform.weight"), "output"), (_choose(norm_eps=1e-5), "embedding")],
    ("roberta", "ForQuestionAnswering"): [(_choose(position_counting="places"), "embedding")],
    ("distilbert", "ForSequenceClassification"): [(_choose(pooler="tanh"), "output")],
    ("t5", "1.0"): [
        (_off("encoder.relative_bias.weight"), "encoder.blocks.0"),
        (_off("decoder.blocks.0.cross_attention.key.weight"), "decoder.blocks.0"),
        (_choose(head_scale=None), "output"),
    ],
    ("marian", "plain"): [(_off("head.bias"), "output"), (_choose(sinusoid_layout="interleaved"), "source_embedding")],
    ("marian", "two vocabularies"): [(_off("source_embedding.tokens.weight", 1e-5), "source_embedding")],
    ("m2m_100", "plain"): [(_choose(position_offset=1), "source_embedding")],
}


@pytest.mark.parametrize(
    ("family", "which", "fault"), [(*where, i) for where, faults in FAULTS.items() for i in range(len(faults))]
)
def test_a_planted_fault_differs_and_from_where(family, which, fault, tmp_path):
    change, first = FAULTS[family, which][fault]
    rung = asked(publish(family, which, tmp_path), change=change)
    assert rung.verdict == "differ"
    assert rung.problems[0].startswith(f"{first} of torch_impl: largest difference")
    assert rung.worst.relative > 1e-9


def test_another_loss_differs(tmp_path, monkeypatch):
    publish("gpt2", "GPT2LMHeadModel", tmp_path)
    right = torch_impl.losses.mean_loss
    monkeypatch.setattr(torch_impl.losses, "mean_loss", lambda total, count: right(total, count + 1))
    rung = asked(tmp_path)
    assert rung.verdict == "differ"
    assert {problem.partition(":")[0] for problem in rung.problems} == {"loss of torch_impl"}


# ---- the command


@pytest.mark.parametrize(
    ("family", "which", "name"),
    [
        ("gemma2", "Gemma2ForCausalLM", "Gemma2ForCausalLM"),
        ("m2m_100", "plain", "M2M100ForConditionalGeneration"),
        ("roberta", "ForQuestionAnswering", "RobertaForQuestionAnswering"),
    ],
)
def test_both_twins_and_the_original_on_the_command_line(family, which, name, tmp_path):
    place, file, page = publish(family, which, tmp_path / "model"), tmp_path / "report.json", tmp_path / "report.html"
    asked = ("--rungs", "parameters", "--witness", "transformers", "--json", str(file), "--html", str(page))
    done = here("parity", str(place), *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    (witness,) = json.loads(file.read_text())["witnesses"]
    assert (witness["name"], witness["verdict"]) == ("transformers", "agree")
    assert witness["notes"][0].startswith(f"{name} of transformers 5.")
    compared = {one["name"] for one in witness["comparisons"]}
    assert {"output of torch_impl", "output of flax_impl"} <= compared
    assert all(one["relative"] <= one["bound"] == 1e-11 for one in witness["comparisons"])
    assert f"transformers: note: {name} of transformers 5." in " ".join(done.stdout.split())
    assert f"<li>{name} of transformers 5." in page.read_text(encoding="utf-8")


def test_one_weight_that_our_reader_has_wrong_is_exit_code_1(tmp_path, monkeypatch):
    place, file, page = publish("bart", "plain", tmp_path / "model"), tmp_path / "report.json", tmp_path / "report.html"
    read = pretrained.read
    wrong = _off("encoder.blocks.1.feedforward.up.weight")
    monkeypatch.setattr(pretrained, "read", lambda *given, **options: wrong(read(*given, **options)))
    asked = ("--rungs", "parameters", "--witness", "transformers", "--json", str(file), "--html", str(page))
    done = here("parity", str(place), *asked)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert [rung["verdict"] for rung in report["rungs"] if rung["name"] == "parameters"] == ["agree"]
    (witness,) = report["witnesses"]
    assert witness["verdict"] == report["verdict"] == "differ"
    agreeing = {one["name"] for one in witness["comparisons"] if one["agrees"]} - {
        "loss of torch_impl",
        "loss of flax_impl",
    }
    before = ("source_embedding", "encoder.blocks.0", "target_embedding")
    assert agreeing == {f"{path} of {twin}" for twin in ("torch_impl", "flax_impl") for path in before}
    assert "encoder of torch_impl: largest difference" in page.read_text(encoding="utf-8")
    assert "verdict: differ" in done.stdout


def test_without_the_library_or_its_class_it_is_exit_code_2(tmp_path, monkeypatch):
    place = publish("gpt2", "GPT2Model", tmp_path / "model")
    asked = ("parity", str(place), "--rungs", "parameters", "--witness", "transformers")
    refused(here(*asked[:-1], "fairseq"), "expected one of transformers, got 'fairseq'")
    monkeypatch.delitem(modeling_auto.MODEL_MAPPING_NAMES, "gpt2")
    refused(here(*asked), "expected a class for model_type 'gpt2' with head 'none', got none in version 5.")
    monkeypatch.setitem(modeling_auto.MODEL_MAPPING_NAMES, "gpt2", "GPT7Model")
    refused(here(*asked), "got none by the name GPT7Model in version 5.")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    refused(here(*asked), "transformers: expected it installed")


def test_a_directory_that_the_library_does_not_load_whole_is_refused(tmp_path):
    place = publish("gpt2", "GPT2LMHeadModel", tmp_path / "model")
    read = pretrained.read(place)
    original = Original(place, read)
    tensors = load_file(place / "model.safetensors")
    inputs = telling_inputs(read.config, 0)
    save_file({name: a for name, a in tensors.items() if "h.1.ln_2" not in name}, place / "model.safetensors")
    with pytest.raises(CannotJudgeError, match=r"GPT2LMHeadModel of transformers 5.*h\.1\.ln_2\.bias: missing"):
        original.answer(inputs)
    (place / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CannotJudgeError, match=r"expected it to load .*, got \w+"):
        original.answer(inputs)


def test_padding_that_is_found_by_its_id_stands_nowhere_else(tmp_path):
    """RoBERTa and M2M-100 count positions so, and labels of a sequence are its last token's: the inputs follow."""
    for family, which in (
        ("m2m_100", "plain"),
        ("roberta", "ForMaskedLM"),
        ("qwen2", "Qwen2ForSequenceClassification"),
    ):
        place = publish(family, which, tmp_path / family)
        read = pretrained.read(place)
        pad = json.loads((place / "config.json").read_text())["pad_token_id"]
        given = telling_inputs(read.config, 0, length=30)
        told = Original(place, read).answer(given).inputs
        for name, mask in (("tokens", "padding_mask"), ("source", "source_padding_mask")):
            if name in given:
                assert (given[name][given[mask]] == pad).any()
                assert np.array_equal(told[name] == pad, ~given[mask])
                kept = given[mask] & (given[name] != pad)
                assert np.array_equal(told[name][kept], given[name][kept])


def test_the_library_is_imported_where_it_is_asked_for_only():
    """At the top of no module; and nowhere outside the judge."""
    found = set()
    for file in (ROOT / "twinformer").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        whole = {name for node in ast.walk(tree) for name in imported(node)}
        if "transformers" in whole:
            found.add(file.relative_to(ROOT).as_posix())
        assert "transformers" not in {name for node in tree.body for name in imported(node)}, file
    assert found == {"twinformer/parity/original.py"}


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return [str(node.module).partition(".")[0]] if isinstance(node, ast.ImportFrom) else []


def test_pickled_weights_and_a_tokenizer_beside_two_stacks_are_judged_too(tmp_path):
    place = publish("t5", "gated", tmp_path / "model")
    tensors = load_file(place / "model.safetensors")
    torch.save({name: torch.from_numpy(a) for name, a in tensors.items()}, place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1}, "<unk>"))
    words.save(str(place / "tokenizer.json"))
    subject = find(str(place))
    assert subject.published.tokenizer is not None
    assert subject.case.inputs.keys() == {"source", "source_padding_mask", "target", "target_padding_mask"}
    report = Report("model", "", {}, {})
    (witness,) = witnesses_for(subject, "transformers")
    witness(Evidence(subject.case, (TorchTwin(), TorchTwin())), report)
    assert report.witnesses["transformers"].verdict == "agree", report.witnesses["transformers"].problems
