"""Every tensor that the PyTorch twin makes on its way is made where its inputs are.

The "meta" device stands in for a GPU: it computes shapes only, and refuses to be mixed with the CPU (in all but matrix
products and indexing) as a GPU does.
"""

import pytest
import torch
import transformers

import torch_impl
from parity_tests.helpers import shape_hook_off
from torch_impl import AttentionLayer, PositionalEncoding, TransformerStack, random_key

ELSEWHERE = torch.device("meta")
X = torch.zeros(10, 10, 24, device=ELSEWHERE)
Y = torch.zeros(10, 8, 24, device=ELSEWHERE)
MASK = torch.zeros(10, 10, device=ELSEWHERE)


def test_the_device_cannot_be_mixed_with_the_cpu():
    with pytest.raises(RuntimeError):
        X + torch.zeros(24)


def test_the_notebooks_cells_move_with_to():
    attention = AttentionLayer(model_dim=24, key_dim=3, num_heads=4).to(ELSEWHERE)
    assert attention(X, H_enc=Y, mask=MASK).device == ELSEWHERE
    assert attention(X, mask=MASK).device == ELSEWHERE
    stack = TransformerStack(N=10, model_dim=24, key_dim=3, hidden_dim=8, num_heads=4, num_stack=2).to(ELSEWHERE)
    assert stack(X).device == ELSEWHERE
    assert PositionalEncoding(24).to(ELSEWHERE)(X).device == ELSEWHERE


@pytest.mark.parametrize("positions", ["rotary", "relative", "alibi"])
@pytest.mark.parametrize("choices", [{}, {"norm": "rmsnorm", "norm_bias": False, "gated": True, "window": 3}])
def test_every_kind_of_position_moves_with_to(positions, choices):
    stack = TransformerStack(
        10, 24, 4, 8, 4, 2, causal=True, cross_attention=True, positions=positions, num_kv_heads=2, **choices
    ).to(ELSEWHERE)
    memory_mask = torch.ones(10, 1, 1, 8, dtype=torch.bool, device=ELSEWHERE)
    assert stack(X, H_enc=Y, mask=MASK, memory_mask=memory_mask).device == ELSEWHERE


def test_dropout_is_made_on_the_device_of_its_input():
    stack = TransformerStack(10, 24, 4, 8, 4, 2, dropout=0.1, attention_dropout=0.1, hidden_dropout=0.1).to(ELSEWHERE)
    with shape_hook_off():
        assert stack(X, rng=random_key(0)).device == ELSEWHERE


def test_a_published_model_is_read_onto_the_device(tmp_path):
    """Weights and what is no weight (the frequencies of rotary positions) go there, and the model runs there."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = torch_impl.from_pretrained(tmp_path, device=ELSEWHERE)
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {ELSEWHERE}
    assert model(torch.zeros(2, 5, dtype=torch.int64, device=ELSEWHERE)).device == ELSEWHERE
    here = torch_impl.from_pretrained(tmp_path)
    assert {tensor.device for tensor in (*here.parameters(), *here.buffers())} == {torch.device("cpu")}
