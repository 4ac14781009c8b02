"""Weights in and out of both twins: total, in PyTorch's orientation by values, bit for bit from one to the other."""

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import flax_impl
from parity_tests.helpers import (
    FLAX,
    FLOAT64,
    TORCH,
    assert_close,
    both,
    parameters,
    random_array,
    scatter_parameters,
    to_numpy,
)
from parity_tests.strategies import seeded_cases
from twinformer import ModelConfig, WeightsError
from twinformer.checkpoint import read_model, write_model
from twinformer.initializers import initial_weights
from twinformer.parameters import model_parameters

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}


def config_of(**choices):
    sizes = {
        "vocab_size": 8,
        "context_length": 8,
        "model_dim": 8,
        "key_dim": 4,
        "hidden_dim": 8,
        "num_heads": 2,
        "num_layers": 2,
    }
    return ModelConfig(**({"architecture": "decoder", "positions": "learned", "head": "untied"} | sizes | choices))


RICH = {"gated": True, "qkv_bias": True, "output_bias": True, "head_bias": True, "embedding_norm": True}
RICH |= {"qk_norm": "layernorm", "positions": "relative"}
CONFIGS = {
    "square decoder": config_of(),
    "rich decoder": config_of(**RICH, num_kv_heads=1, value_dim=3),
    "encoder": config_of(architecture="encoder", num_token_types=2, head="none", embedding_norm=True),
    "one_plus": config_of(norm="rmsnorm", norm_bias=False, norm_weight="one_plus", qk_norm="rmsnorm", head="tied"),
    "two stacks": config_of(architecture="encoder-decoder", source_vocab_size=9, num_encoder_layers=1, **RICH),
    "two stacks, one table": config_of(architecture="encoder-decoder", share_embeddings=True, head="tied"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def random_weights(config, dtype=np.float64):
    """Distinct random values for every leaf that the configuration calls for."""
    return {
        path: random_array(i, *parameter.shape).astype(dtype)
        for i, (path, parameter) in enumerate(model_parameters(config).items())
    }


def build(twin, config, **options):
    return twin.file("models").build(config, **options)


def same_bits(actual, expected):
    assert list(sorted(actual)) == list(sorted(expected))
    for path, value in expected.items():
        assert actual[path].dtype == value.dtype, path
        assert actual[path].shape == value.shape, path
        assert actual[path].tobytes() == value.tobytes(), path


# ---- the set of parameters


@both
@every_config
def test_parameters_are_those_of_the_contract(twin, config):
    expected = {path: parameter.shape for path, parameter in model_parameters(config).items()}
    model = build(twin, config)
    assert {path: value.shape for path, value in parameters(model).items()} == expected
    exported = twin.file("weights").export_weights(model)
    assert {path: value.shape for path, value in exported.items()} == expected


@both
def test_parameters_over_the_space_of_configurations(twin):
    for case in seeded_cases(40, seed=3):
        expected = {path: parameter.shape for path, parameter in model_parameters(case.config).items()}
        model = build(twin, case.config, seed=None)
        assert {path: value.shape for path, value in parameters(model).items()} == expected, case


@both
@every_config
def test_a_seed_gives_the_initial_weights(twin, config):
    """Both twins hold exactly what ``twinformer.initializers`` draws; None leaves zeros."""
    for initializer in ("normal", "xavier_uniform"):
        with_initializer = config.replace(initializer=initializer, initializer_scale_residual=True)
        expected = initial_weights(with_initializer, 42)
        same_bits(twin.file("weights").export_weights(build(twin, with_initializer, seed=42)), expected)
    same_bits(twin.file("weights").export_weights(build(twin, config)), initial_weights(config, 0))
    empty = build(twin, config, seed=None)
    assert all((value == 0).all() for value in parameters(empty).values())
    twin.file("weights").initialize(empty, 7, config=config)
    same_bits(twin.file("weights").export_weights(empty), initial_weights(config, 7))


# ---- layout, by values


@both
@every_config
def test_every_leaf_goes_to_its_place(twin, config):
    """Each leaf's own random values are found again under its own path, read from the modules, not exported."""
    model, weights = build(twin, config, seed=None), random_weights(config)
    twin.file("weights").load_weights(model, weights)
    assert_close(parameters(model), {path: v.astype(np.float32) for path, v in weights.items()}, 0.0)


def test_layout_of_square_matrices():
    """Flax holds a Linear as [in, out], PyTorch as [out, in]; tables and norms are not turned. All sizes are 8 here."""
    config = config_of(embedding_norm=True, **FLOAT64)
    weights = random_weights(config)
    model = build(FLAX, config, seed=None)
    FLAX.file("weights").load_weights(model, weights)
    block = model.stack.blocks[1]
    layers = {
        "attention.query": block.attention.query,
        "attention.key": block.attention.key,
        "attention.value": block.attention.value,
        "attention.output": block.attention.output,
        "feedforward.up": block.feedforward.up,
        "feedforward.down": block.feedforward.down,
    }
    for name, layer in layers.items():
        assert_close(to_numpy(layer.kernel), weights[f"stack.blocks.1.{name}.weight"].T, 0.0, name=name)
    tables = {"embedding.tokens": model.embedding.tokens, "embedding.positions": model.embedding.positions}
    for name, table in tables.items():
        assert_close(to_numpy(table.embedding), weights[f"{name}.weight"], 0.0, name=name)
    assert_close(to_numpy(block.attention_norm.scale), weights["stack.blocks.1.attention_norm.weight"], 0.0)
    assert_close(to_numpy(block.attention_norm.bias), weights["stack.blocks.1.attention_norm.bias"], 0.0)
    flat = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert {name.rpartition(".")[2] for name in flat} == {"kernel", "scale", "embedding", "bias"}
    witness = build(TORCH, config, seed=None)
    TORCH.file("weights").load_weights(witness, weights)
    for path, leaf in witness.named_parameters():
        assert_close(leaf, weights[path], 0.0, name=path)
    tokens = np.array([[0, 3, 7, 1]])
    assert_close(model(FLAX.array(tokens)), witness(TORCH.array(tokens)))
    query = "stack.blocks.1.attention.query.weight"
    FLAX.file("weights").load_weights(model, weights | {query: weights[query].T})
    with pytest.raises(AssertionError, match="off by"):
        assert_close(model(FLAX.array(tokens)), witness(TORCH.array(tokens)))


# ---- there and back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("one", "other"), [(TORCH, FLAX), (FLAX, TORCH)], ids=["torch-flax", "flax-torch"])
@every_config
def test_export_and_load_bit_for_bit(config, one, other, dtype):
    config = config.replace(param_dtype=dtype)
    weights = random_weights(config, DTYPES[dtype])
    first, second = build(one, config, seed=None), build(other, config, seed=None)
    one.file("weights").load_weights(first, weights)
    exported = one.file("weights").export_weights(first)
    same_bits(exported, weights)
    other.file("weights").load_weights(second, exported)
    same_bits(other.file("weights").export_weights(second), weights)
    assert all(isinstance(value, np.ndarray) for value in exported.values())


def aligned(value):
    """A copy at an address that is a multiple of 64: such memory JAX takes over as it is unless told to copy."""
    room = np.empty(value.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    placed = room[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
    placed[...] = value
    return placed


@both
def test_weights_are_copied_in_and_out(twin):
    """Writing to the arrays that were loaded, or to those that were exported, leaves the model as it is."""
    config = config_of()
    model = build(twin, config, seed=None)
    weights = random_weights(config, np.float32)
    given = {path: aligned(value) for path, value in weights.items()}
    twin.file("weights").load_weights(model, given)
    exported = twin.file("weights").export_weights(model)
    for value in exported.values():
        value[...] = 0
    same_bits(parameters(model), weights)
    for value in given.values():
        value[...] = 1
    same_bits(parameters(model), weights)


@both
def test_loading_casts_to_param_dtype(twin):
    """Rounded to nearest even, once; the framework's own arrays are taken as well as NumPy's."""
    weights = random_weights(CONFIGS["rich decoder"])
    for dtype, kind in DTYPES.items():
        model = build(twin, CONFIGS["rich decoder"].replace(param_dtype=dtype), seed=None)
        twin.file("weights").load_weights(model, {path: twin.array(value) for path, value in weights.items()})
        same_bits(twin.file("weights").export_weights(model), {p: v.astype(kind) for p, v in weights.items()})


@both
def test_unusual_memory_is_read_by_value(twin):
    """Transposed views, reversed strides and read-only arrays hold the same numbers."""
    config = config_of()
    weights = random_weights(config, np.float32)
    odd = {}
    for i, (path, value) in enumerate(weights.items()):
        if i % 3 == 0:
            odd[path] = np.asfortranarray(value)
        elif i % 3 == 1:
            odd[path] = np.ascontiguousarray(value[::-1])[::-1]
        else:
            odd[path] = value.copy()
            odd[path].flags.writeable = False
    model = build(twin, config, seed=None)
    twin.file("weights").load_weights(model, odd)
    same_bits(twin.file("weights").export_weights(model), weights)


# ---- totality


def broken_weights(config):
    """One fault of each kind, two of some; and what the error must name."""
    weights = random_weights(config)
    names = list(weights)
    del weights[names[0]], weights[names[5]]
    weights["stack.blocks.9.attention.query.weight"] = np.zeros((8, 8))
    weights["extra"] = np.zeros(3)
    weights[names[1]] = np.zeros((3, 5))
    weights[names[2]] = weights[names[2]].astype(np.int32)
    weights[names[3]] = weights[names[3]].copy()
    weights[names[3]].flat[0] = np.nan
    weights[names[4]] = weights[names[4]].copy()
    weights[names[4]].flat[-1] = -np.inf
    whole = {names[0], names[5], "stack.blocks.9.attention.query.weight", "extra", names[1], names[2]}
    return weights, whole, {names[3], names[4]}


@both
@pytest.mark.parametrize("finite", [False, True], ids=["any", "finite"])
def test_every_problem_is_named_at_once_and_nothing_changes(twin, finite):
    config = CONFIGS["rich decoder"]
    model = build(twin, config)
    before = parameters(model)
    before = {path: value.copy() for path, value in before.items()}
    weights, whole, non_finite = broken_weights(config)
    with pytest.raises(WeightsError) as caught:
        twin.file("weights").load_weights(model, weights, finite=finite)
    named = {problem.partition(":")[0] for problem in caught.value.problems}
    assert named == whole | (non_finite if finite else set())
    text = str(caught.value)
    assert "(3, 5)" in text, "the shape that was met"
    assert "int32" in text, "the dtype that was met"
    same_bits(parameters(model), before)


@pytest.mark.parametrize("finite", [False, True], ids=["any", "finite"])
def test_both_twins_say_the_same(finite):
    config = CONFIGS["rich decoder"]
    weights, _, _ = broken_weights(config)
    said = []
    for twin in (TORCH, FLAX):
        with pytest.raises(WeightsError) as caught:
            twin.file("weights").load_weights(build(twin, config), weights, finite=finite)
        said.append(str(caught.value))
    assert said[0] == said[1]


@both
def test_a_turned_rectangle_is_refused(twin):
    """A matrix that is [in, out] where [out, in] belongs is a wrong shape, not something to be turned."""
    config = config_of(hidden_dim=5)
    weights = random_weights(config)
    path = "stack.blocks.0.feedforward.up.weight"
    weights[path] = weights[path].T
    with pytest.raises(WeightsError) as caught:
        twin.file("weights").load_weights(build(twin, config), weights)
    assert len(caught.value.problems) == 1
    assert "(5, 8)" in caught.value.problems[0]
    assert "(8, 5)" in caught.value.problems[0]


@both
def test_non_finite_weights_are_loaded_unless_asked_not_to(twin):
    config = config_of()
    weights = random_weights(config, np.float32)
    weights["head.weight"][0, 0] = np.nan
    model = build(twin, config)
    twin.file("weights").load_weights(model, weights)
    same_bits(parameters(model), weights)


# ---- model directories


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("one", "other"), [(TORCH, FLAX), (FLAX, TORCH)], ids=["torch-flax", "flax-torch"])
@every_config
def test_saved_by_one_loaded_by_the_other(config, one, other, dtype, tmp_path):
    config = config.with_dtype(dtype)
    model = build(one, config, seed=None)
    weights = random_weights(config, DTYPES[dtype])
    one.file("weights").load_weights(model, weights)
    one.file("weights").save(model, tmp_path / "model")
    stored_config, stored = read_model(tmp_path / "model")
    assert stored_config == config
    same_bits(stored, weights)
    loaded = other.file("weights").load(tmp_path / "model")
    assert loaded.config == config
    assert type(loaded).__name__ == type(model).__name__
    same_bits(other.file("weights").export_weights(loaded), weights)
    other.file("weights").save(loaded, tmp_path / "again")
    again_config, again = read_model(tmp_path / "again")
    assert again_config == config
    same_bits(again, weights)
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "model" / "config.json").read_bytes()


@both
def test_load_in_another_dtype(twin, tmp_path):
    config = config_of()
    weights = random_weights(config, np.float32)
    write_model(tmp_path / "model", config, weights)
    loaded = twin.file("weights").load(tmp_path / "model", dtype="bfloat16")
    assert loaded.config == config.with_dtype("bfloat16")
    same_bits(
        twin.file("weights").export_weights(loaded), {p: v.astype(ml_dtypes.bfloat16) for p, v in weights.items()}
    )
    out = loaded(twin.array(np.array([[1, 2]])))
    assert to_numpy(out).dtype == ml_dtypes.bfloat16


@both
def test_a_directory_with_other_weights(twin, tmp_path):
    config = config_of()
    weights = random_weights(config, np.float32)
    del weights["head.weight"]
    weights["lm_head.weight"] = np.zeros((8, 8), np.float32)
    write_model(tmp_path / "model", config, weights)
    with pytest.raises(WeightsError) as caught:
        twin.file("weights").load(tmp_path / "model")
    assert {problem.partition(":")[0] for problem in caught.value.problems} == {"head.weight", "lm_head.weight"}


def test_one_model_directory_one_answer(tmp_path):
    """What the first twin saved, both run: outputs agree."""
    config = CONFIGS["two stacks"].with_dtype("float64")
    model = build(TORCH, config)
    scatter_parameters(model, 8)
    TORCH.file("weights").save(model, tmp_path / "model")
    inputs = {"source": np.array([[1, 2, 8]]), "target": np.array([[0, 7]])}
    outs = []
    for twin in (TORCH, FLAX):
        loaded = twin.file("weights").load(tmp_path / "model")
        outs.append(loaded(**{name: twin.array(value) for name, value in inputs.items()}))
    assert_close(outs[1], outs[0])


@every_config
def test_a_skeleton_is_the_model_without_weights(config):
    """In Flax: the same structure, shapes and dtypes, no array; filled, it says what the model says."""
    bare, whole = flax_impl.models.skeleton(config), flax_impl.build(config, seed=3)
    shapes = nnx.to_flat_state(nnx.state(bare))
    assert all(isinstance(leaf.get_value(), jax.ShapeDtypeStruct) for _, leaf in shapes)
    wanted = {path: (leaf.shape, leaf.dtype) for path, leaf in nnx.to_flat_state(nnx.state(whole))}
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in shapes} == wanted
    flax_impl.load_weights(bare, initial_weights(config, 3))
    assert nnx.graphdef(bare) == nnx.graphdef(whole)
    ours, theirs = (FLAX.file("weights").export_weights(model) for model in (bare, whole))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path])


def test_a_skeleton_is_filled_without_compiling():
    """XLA would compile one program for each shape, to make what is thrown away, and to turn what is read."""
    seen = []
    # sizes that no other test has, whose programs would be there already
    config = config_of(model_dim=28, key_dim=6, hidden_dim=46, vocab_size=74)
    tensors = initial_weights(config, 0)

    def listen(event, seconds, **_):
        seen.extend([event] if event.endswith("backend_compile_duration") else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        flax_impl.load_weights(flax_impl.models.skeleton(config), tensors)
        assert seen == []
        flax_impl.build(config, seed=None)
        assert seen  # so that the listener hears
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
