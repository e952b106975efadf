#!/usr/bin/env bash
# Muon of pytorch_optimizer beside that of torch: the two make the same update. What is in .grad afterwards?
#
# One would guess: what was there before. step() reads the gradient.
#
# What happens: with Nesterov momentum, pytorch_optimizer's Muon mixes the momentum into .grad itself. After the
# first step a tenth of the gradient's norm is left. Whoever logs the norm after the step, adds further gradients to
# it, or steps twice, works with other numbers. torch's Muon leaves .grad alone. So do both without Nesterov.
#
# Versions: pytorch_optimizer==4.1.0, torch==2.13.0; seen with Python 3.11.
#
# Output seen:
#   torch              nesterov=True   norm of .grad after each step: [1.0, 1.0]
#   pytorch_optimizer  nesterov=True   norm of .grad after each step: [0.0975, 0.0546]
#   torch              nesterov=False  norm of .grad after each step: [1.0, 1.0]
#   pytorch_optimizer  nesterov=False  norm of .grad after each step: [1.0, 1.0]
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
source venv/bin/activate
python -m pip install --quiet --disable-pip-version-check pytorch_optimizer==4.1.0 torch==2.13.0
python - <<'PY'
import pytorch_optimizer
import torch

torch.manual_seed(0)
grad = torch.randn(8, 24)
options = dict(lr=0.02, momentum=0.95, weight_decay=0.0)


def steps(optimizer, p):
    """Two steps from one gradient, never zeroed: how much of its norm is left after each?"""
    p.grad = grad.clone()
    left = []
    for _ in range(2):
        optimizer.step()
        left.append(round((p.grad.norm() / grad.norm()).item(), 4))
    return left, p.detach().clone()


seen, weight = {}, {}
for nesterov in (True, False):
    p = torch.nn.Parameter(torch.zeros(8, 24))
    o = torch.optim.Muon([p], nesterov=nesterov, **options)
    seen["torch", nesterov], weight["torch", nesterov] = steps(o, p)
    p = torch.nn.Parameter(torch.zeros(8, 24))
    o = pytorch_optimizer.Muon([dict(params=[p], use_muon=True)], nesterov=nesterov, **options)
    seen["pytorch_optimizer", nesterov], weight["pytorch_optimizer", nesterov] = steps(o, p)
for (name, nesterov), left in seen.items():
    print(f"{name:18s} nesterov={nesterov!s:6s} norm of .grad after each step: {left}")
assert seen["torch", True] == seen["torch", False] == seen["pytorch_optimizer", False] == [1.0, 1.0]
first, second = seen["pytorch_optimizer", True]
assert abs(first - 0.0975) < 1e-3 and second < first
PY
