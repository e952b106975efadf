#!/usr/bin/env bash
# A model with a stopped gradient (to k, but not to q), through torch.export, and then differentiated.
#
# One would guess: .detach() stays, as it is an operation of the graph. A custom autograd.Function turns into the
# ordinary gradient of its forward.
#
# What happens: .detach() stays in the exported program, strict or not, but run_decompositions() takes it out: then
# the gradient passes. The Function does turn into its forward's gradient in a non-strict export. In a strict export
# no gradient is left at all, not even the one to q; run_decompositions() brings the ordinary one. The outputs agree
# in every case.
#
# Versions: torch==2.13.0; seen with Python 3.11.
#
# Output seen:
#   detach    eager               gradient to: q
#   detach    export              gradient to: q
#   detach    export, strict      gradient to: q
#   detach    export, decomposed  gradient to: q and k
#   detach    strict, decomposed  gradient to: q and k
#   Function  eager               gradient to: q
#   Function  export              gradient to: q and k
#   Function  export, strict      gradient to: none at all
#   Function  export, decomposed  gradient to: q and k
#   Function  strict, decomposed  gradient to: q and k
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
source venv/bin/activate
python -m pip install --quiet --disable-pip-version-check torch==2.13.0
python - <<'PY'
import torch
from torch import nn


class Stop(torch.autograd.Function):
    """q * k, but no gradient to k."""

    @staticmethod
    def forward(ctx, q, k):
        ctx.save_for_backward(q, k)
        return q * k

    @staticmethod
    def backward(ctx, grad):
        q, k = ctx.saved_tensors
        return grad * k, torch.zeros_like(k)


class Model(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.q, self.k = how, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        q, k = self.q(x), self.k(x)
        return Stop.apply(q, k) if self.how == "Function" else q * k.detach()


def gradient(module, x):
    """Does the gradient reach q's and k's weights?"""
    out = module(x)
    if not out.requires_grad:
        return "none at all"
    params = dict(module.named_parameters())
    found = torch.autograd.grad(out.sum(), [params["q.weight"], params["k.weight"]], allow_unused=True)
    reached = [n for n, g in zip("qk", found) if g is not None and g.abs().max() > 0]
    return " and ".join(reached)


torch.manual_seed(1)
x = torch.randn(3, 4)
seen = {}
for how in ("detach", "Function"):
    model = Model(how)
    program, strict = torch.export.export(model, (x,)), torch.export.export(model, (x,), strict=True)
    forms = {"eager": model, "export": program.module(), "export, strict": strict.module()}
    forms["export, decomposed"] = program.run_decompositions().module()
    forms["strict, decomposed"] = strict.run_decompositions().module()
    for name, module in forms.items():
        assert torch.allclose(module(x), model(x))
        seen[how, name] = gradient(module, x)
        print(f"{how:9s} {name:19s} gradient to: {seen[how, name]}")

assert [seen["detach", n] for n in ("eager", "export", "export, strict")] == ["q"] * 3
assert [seen["Function", n] for n in ("eager", "export", "export, strict")] == ["q", "q and k", "none at all"]
for how in ("detach", "Function"):
    assert seen[how, "export, decomposed"] == seen[how, "strict, decomposed"] == "q and k"
PY
