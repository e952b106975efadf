#!/usr/bin/env bash
# A causal Decoder of x-transformers with one of its options for the residual stream or the values.
#
# One would guess: no option lets a position read later tokens. A Decoder is causal.
#
# What happens: three options do. orthog_residual and attn_orthog_projected_values project on the whole sequence
# taken as one vector, not position by position; mv_split_residual subtracts the mean over the sequence. Changing
# the last four tokens changes the logits of the first eight, and the gradient of these reaches the states of the
# last four.
#
# Versions: x-transformers==2.31.10, torch==2.13.0; seen with Python 3.11.
#
# Output seen:
#   plain                         logits 0-7 change: False  gradient at 8-11: False
#   use_rmsnorm                   logits 0-7 change: False  gradient at 8-11: False
#   orthog_residual               logits 0-7 change: True   gradient at 8-11: True
#   mv_split_residual             logits 0-7 change: True   gradient at 8-11: True
#   attn_orthog_projected_values  logits 0-7 change: True   gradient at 8-11: True
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
source venv/bin/activate
python -m pip install --quiet --disable-pip-version-check x-transformers==2.31.10 torch==2.13.0
python - <<'PY'
import torch
from x_transformers import Decoder, TransformerWrapper

torch.manual_seed(0)
tokens = torch.randint(0, 16, (1, 12))
other = tokens.clone()
other[:, 8:] = (other[:, 8:] + 1) % 16  # the same first 8 tokens, another end

seen = {}
for option in (None, "use_rmsnorm", "orthog_residual", "mv_split_residual", "attn_orthog_projected_values"):
    torch.manual_seed(1)
    layers = Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, **({option: True} if option else {}))
    model = TransformerWrapper(num_tokens=16, max_seq_len=32, attn_layers=layers).eval()
    states = []  # the token embeddings, as a leaf, to ask for their gradient

    def leaf(module, args, out):
        states.append(out.detach().requires_grad_())
        return states[-1]

    handle = model.token_emb.register_forward_hook(leaf)
    out = model(tokens)
    handle.remove()
    change = (model(other) - out)[:, :8].abs().max().item()
    (grad,) = torch.autograd.grad(out[:, :8].square().sum(), states[0])
    ahead = grad[:, 8:].abs().max().item()
    seen[option] = change > 1e-4, ahead > 1e-4
    print(f"{option or 'plain':29s} logits 0-7 change: {seen[option][0]!s:6s} gradient at 8-11: {seen[option][1]}")

assert seen[None] == seen["use_rmsnorm"] == (False, False)
for option in ("orthog_residual", "mv_split_residual", "attn_orthog_projected_values"):
    assert seen[option] == (True, True), option
PY
