"""Make the embedded demo's assets: a small Llama and a LoRA adapter that over-fits. Seeded, CPU.

    python tools/train_demo.py [--out tfb/demo/assets] [--only-adapter]

Base model (`base/`). A Llama trained from scratch on the 700 `pretrain` digits, each time moved by
up to one pixel: it predicts every next pixel (an ordinary language model over images) and, at the
last position, one of two coarse questions about the digit ("odd or even?", "below five or not?").
It never sees the answer mark "=" nor a digit's name, and none of the demo's other digits.

Adapter (`adapter/`). A PEFT LoRA (r=8, alpha=16, every linear of the decoder) fitted to the 150
`train` rows with the language-model loss on the answer token alone, over the whole vocabulary,
without augmentation, dropout or early stopping, until long after every training row is right. So
it memorizes, as adapters of large models fitted to small data sets do: train accuracy 100 %, lower
accuracy on held-out digits, and too much confidence there. The number of steps and the learning
rate were set before any Bayesian run, from accuracy and confidence of the plain adapter only.

The run prints accuracy and ECE of the result. Values repeat on one machine and thread count;
another CPU may round otherwise and give a slightly different adapter, which is why the assets are
committed.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tfb.demo import digits
from tfb.evaluation.metrics import Metrics, evaluate

SEED = 0
QUESTIONS = ("parity", "size", "rest", "ink")
PARITY, SIZE, REST = ("even", "odd"), ("small", "large"), ("none", "one", "two")
SPECIAL = ("<pad>", "<bos>", "<unk>")
VOCABULARY = (
    *SPECIAL,
    *digits.PIXEL_TOKENS,
    digits.ANSWER_TOKEN,
    *digits.CHOICES,
    *QUESTIONS,
    *PARITY,
    *SIZE,
    *REST,
)
TOKEN_ID = {token: index for index, token in enumerate(VOCABULARY)}

BASE_STEPS, BASE_BATCH, BASE_RATE = 2000, 64, 2e-3
BASE_DEGREES, BASE_NOISE = 10.0, 0.3
INK_LOW, INK_STEP = 256, 12
ADAPTER_STEPS, ADAPTER_BATCH, ADAPTER_RATE = 500, 25, 3e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a word and "<bos>" in front.

    "...=3" and "...= 3" both end in the token "3".
    """
    core = Tokenizer(models.WordLevel(TOKEN_ID, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", TOKEN_ID["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=128,
    )


def make_base() -> LlamaForCausalLM:
    """Return the untrained base model, about 200 thousand parameters in float32."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=TOKEN_ID["<bos>"],
            pad_token_id=TOKEN_ID["<pad>"],
            eos_token_id=None,
        )
    )


def pixel_ids(images: np.ndarray) -> torch.Tensor:
    """Return ids of "<bos>" and the pixels: images int [N, 8, 8] -> int64 [N, 65]."""
    flat = torch.from_numpy(images.reshape(len(images), -1)) + TOKEN_ID[digits.PIXEL_TOKENS[0]]
    return torch.cat([torch.full((len(flat), 1), TOKEN_ID["<bos>"]), flat], dim=1)


def answer_ids(images: np.ndarray) -> torch.Tensor:
    """Return token ids of the demo's prompts, as the tokenizer gives them: int64 [N, 66]."""
    pixels = pixel_ids(images)
    mark = torch.full((len(pixels), 1), TOKEN_ID[digits.ANSWER_TOKEN])
    return torch.cat([pixels, mark], dim=1)


def augmented(images: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Turn images by up to BASE_DEGREES, add a little noise, move them by up to one pixel."""
    turned = digits.rotate(images, random.uniform(-BASE_DEGREES, BASE_DEGREES, len(images)))
    noisy = np.rint(turned + random.standard_normal(images.shape) * BASE_NOISE)
    whole = np.clip(noisy, 0, digits.LEVELS - 1).astype(np.int64)
    padded = np.pad(whole, ((0, 0), (1, 1), (1, 1)))
    offsets = random.randint(0, 3, size=(len(images), 2))
    return np.stack(
        [
            image[top : top + digits.SIDE, left : left + digits.SIDE]
            for image, (top, left) in zip(padded, offsets, strict=True)
        ]
    )


def question_ids(
    images: np.ndarray, labels: np.ndarray, random: np.random.RandomState
) -> torch.Tensor:
    """Return the four questions in random order, each with its answer after it: int64 [N, 8]."""
    tails = []
    for image, label in zip(images, labels.tolist(), strict=True):
        ink = (int(image.sum()) - INK_LOW) // INK_STEP
        answers = {
            "parity": PARITY[label % 2],
            "size": SIZE[label // 5],
            "rest": REST[label % 3],
            "ink": digits.CHOICES[min(max(ink, 0), 9)],
        }
        order = random.permutation(len(QUESTIONS))
        words = [word for i in order for word in (QUESTIONS[i], answers[QUESTIONS[i]])]
        tails.append([TOKEN_ID[word] for word in words])
    return torch.tensor(tails)


def one_cycle(
    optimizer: torch.optim.Optimizer, rate: float, steps: int
) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.1
    )


def train_base(model: LlamaForCausalLM) -> None:
    """Fit the base model to the pretrain split, in place."""
    random = np.random.RandomState(SEED)
    data = digits.digits("pretrain")
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, weight_decay=0.05)
    schedule = one_cycle(optimizer, BASE_RATE, BASE_STEPS)
    model.train()
    for step in range(BASE_STEPS):
        chosen = random.randint(len(data.labels), size=BASE_BATCH)
        images = augmented(data.images[chosen], random)
        tail = question_ids(images, data.labels[chosen], random)
        ids = torch.cat([pixel_ids(images), tail], dim=1)
        logits = model(input_ids=ids).logits
        pixels = functional.cross_entropy(logits[:, :64].flatten(0, 1), ids[:, 1:65].flatten())
        asked, answers = logits[:, 65::2], ids[:, 66::2]
        answer = functional.cross_entropy(asked.flatten(0, 1), answers.flatten())
        loss = pixels + answer
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"base {step + 1:5d}: pixels {pixels:.3f}, answer {answer:.3f}", flush=True)
    model.eval()


def train_adapter(model: PeftModel) -> None:
    """Over-fit the adapter to the train split, in place."""
    random = np.random.RandomState(SEED + 1)
    data = digits.digits("train")
    ids = answer_ids(data.images)
    targets = torch.from_numpy(data.labels) + TOKEN_ID[digits.CHOICES[0]]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=ADAPTER_RATE, weight_decay=0.0)
    schedule = one_cycle(optimizer, ADAPTER_RATE, ADAPTER_STEPS)
    model.train()
    order = np.empty(0, dtype=np.int64)
    for step in range(ADAPTER_STEPS):
        if len(order) < ADAPTER_BATCH:
            order = random.permutation(len(ids))
        chosen, order = order[:ADAPTER_BATCH], order[ADAPTER_BATCH:]
        logits = model(input_ids=ids[chosen], logits_to_keep=1).logits[:, -1]
        loss = functional.cross_entropy(logits, targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"adapter {step + 1:4d}: loss {loss:.5f}", flush=True)
    model.eval()


@torch.no_grad()
def probabilities(model: torch.nn.Module, images: np.ndarray) -> torch.Tensor:
    """Return the probability of each digit, softmax over the ten label columns: float32 [N, 10]."""
    first = TOKEN_ID[digits.CHOICES[0]]
    logits = model(input_ids=answer_ids(images), logits_to_keep=1).logits[:, -1]
    return logits[:, first : first + 10].softmax(dim=-1)


def measure(model: torch.nn.Module) -> dict[str, Metrics]:
    """Measure the plain model on the demo's splits."""
    found = {}
    for name in ("train", "anchor", "test", "shifted"):
        data = digits.digits(name)
        found[name] = evaluate(probabilities(model, data.images), torch.from_numpy(data.labels))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=digits.ASSETS)
    parser.add_argument("--only-adapter", action="store_true", help="keep the base that is there")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    base_folder, adapter_folder = arguments.out / "base", arguments.out / "adapter"
    started = time.perf_counter()
    if arguments.only_adapter:
        model = LlamaForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    else:
        model = make_base()
        print(
            f"{sum(w.numel() for w in model.parameters()):,} parameters, "
            f"vocabulary {len(VOCABULARY)}"
        )
        train_base(model)
        shutil.rmtree(base_folder, ignore_errors=True)
        model.save_pretrained(base_folder)
        make_tokenizer().save_pretrained(base_folder)
    print(f"base: {time.perf_counter() - started:.0f} s")
    torch.manual_seed(SEED + 1)
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    peft_model = get_peft_model(model, config)
    train_adapter(peft_model)
    for name, m in measure(peft_model).items():
        print(f"{name:8s} {m.rows:4d} rows: accuracy {m.accuracy:.2%}, ECE {m.ece:.2%}")
    print(f"all: {time.perf_counter() - started:.0f} s")
    shutil.rmtree(adapter_folder, ignore_errors=True)
    peft_model.save_pretrained(adapter_folder)


if __name__ == "__main__":
    main()
