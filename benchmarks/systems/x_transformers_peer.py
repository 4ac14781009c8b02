"""The ``x-transformers`` library with our weights: its ``TransformerWrapper`` around ``Encoder`` or ``Decoder``.

Its attention has no biases, and its norms have neither a bias nor an epsilon to set; nothing that its constructors
take changes that. So where a case has them, PyTorch's own ``nn.Linear``, ``nn.LayerNorm`` and ``nn.RMSNorm`` stand in
its modules instead (they are not slower than what they replace). All else is the library: attention, feed-forward,
residuals, rotary positions, cache, generation. It turns neighbouring pairs of a head where Llama turns halves; the
rows of queries and keys are put in its order, which gives the same scores.

Not offered for ``beam``: its ``beam_search`` repeats the prompts but not what they attend to, so it fails with more
than one source.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import x_transformers
from torch import Tensor, nn
from x_transformers.x_transformers import LayerNorm, RMSNorm

from benchmarks.cases import Arrays, Case
from benchmarks.systems.torch_work import Call, Step, Written, tensors
from twinformer.config import ModelConfig


def make(case: Case, weights: Arrays, variant: str) -> Any:
    is_tuned = variant == "tuned"
    model = Model(case.config, weights, flash=is_tuned)
    inputs = tensors(case.inputs())
    if case.kind == "train":
        model.train()
        return Step(case, lambda: model(**inputs), model.parameters(), fused=is_tuned)
    model.eval()
    if case.kind == "decode":
        writer = x_transformers.AutoregressiveWrapper(model.main)
        return Written(lambda: writer.generate(inputs["tokens"], case.new, temperature=0.0).numpy())
    return Call(lambda: model(**inputs))


class Model(nn.Module):
    """One wrapper, or one for the source and one for the target."""

    def __init__(self, config: ModelConfig, weights: Arrays, *, flash: bool) -> None:
        super().__init__()
        left = dict(weights)
        if config.architecture == "encoder-decoder":
            self.source: Any = _wrapper(config, "encoder", flash)
            # (a wrapper draws the table anew, also one that it is given: so both before any weight)
            self.main = _wrapper(config, "decoder", flash, crossing=True, token_emb=self.source.token_emb)
            _fill(self.source, config, left, "encoder", "source_embedding")
            _fill(self.main, config, left, "decoder", "target_embedding")
        else:
            self.source = None
            self.main = _wrapper(config, config.architecture, flash)
            _fill(self.main, config, left, "stack", "embedding")
        assert not left, f"expected every weight to be used, left: {sorted(left)}"

    def forward(
        self, tokens: Tensor | None = None, source: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        if self.source is None:
            logits: Tensor = self.main(tokens)
        else:
            logits = self.main(target, context=self.source(source))
        return logits


def _wrapper(config: ModelConfig, side: str, flash: bool, *, crossing: bool = False, token_emb: Any = None) -> Any:
    is_source = config.architecture == "encoder-decoder" and side == "encoder"
    choices: dict[str, Any] = {
        "dim": config.model_dim,
        "depth": config.num_encoder_layers if is_source else config.num_layers,
        "heads": config.num_heads,
        "attn_dim_head": config.key_dim,
        "attn_project_out": True,  # left out by default where there is one head
        "attn_flash": flash,
        "pre_norm": config.norm_placement == "pre",
        "ff_mult": config.hidden_dim / config.model_dim,
        "ff_glu": config.gated,
        "ff_swish": config.activation == "silu",
        "ff_no_bias": not config.feedforward_bias,
        "use_rmsnorm": config.norm == "rmsnorm",
        "rotary_pos_emb": config.positions == "rotary",
        "rotary_emb_dim": config.key_dim,
    }
    if crossing:
        choices["cross_attend"] = True
    layers = (x_transformers.Encoder if side == "encoder" else x_transformers.Decoder)(**choices)
    wrapper = x_transformers.TransformerWrapper(
        num_tokens=config.vocab_size,
        max_seq_len=config.context_length,
        attn_layers=layers,
        post_emb_norm=config.embedding_norm,
        tie_embedding=config.head == "tied",
        tie_embedding_scale=1.0,
        return_only_embed=is_source,
        token_emb=token_emb,
    )
    if config.positions == "learned":
        wrapper.pos_emb.scale = 1.0
    _own_parts(wrapper, config)
    return wrapper


def _own_parts(wrapper: Any, config: ModelConfig) -> None:
    """Norms with an epsilon and a bias, projections of attention with a bias."""
    for module in list(wrapper.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LayerNorm):
                setattr(module, name, nn.LayerNorm(config.model_dim, eps=config.norm_eps))
            elif isinstance(child, RMSNorm):
                setattr(module, name, nn.RMSNorm(config.model_dim, eps=config.norm_eps))
        if isinstance(module, x_transformers.Attention):
            for name in ("to_q", "to_k", "to_v", "to_out"):
                has_bias = config.output_bias if name == "to_out" else config.qkv_bias
                if has_bias:
                    old = getattr(module, name)
                    setattr(module, name, nn.Linear(old.in_features, old.out_features))


@torch.no_grad()
def _fill(wrapper: Any, config: ModelConfig, left: Arrays, stack: str, embedding: str) -> None:
    """Our weights by path into the library's modules; what is used goes out of ``left``, and nothing stays unfilled."""
    filled: set[int] = set()

    def put(parameter: Tensor, *arrays: Any) -> None:
        value = torch.from_numpy(np.concatenate(arrays))
        assert parameter.shape == value.shape, f"expected {tuple(parameter.shape)}, got {tuple(value.shape)}"
        parameter.copy_(value)
        filled.add(id(parameter))

    def put_module(module: Any, path: str) -> None:
        put(module.weight, left.pop(f"{path}.weight"))
        if getattr(module, "bias", None) is not None:
            put(module.bias, left.pop(f"{path}.bias"))

    if f"{embedding}.tokens.weight" in left:
        put_module(wrapper.token_emb.emb, f"{embedding}.tokens")
    else:  # shared with the source
        filled.add(id(wrapper.token_emb.emb.weight))
    if config.positions == "learned":
        # the first rows of ours belong to no position: that is how BART's offset is stored
        put(wrapper.pos_emb.emb.weight, left.pop(f"{embedding}.positions.weight")[config.position_offset :])
    if config.embedding_norm:
        put_module(wrapper.post_emb_norm, f"{embedding}.norm")
    if config.final_norm:
        put_module(wrapper.attn_layers.final_norm, f"{stack}.final_norm")
    if config.head == "untied":
        put_module(wrapper.to_logits, "head")
    kinds = {"a": "attention", "c": "cross_attention", "f": "feedforward"}
    block = -1
    for kind, (norms, layer, _) in zip(wrapper.attn_layers.layer_types, wrapper.attn_layers.layers, strict=True):
        block += kind == "a"
        path = f"{stack}.blocks.{block}.{kinds[kind]}"
        put_module(norms[0 if config.norm_placement == "pre" else 2], f"{path}_norm")
        if kind == "f":
            _fill_feedforward(put, put_module, layer, config, left, path)
            continue
        if config.positions == "rotary":
            for name in ("query", "key"):
                left[f"{path}.{name}.weight"] = _in_pairs(left[f"{path}.{name}.weight"], config.key_dim)
        for theirs, ours in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out", "output")):
            put_module(getattr(layer, theirs), f"{path}.{ours}")
    unfilled = [name for name, parameter in wrapper.named_parameters() if id(parameter) not in filled]
    assert not unfilled, f"expected every parameter to be filled, left: {unfilled}"


def _fill_feedforward(put: Any, put_module: Any, layer: Any, config: ModelConfig, left: Arrays, path: str) -> None:
    first, down = layer.ff[0], layer.ff[2]
    if config.gated:
        put(first.proj.weight, left.pop(f"{path}.up.weight"), left.pop(f"{path}.gate.weight"))
        put(first.proj.bias, np.zeros(2 * config.hidden_dim, np.float32))  # it cannot be left out
    else:
        put_module(first[0], f"{path}.up")
    put_module(down, f"{path}.down")


def _in_pairs(weight: Any, K: int) -> Any:
    """Rows of each head, halves ``[x1 x2]`` to neighbours ``[x1[0] x2[0] x1[1] …]``."""
    heads = weight.reshape(-1, 2, K // 2, weight.shape[-1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(weight.shape)
