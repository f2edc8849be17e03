"""A chat model: answers are scored after its chat template, or generated from the average."""

from transformers import AutoTokenizer

import tfb
from tfb.demo import digits

# Yours has a template. The demo's model reads an image and "=", so that is its template here.
tokenizer = AutoTokenizer.from_pretrained(digits.BASE)
tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}\n="


def chats(split):
    """Return a chat and its answer for each image."""
    for row in digits.rows(split):
        content = row["prompt"].removesuffix("\n=")
        yield {"messages": [{"role": "user", "content": content}], "label": row["label"]}


m = tfb.from_pretrained(
    digits.ADAPTER, base=digits.BASE, tokenizer=tokenizer, labels=digits.CHOICES
)
fit = m.fit(chats("anchor"), draws=4)
test = list(chats("test"))[:100]
df = m.score(test)
print(df[["choice", "total", "epistemic"]].head())

written = m.score(test[:5], generate=True, max_new_tokens=1)
print(written[["text", "finish_reason", "sequence_uncertainty"]])
