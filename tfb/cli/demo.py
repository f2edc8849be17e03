"""``tfb demo``: a small Llama that reads handwritten digits, with an over-fitted LoRA adapter.

Needs no network. The tables are of digits that no fit saw, as they are and shifted.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tfb.cli.console import (
    Draws,
    check_place,
    evaluated,
    out,
    print_curve,
    print_metrics,
    progress_bar,
    quiet,
    say,
)

if TYPE_CHECKING:
    from tfb.evaluation.metrics import Evaluation

FOLDER = Path("demo_out")


def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PAGE",
            help=f"the page: a new .html file, or a folder for it; default: {FOLDER}",
        ),
    ] = None,
    draws: Draws = 10,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Go the whole way on an embedded model: fit sigma, compare, write the report.

    [bold]Examples[/]

    tfb demo
    tfb demo -o digits.html --draws 20
    """
    from dataclasses import replace

    import tfb
    from tfb.adapters.artifact import file_sha256, sidecar_of
    from tfb.adapters.loading import WEIGHTS, check_device, load_tokenizer, to_device
    from tfb.data.readers import read_rows
    from tfb.demo import digits
    from tfb.draws import check_even
    from tfb.evaluation.report import facts, page_path, write_report
    from tfb.scoring.evaluate import encode, evaluations

    quiet()
    check_device(device)
    check_even(draws)
    started, replaced = time.perf_counter(), output is None
    page = page_path(output or FOLDER, overwrite=replaced)
    check_place("--output", page)
    tokenizer = load_tokenizer(str(digits.BASE))
    base = tfb.load_base(digits.BASE, digits.ADAPTER)
    bayes = tfb.bayesianize(tfb.load_adapter(base, digits.ADAPTER))
    to_device(bayes.model, device)
    anchors = encode(bayes, digits.rows("anchor"), tokenizer)
    say(
        f"A small Llama ({sum(p.numel() for p in bayes.base.parameters()):,} parameters) reads "
        f"8x8 digits as text; its LoRA adapter ({len(bayes.posteriors)} layers) was over-fitted on "
        f"{digits.SIZES['train']} of them.\nSearching sigma and T on {len(anchors)} anchors:"
    )
    scaled = tfb.fit_sigma(bayes, anchors, sigma=0.0)
    with progress_bar("searching sigma (max_variance)") as bar:
        paper = tfb.fit_sigma(bayes, anchors, objective="max_variance", progress=bar.advance)
    with progress_bar("searching sigma and T") as bar:
        fit = tfb.fit_sigma(bayes, anchors, progress=bar.advance)
    print_curve(fit)
    say(str(fit))
    say(f"a temperature alone (sigma 0): {scaled.temperature:.4g}")
    say(f"sigma by the paper's rule (objective max_variance): {paper.sigma:.6g}")
    configs = {
        "tfb": fit.config,
        "temperature alone": scaled.config,
        "tfb, max_variance": paper.config,
    }
    found: list[Evaluation] = []
    for split in ("test", "shifted"):
        rows = read_rows(digits.rows(split))
        with progress_bar(split, evaluated(configs) * len(rows)) as bar:
            measured = evaluations(
                bayes,
                encode(bayes, rows, tokenizer),
                dataset=split,
                draws=draws,
                batch_size=50,
                configs=configs,
                progress=bar.advance,
            )
        found += [replace(e, rows=rows) for e in measured]  # the report compares the first two
    print_metrics(found)
    print_changes(found)
    made = sidecar_of(bayes, fit) | {"files": {WEIGHTS: file_sha256(digits.ADAPTER / WEIGHTS)}}
    page = write_report(
        page,
        found,
        fit.to_dict(),
        title="Digits: an over-fitted adapter",
        ood=[e for e in found if e.dataset == "shifted"],
        facts=facts(made, draws),
        overwrite=replaced,
    )
    say(f"report: {page}  ({time.perf_counter() - started:.0f} s in all)")


def print_changes(found: list[Evaluation]) -> None:
    """Print what each method changed of the first of its data set, with 95 % intervals."""
    from tfb.evaluation.compare import compare_all

    table = Table(title="change, 95 % interval (*: it excludes 0)")
    for heading in ("data", "method", "accuracy %", "NLL", "ECE %", "AURC %"):
        table.add_column(heading)
    for e, changes in zip(found, compare_all(found), strict=True):
        if e.name == found[0].name:  # the adapter, which others are compared with
            continue
        cells = []
        for name, factor in (("accuracy", 100), ("nll", 1), ("ece", 100), ("aurc", 100)):
            c = changes[name]
            cells.append(
                f"{factor * c.change:+.3g}{' *' if c.significant else ''}\n"
                f"{factor * c.low:+.3g} to {factor * c.high:+.3g}"
            )
        table.add_row(e.dataset, e.name, *cells)
    out.print(table)
