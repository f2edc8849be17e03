"""transformers' pipeline over a TFB model: its scores are averaged over posterior draws."""

from _classifier import LABELS, classifier
from transformers import pipeline

import tfb
from tfb.demo import digits

folder = classifier()
m = tfb.from_pretrained(f"{folder}/adapter", labels=LABELS)
fit = m.fit(f"{folder}/dev.csv", text="sentence", label="class", draws=4)

classify = pipeline("text-classification", model=m, tokenizer=m.tokenizer, top_k=None)
texts = [row["prompt"] for row in digits.rows("test")[:4]]
scores = [[c["score"] for c in result] for result in classify(texts)]
probs = m.predict(texts).probs.sort(descending=True).values
print("pipeline:", [round(row[0], 3) for row in scores])
print("predict: ", [round(float(row[0]), 3) for row in probs])
