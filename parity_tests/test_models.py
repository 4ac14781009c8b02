"""Whole models of both twins: against `transformers` in float64, compiled and not, padded on either side, all heads.

The models of `transformers` are tiny, with random weights (norms and biases too), and are mapped by hand here, leaf by
leaf; the same map, applied to their gradients, gives the gradients to expect. They compute some steps in float32
whatever their dtype: those few lines are replaced by the same formulas in float64 (``in_float64``), or the comparison
would stop at 1e-7.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.bert.modeling_bert import BertModel
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration, T5LayerNorm

from parity_tests.comparisons import assert_gradients_close, assert_outcomes_close
from parity_tests.helpers import (
    FLAX,
    FLOAT64,
    TORCH,
    assert_close,
    both,
    gradients,
    parameters,
    random_array,
    scatter_parameters,
    set_parameters,
    shape_hook_off,
    to_numpy,
)
from parity_tests.modes import compiler_warnings
from twinformer import ConfigError, ModelConfig
from twinformer.parity import random_case
from twinformer.presets import PRESETS, preset

B, T, S = 3, 6, 5


def as_arrays(twin, values):
    return {name: None if value is None else twin.array(value) for name, value in values.items()}


def model_of(twin, config, values):
    model = twin.file("models").build(config)
    set_parameters(model, values)
    return model


# ---- the witnesses


@pytest.fixture
def in_float64(monkeypatch):
    """The steps that `transformers` computes in float32 whatever the dtype of the model, in float64.

    Rotary angles, cosines and sines (and the frequencies, from float32 powers), and the statistics of both RMSNorms.
    Attention is asked for as "sdpa": the "eager" one of Llama takes its softmax in float32.
    """

    def rotary(self, x, position_ids):
        base, R = self.config.rope_parameters["rope_theta"], self.config.head_dim
        frequencies = base ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
        angles = position_ids[..., None].double() * frequencies
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    def rms_norm(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", rotary)
    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)
    monkeypatch.setattr(T5LayerNorm, "forward", rms_norm)


def randomised(model, seed):
    """Every parameter of the witness replaced by fixed random numbers, in float64."""
    model = model.double().eval()
    with torch.no_grad():
        for i, (name, leaf) in enumerate(sorted(model.named_parameters())):
            drawn = random_array(1000 * seed + i, *leaf.shape, scale=0.5 if leaf.ndim == 1 else leaf.shape[-1] ** -0.5)
            norm_weight = leaf.ndim == 1 and name.endswith("weight")
            leaf.copy_(torch.from_numpy(drawn + (1.0 if norm_weight else 0.0)))
    return model


@dataclass
class Witness:
    """A model of `transformers`, our configuration of it, and the map of its leaves to ours."""

    config: ModelConfig
    model: Any
    rename: Any  # {their name: array} -> {our path: array}
    call: Any  # (model, our arguments as NumPy) -> their output

    @property
    def leaves(self):
        return dict(self.model.named_parameters())

    def values(self):
        return self.rename({name: leaf.detach().numpy() for name, leaf in self.leaves.items()})

    def run(self, inputs, cotangent):
        """Their output and, by our paths, their gradients of ``sum(output · cotangent)``."""
        out = self.call(self.model, inputs)
        found = torch.autograd.grad(
            out, list(self.leaves.values()), torch.from_numpy(cotangent), allow_unused=True, materialize_grads=True
        )
        return out.detach().numpy(), self.rename(
            {name: grad.numpy() for name, grad in zip(self.leaves, found, strict=True)}
        )


def linear(given, theirs, ours, *, bias):
    """A Linear of PyTorch: the same orientation as ours."""
    return {f"{ours}.{leaf}": given[f"{theirs}.{leaf}"] for leaf in ("weight", *(["bias"] if bias else []))}


def tensors_of(inputs):
    return {name: None if value is None else torch.from_numpy(np.array(value)) for name, value in inputs.items()}


def gpt2():
    D, A, L = 12, 3, 2
    model = randomised(
        GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=D, n_head=A, n_layer=L, n_positions=10, vocab_size=19, n_inner=17, layer_norm_epsilon=1e-4
            )
        ),
        1,
    )
    config = ModelConfig(
        architecture="decoder",
        vocab_size=19,
        context_length=10,
        model_dim=D,
        key_dim=D // A,
        hidden_dim=17,
        num_heads=A,
        num_layers=L,
        norm_eps=1e-4,
        activation="gelu_tanh",
        qkv_bias=True,
        output_bias=True,
        positions="learned",
        head="tied",
        **FLOAT64,
    )

    def conv(given, theirs, ours):  # their Conv1D holds [in, out]
        return {f"{ours}.weight": given[f"{theirs}.weight"].T, f"{ours}.bias": given[f"{theirs}.bias"]}

    def rename(given):
        found = {
            "embedding.tokens.weight": given["transformer.wte.weight"],
            "embedding.positions.weight": given["transformer.wpe.weight"],
        }
        for i in range(L):
            theirs, ours = f"transformer.h.{i}", f"stack.blocks.{i}"
            for j, name in enumerate(("query", "key", "value")):  # c_attn: columns of q, then k, then v
                columns = slice(j * D, (j + 1) * D)
                found[f"{ours}.attention.{name}.weight"] = given[f"{theirs}.attn.c_attn.weight"][:, columns].T
                found[f"{ours}.attention.{name}.bias"] = given[f"{theirs}.attn.c_attn.bias"][columns]
            found |= conv(given, f"{theirs}.attn.c_proj", f"{ours}.attention.output")
            found |= conv(given, f"{theirs}.mlp.c_fc", f"{ours}.feedforward.up")
            found |= conv(given, f"{theirs}.mlp.c_proj", f"{ours}.feedforward.down")
            found |= linear(given, f"{theirs}.ln_1", f"{ours}.attention_norm", bias=True)
            found |= linear(given, f"{theirs}.ln_2", f"{ours}.feedforward_norm", bias=True)
        return found | linear(given, "transformer.ln_f", "stack.final_norm", bias=True)

    def call(model, inputs):
        given = tensors_of(inputs)
        return model(
            input_ids=given["tokens"], attention_mask=given["padding_mask"].long(), position_ids=given["positions"]
        ).logits

    return Witness(config, model, rename, call)


def llama(*, tied):
    D, A, G, K, L = 12, 6, 2, 4, 2  # A·K = 24 is not D
    model = randomised(
        LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=D,
                num_attention_heads=A,
                num_key_value_heads=G,
                head_dim=K,
                num_hidden_layers=L,
                intermediate_size=9,
                vocab_size=19,
                max_position_embeddings=10,
                rms_norm_eps=1e-5,
                tie_word_embeddings=tied,
                rope_parameters={"rope_type": "default", "rope_theta": 500.0},
                attn_implementation="sdpa",
            )
        ),
        2,
    )
    config = ModelConfig(
        architecture="decoder",
        vocab_size=19,
        context_length=10,
        model_dim=D,
        key_dim=K,
        hidden_dim=9,
        num_heads=A,
        num_kv_heads=G,
        num_layers=L,
        norm="rmsnorm",
        norm_bias=False,
        norm_cast="before_weight",
        activation="silu",
        gated=True,
        feedforward_bias=False,
        positions="rotary",
        rotary_base=500.0,
        head="tied" if tied else "untied",
        **FLOAT64,
    )

    def rename(given):
        found = linear(given, "model.embed_tokens", "embedding.tokens", bias=False)
        for i in range(L):
            theirs, ours = f"model.layers.{i}", f"stack.blocks.{i}"
            for their_name, our_name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
                found |= linear(
                    given, f"{theirs}.self_attn.{their_name}_proj", f"{ours}.attention.{our_name}", bias=False
                )
            for name in ("gate", "up", "down"):
                found |= linear(given, f"{theirs}.mlp.{name}_proj", f"{ours}.feedforward.{name}", bias=False)
            found |= linear(given, f"{theirs}.input_layernorm", f"{ours}.attention_norm", bias=False)
            found |= linear(given, f"{theirs}.post_attention_layernorm", f"{ours}.feedforward_norm", bias=False)
        found |= linear(given, "model.norm", "stack.final_norm", bias=False)
        return found if tied else found | linear(given, "lm_head", "head", bias=False)

    def call(model, inputs):
        given = tensors_of(inputs)
        return model(
            input_ids=given["tokens"], attention_mask=given["padding_mask"].long(), position_ids=given["positions"]
        ).logits

    return Witness(config, model, rename, call)


def bert():
    D, A, L = 12, 3, 2
    model = randomised(
        BertModel(
            transformers.BertConfig(
                hidden_size=D,
                num_attention_heads=A,
                num_hidden_layers=L,
                intermediate_size=17,
                vocab_size=19,
                max_position_embeddings=10,
                type_vocab_size=2,
                layer_norm_eps=1e-6,
            ),
            add_pooling_layer=False,
        ),
        3,
    )
    config = ModelConfig(
        architecture="encoder",
        vocab_size=19,
        context_length=10,
        model_dim=D,
        key_dim=D // A,
        hidden_dim=17,
        num_heads=A,
        num_layers=L,
        norm_eps=1e-6,
        norm_placement="post",
        final_norm=False,
        activation="gelu",
        qkv_bias=True,
        output_bias=True,
        positions="learned",
        num_token_types=2,
        embedding_norm=True,
        head="none",
        **FLOAT64,
    )

    def rename(given):
        found = {}
        for theirs, ours in (("word", "tokens"), ("position", "positions"), ("token_type", "token_types")):
            found |= linear(given, f"embeddings.{theirs}_embeddings", f"embedding.{ours}", bias=False)
        found |= linear(given, "embeddings.LayerNorm", "embedding.norm", bias=True)
        names = {
            "attention.self.query": "attention.query",
            "attention.self.key": "attention.key",
            "attention.self.value": "attention.value",
            "attention.output.dense": "attention.output",
            "attention.output.LayerNorm": "attention_norm",
            "intermediate.dense": "feedforward.up",
            "output.dense": "feedforward.down",
            "output.LayerNorm": "feedforward_norm",
        }
        for i in range(L):
            for theirs, ours in names.items():
                found |= linear(given, f"encoder.layer.{i}.{theirs}", f"stack.blocks.{i}.{ours}", bias=True)
        return found

    def call(model, inputs):
        given = tensors_of(inputs)
        return model(
            input_ids=given["tokens"],
            attention_mask=given["padding_mask"].long(),
            token_type_ids=given["token_types"],
            position_ids=given["positions"],
        ).last_hidden_state

    return Witness(config, model, rename, call)


def t5(*, tied):
    D, A, K, L = 12, 3, 5, 2  # A·K = 15 is not D
    model = T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=D,
            d_kv=K,
            d_ff=9,
            num_layers=3,
            num_decoder_layers=L,
            num_heads=A,
            vocab_size=19,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=20,
            layer_norm_epsilon=1e-5,
            feed_forward_proj="relu" if tied else "gated-gelu",
            tie_word_embeddings=tied,  # False: T5 v1.1, which does not scale the decoder's output
            dropout_rate=0.0,
        )
    )
    if not tied:  # this version ties the head of v1.1 all the same; the published weights do not
        model.lm_head = torch.nn.Linear(D, 19, bias=False)
    model = randomised(model, 4)
    config = ModelConfig(
        architecture="encoder-decoder",
        vocab_size=19,
        context_length=10,
        model_dim=D,
        key_dim=K,
        hidden_dim=9,
        num_heads=A,
        num_layers=L,
        num_encoder_layers=3,
        norm="rmsnorm",
        norm_bias=False,
        activation="relu" if tied else "gelu_tanh",
        gated=not tied,
        feedforward_bias=False,
        attention_scale=1.0,
        positions="relative",
        relative_buckets=8,
        relative_max_distance=20,
        share_embeddings=True,
        head="tied" if tied else "untied",
        head_scale=D**-0.5 if tied else None,
        **FLOAT64,
    )

    def rename(given):
        found = linear(given, "shared", "source_embedding.tokens", bias=False)
        for stack in ("encoder", "decoder"):
            blocks = f"{stack}.block"
            table = f"{blocks}.0.layer.0.SelfAttention.relative_attention_bias"
            found |= linear(given, table, f"{stack}.relative_bias", bias=False)
            parts = {"layer.0.SelfAttention": "attention", "layer.0.layer_norm": "attention_norm"}
            if stack == "decoder":
                parts |= {"layer.1.EncDecAttention": "cross_attention", "layer.1.layer_norm": "cross_attention_norm"}
            last = 2 if stack == "decoder" else 1
            for i in range(L if stack == "decoder" else 3):
                theirs, ours = f"{blocks}.{i}", f"{stack}.blocks.{i}"
                for their_part, our_part in parts.items():
                    if our_part.endswith("norm"):
                        found |= linear(given, f"{theirs}.{their_part}", f"{ours}.{our_part}", bias=False)
                        continue
                    for their_name, our_name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
                        found |= linear(
                            given, f"{theirs}.{their_part}.{their_name}", f"{ours}.{our_part}.{our_name}", bias=False
                        )
                feed = {"wi": "up"} if tied else {"wi_0": "gate", "wi_1": "up"}
                for their_name, our_name in (feed | {"wo": "down"}).items():
                    theirs_full = f"{theirs}.layer.{last}.DenseReluDense.{their_name}"
                    found |= linear(given, theirs_full, f"{ours}.feedforward.{our_name}", bias=False)
                found |= linear(given, f"{theirs}.layer.{last}.layer_norm", f"{ours}.feedforward_norm", bias=False)
            found |= linear(given, f"{stack}.final_layer_norm", f"{stack}.final_norm", bias=False)
        return found if tied else found | linear(given, "lm_head", "head", bias=False)

    def call(model, inputs):
        given = tensors_of(inputs)
        return model(
            input_ids=given["source"],
            attention_mask=given["source_padding_mask"].long(),
            decoder_input_ids=given["target"],
            decoder_attention_mask=given["target_padding_mask"].long(),
        ).logits

    return Witness(config, model, rename, call)


WITNESSES = {
    "GPT-2": gpt2,
    "Llama": lambda: llama(tied=False),
    "Llama, tied": lambda: llama(tied=True),
    "BERT": bert,
    "T5, tied": lambda: t5(tied=True),
    "T5 v1.1, untied": lambda: t5(tied=False),
}
every_witness = pytest.mark.parametrize("make", WITNESSES.values(), ids=WITNESSES)


# ---- padding


def padded(side, length):
    """[B, length], True = real: rows of full length, two less, and one token."""
    lengths = np.array([length, length - 2, 1])
    columns = np.arange(length)
    if side == "none":
        return np.ones((B, length), bool)
    return columns < lengths[:, None] if side == "right" else columns >= length - lengths[:, None]


def counted(real):
    """Positions counted over real tokens, one by one."""
    out = np.zeros(real.shape, np.int64)
    for b, row in enumerate(real):
        seen = 0
        for i, is_real in enumerate(row):
            seen += int(is_real)
            out[b, i] = max(seen - 1, 0)
    return out


def inputs_for(config, side):
    """Ours, and what the witness is given: the same and explicit positions. Token 0 pads."""
    rng = np.random.default_rng(5)

    def tokens(length):
        real = padded(side, length)
        return np.where(real, rng.integers(1, config.vocab_size, (B, length)), 0), real

    if config.architecture == "encoder-decoder":
        source, source_real = tokens(S)
        target, real = tokens(T)
        ours = {
            "source": source,
            "target": target,
            "source_padding_mask": source_real,
            "target_padding_mask": real,
        }
        return ours, ours, real
    ids, real = tokens(T)
    ours = {"tokens": ids, "padding_mask": real}
    if config.num_token_types:
        ours["token_types"] = rng.integers(0, config.num_token_types, (B, T))
    return ours, ours | {"positions": counted(real)}, real


@both
@pytest.mark.parametrize("side", ["none", "right", "left"])
@every_witness
def test_against_transformers(twin, make, side, in_float64):
    """Outputs at real positions, and every gradient of them, within 1e-11 of the largest."""
    witness = make()
    values = witness.values()
    model = model_of(twin, witness.config, values)
    ours, theirs, real = inputs_for(witness.config, side)
    width = witness.config.model_dim if witness.config.head == "none" else witness.config.vocab_size
    cotangent = np.where(real[..., None], random_array(6, B, T, width), 0.0)
    expected, expected_grads = witness.run(theirs, cotangent)
    out, grads = gradients(twin, lambda m, **kw: m(**kw), ours, model, cotangent)
    assert_close(out[real], expected[real], 1e-11)
    assert_gradients_close(grads, expected_grads)
    after_all_tokens = witness.config.architecture == "decoder" and side == "right"  # hidden by causality as well
    if side != "none" and not after_all_tokens:
        unpadded = model(**as_arrays(twin, {k: v for k, v in ours.items() if not k.endswith("mask")}))
        assert abs(to_numpy(unpadded)[real] - out[real]).max() > 1e-3, "the mask plays no part"


@both
@pytest.mark.parametrize("name", PRESETS)
def test_eager_is_compiled(twin, name):
    """The compiled program gives what the eager model does, for every preset, padded on either side."""
    whole = preset(name)
    windowed = whole.window_layers is not None
    fewer: dict = {"num_layers": 2, "window_layers": (0,)} if windowed else {"num_layers": 1}  # a block of each kind
    if whole.architecture == "encoder-decoder":
        fewer["num_encoder_layers"] = 1
    config = whole.replace(**fewer)
    case = random_case(name, config, seed=1, length=24).in_dtype("float64")
    model = twin.file("models").build(case.config, seed=None)
    twin.file("weights").load_weights(model, case.tensors)
    eager = model(**as_arrays(twin, case.inputs))
    # gradients of compiled programs are rung 4's; compiling for them as well would take twice the time
    with shape_hook_off(), compiler_warnings(), torch.no_grad():
        out = twin.file("models").compiled(model)(**as_arrays(twin, case.inputs))
    assert_close(out, eager)


# ---- positions


POSITIONS = ("none", "sinusoidal", "learned", "rotary", "relative", "alibi")


def small(architecture="decoder", **choices):
    sizes = {
        "vocab_size": 19,
        "context_length": 10,
        "model_dim": 12,
        "key_dim": 4,
        "hidden_dim": 9,
        "num_heads": 3,
        "num_layers": 2,
    }
    return ModelConfig(**({"architecture": architecture} | sizes | FLOAT64 | choices))


def own_model(twin, config, seed=50):
    model = twin.file("models").build(config)
    scatter_parameters(model, seed)
    return model


@both
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
def test_padding_on_either_side_is_no_padding(twin, architecture, positions):
    """A sequence of four gives the same alone, padded right, left, and with a hole: positions count real tokens."""
    model = own_model(twin, small(architecture, positions=positions))
    ids = np.random.default_rng(7).integers(1, 19, 4)
    alone = to_numpy(model(twin.array(ids[None])))[0]
    layouts = {
        "right": [0, 1, 2, 3, -1, -1, -1],
        "left": [-1, -1, -1, 0, 1, 2, 3],
        "hole": [-1, 0, 1, -1, -1, 2, 3],
    }
    for name, layout in layouts.items():
        places = np.array(layout)
        real = places >= 0
        tokens = np.where(real, ids[places], 5)
        out = to_numpy(model(twin.array(tokens[None]), padding_mask=twin.array(real[None])))[0]
        assert_close(out[real], alone, name=name)


@both
@pytest.mark.parametrize("positions", [kind for kind in POSITIONS if kind != "none"])
@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder-decoder"])
def test_places_are_counted_with_their_padding(twin, architecture, positions):
    """With places counted a mask moves nothing: what is real gives what it gives at the positions 0 … T-1."""
    config = small(architecture, positions=positions, position_counting="places")
    model, counting = own_model(twin, config), own_model(twin, config.replace(position_counting="real"))
    tokens = np.random.default_rng(7).integers(1, 19, (2, 7))
    real = np.array([[False, False, True, True, False, True, True], [True, True, True, False, True, False, False]])
    places = twin.array(np.arange(7)[None])
    names = ("source_", "target_") if architecture == "encoder-decoder" else ("",)
    arrays = [twin.array(tokens)] * len(names)
    given = {f"{name}padding_mask": twin.array(real) for name in names}
    found = to_numpy(model(*arrays, **given))
    told = to_numpy(counting(*arrays, **given, **{f"{name}positions": places for name in names}))
    assert_close(found, told, 0.0)
    assert abs(found - to_numpy(counting(*arrays, **given)))[real].max() > 1e-4  # there is a hole in each row


@both
@pytest.mark.parametrize("positions", [kind for kind in POSITIONS if kind != "none"])
def test_explicit_positions(twin, positions):
    """Given positions are used as they are, padding mask or not; counting is only what is done without them."""
    model = own_model(twin, small(positions=positions))
    tokens = twin.array(np.random.default_rng(8).integers(1, 19, (2, 5)))
    default = model(tokens)
    assert_close(model(tokens, positions=twin.array(np.arange(5)[None])), default, 0.0)
    real = padded("left", 5)[:2]
    counted_positions = counted(real)
    by_mask = model(tokens, padding_mask=twin.array(real))
    assert_close(model(tokens, padding_mask=twin.array(real), positions=twin.array(counted_positions)), by_mask, 0.0)
    plain = to_numpy(model(tokens, padding_mask=twin.array(real), positions=twin.array(np.arange(5)[None])))
    spread = to_numpy(model(tokens, positions=twin.array(np.array([[0, 2, 3, 7, 9]]))))
    assert abs(spread - to_numpy(default)).max() > 1e-4
    if positions in ("sinusoidal", "learned"):  # a shift shows only where positions are absolute
        assert abs(plain - to_numpy(by_mask))[1, 2:].max() > 1e-4
    else:
        assert_close(plain[real], to_numpy(by_mask)[real], 1e-11)


# ---- heads


@both
@pytest.mark.parametrize("softcap", [None, 0.9])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder-decoder"])
def test_heads(twin, architecture, head, scale, bias, softcap):
    """``softcap · tanh((scale · h Eᵀ + bias) / softcap)``, h being what the stack gives."""
    config = small(architecture, head=head, head_scale=scale, head_bias=bias, head_softcap=softcap)
    model = own_model(twin, config)
    values = parameters(model)
    rng = np.random.default_rng(9)
    if architecture == "encoder-decoder":
        source, tokens = twin.array(rng.integers(0, 19, (2, 4))), rng.integers(0, 19, (2, 5))
        H = model.encode(source)
        logits = model(source, twin.array(tokens))
        assert_close(model.decode(twin.array(tokens), H), logits, 0.0)
        X = model.target_embedding(twin.array(tokens))
        h = to_numpy(model.decoder(X, H))
        table = values["target_embedding.tokens.weight"]
    else:
        tokens = rng.integers(0, 19, (2, 5))
        logits = model(twin.array(tokens))
        h = to_numpy(model.stack(model.embedding(twin.array(tokens))))
        table = values["embedding.tokens.weight"]
    E = table if head == "tied" else values["head.weight"]
    expected = h * (1.0 if scale is None else scale) @ E.T + (values["head.bias"] if bias else 0.0)
    if softcap is not None:
        expected = softcap * np.tanh(expected / softcap)
    assert_close(logits, expected)
    assert (model.head is None) == (head == "tied" and not bias)


@both
def test_shared_embeddings(twin):
    """One table: of the source, of the target and of the tied head. Its gradient is the sum of the three."""
    shared = small("encoder-decoder", share_embeddings=True, positions="learned")
    apart = small("encoder-decoder", share_embeddings=False, positions="learned", head="untied")
    model = own_model(twin, shared)
    values = parameters(model)
    assert "target_embedding.tokens.weight" not in values
    table = values["source_embedding.tokens.weight"]
    twin_values = values | {"target_embedding.tokens.weight": table, "head.weight": table}
    separate = model_of(twin, apart, twin_values)
    rng = np.random.default_rng(10)
    inputs = {"source": rng.integers(0, 19, (2, 4)), "target": rng.integers(0, 19, (2, 5))}
    out, grads = gradients(twin, lambda m, **kw: m(**kw), inputs, model)
    separate_out, separate_grads = gradients(twin, lambda m, **kw: m(**kw), inputs, separate)
    assert_close(out, separate_out)
    uses = ("source_embedding.tokens.weight", "target_embedding.tokens.weight", "head.weight")
    for name in uses:
        assert abs(separate_grads[name]).max() > 0
    assert_close(grads[uses[0]], sum(separate_grads[name] for name in uses))


@both
def test_padded_source_is_hidden_from_the_decoder(twin):
    model = own_model(twin, small("encoder-decoder", positions="sinusoidal"))
    rng = np.random.default_rng(11)
    source, target = rng.integers(0, 19, (B, S)), twin.array(rng.integers(0, 19, (B, T)))
    for side in ("right", "left"):
        real = padded(side, S)
        other = np.where(real, source, (source + 7) % 19)
        mask = twin.array(real)
        out = model(twin.array(source), target, source_padding_mask=mask)
        assert_close(model(twin.array(other), target, source_padding_mask=mask), out, 1e-14, name=side)
        H = model.encode(twin.array(source), source_padding_mask=mask)
        assert_close(model.decode(target, H, memory_padding_mask=mask), out, 0.0, name=side)


@both
def test_wrong_architecture(twin):
    models = twin.file("models")
    right = {"encoder": "EncoderModel", "decoder": "LanguageModel", "encoder-decoder": "EncoderDecoder"}
    for architecture, name in right.items():
        config = small(architecture)
        assert type(models.build(config)).__name__ == name
        for other in set(right.values()) - {name}:
            with pytest.raises(ConfigError, match="architecture"):
                getattr(models, other)(config)


# ---- dropout places of whole models


@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder-decoder"])
def test_twins_agree_with_dropout(architecture):
    config = small(architecture, positions="learned", dropout=0.2, attention_dropout=0.1, hidden_dropout=0.3)
    rng = np.random.default_rng(12)
    inputs = {"tokens": rng.integers(0, 19, (2, 5))}
    if architecture == "encoder-decoder":
        inputs = {"source": rng.integers(0, 19, (2, 4)), "target": rng.integers(0, 19, (2, 5))}
    results = {}
    for twin in (TORCH, FLAX):
        model = own_model(twin, config)
        results[twin.name] = gradients(twin, lambda m, t=twin, **kw: m(**kw, rng=t.key(13)), inputs, model)
    assert_outcomes_close(results["flax"], results["torch"])


@both
def test_keys_go_where_the_contract_says(twin):
    """Embeddings fold 0, stack 1; with two stacks: source 0, encoder 1, target 2, decoder 3."""
    rates = {"dropout": 0.2, "attention_dropout": 0.1, "hidden_dropout": 0.3}
    fold, key = twin.file("dropout").fold, twin.key(14)
    rng = np.random.default_rng(15)
    tokens = twin.array(rng.integers(0, 19, (2, 5)))
    model = own_model(twin, small(positions="learned", head="untied", **rates))
    h = model.stack(model.embedding(tokens, rng=fold(key, 0)), rng=fold(key, 1))
    expected = to_numpy(h) @ parameters(model)["head.weight"].T
    assert_close(model(tokens, rng=key), expected)
    model = own_model(twin, small("encoder-decoder", positions="learned", head="untied", **rates))
    source = twin.array(rng.integers(0, 19, (2, 4)))
    H = model.encoder(model.source_embedding(source, rng=fold(key, 0)), rng=fold(key, 1))
    h = model.decoder(model.target_embedding(tokens, rng=fold(key, 2)), H, rng=fold(key, 3))
    expected = to_numpy(h) @ parameters(model)["head.weight"].T
    assert_close(model(source, tokens, rng=key), expected)
