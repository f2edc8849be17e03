"""From a finished adapter to calibrated probabilities, on the embedded model of `tfb demo`."""

import tempfile
from pathlib import Path

import tfb
from tfb.demo import digits

m = tfb.from_pretrained(digits.ADAPTER, base=digits.BASE)  # yours: a folder or hub name
fit = m.fit(digits.rows("anchor"))  # yours: "dev.csv", a DataFrame, a Dataset, a list of dicts
print(fit)

test = digits.rows("test")[:200]  # rows that the fit did not see
evidence = m.evaluate(test)
print(evidence)

df = m.score(test)
print(df[["id", "choice", "total", "epistemic"]].head())

artifact = m.save_pretrained(Path(tempfile.mkdtemp()) / "artifact")
again = tfb.from_pretrained(artifact)
print(again)
