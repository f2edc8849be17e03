"""A model of your own, without PEFT: BayesLoRALinear in the place of the adapted layer."""

import torch
from torch.nn import Linear, Sequential, Tanh
from torch.nn.functional import cross_entropy, nll_loss

import tfb

torch.manual_seed(0)
x = torch.randn(600, 2)
y = (x.prod(1) + 0.5 * torch.randn(600) > 0).long()  # noisy exclusive or
net = Sequential(Linear(2, 64), Tanh(), Linear(64, 64), Tanh(), Linear(64, 2)).requires_grad_(False)
A, B = (torch.randn(4, 64) / 8).requires_grad_(), torch.zeros(64, 4, requires_grad=True)
adam = torch.optim.Adam([A, B], lr=0.02)
for _ in range(300):  # LoRA by hand, on 100 rows
    adam.zero_grad()
    logits = torch.func.functional_call(net, {"2.weight": net[2].weight + B @ A}, x[:100])
    cross_entropy(logits, y[:100]).backward()
    adam.step()


def loss(outputs, batch):
    """Return the loss of each row, [B], from the outputs of S draws, [S, B, 2]."""
    return nll_loss(outputs.softmax(-1).mean(0).log(), batch["labels"], reduction="none")


net[2] = tfb.BayesLoRALinear.from_weights(net[2], A, B, scaling=1.0)
bayes = tfb.bayesianize(net)
print(tfb.fit_sigma(bayes, [{"input": x[100:], "labels": y[100:]}], metric=loss))
print(bayes.predict(torch.tensor([[0.0, 0.1], [1.0, 1.0]])).epistemic)
