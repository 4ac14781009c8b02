"""Rung 6: right trainers agree, with each other and with the judge's own run; every figure is seen to fail."""

import dataclasses

import numpy as np
import pytest

import flax_impl.training
import torch_impl.training
from parity_tests.mutants import MUTANTS
from twinformer.data.batch import Batch
from twinformer.learning import TrainingConfig
from twinformer.parity import judge, random_case
from twinformer.parity.compare import Comparison, compare
from twinformer.parity.curves import draw
from twinformer.parity.evidence import Evidence
from twinformer.parity.html import as_html
from twinformer.parity.lessons import IGNORED, SHARES, lessons
from twinformer.parity.philox import fold, philox, random_key
from twinformer.parity.rungs import accumulation, adapters, training
from twinformer.parity.training_runs import cross_entropy
from twinformer.parity.twins import FlaxTwin, TorchTwin
from twinformer.presets import preset

# checks of shapes at every call, which other tests make, take most of the time here
pytestmark = pytest.mark.usefixtures("without_shape_hook")

SMALL = {"model_dim": 12, "hidden_dim": 16, "num_layers": 1, "vocab_size": 23, "context_length": 16}


def small(name: str, **changes):
    config = preset(name)
    sizes = dict(SMALL)
    if config.architecture == "encoder-decoder":
        sizes |= {"num_encoder_layers": 1, "source_vocab_size": 23}
    return random_case(name, config.replace(**(sizes | changes)), seed=3, length=12)


class Other(TorchTwin):
    """PyTorch in the place of the other twin: what is asked here does not need the other framework's compiler."""

    name = "other"


def torch_twice(case, twins=None):
    return Evidence(case, twins or (TorchTwin(), Other()))


def planted(name, twin="torch_impl"):
    return next(mutant for mutant in MUTANTS if (mutant.id, mutant.twin) == (name, twin)).plant()


# ---- agreement


def test_both_twins_train_alike():
    rung = training.check(Evidence(small("textbook-decoder")))
    assert rung.verdict == "agree", rung.problems
    assert rung.checked.startswith(f"{training.STEPS} steps, ")
    told = {one.name.partition(" (")[0] for one in rung.comparisons}
    assert {"count", "learning rate", "loss", "gradient norm", "evaluation: total", "evaluation: correct"} <= told
    assert "update of stack.blocks.0.attention.key.weight" in told
    assert "optimizer/ema/stack.blocks.0.attention.key.weight" in told
    begun = {one.name for one in rung.comparisons if "weights of seed" in one.name}
    assert {name.partition(":")[0] for name in begun} == {"torch_impl", "flax_impl"}
    assert {one.name.rpartition(", ")[2] for one in rung.comparisons if one.name not in begun} == {
        "flax_impl)",
        "by hand)",
    }


def test_other_initial_weights_are_found(monkeypatch):
    """Those of seed 0, whatever the seed."""
    build = torch_impl.training.build
    monkeypatch.setattr(
        torch_impl.training, "build", lambda config, seed: build(config, seed=None if seed is None else 0)
    )
    rung = training.check(torch_twice(small("textbook-decoder")))
    assert rung.verdict == "differ"
    assert rung.culprits == ["initial weights"]


def test_a_models_own_dropout_is_trained_with(monkeypatch):
    """No key where only embeddings drop, which no rate of the judge's own choosing would show."""
    loss = torch_impl.training.Trainer._eager_loss

    def wrong(self, *arguments):
        config = self.config
        drops = config.dropout or config.attention_dropout or config.hidden_dropout
        return loss(self, *arguments[:-1], arguments[-1] if drops else None)

    monkeypatch.setattr(torch_impl.training.Trainer, "_eager_loss", wrong)
    assert training.check(torch_twice(small("gpt2"))).verdict == "agree"
    assert training.check(torch_twice(small("gpt2", embedding_dropout=0.1))).verdict == "differ"


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_other_models_train_as_the_judge_has_it(name):
    rung = training.check(torch_twice(small(name)))
    assert rung.verdict == "agree", rung.problems


def test_a_model_without_a_head_does_not_apply():
    case = small("bert", head="none", head_bias=False)
    assert training.check(torch_twice(case)).verdict == "does not apply"
    assert accumulation.check(torch_twice(case)).verdict == "does not apply"


def test_a_cut_model_is_said_to_be_one():
    rung = training.check(torch_twice(small("gpt2", num_layers=3)))
    assert rung.notes[-1] == "a model of 1 of 3 layers stands for the whole"


# ---- the batches


def test_lessons_tell():
    """Unequal counts, none at all, padding on both sides, and ids that no table has where nothing counts."""
    batches = lessons(small("textbook-decoder").config)
    counts = [[batch.count for batch in of_step] for of_step in batches]
    assert [len(of_step) for of_step in batches] == [len(shares) for shares in SHARES]
    assert any(len(set(of_step)) > 1 for of_step in counts)
    assert [0, 0] in counts
    assert any(0 in of_step and sum(of_step) for of_step in counts)
    assert len(counts[-1]) == 1
    for of_step in batches:
        for batch in of_step:
            mask = batch.inputs["padding_mask"]
            assert not mask[:, 0].all() or not mask[:, -1].all()
            assert (batch.targets[~batch.real] == IGNORED).all()
            assert not (batch.real & ~mask).any()


# ---- the judge's own parts


def test_philox_gives_the_known_answers():
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    full = 0xFFFFFFFF
    assert philox((full,) * 4, (full, full)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    assert random_key(2**33 + 7) == (7, 2)
    assert fold((7, 2), 3) == philox((3, 0, 0, 1), (7, 2))[:2]


def test_the_judges_loss_has_the_gradient_that_it_says():
    rng = np.random.default_rng(0)
    logits, real = rng.standard_normal((2, 3, 5)), rng.random((2, 3)) < 0.7
    targets = np.where(real, rng.integers(0, 5, (2, 3)), IGNORED)
    batch = Batch({"tokens": targets}, targets, real)
    total, slope = cross_entropy(logits, batch, 0.1, 1e-2)
    assert np.isfinite(total)
    for place in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[place] = 1e-6
        up, down = (cross_entropy(logits + sign * step, batch, 0.1, 1e-2)[0] for sign in (1, -1))
        assert abs((up - down) / 2e-6 - slope[place]) < 1e-8
    assert not slope[~real].any()


# ---- it can fail

FAULTS = {
    "L1": {"loss"},
    "L3": {"gradient norm"},
    "L4": {"count"},
    "L5": {"loss"},
    "O10": {"every update"},
    "O12": {"learning rate"},
    "T82": {"loss"},
    "T83": {"loss"},
    "T87": {"evaluation: total"},
    "T88": {"gradient norm"},
}


@pytest.mark.parametrize("name", FAULTS)
def test_two_that_are_wrong_alike_are_found(name):
    """Both have the fault and agree with each other: the judge's own run does not."""
    with planted(name):
        rung = training.check(torch_twice(small("textbook-decoder")))
    assert rung.verdict == "differ"
    wrong = [one.name for one in rung.comparisons if not one.agrees]
    assert all("by hand" in where for where in wrong if name != "O10")
    assert set(rung.culprits) == FAULTS[name]
    assert any(note.startswith("parted first") for note in rung.notes)
    assert "not as the judge has it by hand: torch_impl, other" in rung.notes


class Off(Other):
    """A trainer whose update of one parameter is off by a share, in one step."""

    def __init__(self, share, what="updates"):
        self.share, self.what = share, what

    def train(self, case, *arguments, **options):
        runs = super().train(case, *arguments, **options)
        return [dataclasses.replace(run, steps=tuple(map(self._changed, range(99), run.steps))) for run in runs]

    def _changed(self, number, step):
        if number != 4:
            return step
        if self.what != "updates":
            return dataclasses.replace(step, **{self.what: getattr(step, self.what) * (1 + self.share)})
        path = "stack.blocks.0.attention.value.weight"
        return dataclasses.replace(step, updates=step.updates | {path: step.updates[path] * (1 + self.share)})


@pytest.mark.parametrize("what", ["updates", "loss", "learning_rate"])
def test_little_is_enough_and_rounding_is_not(what):
    case = small("textbook-decoder")
    rung = training.check(torch_twice(case, (TorchTwin(), Off(1e-8, what))))
    assert rung.verdict == "differ"
    named = "update of stack.blocks.0.attention.value.weight" if what == "updates" else what.replace("_", " ")
    assert rung.culprits == [named]
    assert any(note.startswith("parted first at step 4") for note in rung.notes)
    assert "not as the judge has it by hand: other" in rung.notes
    assert training.check(torch_twice(case, (TorchTwin(), Off(1e-12, what)))).verdict == "agree"


def test_what_is_missing_is_found():
    class Forgets(Other):
        def train(self, *arguments, **options):
            runs = super().train(*arguments, **options)
            kept = [{name: leaf for name, leaf in run.state.items() if "/ema/" not in name} for run in runs]
            return [dataclasses.replace(run, state=state) for run, state in zip(runs, kept, strict=True)]

    rung = training.check(torch_twice(small("textbook-decoder"), (TorchTwin(), Forgets())))
    assert rung.verdict == "differ"
    assert any("optimizer/ema/embedding.tokens.weight" in problem for problem in rung.problems)


def test_without_both_kinds_of_clipping_it_cannot_tell(monkeypatch):
    original = training._clipping_at
    monkeypatch.setattr(training, "_clipping_at", lambda training, norm: original(training, 1e9))
    rung = training.check(torch_twice(small("textbook-decoder")))
    assert rung.verdict == "cannot tell"
    assert "clipping" in rung.problems[0]


def test_clipping_follows_norms_that_move_away(monkeypatch):
    """Of a model whose norms fall at once, clipping is set to what they came to be."""
    first = training.mean_gradients

    def far(*arguments):
        loss, norm, count, gradients = first(*arguments)
        return loss, norm * 1e6, count, gradients

    monkeypatch.setattr(training, "mean_gradients", far)
    rung = training.check(torch_twice(small("textbook-decoder")))
    assert rung.verdict == "agree", rung.problems


def test_where_everything_below_agrees_the_step_is_named():
    case = small("textbook-decoder")
    twins = (TorchTwin(), Off(1e-3, "loss"))
    report = judge(case, rungs=("forward", "gradients", "training"), twins=twins)
    assert report.rungs["training"].verdict == "differ"
    assert any("the step itself" in note for note in report.rungs["training"].notes)
    alone = judge(case, rungs=("training",), twins=twins)
    assert not any("the step itself" in note for note in alone.rungs["training"].notes)


# ---- sums in bfloat16


def test_sums_are_wide():
    rung = accumulation.check(Evidence(small("textbook-decoder"), (TorchTwin(), FlaxTwin())))
    assert rung.verdict == "agree", rung.problems


@pytest.mark.parametrize(("name", "named"), [("O15", "sum"), ("O11", "norm"), ("O14", "move"), ("L1", "sum")])
def test_narrow_sums_are_found(name, named):
    with planted(name):
        rung = accumulation.check(torch_twice(small("textbook-decoder")))
    assert rung.verdict == "differ"
    assert named in rung.culprits


@pytest.mark.parametrize("twin", ["torch_impl", "flax_impl"])
def test_a_loss_that_is_not_widened_is_found(twin):
    faulty, sound = (FlaxTwin(), TorchTwin()) if twin == "flax_impl" else (TorchTwin(), FlaxTwin())
    with planted("T152", twin):
        found = {one.name for one in accumulation.losses(faulty) if not one.agrees}
        assert all(one.agrees for one in accumulation.losses(sound))
    assert found
    assert all("bfloat16" in name for name in found)


# ---- evaluation


@pytest.mark.parametrize("module", [torch_impl.training, flax_impl.training])
def test_a_row_with_nan_is_never_right(module):
    """Not even where the target is what the highest of NaN would be."""
    case = small("textbook-decoder")
    tensors = {path: leaf * np.nan if "final_norm" in path else leaf for path, leaf in case.tensors.items()}
    trainer = module.Trainer(case.config, TrainingConfig())
    tokens = np.arange(10).reshape(2, 5)
    everywhere = np.ones((2, 5), bool)
    found = trainer.evaluate(trainer.init(tensors), Batch({"tokens": tokens}, np.zeros((2, 5), np.int64), everywhere))
    assert np.isnan(found.total)
    assert (found.count, found.correct) == (10, 0)


# ---- adapters


def test_adapters_are_trained_as_the_judge_has_it():
    rung = adapters.check(Evidence(small("textbook-decoder"), (TorchTwin(), FlaxTwin())))
    assert rung.verdict == "agree", rung.problems
    merged = [one for one in rung.comparisons if isinstance(one, Comparison) and one.name.startswith("saved ")]
    assert any("query.weight" in one.name for one in merged)
    case = small("bert", head="none", head_bias=False)
    assert adapters.check(torch_twice(case)).verdict == "does not apply"


@pytest.mark.parametrize(
    ("name", "culprit"), [("T147", "evaluation: total"), ("T148", "loss"), ("T149", "gradient norm")]
)
def test_two_trainers_that_are_wrong_alike_about_adapters_are_found(name, culprit):
    with planted(name):
        rung = adapters.check(torch_twice(small("textbook-decoder")))
    assert rung.verdict == "differ"
    assert rung.culprits[0] == culprit


# ---- the curves


def test_curves_are_on_the_page():
    case = small("textbook-decoder")
    report = judge(case, rungs=("training",), twins=(TorchTwin(), Off(1e-3, "loss")))
    page = as_html(report)
    assert page.count('class="curves"') == 1
    assert page.count('class="hand"') == 2 * training.STEPS
    assert page.count("<polyline") == 7
    agreeing = judge(case, rungs=("training",), twins=(TorchTwin(), Other()))
    assert draw(report.rungs["training"]) != draw(agreeing.rungs["training"])
    assert 'class="curves"' not in as_html(judge(case, rungs=("parameters",)))


def test_nothing_to_draw_draws_nothing():
    rung = dataclasses.replace(training.check(torch_twice(small("bert", head="none", head_bias=False))))
    assert draw(rung) == ""
    rung.comparisons = [compare("output", np.ones(2), np.ones(2), bound=1.0)]
    assert draw(rung) == ""
