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
is that? The reader's, i, in the paper (cut="hidden"); the writer's, j, elsewhere (cut="kv"). Either
way nothing goes from i to x_j: only dW_K, dW_V differ. Wu, Morris, Levine (2024), arXiv 2404.00859.

    python myopic_gpt.py                        # five arms on the English that ships with Python
    python myopic_gpt.py --init_from ckpt.pt --data data/ --arms vanilla myopic --learning_rate 1e-4
    python myopic_gpt.py --sample "The "        # write text with the trained vanilla model

Letters in shapes: B batch, T positions, C = n_embd channels, nh heads of size hs = C/nh, V tokens.
The gradient of the loss with respect to X is called dX and has X's shape.
"""
import argparse
import ast
import collections
import functools
import hashlib
import json
import math
import platform
import random
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich import console, table
from tqdm import tqdm

# ------------------------ configuration
# An arm of a comparison is three fields; everything else, weights and batches included, is shared.
#   horizon  None: gradients travel freely. h: at most h positions along each attention edge
#   cut      "hidden": between x_j and k_j, v_j, so W_K and W_V learn from every reader (the paper);
#            "kv": at k_j, v_j themselves, so W_K and W_V learn from their own position alone
#   past     keys and values of the past are made from the model's "own" states, from those of a
#            "frozen" trained vanilla model, or are "zero"; the last two ignore horizon and cut
ARMS = {
    "vanilla":      dict(horizon=None, cut="hidden", past="own"),
    "myopic":       dict(horizon=0, cut="hidden", past="own"),
    "myopic_kv":    dict(horizon=0, cut="kv", past="own"),
    "local_myopic": dict(horizon=0, cut="hidden", past="frozen"),
    "bigram":       dict(horizon=0, cut="hidden", past="zero"),
}


class Refusal(ValueError):
    """Bad input. The message names the value and the mend; main() prints it and exits with 2."""


@dataclass
class GPTConfig:
    """nanoGPT's seven fields and the arm's three: see ARMS.
    A horizon h > 0 is neither gradient of the definition but a road between the two: over n_layer
    layers a gradient may travel n_layer * h positions. h >= T - 1 is the same as None."""
    block_size: int = 64
    vocab_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = True
    horizon: int | None = None
    cut: str = "hidden"
    past: str = "own"

    def __post_init__(self):
        for name, good, mend in (
                *((name, getattr(self, name) >= 1, "at least 1") for name in (
                    "block_size", "vocab_size", "n_layer", "n_head", "n_embd")),
                ("n_embd", self.n_embd % (self.n_head or 1) == 0, f"a multiple of {self.n_head}"),
                ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
                ("horizon", self.horizon is None or self.horizon >= 0, "None, 0 or more"),
                ("cut", self.cut in ("hidden", "kv"), "'hidden' or 'kv'"),
                ("past", self.past in ("own", "frozen", "zero"), "'own', 'frozen' or 'zero'")):
            if not good:
                raise Refusal(f"{name} is {getattr(self, name)!r}: make it {mend}")


# ------------------------ two primitives
# All that the backward pass needs from attention: here as plain matrix products, to be read. After
# the model stand their fused twins, which never build the (T, T) matrix.

def plain_forward(q, k, v):
    """S = q k^T / sqrt(hs), P = softmax_causal(S), out = P v; lse_i = log sum_{j<=i} exp S_ij.
    q, k, v (B, nh, T, hs) -> out (B, nh, T, hs), lse (B, nh, T), in float32 at least."""
    S = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.size(-1))
    S = S.masked_fill(torch.ones_like(S[0, 0], dtype=torch.bool).triu(1), -math.inf)  # (.., T, T)
    lse = S.logsumexp(-1)                                                       # (B, nh, T)
    return (S - lse[..., None]).exp().to(v.dtype) @ v, lse


def plain_backward(dout, q, k, v, out, lse):
    """dS_ij = P_ij (G_i.v_j - G_i.out_i), G = dout; then dq = s dS k, dk = s dS^T q, dv = P^T G.
    All (B, nh, T, hs) but lse (B, nh, T) -> dq, dk, dv."""
    s = 1 / math.sqrt(q.size(-1))
    S = s * (q @ k.mT).to(lse.dtype)                                            # (B, nh, T, T)
    P = (S - lse[..., None]).exp().tril()                                       # (B, nh, T, T)
    dS = P * (dout @ v.mT - rowdot(dout, out)[..., None])                       # (B, nh, T, T)
    P, dS = P.to(q.dtype), (s * dS).to(q.dtype)
    return dS @ k, dS.mT @ q, P.mT @ dout                                       # (B, nh, T, hs)


def rowdot(a, b):
    """a_i . b_i for every row: (B, nh, T, hs) twice -> (B, nh, T), in float32 at least."""
    return (a.to(torch.promote_types(a.dtype, torch.float32)) * b).sum(-1)


def split_heads(qkv, n_head):
    """(B, T, 3C) -> q, k, v, each (B, nh, T, hs): views, nothing is copied."""
    return qkv.unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(*heads):
    """n tensors (B, nh, T, hs) -> (B, T, nC): the inverse of split_heads."""
    return torch.cat([t.transpose(1, 2).flatten(2) for t in heads], dim=-1)


# ------------------------ the myopic backward
def write_heard(dk, dv, G, q, k, v, out, lse, horizon):
    """Overwrite dk, dv with what x_j hears: the sums over readers i with 0 <= i - j <= horizon.

        P_ij = exp(s q_i.k_j - lse_i)         dS_ij = P_ij (G_i.v_j - G_i.out_i)
        dk^h_j = s sum_i dS_ij q_i            dv^h_j = sum_i P_ij G_i

    One shifted diagonal per lag i - j and no (T, T) matrix: horizon 0 is a few sweeps over q.
    All (B, nh, T, hs), G the gradient of out, but lse (B, nh, T or more: one kernel pads it)."""
    T, s = q.size(2), 1 / math.sqrt(q.size(-1))
    G_dot_out = rowdot(G, out)                                                  # (B, nh, T)
    dk.zero_(), dv.zero_()
    for lag in range(min(horizon, T - 1) + 1):
        i, j = slice(lag, T), slice(0, T - lag)             # readers; writers, lag before them
        q_i, G_i, k_j, v_j = q[:, :, i], G[:, :, i], k[:, :, j], v[:, :, j]
        P = (s * rowdot(q_i, k_j) - lse[:, :, i]).exp()                         # (B, nh, T - lag)
        dS = P * (rowdot(G_i, v_j) - G_dot_out[:, :, i])                        # (B, nh, T - lag)
        dk[:, :, j].addcmul_((s * dS).to(q.dtype)[..., None], q_i)
        dv[:, :, j].addcmul_(P.to(q.dtype)[..., None], G_i)


class MyopicAttention(torch.autograd.Function):
    """Causal self-attention whose past cannot hear the future; the backward pass is by hand."""

    @staticmethod
    def forward(ctx, x, w, b, n_head, horizon, cut, fused):
        qkv = F.linear(x, w, b)                                                 # (B, T, 3C)
        q, k, v = split_heads(qkv, n_head)                                      # (B, nh, T, hs)
        out, lse = (fused_forward if fused else plain_forward)(q, k, v)
        ctx.save_for_backward(x, w, qkv, out, lse)
        ctx.n_head, ctx.horizon, ctx.cut, ctx.fused = n_head, horizon, cut, fused
        return merge_heads(out)                                                 # (B, T, C)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():     # create_graph; once_differentiable is silent for y.sum()
            raise RuntimeError("myopic_attention has no second derivative: leave out create_graph")
        x, w, qkv, out, lse = ctx.saved_tensors
        q, k, v = split_heads(qkv, ctx.n_head)                                  # (B, nh, T, hs)
        G = dy.unflatten(-1, (ctx.n_head, -1)).transpose(1, 2)                  # (B, nh, T, hs)

        # q_j hears its own position; k_j and v_j hear every reader of j
        dqkv = merge_heads(*(fused_backward if ctx.fused else plain_backward)(
            G, q, k, v, out, lse))                                              # (B, T, 3C)

        def learn():                    # the gradient of the weights from dqkv as it stands
            db = dqkv.sum((0, 1)) if ctx.needs_input_grad[2] else None          # (3C,)
            return dqkv.flatten(0, 1).T @ x.flatten(0, 1), db                   # (3C, C)
        if ctx.cut == "hidden":         # W_K and W_V are the reader's: they learn from everyone
            dw, db = learn()
        if ctx.horizon is not None:     # the stop-gradient: dk, dv of the near readers alone
            _, dk, dv = split_heads(dqkv, ctx.n_head)       # views: dqkv itself is overwritten
            write_heard(dk, dv, G, q, k, v, out, lse, ctx.horizon)
        if ctx.cut == "kv":             # W_K and W_V are the writer's: they learn what x_j hears
            dw, db = learn()
        return dqkv @ w, dw, db, None, None, None, None


def myopic_attention(x, w_qkv, b_qkv, n_head, horizon=0, cut="hidden"):
    """Causal multi-head self-attention, up to its out-projection, with a myopic backward pass.

    x (B, T, C); w_qkv (3C, C), b_qkv (3C,) or None, rows in the order q, k, v -> (B, T, C).
    horizon, cut: see ARMS, GPTConfig. Obeys autocast. Raises Refusal for a bad value,
    RuntimeError under create_graph=True. Source: Wu, Morris, Levine (2024), section 3."""
    GPTConfig(n_head=n_head, n_embd=x.size(-1), horizon=horizon, cut=cut)       # refuses bad values
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        x, w_qkv, b_qkv = (None if t is None else t.to(low) for t in (x, w_qkv, b_qkv))
    fused = fused_serves(kind, x.dtype, x.size(-1) // n_head)
    return MyopicAttention.apply(x, w_qkv, b_qkv, n_head, horizon, cut, fused)


# ------------------------ the model
class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, teacher_x=None):
        """x (B, T, C) -> (B, T, C); teacher_x (B, T, C), if frozen: the teacher's ln_1 output, from
        which this model's own W_K and W_V make the past."""
        c, w, b = self.config, self.c_attn.weight, self.c_attn.bias
        if c.past == "own":     # vanilla, too, goes through the backward pass by hand
            y = myopic_attention(x, w, b, c.n_head, c.horizon, c.cut)           # (B, T, C)
        else:
            q, k, v = split_heads(F.linear(x, w, b), c.n_head)                  # (B, nh, T, hs)
            past = 2 * [torch.zeros_like(k)]
            if c.past == "frozen":
                _, *past = split_heads(F.linear(teacher_x, w, b), c.n_head)
            y = merge_heads(two_stream_attention(q, k, v, *past))               # (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = nn.Sequential(collections.OrderedDict(
            c_fc=nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias),
            act=nn.GELU(),
            c_proj=nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias),
            dropout=nn.Dropout(config.dropout)))

    def forward(self, x, teacher_x=None):
        x = x + self.attn(self.ln_1(x), teacher_x)
        return x + self.mlp(self.ln_2(x))                                       # (B, T, C)


class GPT(nn.Module):
    """GPT-2 with nanoGPT's parameter names and shapes. past='frozen' needs teach() before use."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for name, p in self.named_parameters():     # as GPT-2: residual writers start smaller
            if p.dim() == 2:
                shrink = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def teach(self, teacher):
        """Attend to this trained model's past; it is neither trained nor saved with the pupil."""
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))   # no submodule

    def hidden_states(self, idx):
        """idx (B, T) -> n_layer + 1 tensors (B, T, C): 0 the embedding, l that after block l."""
        t, c, T = self.transformer, self.config, idx.size(1)
        if T > c.block_size:
            raise Refusal(f"{T} positions do not fit block_size {c.block_size}: raise it or cut")
        teacher_xs = [None] * c.n_layer
        if c.past == "frozen":
            teacher_xs = [block.ln_1(x) for block, x in zip(self.teacher.transformer.h,
                                                            self.teacher.hidden_states(idx))]
        states = [t.drop(t.wte(idx) + t.wpe.weight[:T])]                        # (B, T, C)
        for block, teacher_x in zip(t.h, teacher_xs):
            states.append(block(states[-1], teacher_x))                         # (B, T, C)
        return states

    def forward(self, idx, targets=None):
        """idx, targets (B, T) -> logits (B, T, V), mean loss in nats or None; -1: no target."""
        logits = self.lm_head(self.transformer.ln_f(self.hidden_states(idx)[-1]))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def configure_optimizers(self, weight_decay, learning_rate, betas=(0.9, 0.95),
                             device_type="cpu"):
        """AdamW; matrices and embeddings decay, biases and norms do not."""
        groups = [dict(params=[p for p in self.parameters() if (p.dim() > 1) == decays],
                       weight_decay=weight_decay * decays) for decays in (True, False)]
        return torch.optim.AdamW(groups, learning_rate, betas, fused=device_type in ("cpu", "cuda"))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T) -> (B, T + max_new_tokens), sampled; the model sees the last block_size."""
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size:])[0][:, -1] / temperature     # (B, V)
            if top_k is not None:
                least = logits.topk(min(top_k, logits.size(-1)))[0][:, -1:]             # (B, 1)
                logits = logits.masked_fill(logits < least, -math.inf)
            idx = torch.cat([idx, logits.softmax(-1).multinomial(1)], dim=1)            # (B, T + 1)
        return idx


# ------------------------ attention, continued: two streams, and the fused primitives
def two_stream_attention(q, k, v, k_past, v_past):
    """Attention that sees its own key and value at itself, and another stream's in the past.

        A = softmax_causal(s (q k_past^T, with its diagonal replaced by q.k))
        Y = A v_past + diag(A) (v - v_past)                 all (B, nh, T, hs)"""
    S = (q @ k_past.mT).diagonal_scatter((q * k).sum(-1), 0, -2, -1)            # (B, nh, T, T)
    future = torch.ones_like(S[0, 0], dtype=torch.bool).triu(1)                 # (T, T)
    A = (S / math.sqrt(q.size(-1))).masked_fill(future, -math.inf).softmax(-1)  # (B, nh, T, T)
    return A @ v_past + A.diagonal(0, -2, -1)[..., None] * (v - v_past)         # (B, nh, T, hs)


def fused_forward(q, k, v):
    """plain_forward through torch's fused kernels: CPU, CUDA in half precision, CUDA in float32."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    if q.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[:2]
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)[:2]


def fused_backward(dout, q, k, v, out, lse):
    """plain_backward through the same kernels. Their random state is only asked for: no dropout."""
    aten, T, none = torch.ops.aten, q.size(2), torch.empty(0, dtype=torch.int64, device=q.device)
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, True)
    if q.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, T, T, 0.0, True, none, none)
    return aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, none, none, 0.0, [True, True, True, False], True)[:3]


@functools.cache
def try_fused(device_type, dtype, head_size):
    """Do the fused kernels run here and agree with the plain ones? Tried once, on a small case."""
    try:
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            wave = torch.arange(4 * 8 * head_size, device=device_type).mul(0.7).sin().to(dtype)
            q, k, v, dout = wave.view(4, 1, 1, 8, head_size)                    # (1, 1, 8, hs) each
            (out, lse), (out_f, lse_f) = plain_forward(q, k, v), fused_forward(q, k, v)
            plain = out, lse, *plain_backward(dout, q, k, v, out, lse)
            fused = out_f, lse_f[..., :8], *fused_backward(dout, q, k, v, out_f, lse_f)
        torch.testing.assert_close(fused, plain, rtol=0.05, atol=0.05, check_dtype=False)
        return True
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        print(f"attention: plain matrix products serve for {dtype}, heads of size {head_size}, on "
              f"{device_type} (fused kernels: {str(error).strip().splitlines()[0]})")
        return False


# what try_fused found; apart from it, since torch.compile would trace through its cache
fused_serves = torch.compiler.assume_constant_result(lambda *case: try_fused(*case))


# ------------------------ text
def split_tokens(text, kind):
    """str -> its tokens: UTF-8 bytes, each as the character of that number, or words and marks."""
    return text.encode().decode("latin-1") if kind == "byte" else re.findall(r"\w+|[^\w\s]", text)


def encode(text, kind, words):
    """str -> ids (1-d, uint16), places in the vocabulary `words`; 0, <unk>, if not in it."""
    ids = {word: n for n, word in enumerate(words)}
    return np.array([ids.get(token, 0) for token in split_tokens(text, kind)], dtype=np.uint16)


def spell(ids, kind, words):
    """ids -> one string per token, to be read by people."""
    return [words[n] if kind == "byte" else f"{words[n] if words else n} " for n in ids]


def python_documents():
    """The English that ships with Python: the library's docstrings and pydoc's help topics."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    library, documents = Path(ast.__file__).parent, []
    left_out = {"test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "site-packages"}
    for path in sorted(library.rglob("*.py")):
        if left_out.isdisjoint(path.relative_to(library).parts):
            documents += [ast.get_docstring(n) or "" for n in ast.walk(ast.parse(path.read_bytes()))
                          if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    if not (documents and topics):
        raise Refusal("this Python lacks its sources or help topics: name a text with --data")
    documents += [topics[name] for name in sorted(topics)]
    return [d for d in documents if "\n" in d]                                  # no one-liners


def load_text(paths=None, kind="byte", vocab_size=None, words=None):
    """Read, split by document (every tenth validates; fewer than ten are cut at 90%), encode.

    paths: None for Python's own English; text files and folders, each file a document; or nanoGPT's
    train.bin and val.bin, memory-mapped. words: a vocabulary, if not the training split's own.
    -> train, val (1-d, uint16), kind ("byte", "word", "bin"), words or None, vocab_size, sha256."""
    name, data = " ".join(map(str, paths or ["python"])), [] if paths else python_documents()
    files = [f for p in paths or [] for f in (sorted(p.rglob("*")) if p.is_dir() else [p])]
    bins = [f for f in files if f.suffix == ".bin"]
    try:
        for file in [bins[0].with_name(f) for f in ("train.bin", "val.bin")] if bins else files:
            if not file.is_dir():
                data.append(np.memmap(file, np.uint16, "r") if bins else file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"--data {file}: {error}; name UTF-8 files or folders, or train.bin, val.bin")
    if bins:
        (train, val), kind, words, vocab_size = data, "bin", None, vocab_size or 50304
        if (top := max(int(train.max()), int(val.max()))) >= vocab_size:
            raise Refusal(f"--data {name} holds token {top}: give --vocab_size {top + 1} or more")
    else:
        documents = [d for d in dict.fromkeys(data) if d.strip()]               # no doubles
        if not documents:
            raise Refusal(f"--data {name} holds no text: name a file or folder that does")
        train = "\n\n".join(d for n, d in enumerate(documents) if n % 10)
        val = "\n\n".join(documents[::10])
        if len(documents) < 10:
            whole = "\n\n".join(documents)
            train, val = whole[:len(whole) * 9 // 10], whole[len(whole) * 9 // 10:]
        if kind == "word" and words is None:
            seen = collections.Counter(split_tokens(train, kind))
            words = ["<unk>"] + [w for w, _ in seen.most_common(min(vocab_size or 8192, 2**16) - 1)]
        words = words or [chr(n) for n in range(256)]
        train, val, vocab_size = *(encode(t, kind, words) for t in (train, val)), len(words)
    sha256 = hashlib.sha256(train)
    sha256.update(val)
    print(f"text: {name}, {len(train):,} {kind} tokens to train and {len(val):,} to validate on, "
          f"python {platform.python_version()}, sha256 {sha256.hexdigest()}")
    return argparse.Namespace(train=train, val=val, kind=kind, words=words,
                              vocab_size=vocab_size, sha256=sha256.hexdigest())


def windows(tokens, starts, T):
    """tokens (1-d array or tensor), starts (B,) -> x, y (B, T) int64; y is x one token later."""
    at = starts[:, None] + torch.arange(T + 1)                                  # (B, T + 1)
    rows = tokens[at.to(tokens.device)] if isinstance(tokens, torch.Tensor) else tokens[at.numpy()]
    rows = torch.as_tensor(rows).long()
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def token_losses(model, tokens, count, T):
    """Cross-entropy in nats on `count` even windows, dropout off -> losses, y: (N, T) each."""
    count = max(1, min(count, (len(tokens) - 1) // T))
    starts = torch.linspace(0, len(tokens) - T - 1, count, dtype=torch.double).long()
    x, y = windows(tokens, starts, T)
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    losses = [F.cross_entropy(model(a.to(device))[0].float().transpose(1, 2), b.to(device),
                              reduction="none").cpu() for a, b in zip(x.split(64), y.split(64))]
    model.train(was_training)
    return torch.cat(losses), y


# ------------------------ training and checkpoints
def train(model, optimizer, next_batch, *, steps, learning_rate, floor=0.0, first=0, grad_accum=1,
          grad_clip=1.0, dtype="float32", title="", after_step=lambda done: None):
    """Train the model in place, from step `first` to `steps`; a title is shown with the progress.
    next_batch(step) -> (x, y) on the model's device; model(x, y) -> (_, loss). The learning rate
    warms up for 5% of the steps, then falls along half a cosine to floor * learning_rate. Raises
    Refusal if loss or gradient are not finite, naming the step and the last good one."""
    device, warmup = next(model.parameters()).device.type, steps // 20
    look_every, good = 1 if device == "cpu" else 50, "none"     # to read a loss stalls a GPU
    model.train()
    with tqdm(total=steps, initial=first, desc=title, leave=False, disable=not title) as bar:
        for step in range(first, steps):
            done = (step - warmup) / max(1, steps - warmup)     # below 0, then from 0 to 1
            cosine = floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * ((step + 1) / warmup if step < warmup else cosine)
            for _ in range(grad_accum):
                with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                    loss = model(*next_batch(step))[1]
                (loss / grad_accum).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
            if step % look_every == 0 or step == steps - 1:
                if not math.isfinite(loss.item() + norm.item()):
                    raise Refusal(f"the loss is {loss.item()} at step {step} (last good: {good}): "
                                  f"lower --learning_rate, it is {learning_rate:g}")
                good = step
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            after_step(step + 1)


def write_whole(path, write):
    """write(a temporary path), then rename: the file at `path` is whole at any time, old or new."""
    part = path.with_name(f".part.{time.time_ns()}.{path.name}")    # no other process's
    write(part)
    part.replace(path)


def save_checkpoint(path, model, optimizer, step, more, **state):
    """nanoGPT's format, which its own model class loads; what it does not know goes to `config`."""
    if not all(p.isfinite().all() for p in model.parameters()):
        raise Refusal(f"a weight is not finite at step {step}, {path} stays: lower --learning_rate")
    fields = asdict(model.config)
    arm = {k: fields.pop(k) for k in ARMS["vanilla"]}       # leaves nanoGPT's seven in fields
    saved = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), iter_num=step,
                 best_val_loss=math.inf, model_args=fields, config={**arm, **more}, **state)
    write_whole(path, lambda part: torch.save(saved, part))


def load_checkpoint(path, device="cpu"):
    """Read a checkpoint of nanoGPT's or ours -> (GPT, the whole dict); no code in it is ever run.
    Raises Refusal if there is none, if it is damaged, holds pickled objects or does not fit."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        saved["config"] = saved.get("config", {})
        fields = {**saved["config"], **saved["model_args"]}     # nanoGPT's config is a mixed bag
        model = GPT(GPTConfig(**{k: v for k, v in fields.items()
                                 if k in GPTConfig.__dataclass_fields__})).to(device)
        model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in saved["model"].items()
                               if not k.endswith((".attn.bias", ".attn.masked_bias"))})   # buffers
    except Exception as error:      # a file from anywhere can be wrong in any way
        raise Refusal(f"checkpoint {path} cannot be used ({error!r:.200}): name one of nanoGPT's "
                      "or ours; pickled objects in it are never run") from error
    return model, saved


# ------------------------ results: records, tables, figures
def load_records(path):
    """The records of a results file, [] if there is none. Raises Refusal if it is damaged."""
    try:
        records = json.loads(path.read_text("utf-8")) if path.exists() else []
        [(r["task"], r["arm"], r["seed"], r["code"]) for r in records]      # or it is damaged
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise Refusal(f"results file {path} is damaged ({error}): move it or change --out_dir")
    return records


def save_records(path, records):
    lines = ",\n".join(json.dumps(r, allow_nan=False) for r in records)
    write_whole(path, lambda part: part.write_text(f"[\n{lines}\n]\n", encoding="utf-8"))


def run_experiments(path, wanted, vary, run, args):
    """Make sure that the results file holds a record for every settings dict in `wanted`.
    run(settings) -> dict of numbers, saved at once. What the file holds is not run again, unless
    args.fresh. Returns the records that may share a figure: equal but for the keys in `vary`."""
    def agrees(record, settings, but=()):
        return all(k in but or (k in record and record[k] == v) for k, v in settings.items())
    records = load_records(path)
    if args.fresh and not args.plot_only:
        records = [r for r in records if not any(agrees(r, s) for s in wanted)]
        save_records(path, records)
    done = [s for s in wanted if any(agrees(r, s) for r in records)]
    todo = [] if args.plot_only else [s for s in wanted if s not in done]
    if any(r["code"] != args.stamp["code"] for s in done for r in records if agrees(r, s)):
        print(f"{path}: runs of other code are used as they are; --fresh repeats them")
    if todo:
        print(f"{len(todo)} runs, about {len(todo) * args.minutes_per_run:.1f} minutes with the "
              f"preset's settings on {args.minutes_on}; here: {args.stamp['device']}. -> {path}")
    for settings in todo:
        args.compile and torch.compiler.reset()     # or torch stops compiling after eight models
        start, numbers = time.time(), run(settings)
        records = [r for r in load_records(path) if not agrees(r, settings)] + [dict(
            settings, steps=settings["max_iters"], **args.stamp, **numbers,
            seconds=round(time.time() - start, 1))]
        save_records(path, records)     # read anew: another process may have added to the file
    shown = [r for r in records if any(agrees(r, s, vary) for s in wanted)]
    if not shown:
        raise Refusal(f"{path} has no results for these settings: run without --plot_only first")
    return shown


def mean_sd(values, digits=2):
    """'0.21 ± 0.02': mean and standard deviation over seeds; None is left out."""
    values = [v for v in values if v is not None]
    sd = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{sd}" if values else "-"


def print_table(title, header, rows, caption):
    grid = table.Table(*header, title=title, caption=caption)
    [grid.add_row(*row) for row in rows]
    console.Console(width=None if sys.stdout.isatty() else 110).print(grid)


LOOKS = {   # colour (safe for the colour-blind), line and marker (tell the arms apart in grey)
    "vanilla": ("#0072B2", "-", "o"), "myopic": ("#D55E00", "--", "s"),
    "myopic_kv": ("#009E73", "-.", "^"), "local_myopic": ("#CC79A7", "-", "D"),
    "bigram": ("#555555", ":", "v"), "untrained": ("#999999", ":", "x"), "other": ("k", "-", ".")}


def new_figure(columns=1, rows=1, width=4.2, height=3.2, **shared):
    """A figure and its (rows, columns) array of axes; sizes in inches per panel."""
    fig = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=130)
    axes = fig.subplots(rows, columns, squeeze=False, **shared)
    [ax.spines[["top", "right"]].set_visible(False) for ax in axes.flat]
    return fig, axes


def draw_lines(ax, x, lines, label_at=-1, **labels):
    """A line per arm, mean and standard deviation over seeds, named at the right at the height of
    point label_at. lines: {arm: {seed: list of y}}, None for a gap; labels: for ax.set."""
    ends, at = [], -math.inf
    for arm, runs in lines.items():
        colour, line, marker = LOOKS.get(arm, LOOKS["other"])
        y = np.array(list(runs.values()), dtype=float)                          # (seeds, len(x))
        mean, sd = y.mean(0), y.std(0, ddof=len(y) > 1)                         # sd of one seed: 0
        ax.plot(x, mean, color=colour, linestyle=line, marker=marker, markersize=3.5, linewidth=1.6)
        ax.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
        ends.append((mean[label_at], arm.replace("_", " "), colour))
    ax.set(**labels)
    for y, name, colour in sorted(ends):
        at = max(at + 0.065, (ax.transData - ax.transAxes).transform((x[0], y))[1])
        ax.annotate(name, (1.02, at), xycoords="axes fraction", color=colour, va="center")


def save_figure(fig, path, caption):
    fig.supxlabel(caption, fontsize=8, color="#444444")
    write_whole(path, lambda part: fig.savefig(part, format="png"))
    print(f"figure {path}")


# ------------------------ command line
def arm_fields(name):
    """The three fields of an arm of ARMS or of 'horizon_<h>'. Raises Refusal for any other name."""
    if name.startswith("horizon_") and name[8:].isdecimal():
        return dict(horizon=int(name[8:]), cut="hidden", past="own")
    if name not in ARMS:
        raise Refusal(f"arm {name} is unknown: choose from {', '.join(ARMS)}, horizon_<h> (h >= 0)")
    return ARMS[name]


def run_command(doc, presets, flags, argv, body):
    """Parse argv, fill in the preset, call body(args). Bad input: exit status 2 and one line.
    flags: {flag: settings for argparse} of one script, beside those below, which both know."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    yes, add = dict(action="store_true", default=False), parser.add_argument
    add("--preset", choices=presets, default="quick", help="seconds; a two-core laptop; one GPU")
    add("--arms", nargs="+", metavar="ARM", help=f"{', '.join(ARMS)}, horizon_<h>")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--out_dir", type=Path, help="for results and figures (default out/<preset>)")
    add("--fresh", **yes, help="repeat recorded runs (to go on after a break, leave it out)")
    add("--plot_only", **yes, help="redraw figures and table from the records, train nothing")
    add("--compile", **yes, help="torch.compile the model (CUDA only)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of matrix products")
    add("--gradient_accumulation_steps", type=int, default=1, metavar="N", help="batches per step")
    for flag, kind, text in (
            ("seeds", int, "how many seeds"), ("seed", int, "the first seed"),
            ("block_size", int, "positions per sequence, T"), ("n_layer", int, "blocks"),
            ("n_head", int, "heads"), ("n_embd", int, "channels, C"), ("max_iters", int, "steps"),
            ("batch_size", int, "sequences per batch"), ("learning_rate", float, "AdamW's peak")):
        add(f"--{flag}", type=kind, metavar="N", help=text)
    for flag, settings in flags.items():
        add(flag, **settings)
    given = vars(parser.parse_args(argv))
    args = argparse.Namespace(**{"out_dir": Path("out", given["preset"]),
                                 **presets[given["preset"]], **given})
    sources = (Path(__file__).with_name(name) for name in ("myopic_gpt.py", "synthetic.py"))
    code = hashlib.sha256(b"".join(f.read_bytes() for f in sources if f.exists())).hexdigest()[:8]
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.mps.is_available() + ["cpu"]
    try:
        for name, value in given.items():
            low = int(type(value) is int and name not in ("seed", "max_iters"))
            if type(value) in (int, float) and not low <= value < math.inf:     # nan fails, too
                raise Refusal(f"{name} is {value}: give a number, at least {low}")
        args.arms = sorted(dict.fromkeys(args.arms),            # a teacher before its pupils
                           key=lambda arm: arm_fields(arm)["past"] == "frozen")
        if args.device not in ["auto", *here]:
            raise Refusal(f"device {args.device} is not available here: use --device auto")
        args.device = here[0] if args.device == "auto" else args.device
        machine = torch.cuda.get_device_name() if args.device == "cuda" else (
            f"{platform.machine()} {args.device}, {torch.get_num_threads()} threads")
        args.stamp = dict(device=machine, torch=torch.__version__, code=code)   # of every record
        if args.compile and args.device != "cuda":
            raise Refusal(f"--compile is for CUDA and the device is {args.device}: leave it out")
        args.out_dir.mkdir(parents=True, exist_ok=True)
        body(args)
    except torch.cuda.OutOfMemoryError:
        parser.exit(2, f"{parser.prog}: error: CUDA is out of memory: lower --batch_size\n")
    except (Refusal, OSError) as error:
        mend = "; name an --out_dir that can be written" if isinstance(error, OSError) else ""
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}{mend}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\ninterrupted: {args.out_dir} keeps what is done; run again to go on\n")


# ------------------------ the language-model experiment, its figures and main
# what --bench runs: n_layer, n_head, n_embd, tokens a batch, seconds a row, T of a step, other Ts
BENCH = {**dict.fromkeys(("cpu", "mps"), (6, 6, 384, 4096, 12, 256, 64, 128, 256, 512, 1024, 2048)),
         "cuda": (12, 12, 768, 16384, 10, 1024, 64, 128, 256, 512, 1024, 2048, 4096)}
COMMON = dict(arms=list(ARMS), seed=0, block_size=64, tokens=["byte"], batch_size=16, shapes=[],
              minutes_on="two CPU cores")
PRESETS = {     # shapes: (n_layer, n_head, n_embd) of further models, for the gap against size
    "smoke": dict(COMMON, seeds=1, block_size=16, n_layer=2, n_head=2, n_embd=32, batch_size=8,
                  shapes=[(1, 1, 8)], max_iters=10, learning_rate=2e-3, save_every=5,
                  eval_windows=32, minutes_per_run=0.02),
    "quick": dict(COMMON, seeds=2, n_layer=3, n_head=3, n_embd=96, max_iters=700,
                  learning_rate=3e-3, save_every=350, eval_windows=256, minutes_per_run=0.6),
    "full": dict(COMMON, seeds=3, n_layer=4, n_head=4, n_embd=128, tokens=["byte", "word"],
                 shapes=[(1, 1, 16), (2, 2, 32), (3, 2, 64)], max_iters=1000, learning_rate=2e-3,
                 save_every=500, eval_windows=512, minutes_per_run=0.3, minutes_on="a GPU (guess)"),
}


def checkpoint_path(s, out_dir):
    return out_dir / f"{s['arm']}_{s['tokens']}_{s['n_layer']}x{s['n_embd']}_seed{s['seed']}.pt"


def run_text(s, text, args):
    """Train in one arm, or go on where its checkpoint stopped; -> the numbers of its record."""
    T, device, path = s["block_size"], args.device, checkpoint_path(s, args.out_dir)
    if args.init_from and args.init_from.resolve() == path.resolve():
        raise Refusal(f"--init_from {path} would be overwritten: name another --out_dir")
    torch.manual_seed(s["seed"])                                # the same weights in every arm
    start = load_checkpoint(args.init_from)[0] if args.init_from else GPT(GPTConfig(
        T, text.vocab_size, s["n_layer"], s["n_head"], s["n_embd"]))
    model = GPT(replace(start.config, dropout=s["dropout"], **arm_fields(s["arm"])))
    model.load_state_dict(start.state_dict())
    if model.config.past == "frozen":
        vanilla = {**s, "arm": "vanilla"}
        there = checkpoint_path(vanilla, args.out_dir)
        teacher, saved = load_checkpoint(there, device) if there.exists() else (None, {})
        if saved.get("iter_num") != s["max_iters"] or saved["config"].get("settings") != vanilla:
            raise Refusal(f"arm {s['arm']} needs the trained {there}: add --arms vanilla --fresh")
        model.teach(teacher)
    model.to(device)
    rng = torch if device == "cpu" else getattr(torch, device)  # of the dropout masks
    saved = {} if args.fresh or not path.exists() else load_checkpoint(path, device)[1]
    optimizer = model.configure_optimizers(0.1, s["learning_rate"], device_type=device)
    generator, curve, first = torch.Generator().manual_seed(s["seed"]), [], 0
    same = dict(settings=s, code=args.stamp["code"], device=device)
    if saved and same.items() <= saved["config"].items():
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["batch_rng"].cpu())
        rng.set_rng_state(saved["dropout_rng"].cpu())
        curve, first = saved["config"]["curve"], saved["iter_num"]
    # memory-mapped tokens stay on disk; others go to the device, where batches are then made
    tokens = torch.tensor(text.train.astype("i4"), device=device) if text.words else text.train
    loss_of = lambda split: token_losses(model, split, args.eval_windows, T)[0].mean().item()
    def next_batch(step):
        starts = torch.randint(len(tokens) - T, (s["batch_size"],), generator=generator)
        return [t.to(device) for t in windows(tokens, starts, T)]

    def after_step(n):
        if n % max(1, s["max_iters"] // 10) == 0:
            curve.append([n, loss_of(text.train), loss_of(text.val)])
        if n % args.save_every == 0 or n == s["max_iters"]:
            save_checkpoint(path, model, optimizer, n, batch_rng=generator.get_state(),
                            dropout_rng=rng.get_rng_state(),
                            more=dict(same, curve=curve, tokens=text.kind, words=text.words))

    curve or after_step(0)
    train(torch.compile(model) if s["compile"] else model, optimizer, next_batch, floor=0.1,
          steps=s["max_iters"], learning_rate=s["learning_rate"], first=first, dtype=s["dtype"],
          grad_accum=s["gradient_accumulation_steps"], after_step=after_step,
          title=f"{s['arm']} {s['n_layer']}x{s['n_embd']} seed {s['seed']}")
    losses, y = token_losses(model, text.val, args.eval_windows, T)             # (N, T) each
    numbers = dict(
        n_params=sum(p.numel() for p in model.parameters()), val_loss=losses.mean().item(),
        train_loss=loss_of(text.train), curve=curve, loss_by_position=losses.mean(0).tolist(),
        tokens_seen=T * s["max_iters"] * s["batch_size"] * s["gradient_accumulation_steps"])
    if s["seed"] == args.seed and s["arm"] in ("vanilla", "myopic"):    # for the tinted figure
        words = [spell(row, text.kind, text.words) for row in y[:64].tolist()]
        numbers["passage"] = dict(loss=np.round(losses[:64].tolist(), 3).tolist(), text=words)
    print(f"{s['arm']:>12}, {numbers['n_params']:,} parameters, seed {s['seed']}: validation loss "
          f"{numbers['val_loss']:.3f} nats per token, training {numbers['train_loss']:.3f}")
    return numbers


def gaps(arms, names, value):
    """{name: {seed: value(record) minus that of vanilla with the same seed}}, where both are."""
    base = arms.get("vanilla", {})
    seeds = {name: sorted(arms[name].keys() & base) for name in names if name in arms}
    return {name: {s: np.subtract(value(arms[name][s]), value(base[s])) for s in both}
            for name, both in seeds.items() if both}


def plot_passage(vanilla, myopic, path, caption):
    """Held-out windows tinted by what the myopic model loses at each token, and its ten worst."""
    gap, texts = np.subtract(myopic["loss"], vanilla["loss"]), vanilla["text"]          # (N, T)
    fig, ((ax,),) = new_figure(width=10, height=5.5)
    write = functools.partial(ax.text, family="monospace", size=9, parse_math=False)
    tokens = [token for row in texts for token in [*row, "│"]]  # a bar after every window
    tint = np.repeat(np.pad(gap, ((0, 0), (0, 1))).ravel(), [len(token) for token in tokens])
    lines = min(10, len(tint) // 80)
    ax.imshow(tint[:80 * lines].reshape(lines, 80), cmap="bwr", vmin=-4, vmax=4, aspect="auto",
              extent=(0, 1, 1 - lines / 20, 1))
    for n, letter in enumerate("".join(tokens)[:80 * lines]):
        write(n % 80 / 80, 0.965 - n // 80 / 20, letter.replace("\n", "¶"))
    write(0, 0.44, "Where it loses most, in nats; the token in [ ]:", weight="bold")
    for n, worst in enumerate(np.argsort(-gap, axis=None)[:10]):
        w, t = divmod(worst, gap.shape[1])
        before = "".join(texts[w][:t])[-70:]
        write(0, 0.39 - n / 23, f"{gap[w, t]:5.2f} {before:>70}[{texts[w][t]}]".replace("\n", "¶"))
    ax.set(title="Held-out text. Red: myopic loses against vanilla; blue: it wins", ylim=(-0.02, 1))
    ax.set_axis_off()
    save_figure(fig, path, caption)


def report(records, out_dir):
    """Every figure and the table for the runs on one kind of tokens."""
    sizes = collections.defaultdict(lambda: collections.defaultdict(dict))
    for r in records:
        sizes[r["n_params"]][r["arm"]][r["seed"]] = r
    n_params, arms = max(sizes.items(), key=lambda pair: (len(pair[1]), pair[0]))   # most arms
    n = len({r["seed"] for r in records})
    about = f"{r['data']}, {r['tokens']}s, {r['steps']} steps, {n} seeds{', preliminary' * (n < 3)}"
    caption, file = f"{n_params:,} parameters; {about}", f"{{}}_{r['tokens']}.png".format
    cuts, loss_gap = ("vanilla", "myopic", "myopic_kv"), "loss − vanilla's (nats)"
    final, by_position = (lambda r: r["val_loss"]), (lambda r: r["loss_by_position"])
    fig, ((ax,),) = new_figure(width=6.5, height=2.6)
    for arm, runs in arms.items():
        losses = [final(r) for r in runs.values()]
        colour, _, marker = LOOKS.get(arm, LOOKS["other"])
        ax.plot(losses, [f"{arm}  {mean_sd(losses, 3)}"] * len(losses), marker, color=colour)
    ax.invert_yaxis()
    ax.set(title="Final loss of every arm, a mark per seed", xlabel="loss (nats per token)")
    save_figure(fig, out_dir / file("text_arms"), caption)
    if "myopic" in gaps(arms, arms, final):
        fig, ((top,), (low,)) = new_figure(rows=2, width=6, height=2.9, sharex=True)
        draw_lines(top, range(r["block_size"]), {
            arm: {seed: by_position(r) for seed, r in runs.items()} for arm, runs in arms.items()},
            title="Loss at every position", ylabel="loss (nats per token)")
        own = [arm for arm in arms if arm != "bigram"]
        draw_lines(low, range(r["block_size"]), gaps(arms, own, by_position),
                   xlabel="position in the window", ylabel=loss_gap)
        save_figure(fig, out_dir / file("text_positions"), caption)
        fig, ((ax,),) = new_figure(width=5.5)
        draw_lines(ax, [n for n, _, _ in r["curve"]],
                   gaps(arms, cuts, lambda r: [val for _, _, val in r["curve"]]),
                   title="The myopia gap while training", xlabel="training steps", ylabel=loss_gap)
        save_figure(fig, out_dir / file("text_steps"), caption)
        both = [s for s in arms[cuts[0]] if all("passage" in arms[a].get(s, []) for a in cuts[:2])]
        if both:
            plot_passage(*(arms[a][both[0]]["passage"] for a in cuts[:2]),
                         out_dir / file("text_passage"), caption)
    at = {n: gaps(sizes[n], cuts, final) for n in sorted(sizes) if set(cuts) <= sizes[n].keys()}
    all_seeds = [set(gap.get(arm, {})) for gap in at.values() for arm in cuts]
    if len(at) > 1 and (shared := set.intersection(*all_seeds)):
        fig, ((ax,),) = new_figure(width=5.5)
        draw_lines(ax, [*at], {a: {s: [at[n][a][s] for n in at] for s in shared} for a in cuts},
                   xscale="log", title="The gap and the model's size", xlabel="parameters",
                   ylabel=loss_gap)
        save_figure(fig, out_dir / file("text_sizes"), about)
    rows = []
    for n, arm, runs in ((n, arm, sizes[n][arm]) for n in sorted(sizes) for arm in sizes[n]):
        value = lambda key: mean_sd([r[key] for r in runs.values()], 3)
        gap, whole = (gaps(sizes[n], [a], final).get(a, {}) for a in (arm, "bigram"))
        share = [100 * gap[seed] / whole[seed] for seed in gap if whole.get(seed, 0) > 0.1]  # nats
        rows.append([f"{n:,}", arm, str(len(runs)), value("val_loss"), value("train_loss"),
                     mean_sd(gap.values(), 3), mean_sd(share, 1)])
    print_table(f"Language model, {about}", [
        "parameters", "arm", "n", "val loss", "train loss", "− vanilla", "% of bigram's"], rows,
        "nats per token, mean ± sd over n seeds\nthe paper, another task (GPT-2 124M, MS MARCO): "
        "vanilla 3.28, myopic 3.40 (5.9%), local myopic 3.26, bigram 5.33")


def write_sample(args):
    """Print what a checkpoint writes after args.sample."""
    path = args.init_from or checkpoint_path(
        {**vars(args), "arm": args.arms[0], "tokens": args.tokens[0]}, args.out_dir)
    model, saved = load_checkpoint(path, args.device)
    kind, words = saved["config"].get("tokens"), saved["config"].get("words")
    if not words or model.config.past == "frozen":
        raise Refusal(f"{path} does not name its tokens, or needs a teacher: name another one")
    start = torch.tensor([encode(args.sample, kind, words).tolist()], device=args.device)
    if not start.numel():
        raise Refusal("--sample is empty: give the text to begin with")
    torch.manual_seed(args.seed)
    ids = model.eval().generate(start, 500, temperature=0.8, top_k=200)[0].tolist()
    text = "".join(spell(ids, kind, words))
    print(text if kind == "word" else text.encode("latin-1").decode(errors="replace"))


def bench(args):
    """Time every way of attention against our vanilla -> a table and <out_dir>/bench.json: forward
    + backward of the attention sublayer up to its out-projection, then one step of training a GPT.
    A round runs every way once, in any order; a ratio is of two times of the same round."""
    n_layer, n_head, C, n_tokens, at_least, step_T, *Ts = BENCH[args.device]
    model = GPT(GPTConfig(step_T, 256, n_layer, n_head, C)).to(args.device)
    optimizer = model.configure_optimizers(0.1, 1e-3, device_type=args.device)
    heads = lambda x, w, b: split_heads(F.linear(x, w, b), n_head)              # 3 (B, nh, T, hs)
    ways = {name: functools.partial(myopic_attention, n_head=n_head, horizon=h, cut=cut)
            for name, h, cut in (("vanilla", None, "hidden"), ("myopic", 0, "hidden"),
                ("horizon 4", 4, "hidden"), ("myopic_kv", 0, "kv"), ("kv, horizon 4", 4, "kv"))}
    ways["two streams"] = lambda x, w, b: merge_heads(two_stream_attention(     # the textbook way
        *heads(x, w, b), *heads(x.detach(), w, b)[1:]))
    ways["torch's own"] = lambda x, w, b: merge_heads(                          # as in nanoGPT
        F.scaled_dot_product_attention(*heads(x, w, b), is_causal=True))
    records, rows = [], []
    for what, T in tqdm([*(("sublayer", T) for T in Ts), ("step", step_T)], "bench", leave=False):
        x, dy = torch.randn(2, n_tokens // T, T, C).to(args.device, getattr(torch, args.dtype))
        leaves = x.requires_grad_(), *nn.Linear(C, 3 * C).to(x).parameters()
        xy = torch.randint(256, (2, n_tokens // T, T), device=args.device)

        def seconds(way):
            start = time.perf_counter()
            if what == "sublayer":
                torch.autograd.grad(way(*leaves), leaves, dy)
            else:
                for a in (block.attn for block in model.transformer.h):
                    a.forward = lambda x, _, a=a: a.c_proj(way(x, *a.c_attn.parameters()))
                train(model, optimizer, lambda _: xy, steps=1, learning_rate=1e-3, dtype=args.dtype)
            args.device == "cpu" or getattr(torch, args.device).synchronize()
            return time.perf_counter() - start
        rounds, until = [], math.inf                            # the first round is a warm-up
        while len(rounds) < 6 or time.time() < until:
            rounds.append({way: seconds(ways[way]) for way in random.sample([*ways], len(ways))})
            until = min(until, time.time() + at_least)
        t = np.array([[times[way] for way in ways] for times in rounds[1:]])    # (rounds, ways)
        rows.append([f"{what}\nT {T}"])
        for n, way in enumerate(ways):
            q = np.quantile(t[:, n] / t[:, 0], [0.25, 0.5, 0.75]).tolist()
            records.append(dict(what=what, T=T, way=way, ms=1000 * np.median(t[:, n]), quartiles=q,
                                rounds=len(t), dtype=args.dtype, **args.stamp))
            rows[-1].append(f"{q[1]:.2f}\n{q[0]:.2f}–{q[2]:.2f}\n{records[-1]['ms']:.0f} ms")
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
                seconds(ways[way])
                records[-1]["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
                rows[-1][-1] += f"\n{records[-1]['peak_mib']:.0f} MiB"
        save_records(args.out_dir / "bench.json", records)
    print_table(f"Forward and backward on {args.stamp['device']}", ["", *ways], rows, "time over "
                f"vanilla's, median and quartiles of paired rounds; median time\n{n_tokens} "
                f"tokens, {C} channels, {n_head} heads; step: {n_layer} layers, AdamW included")


def experiments(args):
    path, c, start = args.out_dir / "myopic_gpt.json", args, {}
    records = load_records(path)                        # a damaged file is refused before any work
    if args.init_from:
        model, saved = load_checkpoint(args.init_from)
        c, start = model.config, {"tokens": "bin"} | saved["config"]
    shapes, preset = [(c.n_layer, c.n_head, c.n_embd)], PRESETS[args.preset]
    if shapes == [(preset["n_layer"], preset["n_head"], preset["n_embd"])] and not args.init_from:
        shapes += args.shapes
    [GPTConfig(args.block_size, 1, *shape, args.dropout) for shape in shapes]   # refuses bad ones
    data, keys = " ".join(map(str, args.data or ["python"])), ("block_size", "dropout", "max_iters",
        "batch_size", "gradient_accumulation_steps", "vocab_size", "dtype", "compile")
    for kind in [start["tokens"]] if start.get("words") else args.tokens:
        if args.plot_only:      # the text is not read again: take the last one of this name
            text, old = None, [r for r in records if r["tokens"] in (kind, "bin") and (
                r["data"], r.get("vocab_size")) == (data, args.vocab_size)]
            kind, sha = (old[-1]["tokens"], old[-1]["data_sha256"]) if old else (kind, None)
        else:
            text = load_text(args.data, kind, args.vocab_size, start.get("words"))
            sha, kind = text.sha256, text.kind
            if (n := min(len(text.train), len(text.val))) <= args.block_size:
                raise Refusal(f"block_size {args.block_size} is not below {n}, the size of a split "
                              f"of --data {data}: give more text, or lower --block_size")
            if args.init_from and (kind, text.vocab_size) != (start["tokens"], c.vocab_size):
                raise Refusal(f"{text.vocab_size} {kind} tokens do not fit {args.init_from}: give "
                              f"its own --data, and --vocab_size {c.vocab_size}")
        # one rule for all arms: the wider the model, the smaller its learning rate
        wanted = [dict({k: getattr(args, k) for k in keys}, task="text", arm=arm, seed=seed,
                       n_layer=l, n_head=h, n_embd=C, tokens=kind, data=data, data_sha256=sha,
                       init_from=args.init_from and str(args.init_from),
                       learning_rate=args.learning_rate * math.sqrt(c.n_embd / C))
                  for l, h, C in shapes for seed in range(args.seed, args.seed + args.seeds)
                  for arm in args.arms]
        report(run_experiments(path, wanted, ("arm", "seed"), lambda s: run_text(s, text, args),
                               args), args.out_dir)
        if kind == "bin":       # --tokens does not matter to it
            break


def main(argv=None):
    """Train what is not recorded yet, draw figures, print the table; or --sample, or --bench."""
    run_command(__doc__, PRESETS, {
        "--data": dict(nargs="+", type=Path, default=None, help="files, folders or nanoGPT's .bin"),
        "--tokens": dict(nargs="+", choices=["byte", "word"], help="what a token is"),
        "--vocab_size": dict(type=int, default=None, metavar="N", help="words, .bin"),
        "--dropout": dict(type=float, default=0.0, metavar="X", help="while training"),
        "--save_every": dict(type=int, metavar="N", help="steps between checkpoints"),
        "--init_from": dict(type=Path, default=None, help="start from this checkpoint"),
        "--sample": dict(metavar="TEXT", default=None, help="only continue TEXT"),
        "--bench": dict(action="store_true", default=False, help="only measure time and memory"),
    }, argv, lambda args: (bench if args.bench else experiments if args.sample is None
                           else write_sample)(args))


if __name__ == "__main__":
    main()
