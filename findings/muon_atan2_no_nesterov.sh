#!/usr/bin/env bash
# MuonAdamAtan2 of adam-atan2-pytorch beside torch.optim.Muon, both with their ordinary momentum of 0.95.
#
# One would guess: the same direction at each step, as Muon comes with Nesterov momentum (torch's default, too).
#
# What happens: the first update agrees, the later ones do not. The sequence is that of torch's Muon with
# nesterov=False and adjust_lr_fn="match_rms_adamw", in direction and in size.
#
# Versions: adam-atan2-pytorch==0.4.1, torch==2.13.0; seen with Python 3.11.
#
# Output seen:
#   torch, nesterov=True   cosine ['1.00', '0.94', '0.92', '0.93']
#   torch, nesterov=False  cosine ['1.00', '1.00', '1.00', '1.00']
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
source venv/bin/activate
python -m pip install --quiet --disable-pip-version-check adam-atan2-pytorch==0.4.1 torch==2.13.0
python - <<'PY'
import torch
from adam_atan2_pytorch import MuonAdamAtan2

torch.manual_seed(0)
grads = [torch.randn(48, 16) for _ in range(4)]


def updates(make):
    p = torch.nn.Parameter(torch.zeros(48, 16))
    optimizer, moves = make(p), []
    for grad in grads:
        before, p.grad = p.detach().clone(), grad.clone()
        optimizer.step()
        moves.append(p.detach() - before)
    return moves


def torch_muon(nesterov):
    return lambda p: torch.optim.Muon(
        [p], lr=0.02, momentum=0.95, weight_decay=0.0, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )


theirs = updates(lambda p: MuonAdamAtan2(muon_params=[p], params=[], lr=0.02))
cosines, ratios = {}, {}
for nesterov in (True, False):
    ours = updates(torch_muon(nesterov))
    cosines[nesterov] = [torch.cosine_similarity(a.flatten(), b.flatten(), 0).item() for a, b in zip(ours, theirs)]
    ratios[nesterov] = [(b.norm() / a.norm()).item() for a, b in zip(ours, theirs)]
    print(f"torch, nesterov={nesterov!s:5s}  cosine", ["%.2f" % c for c in cosines[nesterov]])
assert min(cosines[False]) > 0.995 and all(abs(r - 1) < 0.02 for r in ratios[False])
assert cosines[True][0] > 0.995 and max(cosines[True][1:]) < 0.96
PY
