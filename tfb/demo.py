"""``tfb demo``: a small Llama that reads handwritten digits, with an over-fitted LoRA adapter.

Needs no network: model and adapter are shipped in ``tfb/demo_assets``, the digits come with
scikit-learn. sigma and the temperature are fitted on the same held-out anchors; the table is over
digits that neither saw, as they are and shifted (rotated, noisy).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tfb.console import out, print_fit, print_metrics, progress_bar

ASSETS = Path(__file__).parent / "demo_assets"


def run(folder: Path | None, *, draws: int) -> None:
    """Fit, evaluate, draw. ``folder``: where the report goes (default ``demo_out``, replaced)."""
    import torch

    import tfb
    from tfb import digits
    from tfb.draws import Draws
    from tfb.metrics import fit_temperature
    from tfb.report import check_report_folder, write_report
    from tfb.rows import Row
    from tfb.scoring import encode, evaluations, load_tokenizer, pad_token, predict_rows

    started = time.perf_counter()
    replace = folder is None
    folder = check_report_folder("demo_out" if folder is None else folder, overwrite=replace)
    base, adapter = ASSETS / "base", ASSETS / "adapter"
    tokenizer = load_tokenizer(str(base))
    bayes = tfb.bayesianize(tfb.load_adapter(tfb.load_base(base, adapter), adapter))
    pad = pad_token(bayes, tokenizer)

    def rows(split: str) -> Any:
        return encode(
            bayes,
            [
                Row(
                    id=r["id"], prompt=r["prompt"], choices=tuple(r["choices"]), label=r["label"],
                    source=r["id"],
                )
                for r in digits.rows(split)
            ],
            tokenizer,
        )  # fmt: skip

    anchors = rows("anchor")
    out.print(
        f"A small Llama ({sum(p.numel() for p in bayes.base.parameters()):,} parameters) reads "
        f"8x8 digits as text; its LoRA adapter ({len(bayes.posteriors)} layers) was over-fitted on "
        f"{digits.SIZES['train']} of them.\nSearching sigma on {len(anchors)} held-out anchors:",
        soft_wrap=True,
    )
    with progress_bar("searching sigma", None) as advance:
        fit = tfb.fit_sigma(bayes, anchors, objective="max_variance", progress=advance)
    print_fit(fit)
    mean = predict_rows(bayes, anchors, Draws.mean(), pad_token_id=pad)
    labels = torch.tensor(anchors.labels)
    temperature = fit_temperature(mean.probs.clamp_min(1e-30).log(), labels)
    out.print(f"temperature fitted on the same anchors: {temperature:.3f}")
    with progress_bar("searching sigma (min_nll)", None) as advance:
        held_out = tfb.fit_sigma(bayes, anchors, objective="min_nll", progress=advance)
    out.print(f"sigma of least anchor NLL (objective min_nll): {held_out.sigma:.6g}")
    sigmas = {"tfb max_variance": fit.sigma, "tfb min_nll": held_out.sigma}
    found = []
    for split in ("test", "shifted"):
        encoded = rows(split)
        with progress_bar(split, 3 * len(encoded)) as advance:
            found += evaluations(
                bayes, encoded, dataset=split, draws=draws, batch_size=50, pad=pad,
                temperature=temperature, sigmas=sigmas, progress=advance,
            )  # fmt: skip
    print_metrics(found)
    verdicts = verdict(found)
    for line in verdicts:
        out.print(line, soft_wrap=True)
    page = write_report(
        folder, found, fit.to_dict(), title="Digits: an over-fitted adapter", notes=verdicts,
        commands=["tfb demo"], overwrite=replace,
    )  # fmt: skip
    out.print(f"pictures and page: {page}  ({time.perf_counter() - started:.0f} s in all)")


def verdict(found: list[Any]) -> list[str]:
    """What happened, in words, also where TFB does not help."""
    labels = {"nll": "NLL", "ece": "ECE", "brier": "Brier"}
    lines = []
    for dataset in dict.fromkeys(e.dataset for e in found):
        m = {e.name: e.metrics for e in found if e.dataset == dataset}
        plain = m["deterministic"]
        for name in (n for n in m if n.startswith("tfb")):
            helped = [k for k in labels if getattr(m[name], k) < getattr(plain, k)]
            hurt = [k for k in labels if getattr(m[name], k) > getattr(plain, k)]
            parts = [
                f"{word} {', '.join(labels[k] for k in keys)}"
                for word, keys in (("improves", helped), ("worsens", hurt))
                if keys
            ] or ["changes nothing"]
            lines.append(f"{dataset}: {name} {' and '.join(parts)} against the plain adapter.")
        best = {k: min(m, key=lambda n: getattr(m[n], k)) for k in ("nll", "ece")}
        lines.append(f"{dataset}: lowest NLL {best['nll']}, lowest ECE {best['ece']}.")
    return lines
