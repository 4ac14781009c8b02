"""State dicts of ``torch.nn``'s stacks: both twins against the module itself in float64, every gradient, and back."""

import dataclasses
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from parity_tests.helpers import FLAX, TORCH, assert_close, gradients, random_array, to_numpy
from parity_tests.published_witness import errors
from parity_tests.readers import build
from twinformer import ConfigError, ModelConfig, WeightsError
from twinformer.pretrained import torch_nn

# nn.Transformer says so of each encoder that its other path, which is not taken here, does not suit
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")

BOUND = 1e-12
B, S, T = 3, 6, 5
KINDS = ("Transformer", "TransformerEncoder", "TransformerDecoder")


def drawn(seed):
    """Random arguments of the layers, and the numbers of blocks of an encoder and of a decoder."""
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 5))
    layers = [int(rng.integers(1, 4)) for _ in range(2)]
    return layers, {
        # at least 4: a norm of fewer numbers leaves little but their signs, and rounding for a gradient
        "d_model": heads * int(rng.integers(4, 8)),
        "nhead": heads,
        "dim_feedforward": int(rng.integers(3, 20)),
        "dropout": 0.25,
        "activation": str(rng.choice(["relu", "gelu"])),
        "layer_norm_eps": float(rng.choice([1e-5, 1e-3])),
        "norm_first": bool(rng.integers(2)),
        "bias": bool(rng.integers(4)),
        "batch_first": True,
    }


RICH = (
    [2, 1],
    {"d_model": 15, "nhead": 3, "dim_feedforward": 7, "dropout": 0.125, "activation": "gelu", "norm_first": True}
    | {"layer_norm_eps": 1e-4, "bias": True, "batch_first": True},
)


def module_of(kind, layers, arguments, norm=True):
    """As a user makes it."""
    if kind == "Transformer":
        counts = {"num_encoder_layers": layers[0], "num_decoder_layers": layers[1]}
        return nn.Transformer(**arguments, **counts, dtype=torch.float64)
    options = {"eps": arguments["layer_norm_eps"], "bias": arguments["bias"], "dtype": torch.float64}
    last = nn.LayerNorm(arguments["d_model"], **options) if norm else None
    layer = getattr(nn, f"{kind}Layer")(**arguments, dtype=torch.float64)
    if kind == "TransformerEncoder":
        return nn.TransformerEncoder(layer, layers[0], last, enable_nested_tensor=False)
    return nn.TransformerDecoder(layer, layers[1], last)


def scattered(kind, layers, arguments, norm=True, seed=0):
    """Random everywhere; in eval mode, where nothing is dropped and, with gradients, no other path is taken."""
    module = module_of(kind, layers, arguments, norm)
    with torch.no_grad():
        for i, (name, leaf) in enumerate(sorted(module.named_parameters())):
            drawn = random_array(100 * seed + i, *leaf.shape, scale=0.4 if leaf.ndim == 1 else leaf.shape[-1] ** -0.5)
            leaf.copy_(torch.from_numpy(drawn + ("norm" in name and name.endswith("weight"))))
    return module.eval()


def state_of(module):
    return {name: leaf.numpy() for name, leaf in module.state_dict().items()}


def told(arguments):
    return {name: arguments[name] for name in ("nhead", "activation", "norm_first", "layer_norm_eps", "dropout")}


def inputs_of(D):
    source_real = np.arange(S) < np.array([S, 4, 1])[:, None]
    target_real = np.arange(T) < np.array([2, T, 3])[:, None]
    return random_array(1, B, S, D, scale=2.0), random_array(2, B, T, D), source_real, target_real


def theirs(kind, module, cotangent):
    """Output and every gradient, those of the inputs included; padding on the right, and the decoder is causal."""
    source, target, source_real, target_real = inputs_of(cotangent.shape[-1])
    X, Y = (torch.from_numpy(array).requires_grad_() for array in (source, target))
    hidden, later = torch.from_numpy(~source_real), torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
    causal = {"tgt_mask": later, "tgt_key_padding_mask": torch.from_numpy(~target_real)}
    if kind == "Transformer":
        out = module(X, Y, src_key_padding_mask=hidden, memory_key_padding_mask=hidden, **causal)
    elif kind == "TransformerDecoder":
        out = module(Y, X, memory_key_padding_mask=hidden, **causal)
    else:
        out = module(X, src_key_padding_mask=hidden)
    given = {"X": X} if kind == "TransformerEncoder" else {"X": X, "Y": Y}
    leaves = dict(module.named_parameters()) | given
    (out * torch.from_numpy(cotangent)).sum().backward()
    grads = {name: to_numpy(leaf.grad) for name, leaf in leaves.items()}
    return to_numpy(out), {name: grads.pop(name) for name in given}, grads


def ours(twin, stacks, cotangent):
    """The same by our paths, with the stacks as parts."""
    source, target, source_real, target_real = inputs_of(cotangent.shape[-1])
    padding = twin.file("masks").padding_mask
    real, written = padding(twin.array(source_real)), padding(twin.array(target_real))
    make, load = twin.file("stack").TransformerStack.from_config, twin.file("weights").load_weights
    kind, config, L = stacks.kind, stacks.config, stacks.config.num_layers
    if kind == "TransformerEncoder":
        stack = make(config, L)
        load(stack, stacks.tensors)
        return gradients(twin, lambda m, X: m(X, mask=real), {"X": source}, stack, cotangent)
    decoder = make(config, L, causal=True, cross_attention=True)
    if kind == "TransformerDecoder":
        load(decoder, stacks.tensors)
        given = {"X": source, "Y": target}
        return gradients(twin, lambda m, X, Y: m(Y, X, written, real), given, decoder, cotangent)
    encoder = make(config, stacks.num_encoder_layers)
    for side, stack in (("encoder.", encoder), ("decoder.", decoder)):
        load(stack, {path.removeprefix(side): a for path, a in stacks.tensors.items() if path.startswith(side)})
    # the decoder's gradients, with the encoder's states as an input; then the encoder's, with their gradient
    states = to_numpy(encoder(twin.array(source), mask=real))
    given = {"X": states, "Y": target}
    out, back = gradients(twin, lambda m, X, Y: m(Y, X, written, real), given, decoder, cotangent)
    _, front = gradients(twin, lambda m, X: m(X, mask=real), {"X": source}, encoder, back.pop("X"))
    named = {f"encoder.{path}": grad for path, grad in front.items() if path != "X"}
    named |= {f"decoder.{path}": grad for path, grad in back.items() if path != "Y"}
    return out, named | {"X": front["X"], "Y": back["Y"]}


def examine(twin, kind, module, arguments):
    """The largest error of the output and of every gradient, relative to the largest magnitude there."""
    stacks = torch_nn.read(state_of(module), **told(arguments))
    D = arguments["d_model"]
    real = inputs_of(D)[2 if kind == "TransformerEncoder" else 3]
    cotangent = random_array(7, *real.shape, D) * real[..., None]
    out, inputs, grads = theirs(kind, module, cotangent)
    # a gradient by their name is one of ours as a weight by their name is
    back = torch_nn.read(grads, **told(arguments)).tensors
    found, ours_grads = ours(twin, stacks, cotangent)
    expected = {"output": out * real[..., None]} | {f"gradient {path}": g for path, g in (back | inputs).items()}
    actual = {"output": found * real[..., None]} | {f"gradient {path}": g for path, g in ours_grads.items()}
    return errors(actual, expected, slice(None))


def assert_small(found):
    worst = max(found, key=lambda name: found[name])
    assert found[worst] <= BOUND, f"{worst}: off by {found[worst]:.3e} of its largest magnitude"


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", KINDS)
def test_random_modules(kind, seed):
    layers, arguments = drawn(seed)
    module = scattered(kind, layers, arguments, norm=seed % 3 > 0, seed=seed)
    assert_small(examine(TORCH, kind, module, arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_rich_modules_in_flax(kind):
    layers, arguments = RICH
    assert_small(examine(FLAX, kind, scattered(kind, layers, arguments), arguments))
    assert_small(
        examine(
            FLAX, kind, scattered(kind, layers, arguments | {"norm_first": False}), arguments | {"norm_first": False}
        )
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_there_and_back(kind, norm, bias):
    """The same bits by the same names, in a module that computes the same; and what is read of that is the same."""
    layers, arguments = RICH
    arguments = arguments | {"bias": bias}
    module = scattered(kind, layers, arguments, norm)
    stacks = torch_nn.read(state_of(module), **told(arguments))
    written = torch_nn.write(stacks)
    own = arguments | ({"num_encoder_layers": 2, "num_decoder_layers": 1} if kind == "Transformer" else {})
    assert (written.kind, written.arguments, written.norm) == (kind, own, norm or kind == "Transformer")
    before = state_of(module)
    assert {name: a.tobytes() for name, a in written.state.items()} == {n: a.tobytes() for n, a in before.items()}
    assert {name: a.shape for name, a in written.state.items()} == {name: a.shape for name, a in before.items()}
    again = scattered(kind, layers, arguments, norm, seed=1)
    again.load_state_dict({name: torch.from_numpy(leaf) for name, leaf in written.state.items()}, strict=True)
    for one, other in zip(again.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)
    back = torch_nn.read(written.state, **told(arguments))
    assert back.config == stacks.config
    assert_close(back.tensors, stacks.tensors, 0.0)


def test_what_is_told_and_what_is_found():
    """No two numbers alike."""
    layers, arguments = RICH
    stacks = torch_nn.read(state_of(scattered("Transformer", layers, arguments)), **told(arguments), context_length=77)
    config = stacks.config
    assert (config.model_dim, config.num_heads, config.key_dim, config.hidden_dim) == (15, 3, 5, 7)
    assert (stacks.num_encoder_layers, config.num_layers, config.context_length) == (2, 1, 77)
    assert (config.norm_placement, config.norm_eps, config.activation) == ("pre", 1e-4, "gelu")
    assert (config.dropout, config.attention_dropout, config.hidden_dropout) == (0.125, 0.125, 0.125)
    assert (config.param_dtype, config.compute_dtype, stacks.left_out) == ("float64", "float64", ())
    state = {name: leaf.astype(ml_dtypes.bfloat16) for name, leaf in state_of(module_of(KINDS[1], *RICH)).items()}
    assert torch_nn.read(state, nhead=3).config.param_dtype == "bfloat16"
    # what is not told is what the constructor there takes
    plain = torch_nn.read(state_of(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1)), nhead=2)
    expected = nn.TransformerEncoderLayer(8, 2)
    assert (plain.config.activation, plain.config.norm_placement) == ("relu", "post")
    assert (plain.config.norm_eps, plain.config.dropout) == (expected.norm1.eps, expected.dropout.p)


# ---- within a model


class Translator(nn.Module):
    """What the tutorials of PyTorch build around ``nn.Transformer``."""

    def __init__(self, source_size, target_size, layers, arguments):
        super().__init__()
        D = arguments["d_model"]
        self.source_table = nn.Embedding(source_size, D)
        self.target_table = nn.Embedding(target_size, D)
        counts = {"num_encoder_layers": layers[0], "num_decoder_layers": layers[1]}
        self.transformer = nn.Transformer(**arguments, **counts)
        self.generator = nn.Linear(D, target_size)
        angles = np.arange(9)[:, None] / 10000.0 ** (2 * np.arange((D + 1) // 2) / D)
        P = np.stack((np.sin(angles), np.cos(angles)), -1).reshape(9, -1)[:, :D]
        self.register_buffer("P", torch.from_numpy(P), persistent=False)

    def forward(self, source, target, hidden):
        scale = self.source_table.embedding_dim**0.5
        X, Y = (
            table(tokens) * scale + self.P[: tokens.shape[1]]
            for table, tokens in ((self.source_table, source), (self.target_table, target))
        )
        later = torch.triu(torch.ones(target.shape[1], target.shape[1], dtype=torch.bool), 1)
        options = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
        return self.generator(self.transformer(X, Y, tgt_mask=later, **options))


@pytest.mark.parametrize("twin", [TORCH, FLAX], ids=lambda twin: twin.name)
def test_a_model_around_it(twin):
    layers, arguments = RICH
    torch.manual_seed(0)
    model = Translator(11, 13, layers, arguments).double().eval()
    state = state_of(model)
    stacks = torch_nn.read(state, **told(arguments), context_length=9, prefix="transformer.")
    own = {
        "source_table.weight": "source_embedding.tokens.weight",
        "target_table.weight": "target_embedding.tokens.weight",
        "generator.weight": "head.weight",
        "generator.bias": "head.bias",
    }
    assert set(stacks.left_out) == own.keys()
    config = ModelConfig(
        **{field.name: getattr(stacks.config, field.name) for field in dataclasses.fields(stacks.config)},
        architecture="encoder-decoder",
        vocab_size=13,
        source_vocab_size=11,
        num_encoder_layers=stacks.num_encoder_layers,
        embedding_scale=15**0.5,
        head="untied",
        head_bias=True,
    ).replace(positions="sinusoidal")
    tensors = stacks.tensors | {path: state[name] for name, path in own.items()}
    rng = np.random.default_rng(0)
    source, target = rng.integers(0, 11, (B, S)), rng.integers(0, 13, (B, T))
    real = np.arange(S) < np.array([S, 4, 1])[:, None]
    expected = model(*(torch.from_numpy(array) for array in (source, target, ~real)))
    ours = build(twin, config, tensors)
    found = ours(twin.array(source), twin.array(target), source_padding_mask=twin.array(real))
    assert_close(found, expected, BOUND)
    # and out of the model again
    weights = twin.file("weights").export_weights(ours)
    inner = {path: leaf for path, leaf in weights.items() if path.startswith(("encoder.", "decoder."))}
    written = torch_nn.write(torch_nn.Stacks("Transformer", config, config.num_encoder_layers, inner))
    model.transformer.load_state_dict({name: torch.from_numpy(a) for name, a in written.state.items()}, strict=True)
    for name, leaf in state_of(model).items():
        assert np.array_equal(leaf, state[name]), name


# ---- what is wrong


def test_all_that_is_wrong_at_once():
    state = state_of(scattered("TransformerEncoder", *RICH))
    del state["layers.1.norm2.weight"]
    state["layers.0.self_attn.in_proj_weight"] = state["layers.0.self_attn.in_proj_weight"][:-1]
    state["layers.0.linear2.bias"] = state["layers.0.linear2.bias"].astype(np.int64)
    state["layers.1.linear1.weight"][2, 3] = np.nan
    state["layers.1.self_attn.bias_k"] = np.zeros((1, 1, 15))
    with pytest.raises(WeightsError) as caught:
        torch_nn.read(state, nhead=3)
    assert sorted(caught.value.problems) == [
        "layers.0.linear2.bias: expected a float dtype, got int64",
        "layers.0.self_attn.in_proj_weight: expected shape (45, 15), got (44, 15)",
        "layers.1.linear1.weight: expected finite values, got 1 that are not",
        "layers.1.norm2.weight: missing, expected shape (15,)",
        "layers.1.self_attn.bias_k: unexpected",
    ]


def test_what_cannot_be_read():
    state = state_of(scattered("Transformer", *RICH))
    with pytest.raises(ConfigError, match=r"nhead: expected a divisor of the width D=15, got 4"):
        torch_nn.read(state, nhead=4)
    with pytest.raises(ConfigError, match=r"activation: expected .*got 'tanh'"):
        torch_nn.read(state, nhead=3, activation="tanh")
    with pytest.raises(WeightsError, match=r"expected names like layers.0.* or encoder.layers.0.*, got none"):
        torch_nn.read(state, nhead=3, prefix="transformer.")
    with pytest.raises(WeightsError, match=r"expected names of two stacks, got those of one \(which prefix='encoder.'"):
        torch_nn.read({name: leaf for name, leaf in state.items() if name.startswith("encoder.")}, nhead=3)
    encoder = torch_nn.read(state, nhead=3, prefix="encoder.")
    assert (encoder.kind, len(encoder.left_out)) == ("TransformerEncoder", len([n for n in state if "decoder" in n]))
    only_one = {name: leaf for name, leaf in state.items() if not name.startswith("encoder.norm.")}
    with pytest.raises(WeightsError, match=r"decoder.norm.weight: unexpected"):
        torch_nn.read(only_one, nhead=3)
    with pytest.raises(WeightsError, match=r"layers.0.linear1.weight: expected a matrix \[F, D\], got none"):
        torch_nn.read({name: leaf for name, leaf in state.items() if "linear1" not in name}, nhead=3)
    hole = {name.replace("encoder.layers.1.", "encoder.layers.3."): leaf for name, leaf in state.items()}
    with pytest.raises(WeightsError) as caught:
        torch_nn.read(hole, nhead=3)
    assert {problem.split(":")[1] for problem in caught.value.problems} >= {
        " unexpected",
        " missing, expected shape (15,)",
    }


def test_what_cannot_be_written():
    stacks = torch_nn.read(state_of(scattered("Transformer", *RICH)), nhead=3)
    config = stacks.config.replace(
        norm="rmsnorm", norm_bias=False, activation="silu", gated=True, key_dim=4, positions="rotary", rotary_dim=2
    )
    config = config.replace(window=3, attention_dropout=0.5, final_norm=False, num_kv_heads=1)
    with pytest.raises(ConfigError) as caught:
        torch_nn.write(dataclasses.replace(stacks, config=config))
    wrong = "attention_dropout final_norm gated key_dim norm norm_bias num_kv_heads positions window"
    assert " ".join(sorted(problem.split(":")[0] for problem in caught.value.problems)) == wrong
    tensors = dict(stacks.tensors)
    del tensors["encoder.blocks.0.attention.query.bias"]
    tensors["head.bias"] = np.zeros(3)
    with pytest.raises(WeightsError, match=r"(?s)attention.query.bias: missing.*head.bias: unexpected"):
        torch_nn.write(dataclasses.replace(stacks, tensors=tensors))
    mixed = stacks.tensors | {
        "decoder.blocks.0.attention.key.bias": stacks.tensors["decoder.blocks.0.attention.key.bias"].astype(np.float32)
    }
    with pytest.raises(WeightsError, match=r"decoder.layers.0.self_attn.in_proj_bias: expected one dtype for"):
        torch_nn.write(dataclasses.replace(stacks, tensors=mixed))


def test_the_example_of_the_documentation_runs():
    text = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "torch_nn.read" in block]
    names = {}
    exec(example, names)  # noqa: S102
    X = random_array(0, 2, 5, 32).astype(np.float32)
    # float32: the two sums are rounded in other orders
    assert_close(names["stack"](FLAX.array(X)), names["module"].eval()(torch.from_numpy(X)), 1e-5)
