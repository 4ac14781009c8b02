"""PyTorch's own kernels beside the explicit formulas: the same values and gradients, and hidden rows stay hidden."""

from __future__ import annotations

import pytest
import torch

import torch_impl
from torch_impl import fused, linear, masks
from torch_impl.attention import attend
from torch_impl.norms import LayerNorm
from twinformer import presets

# of the largest magnitude: sums of a few hundred products in another order
FORWARD, GRADIENT = 1e-13, 1e-12


def both(function, inputs, cotangent):
    """The results and gradients of the fast path, and of the formulas."""

    def run():
        Y = function(*inputs)
        return (Y.detach(), *torch.autograd.grad(Y, inputs, cotangent))

    fast = run()
    with fused.explicit_formulas():
        return fast, run()


def agree(fast, explicit):
    # a gradient that is 0 by mathematics (one key has all the weight; a key's bias) is rounding alone
    floor = 1e-3 * max(gradient.abs().max() for gradient in explicit[1:])
    for i, (one, other) in enumerate(zip(fast, explicit, strict=True)):
        assert torch.equal(one.isnan(), other.isnan())
        scale = torch.maximum(other.nan_to_num().abs().max(), floor)
        assert (one - other).nan_to_num().abs().max() <= (GRADIENT if i else FORWARD) * scale


def allowed_of(kind, B, T, S):
    real = torch.rand(B, S, generator=torch.Generator().manual_seed(3)) > 0.3
    real[1] = False  # nothing to attend to
    return {
        "everything": None,
        "causal": masks.causal_mask(T, S),
        "window": masks.causal_mask(T, S, window=3),
        "padding": masks.padding_mask(real),
        "causal and padding": masks.both(masks.causal_mask(T, S), masks.padding_mask(real)),
        "by head": torch.rand(B, 6, T, S, generator=torch.Generator().manual_seed(4)) > 0.7,
    }[kind]


@pytest.mark.parametrize("kind", ["everything", "causal", "window", "padding", "causal and padding", "by head"])
@pytest.mark.parametrize(("T", "S"), [(5, 7), (40, 40), (3, 300), (2, 1)])
def test_attention(kind, T, S, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    Q, K, V, cotangent = (
        torch.randn(3, heads, length, 8, dtype=torch.float64, generator=generator)
        for heads, length in ((6, T), (2, S), (2, S), (6, T))
    )
    taken = []
    kernel = fused.attention
    monkeypatch.setattr(fused, "attention", lambda *a, **k: taken.append(kernel(*a, **k)) or taken[-1])
    inputs = [X.requires_grad_() for X in (Q, K, V)]
    agree(*both(lambda *X: attend(*X, scale=0.3, allowed=allowed_of(kind, 3, T, S)), inputs, cotangent))
    assert len(taken) == 2
    assert taken[0] is not None
    assert taken[1] is None


def test_a_hidden_score_that_overflows_does_not_spread():
    """PyTorch's kernel would give NaN here: the formulas take over."""
    Q = torch.full((1, 1, 2, 4), 1e200, dtype=torch.float64, requires_grad=True)
    K = torch.tensor([1.0, 1e200], dtype=torch.float64)[None, None, :, None].expand(1, 1, 2, 4).clone().requires_grad_()
    V = torch.randn(1, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    allowed = torch.tensor([[True, False], [True, False]])
    Z = attend(Q, K, V, scale=1.0, allowed=allowed)
    assert torch.equal(Z, V[:, :, :1].expand_as(Z))
    assert all(g.isfinite().all() for g in torch.autograd.grad(Z.sum(), (Q, K, V)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight", ["plain", "one_plus"])
def test_layer_norm(bias, weight):
    norm = LayerNorm(9, eps=1e-3, bias=bias, weight=weight, param_dtype="float64", compute_dtype="float64", seed=None)
    generator = torch.Generator().manual_seed(1)
    X, cotangent = (torch.randn(4, 9, dtype=torch.float64, generator=generator) for _ in range(2))
    X[0] = X[0] * 1e-3 + 5  # far from 0, little spread
    inputs = [X.requires_grad_(), *norm.parameters()]
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(9, generator=generator))
    agree(*both(lambda *_: norm(X), inputs, cotangent))


@pytest.mark.parametrize("preset", ["textbook-decoder", "textbook-encoder-decoder", "bert", "llama"])
def test_a_whole_model(preset):
    config = presets.preset(preset).with_dtype("float64")
    model = torch_impl.build(config, seed=3)
    generator = torch.Generator().manual_seed(2)
    names = ["source", "target"] if config.architecture == "encoder-decoder" else ["tokens"]
    ids = min(config.vocab_size, config.source_vocab_size or config.vocab_size)
    inputs = {name: torch.randint(0, ids, (2, 9), generator=generator) for name in names}
    real = torch.tensor([[True] * 9, [False] * 2 + [True] * 7])
    padding = "source_padding_mask" if len(names) == 2 else "padding_mask"
    Y = model(**inputs, **{padding: real})
    cotangent = torch.randn(Y.shape, dtype=Y.dtype, generator=generator)
    agree(*both(lambda *_: model(**inputs, **{padding: real}), list(model.parameters()), cotangent))


def test_rows_that_are_not_finite():
    """Whether a tensor is finite as a whole decides only how rows are looked for."""
    X = torch.randn(2, 3, 4)
    X[1, 2, 0] = torch.inf
    clean, broken = masks.quarantine(X)
    assert broken.tolist() == [[False] * 3, [False, False, True]]
    assert clean.isfinite().all()
    assert torch.equal(clean[0], X[0])
    assert (clean[1, 2] == 0).all()
    with fused.explicit_formulas():
        again = masks.quarantine(X[:1])
    assert torch.equal(masks.quarantine(X[:1])[0], again[0])
    assert not again[1].any()


# ---- a few rows times a large matrix


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (3, 5), (16,), (17,), (0,)])
@pytest.mark.parametrize(
    "width", [64, 512]
)  # on the left of the matrix where rows are few and short, else on its right
def test_a_few_rows_meet_parts_of_the_matrix(width, shape, bias, dtype, monkeypatch):
    rng = torch.Generator().manual_seed(3)
    W = torch.randn(1024, width, generator=rng, dtype=torch.float64)
    X, b = torch.randn(*shape, width, generator=rng, dtype=torch.float64), torch.randn(1024, generator=rng).double()
    given = (X.to(dtype), W.to(dtype), b.to(dtype) if bias else None)
    expected = given[0].double() @ given[1].double().T + (b.to(dtype).double() if bias else 0)
    taken = []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *given: taken.append(given[0].shape) or product(*given))
    with torch.no_grad():
        found = linear.affine(*given)
        with fused.explicit_formulas():
            plain = linear.affine(*given)
    rows = X.numel() // width
    left = (8, 128, width) if rows == 1 or X.numel() <= 4096 else (8, rows, width)
    assert taken == ([left] if 0 < rows <= 16 else [])
    assert found.shape == plain.shape == (*shape, 1024)
    assert found.dtype == dtype
    for one in (found, plain) if X.numel() else ():  # sums of up to 512 products
        assert (one.double() - expected).abs().max() <= 16 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("why", ["gradients", "small", "odd", "strided", "16 bits"])
def test_parts_are_left_alone(why, monkeypatch):
    W = torch.randn(1024, 64)
    W = {"small": W[:512], "odd": W[:1023], "strided": torch.randn(64, 1024).t()}.get(why, W)
    W = W.bfloat16() if why == "16 bits" else W
    monkeypatch.setattr(torch, "bmm", None)
    with torch.set_grad_enabled(why == "gradients"):
        assert linear.affine(torch.randn(2, 64, dtype=W.dtype), W).shape == (2, len(W))
