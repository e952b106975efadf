"""Does a language model plan ahead?  A GPT, and a backward pass that forbids it to.

A transformer runs the same parameters once per position. Write its gradient as a table: row i is
whose loss, column j at which position the parameters did the work.

        j =  0   1   2   3
    i = 0    #   .   .   .
    i = 1    +   #   .   .        #  position i learns to do its own job
    i = 2    +   +   #   .        +  position j learns to help a later one
    i = 3    +   +   +   #        .  nothing: the past never sees the future

Ordinary ("vanilla") training adds up # and +, myopic training only #. The forward pass is the same.
    pre-caching  = features that exist only because of the +
    breadcrumbs  = features that are useful later, but that # alone would have made
    myopia gap   = loss(myopic) - loss(vanilla): what the + were worth
Positions talk only through attention's keys and values, so the difference is in the backward pass
of one sublayer: MyopicAttention, below. One choice is left: when i reads k_j = W_K x_j, whose work
is that? In the paper the reader's, i: cut="hidden"; elsewhere the writer's, j: cut="kv". Either way
nothing goes from i to x_j: only dW_K, dW_V differ. Wu, Morris, Levine (2024), arXiv 2404.00859.

    python myopic_gpt.py --preset demo                # four arms once, in seconds
    python myopic_gpt.py                              # English, three seeds: minutes on two cores

Letters in shapes: B batch, T positions, C = n_embd channels, nh heads of size hs = C/nh, V tokens.
The gradient of the loss with respect to X is called dX and has X's shape.
"""

import argparse
import ast
import collections
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import platform
import random
import re
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

# ------------------------ configuration
# An arm of a comparison is three fields; everything else, weights and batches included, is shared.
#   horizon  None: gradients travel freely; 0: not at all; h: h positions along each attention edge,
#            n_layer * h in all, a road between the two gradients; h >= T - 1 is the same as None
#   cut      "hidden": between x_j and k_j, v_j, so W_K and W_V learn from every reader (the paper);
#            "kv": at k_j, v_j themselves, so W_K and W_V learn from their own position alone
#   past     keys and values of the past are made from the model's "own" states, from those of a
#            "frozen" trained vanilla model, or are "zero"; the last two ignore horizon and cut
ARMS = {
    "vanilla": dict(horizon=None, cut="hidden", past="own"),
    "myopic": dict(horizon=0, cut="hidden", past="own"),
    "myopic_kv": dict(horizon=0, cut="kv", past="own"),
    "local_myopic": dict(horizon=0, cut="hidden", past="frozen"),
    "bigram": dict(horizon=0, cut="hidden", past="zero"),
}


class UsageError(ValueError):
    """Bad input. The message names the value and what to do; main() prints it and exits with 2."""


def require(condition, message):
    if not condition:
        raise UsageError(message)


def arm_fields(name):
    """The three fields of an arm of ARMS or of 'horizon_<h>'. Raises UsageError for other names."""
    if name.startswith("horizon_") and name[8:].isdecimal():
        return dict(horizon=int(name[8:]), cut="hidden", past="own")
    require(name in ARMS, f"arm {name} is unknown: choose from {', '.join(ARMS)}, horizon_<h>")
    return ARMS[name]


@dataclass
class GPTConfig:
    """nanoGPT's seven fields and the arm's three: see ARMS. Raises UsageError for a bad value."""

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True
    horizon: int | None = None
    cut: str = "hidden"
    past: str = "own"

    def __post_init__(self):
        require(self.n_embd % self.n_head == 0, f"n_embd is {self.n_embd}: n_head must divide it")
        require((self.horizon or 0) >= 0, f"horizon is {self.horizon}: make it None, 0 or more")
        require(self.cut in ("hidden", "kv"), f"cut is {self.cut!r}: choose 'hidden' or 'kv'")
        require(self.past in ("own", "frozen", "zero"), f"past is {self.past!r}: see ARMS")


# ------------------------ attention, forward and backward: plain to be read, fused to be fast
#     P = softmax_causal(s q k^T)     O = P v     lse_i = log sum_{j<=i} exp(s q_i.k_j)
#     dS_ij = P_ij (G_i.v_j - G_i.O_i)            G = dO, s = 1 / sqrt(hs)
#     dq_i = s sum_j dS_ij k_j        dk_j = s sum_i dS_ij q_i        dv_j = sum_i P_ij G_i
# q, k, v, O, their gradients: (B, nh, T, hs); lse: (B, nh, T) or, on CUDA, longer; not bfloat16.


def plain_forward(q, k, v):
    q, k, wide_v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
    S = q @ k.mT / math.sqrt(q.size(-1))  # (B, nh, T, T)
    lse = (S + torch.full_like(S[0, 0], -math.inf).triu(1)).logsumexp(-1)  # (B, nh, T)
    P = (S - lse[..., None]).exp().tril()  # (B, nh, T, T)
    return (P @ wide_v).to(v.dtype), lse


def plain_backward(G, q, k, v, out, lse):
    dtype, s = q.dtype, 1 / math.sqrt(q.size(-1))
    G, q, k, v, out = (t.to(lse.dtype) for t in (G, q, k, v, out))
    P = (s * q @ k.mT - lse[..., None]).exp().tril()  # (B, nh, T, T)
    dS = P * (G @ v.mT - (G * out).sum(-1, keepdim=True))  # (B, nh, T, T)
    return (s * dS @ k).to(dtype), (s * dS.mT @ q).to(dtype), (P.mT @ G).to(dtype)


def fused_forward(q, k, v):
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, is_causal=True)[:2]


def fused_backward(G, q, k, v, out, lse):
    aten = torch.ops.aten
    if q.device.type == "cpu":
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(G, q, k, v, out, lse, dropout_p=0.0, is_causal=True)
    none = torch.empty(0, dtype=torch.int64, device=q.device)  # dropout's seed and offset
    backward = aten._scaled_dot_product_efficient_attention_backward
    return backward(G, q, k, v, None, out, lse, none, none, 0.0, [True] * 3 + [False], True)[:3]


@functools.cache
def try_fused(device, dtype, head_size):
    """Do the fused kernels run here, on views of one buffer, and agree with the plain ones?"""
    wave = torch.arange(2 * 33 * 8 * head_size, device=device).mul(0.7).sin().to(dtype)
    q, k, v, G = split_heads(wave.view(2, 33, -1), 2, parts=4)  # (2, 2, 33, hs)
    try:
        out, lse = fused_forward(q, k, v)
        got = out, lse[:, :, :33], *fused_backward(G, q, k, v, out, lse)
        G, q, k, v = (t.double() for t in (G, q, k, v))  # no TF32 rounds these
        out, lse = plain_forward(q, k, v)
        true = out, lse, *plain_backward(G, q, k, v, out, lse)
        tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2
        torch.testing.assert_close(got, true, rtol=tolerance, atol=tolerance, check_dtype=False)
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        print(f"attention: plain products serve for {dtype} on {device}: {error!r:.100}")
        return False
    return True


def kernels(q):
    """(forward, backward) for tensors like q: fused where tried and right (or when compiling)."""
    fused = torch.compiler.is_compiling() or try_fused(q.device.type, q.dtype, q.size(-1))
    return (fused_forward, fused_backward) if fused else (plain_forward, plain_backward)


def split_heads(x, n_head, parts=3):
    """(B, T, parts * C) -> `parts` tensors (B, nh, T, hs), as q, k, v: views, not copies."""
    return x.unflatten(-1, (parts, n_head, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(*heads):
    """n tensors (B, nh, T, hs) -> (B, T, nC), the inverse of split_heads; of one tensor, a view."""
    merged = [t.transpose(1, 2).flatten(2) for t in heads]  # n times (B, T, C)
    return merged[0] if len(merged) == 1 else torch.cat(merged, dim=-1)


# ------------------------ the myopic backward
def near_gradients(G, q, k, v, out, lse, horizon, first=0):
    """What the near readers want: dk_j, dv_j as above, but over first <= i - j <= horizon alone.

    One shifted diagonal per lag i - j, of P_ij = exp(s q_i.k_j - lse_i), and no (T, T) matrix:
    the cost of a lag is O(T). Shapes as above -> dk, dv (B, nh, T, hs)."""
    T, s, dtype = q.size(2), 1 / math.sqrt(q.size(-1)), q.dtype
    G, q, k, v, out = (t.to(lse.dtype) for t in (G, q, k, v, out))
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for lag in range(first, min(horizon, T - 1) + 1):
        q_i, G_i, O_i = (t[:, :, lag:] for t in (q, G, out))  # (B, nh, T - lag, hs)
        k_j, v_j = k[:, :, : T - lag], v[:, :, : T - lag]  # (B, nh, T - lag, hs)
        P = (s * (q_i * k_j).sum(-1) - lse[:, :, lag:T]).exp()  # (B, nh, T - lag)
        dS = P * (G_i * (v_j - O_i)).sum(-1)  # (B, nh, T - lag)
        dk[:, :, : T - lag].addcmul_((s * dS)[..., None], q_i)
        dv[:, :, : T - lag].addcmul_(P[..., None], G_i)
    return dk.to(dtype), dv.to(dtype)


class MyopicAttention(torch.autograd.Function):
    """Causal self-attention; no loss reaches a state more than `horizon` back (None: no limit)."""

    @staticmethod
    def forward(ctx, x, w, b, n_head, horizon, cut):
        qkv = F.linear(x, w, b)  # (B, T, 3C)
        q, k, v = split_heads(qkv, n_head)  # (B, nh, T, hs)
        kernel_forward, _ = kernels(q)
        out, lse = kernel_forward(q, k, v)
        ctx.save_for_backward(x, w, qkv, out, lse)
        ctx.n_head, ctx.horizon, ctx.cut = n_head, horizon, cut
        return merge_heads(out)  # (B, T, C)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():  # under create_graph; torch's once_differentiable misses some
            raise RuntimeError("myopic_attention has no second derivative: leave out create_graph")
        x, w, qkv, out, lse = ctx.saved_tensors
        q, k, v = split_heads(qkv, ctx.n_head)  # (B, nh, T, hs)
        _, kernel_backward = kernels(q)
        (G,) = split_heads(dy, ctx.n_head, parts=1)  # (B, nh, T, hs)

        dq, dk, dv = kernel_backward(G, q, k, v, out, lse)  # what every reader wants
        d_all = d_near = merge_heads(dq, dk, dv)  # (B, T, 3C)
        if ctx.horizon is not None:  # the stop-gradient: what the near readers want
            d_near = merge_heads(dq, *near_gradients(G, q, k, v, out, lse, ctx.horizon))
        d_weights = d_all if ctx.cut == "hidden" else d_near

        dx = d_near @ w  # (B, T, C)
        dw = d_weights.flatten(0, 1).T @ x.flatten(0, 1)  # (3C, C)
        db = d_weights.sum((0, 1)) if ctx.needs_input_grad[2] else None  # (3C,)
        return dx, dw, db, None, None, None


def myopic_attention(x, w_qkv, b_qkv, n_head, horizon=0, cut="hidden"):
    """Causal multi-head self-attention, up to its out-projection, with a myopic backward pass.

    x (B, T, C); w_qkv (3C, C), b_qkv (3C,) or None, rows in the order q, k, v -> (B, T, C).
    horizon, cut: see ARMS. Obeys autocast. Raises UsageError for a bad value,
    RuntimeError under create_graph=True. Source: Wu, Morris, Levine (2024), section 3."""
    GPTConfig(1, 1, 1, n_head, x.size(2), horizon=horizon, cut=cut)  # only to refuse bad values
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        x, w_qkv, b_qkv = (None if t is None else t.to(low) for t in (x, w_qkv, b_qkv))
    with torch.autocast(kind, enabled=False):  # it would undo plain_forward's upcast
        return MyopicAttention.apply(x, w_qkv, b_qkv, n_head, horizon, cut)


def two_stream_attention(x, past_x, w, b, n_head):
    """Attention to oneself as usual, and to a past that another stream of states has made.

    A = softmax_causal(s (q k_past^T, with its diagonal replaced by q.k))
    Y = A v_past + diag(A) (v - v_past)
    x (B, T, C); past_x (B, T, C), or None for a past of zeros -> (B, T, C)."""
    q, k, v = split_heads(F.linear(x, w, b), n_head)  # (B, nh, T, hs)
    k_past, v_past = torch.zeros_like(k), torch.zeros_like(v)
    if past_x is not None:
        _, k_past, v_past = split_heads(F.linear(past_x, w, b), n_head)
    S = (q @ k_past.mT).diagonal_scatter((q * k).sum(-1), 0, -2, -1)  # (B, nh, T, T)
    A = (S / math.sqrt(q.size(-1)) + torch.full_like(S[0, 0], -math.inf).triu(1)).softmax(-1)
    return merge_heads(A @ v_past + A.diagonal(0, -2, -1)[..., None] * (v - v_past))


# ------------------------ the model
class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, C, bias = config, config.n_embd, config.bias
        self.ln_1 = nn.LayerNorm(C, bias=bias)
        self.attn = nn.Module()  # a namespace, for nanoGPT's names
        self.attn.c_attn = nn.Linear(C, 3 * C, bias=bias)
        self.attn.c_proj = nn.Linear(C, C, bias=bias)
        self.ln_2 = nn.LayerNorm(C, bias=bias)
        self.mlp = nn.Sequential()  # runs in this order: (B, T, C) -> (B, T, 4C) -> (B, T, C)
        self.mlp.c_fc = nn.Linear(C, 4 * C, bias=bias)
        self.mlp.act = nn.GELU()
        self.mlp.c_proj = nn.Linear(4 * C, C, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, teacher_x=None):
        """x (B, T, C) -> (B, T, C); teacher_x (B, T, C) or None: what the teacher's ln_1 gave."""
        c, w, b = self.config, self.attn.c_attn.weight, self.attn.c_attn.bias
        if c.past == "own":  # vanilla, too, goes through the backward pass by hand
            y = myopic_attention(self.ln_1(x), w, b, c.n_head, c.horizon, c.cut)  # (B, T, C)
        else:
            y = two_stream_attention(self.ln_1(x), teacher_x, w, b, c.n_head)  # (B, T, C)
        x = x + self.dropout(self.attn.c_proj(y))
        return x + self.dropout(self.mlp(self.ln_2(x)))  # (B, T, C)


class GPT(nn.Module):
    """nanoGPT's names and shapes. teacher: a trained GPT of this shape, if past="frozen"."""

    def __init__(self, config, teacher=None):
        super().__init__()
        require((teacher is None) == (config.past != "frozen"), "only past='frozen' has a teacher")
        self.config = config
        self.transformer = t = nn.ModuleDict()
        t.wte = nn.Embedding(config.vocab_size, config.n_embd)
        t.wpe = nn.Embedding(config.block_size, config.n_embd)
        t.drop = nn.Dropout(config.dropout)
        t.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        t.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        t.wte.weight = self.lm_head.weight
        for name, p in self.named_parameters():  # as GPT-2: residual writers start smaller
            if p.dim() == 2:
                shrink = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.teacher = None if teacher is None else teacher.requires_grad_(False)

    def hidden_states(self, idx):
        """idx (B, T) -> n_layer + 1 tensors (B, T, C): 0 the embedding, l that after block l."""
        t, T = self.transformer, idx.size(1)
        require(self.config.block_size >= T, f"{T} positions are more than block_size allows")
        teacher_xs = [None] * len(t.h)
        if self.teacher is not None:
            states = self.teacher.eval().hidden_states(idx)
            teacher_xs = [b.ln_1(x) for b, x in zip(self.teacher.transformer.h, states)]
        states = [t.drop(t.wte(idx) + t.wpe.weight[:T])]  # (B, T, C)
        for block, teacher_x in zip(t.h, teacher_xs):
            states.append(block(states[-1], teacher_x))  # (B, T, C)
        return states

    def forward(self, idx, targets=None):
        """idx, targets (B, T) -> logits (B, T, V), mean loss in nats or None; -1: no target."""
        logits = self.lm_head(self.transformer.ln_f(self.hidden_states(idx)[-1]))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def configure_optimizers(self, run):
        """[AdamW, Muon]: Muon for the blocks' matrices with run.muon in their name, if there are
        any; of AdamW's, matrices and embeddings decay, biases and norms do not."""
        muon, decaying, others = [], [], []
        for name, p in self.named_parameters():
            if p.requires_grad and p.dim() < 2:
                others.append(p)
            elif p.requires_grad:  # and not the teacher's
                (muon if ".h." in name and run.muon in name else decaying).append(p)
        groups = [dict(params=others, weight_decay=0.0), dict(params=decaying)]
        settings = dict(betas=(run.beta1, run.beta2), weight_decay=run.weight_decay, fused=True)
        optimizers = [torch.optim.AdamW(groups, run.learning_rate, **settings)]
        if muon:
            settings = dict(weight_decay=run.muon_decay, adjust_lr_fn="match_rms_adamw")
            optimizers.append(torch.optim.Muon(muon, run.muon_rate, **settings))
        return optimizers

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T) -> (B, T + max_new_tokens), sampled; the model sees the last block_size."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            logits = logits[:, -1] / temperature  # (B, V)
            if top_k is not None:
                least = logits.topk(min(top_k, logits.size(-1)))[0][:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < least, -math.inf)
            idx = torch.cat([idx, logits.softmax(-1).multinomial(1)], dim=1)  # (B, T + 1)
        return idx


# ------------------------ text
def python_english():
    """The English that ships with Python: docstrings of its modules and pydoc's help topics."""
    documents = set(topics.values())
    for path in Path(ast.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                documents.add(ast.get_docstring(node) or "")
    shuffled = random.Random(0).sample(sorted(documents), len(documents))  # always the same way
    paragraphs = "\n\n".join(shuffled).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))  # each once: none is trained on and held out


def load_text(files, run):
    """-> ids to train on, ids of the held-out last tenth (1-d, int32), vocabulary (list of str)."""
    try:
        texts = [Path(name).read_text("utf-8") for name in files] or [python_english()]
    except (OSError, ValueError) as error:
        raise UsageError(f"--data {' '.join(files)}: {error}; name UTF-8 files") from error
    text = "\n\n".join(texts)
    train, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    if run.tokens == "byte":
        vocabulary = [chr(n) for n in range(256)]
        ids = [np.array(list(part.encode()), dtype=np.int32) for part in (train, held_out)]
    else:
        words = [re.findall(r"\w+|[^\w\s]", part) for part in (train, held_out)]
        frequent = collections.Counter(words[0]).most_common(run.vocab_size - 1)
        vocabulary = ["<unk>"] + [word for word, _ in frequent]
        place = {word: n for n, word in enumerate(vocabulary)}
        ids = [np.array([place.get(word, 0) for word in part], dtype=np.int32) for part in words]
    require(run.block_size < min(map(len, ids)), f"block_size is {run.block_size}: text too short")
    return *ids, vocabulary


@torch.no_grad()
def token_losses(model, windows, run):
    """In nats, of N = run.eval_windows evenly spaced windows, no dropout -> losses, y: (N, T)."""
    spaced = torch.linspace(0, len(windows) - 1, run.eval_windows, dtype=torch.float64).long()
    chosen = windows[spaced.to(windows.device)].long()  # (N, T + 1)
    logits = model.eval()(chosen[:, :-1])[0].float().transpose(1, 2)  # (N, V, T)
    return F.cross_entropy(logits, chosen[:, 1:], reduction="none").cpu(), chosen[:, 1:].cpu()


# ------------------------ training
def train(model, optimizers, next_batch, run, tell, after_step=lambda done: None):
    """Train the model in place. next_batch(step) -> (x, y) on its device; model(x, y) -> (_, loss).

    tell((steps, loss)) is called every ten steps, after_step(steps done) after each. Raises
    UsageError if the loss is not finite."""
    device = next(model.parameters()).device.type
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    rise, fall = run.warmup * run.max_iters, (1 - run.decay_from) * run.max_iters
    for done in range(1, run.max_iters + 1):
        scale = min(1, done / max(1, rise), (run.max_iters + 1 - done) / max(1, fall))
        for group, peak in zip(groups, peaks):
            group["lr"] = peak * scale
        x, y = next_batch(done - 1)
        model.train()  # after_step may have left it evaluating
        with torch.autocast(device, torch.bfloat16, enabled=run.dtype == "bfloat16"):
            _, loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        if done % 10 == 0 or done == run.max_iters:  # to read a loss stalls a GPU
            where = f"the loss is {loss.item()} at step {done} of {run.arm}, seed {run.seed}"
            require(math.isfinite(loss.item()), f"{where}: lower --learning_rate")
            tell((done % 10 or 10, loss.item()))  # the steps since it was last called
        after_step(done)


# ------------------------ runs: settings in, one record out
def setting(default, help, least=0, most=sys.float_info.max, choices=None):
    """A field of a Run that is also a flag: argparse takes type, help and choices from it."""
    return field(default=default, metadata=dict(help=help, limits=(least, most), choices=choices))


@dataclass(frozen=True)
class Run:
    """Every setting that a number depends on. Raises UsageError for a value out of its range."""

    arm: str = "vanilla"
    seed: int = setting(0, "the first seed", most=sys.maxsize)
    block_size: int = setting(64, "positions per sequence, T", 1)
    n_layer: int = setting(3, "blocks", 1)
    n_head: int = setting(3, "heads", 1)
    n_embd: int = setting(96, "channels, C", 1)
    batch_size: int = setting(16, "sequences per step", 1)
    max_iters: int = setting(700, "steps", 1)
    learning_rate: float = setting(8e-3, "AdamW's peak")
    beta1: float = setting(0.9, "AdamW's", most=0.9999)
    beta2: float = setting(0.95, "AdamW's", most=0.9999)
    weight_decay: float = setting(0.1, "AdamW's, of matrices and embeddings")
    muon: str = setting(".h.", "Muon trains the blocks' matrices with this in their name")
    muon_rate: float = setting(8e-3, "Muon's peak")
    muon_decay: float = setting(0.1, "Muon's weight decay")
    warmup: float = setting(0.05, "share of the steps in which the rates rise", most=0.99)
    decay_from: float = setting(0.5, "share of the steps after which they fall", most=0.99)
    grad_clip: float = setting(1.0, "largest norm of a gradient", 1e-6)
    dtype: str = setting("float32", "of matrix products", choices=["float32", "bfloat16"])

    def __post_init__(self):
        for f in fields(self):
            value, (least, most) = getattr(self, f.name), f.metadata.get("limits", (0, sys.maxsize))
            in_range = f.type is str or least <= value <= most  # nan is not
            require(in_range, f"{f.name} is {value}: give a number from {least:g} to {most:g}")
        self.config(1)  # refuses an unknown arm and a bad shape

    def config(self, vocab_size, dropout=0.0):
        """The GPTConfig of this run: an arm is three of its fields."""
        shape = self.block_size, vocab_size, self.n_layer, self.n_head, self.n_embd
        return GPTConfig(*shape, dropout=dropout, **arm_fields(self.arm))


def read_records(path, kind):
    """{run: record} of a results file, the last line of a run counts; kind: the class of run."""
    records = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            if line:  # racing writers may leave an empty one
                record = json.loads(line)
                records[kind(**{f.name: record[f.name] for f in fields(kind)})] = record
        except (ValueError, KeyError, TypeError) as error:  # perhaps its writer was killed
            print(f"{path}, line {number} cannot be read and is skipped: {error!r:.60}")
    return records


def append_record(path, record):
    """Add a line by a single write; if a killed process left half a line, begin a new one."""
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    with path.open("a+b", buffering=0) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        file.write(line if file.read(1) in (b"\n", b"") else b"\n" + line)


def write_whole(path, write, **more):
    """write(a temporary path, **more), then rename: the file at `path` is whole or not there."""
    part = path.with_name(f".part.{os.getpid()}.{path.name}")
    write(part, **more)
    part.replace(path)


def arrays_path(out_dir, run):
    """Where a run's arrays lie: the name is a digest of its settings."""
    return out_dir / "arrays" / f"{hashlib.sha256(repr(run).encode()).hexdigest()[:12]}.npz"


def start_worker(queue):
    """In a worker: Ctrl-C is the parent's, the worker ends with it, news go into the queue."""

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.current_process().tell = queue.put
    threading.Thread(target=end_with_parent, daemon=True).start()


def work(train_one, run, device, tell=None):
    """One run, on one thread, to be the same on any number of cores -> numbers, arrays."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")  # high: TF32
    start, tell = time.time(), tell or multiprocessing.current_process().tell
    model, numbers, arrays = train_one(run, device, tell)
    weights = {f"weights.{n}": w.half().cpu().numpy() for n, w in model.state_dict().items()}
    if sum(w.nbytes for w in weights.values()) < 2**20:  # larger ones are not kept
        arrays |= weights
    return numbers | dict(seconds=round(time.time() - start, 1)), arrays


def finished_runs(runs, train_one, args, show):
    """Train args.jobs runs side by side; yield (run, (numbers, arrays)) as they finish."""
    if args.jobs == 1:
        for run in runs:
            yield run, work(train_one, run, args.device, show)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with ProcessPoolExecutor(args.jobs, context, start_worker, [queue]) as pool:
        pending = {pool.submit(work, train_one, run, args.device): run for run in runs}
        try:
            while pending:
                done, _ = wait(pending, timeout=0.2)
                while not queue.empty():
                    show(queue.get())
                for future in done:
                    yield pending.pop(future), future.result()
        finally:  # after a failed run or Ctrl-C, too: nobody waits for the others
            for worker in multiprocessing.active_children():
                worker.kill()


def train_missing(runs, train_one, headline, path, args):
    """Train what the records at `path` lack -> {run: record} for all of `runs`.

    train_one(run, device, tell) -> model, numbers, arrays; headline: the number shown at once."""
    records, runs = read_records(path, type(args.run)), list(dict.fromkeys(runs))  # each once
    todo = [run for run in runs if not args.plot_only and (args.fresh or run not in records)]
    codes = {records[run]["code"] for run in runs if run in records and run not in todo}
    if codes - {args.stamp["code"]}:
        print(f"{path}: runs of other code are used as they are; --fresh repeats them")
    minutes = args.seconds * len(todo) / args.jobs / 60  # on CPU cores, with the preset's settings
    print(f"{path}: {len(todo)} runs to train, {args.jobs} at once, about {minutes:.1f} minutes")
    steps = sum(run.max_iters * (1 + (run.config(1).past == "frozen")) for run in todo)
    with tqdm(total=steps, leave=False, disable=not todo) as bar:

        def show(news):
            steps, loss = news
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update(steps)

        for run, (numbers, arrays) in finished_runs(todo, train_one, args, show):
            if run.seed == args.seed:  # the first seed's, for pictures
                write_whole(arrays_path(args.out_dir, run), np.savez_compressed, **arrays)
            records[run] = asdict(run) | dict(steps=run.max_iters) | args.stamp | numbers
            append_record(path, records[run])
            bar.write(f"{run.arm:>12}, seed {run.seed}: {headline} {numbers[headline]:.3f}")
    wanted = {run: records[run] for run in runs if run in records}
    require(wanted, f"{path} has no results for these settings and data: leave out --plot_only")
    return wanted


# ------------------------ command line
def parse_flags(script, doc, presets, argv, more=()):
    """presets: {name: dict(run, arms, seeds, seconds of a run on one core, ...)} -> args."""
    parser = argparse.ArgumentParser(Path(script).name, description=doc.split("\n")[0])
    add = parser.add_argument
    devices = ["cpu"] + [name for name in ("cuda", "mps") if getattr(torch, name).is_available()]
    add("--preset", choices=presets, default="quick", help="seconds; a laptop; a GPU")
    add("--arms", nargs="+", metavar="ARM", help=f"{', '.join(ARMS)}, horizon_<h>")
    add("--seeds", type=int, help="how many seeds")
    add("--device", choices=["auto", *devices], default="auto", help="auto: CUDA or else the CPU")
    add("--jobs", type=int, help="runs side by side (CPU cores; on a GPU 1)")
    add("--out_dir", type=Path, help="for results and figures (out/<preset>)")
    add("--fresh", action="store_true", help="train recorded runs again")
    add("--plot_only", action="store_true", help="train nothing, draw what is recorded")
    settings = [f for f in fields(presets["quick"]["run"]) if f.metadata]
    for f in settings:
        add(f"--{f.name}", type=f.type, choices=f.metadata["choices"], help=f.metadata["help"])
    for flag, how in more:
        add(flag, **how)
    name = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(out_dir=Path("out", name), **asdict(presets[name]["run"]) | presets[name])
    args = parser.parse_args(argv)
    args.run = replace(args.run, **{f.name: getattr(args, f.name) for f in settings})
    if args.device == "auto":
        args.device = "cuda" if "cuda" in devices else "cpu"
    if args.jobs is None:  # one per core that this process may use; Windows allows 61
        args.jobs = min(torch.get_num_threads(), 61) if args.device == "cpu" else 1
    require(args.jobs > 0, f"jobs is {args.jobs}: give 1 or more")
    require(args.seeds > 0, f"seeds is {args.seeds}: give 1 or more")
    with contextlib.suppress(OSError):
        (args.out_dir / "arrays").mkdir(parents=True, exist_ok=True)
    require(os.access(args.out_dir / "arrays", os.W_OK), f"{args.out_dir}: name a writable folder")
    on_cuda = args.device == "cuda"
    machine = torch.cuda.get_device_name() + ", TF32" if on_cuda else platform.machine()
    sources = b"".join(Path(source).read_bytes() for source in sorted({__file__, script}))
    code = hashlib.sha256(sources).hexdigest()[:8]
    args.stamp = dict(device=f"{args.device} {machine}", torch=torch.__version__, code=code)
    return args


@contextlib.contextmanager
def exit_status(script):
    """Bad input: one line and status 2. Ctrl-C: 130. Anything else is a bug: its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a letter that a console lacks must not end a run
            stream.reconfigure(errors="replace")
    try:
        yield
    except UsageError as error:
        print(f"{Path(script).name}: error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; finished runs are recorded, the same command goes on", file=sys.stderr)
        sys.exit(130)


# ------------------------ tables and figures
def mean_sd(values, digits=3):
    """'0.210 ± 0.020': mean and standard deviation over seeds."""
    sd = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{sd}" if len(values) else "-"


def print_table(title, header, rows, caption):
    table = Table(*header, title=title, caption=caption)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)


# fmt: off
LOOKS = collections.defaultdict(lambda: ("k", "-", "."), {  # colour, line and marker of an arm
    "vanilla": ("#0072B2", "-", "o"), "myopic": ("#D55E00", "--", "s"),
    "myopic_kv": ("#009E73", "-.", "^"), "local_myopic": ("#CC79A7", "-", "D"),
    "bigram": ("#555555", ":", "v"), "untrained": ("#999999", ":", "x"),
    "horizon_1": ("#E69F00", "-", "P"), "horizon_2": ("#56B4E9", "-", "X"),
})
# fmt: on


def new_figure(columns=1, rows=1, width=4.2, height=3.2, **shared):
    """A figure and its (rows, columns) array of axes; sizes in inches per panel."""
    fig = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=120)
    return fig, fig.subplots(rows, columns, squeeze=False, **shared)


def draw_lines(ax, x, lines, **labels):
    """{arm: [y of each seed]} -> mean and standard deviation as lines, their names at the right."""
    lines = {arm: np.array(runs, dtype=float) for arm, runs in lines.items()}  # (seeds, len(x))
    for arm, y in sorted(lines.items(), key=lambda item: -item[1].mean(0)[-1]):
        colour, line, marker = LOOKS[arm]
        mean, sd = y.mean(0), y.std(0, ddof=len(y) > 1)
        ax.plot(x, mean, color=colour, linestyle=line, marker=marker, markersize=3.5, label=arm)
        ax.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
    ax.set(**labels)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, labelcolor="linecolor")


def save_figure(fig, path, caption):
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.supxlabel(caption, fontsize=8, color="#444444")
    write_whole(path, fig.savefig)
    print(f"figure {path}")


# ------------------------ the language model
@dataclass(frozen=True)
class TextRun(Run):
    """A run on text; the digest says what the text was."""

    tokens: str = setting("byte", "what a token is", choices=["byte", "word"])
    vocab_size: int = setting(2048, "words in the vocabulary; bytes have 256", 2)
    dropout: float = setting(0.0, "while training", most=0.99)
    eval_windows: int = setting(256, "windows of held-out text that are evaluated", 1)
    data_sha256: str = ""


FOUR_ARMS = ["vanilla", "myopic", "myopic_kv", "bigram"]
SMALL = TextRun(n_layer=2, n_head=2, n_embd=64, max_iters=120, eval_windows=64)
LARGE = TextRun(n_layer=4, n_head=4, n_embd=128, batch_size=32, max_iters=3000)
PRESETS = {
    "demo": dict(run=SMALL, arms=FOUR_ARMS, seeds=1, seconds=5),
    "quick": dict(run=TextRun(), arms=FOUR_ARMS, seeds=3, seconds=45),
    "full": dict(run=LARGE, arms=list(ARMS), seeds=3, seconds=700),
}


def train_text(text, run, device, tell):
    """Train one model -> the model, the numbers of its record, arrays for pictures."""
    frozen = run.config(1).past == "frozen"  # the teacher: this seed's vanilla model, bit for bit
    teacher = train_text(text, replace(run, arm="vanilla"), device, tell)[0] if frozen else None
    parts = (torch.tensor(ids, device=device) for ids in text[:2])
    windows, held_out = (ids.unfold(0, run.block_size + 1, 1) for ids in parts)  # (n, T + 1) each
    torch.manual_seed(run.seed)  # the same weights in every arm
    model = GPT(run.config(len(text[2]), run.dropout), teacher).to(device)
    generator, curve = torch.Generator().manual_seed(run.seed), []  # and the same batches

    def next_batch(step):
        starts = torch.randint(len(windows), (run.batch_size,), generator=generator)
        chosen = windows[starts.to(device)].long()  # (B, T + 1)
        return chosen[:, :-1], chosen[:, 1:]

    def after_step(step):
        if step % max(1, run.max_iters // 10) == 0 or step == run.max_iters:
            losses = [token_losses(model, part, run)[0] for part in (windows, held_out)]
            curve.append([step, *(part.mean().item() for part in losses)])

    train(model, model.configure_optimizers(run), next_batch, run, tell, after_step)
    losses, y = token_losses(model, held_out, run)  # (N, T) each
    require(np.isfinite(curve).all(), f"{run.arm}: a loss is not finite: lower --learning_rate")
    words = np.array([word + " " * (run.tokens == "word") for word in text[2]])
    sample = model.generate(held_out[:1, :10].long(), 40, top_k=50)[0].tolist()
    numbers = dict(
        n_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        val_loss=losses.mean().item(),
        train_loss=curve[-1][1],
        curve=curve,
        loss_by_position=losses.mean(0).tolist(),
        tokens_seen=run.max_iters * run.batch_size * run.block_size,
        sample="".join(words[sample]),
    )
    return model, numbers, dict(losses=losses[:64].numpy(), tokens=words[y[:64]])


def gaps(found, arm, key="val_loss"):
    """record[key] of the arm - that of vanilla of the same seed, where both are: (seeds, ...)."""
    own = {run.seed: record[key] for run, record in found.items() if run.arm == arm}
    vanilla = {run.seed: record[key] for run, record in found.items() if run.arm == "vanilla"}
    return np.array([np.subtract(own[seed], vanilla[seed]) for seed in own if seed in vanilla])


def plot_gaps(found, arms, path, caption):
    """The arms' gaps while training and by position."""
    run, record = next(iter(found.items()))
    steps = [step for step, _, _ in record["curve"]]
    starts = [0] + [2**n for n in range(20) if 2**n < run.block_size]  # bins that double
    widths = np.diff([*starts, run.block_size])
    training, position, ends = {}, {}, []
    for arm in arms:
        ends.append(f"{arm} {gaps(found, arm).mean():.2f}")
        training[arm] = gaps(found, arm, "curve")[:, :, 2]  # validation loss
        by_position = gaps(found, arm, "loss_by_position")  # (seeds, T)
        position[arm] = np.add.reduceat(by_position, starts, axis=1) / widths
    fig, ((left, right),) = new_figure(2, width=5)
    draw_lines(left, steps, training, xlabel="training steps", ylabel="loss − vanilla's (nats)")
    draw_lines(right, starts, position, xlabel="position in the window", xscale="symlog")
    left.set_title(f"The myopia gap: {', '.join(ends)}")
    right.set_title("The same by position, in bins that double")
    right.set_xticks(starts, starts)
    save_figure(fig, path, caption)


def report(found, args):
    """The table, and the figure of the gaps."""
    run, record = next(iter(found.items()))
    seeds = len({run.seed for run in found})
    about = f"{record['n_params']:,} parameters, {run.max_iters} steps of {run.batch_size} × "
    about += f"{run.block_size} {run.tokens}s, mean ± standard deviation of {seeds} seed(s)"
    if arms := [arm for arm in ("myopic", "myopic_kv") if len(gaps(found, arm))]:
        plot_gaps(found, arms, args.out_dir / f"text_gaps_{run.tokens}.png", about)
    rows, bigram_gap = [], gaps(found, "bigram")
    for arm in dict.fromkeys(run.arm for run in found):
        records = [record for run, record in found.items() if run.arm == arm]
        losses = [mean_sd([r[key] for r in records]) for key in ("val_loss", "train_loss")]
        gap = gaps(found, arm)
        comparable = 0 < len(gap) == len(bigram_gap) and bigram_gap.min() > 0.1  # else noise
        share = 100 * gap / bigram_gap if comparable else []
        numbers = *losses, mean_sd(gap), mean_sd(share, 1)
        rows.append([arm, *numbers, records[0]["sample"].replace("\n", " ")])
    header = ["arm", "val loss", "train loss", "gap", "% of bigram's gap", "writes"]
    print_table(about, header, rows, "losses in nats per token; gap: loss − vanilla's")


# ------------------------ what it costs
def sublayer(x, w, b, n_head, dy, way):
    """Attention forward and backward, as in an arm, in torch's own way or in two streams."""
    if way == "two streams":  # the textbook way to the myopic gradient: a detached second stream
        y = two_stream_attention(x, x.detach(), w, b, n_head)
    elif way == "torch's own":
        q, k, v = split_heads(F.linear(x, w, b), n_head)
        kernel = "FLASH_ATTENTION" if x.device.type == "cpu" else "EFFICIENT_ATTENTION"  # as ours
        with nn.attention.sdpa_kernel(getattr(nn.attention.SDPBackend, kernel)):
            y = merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True))
    else:
        arm = arm_fields(way)
        y = myopic_attention(x, w, b, n_head, arm["horizon"], arm["cut"])
    torch.autograd.grad(y, (x, w, b), dy)


def time_calls(call, ways, device, rounds=12):
    """Time call(way), every way once a round in any order -> a cell of the table for each way: its
    time over the first way's in the same round; nan where memory runs out."""
    seconds = np.full((rounds, len(ways)), math.nan)
    for in_round in seconds:
        for n in np.random.permutation(len(ways)):
            start = time.perf_counter()
            with contextlib.suppress(torch.OutOfMemoryError):
                call(ways[n])
                getattr(torch, device).synchronize()
                in_round[n] = time.perf_counter() - start
    cells = []
    for way, times in zip(ways, seconds[1:].T):  # the first round warms up
        low, middle, high = np.quantile(times / seconds[1:, 0], [0.25, 0.5, 0.75])
        cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f})\n{1000 * np.median(times):.1f} ms")
        if device == "cuda" and not math.isnan(middle):
            torch.cuda.reset_peak_memory_stats()
            call(way)
            cells[-1] += f"\n{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    return cells


def bench(args):
    """Time the attention sublayer in every way, and a whole training step in every arm."""
    torch.set_float32_matmul_precision("high" if args.device == "cuda" else "highest")
    run, C = replace(args.run, max_iters=1), args.run.n_embd
    arms, rows = ["vanilla", "myopic", "myopic_kv", "horizon_4"], []
    ways = [*arms, "two streams", "torch's own"]
    for T in (64, 128, 256, 512, 1024, 2048):
        B = max(1, run.batch_size * run.block_size // T)
        x, dy = torch.randn(2, B, T, C).to(args.device, getattr(torch, run.dtype))
        w, b = nn.Linear(C, 3 * C).to(x).parameters()
        call = functools.partial(sublayer, x.requires_grad_(), w, b, run.n_head, dy)
        rows.append([f"sublayer\nT = {T}", *time_calls(call, ways, args.device)])
    model = GPT(run.config(256)).to(args.device)
    optimizers = model.configure_optimizers(run)
    xy = torch.randint(256, (2, run.batch_size, run.block_size), device=args.device)

    def step(arm):
        vars(model.config).update(arm_fields(arm))  # every block shares this config
        train(model, optimizers, lambda step: xy, run, lambda news: None)

    rows.append([f"step\nT = {run.block_size}", *time_calls(step, arms, args.device)])
    caption = "time over vanilla's in the same round: median (quartiles); median time"
    print_table(f"Forward and backward on {args.stamp['device']}", ["", *ways], rows, caption)


# ------------------------ main
def flags(argv=None):
    data = dict(nargs="+", metavar="FILE", default=[], help="UTF-8 text (Python's own English)")
    cost = dict(action="store_true", help="only measure what the stop-gradient costs")
    return parse_flags(__file__, __doc__, PRESETS, argv, [("--data", data), ("--bench", cost)])


def main(argv=None):
    """Train what is not recorded yet, draw, print the table; or measure what it costs."""
    with exit_status(__file__):
        args = flags(argv)
        if args.bench:
            return bench(args)
        ids, held_out, vocabulary = text = load_text(args.data, args.run)
        print(f"text: {len(ids):,} {args.run.tokens}s to train on, {len(held_out):,} held out")
        digest = hashlib.sha256(np.concatenate([ids, held_out])).hexdigest()
        base = replace(args.run, vocab_size=len(vocabulary), data_sha256=digest)
        seeds = range(args.seed, args.seed + args.seeds)
        runs = [replace(base, seed=seed, arm=arm) for seed in seeds for arm in args.arms]
        train_one = functools.partial(train_text, text)
        report(train_missing(runs, train_one, "val_loss", args.out_dir / "text.jsonl", args), args)


if __name__ == "__main__":
    main()
