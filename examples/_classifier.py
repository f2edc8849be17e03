"""A stand-in for your classifier: the demo's adapter, its ten answers as a head."""

from tempfile import mkdtemp

import pandas as pd
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tfb.demo import digits

LABELS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def classifier() -> str:
    """Return a folder with adapter/, dev.csv, calibration.csv and test.csv; nothing is trained."""
    folder = mkdtemp()
    config = LoraConfig.from_pretrained(digits.ADAPTER)
    config.task_type, config.base_model_name_or_path = "SEQ_CLS", str(digits.BASE)
    config.save_pretrained(f"{folder}/adapter")
    answers = AutoTokenizer.from_pretrained(digits.BASE).convert_tokens_to_ids([*digits.CHOICES])
    rows = load_file(digits.BASE / "model.safetensors")["lm_head.weight"]
    tensors = load_file(digits.ADAPTER / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"] = rows[answers]
    save_file(tensors, f"{folder}/adapter/adapter_model.safetensors")
    dev, rest = digits.rows("anchor"), digits.rows("test")
    for name, part in {"dev": dev, "calibration": rest[:400], "test": rest[400:]}.items():
        table = [{"sentence": row["prompt"], "class": LABELS[row["label"]]} for row in part]
        pd.DataFrame(table).to_csv(f"{folder}/{name}.csv", index=False)
    return folder
