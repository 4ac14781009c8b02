"""How much memory loading a published checkpoint takes: ``python benchmarks/load_memory.py``.

A random Llama-shaped checkpoint of a billion parameters (bfloat16, in shards) is written to a temporary place, shard
by shard, and loaded by each twin in a fresh process. Printed is the most memory that a process held, less what it held
after its imports, over the size of the weights. Exit code 1 where that is above 1.15.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

LIMIT = 1.15
ROOT = Path(__file__).resolve().parent.parent

#: as the published billion-parameter models of this shape are: 16 blocks, 32 query heads on 8 key/value heads
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000}

LOAD = """
import json, sys, time
def held(name):  # (what getrusage calls the most memory is inherited from the parent)
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024
import {twin}, {twin}.models, twinformer.pretrained
{warm}
before = held("VmRSS")
begun = time.perf_counter()
model = {twin}.from_pretrained(sys.argv[1])
print(json.dumps({{"before": before, "peak": held("VmHWM"), "seconds": time.perf_counter() - begun}}))
"""
WARM = {"torch_impl": "import torch", "flax_impl": "import jax.numpy as jnp; jnp.zeros(3).block_until_ready()"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--out", type=Path, metavar="FILE", help="add the figures to FILE (JSON Lines)")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="twinformer-load-") as name:
        place = Path(name)
        size, parameters = write_checkpoint(place, options.layers)
        for twin, warm in WARM.items():
            done = subprocess.run(
                [sys.executable, "-c", LOAD.format(twin=twin, warm=warm), str(place)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
            found = json.loads(done.stdout.strip().splitlines()[-1])
            ratio = (found["peak"] - found["before"]) / size
            failed = failed or ratio > LIMIT
            line = {"twin": twin, "parameters": parameters, "bytes": size, "ratio": ratio, **found}
            print(json.dumps(line))  # noqa: T201
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(line) + "\n")
    return 1 if failed else 0


def write_checkpoint(place: Path, layers: int) -> tuple[int, int]:
    """One shard for each two blocks, as they come; gives the bytes and the number of the weights."""
    D, F, V = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **SIZES,
        "num_hidden_layers": layers,
    }
    (place / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return (0.02 * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)

    def block(i: int) -> dict[str, np.ndarray]:
        name = f"model.layers.{i}."
        return {
            f"{name}self_attn.q_proj.weight": drawn(D, D),
            f"{name}self_attn.k_proj.weight": drawn(512, D),
            f"{name}self_attn.v_proj.weight": drawn(512, D),
            f"{name}self_attn.o_proj.weight": drawn(D, D),
            f"{name}mlp.gate_proj.weight": drawn(F, D),
            f"{name}mlp.up_proj.weight": drawn(F, D),
            f"{name}mlp.down_proj.weight": drawn(D, F),
            f"{name}input_layernorm.weight": drawn(D),
            f"{name}post_attention_layernorm.weight": drawn(D),
        }

    shards = [lambda: {"model.embed_tokens.weight": drawn(V, D), "model.norm.weight": drawn(D)}]
    shards += [lambda: {"lm_head.weight": drawn(V, D)}]
    shards += [lambda i=i: {**block(i), **(block(i + 1) if i + 1 < layers else {})} for i in range(0, layers, 2)]
    index: dict[str, str] = {}
    size = count = 0
    for number, make in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = make()
        save_file(tensors, place / name, {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        count += sum(tensor.size for tensor in tensors.values())
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )
    return size, count


if __name__ == "__main__":
    sys.exit(main())
