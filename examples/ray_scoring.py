"""Many rows on several GPUs or machines: Ray's workers score, part files and a manifest remain."""

import tempfile
from pathlib import Path

import pandas as pd

import tfb
from tfb.demo import digits
from tfb.scoring.job import Job
from tfb.scoring.run import run

folder = Path(tempfile.mkdtemp())
m = tfb.from_pretrained(digits.ADAPTER, base=digits.BASE)
fit = m.fit(digits.rows("anchor"), draws=4)  # half of the default: quick
m.save_pretrained(folder / "artifact")
pd.DataFrame(digits.rows("test")).to_parquet(folder / "rows.parquet")

# As "tfb score ARTIFACT rows.parquet -o scored --engine ray"; ray_address= names a cluster.
job = Job(
    artifact=str(folder / "artifact"),
    inputs=(str(folder / "rows.parquet"),),
    output=str(folder / "scored"),
    part_rows=256,
)
outcome = run(job, engine="ray")  # the same call with resume=True goes on where it was ended
df = pd.concat(map(pd.read_parquet, sorted(folder.glob("scored/*.parquet"))))
print(outcome.status, outcome.counts)
print(df[["id", "choice", "total", "epistemic"]].head())
