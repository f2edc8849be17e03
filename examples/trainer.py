"""Trainer.predict over a TFB model: one row of averaged logits for each row of the data set."""

import tempfile

from _classifier import LABELS, classifier
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import tfb

folder = classifier()
m = tfb.from_pretrained(f"{folder}/adapter", labels=LABELS)
fit = m.fit(f"{folder}/dev.csv", text="sentence", label="class", draws=4)

test = Dataset.from_csv(f"{folder}/test.csv", cache_dir=tempfile.mkdtemp()).select(range(64))
test = test.map(
    lambda row: m.tokenizer(row["sentence"]) | {"labels": LABELS.index(row["class"])},
    remove_columns=test.column_names,
)
arguments = TrainingArguments(tempfile.mkdtemp(), report_to="none", dataloader_pin_memory=False)
trainer = Trainer(m, arguments, processing_class=m.tokenizer)
outcome = trainer.predict(test)
accuracy = float((outcome.predictions.argmax(-1) == outcome.label_ids).mean())
print(f"{outcome.predictions.shape} logits, accuracy {accuracy:.3f}, {outcome.metrics}")
