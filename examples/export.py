"""Draws as ordinary LoRA adapters, for a server that knows LoRA and nothing of TFB."""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tfb
from tfb.demo import digits

m = tfb.from_pretrained(digits.ADAPTER, base=digits.BASE)
fit = m.fit(digits.rows("anchor"), draws=4)  # half of the default: quick
folder = tfb.export(m.bayes, Path(tempfile.mkdtemp()) / "draws", draws=4)

# A server sends a request to each adapter and averages the probabilities, never the logits.
prompt = digits.rows("test")[0]["prompt"]
batch = m.tokenizer(prompt, return_tensors="pt")
answers = m.tokenizer.convert_tokens_to_ids(list(digits.CHOICES))
average = torch.zeros(10)
for draw in sorted(folder.glob("draw-*")):
    base = AutoModelForCausalLM.from_pretrained(digits.BASE)
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, draw)(**batch).logits[0, -1, answers]
    average += (logits / fit.temperature).softmax(-1) / 4

ours = m.predict([prompt], draws=4, choices=digits.CHOICES).probs[0]
print(f"largest difference from tfb: {float((average - ours).abs().max()):.1e}")
