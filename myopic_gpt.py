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

    python myopic_gpt.py --preset demo    # seconds; the gap: about half of the bigram's
    python myopic_gpt.py                  # English, three seeds: minutes on two cores
    python myopic_gpt.py --preset full    # four widths: hours of a core
    python myopic_gpt.py --arm vanilla myopic --n_layer 2 --n_head 0 --n_embd 16 32

Letters in shapes: B batch, T positions, C = n_embd channels, nh heads of size hs = C/nh, V tokens.
The gradient of the loss with respect to X is called dX and has X's shape.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import connection
from operator import attrgetter
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
from tqdm import tqdm

# ------------------------ arms and configuration
# An arm of a comparison is three fields; all else, the start and the batches included, is the same.
#   horizon  None: gradients travel freely; 0: not at all; h: h positions along each attention edge,
#            so n_layer * h in all: neither vanilla's gradient nor the myopic one, but in between
#   cut      when i reads k_j = W_K x_j, whose work is that?  "hidden": the reader's, so W_K and W_V
#            learn from every reader (the paper); "kv": the writer's, so they learn from near ones
#   past     keys and values of the past are made from the model's "own" states, from those of a
#            "frozen" trained vanilla model (LocalMyopicGPT), or are "zero"; the last two ignore
#            horizon and cut
ARMS = {
    "vanilla": dict(horizon=None, cut="hidden", past="own"),
    "myopic": dict(horizon=0, cut="hidden", past="own"),
    "myopic_kv": dict(horizon=0, cut="kv", past="own"),
    "local_myopic": dict(horizon=0, cut="hidden", past="frozen"),
    "bigram": dict(horizon=0, cut="hidden", past="zero"),
}
HORIZONS = [1, 2, 4, 9, 10, 16]
ARMS |= {f"horizon_{h}": dict(horizon=h, cut="hidden", past="own") for h in HORIZONS}


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
    """Torch's attention in a small graph of its own -> q, k, v, O, ready for autograd.grad."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    # A caller may have hooks on what a graph saves: checkpointing throws it away, to compute it
    # again. This graph must not fall under them, so it has hooks of its own, which keep it all, but
    # detached: O saved as it is would hold the graph that holds O, and nothing would be freed.
    hooks = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved)
    with torch.enable_grad(), hooks:
        return q, k, v, F.scaled_dot_product_attention(q, k, v, is_causal=True)


def mask_future(S):
    """Scores (..., T, T) -> the same, but -inf where j > i."""
    future = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).triu(1)  # (T, T)
    return S.masked_fill(future, -math.inf)


def log_sum_exp(q, k, out):
    """lse (B, nh, T): as the fused forward pass kept it for its own backward, or else computed."""
    for name in ("_saved_logsumexp", "_saved_log_sumexp"):  # of the flash kernel, of others
        if hasattr(out.grad_fn, name):  # some pad it, some add an axis of one
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

        # what every reader wants; the graph stays, for lse and for a second backward pass
        every = torch.autograd.grad(out, (q, k, v), G, retain_graph=True)
        dq, dk, dv = [merge_heads(d).flatten(0, 1) for d in every]  # (B T, C)

        # what the near ones want
        dk_near, dv_near = dk, dv
        if ctx.horizon is not None:
            near = near_gradients(G, q, k, v, out, log_sum_exp(q, k, out), ctx.horizon)
            dk_near, dv_near = [merge_heads(d).flatten(0, 1) for d in near]  # (B T, C)

        # the stop-gradient: a state of the past gets no loss but the near ones
        w_q, w_k, w_v = w.chunk(3)  # (C, C)
        dx = dq @ w_q + dk_near @ w_k + dv_near @ w_v  # (B T, C)

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
    horizon (T - 1 or more is None's), cut: see ARMS. Obeys autocast. Raises UsageError for a bad
    value, RuntimeError under create_graph=True; torch.func refuses it. Source: Wu, Morris, Levine
    (2024), section 3."""
    C = x.size(-1)
    shapes = [tuple(t.shape) for t in (x, w_qkv, b_qkv) if t is not None]
    fits = x.dim() == 3 and shapes[1:] in ([(3 * C, C)], [(3 * C, C), (3 * C,)])
    require(fits, f"x, w_qkv, b_qkv are {shapes}: make them (B, T, C), (3C, C), (3C,)")
    check_attention(C, n_head, horizon, cut)
    device = x.device.type
    has_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if has_autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, w_qkv = x.to(dtype), w_qkv.to(dtype)
        b_qkv = None if b_qkv is None else b_qkv.to(dtype)
    return MyopicAttention.apply(x, w_qkv, b_qkv, n_head, horizon, cut)


def two_stream_attention(q, k, v, k_past, v_past):
    """Attention to oneself as usual, and to a past that another stream of states has made.

    A = softmax_causal(s (q k_past^T, with its diagonal replaced by q.k))
    Y = A v_past + diag(A) (v - v_past)
    All (B, nh, T, hs). With k_past and v_past made of detached states, by the same weights, this
    is the textbook way to the myopic gradient (cut "hidden"): the same, at a higher price."""
    S = (q @ k_past.mT).diagonal_scatter((q * k).sum(-1), 0, -2, -1)  # (B, nh, T, T)
    A = mask_future(S / math.sqrt(q.size(-1))).softmax(-1)  # (B, nh, T, T)
    A_own = A.diagonal(0, -2, -1)[..., None]  # (B, nh, T, 1)
    return A @ v_past + A_own * (v - v_past)


# ------------------------ the model
class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.config = config

    def forward(self, x, past_x=None):  # past_x: the "frozen" states, in their place
        w, b, arm = self.c_attn.weight, self.c_attn.bias, self.config
        if arm.past == "own":  # vanilla, too, goes through the backward pass by hand
            y = myopic_attention(x, w, b, self.n_head, arm.horizon, arm.cut)  # (B, T, C)
        else:
            q, k, v = heads(x, w, b, self.n_head)  # (B, nh, T, hs)
            k_past, v_past = torch.zeros_like(k), torch.zeros_like(v)  # (B, nh, T, hs)
            if arm.past == "frozen":
                require(past_x is not None, "past is 'frozen': that takes a LocalMyopicGPT")
                _, k_past, v_past = heads(past_x, w, b, self.n_head)
            y = merge_heads(two_stream_attention(q, k, v, k_past, v_past))  # (B, T, C)
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
            logits = logits[:, -1].float() / temperature  # (B, V)
            if top_k is not None:
                best, tokens = logits.topk(min(top_k, logits.size(-1)))  # (B, top_k)
                logits = torch.full_like(logits, -math.inf).scatter(-1, tokens, best)
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
    is_horizon = horizon is None or (type(horizon) is int and horizon >= 0)
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


def load_text(files):
    """-> bytes to train on, bytes held out (the last tenth). Raises UsageError for a bad file."""
    texts = []
    for name in files:
        try:
            texts.append(Path(name).read_text("utf-8-sig"))
        except (OSError, ValueError) as error:
            raise UsageError(f"--data {name}: {error}; name a UTF-8 file") from error
    text = "\n\n".join(texts) if files else python_english()
    split = len(text) * 9 // 10  # or between the next paragraphs, if some end soon
    split = max(split, text.find("\n\n", split, split + len(text) // 100))
    return text[:split].encode(), text[split:].encode()


def windows_of(text, run, device):
    """Bytes -> each of their windows: (n, T + 1)."""
    n, T = len(text), run.block_size
    require(n > T, f"block_size is {T}: a part of the text has {n} bytes; make it less")
    tokens = torch.tensor(np.frombuffer(text, dtype=np.uint8), device=device)
    return tokens.unfold(0, T + 1, 1)


def without_dropout(measure):
    """A function of a model: the model evaluates meanwhile, and trains again if it did before."""

    @functools.wraps(measure)
    def measured(model, *args, **more):
        was_training = model.training
        model.eval()
        try:
            return measure(model, *args, **more)
        finally:
            model.train(was_training)

    return measured


@torch.no_grad()
@without_dropout
def token_losses(model, windows, count):
    """In nats, of `count` evenly spaced windows (n, T + 1) -> losses, y: (count, T)."""
    spaced = torch.linspace(0, len(windows) - 1, count, dtype=torch.float64).long()
    chosen = windows[spaced.to(windows.device)].long()  # (count, T + 1)
    at_once = max(1, 2**12 // windows.size(1))  # states that stay in a CPU's cache
    losses = []
    for part in chosen.split(at_once):
        state = model.hidden_states(part[:, :-1])[-1]  # (B, T, C)
        losses.append(model.position_losses(state, part[:, 1:]))
    return torch.cat(losses).cpu(), chosen[:, 1:].cpu()


# ------------------------ a run: every setting that a number depends on
def digest_of(*files):
    """8 hex digits of the SHA-256 of source files."""
    sources = b"".join(Path(name).read_bytes() for name in files)
    return hashlib.sha256(sources).hexdigest()[:8]


def setting(default, help, least=0, most=1e30, choices=None):
    """A field of a Run that is also a flag."""
    about = dict(help=help, least=least, most=most, choices=choices)
    return field(default=default, metadata=about)


@dataclass
class Run:
    """Its fields are settings. A finished run has the numbers of its record as attributes, too.

    Raises UsageError for a value that a field cannot have."""

    arm: str = setting("vanilla", "one of ARMS: see README", choices=ARMS)
    seed: int = setting(0, "of start and batches", most=2**32 - 1)
    block_size: int = setting(64, "positions per sequence, T", least=1)
    n_layer: int = setting(3, "blocks", least=1)
    n_head: int = setting(3, "heads; 0: one for each 16 channels", least=1)
    n_embd: int = setting(96, "channels, C", least=1)
    dropout: float = setting(0.0, "while training", most=0.99)
    batch_size: int = setting(16, "sequences per step", least=1)
    max_iters: int = setting(700, "steps", least=1)
    learning_rate: float = setting(8e-3, "AdamW's peak")
    beta1: float = setting(0.9, "AdamW's", most=0.9999)
    beta2: float = setting(0.95, "AdamW's", most=0.9999)
    weight_decay: float = setting(0.1, "AdamW's, of matrices and embeddings")
    muon: str = setting("all", "blocks' matrices: all, attn, none", choices=["all", "attn", "none"])
    muon_rate: float = setting(8e-3, "Muon's peak")
    muon_decay: float = setting(0.1, "Muon's weight decay")
    warmup: float = setting(0.05, "share of the steps in which the rates rise", most=1)
    decay_from: float = setting(0.5, "share of the steps after which they fall", most=1)
    grad_clip: float = setting(1.0, "largest norm of a gradient; 0: any")

    def __post_init__(self):
        if self.n_head == 0:  # resolved here, so that a record holds the number
            self.n_head = max(1, self.n_embd // 16)
        for f in fields(self):
            value, limits = getattr(self, f.name), f.metadata
            if f.type is not str:
                kind = "a whole number" if f.type is int else "a number"
                least, most = limits["least"], limits["most"]
                fits = isinstance(value, (int, f.type)) and least <= value <= most
                require(fits, f"{f.name} is {value}: give {kind} from {least} to {most:.10g}")
                setattr(self, f.name, f.type(value))  # equal runs have one name: 1 is 1.0
            elif limits:
                choices = ", ".join(limits["choices"])
                require(value in limits["choices"], f"{f.name} is {value!r}: choose from {choices}")
        self.config(1)  # refuses a bad shape

    def config(self, vocab_size):
        shape = self.block_size, vocab_size, self.n_layer, self.n_head, self.n_embd
        return GPTConfig(*shape, dropout=self.dropout, **ARMS[self.arm])

    @property
    def size(self):
        return f"{self.n_layer}x{self.n_embd}"

    def name(self):
        """Of its files. A digest of what differs from the defaults: a new field changes no name."""
        changed = {k: v for k, v in asdict(self).items() if v != getattr(type(self), k)}
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.kind}-{self.arm}-seed{self.seed}-{digest}"


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
    in bfloat16, which many CPUs only emulate: with AVX2 alone English takes three times as long."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, weight_decay = group["lr"], group["weight_decay"]
            for W in group["params"]:
                if W.grad is None:
                    continue
                if W not in self.state:
                    self.state[W]["momentum"] = torch.zeros_like(W)
                M = self.state[W]["momentum"].lerp_(W.grad, 0.05)
                U = orthogonalize(W.grad.lerp(M, 0.95))
                W.mul_(1 - lr * weight_decay)
                W.add_(U, alpha=-lr * 0.2 * math.sqrt(max(W.shape)))


def configure_optimizers(model, run):
    """[AdamW, Muon]. Muon: the blocks' matrices, all of them or attention's (run.muon); of
    AdamW's, matrices and embeddings decay, biases and norms do not."""
    by_muon, decaying, others = [], [], []
    for name, p in model.named_parameters():
        is_muons = dict(all=".h." in name, attn=".attn." in name, none=False)
        if p.dim() < 2:
            others.append(p)
        elif is_muons[run.muon]:
            by_muon.append(p)
        else:
            decaying.append(p)
    groups = [dict(params=decaying), dict(params=others, weight_decay=0)]
    rates = dict(lr=run.learning_rate, weight_decay=run.weight_decay)
    adamw = torch.optim.AdamW(groups, **rates, betas=(run.beta1, run.beta2), fused=True)
    groups = [dict(params=by_muon)]  # of none, too
    return [adamw, Muon(groups, lr=run.muon_rate, weight_decay=run.muon_decay)]


def train(model, run, next_batch, after_step, report_progress):
    """Train the model in place. next_batch(step) -> (x, y) on its device; model(x, y) -> (_, loss).

    after_step(steps done) is called after each, report_progress(steps since the last report, text)
    every ten. Raises UsageError if the loss is not finite. Leaves the model evaluating."""
    rise = run.warmup * run.max_iters
    fall = (1 - run.decay_from) * run.max_iters

    def scale(step):  # the rates rise, stay, and fall in a straight line
        return min(1, (step + 1) / max(1, rise), (run.max_iters - step) / max(1, fall))

    optimizers = configure_optimizers(model, run)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in optimizers]
    model.train()
    for done in range(1, run.max_iters + 1):
        x, y = next_batch(done - 1)
        _, loss = model(x, y)
        loss.backward()
        if run.grad_clip > 0:
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
    model.eval()


@contextlib.contextmanager
def one_thread(device="cpu"):
    """One thread: a run is the same on any number of cores, and small models are not slowed down.
    TF32 on a GPU."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


# ------------------------ the experiment: one model of English
@dataclass
class TextRun(Run):
    """A run on text, byte by byte; data_sha256 says what the text was, and where it was split."""

    kind = "text"  # how its files' names begin
    headline = "val_loss"  # the number to print when it ends
    code = digest_of(__file__)
    eval_windows: int = setting(256, "windows of held-out text that are evaluated", least=1)
    data_sha256: str = ""


FOUR_ARMS = ["vanilla", "myopic", "myopic_kv", "bigram"]
SMALL = dict(block_size=32, n_layer=2, n_head=2, n_embd=32)
WIDTHS = dict(n_embd=[16, 32, 64, 128], n_head=0)
PRESETS = {
    "demo": dict(arm=FOUR_ARMS, max_iters=400, learning_rate=1.5e-2, muon_rate=1.5e-2) | SMALL,
    "quick": dict(arm=FOUR_ARMS, seed=[0, 1, 2]),
    "full": dict(arm=FOUR_ARMS, seed=[0, 1, 2], max_iters=3000) | WIDTHS,
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
    windows, held_out = [windows_of(part, run, device) for part in text]  # (n, T + 1), (m, T + 1)
    n = max(1, min(32, 2048 // run.block_size))  # no more memory than training takes
    few = held_out[:: 1 + len(held_out) // n].long()  # (n or less, T + 1)

    # every arm has the same weights at the start, and the same batches
    config = run.config(vocab_size=256)
    if config.past == "frozen":  # the teacher: a vanilla model of the same seed and settings
        vanilla = replace(run, arm="vanilla")
        teacher, _, _ = train_text(text, vanilla, device, lambda _, now: report_progress(0, now))
    torch.manual_seed(run.seed)
    model = LocalMyopicGPT(config, teacher) if config.past == "frozen" else GPT(config)
    model.to(device)
    generator = torch.Generator().manual_seed(run.seed)
    curve, lag_share = [], {}

    def next_batch(step):
        starts = torch.randint(len(windows), (run.batch_size,), generator=generator)
        chosen = windows[starts.to(device)].long()  # (B, T + 1)
        return chosen[:, :-1], chosen[:, 1:]

    def after_step(done):
        if done % max(1, run.max_iters // 10) == 0 or done == run.max_iters:
            few_windows = min(64, run.eval_windows)  # enough for what no table shows
            train_losses, _ = token_losses(model, windows, few_windows)
            val_losses, _ = token_losses(model, held_out, run.eval_windows)
            curve.append([done, train_losses.mean().item(), val_losses.mean().item()])

    if run.arm == "vanilla":
        lag_share["start"] = lag_shares(model, few[:, :-1], few[:, 1:])
    train(model, run, next_batch, after_step, report_progress)
    require(np.isfinite(curve).all(), f"{run.arm}: a loss is not finite: lower --learning_rate")
    if run.arm == "vanilla":
        lag_share["end"] = lag_shares(model, few[:, :-1], few[:, 1:])

    # what is kept of it
    losses, y = token_losses(model, held_out, run.eval_windows)  # (N, T) each
    sample = model.generate(held_out[:1, :10].long(), 40, top_k=50)[0].tolist()
    numbers = dict(
        val_loss=losses.mean().item(),
        train_loss=curve[-1][1],
        curve=curve,
        loss_by_position=losses.mean(0).tolist(),
        lag_share=lag_share,
        sample=bytes(sample).decode(errors="replace"),
    )
    return model, numbers, dict(losses=losses[:64].numpy(), y=y[:64].numpy().astype(np.uint8))


# ------------------------ instruments: whom the gradient serves, in any GPT
@without_dropout
def gradient_tables(model, x, y):
    """(L + 1, T, T): table l is of the state after l blocks, 0 the embedding.

    Entry (i, j): root mean square, over sequences and channels, of the gradient of the loss at i
    with respect to the state at j. One backward pass per row."""
    states = model.hidden_states(x)
    losses = model.position_losses(states[-1], y)  # (B, T)
    rows = []
    for i in range(x.size(1)):
        d_states = torch.autograd.grad(losses[:, i].sum(), states, retain_graph=True)
        rows.append(torch.stack(d_states).square().mean((1, 3)).sqrt())  # (L + 1, T)
    return torch.stack(rows, dim=1).cpu().numpy()


def weight_gradients(d_kv, x):
    """dk and dv of the first T - lag writers, each (B, nh, T - lag, hs), and x (B, T, C) -> dW_K
    and dW_V (2, C, C)."""
    writers = x[:, : d_kv[0].size(2)].flatten(0, 1).float()  # (B (T - lag), C)
    return torch.stack([merge_heads(d).flatten(0, 1).float().T @ writers for d in d_kv])


@without_dropout
def lag_shares(model, x, y):
    """How much of the gradient of a vanilla model's W_K and W_V comes from readers `lag` later.

    -> [layer][0: W_K, 1: W_V][lag]: <g_lag, g> / |g|^2. The g_lag add up to g, the gradient of the
    mean loss; so the shares of all lags add up to 1."""
    is_vanilla = model.config.horizon is None and model.config.past == "own"
    require(is_vanilla, "the split by lag is of all readers: give it a vanilla model")
    states = model.hidden_states(x)
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
        (G,) = torch.autograd.grad(state, out, d_next)

        # the gradients of W_K and W_V, then their parts: what the readers `lag` later want
        lse = log_sum_exp(q, k, out)
        tensors = [t.detach().to(lse.dtype) for t in (G, q, k, v, out)]
        whole = weight_gradients(torch.autograd.grad(out, (k, v), G), x_l)  # (2, C, C)
        shares = []
        for lag in range(x.size(1)):
            part = weight_gradients(lag_gradients(lag, *tensors, lse), x_l)  # (2, C, C)
            share = (part * whole).sum((1, 2)) / (whole.square().sum((1, 2)) + 1e-30)  # (2,)
            shares.append(share.tolist())
        layers.append(np.round(shares, 4).T.tolist())
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
SHADES = ["#bddf26", "#5ec962", "#21918c", "#31688e", "#443983", "#440154"]  # light to dark
LOOKS |= {f"horizon_{h}": (c, "-", m) for h, c, m in zip(HORIZONS, SHADES, "PXdp*h")}


def group_by(runs, *names):
    """{values of these attributes: the runs that share them}, in the order of the runs."""
    groups = {}
    for run in runs:
        groups.setdefault(attrgetter(*names)(run), []).append(run)
    return groups


def comparisons(runs):
    """Lists of runs that differ in arm and seed alone."""
    names = {f.name for f in fields(runs[0])} - {"arm", "seed"}
    return list(group_by(runs, *names).values())


def extra_settings(runs, *columns):
    """Names of settings that vary where the columns of a table do not: each gets a column, too."""
    columns = *columns, "arm", "seed"
    count = len(group_by(runs, *columns))
    return [f.name for f in fields(runs[0]) if len(group_by(runs, *columns, f.name)) > count]


def case_of(run, extra):
    """'3x96, learning_rate 0.01': which of several comparisons."""
    return ", ".join([run.size, *(f"{name} {getattr(run, name)}" for name in extra)])


def mean_sd(values, digits=3):
    """'0.210 ± 0.020': mean and standard deviation over seeds."""
    if len(values) == 0:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def print_table(title, header, rows):
    table = Table(
        title=title, box=None, collapse_padding=True, pad_edge=False, title_justify="left"
    )
    for name in header:
        table.add_column(name, overflow="fold")  # a narrow terminal must not cut a number
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 120
    Console(width=width, markup=False, emoji=False, highlight=False).print("", table)


def draw_arm(ax, arm, x, of_seeds):
    """of_seeds: the y of each seed. Their mean is a line, from the least to the most a band."""
    colour, line, marker = LOOKS[arm]
    y = np.array(of_seeds)  # (seeds, len(x))
    style = dict(linestyle=line, marker=marker, markersize=3.5, color=colour)
    ax.plot(x, y.mean(0), label=GLOSS.get(arm, arm), **style)
    ax.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.2, linewidth=0)
    ax.legend(frameon=False, labelcolor="linecolor", fontsize=8)


def seeds_of(runs):
    n = len({run.seed for run in runs})
    return "one seed" if n == 1 else f"mean and range of {n} seeds"


def save_figure(path, fig, caption):
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.supxlabel(caption, fontsize=8, color="#444444")
    write_whole(path, lambda part: fig.savefig(part, dpi=120))


@one_thread()
@matplotlib.style.context("default")  # a user's own settings, such as text.usetex, have no say
def draw(plot, path, *data):
    """plot(path, *data), or say why not and delete an old figure, which would pass for new."""
    try:
        plot(path, *data)
        print(f"figure {path}")
    except UsageError as error:
        with contextlib.suppress(OSError):  # it is not there, or the folder is read-only
            path.unlink()
        print(f"no {path.name}: {error}")


def plot_lags(path, runs, readers, last):
    """Whom W_V of vanilla's last layer serves, by lag; in words: the readers, up to lag `last`."""
    runs = [run for run in runs if run.arm == "vanilla"]
    require(runs, "it takes vanilla")
    T = runs[0].block_size
    trained = [run.lag_share["end"][-1][1] for run in runs]  # (seeds, T)
    by_count = (T - np.arange(T)) / (T * (T + 1) / 2)  # (T,) T - lag pairs are `lag` apart

    fig = Figure(figsize=(7, 3.2), layout="constrained")
    ax = fig.subplots()
    ax.plot(by_count, "k--", linewidth=1, label="if all pairs weighed the same")
    draw_arm(ax, "untrained", range(T), [run.lag_share["start"][-1][1] for run in runs])
    draw_arm(ax, "vanilla", range(T), trained)
    ax.set(xlabel="lag: reader − writer", ylabel="share of W_V's gradient", xlim=(-0.5, T / 2))
    ax.locator_params(axis="x", integer=True)
    share = mean_sd([100 * sum(of_seed[1 : last + 1]) for of_seed in trained], 0)
    counted = f"{100 * by_count[1 : last + 1].sum():.0f} % if all pairs weighed the same"
    fig.suptitle(f"{readers}: {share} % of the last layer's W_V gradient\n({counted})", fontsize=11)
    size = f"{runs[0].kind} {runs[0].size}, T = {T}; {seeds_of(runs)}"
    save_figure(path, fig, f"vanilla; shares add up to 1, and may be negative; {size}")


# ------------------------ figures and table of English
def gaps(runs, arm, key="val_loss"):
    """{seed: the arm's number - vanilla's}, of runs of one size, where there are both."""
    own = {run.seed: getattr(run, key) for run in runs if run.arm == arm}
    vanilla = {run.seed: getattr(run, key) for run in runs if run.arm == "vanilla"}
    return {seed: np.subtract(own[seed], vanilla[seed]) for seed in own if seed in vanilla}


def shares_of_bigram(runs, arm):
    """The arm's gap in % of the bigram's of the same seed, unless that is below 0.1 nats: noise."""
    own, bigram = gaps(runs, arm), gaps(runs, "bigram")
    return [100 * own[seed] / bigram[seed] for seed in own if bigram.get(seed, 0) > 0.1]


def steps_needed(runs, arm):
    """In % of the steps: when vanilla of the same seed comes to the arm's last loss, by its curve;
    [] if it does not. A curve begins after a tenth of the steps."""
    vanilla, needed = {run.seed: run for run in runs if run.arm == "vanilla"}, []
    for run in runs:
        if run.arm == arm and run.seed in vanilla:
            steps, _, losses = np.transpose(vanilla[run.seed].curve)
            best = np.minimum.accumulate(losses)
            if run.val_loss < best[-1]:
                return []
            needed.append(100 * np.interp(-run.val_loss, -best, steps) / steps[-1])
    return needed


def plot_gaps(path, runs):
    """The arms' gaps while training, and by position in bins that double: 0, 1, 2-3, 4-7, ..."""
    # the bins, and when the curves were measured
    run, T = runs[0], runs[0].block_size
    starts = [0, *2 ** np.arange((T - 1).bit_length())]
    widths = np.diff([*starts, T])
    steps = [point[0] for point in run.curve]

    # a line for each arm
    fig = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = fig.subplots(1, 2, sharey=True)
    for ax in (left, right):
        ax.axhline(0, color=LOOKS["vanilla"][0], label="vanilla")
    ends = []
    for arm in group_by(runs, "arm"):
        at_end = list(gaps(runs, arm).values())
        if arm != "vanilla" and at_end:
            curves = gaps(runs, arm, "curve").values()  # each (points, 3)
            positions = gaps(runs, arm, "loss_by_position").values()  # each (T,)
            draw_arm(left, arm, steps, [curve[:, 2] for curve in curves])
            bins = [np.add.reduceat(gap, starts) / widths for gap in positions]
            draw_arm(right, arm, range(len(starts)), bins)
            ends.append(f"{arm} {mean_sd(at_end, 2)}")
    require(ends, "it takes vanilla and another arm of the same seed")
    left.set(title="while training", xlabel="training steps", ylabel="loss − vanilla's (nats)")
    right.set(title="by position, in bins that double", xlabel="position in the window, from")
    right.set_xticks(range(len(starts)), starts)
    right.get_legend().remove()  # as on the left
    fig.suptitle(f"The gap at the end: {', '.join(ends)} nats", fontsize=10)
    caption = f"{run.size}, {run.max_iters} steps of {run.batch_size} × {T} bytes; {seeds_of(runs)}"
    save_figure(path, fig, caption)


def plot_sizes(path, runs):
    """Myopia's share of what context is worth, against size; a line joins a depth's models."""
    fig = Figure(figsize=(7, 3.4), layout="constrained")
    ax = fig.subplots()
    lines, ticks, ends = {}, {}, []
    require(len(comparisons(runs)) > 1, "it takes several sizes")
    for group in comparisons(runs):  # the smallest first
        run, shares = group[0], shares_of_bigram(group, "myopic")
        require(shares, f"{run.size} has no share of the bigram's gap")
        ax.plot([run.n_params] * len(shares), shares, "k.", markersize=4)  # the seeds
        lines.setdefault(run.n_layer, []).append((run.n_params, np.mean(shares)))
        ticks[run.n_params] = f"{run.size}\n{run.n_params / 1000:.0f}k"
        ends.append(f"{mean_sd(shares, 1)} % at {run.size}")
    for (depth, points), style in zip(lines.items(), itertools.cycle(["o-", "s--", "^:", "v-."])):
        ax.plot(*zip(*points), style, color="#666666", label=f"layers: {depth}")
    ax.axhline(0, color="#999999", linewidth=0.8)
    ax.set(xscale="log", xlabel="layers x channels, parameters", ylabel="gap, % of bigram's")
    ax.set_xticks(list(ticks), list(ticks.values()), fontsize=7)
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)
    fig.suptitle(f"Of what context is worth, myopia costs {ends[0]}, {ends[-1]}", fontsize=11)
    steps = f"{run.max_iters} steps of {run.batch_size} × {run.block_size} bytes"
    save_figure(path, fig, f"{steps}; dots: seeds, lines: a depth's means")


COLUMNS = ["size", "params", "training", "seeds", "loss", "gap", "% of bigram", "needs"]


def table_rows(runs, extra=()):
    """-> a row for each comparison and arm: the extra settings, then COLUMNS."""
    rows = []
    for of_case in comparisons(runs):
        for arm, group in group_by(of_case, "arm").items():
            row = [f"{getattr(group[0], name)}" for name in extra]
            row += [group[0].size, f"{group[0].n_params:,}", arm, f"{len(group)}"]
            row.append(mean_sd([run.val_loss for run in group]))
            row.append(mean_sd(list(gaps(of_case, arm).values())))
            row.append(mean_sd(shares_of_bigram(of_case, arm), 1))
            row.append(mean_sd(steps_needed(of_case, arm), 0))
            rows.append(row)
    return rows


def report(runs, folder):
    """The table; then the figures, of the largest model; then the result in a sentence."""
    runs = sorted(runs, key=attrgetter("n_params"))
    extra = extra_settings(runs, "size")
    print_table("Text, nats per byte", [*extra, *COLUMNS], table_rows(runs, extra))
    print("gap: loss − vanilla's of the same seed; needs: % of its steps that vanilla needs for it")
    *_, largest = comparisons(runs)
    for arm, group in group_by(largest, "arm").items():
        print(f"{arm} writes:", "".join(c if c.isprintable() else " " for c in group[0].sample))

    case = case_of(largest[0], extra)
    print(f"figures of {case}:")
    draw(plot_gaps, folder / "text_gaps.png", largest)
    draw(plot_lags, folder / "text_lags.png", largest, "All later readers", largest[0].block_size)
    settings = "kind", *extra  # in which the models of a line do not differ
    sizes = group_by(runs, *settings)[attrgetter(*settings)(largest[0])]
    draw(plot_sizes, folder / "text_size.png", sizes)
    shares = shares_of_bigram(largest, "myopic")
    if shares:
        cost = f"{mean_sd(shares, 1)} % of what context is worth"
        print(f"{case}: myopic training loses {cost}: the gap in % of bigram's.")
    if (folder / "text_gaps.png").exists():
        print(f"Open {folder / 'text_gaps.png'} first.")


# ------------------------ from here on: running many of them
def write_whole(path, write):
    """write(a temporary path), then rename: the file at `path` is whole or not there. Raises
    UsageError if it cannot be written."""
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        write(part)
        part.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: {error}; make room, or name another --out_dir") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def read_runs(out_dir, run_class):
    """{name: finished run} of all the runs of a class, TextRun or SineRun, that a folder holds.

    A file counts only under its run's name: one with other defaults, or with a setting that is no
    more, is none. Raises UsageError for a file that is no record."""
    found = {}
    for path in sorted(Path(out_dir, "runs").glob(f"{run_class.kind}-*.json")):
        run = run_class()
        try:
            vars(run).update(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{path}: {error}; delete it, and the run is repeated") from error
        run.npz = path.with_suffix(".npz")
        if run.name() == path.stem:
            found[path.stem] = run
    return found


def read_arrays(run):
    """{name: array} of a finished run, weights included. Raises UsageError if they are not there:
    those of the first seed of a command are kept, not the others'."""
    try:
        with np.load(run.npz) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"it takes what is kept of {run.npz.stem}: {error}") from error


def load_weights(model, run):
    """Put what is kept of a finished run's weights into a model of its shape -> the model."""
    arrays = read_arrays(run)
    for name, weight in model.state_dict().items():
        weight.copy_(torch.from_numpy(arrays[f"weights.{name}"]))
    return model.eval()


def train_run(train_one, args, run, report_progress):
    """Train one run and write its files -> a line that says how it ended."""
    start = time.time()
    with one_thread(args.device):
        model, numbers, arrays = train_one(run, args.device, report_progress)

    machine = platform.machine()
    if args.device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, TF32"
    made_by = dict(device=f"{args.device} {machine}", torch=torch.__version__, code=run.code)
    made_by["n_params"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    made_by["seconds"] = round(time.time() - start, 1)
    record = json.dumps(asdict(run) | made_by | numbers, allow_nan=False)

    # the record's presence means done, so it comes last
    path = args.out_dir / "runs" / f"{run.name()}.npz"
    for file in (path.with_suffix(".json"), path):  # an earlier training's
        file.unlink(missing_ok=True)
    if run.seed == args.kept_seed:
        for name, weight in model.state_dict().items():
            arrays[f"weights.{name}"] = weight.half().cpu().numpy()
        write_whole(path, lambda part: np.savez_compressed(part, **arrays))
    write_whole(path.with_suffix(".json"), lambda part: part.write_text(record, "utf-8"))
    return f"{run.arm:>12}, seed {run.seed}: {run.headline} {numbers[run.headline]:.3f}"


def work(train_one, args, pipe):
    """A worker: it trains the runs that come through the pipe, and sends back what is to be said,
    until the parent closes it or is no more."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            run = pipe.recv()
            try:
                pipe.send(train_run(train_one, args, run, lambda *progress: pipe.send(progress)))
            except UsageError as error:
                pipe.send(error)


def train_side_by_side(train_one, args, runs, report_progress):
    """Train args.jobs runs at once, in processes; yield the line of each as it ends."""
    context = multiprocessing.get_context("spawn")
    waiting, workers = runs[args.jobs :], {}
    try:
        for run in runs[: args.jobs]:
            pipe, end = context.Pipe()
            worker = context.Process(target=work, args=(train_one, args, end), daemon=True)
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            worker.start()  # it inherits that Ctrl-C is not for it
            signal.signal(signal.SIGINT, handler)
            end.close()  # here, so that the pipe ends with the worker
            workers[pipe] = worker
            pipe.send(run)
        while workers:
            for pipe in connection.wait(list(workers)):
                message = pipe.recv()
                if isinstance(message, UsageError):
                    raise message
                if isinstance(message, tuple):
                    report_progress(*message)
                    continue
                yield message
                if waiting:
                    pipe.send(waiting.pop(0))
                else:
                    del workers[pipe]
                    pipe.close()
    except (EOFError, ConnectionError):
        sys.exit("error: a worker ended: see above, or, for its memory, try a smaller --jobs")
    finally:  # after an error or Ctrl-C, too: nobody waits for the others
        for worker in workers.values():
            worker.kill()


def train_missing(train_one, runs, args):
    """Train the runs that have no record yet -> all of `runs` that have one, in that order.

    train_one(run, device, report_progress) -> model, numbers of the record, arrays."""
    found = read_runs(args.out_dir, type(runs[0]))
    todo = [run for run in runs if args.fresh or run.name() not in found]
    todo.sort(key=attrgetter("seed"))  # an interruption leaves comparisons, not an arm alone
    if args.plot_only:
        todo = []
    recorded = sum(run.name() in found for run in runs)
    print(f"{args.out_dir}: {recorded} of {len(runs)} runs are recorded, {len(todo)} to train")

    if todo:
        folder = args.out_dir / "runs"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        require(os.access(folder, os.W_OK), f"--out_dir {args.out_dir}: name a folder to write to")
        args.kept_seed = runs[0].seed  # whose arrays are kept
        with tqdm(total=sum(run.max_iters for run in todo), leave=False) as bar:

            def report_progress(steps, text):
                bar.set_postfix_str(text, refresh=False)
                bar.update(steps)

            if args.jobs == 1 or len(todo) == 1:
                ended = (train_run(train_one, args, run, report_progress) for run in todo)
            else:
                ended = train_side_by_side(train_one, args, todo, report_progress)
            for line in ended:
                bar.write(line)
        found = read_runs(args.out_dir, type(runs[0]))

    finished = [found[run.name()] for run in runs if run.name() in found]
    require(finished, f"{args.out_dir}: none of these runs: leave out --plot_only")
    if any(run.code != type(run).code for run in finished):  # the record's, and today's
        print("some were made by other code and are used as they are; --fresh repeats them")
    return finished


# ------------------------ command line
def parse_flags(doc, run_class, presets, argv, more):
    """Every setting of a run is a flag of one or more values -> args, and the runs: all their
    combinations, each once.

    presets: {name: {setting: value or list of values}}; more: {flag: what argparse takes}."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that an error is one line
        add_help=False,  # until all flags are there
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    sizes = "demo: seconds; quick: a laptop (default); full: a GPU"
    add("--preset", choices=presets, default="quick", help=sizes)
    devices = [name for name in ("cuda", "cpu", "mps") if getattr(torch, name).is_available()]
    add("--device", choices=devices, default=devices[0], help="CUDA if there is one, or the CPU")
    given, _ = parser.parse_known_args(argv)  # the defaults of others depend on these two

    cores = min(61, torch.get_num_threads()) if given.device == "cpu" else 1
    add("--jobs", type=int, default=cores, help="runs side by side (CPU cores; on a GPU 1)")
    folder = Path("out", given.preset)
    add("--out_dir", type=Path, default=folder, help="for results and figures (out/<preset>)")
    add("--fresh", action="store_true", help="train recorded runs again")
    add("--plot_only", action="store_true", help="train nothing, draw what is recorded")
    add("-h", "--help", action="help", help="show this help message and exit")
    for flag, how in more.items():
        add(flag, **how)
    lines = ["settings, each a flag of one or more values; the runs are all combinations:"]
    for f in fields(run_class):
        if f.metadata:
            # a flag overrides the preset, and the preset the class's default
            values = presets[given.preset].get(f.name, f.default)
            if not isinstance(values, list):
                values = [values]
            add(f"--{f.name}", type=f.type, nargs="+", default=values, help=argparse.SUPPRESS)
            lines.append(f"  --{f.name:<15} {f.metadata['help']} ({' '.join(map(str, values))})")
    parser.epilog = "\n".join(lines)
    words = (doc or "").splitlines()  # python -OO has no docstrings
    parser.description = "\n".join(line for line in words if line.startswith("    python "))
    args = parser.parse_args(argv)
    require(1 <= args.jobs <= 61, f"jobs is {args.jobs}: give a number from 1 to 61")

    values = [getattr(args, f.name, [f.default]) for f in fields(run_class)]
    runs = [run_class(*combination) for combination in itertools.product(*values)]
    return args, list({run.name(): run for run in runs}.values())


@contextlib.contextmanager
def no_traceback():
    """Bad input ends the command with a line and status 2, Ctrl-C with a line and 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a letter that a console lacks must not end a run
            stream.reconfigure(errors="replace")
    try:
        yield
    except UsageError as error:
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; without --fresh the same command goes on", file=sys.stderr)
        sys.exit(130)


# ------------------------ main
def flags(argv=None):
    """Words of a command line -> args, runs."""
    data = dict(nargs="+", metavar="FILE", default=[], help="UTF-8 text (Python's own English)")
    return parse_flags(__doc__, TextRun, PRESETS, argv, {"--data": data})


@no_traceback()
def main(argv=None):
    """Train what is not recorded yet, print the table, draw."""
    args, runs = flags(argv)
    text = train_part, held_part = load_text(args.data)
    print(f"text: {len(train_part):,} bytes to train on, {len(held_part):,} held out")
    split = f"{len(train_part)} ".encode()
    digest = hashlib.sha256(split + train_part + held_part).hexdigest()
    runs = [replace(run, data_sha256=digest) for run in runs]
    report(train_missing(functools.partial(train_text, text), runs, args), args.out_dir)


if __name__ == "__main__":
    main()
