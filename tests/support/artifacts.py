"""An artifact of the embedded digits model, made without a search."""

from __future__ import annotations

from pathlib import Path

import tfb
from tfb.demo import digits


def digits_artifact(folder: Path) -> Path:
    """At sigma = .008 and seed 3, in a new folder below ``folder``."""
    base = tfb.load_base(digits.BASE, digits.ADAPTER)
    model = tfb.load_adapter(base, digits.ADAPTER)
    bayes = tfb.bayesianize(model, seed=3, source=digits.ADAPTER)
    bayes.configure(sigma=0.008)
    return tfb.save(bayes, folder / "artifact")
