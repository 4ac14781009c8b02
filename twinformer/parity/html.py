"""The report as one self-contained page: no script, no network, readable in any browser and on paper.

The strips show one cell for each module, in the order in which modules finish; the colour is the logarithm of the
error. A cell beyond its bound is framed, the modules that introduce a difference carry a mark.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from html import escape
from importlib import resources

from twinformer.ledger import LEDGER
from twinformer.parity import curves
from twinformer.parity.compare import Comparison, ErrorPair
from twinformer.parity.opened import NAME as OPENED
from twinformer.parity.report import Report, least_noticed
from twinformer.parity.rungs import LADDER
from twinformer.parity.rungs.precision import ROUNDING
from twinformer.parity.strips import Cell, Strip, draw
from twinformer.parity.verdict import Rung

_NO_ANSWER = "—"
# problems of one rung that are shown before one asks for more
_SHOWN = 12


def as_html(report: Report) -> str:
    """The whole page."""
    style = resources.files("twinformer.parity").joinpath("report.css").read_text(encoding="utf-8")
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = "\n".join(
        [
            _header(report, made),
            _ladder(report),
            _strips(report),
            _curves(report),
            _answers(report),
            _findings(report),
            _ledger(report),
            _settings(report),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.subject)}: {escape(report.verdict)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(report: Report, made: str) -> str:
    culprits = ""
    if report.culprits:
        named = ", ".join(f"<code>{escape(name)}</code>" for name in report.culprits)
        culprits = f'<p class="culprits">Introduced by {named}</p>'
    return (
        f'<header><div><p class="kicker">twinformer parity</p><h1>{escape(report.subject)}</h1>'
        f"<p>{escape(report.description)}</p>{culprits}</div>"
        f'<div class="verdict {_class(report.verdict)}"><strong>{escape(report.verdict)}</strong>'
        f"<span>{report.seconds:.1f} s · {made}</span></div></header>"
    )


def _ladder(report: Report) -> str:
    rows = [_row(str(step.number), step.name, step.asks, report.rungs.get(step.name)) for step in LADDER]
    asks = {OPENED: "what users open is what was judged"}
    rows += [_row("", name, asks.get(name, "an outside witness"), rung) for name, rung in report.witnesses.items()]
    heads = "".join(
        f"<th{' class=number' if is_number else ''}>{head}</th>"
        for head, is_number in (
            ("", False),
            ("rung", False),
            ("checked", False),
            ("worst", True),
            ("bound", True),
            ("noise floor", True),
            ("would notice", True),
            ("where", False),
            ("verdict", False),
        )
    )
    return (
        "<section><h2>The ladder</h2>"
        f'<div class="wide"><table class="ladder"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
        '</div><p class="legend">Worst: the comparison nearest to its bound, relative to the tensor’s scale; in low '
        "precision the ratio of the twins’ errors. Noise floor: the same computation in another order. Would notice: "
        "the relative change of a single weight that the least sensitive comparison would have noticed.</p></section>"
    )


def _row(number: str, name: str, asks: str, rung: Rung | None) -> str:
    if rung is None:
        verdict, cells = "not run", ["", "", "", "", "", ""]
    else:
        verdict, worst = rung.verdict, rung.worst
        cells = [escape(rung.checked), *_figures(worst), least_noticed(rung), escape(worst.name) if worst else ""]
    classes = ["", "number", "number", "number", "number", "path"]
    columns = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(classes, cells, strict=True))
    return (
        f'<tr class="{_class(verdict)}"><td class="step">{number}</td><td><b>{escape(name)}</b><small>{escape(asks)}'
        f'</small></td>{columns}<td><span class="pill {_class(verdict)}">{escape(verdict)}</span></td></tr>'
    )


def _figures(worst: Comparison | ErrorPair | None) -> list[str]:
    if worst is None:
        return ["", "", ""]
    if isinstance(worst, ErrorPair):
        by_rms = worst.rms_ratio / worst.rms_bound > worst.ratio / worst.bound
        value, bound = (worst.rms_ratio, worst.rms_bound) if by_rms else (worst.ratio, worst.bound)
        return [f"×{value:.2f}", f"×{bound:.0f}", _short(max(worst.noise)) if worst.noise else ""]
    return [_short(worst.relative), _short(worst.bound), "" if worst.noise is None else _short(worst.noise)]


def _strips(report: Report) -> str:
    strips = []
    forward, gradients = report.rungs.get("forward"), report.rungs.get("gradients")
    if forward is not None:
        strips.append(_strip("forward", forward, forward.culprits, prefix=""))
    if gradients is not None:
        strips.append(_strip("backward", gradients, gradients.culprits, prefix="output of "))
        strips.append(_strip("parameters", gradients, [], prefix="", only_parameters=True))
    strips = [strip for strip in strips if strip.cells]
    parts = []
    if strips:
        first = next((cell for strip in strips for cell in strip.cells if cell.is_beyond), None)
        told = (
            f'<p class="first">First divergence: <code>{escape(first.name)}</code>, {_short(first.value)} of scale.</p>'
            if first
            else '<p class="legend">No module beyond its bound.</p>'
        )
        parts.append(
            f"<section><h2>Float64, module by module</h2>{told}{draw(strips, low=-17, high=0, bound=-12)}"
            '<p class="legend">A dark edge: beyond its bound. A mark above: a module that introduces a difference, '
            "found by giving both twins’ modules the same inputs and cotangents.</p></section>"
        )
    precision = report.rungs.get("precision")
    if precision is not None:
        low = [strip for dtype in ROUNDING for strip in _error_strips(precision, dtype)]
        parts.append(
            "<section><h2>Low precision: each twin’s error against the float64 truth</h2>"
            '<p class="legend">The same tensors for both twins: outputs of blocks, then gradients of parameters. Two '
            "right programs differ by rounding; neither should be much further from the truth.</p>"
            f"{draw(low, low=-8, high=0)}</section>"
        )
    return "\n".join(parts)


def _curves(report: Report) -> str:
    training = report.rungs.get("training")
    return "" if training is None else curves.draw(training)


def _strip(label: str, rung: Rung, culprits: Sequence[str], *, prefix: str, only_parameters: bool = False) -> Strip:
    cells = []
    for one in rung.comparisons:
        is_output = one.name.startswith("output of ")
        if not isinstance(one, Comparison) or (prefix and not is_output) or (only_parameters and is_output):
            continue
        name = one.name.removeprefix(prefix)
        cells.append(Cell(name, one.relative, not one.agrees, name in culprits, _told(one)))
    return Strip(label, cells)


def _error_strips(rung: Rung, dtype: str) -> list[Strip]:
    pairs = [one for one in rung.comparisons if isinstance(one, ErrorPair) and f"({dtype}, " in one.name]
    systems = pairs[0].systems if pairs else ()
    return [
        Strip(
            f"{dtype} {system}",
            [Cell(one.name, one.errors[i], not one.agrees, False, one.describe()) for one in pairs],
        )
        for i, system in enumerate(systems)
    ]


def _told(one: Comparison) -> str:
    told = one.describe()
    if math.isfinite(one.ulps):
        told += f"; {one.ulps:.3g} units in the last place"
    if one.notices is not None and math.isfinite(one.notices):
        told += f"; would notice one weight changed by {one.notices:.0e} of itself"
    return told


def _answers(report: Report) -> str:
    if not report.answers:
        return ""
    heads = "".join(f"<th>{escape(str(head))}</th>" for head in report.answers[0])
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{escape(value)}</td>" if isinstance(value, str) else f'<td class="number">{value:.4f}</td>'
            for value in answer.values()
        )
        + "</tr>"
        for answer in report.answers
    )
    return f"<section><h2>Answers</h2><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></section>"


def _findings(report: Report) -> str:
    parts = []
    for name, rung in {**report.rungs, **report.witnesses}.items():
        if not rung.problems and not rung.notes:
            continue
        problems = "".join(f'<li class="{_class(rung.verdict)}">{escape(text)}</li>' for text in rung.problems[:_SHOWN])
        if len(rung.problems) > _SHOWN:
            others = "".join(f"<li>{escape(text)}</li>" for text in rung.problems[_SHOWN:])
            more = f"and {len(rung.problems) - _SHOWN} more"
            problems += f"<li><details><summary>{more}</summary><ul>{others}</ul></details></li>"
        notes = "".join(f"<li>{escape(text)}</li>" for text in rung.notes)
        is_open = " open" if rung.problems else ""
        count = f"{len(rung.problems)} problems, {len(rung.notes)} notes"
        parts.append(
            f"<details{is_open}><summary>{escape(name)} <small>{count}</small></summary>"
            f"<ul>{problems}{notes}</ul></details>"
        )
    parts += [f"<p>{escape(note)}</p>" for note in report.notes]
    return f"<section><h2>Findings</h2>{''.join(parts) or '<p>None.</p>'}</section>"


def _ledger(report: Report) -> str:
    rows = []
    for choice in LEDGER:
        values = "<br>".join(
            f"<code>{escape(name)} = {escape(str(report.config[name]))}</code>"
            for name in choice.fields
            if name in report.config
        )
        tests = "<br>".join(f"<code>{escape(test)}</code>" for test in choice.tests)
        faults = ", ".join(choice.mutants) or _NO_ANSWER
        rows.append(
            f"<tr><td><b>{escape(choice.name)}</b><small>{escape(choice.here)}</small></td>"
            f"<td>{values or _NO_ANSWER}</td><td>{tests}</td><td>{escape(faults)}</td></tr>"
        )
    return (
        "<section><h2>The conventions that were settled</h2><details><summary>the ledger "
        f"<small>{len(LEDGER)} choices, each with its tests and the planted faults that hold it</small></summary>"
        '<div class="wide"><table class="ledger"><thead><tr><th>choice</th><th>in this model</th><th>tests</th>'
        f"<th>faults planted</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></details></section>"
    )


def _settings(report: Report) -> str:
    again = f"<h3>To repeat it</h3><pre>{escape(report.command)}</pre>" if report.command else ""
    settings = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in report.settings.items())
    missing = ", ".join(report.not_run) or "nothing"
    return (
        f"<section><h2>Not checked</h2><p>{escape(missing)}</p>{again}<h3>Versions and settings</h3>"
        f"<dl>{settings}</dl></section>"
    )


def _class(verdict: str) -> str:
    return verdict.replace(" ", "-")


def _short(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.1e}" if math.isfinite(value) else "not comparable"
