#!/usr/bin/env bash
# Activation patching: a forward hook replaces the output of one block, and output_hidden_states=True reports the
# states.
#
# One would guess: hidden_states shows the patched state, always. It is the state the next block reads.
#
# What happens: it depends on what the model was asked before. The states are recorded by forward hooks on the
# blocks. These are put in by the first call with output_hidden_states=True, and stay. Hooks run in the order of
# registration. A patch registered before that call comes first: hidden_states shows it. A patch registered after
# comes second: hidden_states shows the state without the patch, though logits and later blocks feel the patch.
# prepend=True puts the patch first in either case. (A usual order of work, first a clean run with states, then a
# patched one, meets the second case.)
#
# Versions: transformers==5.24.0, torch==2.13.0; seen with Python 3.11, needs it or newer.
#
# Output seen:
#   logits of both patched runs are equal: True
#   hidden_states[2] shows the patch
#     states never asked for before:   True
#     asked for once before:           False
#     asked before, hook prepended:    True
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
source venv/bin/activate
python -m pip install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0
python - <<'PY'
import torch
from transformers import GPT2Config, GPT2LMHeadModel

tokens = torch.arange(8)[None]


def patched_run(asked_before, prepend=False):
    """Zero the output of block 1 with a forward hook. What does hidden_states[2] show?"""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        clean = model(tokens, output_hidden_states=asked_before).logits
        handle = model.transformer.h[1].register_forward_hook(
            lambda module, args, out: torch.zeros_like(out), prepend=prepend
        )
        run = model(tokens, output_hidden_states=True)
        handle.remove()
    assert not torch.allclose(clean, run.logits), "the patch must reach the logits"
    return run.logits, bool((run.hidden_states[2] == 0).all())


fresh_logits, fresh = patched_run(asked_before=False)
used_logits, used = patched_run(asked_before=True)
_, used_prepend = patched_run(asked_before=True, prepend=True)
print("logits of both patched runs are equal:", torch.equal(fresh_logits, used_logits))
print("hidden_states[2] shows the patch")
print("  states never asked for before:  ", fresh)
print("  asked for once before:          ", used)
print("  asked before, hook prepended:   ", used_prepend)
assert torch.equal(fresh_logits, used_logits)
assert fresh and not used and used_prepend
PY
