"""``twinformer generate``: a trained model writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from twinformer.commands.common import check_writable, err, out, told_plainly, write

PARTED = 1


def generate(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL_DIR", help="The directory of a run, or of a model.")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...",
            help="Text; for tablature MIDI pitches ('40 45 52'), for pieces note tokens; or a music file.",
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Further prompts, one a line.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="torch or flax; left out, the one that is installed.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run both backends; say where they part, if they do, and by what margin.")
    ] = False,
    checkpoint: Annotated[str, typer.Option(help="Of a run: best, last, or the number of a step.")] = "best",
    dtype: Annotated[
        str | None, typer.Option(help="Compute in float64, float32 or bfloat16; left out, as saved.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens.")] = 256,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="The likeliest token each time; tablature is always so.")
    ] = False,
    beams: Annotated[int | None, typer.Option(min=1, help="Beam search of this width.")] = None,
    temperature: Annotated[float, typer.Option(help="Above 1 flattens, below 1 sharpens.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest tokens whose mass reaches p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens with at least this share of the likeliest.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said is said less.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text in both backends.")] = 0,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Music: .mid, .tab, .txt, .svg, .png or .pdf, by its name."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write tokens and log-probabilities to FILE.")
    ] = None,
) -> None:
    """Write on from prompts: text, solo guitar pieces, or tablature for a melody.

    A single text appears as it is written. Exit code 0; with --compare 1 where the backends part; 2: cannot run.
    """
    with told_plainly("nothing was written"):
        check_writable({"--json": json_file, "--out": out_file})
        from twinformer.decoding import BeamConfig, SamplingConfig
        from twinformer.errors import ConfigError, InputError, Problems
        from twinformer.runs import backends
        from twinformer.runs.subjects import find
        from twinformer.runs.writing import save_pieces, writer_for

        problems = Problems("generate", ConfigError)
        problems.expect(backend in (None, "torch", "flax"), f"--backend: expected torch or flax, got {backend!r}")
        problems.expect(not (greedy and beams), "--greedy: expected one of --greedy and --beams, got both")
        problems.expect(
            dtype in (None, "float64", "float32", "bfloat16"),
            f"--dtype: expected float64, float32 or bfloat16, got {dtype!r}",
        )
        problems.raise_if_any()
        sampling = SamplingConfig(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        )
        names = ("torch", "flax") if compare else (backend or backends.default_backend(),)
        subject = find(
            Path(model), checkpoint=checkpoint, tell=lambda text: err.print(text, markup=False, soft_wrap=True)
        )
        config = subject.config if dtype is None else subject.config.replace(compute_dtype=dtype, param_dtype=dtype)
        backends.prepare(names, config.compute_dtype)
        writer = writer_for(subject.directory, config)
        given = [*(prompts or ()), *_lines(prompts_file)] or ([""] if writer.kind == "notes" else [])
        if not given:
            raise InputError("generate", ["expected a prompt, or --prompts with a file of them, got none"])
        request = writer.request(given)
        mask = request.arguments.get("padding_mask")
        room = config.context_length - (1 if mask is None else int(mask.sum(1).max()))
        if room < 1:
            raise InputError(
                "generate", [f"prompts: expected room for a token within {config.context_length}, got none"]
            )
        ask: dict[str, Any] = {**request.arguments, "max_new_tokens": min(max_new_tokens, room)}
        if request.at_most is not None:
            ask["max_new_tokens"] = request.at_most
        written: dict[str, Any] = {}
        models = {name: backends.make_model(name, config, subject.weights) for name in names}
        for name in names:
            if beams is not None:
                found = backends.beam_search(name, models[name], request.prompts, beam=BeamConfig(width=beams), **ask)
                written[name] = backends.best_of(found)
                continue
            generator = backends.make_generator(name, models[name])
            drawn = None if greedy or writer.kind == "tab" else sampling
            if len(given) == 1 and not compare and writer.kind != "tab" and json_file is None and out_file is None:
                _stream(generator, writer, given[0], request.prompts, ask | {"sampling": drawn, "seed": seed})
                return
            written[name] = generator(request.prompts, **ask, sampling=drawn, seed=seed)
        first = written[names[0]]
        ids = [row[:length].tolist() for row, length in zip(first.tokens, first.lengths, strict=True)]
        if out_file is not None:
            for place in save_pieces(writer, given, ids, out_file):
                err.print(f"wrote {place}", markup=False, highlight=False)
        else:
            for prompt, one in zip(given, ids, strict=True):
                out.print(writer.spell(prompt, one), markup=False, highlight=False, soft_wrap=True)
        parted = _parted(names, models, request, given, written, ask) if compare else []
        if json_file is not None:
            write(json_file, json.dumps(_as_json(given, written, parted), indent=1, allow_nan=False) + "\n")
        if parted:
            raise typer.Exit(PARTED)


def _lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    from twinformer.checkpoint import read_text

    return [line for line in read_text(file).splitlines() if line.strip()]


def _stream(generator: Any, writer: Any, prompt: str, prompts: Any, ask: Mapping[str, Any]) -> None:
    """Print a text while it is written: what is spelled anew is held back until it no longer changes."""
    ids: list[int] = []
    shown = 0
    try:
        for tokens, live in generator.stream(prompts, **ask):
            if live[0]:
                ids.append(int(tokens[0]))
                text = writer.spell(prompt, ids)
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character
                    out.print(text[shown:], end="", markup=False, highlight=False, soft_wrap=True)
                    shown = len(text)
    finally:
        out.print(writer.spell(prompt, ids)[shown:] if ids else "", markup=False, highlight=False, soft_wrap=True)


def _parted(
    names: Sequence[str],
    models: Mapping[str, Any],
    request: Any,
    given: Sequence[str],
    written: Mapping[str, Any],
    ask: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Say where two backends part, and by what margin each preferred its own token."""
    from twinformer.runs import backends
    from twinformer.runs.writing import partings

    def logprobs(backend: str, row: int, ids: Sequence[int]) -> Any:
        return backends.next_logprobs(backend, models[backend], request.prompts, request.arguments, row, ids)

    found = []
    for part in partings({name: written[name] for name in names}, logprobs):
        chosen = ", ".join(f"{name} {part.tokens[name]} (by {part.margins[name]:+.3g} nats)" for name in names)
        err.print(f"prompt {part.row}: the two part at token {part.place}: {chosen}", markup=False, highlight=False)
        found.append(
            {"prompt": part.row, "place": part.place, "tokens": dict(part.tokens), "margins": dict(part.margins)}
        )
    if not found:
        largest = float(abs(written[names[0]].logprobs - written[names[1]].logprobs).max())
        err.print(
            f"both backends wrote the same {int(written[names[0]].lengths.sum())} tokens for {len(given)} prompts; "
            f"log-probabilities differ by at most {largest:.2g}",
            markup=False,
            highlight=False,
        )
    return found


def _as_json(given: Sequence[str], written: Mapping[str, Any], parted: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {
        name: [
            {
                "tokens": found.tokens[b, :n].tolist(),
                "logprobs": found.logprobs[b, :n].tolist(),
                "finished": bool(found.finished[b]),
            }
            for b, n in enumerate(found.lengths.tolist())
        ]
        for name, found in written.items()
    }
    return {"prompts": list(given), "written": rows, "partings": parted}
