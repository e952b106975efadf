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
of one sublayer: MyopicAttention, below. Wu, Morris, Levine (2024), arXiv 2404.00859.

    python myopic_gpt.py --preset demo                # four arms once, in seconds
    python myopic_gpt.py                              # English, three seeds: minutes on two cores

Letters in shapes: B batch, T positions, C = n_embd channels, nh heads of size hs = C/nh, V tokens.
The gradient of the loss with respect to X is called dX and has X's shape.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import platform
import secrets
import signal
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.style
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.utils import benchmark
from tqdm import tqdm

# ------------------------ arms and configuration
# An arm of a comparison is three fields; all else, the start and the batches included, is the same.
#   horizon  None: gradients travel freely; 0: not at all; h: h positions along each attention edge,
#            n_layer * h in all, which is neither gradient; h >= T - 1 is the same as None
#   cut      when i reads k_j = W_K x_j, whose work is that?  "hidden": the reader's, so W_K and W_V
#            learn from every reader (the paper); "kv": the writer's, so they learn from near ones
#   past     keys and values of the past are made from the model's "own" states, from those of a
#            "frozen" trained vanilla model, or are "zero"; the last two ignore horizon and cut
ARMS = {
    "vanilla": dict(horizon=None, cut="hidden", past="own"),
    "myopic": dict(horizon=0, cut="hidden", past="own"),
    "myopic_kv": dict(horizon=0, cut="kv", past="own"),
    "local_myopic": dict(horizon=0, cut="hidden", past="frozen"),
    "bigram": dict(horizon=0, cut="hidden", past="zero"),
}


@dataclass
class GPTConfig:
    """nanoGPT's seven fields and the arm's three: see ARMS. Raises UsageError for a bad shape or
    arm."""

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
        check_attention(self.n_embd, self.n_head, self.horizon, self.cut)
        require(self.past in ("own", "frozen", "zero"), f"past is {self.past!r}: see ARMS")


# ------------------------ attention and its backward pass
#     P = softmax_causal(s q k^T)        O = P v        s = 1 / sqrt(hs)
#     lse_i = log sum_{j<=i} exp(s q_i.k_j), so that P_ij = exp(s q_i.k_j - lse_i)
#
# Backward, with G = dO. Torch does the first three sums; the near ones and the cut are ours.
#     dS_ij = P_ij (G_i.v_j - G_i.O_i)
#     dq_i  = s sum_{j<=i} dS_ij k_j                       every position asks its own question
#     dk_j  = s sum_{i>=j} dS_ij q_i                       what all the readers i of j want
#     dv_j  =   sum_{i>=j} P_ij G_i
#     near: the same two, over 0 <= i - j <= horizon       what the near ones want; myopic: i = j
#
# q, k, v, O, G and their gradients are (B, nh, T, hs), lse is (B, nh, T).


def split_heads(x, n_head):
    """(B, T, C) -> (B, nh, T, hs), a view."""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, nh, T, hs) -> (B, T, C), the inverse."""
    return x.transpose(1, 2).flatten(2)


def heads(x, w, b, n_head):
    """x (B, T, C) -> q, k, v (B, nh, T, hs)."""
    qkv = F.linear(x, w, b).chunk(3, dim=-1)  # three of (B, T, C)
    return [split_heads(t, n_head) for t in qkv]


def attend(q, k, v):
    """Torch's attention in a small graph of its own -> q, k, v, O, ready for autograd.grad.

    Its hooks keep a caller's hooks (checkpointing) out of this graph. They save O detached: O
    saved as it is would hold the graph that holds O, and nothing would ever be freed."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    hooks = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved)
    with torch.enable_grad(), hooks:
        return q, k, v, F.scaled_dot_product_attention(q, k, v, is_causal=True)


def mask_future(S):
    """Scores (..., T, T) -> the same, but -inf where j > i."""
    future = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).triu(1)  # (T, T)
    return S.masked_fill(future, -math.inf)


def log_sum_exp(q, k, out):
    """lse (B, nh, T): as the fused forward pass kept it for its own backward, or else computed."""
    for name in ("_saved_logsumexp", "_saved_log_sumexp"):
        if hasattr(out.grad_fn, name):  # some kernels pad it, some add an axis of one
            return getattr(out.grad_fn, name).flatten(2)[:, :, : q.size(2)]
    wide = torch.promote_types(q.dtype, torch.float32)
    S = q.to(wide) @ k.to(wide).mT / math.sqrt(q.size(-1))  # (B, nh, T, T)
    return mask_future(S).logsumexp(-1)


def lag_gradients(lag, G, q, k, v, out, lse):
    """What the readers i = j + lag want -> dk, dv (B, nh, T - lag, hs) of the writers j.

    It takes one shifted diagonal of dS and of P: no (T, T) matrix is made."""
    T, s = q.size(2), 1 / math.sqrt(q.size(3))
    q_i, G_i, O_i = (t[:, :, lag:] for t in (q, G, out))  # (B, nh, T - lag, hs)
    k_j, v_j = k[:, :, : T - lag], v[:, :, : T - lag]  # (B, nh, T - lag, hs)
    log_P = s * (q_i * k_j).sum(-1) - lse[:, :, lag:]  # (B, nh, T - lag)
    P = log_P.clamp(max=0).exp()[..., None]  # (B, nh, T - lag, 1); at most 1, whatever rounds
    dS = P * (G_i * (v_j - O_i)).sum(-1, keepdim=True)  # (B, nh, T - lag, 1)
    return s * dS * q_i, P * G_i


def near_gradients(G, q, k, v, out, lse, horizon):
    """What the readers with 0 <= i - j <= horizon want -> dk, dv (B, nh, T, hs)."""
    T, dtype = q.size(2), q.dtype
    tensors = [t.to(lse.dtype) for t in (G, q, k, v, out)]
    dk, dv = lag_gradients(0, *tensors, lse)
    for lag in range(1, min(horizon, T - 1) + 1):
        dk_lag, dv_lag = lag_gradients(lag, *tensors, lse)
        dk[:, :, : T - lag] += dk_lag
        dv[:, :, : T - lag] += dv_lag
    return dk.to(dtype), dv.to(dtype)


class MyopicAttention(torch.autograd.Function):
    """Causal self-attention; on its edges a gradient goes back `horizon` positions at most."""

    @staticmethod
    def forward(ctx, x, w, b, n_head, horizon, cut):
        q, k, v, out = attend(*heads(x, w, b, n_head))  # (B, nh, T, hs)
        ctx.save_for_backward(x, w, q, k, v, out)
        ctx.n_head, ctx.horizon, ctx.cut = n_head, horizon, cut
        return merge_heads(out.detach())  # (B, T, C)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():  # under create_graph
            raise RuntimeError("myopic_attention has no second derivative: leave out create_graph")
        x, w, q, k, v, out = ctx.saved_tensors
        G = split_heads(dy, ctx.n_head)  # (B, nh, T, hs)

        # what every reader wants, and what the near ones want; the graph stays, for lse and for a
        # second backward pass
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), G, retain_graph=True)
        dk_near, dv_near = dk, dv
        if ctx.horizon is not None:
            lse = log_sum_exp(q, k, out)
            dk_near, dv_near = near_gradients(G, q, k, v, out, lse, ctx.horizon)
        every = [merge_heads(d).flatten(0, 1) for d in (dq, dk, dv, dk_near, dv_near)]
        dq, dk, dv, dk_near, dv_near = every  # (B T, C)

        # the stop-gradient: a state of the past gets no loss but the near ones
        # dx = dq W_Q + dk_near W_K + dv_near W_V
        w_q, w_k, w_v = w.chunk(3)  # (C, C)
        dx = (dq @ w_q).addmm_(dk_near, w_k).addmm_(dv_near, w_v)  # (B T, C)

        # the weights learn from every reader ("hidden"), or from the near ones ("kv")
        if ctx.cut == "kv":
            dk, dv = dk_near, dv_near
        rows = x.flatten(0, 1)  # (B T, C)
        dw = torch.cat([dq.T @ rows, dk.T @ rows, dv.T @ rows])  # (3C, C)
        db = None
        if ctx.needs_input_grad[2]:
            db = torch.cat([dq.sum(0), dk.sum(0), dv.sum(0)])  # (3C,)
        return dx.view_as(x), dw, db, None, None, None


def myopic_attention(x, w_qkv, b_qkv, n_head, horizon=0, cut="hidden"):
    """Causal multi-head self-attention, up to its out-projection, with a myopic backward pass.

    x (B, T, C); w_qkv (3C, C), b_qkv (3C,) or None, rows in the order q, k, v -> (B, T, C).
    horizon, cut: see ARMS. Obeys autocast. Raises UsageError for a bad value, RuntimeError under
    create_graph=True; torch.func refuses it. Source: Wu, Morris, Levine (2024), section 3."""
    C = x.size(-1)
    shapes = [tuple(t.shape) for t in (x, w_qkv, b_qkv) if t is not None]
    fits = x.dim() == 3 and shapes[1:] in ([(3 * C, C)], [(3 * C, C), (3 * C,)])
    require(fits, f"x, w_qkv, b_qkv are {shapes}: make them (B, T, C), (3C, C), (3C,)")
    check_attention(C, n_head, horizon, cut)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, w_qkv = x.to(dtype), w_qkv.to(dtype)
        b_qkv = None if b_qkv is None else b_qkv.to(dtype)
    return MyopicAttention.apply(x, w_qkv, b_qkv, n_head, horizon, cut)


def two_stream_attention(x, past_x, w, b, n_head):
    """Attention to oneself as usual, and to a past that another stream of states has made.

    A = softmax_causal(s (q k_past^T, with its diagonal replaced by q.k))
    Y = A v_past + diag(A) (v - v_past)
    x (B, T, C); past_x (B, T, C), or None for a past of zeros -> (B, T, C). With past_x =
    x.detach() this is the textbook way to the myopic gradient: the same, at a higher price."""
    q, k, v = heads(x, w, b, n_head)  # (B, nh, T, hs)
    k_past, v_past = torch.zeros_like(k), torch.zeros_like(v)
    if past_x is not None:
        _, k_past, v_past = heads(past_x, w, b, n_head)
    S = (q @ k_past.mT).diagonal_scatter((q * k).sum(-1), 0, -2, -1)  # (B, nh, T, T)
    A = mask_future(S / math.sqrt(q.size(-1))).softmax(-1)  # (B, nh, T, T)
    A_own = A.diagonal(0, -2, -1)[..., None]  # (B, nh, T, 1)
    return merge_heads(A @ v_past + A_own * (v - v_past))


# ------------------------ the model
class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.config = config

    def forward(self, x, past_x=None):
        w, b, arm = self.c_attn.weight, self.c_attn.bias, self.config
        if arm.past == "own":  # vanilla, too, goes through the backward pass by hand
            y = myopic_attention(x, w, b, self.n_head, arm.horizon, arm.cut)  # (B, T, C)
        else:
            has_past = arm.past == "zero" or past_x is not None
            require(has_past, "past is 'frozen': that takes a LocalMyopicGPT")
            y = two_stream_attention(x, past_x, w, b, self.n_head)  # (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, past_x=None):
        x = x + self.attn(self.ln_1(x), past_x)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """nanoGPT's names and shapes: its state dict loads with strict=True."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # weight tying
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # as in GPT-2, writers to the residual start smaller
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def positions(self, T):
        """-> (T, C)"""
        limit = self.config.block_size
        require(limit >= T, f"{T} positions: block_size allows {limit}")
        return self.transformer.wpe.weight[:T]

    def embed(self, idx):
        """idx (B, T) -> (B, T, C)"""
        return self.transformer.wte(idx) + self.positions(idx.size(1))

    def hidden_states(self, idx):
        """idx (B, T) -> n_layer + 1 tensors (B, T, C): 0 the embedding, l that after block l."""
        states = [self.transformer.drop(self.embed(idx))]
        for block in self.transformer.h:
            states.append(block(states[-1]))
        return states

    def forward(self, idx, targets=None):
        """idx, targets (B, T) -> logits (B, T, V), mean loss in nats or None; -1: no target."""
        x = self.hidden_states(idx)[-1]  # (B, T, C)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def position_losses(self, state, targets):
        """State after the last block (B, T, C), targets (B, T) -> the loss at each (B, T)."""
        logits = self.lm_head(self.transformer.ln_f(state))  # (B, T, V)
        return F.cross_entropy(logits.mT, targets, reduction="none", ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T) -> (B, T + max_new_tokens), sampled; the model sees the last block_size.

        Raises UsageError for an empty idx, a temperature below 1e-9, a top_k below 1."""
        require(idx.size(1) > 0, "idx has no tokens: give the model one to go on from")
        require(temperature >= 1e-9, f"temperature is {temperature}: take top_k=1 instead")
        require(top_k is None or top_k >= 1, f"top_k is {top_k}: give None, or 1 or more")
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            logits = logits[:, -1] / temperature  # (B, V)
            if top_k is not None:
                best, _ = logits.topk(min(top_k, logits.size(-1)))  # (B, top_k)
                logits = logits.masked_fill(logits < best[:, -1:], -math.inf)
            idx_next = logits.softmax(-1).multinomial(1)  # (B, 1)
            idx = torch.cat([idx, idx_next], dim=1)  # (B, T + 1)
        return idx


# ------------------------ the lesson ends here; bad input
class UsageError(ValueError):
    """Bad input. The message names the value and what to do; main() prints it and exits with 2."""


def require(condition, message):
    if not condition:
        raise UsageError(message)


def check_attention(n_embd, n_head, horizon, cut):
    divides = n_head >= 1 and n_embd % n_head == 0
    require(divides, f"n_embd is {n_embd} and n_head {n_head}: n_head must divide n_embd")
    is_horizon = horizon is None or (isinstance(horizon, int) and horizon >= 0)
    require(is_horizon, f"horizon is {horizon}: make it None or a whole number from 0 on")
    require(cut in ("hidden", "kv"), f"cut is {cut!r}: choose 'hidden' or 'kv'")


# ------------------------ from here on: training it on English
def python_english():
    """The English that ships with Python: pydoc's help topics, and the docstrings of the modules at
    the top of its library."""
    documents = set(topics.values())
    for path in Path(ast.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                documents.add(ast.get_docstring(node) or "")
    # ordered by digest, so that most stay in their place when another Python adds some
    ordered = sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())
    paragraphs = "\n\n".join(ordered).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))  # each once: none is trained on and held out


def load_text(files, block_size):
    """-> bytes to train on, bytes held out (the last tenth)."""
    texts = []
    for name in files:
        try:
            texts.append(Path(name).read_text("utf-8-sig"))
        except (OSError, ValueError) as error:
            raise UsageError(f"--data {name}: {error}; name a UTF-8 file") from error
    text = "\n\n".join(texts) if files else python_english()
    split = len(text) * 9 // 10  # or between the next paragraphs, if some end soon
    split = max(split, text.find("\n\n", split, split + len(text) // 100))
    parts = text[:split].encode(), text[split:].encode()
    n = min(map(len, parts))
    require(block_size < n, f"block_size is {block_size}: the held-out text has {n} bytes")
    return parts


@torch.no_grad()
def token_losses(model, windows, count):
    """In nats, of `count` evenly spaced windows (n, T + 1), no dropout -> losses, y: (count, T)."""
    model.eval()
    spaced = torch.linspace(0, len(windows) - 1, count, dtype=torch.float64).long()
    chosen = windows[spaced.to(windows.device)].long()  # (count, T + 1)
    at_once = max(1, 2**14 // windows.size(1))
    losses = []
    for part in chosen.split(at_once):
        state = model.hidden_states(part[:, :-1])[-1]  # (B, T, C)
        losses.append(model.position_losses(state, part[:, 1:]))
    return torch.cat(losses).cpu(), chosen[:, 1:].cpu()


# ------------------------ training
def orthogonalize(X):
    """(rows, columns) -> a matrix with the singular vectors of X and singular values near 1.

    Five Newton-Schulz steps X <- a X + b (X X^T) X + c (X X^T)^2 X: each does to every singular
    value s what a s + b s^3 + c s^5 does. Source: Jordan et al. (2024), "Muon"."""
    if X.size(0) > X.size(1):
        return orthogonalize(X.T).T  # the smaller X X^T
    X = X / X.norm().clamp(min=1e-7)  # no singular value is above 1
    for _ in range(5):
        S = X @ X.T  # (rows, rows)
        S = torch.addmm(S, S, S, beta=-4.7750, alpha=2.0315)  # b S + c S S
        X = torch.addmm(X, S, X, beta=3.4445)  # a X + S X
    return X


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for matrices W (rows, columns); lr and weight_decay as AdamW's.

        M <- 0.95 M + 0.05 dW                           M = 0 at the start
        U  = orthogonalize(0.95 M + 0.05 dW)            Nesterov's: as if one step further
        W <- W - lr (weight_decay W + 0.2 sqrt(max(rows, columns)) U)

    The factor gives U the root mean square of AdamW's steps, about 0.2. Sources: Jordan et al.
    (2024); for the factor Liu et al. (2025), arXiv 2502.16982. torch.optim.Muon is the same, but
    in bfloat16, which many CPUs only emulate: there it would take half of English's training."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, weight_decay = group["lr"], group["weight_decay"]
            for W in group["params"]:
                if W.grad is None:
                    continue
                state = self.state[W]
                if not state:
                    state["momentum"] = torch.zeros_like(W)
                M = state["momentum"].lerp_(W.grad, 0.05)
                U = orthogonalize(W.grad.lerp(M, 0.95))
                W.mul_(1 - lr * weight_decay)
                W.add_(U, alpha=-lr * 0.2 * math.sqrt(max(W.shape)))


def configure_optimizers(model, run):
    """[AdamW, Muon]. Muon: the blocks' matrices, all of them or attention's (run.muon); of
    AdamW's, matrices and embeddings decay, biases and norms do not."""
    by_muon, decaying, others = [], [], []
    for name, p in model.named_parameters():
        is_muons = {"all": ".h." in name, "attn": ".attn." in name, "none": False}
        if not p.requires_grad:  # a teacher's
            continue
        if p.dim() < 2:
            others.append(p)
        elif is_muons[run.muon]:
            by_muon.append(p)
        else:
            decaying.append(p)
    groups = [
        dict(params=decaying, weight_decay=run.weight_decay),
        dict(params=others, weight_decay=0.0),
    ]
    adamw = torch.optim.AdamW(groups, run.learning_rate, (run.beta1, run.beta2), fused=True)
    if not by_muon:
        return [adamw]
    rates = dict(lr=run.muon_rate, weight_decay=run.muon_decay)
    return [adamw, Muon(by_muon, **rates)]


def train(model, optimizers, next_batch, run, report_progress, after_step=lambda done: None):
    """Train the model in place. next_batch(step) -> (x, y) on its device; model(x, y) -> (_, loss).

    report_progress(steps since the last report, text) is called every ten steps, after_step(steps
    done) after each. Raises UsageError if the loss is not finite."""
    device = next(model.parameters()).device.type
    rise = run.warmup * run.max_iters
    fall = (1 - run.decay_from) * run.max_iters

    def scale(step):  # the rates rise, stay, and fall in a straight line
        return min(1, (step + 1) / max(1, rise), (run.max_iters - step) / max(1, fall))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in optimizers]
    for done in range(1, run.max_iters + 1):
        x, y = next_batch(done - 1)
        model.train()  # after_step may have left it evaluating
        with torch.autocast(device, torch.bfloat16, enabled=run.dtype == "bfloat16"):
            _, loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.grad_clip)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        model.zero_grad()

        if done % 10 == 0 or done == run.max_iters:  # not each: to read a loss stalls a GPU
            now = f"{run.arm}, seed {run.seed}: loss {loss.item():.3f}"
            require(loss.isfinite(), f"{now} at step {done}: lower --learning_rate")
            report_progress(done % 10 or 10, now)
        after_step(done)


# ------------------------ a run: every setting that a number depends on
def arm_fields(name):
    """The three fields of an arm of ARMS, or of horizon_<h>."""
    if name.startswith("horizon_") and name[8:].isdecimal():
        return dict(horizon=int(name[8:]), cut="hidden", past="own")
    require(name in ARMS, f"arm {name} is unknown: choose from {', '.join(ARMS)}, horizon_<h>")
    return ARMS[name]


def setting(default, help, most=math.inf, choices=None):
    """A field of a Run that is also a flag: argparse takes type, help and choices from it."""
    return field(default=default, metadata=dict(help=help, most=most, choices=choices))


@dataclass(frozen=True)
class Run:
    """Settings in, one record out. Raises UsageError for a value that it cannot have."""

    arm: str = "vanilla"
    recipe: int = 1  # raise it when a change that no other field shows makes old records differ
    seed: int = setting(0, "the first seed", most=sys.maxsize)
    block_size: int = setting(64, "positions per sequence, T")
    n_layer: int = setting(3, "blocks")
    n_head: int = setting(3, "heads")
    n_embd: int = setting(96, "channels, C")
    batch_size: int = setting(16, "sequences per step")
    max_iters: int = setting(700, "steps")
    learning_rate: float = setting(8e-3, "AdamW's peak")
    beta1: float = setting(0.9, "AdamW's", most=0.9999)
    beta2: float = setting(0.95, "AdamW's", most=0.9999)
    weight_decay: float = setting(0.1, "AdamW's, of matrices and embeddings")
    muon: str = setting("all", "which of the blocks' matrices", choices=["all", "attn", "none"])
    muon_rate: float = setting(8e-3, "Muon's peak")
    muon_decay: float = setting(0.1, "Muon's weight decay")
    warmup: float = setting(0.05, "share of the steps in which the rates rise", most=1)
    decay_from: float = setting(0.5, "share of the steps after which they fall", most=1)
    grad_clip: float = setting(1.0, "largest norm of a gradient")
    dtype: str = setting("float32", "of matrix products", choices=["float32", "bfloat16"])

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is str:
                choices = f.metadata.get("choices")
                is_choice = choices is None or value in choices
                require(is_choice, f"{f.name} is {value!r}: choose from {choices}")
                continue
            kind = "a whole number" if f.type is int else "a number"
            least = 1 if f.type is int and f.name != "seed" else 0
            most = f.metadata.get("most", math.inf)
            fits = isinstance(value, (int, f.type)) and least <= value <= most and value < math.inf
            require(fits, f"{f.name} is {value}: give {kind} from {least} to {most}")
        self.config(1)  # refuses an unknown arm and a bad shape

    def config(self, vocab_size, dropout=0.0):
        shape = self.block_size, vocab_size, self.n_layer, self.n_head, self.n_embd
        return GPTConfig(*shape, dropout=dropout, **arm_fields(self.arm))

    def name(self):
        """Of its files. A digest of what differs from the defaults: a new field changes no name."""
        changed = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                changed[f.name] = f.type(value)  # equal runs have one name: 1 is 1.0
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.kind}-{self.arm}-seed{self.seed}-{digest}"


# ------------------------ the experiment: one model of English
@dataclass(frozen=True)
class TextRun(Run):
    """A run on text, byte by byte; the digest says what the text was, and where it was split."""

    kind = "text"  # how its files' names begin
    dropout: float = setting(0.0, "while training", most=0.99)
    eval_windows: int = setting(256, "windows of held-out text that are evaluated")
    data_sha256: str = ""


FOUR_ARMS = ["vanilla", "myopic", "myopic_kv", "bigram"]
SHAPE = dict(block_size=32, n_layer=2, n_head=2, n_embd=32)
DEMO = TextRun(**SHAPE, max_iters=400, learning_rate=1.5e-2, muon_rate=1.5e-2)
SIZES = ["3x16", "3x32", "3x64", "3x128", "1x64", "2x64", "6x64"]
PRESETS = {  # seconds: of a run, about, on one core
    "demo": dict(run=DEMO, arms=FOUR_ARMS, seeds=1, seconds=6),
    "quick": dict(run=TextRun(), arms=FOUR_ARMS, seeds=3, seconds=45),
    "full": dict(run=TextRun(max_iters=3000), arms=FOUR_ARMS, seeds=3, sizes=SIZES, seconds=110),
}


class LocalMyopicGPT(GPT):
    """A GPT that sees its past through a trained teacher: K and V of the past are its own W_K and
    W_V, applied to what the teacher's ln_1 gave. Its states can do nothing for later positions."""

    def __init__(self, config, teacher):
        super().__init__(config)
        self.teacher = teacher.requires_grad_(False)

    def hidden_states(self, idx):
        teacher_states = self.teacher.eval().hidden_states(idx)
        states = [self.transformer.drop(self.embed(idx))]
        blocks = zip(self.transformer.h, self.teacher.transformer.h, teacher_states)
        for block, teacher_block, teacher_x in blocks:
            past_x = teacher_block.ln_1(teacher_x)  # (B, T, C)
            states.append(block(states[-1], past_x))
        return states


def train_text(text, run, device, report_progress):
    """Train one model of load_text's bytes -> the model, the numbers of its record, arrays."""
    config = run.config(vocab_size=256, dropout=run.dropout)

    def windows_of(part):
        tokens = torch.tensor(np.frombuffer(part, dtype=np.uint8), device=device)
        return tokens.unfold(0, run.block_size + 1, 1)

    windows, held_out = windows_of(text[0]), windows_of(text[1])  # (n, T + 1), (m, T + 1)
    if config.past == "frozen":  # the teacher: a vanilla model of the same seed and settings
        teacher, _, _ = train_text(text, replace(run, arm="vanilla"), device, report_progress)
    torch.manual_seed(run.seed)  # the same weights in every arm
    model = LocalMyopicGPT(config, teacher) if config.past == "frozen" else GPT(config)
    model.to(device)
    generator = torch.Generator().manual_seed(run.seed)  # and the same batches
    curve = []

    def next_batch(step):
        starts = torch.randint(len(windows), (run.batch_size,), generator=generator)
        chosen = windows[starts.to(device)].long()  # (B, T + 1)
        return chosen[:, :-1], chosen[:, 1:]

    def after_step(done):
        if done % max(1, run.max_iters // 10) == 0 or done == run.max_iters:
            train_losses, _ = token_losses(model, windows, run.eval_windows)
            val_losses, _ = token_losses(model, held_out, run.eval_windows)
            curve.append([done, train_losses.mean().item(), val_losses.mean().item()])

    few = held_out[:: 1 + len(held_out) // 32].long()  # (32 or less, T + 1)
    if run.arm == "vanilla":
        at_start = lag_shares(model, few[:, :-1], few[:, 1:])
    train(model, configure_optimizers(model, run), next_batch, run, report_progress, after_step)
    require(np.isfinite(curve).all(), f"{run.arm}: a loss is not finite: lower --learning_rate")
    losses, y = token_losses(model, held_out, run.eval_windows)  # (N, T) each
    sample = model.generate(held_out[:1, :10].long(), 40, top_k=50)[0].tolist()
    numbers = dict(
        val_loss=losses.mean().item(),
        train_loss=curve[-1][1],
        curve=curve,
        loss_by_position=losses.mean(0).tolist(),
        sample=bytes(sample).decode("latin-1"),
    )
    if run.arm == "vanilla":
        at_end = lag_shares(model, few[:, :-1], few[:, 1:])
        numbers["lag_share"] = dict(start=at_start, end=at_end)
    return model, numbers, dict(losses=losses[:64].numpy(), y=y[:64].numpy().astype(np.uint8))


# ------------------------ instruments: whom the gradient serves, in any GPT
def gradient_tables(model, x, y):
    """(L + 1, T, T): table l is of the state after l blocks, 0 the embedding.

    Entry (i, j): root mean square, over sequences and channels, of the gradient of the loss at i
    with respect to the state at j. One backward pass per row."""
    states = model.eval().hidden_states(x)
    losses = model.position_losses(states[-1], y)  # (B, T)
    rows = []
    for i in range(x.size(1)):
        d_states = torch.autograd.grad(losses[:, i].sum(), states, retain_graph=True)
        rows.append(torch.stack(d_states).square().mean((1, 3)).sqrt())  # (L + 1, T)
    return torch.stack(rows, dim=1).cpu().numpy()


def gradients_by_lag(model, x, y):
    """The gradient of every block's W_K and W_V in a vanilla model, split by lag: reader - writer.

    -> (L, T, 2C, C): part [l, lag] is what the readers `lag` later want of them; the parts of all
    lags add up to the gradient of the mean loss."""
    is_vanilla = model.config.horizon is None and model.config.past == "own"
    require(is_vanilla, "the split by lag is of all readers: give it a vanilla model")
    states = model.eval().hidden_states(x)
    loss = model.position_losses(states[-1], y).mean()
    d_states = torch.autograd.grad(loss, states[1:])  # L of (B, T, C)
    layers = []
    for block, state, d_next in zip(model.transformer.h, states, d_states):
        # the block again, by hand, to see its O and dO
        attn, state = block.attn, state.detach()
        x_l = block.ln_1(state).detach()  # (B, T, C)
        w, b = attn.c_attn.weight, attn.c_attn.bias
        q, k, v, out = attend(*heads(x_l, w, b, attn.n_head))  # (B, nh, T, hs)
        state = state + attn.c_proj(merge_heads(out))  # (B, T, C)
        state = state + block.mlp(block.ln_2(state))
        (G,) = torch.autograd.grad(state, out, d_next, retain_graph=True)

        lse = log_sum_exp(q, k, out)
        tensors = [t.detach() for t in (G, q, k, v, out)]
        parts = []
        for lag in range(x.size(1)):
            dk, dv = lag_gradients(lag, *tensors, lse)
            d_kv = torch.cat([merge_heads(dk), merge_heads(dv)], dim=-1)  # (B, T - lag, 2C)
            writers = x_l[:, : d_kv.size(1)].flatten(0, 1)  # (B (T - lag), C)
            parts.append(d_kv.flatten(0, 1).T @ writers)  # (2C, C)
        layers.append(torch.stack(parts))
    return torch.stack(layers)


def lag_shares(model, x, y):
    """How much of this batch's gradient comes from readers, in that layer, `lag` later.

    -> [layer][0: W_K, 1: W_V][lag]: <g_lag, g> / |g|^2. The shares of all lags add up to 1."""
    layers = []
    for parts in gradients_by_lag(model, x, y):  # (T, 2C, C)
        parts = parts.unflatten(1, (2, -1))  # (T, 2, C, C)
        whole = parts.sum(0)  # (2, C, C)
        shares = (parts * whole).sum((2, 3)) / (whole.square().sum((1, 2)) + 1e-30)  # (T, 2)
        layers.append(np.round(shares.T.tolist(), 4).tolist())
    return layers


# ------------------------ tables and figures
LOOKS = {  # colour, line and marker of an arm
    "vanilla": ("#0072B2", "-", "o"),
    "myopic": ("#D55E00", "--", "s"),
    "myopic_kv": ("#009E73", "-.", "^"),
    "local_myopic": ("#CC79A7", "-", "D"),
    "bigram": ("#555555", ":", "v"),
    "untrained": ("#999999", ":", "x"),
}
GLOSS = {"vanilla": "vanilla: all losses", "myopic": "myopic: own loss only"}


def look(arm):
    """(colour, line, marker) of an arm; horizons go from light to dark as they grow."""
    if arm in LOOKS:
        return LOOKS[arm]
    horizon = arm_fields(arm)["horizon"]
    shade = 0.85 - 0.8 * min(1, math.log2(1 + horizon) / 6)
    return matplotlib.colormaps["viridis"](shade), "-", "PXdp*h<>"[horizon % 8]


def mean_sd(values, digits=3):
    """'0.210 ± 0.020': mean and standard deviation over seeds."""
    if len(values) == 0:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def print_table(title, header, rows, caption):
    table = Table(title=title, caption=caption)
    for name in header:
        table.add_column(name, overflow="fold")  # a narrow terminal must not cut a number
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 120
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def new_figure(columns=1, rows=1, width=5, height=3.2, **shared):
    """A figure and its (rows, columns) array of axes; sizes in inches per panel."""
    fig = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=120)
    return fig, fig.subplots(rows, columns, squeeze=False, **shared)


def draw_arms(ax, x, lines):
    """{arm: [y of each seed]} -> their mean as a line, their standard deviation as a band."""
    for arm, runs in lines.items():
        colour, line, marker = look(arm)
        y = np.array(runs, dtype=float)  # (seeds, len(x))
        mean = y.mean(0)
        style = dict(linestyle=line, marker=marker, markersize=3.5)
        ax.plot(x, mean, color=colour, label=GLOSS.get(arm, arm), **style)
        if len(y) > 1:
            sd = y.std(0, ddof=1)
            ax.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
    ax.legend(frameon=False, labelcolor="linecolor", fontsize=8)


def finish(fig, caption):
    """-> what writes the figure to a path."""
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.supxlabel(caption, fontsize=8, color="#444444")
    return fig.savefig


def draw(path, plot, *data):
    """Write what plot(*data) has drawn, or say why it cannot be: an old figure does not stay as if
    it were new."""
    try:
        write = plot(*data)
    except UsageError as error:
        path.unlink(missing_ok=True)
        print(f"no {path.name}: {error}")
        return
    write_whole(path, write)
    print(f"figure {path}")


def per_seed(found, arm, key):
    """[record[key] of every seed] of one arm."""
    return [record[key] for run, record in found.items() if run.arm == arm]


def arms_of(found):
    return list(dict.fromkeys(run.arm for run in found))


def seeds_of(found):
    n = len({run.seed for run in found})
    return "one seed" if n == 1 else f"mean and standard deviation of {n} seeds"


def plot_lags(found, last, caption):
    """Whom W_V serves, by lag; in words: all later readers, and the next `last`."""
    records = per_seed(found, "vanilla", "lag_share")
    require(records, "it takes vanilla")
    untrained = np.array([record["start"] for record in records])[:, :, 1]  # W_V's: (seeds, L, T)
    trained = np.array([record["end"] for record in records])[:, :, 1]
    _, layers, T = trained.shape
    by_count = (T - np.arange(T)) / (T * (T + 1) / 2)  # (T,) T - lag pairs are `lag` apart
    fig, (axes,) = new_figure(layers, width=3.6, height=3, sharey=True)
    for layer, ax in enumerate(axes):
        ax.plot(by_count, "k--", linewidth=1, label="by counting terms")
        draw_arms(ax, range(T), dict(untrained=untrained[:, layer], vanilla=trained[:, layer]))
        ax.set(title=f"layer {layer + 1}", xlabel="lag: reader − writer", xlim=(-0.5, T / 2))
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("share of W_V's gradient")
    shares = []
    for stop in (T, last + 1):
        share = mean_sd(100 * trained[:, -1, 1:stop].sum(1), 0)
        shares.append(f"{share} % (by counting {100 * by_count[1:stop].sum():.0f} %)")
    finding = f"Of the last layer's W_V gradient, later positions give {shares[0]},\n"
    finding += f"the next {last} positions {shares[1]}"
    fig.suptitle(finding, fontsize=11)
    return finish(fig, f"vanilla; shares add up to 1, and may be negative\n{caption}")


def plot_sizes(panels, finding, caption):
    """panels: {ylabel: {(layers, channels, parameters): [value of each seed]}}, the smallest first.

    A line joins the models of one depth, or of one width. The title is the finding, in numbers of
    the first panel's ends."""
    fig, (axes,) = new_figure(len(panels), width=7 if len(panels) == 1 else 5)
    for ax, (ylabel, values) in zip(axes, panels.items()):
        for size, of_seeds in values.items():
            require(of_seeds, f"{size[0]}x{size[1]} has nothing to show; see the table")
        for place, name, style in ((0, "layers", "C0-"), (1, "channels", "C1--")):
            for shared in {size[place] for size in values}:
                sizes = [size for size in values if size[place] == shared]
                means = [np.mean(values[size]) for size in sizes]
                if len(sizes) > 1:
                    ax.plot([size[2] for size in sizes], means, style, label=f"{shared} {name}")
        ax.plot([], "k.", label="seeds")
        ax.legend(frameon=False, fontsize=8)
        names = []
        for (layers, channels, n_params), of_seeds in values.items():
            ax.plot([n_params] * len(of_seeds), of_seeds, "k.", markersize=4)
            names.append(f"{layers}x{channels}\n{n_params / 1000:.0f}k")
        ax.axhline(0, color="#999999", linewidth=0.8)
        ax.set(xscale="log", xlabel="layers x channels, parameters", ylabel=ylabel)
        ax.set_xticks([size[2] for size in values], names)
        ax.minorticks_off()
        ax.margins(y=0.15)
        ax.tick_params(axis="x", labelsize=7)
    first, *_ = panels.values()
    first = list(first.items())
    ends = []
    for (layers, channels, _), of_seeds in (first[0], first[-1]):
        ends.append(f"{mean_sd(of_seeds, 1)} % at {layers}x{channels}")
    fig.suptitle(f"{finding} {', '.join(ends)}", fontsize=11)
    return finish(fig, caption)


def by_size(found):
    """{(layers, channels, parameters): {run: record}}, the smallest first."""
    groups = {}
    for run, record in found.items():
        size = run.n_layer, run.n_embd, record["n_params"]
        groups.setdefault(size, {})[run] = record
    return dict(sorted(groups.items(), key=lambda item: item[0][2]))


# ------------------------ figures and table of English
def gaps(found, arm, key="val_loss"):
    """{seed: record[key] of the arm - that of vanilla of the same seed}, where both are."""
    gap = {}
    for run, record in found.items():
        vanilla = found.get(replace(run, arm="vanilla"))
        if run.arm == arm and vanilla is not None:
            gap[run.seed] = np.subtract(record[key], vanilla[key])
    return gap


def shares_of_bigram(found, arm):
    """The arm's gap in % of the bigram's of the same seed, unless that is below 0.1 nats: noise."""
    own, bigram = gaps(found, arm), gaps(found, "bigram")
    return [100 * own[seed] / bigram[seed] for seed in own if bigram.get(seed, 0) > 0.1]


def plot_gaps(found, caption):
    """The arms' gaps while training and by position."""
    run, record = next(iter(found.items()))
    steps = np.array(record["curve"])[:, 0]
    # positions in bins that double: 0, 1, 2-3, 4-7, ...
    powers = 2 ** np.arange((run.block_size - 1).bit_length())
    starts = [0, *powers]
    widths = np.diff([*starts, run.block_size])

    training, position, ends = {}, {}, []
    for arm in arms_of(found):
        end = list(gaps(found, arm).values())
        if arm == "vanilla" or not end:
            continue
        ends.append(f"{arm} {mean_sd(end, 2)}")
        curves = np.array(list(gaps(found, arm, "curve").values()))  # (seeds, points, 3)
        training[arm] = curves[:, :, 2]  # validation loss
        by_position = np.array(list(gaps(found, arm, "loss_by_position").values()))
        position[arm] = np.add.reduceat(by_position, starts, axis=1) / widths  # (seeds, bins)
    require(training, "it takes vanilla and another arm of the same seed")
    if "bigram" in position:  # where context is worth nothing, a gap says nothing
        worth = position["bigram"].mean(0) > 0.1
        for arm in position:
            position[arm] = np.where(worth, position[arm], np.nan)
        caption += "; by position: where the bigram's gap is above 0.1 nats"

    fig, ((left, right),) = new_figure(2)
    draw_arms(left, steps, training)
    draw_arms(right, range(len(starts)), position)
    left.set(title="while training", xlabel="training steps", ylabel="loss − vanilla's (nats)")
    right.set(title="by position, in bins that double", xlabel="position in the window, from")
    right.set_xticks(range(len(starts)), starts)
    fig.suptitle(f"The gap at the end: {', '.join(ends)} nats", fontsize=10)
    return finish(fig, caption)


def table_rows(found):
    """-> a row for each size and arm; the last cell is what the first seed's model writes."""
    rows = []
    for (layers, channels, n_params), group in by_size(found).items():
        for arm in arms_of(group):
            row = [f"{layers}x{channels}", f"{n_params:,}", arm]
            losses = per_seed(group, arm, "val_loss")
            row += [str(len(losses)), mean_sd(losses)]
            row.append(mean_sd(per_seed(group, arm, "train_loss")))
            row.append(mean_sd(list(gaps(group, arm).values())))
            row.append(mean_sd(shares_of_bigram(group, arm), 1))
            sample = per_seed(group, arm, "sample")[0]
            row.append("".join(c if c.isprintable() else " " for c in sample))
            rows.append(row)
    return rows


@matplotlib.style.context("default")  # a user's own settings, such as text.usetex, have no say
def report(found, args):
    """The table, then the figures."""
    run = next(iter(found))
    steps = f"{run.max_iters} steps of {run.batch_size} × {run.block_size} bytes; {seeds_of(found)}"
    header = ["size", "parameters", "arm", "n", "val loss", "train loss", "gap"]
    header += ["% of bigram's gap", "writes"]
    caption = "nats per byte; n seeds; gap: loss − vanilla's of the same seed"
    print_table(f"English: {steps}", header, table_rows(found), caption)

    sizes = by_size(found)
    largest = list(sizes.values())[-1]
    folder = args.out_dir
    draw(folder / "text_gaps.png", plot_gaps, largest, steps)
    draw(folder / "text_lags.png", plot_lags, largest, 4, steps)
    if len(sizes) > 1:
        shares = {size: shares_of_bigram(group, "myopic") for size, group in sizes.items()}
        panels = {"myopia gap (% of bigram's)": shares}
        finding = "Of what context is worth, myopia costs"
        draw(folder / "text_size.png", plot_sizes, panels, finding, steps)
    if (folder / "text_gaps.png").exists():
        print(f"open {folder / 'text_gaps.png'} first")


# ------------------------ from here on: running many of them
def write_whole(path, write):
    """write(a temporary path), then rename: the file at `path` is whole or not there. Raises
    UsageError if it cannot be written."""
    part = path.with_name(f".part-{secrets.token_hex(4)}-{path.name}")
    try:
        write(part)
        part.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: {error}: make room, or name another folder") from error
    finally:
        part.unlink(missing_ok=True)


def read_runs(out_dir, run_class):
    """{run: record} of all the runs of a class, TextRun or SineRun, that a folder holds.

    A field that a record lacks has its default. A file counts only under its run's name, so that
    one with other defaults, or with a field that is no more, is none."""
    found = {}
    for path in sorted(Path(out_dir, "runs").glob(f"{run_class.kind}-*.json")):
        try:
            record = json.loads(path.read_text("utf-8"))
            settings = {f.name: record[f.name] for f in fields(run_class) if f.name in record}
            run = run_class(**settings)
        except ValueError as error:
            raise UsageError(f"{path}: {error}; delete it, and the run is repeated") from error
        if run.name() == path.stem:
            found[run] = record
    return found


def save_run(out_dir, run, record, arrays):
    """arrays: a dict, or None. The record's presence means done, so it comes last."""
    path = Path(out_dir, "runs", f"{run.name()}.npz")
    path.unlink(missing_ok=True)  # those of an earlier training do not stay beside a new record
    if arrays is not None:
        try:
            write_whole(path, lambda part: np.savez_compressed(part, **arrays))
        except UsageError as error:
            print(f"{error}; the record alone is kept, so some figures will be missing")
    text = json.dumps(record, allow_nan=False)
    write_whole(path.with_suffix(".json"), lambda part: part.write_text(text, "utf-8"))


def read_arrays(out_dir, run):
    """{name: array} of a run, weights included, or None: the first seed's alone are kept."""
    path = Path(out_dir, "runs", f"{run.name()}.npz")
    return dict(np.load(path)) if path.exists() else None


def load_weights(model, arrays):
    """Put the weights that a run's arrays hold into a model of its shape -> the model."""
    for name, weight in model.state_dict().items():
        weight.copy_(torch.from_numpy(arrays[f"weights.{name}"]))
    return model.eval()


def start_worker(queue):
    """In a worker: Ctrl-C is the parent's, the worker ends with it, progress goes to its bar."""

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.current_process().progress = queue
    threading.Thread(target=end_with_parent, daemon=True).start()


def train_one_run(train_one, run, device, report_progress):
    """One run, on one thread, to be the same on any number of cores -> its numbers and arrays."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")  # high: TF32
    start = time.time()
    model, numbers, arrays = train_one(run, device, report_progress)
    numbers["n_params"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    numbers["seconds"] = round(time.time() - start, 1)
    for name, weight in model.state_dict().items():
        arrays[f"weights.{name}"] = weight.half().cpu().numpy()
    return numbers, arrays


def send_progress(steps, text):
    """In a worker: to the parent's bar."""
    multiprocessing.current_process().progress.put((steps, text))


def train_side_by_side(train_one, runs, device, jobs, report_progress):
    """Train `jobs` runs at once; yield (run, (numbers, arrays)) as they finish."""
    if jobs == 1:
        for run in runs:
            yield run, train_one_run(train_one, run, device, report_progress)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with ProcessPoolExecutor(jobs, context, start_worker, [queue]) as pool:
        pending = {}
        for run in runs:
            future = pool.submit(train_one_run, train_one, run, device, send_progress)
            pending[future] = run
        try:
            while pending:
                done, _ = wait(pending, timeout=0.2)
                while not queue.empty():
                    report_progress(*queue.get())
                for future in done:
                    yield pending.pop(future), future.result()
        finally:  # after a failed run or Ctrl-C, too: nobody waits for the others
            for worker in multiprocessing.active_children():
                worker.kill()


def train_missing(runs, train_one, headline, args):
    """Train the runs that are not recorded yet -> {run: record} for all of `runs` that are.

    train_one(run, device, report_progress) -> model, numbers, arrays. headline: the number that
    is printed when a run ends."""
    recorded = read_runs(args.out_dir, type(args.run))
    found = [recorded[run] for run in runs if run in recorded]
    todo = []
    if not args.plot_only:
        todo = [run for run in runs if args.fresh or run not in recorded]
        folder = args.out_dir / "runs"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        require(os.access(folder, os.W_OK), f"--out_dir {args.out_dir}: name a folder to write to")
    print(f"{args.out_dir}: {len(found)} of these runs are recorded, {len(todo)} to train")
    if todo and args.device == "cpu":  # the presets' seconds are those of a core
        minutes = args.seconds * math.ceil(len(todo) / args.jobs) / 60
        print(f"{args.jobs} at once: about {minutes:.1f} minutes with the preset's settings")

    # what every record of this call says of machine and code
    on_cuda = args.device == "cuda"
    machine = torch.cuda.get_device_name() + ", TF32" if on_cuda else platform.machine()
    sources = b"".join(Path(name).read_bytes() for name in sorted({__file__, args.script}))
    code = hashlib.sha256(sources).hexdigest()[:8]
    stamp = dict(device=f"{args.device} {machine}", torch=torch.__version__, code=code)
    if not args.fresh and any(record["code"] != code for record in found):
        print("some were made by other code and are used as they are; --fresh repeats them")

    steps = 0
    for run in todo:
        models = 2 if arm_fields(run.arm)["past"] == "frozen" else 1  # its teacher, too
        steps += models * run.max_iters
    with tqdm(total=steps, leave=False, disable=not todo) as bar:

        def report_progress(steps, text):
            bar.set_postfix_str(text, refresh=False)
            bar.update(steps)

        results = train_side_by_side(train_one, todo, args.device, args.jobs, report_progress)
        for run, (numbers, arrays) in results:
            recorded[run] = asdict(run) | stamp | numbers
            is_first = run.seed == args.run.seed
            save_run(args.out_dir, run, recorded[run], arrays if is_first else None)
            bar.write(f"{run.arm:>12}, seed {run.seed}: {headline} {numbers[headline]:.3f}")

    # in the order of `runs`, whenever they were trained
    require(recorded.keys() & runs, f"{args.out_dir}: none of these runs: leave out --plot_only")
    return {run: recorded[run] for run in runs if run in recorded}


# ------------------------ command line
def parse_flags(script, doc, presets, argv, more):
    """presets: {name: dict(run, arms, seeds, seconds, ...)}; more: (flag, settings of argparse).

    -> args; args.run holds the preset's settings and those given by hand."""
    about = (doc or "").split("\n")[0]  # python -OO has no docstrings
    parser = argparse.ArgumentParser(Path(script).name, description=about, allow_abbrev=False)
    add = parser.add_argument
    devices = ["cpu"] + [name for name in ("cuda", "mps") if getattr(torch, name).is_available()]
    size = "demo: seconds; quick: a laptop (default); full: a GPU"
    add("--preset", choices=presets, default="quick", help=size)
    add("--arms", nargs="+", metavar="ARM", help=f"{', '.join(ARMS)}, horizon_<h>")
    add("--seeds", type=int, help="how many seeds")
    add("--sizes", nargs="+", metavar="LxC", help="LAYERSxCHANNELS, as 3x64: a sweep")
    add("--device", choices=["auto", *devices], default="auto", help="auto: CUDA or else the CPU")
    add("--jobs", type=int, help="runs side by side (CPU cores; on a GPU 1)")
    add("--out_dir", type=Path, help="for results and figures (out/<preset>)")
    add("--fresh", action="store_true", help="train recorded runs again")
    add("--plot_only", action="store_true", help="train nothing, draw what is recorded")
    for flag, how in more:
        add(flag, **how)
    settings = [f for f in fields(presets["quick"]["run"]) if f.metadata]
    for f in settings:
        add(f"--{f.name}", type=f.type, choices=f.metadata["choices"], help=f.metadata["help"])
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if "cuda" in devices else "cpu"
    # one job for each core that torch may use; 61 is the most of Windows
    jobs = min(61, torch.get_num_threads()) if args.device == "cpu" else 1

    # what is given overrides the preset, and the preset these
    preset = dict(sizes=[], jobs=jobs, out_dir=Path("out", args.preset)) | presets[args.preset]
    given = {name: value for name, value in vars(args).items() if value is not None}
    if given.keys() & {"n_layer", "n_head", "n_embd"}:
        preset["sizes"] = []  # one size by hand: no sweep
    args = argparse.Namespace(script=script, **(preset | given))
    of_run = {f.name: given[f.name] for f in settings if f.name in given}
    args.run = replace(args.run, **of_run)
    require(1 <= args.jobs <= 61, f"jobs is {args.jobs}: give a number from 1 to 61")
    require(args.seeds >= 1, f"seeds is {args.seeds}: give 1 or more")
    return args


def all_runs(args, base, heads_for):
    """The runs of a call: every seed, size and arm of `base`, each once, in that order.

    heads_for(channels) -> n_head, for --sizes."""
    shapes = []
    for size in args.sizes:
        layers, _, channels = size.partition("x")
        require(layers.isdecimal() and channels.isdecimal(), f"size {size}: write it as 3x64")
        layers, channels = int(layers), int(channels)
        shapes.append(dict(n_layer=layers, n_embd=channels, n_head=heads_for(channels)))
    runs = []
    for seed in range(base.seed, base.seed + args.seeds):
        for shape in shapes or [{}]:
            for arm in args.arms:
                runs.append(replace(base, seed=seed, arm=arm, **shape))
    return list(dict.fromkeys(runs))


@contextlib.contextmanager
def exit_status(script):
    """Ends the command with one line and status 2 for bad input, 1 for a killed worker, 130 for
    Ctrl-C; a bug keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a letter that a console lacks must not end a run
            stream.reconfigure(errors="replace")
    try:
        yield
        return
    except UsageError as error:
        status, message = 2, "error: " + " ".join(str(error).split())
    except BrokenExecutor:
        why = "a run was ended by the system, perhaps for its memory"
        status, message = 1, f"{why}: try a smaller --jobs; finished runs are kept"
    except KeyboardInterrupt:
        status, message = 130, "interrupted; without --fresh the same command goes on"
    print(f"{Path(script).name}: {message}", file=sys.stderr)
    sys.exit(status)


# ------------------------ what it costs
def time_calls(calls, rounds=11):
    """{name: call} -> a cell for each: its time over the first one's in the same round, in which
    every call is timed once, in any order: median (quartiles), median time."""
    threads = torch.get_num_threads()
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name in np.random.permutation(list(calls)):
            timer = benchmark.Timer("f()", globals=dict(f=calls[name]), num_threads=threads)
            seconds[name].append(timer.timeit(1).mean)  # after two calls that warm up
    cells = []
    first = np.array(next(iter(seconds.values())))
    for times in seconds.values():
        low, middle, high = np.quantile(times / first, [0.25, 0.5, 0.75])
        cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f})\n{1000 * np.median(times):.1f} ms")
    return cells


def bench(args):
    """Time the attention sublayer in four ways, and a whole training step in two."""
    torch.set_float32_matmul_precision("high" if args.device == "cuda" else "highest")
    run, C, n_head = args.run, args.run.n_embd, args.run.n_head

    own = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    ways = {
        "torch's own": lambda x, w, b: merge_heads(own(*heads(x, w, b, n_head))),
        "vanilla": lambda x, w, b: myopic_attention(x, w, b, n_head, horizon=None),
        "myopic": lambda x, w, b: myopic_attention(x, w, b, n_head, horizon=0),
        "two streams": lambda x, w, b: two_stream_attention(x, x.detach(), w, b, n_head),
    }

    def forward_backward(way, leaves, dy):
        torch.autograd.grad(way(*leaves), leaves, dy)

    rows = []
    for T in (64, 256, 1024):
        B = max(1, run.batch_size * run.block_size // T)
        x, dy = torch.randn(2, B, T, C).to(args.device, getattr(torch, run.dtype))
        leaves = [x.requires_grad_(), *nn.Linear(C, 3 * C).to(x).parameters()]
        calls = {}
        for name, way in ways.items():
            calls[name] = functools.partial(forward_backward, way, leaves, dy)
        rows.append([f"sublayer\nT = {T}", *time_calls(calls)])

    xy = torch.randint(256, (2, run.batch_size, run.block_size), device=args.device)
    calls = {}
    for arm in ("vanilla", "myopic"):
        one_step = replace(run, arm=arm, max_iters=1)
        model = GPT(one_step.config(256, run.dropout)).to(args.device)
        optimizers = configure_optimizers(model, one_step)
        call = functools.partial(train, model, optimizers, lambda step: xy, one_step)
        calls[arm] = functools.partial(call, lambda steps, loss: None)
    rows.append([f"step\nT = {run.block_size}", "", *time_calls(calls), ""])
    caption = "time over the row's first in the same round: median (quartiles); median time"
    print_table(f"Forward and backward on {args.device}", ["", *ways], rows, caption)


# ------------------------ main
def flags(argv=None):
    data = dict(nargs="+", metavar="FILE", default=[], help="UTF-8 text (Python's own English)")
    cost = dict(action="store_true", help="only measure what the stop-gradient costs")
    args = parse_flags(__file__, __doc__, PRESETS, argv, [("--data", data), ("--bench", cost)])
    args.runs = all_runs(args, args.run, lambda channels: max(1, channels // 16))
    return args


def main(argv=None):
    """Train what is not recorded yet, print the table, draw; or measure what it costs."""
    with exit_status(__file__):
        args = flags(argv)
        if args.bench:
            bench(args)
            return
        train_part, held_part = load_text(args.data, args.run.block_size)
        print(f"text: {len(train_part):,} bytes to train on, {len(held_part):,} held out")
        split = f"{len(train_part)} ".encode()
        digest = hashlib.sha256(split + train_part + held_part).hexdigest()
        runs = [replace(run, data_sha256=digest) for run in args.runs]
        train_one = functools.partial(train_text, (train_part, held_part))
        report(train_missing(runs, train_one, "val_loss", args), args)


if __name__ == "__main__":
    main()
