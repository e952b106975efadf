#!/usr/bin/env bash
# KFAC of curvlinops for a language model whose head shares its weight with the embedding.
#
# One would guess: an error, as for any embedding, or a block that counts both uses of the weight.
#
# What happens: no error. With two separate weights the embedding is refused. With one shared weight the model is
# accepted, and the block of the weight is that of the head alone: its use in the embedding is left out. The exact
# GGN of the same package counts both, and here the part left out is larger than the part kept.
#
# Versions: curvlinops-for-pytorch==3.0.1, torch==2.13.0; seen with Python 3.11.
#
# Output seen:
#   untied, all parameters: Found parameters in un-supported layers.
#   tied, all parameters:   accepted
#   its block for the shared weight is the untied head's alone: True
#   exact GGN, trace: head 0.9, embedding 1.1, shared weight 2.0
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
source venv/bin/activate
python -m pip install --quiet --disable-pip-version-check curvlinops-for-pytorch==3.0.1 torch==2.13.0
python - <<'PY'
import curvlinops
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.wte = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens):
        return self.head(self.hidden(self.wte(tokens)).tanh()).flatten(0, 1)


torch.manual_seed(0)
tied, untied = Model(True), Model(False)
untied.load_state_dict(tied.state_dict())  # the same numbers, two parameters
data = [(torch.randint(0, 11, (4, 5)), torch.randint(0, 11, (20,)))]
loss = nn.CrossEntropyLoss()


def dense(operator, model, params, **options):
    matrix = operator(model, loss, params, data, **options) @ torch.eye(sum(p.numel() for p in params))
    return torch.as_tensor(matrix)


def kfac(model, params):
    return dense(curvlinops.KFACLinearOperator, model, params, fisher_type="type-2")


try:
    kfac(untied, list(untied.parameters()))
    raise SystemExit("KFAC accepted the embedding")
except NotImplementedError as error:
    print("untied, all parameters:", error)

head_alone = kfac(untied, [untied.head.weight])
shared = kfac(tied, list(tied.parameters()))[:66, :66]  # the first parameter, 11 x 6
print("tied, all parameters:   accepted")
print("its block for the shared weight is the untied head's alone:", torch.allclose(shared, head_alone, atol=1e-6))
ggn = curvlinops.GGNLinearOperator
parts = [dense(ggn, untied, [p]).trace().item() for p in (untied.head.weight, untied.wte.weight)]
whole = dense(ggn, tied, [tied.wte.weight]).trace().item()
print("exact GGN, trace: head %.1f, embedding %.1f, shared weight %.1f" % (*parts, whole))
assert torch.allclose(shared, head_alone, atol=1e-6)
assert parts[1] > 0.5 * parts[0] and whole > 1.5 * parts[0]
PY
