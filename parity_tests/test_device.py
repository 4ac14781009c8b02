"""Every array that a twin makes on its way is made where its inputs and weights are.

PyTorch's "meta" device stands in for a GPU: it computes shapes only, and refuses to be mixed with the CPU (in all but
matrix products and indexing) as a GPU does. Where there is a GPU the same is asked of it, and that its values are those
of the CPU. For JAX a second device of the CPU stands in.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

import torch_impl
from parity_tests.helpers import shape_hook_off
from torch_impl import AttentionLayer, PositionalEncoding, TransformerStack, random_key

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"))


@pytest.fixture(params=["meta", CUDA])
def elsewhere(request):
    with torch.device(request.param):
        return torch.zeros(1).device


def rows(length, device):
    return torch.zeros(10, length, 24, device=device)


def test_the_device_cannot_be_mixed_with_the_cpu(elsewhere):
    with pytest.raises(RuntimeError):
        rows(10, elsewhere) + torch.zeros(24)


def test_the_notebooks_cells_move_with_to(elsewhere):
    X, Y, mask = rows(10, elsewhere), rows(8, elsewhere), torch.zeros(10, 10, device=elsewhere)
    attention = AttentionLayer(model_dim=24, key_dim=3, num_heads=4).to(elsewhere)
    assert attention(X, H_enc=Y, mask=mask).device == elsewhere
    assert attention(X, mask=mask).device == elsewhere
    stack = TransformerStack(N=10, model_dim=24, key_dim=3, hidden_dim=8, num_heads=4, num_stack=2).to(elsewhere)
    assert stack(X).device == elsewhere
    assert PositionalEncoding(24).to(elsewhere)(X).device == elsewhere


@pytest.mark.parametrize("positions", ["rotary", "relative", "alibi"])
@pytest.mark.parametrize("choices", [{}, {"norm": "rmsnorm", "norm_bias": False, "gated": True, "window": 3}])
def test_every_kind_of_position_moves_with_to(positions, choices, elsewhere):
    X, Y, mask = rows(10, elsewhere), rows(8, elsewhere), torch.zeros(10, 10, device=elsewhere)
    stack = TransformerStack(
        10, 24, 4, 8, 4, 2, causal=True, cross_attention=True, positions=positions, num_kv_heads=2, **choices
    ).to(elsewhere)
    memory_mask = torch.ones(10, 1, 1, 8, dtype=torch.bool, device=elsewhere)
    assert stack(X, H_enc=Y, mask=mask, memory_mask=memory_mask).device == elsewhere


def test_dropout_is_made_on_the_device_of_its_input(elsewhere):
    stack = TransformerStack(10, 24, 4, 8, 4, 2, dropout=0.1, attention_dropout=0.1, hidden_dropout=0.1).to(elsewhere)
    with shape_hook_off():
        assert stack(rows(10, elsewhere), rng=random_key(0)).device == elsewhere


def published(directory):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


def test_a_published_model_is_read_onto_the_device(tmp_path, elsewhere):
    """Weights and what is no weight (the frequencies of rotary positions) go there, and the model runs there."""
    published(tmp_path)
    model = torch_impl.from_pretrained(tmp_path, device=elsewhere)
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {elsewhere}
    assert model(torch.zeros(2, 5, dtype=torch.int64, device=elsewhere)).device == elsewhere
    here = torch_impl.from_pretrained(tmp_path)
    assert {tensor.device for tensor in (*here.parameters(), *here.buffers())} == {torch.device("cpu")}


@pytest.mark.parametrize("device", [CUDA])
def test_values_on_the_device_are_those_of_the_cpu(device, tmp_path):
    published(tmp_path)
    tokens = torch.arange(10).reshape(2, 5)
    here = torch_impl.from_pretrained(tmp_path, dtype="float64")(tokens)
    there = torch_impl.from_pretrained(tmp_path, dtype="float64", device=device)(tokens.to(device))
    assert (there.cpu() - here).abs().max() <= 1e-12 * here.abs().max()


FLAX = """
import json, sys
import jax, numpy as np
from flax import nnx
import flax_impl

first, second = jax.devices("cpu")
found = {}

def place(name, tree):
    found[name] = sorted({str(device.id) for leaf in jax.tree.leaves(tree) for device in leaf.devices()})

with jax.default_device(second):
    model = flax_impl.from_pretrained(sys.argv[1])
    place("weights", nnx.state(model))
    output = flax_impl.compiled(model)(np.zeros((2, 5), np.int32))
    place("output", output)
    X, Y, mask = np.zeros((10, 10, 24)), np.zeros((10, 8, 24)), np.zeros((10, 10))
    attention = flax_impl.AttentionLayer(model_dim=24, key_dim=3, num_heads=4)
    place("attention", [attention(X, H_enc=Y, mask=mask), attention(X, mask=mask)])
    stack = flax_impl.TransformerStack(N=10, model_dim=24, key_dim=3, hidden_dim=8, num_heads=4, num_stack=2)
    place("stack", stack(X))
    place("positions", flax_impl.PositionalEncoding(24)(X))
place("moved", flax_impl.compiled(jax.device_put(model, first))(np.zeros((2, 5), np.int32)))
here = flax_impl.compiled(flax_impl.from_pretrained(sys.argv[1]))(np.zeros((2, 5), np.int32))
same = np.array_equal(np.asarray(output), np.asarray(here))
print(json.dumps(found | {"same": same}))
"""


def test_flax_models_live_on_the_default_device(tmp_path):
    """Read there, computed there; and a model that is put elsewhere computes elsewhere."""
    published(tmp_path)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", FLAX, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    expected = {name: ["1"] for name in ("weights", "output", "attention", "stack", "positions")}
    assert json.loads(done.stdout.splitlines()[-1]) == expected | {"moved": ["0"], "same": True}
