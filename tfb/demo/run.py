"""``tfb demo``: a small Llama that reads handwritten digits, with an over-fitted LoRA adapter.

Needs no network: model and adapter are shipped in ``tfb/demo/assets``, the digits come with
scikit-learn. sigma and the temperature are fitted on the same held-out anchors; the table is over
digits that neither saw, as they are and shifted (rotated, noisy).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tfb.cli.console import out, print_fit, print_metrics, progress_bar

ASSETS = Path(__file__).parent / "assets"


def run(folder: Path | None, *, draws: int) -> None:
    """Fit, evaluate, draw. ``folder``: where the report goes (default ``demo_out``, replaced)."""
    import torch

    import tfb
    from tfb.demo import digits
    from tfb.draws import Draws
    from tfb.evaluation.findings import comparisons, named
    from tfb.evaluation.metrics import fit_temperature
    from tfb.evaluation.report import check_report_folder, write_report
    from tfb.scoring.rows import encode, evaluations, load_tokenizer, pad_token, predict_rows

    started = time.perf_counter()
    replace = folder is None
    folder = check_report_folder("demo_out" if folder is None else folder, overwrite=replace)
    base, adapter = ASSETS / "base", ASSETS / "adapter"
    tokenizer = load_tokenizer(str(base))
    bayes = tfb.bayesianize(tfb.load_adapter(tfb.load_base(base, adapter), adapter))
    pad = pad_token(bayes, tokenizer)

    def rows(split: str) -> Any:
        return encode(bayes, digits.rows(split), tokenizer)

    anchors = rows("anchor")
    out.print(
        f"A small Llama ({sum(p.numel() for p in bayes.base.parameters()):,} parameters) reads "
        f"8x8 digits as text; its LoRA adapter ({len(bayes.posteriors)} layers) was over-fitted on "
        f"{digits.SIZES['train']} of them.\nSearching sigma on {len(anchors)} held-out anchors:",
        soft_wrap=True,
    )
    with progress_bar("searching sigma", None) as advance:
        fit = tfb.fit_sigma(bayes, anchors, progress=advance)
    print_fit(fit)
    mean = predict_rows(bayes, anchors, Draws.mean(), pad_token_id=pad)
    labels = torch.tensor(anchors.labels)
    temperature = fit_temperature(mean.probs.clamp_min(1e-30).log(), labels)
    out.print(f"temperature fitted on the same anchors: {temperature:.3f}")
    with progress_bar("searching sigma (max_variance)", None) as advance:
        paper = tfb.fit_sigma(bayes, anchors, objective="max_variance", progress=advance)
    out.print(f"sigma by the paper's rule (objective max_variance): {paper.sigma:.6g}")
    sigmas = {"tfb min_nll": fit.sigma, "tfb max_variance": paper.sigma}
    found = []
    for split in ("test", "shifted"):
        encoded = rows(split)
        with progress_bar(split, 3 * len(encoded)) as advance:
            found += evaluations(
                bayes, encoded, dataset=split, draws=draws, batch_size=50, pad=pad,
                temperature=temperature, sigmas=sigmas, progress=advance,
            )  # fmt: skip
    print_metrics(found)
    for c in comparisons(found):
        out.print(named(c), soft_wrap=True)
    page = write_report(
        folder, found, fit.to_dict(), title="Digits: an over-fitted adapter",
        overwrite=replace,
    )  # fmt: skip
    out.print(f"pictures and page: {page}  ({time.perf_counter() - started:.0f} s in all)")
