"""``twinformer bench``: how fast the twins and their peers are, after each has shown that it computes the same."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from twinformer.commands.common import check_writable, err, need, out, told_plainly, write
from twinformer.errors import TwinformerError

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

# columns of a terminal below which a table shows times and ratios only
_WIDE = 120
_Results = Annotated[Path, typer.Argument(metavar="RESULTS", help="A file of results (JSON Lines).")]


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(metavar="[CASE]...", help="Only these cases.")] = None,
    system: Annotated[list[str] | None, typer.Option(help="Only this system (may be given several times).")] = None,
    quick: Annotated[bool, typer.Option(help="Small sizes: some minutes.")] = False,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds in which every system is visited once.")] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Samples of a visit.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores; all if left out.")] = None,
    planted: Annotated[
        float | None, typer.Option(min=0, max=1, help="Slow the A/A run down by this share: is it noticed?")
    ] = None,
    results: Annotated[Path, typer.Option("--out", metavar="FILE", help="Rows are added to FILE as they come.")] = Path(
        "bench.jsonl"
    ),
) -> None:
    """Measure: gate, warm-up, paired rounds, intervals. What is done is kept when it is stopped."""
    with told_plainly("cases that were done are in the results"):
        need("torch", "jax", "flax")
        check_writable({"--out": results})
        bench = _benchmarks()
        try:
            work = bench.run.chosen(names or [], system or [], quick=quick)
        except ValueError as error:
            raise TwinformerError("bench", str(error).splitlines()) from None
        with err.status("starting") as status:
            bench.run.run(
                work,
                results,
                rounds=rounds,
                samples=samples,
                threads=threads or len(os.sched_getaffinity(0)),
                quick=quick,
                planted=planted,
                progress=status.update,
                done=lambda case, rows: out.print(table_of(case.name, rows)),
            )


@app.command()
def show(file: _Results) -> None:
    """The tables of a file of results."""
    with told_plainly():
        bench = _benchmarks()
        for (started, case), rows in bench.records.by_case(_read(bench, file)).items():
            out.print(table_of(f"{case}, {started}", rows))


@app.command()
def verify(file: _Results) -> None:
    """Compute every derived number anew from the raw samples. Exit code 1 where one does not follow."""
    with told_plainly():
        bench = _benchmarks()
        rows = _read(bench, file)
        problems = bench.records.verify(rows)
        for problem in problems:
            err.print(problem, style="red", markup=False, highlight=False)
        out.print(f"{len(rows)} rows: {len(problems)} numbers that do not follow from the samples")
        raise typer.Exit(1 if problems else 0)


@app.command()
def compare(before: _Results, after: _Results) -> None:
    """Two files, by the ratio to the reference of each run. Exit code 1 where something became slower."""
    with told_plainly():
        bench = _benchmarks()
        found = bench.records.compare(_read(bench, before), _read(bench, after))
        if not found:
            raise TwinformerError("compare", ["expected cases and systems that both files have, got none"])
        table = Table("case", "system", "before", "after", "change", "verdict")
        for row in found:
            cells = (f"{row['before']:.3f}", f"{row['after']:.3f}", f"{row['change']:.3f}", row["verdict"])
            table.add_row(row["case"], row["system"], *cells, style="red" if row["verdict"] == "slower" else None)
        out.print(table)
        raise typer.Exit(1 if any(row["verdict"] == "slower" for row in found) else 0)


@app.command()
def report(
    file: _Results,
    html: Annotated[Path, typer.Option("--html", metavar="FILE", help="Where the page goes.")],
) -> None:
    """One self-contained page: ratios with intervals, rooflines, start-up, memory."""
    with told_plainly():
        check_writable({"--html": html})
        need("matplotlib", extra="train")
        bench = _benchmarks()
        rows = _read(bench, file)
        import benchmarks.report

        write(html, benchmarks.report.as_html(rows))


def table_of(title: str, rows: list[dict[str, Any]]) -> Table:
    """One case: time, ratio with its interval, share of the ceilings, error, memory; and who was not timed, and why."""
    table = Table(title=title, title_justify="left")
    columns = ("system", "ms", "ratio", "interval", "verdict", "of products", "of bandwidth", "error", "start s", "MB")
    shown = len(columns) if out.width >= _WIDE else 5
    for name in columns[:shown]:
        table.add_column(name, justify="left" if name in ("system", "verdict") else "right", no_wrap=name != "verdict")
    for row in rows:
        name = row["system"] + (" *" if row["tuned"] and "tuned" not in row["system"] else "")
        found = row["derived"]
        if found is None:
            table.add_row(name, "", "", "", row["problem"] or "not timed", style="dim")
            continue
        ratio = found.get("wall_ratio")
        said = (
            ("1", "", "reference")
            if ratio is None
            else (
                f"{ratio['value']:.3f}",
                f"{ratio['low']:.3f}–{ratio['high']:.3f}",
                ratio["verdict"],
            )
        )
        errors = [error for error in row["errors"].values() if error is not None]
        cells = (
            name,
            f"{found['wall'] * 1e3:.4g}",
            *said,
            f"{found['of_products']:.2f}" if "of_products" in found else "",
            f"{found['of_bandwidth']:.2f}" if "of_bandwidth" in found else "",
            f"{max(errors, default=0):.0e}",
            f"{row['start']['made'] + row['start']['outputs']:.1f}",
            f"{row['rss'] / 2**20:.0f}",
        )
        table.add_row(*cells[:shown])
    return table


def _benchmarks() -> Any:
    """The package of the checkout. Raises TwinformerError where there is none."""
    root = Path(__file__).resolve().parents[2]
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    if importlib.util.find_spec("benchmarks") is None or not (root / "benchmarks" / "run.py").is_file():
        raise TwinformerError("bench", ["expected a checkout of the project with benchmarks/, got a package alone"])
    import benchmarks
    import benchmarks.records
    import benchmarks.run

    return benchmarks


def _read(bench: Any, file: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = bench.records.read(file)
    except ValueError as error:
        raise TwinformerError(str(file), str(error).splitlines()) from None
    return rows
