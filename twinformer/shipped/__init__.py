"""Trained models that come with the package: what each is, how it was made, and what it scored.

Their names stand for their directories wherever a model directory is asked for: ``twinformer parity guitar-pieces``.
"""

from __future__ import annotations

from pathlib import Path

#: name -> what it is
SHIPPED = {
    "guitar-tab": "an encoder-decoder that writes the string and fret of every note of an arpeggio",
    "guitar-pieces": "a decoder that writes solo guitar pieces as note tokens, trained on public-domain pieces only",
}


def directory(name: str) -> Path | None:
    """Where the shipped model of that name is; None for another name."""
    return Path(__file__).parent / name if name in SHIPPED else None
