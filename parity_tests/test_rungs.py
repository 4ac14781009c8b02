"""Rungs 1 (other calls, non-finite values), 4, 5, 9: right twins agree; each is seen to fail on planted faults."""

import dataclasses

import numpy as np
import pytest
import torch

import flax_impl
import torch_impl
from parity_tests.helpers import shape_hook_off
from twinformer.parity import judge, random_case
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs import (
    calls,
    compilation,
    forward,
    nonfinite,
    optimizer,
    parameters,
    persistence,
    resumption,
    sharding,
)
from twinformer.parity.twins import FlaxTwin, TorchTwin
from twinformer.presets import preset


def small(name: str, **changes):
    return random_case(name, preset(name).replace(**changes), seed=3, length=12)


# ---- other calls


@pytest.mark.parametrize("name", ["textbook-encoder-decoder", "bert", "llama"])
def test_other_calls_agree(name):
    rung = calls.check(Evidence(small(name)))
    assert rung.verdict == "agree", rung.problems
    more = "positions and no mask, documents in a row, documents with positions"
    more = "positions and the source's mask" if name == "textbook-encoder-decoder" else more
    assert rung.checked.startswith(f"tokens only, positions given, {more}: ")


def positions_from_one(monkeypatch):
    """Counted from 1 where neither a mask nor positions are given."""
    forward = torch_impl.Embeddings.forward

    def wrong(self, tokens, positions=None, *arguments, **options):
        if positions is None:
            positions = torch.arange(tokens.shape[1])[None] + 1
        return forward(self, tokens, positions, *arguments, **options)

    monkeypatch.setattr(torch_impl.Embeddings, "forward", wrong)


def positions_ignored(monkeypatch):
    """Those of the caller, where there is a mask."""
    forward = torch_impl.LanguageModel.forward

    def wrong(self, tokens, *, padding_mask=None, positions=None, **options):
        positions = positions if padding_mask is None else None
        return forward(self, tokens, padding_mask=padding_mask, positions=positions, **options)

    monkeypatch.setattr(torch_impl.LanguageModel, "forward", wrong)


def documents_in_rising_order(monkeypatch):
    """A document whose number is smaller than the one before counts on from it."""
    right = torch_impl.masks.segment_positions
    monkeypatch.setattr(torch_impl.masks, "segment_positions", lambda segments: right(segments.cummax(1).values))


def test_padding_between_tokens_is_looked_at(monkeypatch):
    """Positions that are places from the first token on: right wherever padding stands at an end."""
    monkeypatch.setattr(
        torch_impl.masks,
        "positions_from",
        lambda real: (torch.arange(real.shape[1]) - real.int().argmax(1)[:, None]).clamp(min=0) * real.any(1)[:, None],
    )
    rung = forward.check(Evidence(small("gpt2", num_layers=1)))
    assert rung.verdict == "differ"
    assert all(" at [2, " in problem for problem in rung.problems)


@pytest.mark.parametrize(
    ("plant", "call"),
    [
        (positions_from_one, "tokens only"),
        (positions_ignored, "positions given"),
        (documents_in_rising_order, "documents in a row"),
    ],
)
def test_a_default_that_is_wrong_is_found(plant, call, monkeypatch):
    plant(monkeypatch)
    evidence = Evidence(small("gpt2", num_layers=1), with_gradients=True)
    assert forward.check(evidence).verdict == "agree"
    rung = calls.check(evidence)
    assert rung.verdict == "differ"
    assert all(f"({call})" in problem for problem in rung.problems)
    assert rung.culprits


# ---- NaN and infinities


@pytest.mark.parametrize("name", ["textbook-encoder-decoder", "llama", "t5", "bert"])
def test_poison_stays_where_it_belongs(name):
    rung = nonfinite.check(Evidence(small(name)))
    assert rung.verdict == "agree", rung.problems


def test_poison_that_leaks_is_found(monkeypatch):
    """What is hidden is multiplied by 0 instead of left out, and 0 times NaN is NaN."""
    forward = torch_impl.AttentionLayer.forward

    def leaky(self, X, *arguments, **options):
        return forward(self, X, *arguments, **options) + 0 * X.sum(1, keepdim=True)

    monkeypatch.setattr(torch_impl.AttentionLayer, "forward", leaky)
    rung = nonfinite.check(Evidence(small("llama")))
    assert rung.verdict == "differ"
    assert any(problem.startswith("output of torch_impl (hidden against clean): NaN") for problem in rung.problems)


def test_nan_to_num_on_one_side_is_found(monkeypatch):
    forward = torch_impl.FeedForward.forward
    monkeypatch.setattr(torch_impl.FeedForward, "forward", lambda *a, **kw: torch.nan_to_num(forward(*a, **kw)))
    rung = nonfinite.check(Evidence(small("llama")))
    assert rung.verdict == "differ"
    assert any("NaN at different places" in problem for problem in rung.problems)


def test_nan_to_num_on_both_sides_is_found(monkeypatch):
    """Both twins agree that poison in plain sight is nothing: the rung does not."""

    class Blind(TorchTwin):
        def run(self, case, **options):
            run = super().run(case, **options)
            return dataclasses.replace(run, output=np.nan_to_num(run.output))

    class BlindToo(FlaxTwin):
        def run(self, case, **options):
            run = super().run(case, **options)
            return dataclasses.replace(run, output=np.nan_to_num(run.output))

    rung = nonfinite.check(Evidence(small("llama"), (Blind(), BlindToo())))
    assert [problem for problem in rung.problems if "is not seen in the output" in problem]


def test_a_vocabulary_of_one_does_not_apply():
    report = judge(small("llama", vocab_size=1), rungs=["nonfinite"])
    assert report.rungs["nonfinite"].verdict == "does not apply"
    assert report.verdict == "does not apply"
    assert report.exit_code == 2


class Terse(TorchTwin):
    """Refuses wrong leaves as it should, in other words than the other twin."""

    def refusal(self, case, tensors):
        return f"No: {super().refusal(case, tensors)}"


class Willing(TorchTwin):
    def refusal(self, case, tensors):
        return ""


@pytest.mark.parametrize(("twin", "told"), [(Terse, "the same words of both twins"), (Willing, "got none")])
def test_a_refusal_of_wrong_leaves_is_asked_for(twin, told):
    rung = parameters.check(Evidence(small("llama", num_layers=1), (twin(), FlaxTwin())))
    assert rung.verdict == "differ"
    assert rung.culprits == ["load_weights"]
    assert told in rung.problems[0]


@pytest.mark.parametrize(("batch", "length"), [(4, 1), (2, 2), (1, 3), (1, 4)])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_little_to_look_at_is_no_false_alarm(name, batch, length):
    """Where every query meets what is not finite nothing could be compared (found by chance)."""
    case = random_case(name, preset(name).replace(num_layers=1), seed=3, batch=batch, length=length)
    rung = nonfinite.check(Evidence(case))
    assert rung.verdict == "agree", rung.problems
    heads = [one for one in rung.comparisons if one.name.endswith("seen by one head)")]
    assert len(heads) == (length >= 4)


# ---- compilation


def test_compiled_eager_and_remat_agree():
    torch.compiler.reset()
    with shape_hook_off():
        rung = compilation.check(Evidence(small("textbook-decoder", num_layers=1), with_gradients=True))
    assert rung.verdict == "agree", rung.problems
    assert rung.checked.startswith("11 modes")


@pytest.mark.parametrize("fault", ["torch_impl, remat", "flax_impl, eager"])
def test_a_mode_that_computes_something_else_is_found(fault, monkeypatch):
    original = compilation.run_in_mode

    def faulty(twin, case, mode):
        run = original(twin, case, mode)
        if f"{twin.name}, {mode}" == fault:
            path = "stack.blocks.0.attention.value.weight"
            run.gradients[path] = run.gradients[path] * (1 + 1e-9)
        return run

    monkeypatch.setattr(compilation, "run_in_mode", faulty)
    monkeypatch.setattr(compilation, "MODES", {"torch_impl": ("remat",), "flax_impl": ("eager",)})
    monkeypatch.setattr(compilation, "_trained", lambda evidence: [])
    monkeypatch.setattr(compilation, "_written", lambda evidence: [])
    rung = compilation.check(Evidence(small("textbook-decoder", num_layers=1), with_gradients=True))
    assert rung.verdict == "differ"
    assert rung.problems[0].startswith(f"stack.blocks.0.attention.value.weight ({fault})")


def test_without_a_compiler_it_cannot_tell(monkeypatch):
    monkeypatch.setattr(compilation, "cpp_compiler", lambda: None)
    monkeypatch.setattr(compilation, "MODES", {"torch_impl": ("torch.compile", "remat"), "flax_impl": ("remat",)})
    rung = compilation.check(Evidence(small("textbook-decoder", num_layers=1), with_gradients=True))
    assert rung.verdict == "cannot tell"
    assert "C++ compiler" in rung.problems[0]


def test_remat_that_loses_the_key_is_found(monkeypatch):
    """Only with dropout: without a key there is nothing to lose."""
    original = compilation.run_in_mode

    def faulty(twin, case, mode):
        if twin.name == "torch_impl":
            case = dataclasses.replace(case, inputs={k: v for k, v in case.inputs.items() if k != "rng"})
        return original(twin, case, mode)

    monkeypatch.setattr(compilation, "run_in_mode", faulty)
    monkeypatch.setattr(compilation, "MODES", {"torch_impl": ("remat",), "flax_impl": ("remat",)})
    monkeypatch.setattr(compilation, "_trained", lambda evidence: [])
    monkeypatch.setattr(compilation, "_written", lambda evidence: [])
    rung = compilation.check(Evidence(small("textbook-decoder", num_layers=1), with_gradients=True))
    assert rung.verdict == "differ"
    assert all("torch_impl, remat" in problem for problem in rung.problems)


# ---- the optimizer


def test_the_optimizers_move_alike():
    rung = optimizer.check(Evidence(small("textbook-decoder", num_layers=1), with_gradients=True))
    assert rung.verdict == "agree", rung.problems
    assert rung.checked.startswith("4 optimizers, 10 steps")


@pytest.mark.parametrize("change", [{"eps": 1e-7}, {"beta2": 0.9991}, {"weight_decay": 0.1001}, {"clip_norm": 1.0001}])
def test_another_choice_of_the_optimizer_is_found(change, monkeypatch):
    original = optimizer.steps

    def faulty(name, config, *arguments):
        return original(name, dataclasses.replace(config, **change) if name == "torch_impl" else config, *arguments)

    monkeypatch.setattr(optimizer, "steps", faulty)
    monkeypatch.setattr(optimizer, "CONFIGS", {"adamw": optimizer.CONFIGS["adamw"]})
    rung = optimizer.check(Evidence(small("textbook-decoder", num_layers=1), with_gradients=True))
    assert rung.verdict == "differ"
    assert rung.culprits == ["adamw"]


def test_no_update_at_all_is_found(monkeypatch):
    """Parameters agree to a thousandth then; updates do not."""
    original = optimizer.steps

    def faulty(name, config, parameters, *arguments):
        seen = original(name, config, parameters, *arguments)
        return seen if name == "torch_impl" else [seen[0]] * len(seen)

    monkeypatch.setattr(optimizer, "steps", faulty)
    monkeypatch.setattr(optimizer, "CONFIGS", {"sgd": optimizer.CONFIGS["sgd"]})
    assert optimizer.check(Evidence(small("textbook-decoder", num_layers=1))).verdict == "differ"


# ---- persistence


def test_a_model_with_remat_is_kept_with_it():
    rung = persistence.check(Evidence(small("llama", remat=True)))
    assert rung.verdict == "agree", rung.problems


def test_each_twin_reads_what_the_other_wrote():
    rung = persistence.check(Evidence(small("textbook-encoder-decoder")))
    assert rung.verdict == "agree", rung.problems
    assert rung.checked.startswith("14 ways")


def test_one_bit_lost_on_the_way_is_found():
    class Loses(TorchTwin):
        def loaded(self, directory, dtype=None):
            config, leaves = super().loaded(directory, dtype)
            path = "stack.final_norm.weight"
            bits = leaves[path].view(np.uint8).copy()
            bits[0] ^= 1
            return config, leaves | {path: bits.view(leaves[path].dtype)}

    rung = persistence.check(Evidence(small("llama"), (Loses(), FlaxTwin())))
    assert rung.verdict == "differ"
    assert len(rung.problems) == 7
    assert all(problem.startswith("stack.final_norm.weight") for problem in rung.problems)


def test_another_dtype_is_found():
    class Widens(FlaxTwin):
        def loaded(self, directory, dtype=None):
            config, leaves = super().loaded(directory, dtype)
            return config, {path: leaf.astype(np.float64) for path, leaf in leaves.items()}

    rung = persistence.check(Evidence(small("llama"), (TorchTwin(), Widens())))
    assert rung.verdict == "differ"
    assert any("expected bfloat16" in problem and "float64 in the model" in problem for problem in rung.problems)


def test_a_dtype_that_was_asked_for_and_not_given_is_found(monkeypatch):
    load = flax_impl.load
    monkeypatch.setattr(flax_impl, "load", lambda directory, dtype=None: load(directory))
    rung = persistence.check(Evidence(small("gpt2", num_layers=1)))
    assert rung.verdict == "differ"
    told = [problem for problem in rung.problems if "expected bfloat16, got float32 in the model" in problem]
    assert told
    assert all(problem.startswith("flax_impl, as bfloat16") for problem in told)


# ---- a run that was stopped


def test_rows_of_a_matrix_are_not_taken_for_columns(monkeypatch):
    monkeypatch.setattr("flax_impl.training._EXCHANGED", {})
    rung = resumption.check(Evidence(small("textbook-decoder", num_layers=1)))
    assert rung.verdict == "differ"
    assert all("adafactor" in problem for problem in rung.problems)


@pytest.mark.parametrize("name", ["textbook-encoder-decoder", "bert"])
def test_a_stopped_run_goes_on_in_either_twin(name):
    rung = resumption.check(Evidence(small(name, num_layers=1)))
    assert rung.verdict == "agree", rung.problems
    assert rung.checked.startswith("4 ways, ")


class Forgetful(TorchTwin):
    """Writes or reads a state with one leaf lost."""

    def __init__(self, leaf, *, reads):
        self.leaf, self.reads = leaf, reads

    def train(self, *arguments, begin=None, **options):
        def lost(state):
            return {
                name: np.zeros_like(value) if name.startswith(self.leaf) else value for name, value in state.items()
            }

        begin = lost(begin) if begin is not None and self.reads else begin
        runs = super().train(*arguments, begin=begin, **options)
        return runs if self.reads else [dataclasses.replace(run, exported=lost(run.exported)) for run in runs]


@pytest.mark.parametrize(
    ("leaf", "reads"),
    [
        ("optimizer/exp_avg_sq/", True),
        ("optimizer/ema/stack.final_norm.weight", True),
        ("optimizer/ema/stack.final_norm.weight", False),
        ("optimizer/step", False),
    ],
)
def test_a_state_that_was_not_kept_whole_is_found(leaf, reads):
    case = small("textbook-decoder", num_layers=1)
    rung = resumption.check(Evidence(case, (Forgetful(leaf, reads=reads), FlaxTwin())))
    assert rung.verdict == "differ"
    ways = {one.name.rpartition(", ")[2].rstrip(")") for one in rung.comparisons if not one.agrees}
    assert ways == (
        {"torch_impl to torch_impl", "flax_impl to torch_impl"}
        if reads
        # what the other one wrote is read, and written again
        else {"torch_impl to torch_impl", "torch_impl to flax_impl", "flax_impl to torch_impl"}
    )


# ---- several devices


def test_spread_over_devices_they_compute_the_same():
    rung = sharding.check(Evidence(small("textbook-encoder-decoder", num_layers=1), with_gradients=True))
    assert rung.verdict == "agree", rung.problems
    assert rung.checked.startswith("2 twins, ")
    cut = [note.partition(": ")[2] for note in rung.notes]
    # an encoder of two, a decoder of one
    assert cut[0] == "2 processes, 3 blocks and the model sharded"
    assert cut[1].startswith("4 devices, ")


@pytest.mark.parametrize(("fault", "twin"), [("gradients_averaged", "torch_impl"), ("words_by_place", "flax_impl")])
def test_a_run_that_depends_on_the_devices_is_found(fault, twin):
    evidence = Evidence(small("textbook-decoder", num_layers=1), with_gradients=True)
    rung = sharding.check(evidence, prepare=f"parity_tests.sharding_faults:{fault}")
    assert rung.verdict == "differ"
    assert all(f"({twin}, sharded)" in problem for problem in rung.problems)


def test_a_process_that_dies_is_no_agreement():
    evidence = Evidence(small("textbook-decoder", num_layers=1), with_gradients=True)
    rung = sharding.check(evidence, prepare="parity_tests.sharding_faults:dies")
    assert rung.verdict == "cannot tell"
    assert rung.problems == [f"{twin}: OSError: a device was lost" for twin in ("torch_impl", "flax_impl")]
