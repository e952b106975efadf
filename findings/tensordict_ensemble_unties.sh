#!/usr/bin/env bash
# An ensemble of models with tied heads, as one batch of parameters for vmap.
#
# One would guess: TensorDict.from_modules keeps one parameter for a tied pair. from_module does, for a single
# model, and so does stack_module_state of torch.func, for several.
#
# What happens: from_modules makes two. The losses agree at first. After one step of training the heads are no
# longer tied.
#
# Versions: tensordict==0.15.3, torch==2.13.0; seen with Python 3.11.
#
# Output seen:
#   tensordict, one model:  ['wte.weight']
#   tensordict, three:      ['wte.weight', 'head.weight']
#   torch.func, three:      ['wte.weight']
#   the losses agree:       True
#   tied after one step:    False
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
source venv/bin/activate
python -m pip install --quiet --disable-pip-version-check tensordict==0.15.3 torch==2.13.0
python - <<'PY'
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn
from torch.func import functional_call, stack_module_state


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.wte.weight  # tied

    def forward(self, tokens):
        return self.head(self.wte(tokens).tanh())


torch.manual_seed(0)
models = [Model() for _ in range(3)]
tokens = torch.randint(0, 11, (4, 5))
skeleton = Model()


def loss(model, *call):
    logits = functional_call(model, *call) if call else model(tokens)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


one = TensorDict.from_module(models[0], as_module=True)
print("tensordict, one model: ", [n for n, _ in one.named_parameters()])
many = TensorDict.from_modules(*models, as_module=True)
print("tensordict, three:     ", [n for n, _ in many.named_parameters()])
stacked, _ = stack_module_state(models)
print("torch.func, three:     ", list(stacked))


def member(params):
    with params.to_module(skeleton):
        return loss(skeleton)


tied_losses = torch.vmap(lambda p: loss(skeleton, p, (tokens,)))(stacked)
losses = torch.vmap(member)(many)
print("the losses agree:      ", torch.allclose(losses, tied_losses))
sgd = torch.optim.SGD(many.parameters(), lr=1.0)
losses.sum().backward()
sgd.step()
same = torch.equal(many["wte", "weight"], many["head", "weight"])
print("tied after one step:   ", same)
assert [n for n, _ in one.named_parameters()] == ["wte.weight"] == list(stacked)
assert [n for n, _ in many.named_parameters()] == ["wte.weight", "head.weight"]
assert torch.allclose(losses, tied_losses) and not same
PY
