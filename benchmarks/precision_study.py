"""How far apart the errors of two right programs are in low precision: the figures behind rung 3's bounds.

Runs every preset with several seeds and short sequences and prints, for each dtype, the distribution of the ratio
between the twins' errors against the float64 truth. ``--json FILE`` writes every pair.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["JAX_ENABLE_X64"] = "1"

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from twinformer.checkpoint import write_atomically
from twinformer.parity.case import random_case
from twinformer.parity.compare import ErrorPair
from twinformer.parity.evidence import Evidence
from twinformer.parity.rungs import precision
from twinformer.presets import PRESETS, preset


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds for each preset")
    parser.add_argument("--length", type=int, default=48, help="tokens in a sequence")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every pair to FILE")
    options = parser.parse_args()
    rows = []
    cases = [(name, seed) for name in PRESETS for seed in range(options.seeds)]
    for name, seed in track(cases, console=Console(stderr=True)):
        case = random_case(name, preset(name), seed=seed, length=options.length)
        for pair in precision.check(Evidence(case, with_gradients=True)).comparisons:
            assert isinstance(pair, ErrorPair)
            dtype = "bfloat16" if "bfloat16" in pair.name else "float32"
            rows.append(
                {
                    "preset": name,
                    "seed": seed,
                    "dtype": dtype,
                    "name": pair.name,
                    "ratio": pair.ratio,
                    "rms_ratio": pair.rms_ratio,
                    "errors": dict(zip(pair.systems, pair.errors, strict=True)),
                    "rms_errors": dict(zip(pair.systems, pair.rms_errors, strict=True)),
                    "problem": pair.problem,
                }
            )
    table = Table("dtype", "measure", "pairs", "median", "99 %", "largest", "bound", "where")
    for dtype in ("float32", "bfloat16"):
        for measure, bound in (("ratio", precision.LARGEST_RATIO), ("rms_ratio", precision.RMS_RATIO)):
            chosen = [row for row in rows if row["dtype"] == dtype]
            values = np.array([row[measure] for row in chosen])
            worst = chosen[int(values.argmax())]
            quantiles = (f"{np.median(values):.2f}", f"{np.quantile(values, 0.99):.2f}", f"{values.max():.2f}")
            where = f"{worst['preset']} seed {worst['seed']}: {worst['name']}"
            table.add_row(dtype, measure, str(len(values)), *quantiles, f"{bound:.0f}", where)
    Console().print(table)
    if options.json is not None:
        text = json.dumps(rows, indent=0) + "\n"
        write_atomically(options.json, lambda part: part.write_text(text, encoding="utf-8"))
    return 1 if any(row["problem"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
