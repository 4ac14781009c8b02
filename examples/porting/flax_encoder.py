"""The same classifier ported to Flax NNX. ``bugs`` puts back mistakes that were made on the way.

``"gelu"``: the activation is JAX's default, the tanh approximation. ``"eps"``: the norms have Flax's default eps.
``"heads"``: the width is split as [K, A], not as [A, K].
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import nnx


class SelfAttention(nnx.Module):
    def __init__(self, width: int, heads: int, bugs: Collection[str], rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.swapped = "heads" in bugs
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.output = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        q, k, v = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        scores = jnp.einsum("btak,bsak->bats", q, k) / (width // self.heads) ** 0.5
        mixed = jnp.einsum("bats,bsak->btak", jax.nn.softmax(scores), v)
        return self.output(mixed.reshape(batch, length, width))

    def _split(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        if self.swapped:
            return x.reshape(batch, length, width // self.heads, self.heads).swapaxes(2, 3)
        return x.reshape(batch, length, self.heads, width // self.heads)


class Feedforward(nnx.Module):
    def __init__(self, width: int, hidden: int, bugs: Collection[str], rngs: nnx.Rngs) -> None:
        self.approximate = "gelu" in bugs
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=self.approximate))


class Layer(nnx.Module):
    def __init__(self, width: int, heads: int, hidden: int, bugs: Collection[str], rngs: nnx.Rngs) -> None:
        eps = 1e-6 if "eps" in bugs else 1e-12
        self.attention = SelfAttention(width, heads, bugs, rngs)
        self.attention_norm = nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, rngs=rngs)
        self.feedforward = Feedforward(width, hidden, bugs, rngs)
        self.feedforward_norm = nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.attention_norm(x + self.attention(x))
        return self.feedforward_norm(x + self.feedforward(x))


class Classifier(nnx.Module):
    def __init__(
        self,
        vocabulary: int = 50,
        longest: int = 16,
        width: int = 24,
        heads: int = 4,
        *,
        bugs: Collection[str] = (),
        rngs: nnx.Rngs,
    ) -> None:
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(longest, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.blocks = nnx.List([Layer(width, heads, 40, bugs, rngs) for _ in range(2)])
        self.pooler = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.tanh(self.pooler(x[:, 0])))
