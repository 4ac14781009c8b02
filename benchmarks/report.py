"""The results as one page that needs nothing else: what was measured, how sure it is, and what limits it."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.machine import fingerprint
from benchmarks.records import Row, by_case

#: torch, jax: told apart by colour and by marker
COLOURS = {"torch": "#d1495b", "jax": "#30638e"}
MARKERS = {"torch": "o", "jax": "s"}

_STYLE = """
:root { color-scheme: light; font: 15px/1.5 system-ui, sans-serif; color: #1c2430; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d5dbe3; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e7ebf0; white-space: nowrap; }
th:first-child, td:first-child, td.said, th.said { text-align: left; white-space: normal; }
tr.absent td { color: #7a8595; } .faster { color: #1d7a46; } .slower { color: #b3261e; } .busy { color: #8a6d00; }
.note { color: #55606f; } svg { max-width: 100%; height: auto; }
"""


def as_html(rows: Sequence[Row]) -> str:
    """One self-contained page."""
    groups = by_case(rows)
    environment = rows[-1]["environment"] if rows else {}
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>twinformer bench</title><style>{_STYLE}</style>",
        "<h1>twinformer bench</h1>",
        f"<p class='note'>{html.escape(fingerprint(environment))}; {html.escape(_versions(environment))}; "
        f"commit {html.escape(str(environment.get('git')))}. Every system computed the same function with the same "
        "weights, and was timed only after its outputs agreed with the float64 truth. Ratios are of times, below 1 is "
        "faster; intervals are 95 % of a hierarchical bootstrap over paired rounds. * tuned.</p>",
    ]
    timed = {key: group for key, group in groups.items() if any(row["derived"] for row in group)}
    for title, draw, usable in (
        ("Ratios", _forest, [g for g in timed.values() if any("wall_ratio" in (r["derived"] or {}) for r in g)]),
        ("Roofline", _roofline, [g for g in timed.values() if g[0]["ceiling"]]),
        ("Start against one unit of work", _starts, list(timed.values())),
        ("Memory", _memory, list(timed.values())),
    ):
        if usable:
            parts += [f"<h2>{title}</h2>", _figure(draw, usable)]
    for (run, case), group in groups.items():
        sizes = ", ".join(f"{name} {value}" for name, value in group[0]["case"].items() if name not in ("name", "kind"))
        parts += [
            f"<h2>{html.escape(case)}</h2><p class='note'>{html.escape(sizes)}; {html.escape(run)}</p>",
            _table(group),
        ]
    return "\n".join([*parts, "</html>"])


def _versions(environment: dict[str, Any]) -> str:
    packages = environment.get("packages", {})
    return ", ".join(f"{name} {version}" for name, version in packages.items() if version)


def _table(group: Sequence[Row]) -> str:
    heads = (
        "system",
        "ms",
        "CPU ms",
        "wall ratio",
        "CPU ratio",
        "said",
        "of products",
        "of bandwidth",
        "tokens/s",
        "error",
        "MB",
    )
    lines = ["<table><tr>" + "".join(f"<th{_kind(head)}>{head}</th>" for head in heads) + "</tr>"]
    for row in group:
        found = row["derived"]
        name = html.escape(row["system"] + (" *" if row["tuned"] else ""))
        if found is None:
            why = f"<td class='said' colspan='10'>{html.escape(row['problem'] or '')}</td>"
            lines.append(f"<tr class='absent'><td>{name}</td>{why}</tr>")
            continue
        wall, cpu = found.get("wall_ratio"), found.get("cpu_ratio")
        said = wall["verdict"] if wall else "reference"
        errors = [error for error in row["errors"].values() if error is not None]
        cells = (
            f"{found['wall'] * 1e3:.4g}",
            f"{found['cpu'] * 1e3:.4g}",
            _ratio(wall),
            _ratio(cpu),
            said,
            _share(found, "of_products"),
            _share(found, "of_bandwidth"),
            f"{found['tokens_per_second']:.4g}",
            f"{max(errors, default=0):.0e}",
            f"{row['rss'] / 2**20:.0f}",
        )
        body = "".join(
            f"<td class='said {said.split()[0]}'>{cell}</td>" if i == 4 else f"<td>{cell}</td>"
            for i, cell in enumerate(cells)
        )
        lines.append(f"<tr><td>{name}</td>{body}</tr>")
    return "\n".join([*lines, "</table>"])


def _kind(head: str) -> str:
    return " class='said'" if head == "said" else ""


def _ratio(found: dict[str, Any] | None) -> str:
    return "1" if found is None else f"{found['value']:.3f} ({found['low']:.3f}–{found['high']:.3f})"


def _share(found: dict[str, Any], name: str) -> str:
    return f"{found[name]:.2f}" if name in found else ""


def _figure(draw: Callable[[Any, list[list[Row]]], None], groups: list[list[Row]]) -> str:
    figure = plt.figure(layout="constrained")
    draw(figure, groups)
    out = io.StringIO()
    figure.savefig(out, format="svg")
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]


def _forest(figure: Any, groups: list[list[Row]]) -> None:
    """Every ratio with its interval, case by case, on a logarithmic axis."""
    shown = [(g[0]["case"]["name"], r) for g in groups for r in g if "wall_ratio" in (r["derived"] or {})]
    figure.set_size_inches(10, 0.8 + 0.24 * len(shown))
    axes = figure.add_subplot()
    for y, (_, row) in enumerate(shown):
        ratio = row["derived"]["wall_ratio"]
        colour, marker = COLOURS[row["framework"]], MARKERS[row["framework"]]
        axes.plot([ratio["low"], ratio["high"]], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(ratio["value"], y, marker=marker, color=colour, markersize=5)
    axes.axvline(1, color="#1c2430", linewidth=0.8)
    axes.axvspan(1 / 1.03, 1.03, color="#e7ebf0", zorder=0)
    axes.set_yticks(range(len(shown)), [f"{case}: {row['system']}" for case, row in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xscale("log")
    ticks = [x for x in (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 4, 8) if axes.get_xlim()[0] <= x <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("time over that of the first system of the case (log); grey: within 3 %")
    _legend(axes)


def _roofline(figure: Any, groups: list[list[Row]]) -> None:
    """What was reached against the ceilings of the same run."""
    figure.set_size_inches(10, 4.5)
    axes = figure.add_subplot()
    ceilings = [group[0]["ceiling"] for group in groups]
    flops, bytes_ = max(c["flops"] for c in ceilings), max(c["bytes"] for c in ceilings)
    x = np.logspace(-1, 4, 200)
    axes.plot(x, np.minimum(flops, x * bytes_) / 1e9, color="#1c2430", linewidth=1)
    for group in groups:
        for row in group:
            if row["derived"]:
                intensity = row["work"]["flops"] / row["work"]["bytes"]
                axes.plot(
                    intensity,
                    row["derived"]["flops_per_second"] / 1e9,
                    MARKERS[row["framework"]],
                    color=COLOURS[row["framework"]],
                    alpha=0.75,
                    markersize=5,
                )
        best = max((r["derived"]["flops_per_second"] for r in group if r["derived"]), default=None)
        if best:
            where = (group[0]["work"]["flops"] / group[0]["work"]["bytes"], best / 1e9)
            axes.annotate(group[0]["case"]["name"], where, fontsize=8, xytext=(4, 5), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations for each byte that must be read")
    axes.set_ylabel("10⁹ operations a second")
    _legend(axes)


def _starts(figure: Any, groups: list[list[Row]]) -> None:
    """Seconds until the first result, compilation in it, beside one unit of work."""
    shown = [(g[0]["case"]["name"], r) for g in groups for r in g if r["derived"] and g[0]["case"]["kind"] != "micro"]
    figure.set_size_inches(10, 0.8 + 0.22 * max(len(shown), 1))
    axes = figure.add_subplot()
    for y, (_, row) in enumerate(shown):
        start, colour = row["start"], COLOURS[row["framework"]]
        axes.barh(y, start["made"], color=colour, alpha=0.35)
        axes.barh(y, start["outputs"], left=start["made"], color=colour)
    axes.set_yticks(range(len(shown)), [f"{case}: {row['system']}" for case, row in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("seconds: import and making (pale), first results with compilation (full)")


def _memory(figure: Any, groups: list[list[Row]]) -> None:
    shown = [(g[0]["case"]["name"], r) for g in groups for r in g if r["derived"] and g[0]["case"]["kind"] != "micro"]
    figure.set_size_inches(10, 0.8 + 0.22 * max(len(shown), 1))
    axes = figure.add_subplot()
    for y, (_, row) in enumerate(shown):
        axes.barh(y, row["rss"] / 2**20, color=COLOURS[row["framework"]])
    axes.set_yticks(range(len(shown)), [f"{case}: {row['system']}" for case, row in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("most memory that the process held, MB")


def _legend(axes: Any) -> None:
    for framework, colour in COLOURS.items():
        axes.plot([], [], MARKERS[framework], color=colour, label=framework)
    axes.legend(loc="best", frameon=False)
