"""A classifier with CSV files: fit, abstain where it is unsure, name the classes it may be."""

from _classifier import LABELS, classifier

import tfb

folder = classifier()  # yours has an adapter and labelled rows
m = tfb.from_pretrained(f"{folder}/adapter", labels=LABELS)
fit = m.fit(
    f"{folder}/dev.csv",
    text="sentence",  # your names of the columns
    label="class",
    calibration=f"{folder}/calibration.csv",  # rows for the next two; default: a half of dev.csv
    target_error=0.15,  # of the rows that are answered
    coverage=0.9,  # of the sets of classes
)
print(fit)
print(m.bayes.decisions)

df = m.score(f"{folder}/test.csv")
answered = df[~df["abstain"]]
print(f"{len(answered)} of {len(df)} rows are answered")
print(df[["choice", "total", "abstain", "prediction_set"]].head())
