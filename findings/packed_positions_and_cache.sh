#!/usr/bin/env bash
# Two texts in one row, with position_ids that start again at 0 for the second, and no attention mask. transformers
# takes this as packed texts, and lets the second text not read the first.
#
# One would guess: so it does in every full forward pass. A cache that is only filled has no say in the logits.
#
# What happens: the attention is cut only with use_cache=False. The model's own setting is to fill a cache, in
# training mode, too: then the second text reads the first, without a warning. With an attention mask of ones it
# always does. Below, True: the logits of the second text change with a token of the first.
#
# Versions: transformers==5.24.0, torch==2.13.0; seen with Python 3.11, needs it or newer.
#
# Output seen:
#   GPT-2 train {'as it comes': True, 'use_cache=True': True, 'use_cache=False': False, 'use_cache=False, ones': True}
#   GPT-2 eval {'as it comes': True, 'use_cache=True': True, 'use_cache=False': False, 'use_cache=False, ones': True}
#   Llama train {'as it comes': True, 'use_cache=True': True, 'use_cache=False': False, 'use_cache=False, ones': True}
#   Llama eval {'as it comes': True, 'use_cache=True': True, 'use_cache=False': False, 'use_cache=False, ones': True}
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
source venv/bin/activate
python -m pip install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0
python - <<'PY'
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ends = dict(vocab_size=20, bos_token_id=0, eos_token_id=0)
torch.manual_seed(0)
models = {
    "GPT-2": GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=16, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **ends)
    ),
    "Llama": LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32, **ends)
    ),
}
tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])  # two texts of four tokens
other = tokens.clone()
other[0, 1] = 7  # another first text
positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
calls = {
    "as it comes": {},
    "use_cache=True": dict(use_cache=True),
    "use_cache=False": dict(use_cache=False),
    "use_cache=False, ones": dict(use_cache=False, attention_mask=torch.ones_like(tokens)),
}
for name, model in models.items():
    for mode in ("train", "eval"):
        model.train(mode == "train")
        reads = {}
        for call, options in calls.items():
            with torch.no_grad():
                a, b = (model(t, position_ids=positions, **options).logits[:, 4:] for t in (tokens, other))
            reads[call] = (a - b).abs().max().item() > 1e-4
        print(name, mode, reads)
        assert list(reads.values()) == [True, True, False, True]
PY
