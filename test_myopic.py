"""The tests: offline, on the CPU and whatever accelerator is present.   python -m pytest -q
The hand-written backward is held against the definition executed literally: literal_gradient."""

import functools
import gc
import io
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import myopic_gpt as mg
import synthetic

torch.set_num_threads(1)  # the tensors here are tiny: more threads would only wait for each other
ROOT = Path(mg.__file__).parent
TYPES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}  # and their tolerance
DEVICES = list(itertools.product(["cpu"], TYPES))
DEVICES += [(d, torch.float32) for d in ("cuda", "mps") if getattr(torch, d).is_available()]
DEVICES += [("cuda", torch.bfloat16)] * torch.cuda.is_available()


def nothing(*args):
    """In place of report_progress."""


def relative_error(a, b):
    """|a - b| / |b|, or |a| where b is zero."""
    a, b = a.cpu().double(), b.cpu().double()
    return ((a - b).norm() / (b.norm() or 1)).item()


def assert_agree(got, true, tolerance=1e-10):
    """Every tensor in the dict `got` is the one of that name in `true`, up to a relative error."""
    assert got.keys() == true.keys()
    for name in true:
        assert relative_error(got[name], true[name]) <= tolerance, name


def make_gpt(dtype=torch.float64, teacher=None, **settings):
    """A small GPT with all parameters random, so that no gradient is zero by accident."""
    torch.manual_seed(0 if teacher is None else 1)
    settings = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=12) | settings
    config = mg.GPTConfig(**settings)
    model = mg.GPT(config) if teacher is None else mg.LocalMyopicGPT(config, teacher)
    model.to(dtype)
    for p in trained(model).values():
        torch.nn.init.normal_(p, std=0.3)
    return model


def batch(T, B=2):
    """-> idx, targets (B, T): random tokens for make_gpt's model."""
    return torch.randint(11, (2, B, T), generator=torch.Generator().manual_seed(1))


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(model, idx, targets):
    """{name: gradient of the loss}"""
    parameters = trained(model)
    grads = torch.autograd.grad(model(idx, targets)[1], list(parameters.values()))
    return dict(zip(parameters, grads))


# ------------------------ the definition, literally
def literal_losses(theta, config, idx, targets, owner, frozen=None):
    """The loss at every position (T,), where position i computes with its own parameters theta[i].

    owner: whose copy of W_K, W_V makes the key of writer j for reader i: the "reader"'s or the
    "writer"'s. frozen: per layer (B, T, C), what the ln_1 of the past gave, or None: their own."""
    T, hs = idx.size(1), config.n_embd // config.n_head

    def norm(x, mine, name):
        return F.layer_norm(x, (config.n_embd,), mine[name + ".weight"], mine.get(name + ".bias"))

    def linear(x, mine, name):
        return F.linear(x, mine[name + ".weight"], mine.get(name + ".bias"))

    x = []
    for i in range(T):
        x.append(theta[i]["wte.weight"][idx[:, i]] + theta[i]["wpe.weight"][i])  # (B, C)
    for layer in range(config.n_layer):
        h = f"h.{layer}."
        normed = [norm(x[i], theta[i], h + "ln_1") for i in range(T)]
        for i in range(T):
            keys, values = [], []
            for j in range(i + 1):
                whose = theta[i] if owner == "reader" else theta[j]
                seen = frozen[layer][:, j] if frozen is not None and j < i else normed[j]
                _, k, v = linear(seen, whose, h + "attn.c_attn").chunk(3, dim=-1)
                keys.append(k.unflatten(-1, (-1, hs)))  # (B, nh, hs)
                values.append(v.unflatten(-1, (-1, hs)))
            q, _, _ = linear(normed[i], theta[i], h + "attn.c_attn").chunk(3, dim=-1)
            q = q.unflatten(-1, (-1, hs))
            scores = [(q * k).sum(-1, keepdim=True) / math.sqrt(hs) for k in keys]  # (B, nh, 1)
            weights = torch.stack(scores).softmax(0)  # (i + 1, B, nh, 1)
            mixed = (weights * torch.stack(values)).sum(0).flatten(1)  # (B, C)
            x[i] = x[i] + linear(mixed, theta[i], h + "attn.c_proj")
            hidden = F.gelu(linear(norm(x[i], theta[i], h + "ln_2"), theta[i], h + "mlp.c_fc"))
            x[i] = x[i] + linear(hidden, theta[i], h + "mlp.c_proj")
    losses = []
    for i in range(T):
        logits = norm(x[i], theta[i], "ln_f") @ theta[i]["wte.weight"].T  # (B, V)
        losses.append(F.cross_entropy(logits, targets[:, i]) / T)
    return losses


def literal_gradient(model, idx, targets, which, owner, frozen=None):
    """The gradient of the mean loss by the definition: the sum of d loss_i / d theta_j over all i
    and j (which="all") or over i = j (which="diagonal"). Only the model's weights are used."""
    T, theta = idx.size(1), []
    for _ in range(T):  # a copy of all parameters for every position
        copies = {}
        for name, p in trained(model).items():
            copies[name.removeprefix("transformer.")] = p.detach().clone().requires_grad_()
        theta.append(copies)
    losses = literal_losses(theta, model.config, idx, targets, owner, frozen)
    total = {name: torch.zeros_like(p) for name, p in trained(model).items()}
    for i in range(T):
        for j in range(i + 1):
            if which == "diagonal" and i != j:
                continue
            copies = list(theta[j].values())
            grads = torch.autograd.grad(losses[i], copies, retain_graph=True, allow_unused=True)
            for name, grad in zip(total, grads):
                if grad is not None:
                    total[name] += grad
    return total


ALL = [("vanilla", "all", "writer"), ("vanilla", "all", "reader")]  # the owner does not matter
DIAGONAL = [("myopic", "diagonal", "reader"), ("myopic_kv", "diagonal", "writer")]
SHAPES = [(1, 1, True, 1), (1, 3, False, 5), (2, 2, True, 3), (2, 1, False, 4), (3, 3, False, 2)]


@pytest.mark.parametrize("n_layer, n_head, bias, T", [*SHAPES, (3, 2, True, 5)])
@pytest.mark.parametrize("arm, which, owner", ALL + DIAGONAL)
def test_gradient_is_the_definition(n_layer, n_head, bias, T, arm, which, owner):
    model = make_gpt(n_layer=n_layer, n_head=n_head, bias=bias, **mg.ARMS[arm])
    true = literal_gradient(model, *batch(T), which, owner)
    assert_agree(gradients(model, *batch(T)), true)


# ------------------------ the attention function
def attention_inputs(T, bias=True, dtype=torch.float64, device="cpu", C=24):
    """[x, w, b] (strided leaves that require gradients) and a random dy."""
    torch.manual_seed(0)
    shapes = [(2, T, C, 2), (3 * C, C, 2), (3 * C, 2), (2, T, C, 2)]
    buffers = [(torch.randn(shape).double() / 3).to(device, dtype) for shape in shapes]
    x, w, b, dy = (buffer[..., 0] for buffer in buffers)
    leaves = [x.requires_grad_(), w.requires_grad_(), b.requires_grad_()]
    return leaves if bias else [*leaves[:2], None], dy


def attention_gradients(f, leaves, dy, *settings):
    """y = f(x, w, b, *settings) -> {"y": y, "dx": dx, "dw": dw, "db": db}."""
    y = f(*leaves, *settings)
    grads = torch.autograd.grad(y, [t for t in leaves if t is not None], dy)
    return dict(zip(("y", "dx", "dw", "db"), (y.detach(), *grads)))


def oracle(x, w, b, n_head, horizon, cut):
    """The same by autograd: the live stream where 0 <= i - j <= horizon, a detached one before."""
    q, k, v = mg.heads(x, w, b, n_head)
    k_past, v_past = k.detach(), v.detach()
    if cut == "hidden":
        _, k_past, v_past = mg.heads(x.detach(), w, b, n_head)
    place = torch.arange(x.size(1))
    lag = place[:, None] - place  # (T, T)
    is_near = lag <= (x.size(1) if horizon is None else horizon)
    S = torch.where(is_near, q @ k.mT, q @ k_past.mT) / math.sqrt(q.size(-1))
    A = S.masked_fill(lag < 0, -math.inf).softmax(-1)
    return mg.merge_heads((A * is_near) @ v + (A * ~is_near) @ v_past)


CUTS = [(None, "hidden"), (0, "hidden"), (0, "kv"), (1, "kv"), (2, "hidden"), (40, "kv")]


@pytest.mark.parametrize("keeps_lse", [True, False])
@pytest.mark.parametrize("device, dtype", DEVICES)
@pytest.mark.parametrize("T", [1, 33, 64])
@pytest.mark.parametrize("horizon, cut", CUTS)
def test_attention_is_its_oracle(monkeypatch, device, dtype, T, horizon, cut, keeps_lse):
    leaves, dy = attention_inputs(T, T != 33, dtype, device)
    exact = [None if t is None else t.detach().cpu().double().requires_grad_() for t in leaves]
    true = attention_gradients(oracle, exact, dy.cpu().double(), 3, horizon, cut)
    if not keeps_lse:  # as where torch's kernel keeps none: ours is computed
        monkeypatch.setattr(mg, "getattr", Mock(side_effect=AssertionError), raising=False)
        monkeypatch.setattr(mg, "hasattr", Mock(return_value=False), raising=False)
    got = attention_gradients(mg.myopic_attention, leaves, dy, 3, horizon, cut)
    assert_agree(got, true, TYPES[dtype])


def test_padded_log_sum_exp_and_large_scores():
    q, k, v, out = mg.attend(*torch.randn(3, 2, 3, 5, 8).double())
    lse = out.grad_fn._saved_logsumexp  # (B, nh, T)
    padded = SimpleNamespace(_saved_log_sumexp=F.pad(lse, (0, 27)))
    trailing = SimpleNamespace(_saved_logsumexp=lse[..., None])
    for grad_fn in (padded, trailing, None):
        got = mg.log_sum_exp(q, k, SimpleNamespace(grad_fn=grad_fn))
        assert relative_error(got, lse) < 1e-12 and got.shape == (2, 3, 5)
    big = torch.full((1, 1, 2, 8), 300.0)
    dk, dv = mg.lag_gradients(0, big, big, big, big, big, torch.zeros(1, 1, 2))
    assert dk.isfinite().all() and torch.equal(dv, big)  # P is at most 1, however wrong lse is


def test_lengths_and_batches_of_none():
    for B, T in ((0, 3), (2, 0), (1, 1)):
        x = torch.randn(B, T, 8, requires_grad=True)
        w = torch.randn(24, 8, requires_grad=True)
        for horizon in (None, 0, 2):
            y = mg.myopic_attention(x, w, None, 2, horizon)
            dx, dw = torch.autograd.grad(y.sum(), (x, w))
            assert (y.shape, dx.shape, dw.shape) == (x.shape, x.shape, w.shape)
        assert mg.two_stream_attention(x, None, w, None, 2).shape == x.shape


@pytest.mark.parametrize("horizon", [None, 0])
def test_it_holds_where_others_take_graphs_apart(horizon):
    leaves, dy = attention_inputs(9)
    call = functools.partial(mg.myopic_attention, n_head=3, horizon=horizon)
    true = attention_gradients(call, leaves, dy)
    ways = {"save_on_cpu": call}
    for reentrant in (True, False):
        ways[reentrant] = functools.partial(checkpoint, call, use_reentrant=reentrant)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        ways[backend] = torch.compile(call, backend=backend)
    for name, way in ways.items():
        context = (
            torch.autograd.graph.save_on_cpu() if name == "save_on_cpu" else torch.enable_grad()
        )
        for t in leaves:
            t.grad = None
        with context:
            y = way(*leaves)
        y.backward(dy)
        got = dict(y=y.detach(), dx=leaves[0].grad, dw=leaves[1].grad, db=leaves[2].grad)
        assert_agree(got, true, 1e-12)


def test_autocast_frozen_inputs_and_bad_shapes():
    (x, w, b), dy = attention_inputs(9)
    exact = attention_gradients(mg.myopic_attention, (x, w, b), dy, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert mg.myopic_attention(x, w, b, 3).dtype == torch.float64  # as torch's own
        low = [t.detach().float().requires_grad_() for t in (x, w, b)]
        y = mg.myopic_attention(*low, 3)
    grads = torch.autograd.grad(y, low, dy.bfloat16())
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)
    assert_agree(
        dict(zip(("dx", "dw", "db"), grads)), {n: exact[n] for n in ("dx", "dw", "db")}, 0.03
    )
    (dx,) = torch.autograd.grad(mg.myopic_attention(x, w.detach(), b.detach(), 3), x, dy)
    (dw,) = torch.autograd.grad(mg.myopic_attention(x.detach(), w, b.detach(), 3), w, dy)
    assert torch.equal(dx, exact["dx"]) and torch.equal(dw, exact["dw"])
    for bad in ((x[0], w, b, 3), (x, w[:36], b, 3), (x, w, b, 5), (x, w, b, 0), (x, w, b, 3, 1.5)):
        with pytest.raises(mg.UsageError):
            mg.myopic_attention(*bad)
    with pytest.raises(mg.UsageError, match="cut is 'k'"):
        mg.myopic_attention(x, w, b, 3, 0, "k")


def test_nothing_is_mutated_kept_or_differentiated_twice(monkeypatch):
    made, attend = [], mg.attend

    def spy(*qkv):
        tensors = attend(*qkv)
        made.extend(weakref.ref(t) for t in tensors)
        return tensors

    monkeypatch.setattr(mg, "attend", spy)
    leaves, dy = attention_inputs(9)
    y = mg.myopic_attention(*leaves, 3)
    saved = [*y.grad_fn.saved_tensors, y.grad_fn.saved_tensors[-1].grad_fn._saved_logsumexp]
    assert all(t.shape.count(9) < 2 for t in saved)  # no (T, T) matrix is kept
    copies = [t.detach().clone() for t in (*saved, *leaves, dy)]
    for _ in range(2):
        torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip((*saved, *leaves, dy), copies))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), leaves, create_graph=True)
    del saved
    gc.collect()
    assert all(ref() is not None for ref in made)
    gc.disable()  # freed at once, by counting references: there is no cycle
    torch.autograd.grad(y, leaves, dy)
    assert all(ref() is None for ref in made) and y is not None
    gc.enable()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, dy)


# ------------------------ facts about the idea
def test_nanogpt_weights_load_and_one_line_makes_its_attention_myopic():
    layers = {"ln_f": (12,), "h.0.ln_1": (12,), "h.0.ln_2": (12,), "h.0.attn.c_attn": (36, 12)}
    layers |= {"h.0.attn.c_proj": (12, 12), "h.0.mlp.c_fc": (48, 12), "h.0.mlp.c_proj": (12, 48)}
    state = {f"transformer.{n}.bias": torch.zeros(shape[0]) for n, shape in layers.items()}
    layers |= {"wte": (11, 12), "wpe": (8, 12)}
    state |= {f"transformer.{n}.weight": torch.randn(shape) for n, shape in layers.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    model, x = make_gpt(n_layer=1, n_head=3), torch.randn(2, 6, 12).double().requires_grad_()
    model.load_state_dict(state, strict=True)
    c_attn = model.transformer.h[0].attn.c_attn
    q, k, v = mg.heads(x, c_attn.weight, c_attn.bias, 3)
    usual = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    myopic = mg.myopic_attention(x, c_attn.weight, c_attn.bias, 3)
    assert relative_error(myopic, usual) < 1e-12
    for y, writers in ((usual, 5), (myopic, 1)):
        (dx,) = torch.autograd.grad(y[:, 4].sum(), x)
        assert (dx.norm(dim=(0, 2)) > 0).sum() == writers


def test_two_streams_with_a_detached_past_are_myopic():
    leaves, dy = attention_inputs(9)
    two = attention_gradients(
        lambda x, w, b: mg.two_stream_attention(x, x.detach(), w, b, 3), leaves, dy
    )
    assert_agree(attention_gradients(mg.myopic_attention, leaves, dy, 3), two)


def test_bigram_and_local_myopic():
    teacher, (idx, targets), other = make_gpt(dropout=0.5), batch(6), batch(6)[0]
    other[:, :4] = (idx[:, :4] + 1) % 11
    bigram = make_gpt(**mg.ARMS["bigram"])
    assert torch.equal(bigram(idx)[0][:, 4:], bigram(other)[0][:, 4:])
    local = make_gpt(teacher=teacher, **mg.ARMS["local_myopic"]).train()
    assert all(not p.requires_grad for p in teacher.parameters())
    before = local(idx)[0][:, 4:]
    assert torch.equal(local(idx)[0][:, 4:], before)  # the teacher does not drop out
    frozen, states = [], teacher.eval().hidden_states(idx)
    for block, x in zip(teacher.transformer.h, states):
        frozen.append(block.ln_1(x))
    true = literal_gradient(local, idx, targets, "all", "reader", frozen)
    assert_agree(gradients(local, idx, targets), true)
    assert relative_error(local(other)[0][:, 4:], before) > 0.01
    teacher.hidden_states = Mock(return_value=states)
    assert torch.equal(local(other)[0][:, 4:], before)  # the past is seen through the teacher alone


def test_generate_is_causal_and_refuses_what_it_cannot_do():
    model, (idx, _) = make_gpt(), batch(6)
    likeliest = model.generate(idx, 4, top_k=1)
    assert torch.equal(likeliest, model.generate(idx, 4, temperature=1e-9))
    assert likeliest[0, 6] == model(idx)[0][0, -1].argmax() and likeliest.shape == (2, 10)
    for bad in (dict(temperature=0), dict(top_k=0)):
        with pytest.raises(mg.UsageError, match="top_k"):
            model.generate(idx, 4, **bad)
    with pytest.raises(mg.UsageError, match="no tokens"):
        model.generate(idx[:, :0], 4)


def test_dropout_acts_in_training_alone():
    model, (idx, _) = make_gpt(dropout=0.5, n_layer=1), batch(6)
    assert relative_error(model(idx)[0], model(idx)[0]) > 0.01
    drops = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert [m.p for m in drops] == [0.5] * 3
    for kept in drops:  # each of the three acts
        for m in drops:
            m.train(m is kept)
        assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


# ------------------------ text and training
@pytest.mark.parametrize("muon, n", [("all", 4), ("attn", 2), ("none", 0)])
def test_every_parameter_has_one_optimizer_and_one_decay(muon, n):
    model = make_gpt(n_layer=1, teacher=make_gpt(), past="frozen")
    found, names = [], {id(p): n for n, p in model.named_parameters()}
    optimizers = mg.configure_optimizers(model, mg.TextRun(muon=muon, muon_decay=0.3))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            found += [(names[id(p)], group["weight_decay"]) for p in group["params"]]
    assert optimizers[0].defaults["betas"] == (0.9, 0.95)
    true = {name: 0.1 * (p.dim() > 1) for name, p in trained(model).items()}  # AdamW
    matrices = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    true |= {f"transformer.h.0.{matrix}.weight": 0.3 for matrix in matrices[:n]}  # Muon
    assert dict(found) == true and len(found) == len(true)


def test_rates_and_start_values():
    run = mg.TextRun(max_iters=4, warmup=0.5, decay_from=0.5, learning_rate=0.2, muon_rate=0.4)
    model, seen = make_gpt(torch.float32), []
    optimizers = mg.configure_optimizers(model, run)

    def after_step(step):
        assert model.training
        model.eval()
        seen.extend(group["lr"] for part in optimizers for group in part.param_groups)

    mg.train(model, optimizers, lambda step: batch(6), run, nothing, after_step)
    assert seen == pytest.approx([0.1, 0.1, 0.2] + 2 * [0.2, 0.2, 0.4] + [0.1, 0.1, 0.2])
    for name, p in mg.GPT(mg.GPTConfig(64, 200, 8, 2, 128)).named_parameters():
        std = 0.005 if name.endswith("c_proj.weight") else 0.02 * (p.dim() == 2)
        assert p.std().item() == pytest.approx(std, rel=0.1), name
        assert p.dim() == 2 or p[0] == (not name.endswith("bias")), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_learns_and_stops_at_a_loss_that_is_not_finite(monkeypatch, dtype):
    model = mg.GPT(mg.GPTConfig(8, 11, 2, 2, 16, horizon=0))
    run = mg.TextRun(max_iters=30, dtype=dtype)
    x, y = torch.arange(8).repeat(4, 1), torch.arange(1, 9).repeat(4, 1)
    optimizers, before = mg.configure_optimizers(model, run), model(x, y)[1].item()
    monkeypatch.setattr(mg, "attend", Mock(wraps=mg.attend))
    mg.train(model, optimizers, lambda step: (x, y), run, nothing)
    assert mg.attend.call_args[0][0].dtype == getattr(torch, dtype)
    assert model(x, y)[1].item() < 0.5 * before
    torch.nn.init.constant_(model.lm_head.weight, math.inf)
    with pytest.raises(mg.UsageError, match="loss is nan at step 10 .*--learning_rate"):
        mg.train(model, optimizers, lambda step: (x, y), run, nothing)


def test_the_gradient_is_clipped():
    model, run = make_gpt(torch.float32), mg.TextRun(max_iters=1, grad_clip=0.01, warmup=0)
    before = [p.detach().clone() for p in model.parameters()]
    plain = torch.optim.SGD(model.parameters(), 1.0)
    mg.train(model, [plain], lambda step: batch(6), run, nothing)
    moved = [(p - old).flatten() for p, old in zip(model.parameters(), before)]
    assert torch.cat(moved).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_text_is_split_between_paragraphs_and_evaluated_in_chunks(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("\ufeff" + "the cat, the dög.\n\n" * 200, encoding="utf-8")
    train, held_out = (part.decode() for part in mg.load_text([file], 8))
    assert train == "the cat, the dög.\n\n" * 180 + "the cat, the dög."
    assert held_out == "\n\nthe cat, the dög." * 19 + "\n\n"
    default = (part.split(b"\n\n") for part in mg.load_text([], 64))
    train, held_out = (set(paragraphs) - {b""} for paragraphs in default)
    assert len(train) > 5000 and len(held_out) > 500 and train.isdisjoint(held_out)
    model, rows = make_gpt(dropout=0.5).train(), torch.arange(5000).remainder(11).unfold(0, 9, 1)
    (first, y), (second, _) = (mg.token_losses(model, rows, 4000) for _ in "ab")
    assert torch.equal(first, second) and first.shape == (4000, 8)
    assert y[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and y[-1, -1] == 4999 % 11
    true = F.cross_entropy(model(rows[:1, :-1])[0][0], rows[0, 1:], reduction="none")
    assert relative_error(first[0], true) < 1e-6


def test_letters_are_counted_from_where_their_word_begins():
    text = b"ds: Two words, a7b"
    y = torch.tensor([list(text)])
    counted = [0, 0, 0, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 0, 1, 0, 1]
    assert mg.letter_places(y).clamp(min=0)[0].tolist() == counted


# ------------------------ runs and their files
def test_a_run_refuses_bad_values_and_equal_runs_have_one_name():
    bad = [dict(dtype="bf16"), dict(muon="some"), dict(block_size=2.5), dict(n_head=0)]
    bad += [dict(arm="no_such"), dict(arm="horizon_1.5"), dict(learning_rate=math.nan)]
    bad += [dict(learning_rate=math.inf), dict(weight_decay=-1), dict(max_iters=0)]
    bad += [dict(beta1=1), dict(dropout=1), dict(n_embd=7), dict(seed=-1), dict(warmup=2)]
    for settings in bad:
        with pytest.raises(mg.UsageError):
            mg.TextRun(**settings)
    for settings in (dict(p=0), dict(p=1.5), dict(a=32), dict(n_layer=1), dict(seed=9000)):
        with pytest.raises(mg.UsageError):
            replace(synthetic.QUICK, **settings)
    for arm in ("local_myopic", "no_such"):
        with pytest.raises(mg.UsageError, match=arm):
            replace(synthetic.QUICK, arm=arm)
    with pytest.raises(mg.UsageError, match="past"):
        mg.GPTConfig(1, 1, 1, 1, 1, past="no_such")
    assert replace(synthetic.QUICK, p=1).name() == synthetic.QUICK.name()
    assert mg.TextRun().name() == "text-vanilla-seed0-44136fa3"  # it must never change
    names = {mg.TextRun(seed=seed, recipe=n).name() for seed in (0, 1) for n in (1, 2)}
    assert len(names) == 4


def test_a_new_field_loses_no_record_and_a_changed_default_does(tmp_path):
    @dataclass(frozen=True)
    class Newer(mg.TextRun):
        more: int = mg.setting(5, "a field that old records lack")

    @dataclass(frozen=True)
    class Changed(mg.TextRun):
        max_iters: int = mg.setting(701, "steps")

    (tmp_path / "runs").mkdir()
    run = mg.TextRun(seed=3)
    mg.save_run(tmp_path, run, dict(vars(run)) | dict(val_loss=1.5), None)
    for kind, is_found in ((mg.TextRun, True), (Newer, True), (Changed, False)):
        assert kind(seed=3).name() == run.name()
        assert (kind(seed=3) in mg.read_runs(tmp_path, kind)) == is_found
    path = mg.run_path(tmp_path, run)
    path.write_text(path.read_text("utf-8")[:-3], "utf-8")
    with pytest.raises(mg.UsageError, match="delete it"):
        mg.read_runs(tmp_path, mg.TextRun)


def test_a_file_is_whole_or_not_there_and_a_full_disk_costs_the_arrays_alone(tmp_path, monkeypatch):
    def fail(part, **arrays):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "runs").mkdir()
    with pytest.raises(mg.UsageError, match="No space left"):
        mg.write_whole(tmp_path / "figure", fail)
    monkeypatch.setattr(np, "savez_compressed", fail)
    mg.save_run(tmp_path, mg.TextRun(), dict(vars(mg.TextRun())), dict(a=np.zeros(2)))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [
        mg.run_path(tmp_path, mg.TextRun()).name
    ]


def test_weights_are_kept_whatever_their_size(tmp_path):
    run = mg.TextRun(n_embd=300, n_layer=1)
    model = mg.GPT(run.config(256))
    _, arrays = mg.train_one_run(lambda *_: (model, {}, {}), run, "cpu", nothing)
    (tmp_path / "runs").mkdir()
    mg.save_run(tmp_path, run, dict(vars(run)), arrays)
    again = mg.load_weights(mg.GPT(run.config(256)), mg.read_arrays(tmp_path, run))
    assert_agree(trained(again), trained(model), 1e-3)
    assert mg.read_arrays(tmp_path, mg.TextRun()) is None


# ------------------------ the command
TINY = "--preset demo --max_iters 4 --n_embd 8 --n_layer 1 --n_head 1 --eval_windows 4"
TINY += " --block_size 8 --device cpu --jobs 1 --data DATA --out_dir OUT "


def tiny(tmp_path, words):
    """The flags of a run on a small text; names in capitals are files in tmp_path."""
    lines = "".join(f"line {n} of a small text, {n * n} and {n % 7};\n" for n in range(60))
    texts = dict(DATA=lines, SHORT="short", LATIN="déjà vu " * 100)
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    return [str(tmp_path / w) if w.isupper() else w for w in (TINY + words).split()]


def call(tmp_path, words, out="OUT"):
    """Run the command -> {(arm, seed): record, but for what the clock says}."""
    mg.main(tiny(tmp_path, f"{words} --out_dir {out}"))
    found = mg.read_runs(tmp_path / out, mg.TextRun)
    return {(run.arm, run.seed): record | dict(seconds=0) for run, record in found.items()}


def test_arms_share_start_and_batches_and_jobs_change_nothing(tmp_path, monkeypatch):
    starts, batches, ends, train = [], [], [], mg.train

    def spy(model, optimizers, next_batch, run, report_progress, after_step):
        starts.append({n: p.clone() for n, p in trained(model).items()})
        batches.append([])

        def recorded(step):
            batches[-1].append(next_batch(step))
            return batches[-1][-1]

        train(model, optimizers, recorded, run, report_progress, after_step)
        ends.append(trained(model))
        assert torch.get_num_threads() == 1

    arms = ["vanilla", "horizon_1", "bigram", "local_myopic"]
    monkeypatch.setattr(mg, "train", spy)
    torch.set_num_threads(2)  # a run takes one all the same
    records = call(tmp_path, "--arms " + " ".join(arms))
    assert [arm for arm, _ in records] == sorted(arms)
    assert len({record["val_loss"] for record in records.values()}) == 4
    for start, batch_list in zip(starts, batches):
        assert_agree(start, starts[0], 0)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(batch_list, batches[0]))
    assert_agree(ends[3], ends[0], 0)  # local_myopic trains its teacher first: vanilla
    assert call(tmp_path, "--arms " + " ".join(arms)) == records and len(starts) == 5
    assert call(tmp_path, "--arms bigram --fresh") == records and len(starts) == 6
    assert call(tmp_path, f"--arms {' '.join(arms)} --jobs 2", "TWO") == records
    call(tmp_path, "--arms bigram --seed 1")
    assert not torch.equal(batches[-1][0][0], batches[0][0][0])  # another seed, other batches

    x, y = batches[0][0]
    text = (tmp_path / "DATA").read_bytes()
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert all(bytes(row.tolist()) in text[: len(text) * 9 // 10] for row in x)
    for record in records.values():
        assert record["curve"][-1] == [4, record["train_loss"], record["val_loss"]]
    arrays = mg.read_arrays(
        tmp_path / "OUT", next(iter(mg.read_runs(tmp_path / "OUT", mg.TextRun)))
    )
    assert arrays["y"][0].tobytes() == text[len(text) * 9 // 10 :][1:9]


def test_only_the_runs_asked_for_are_drawn_and_what_cannot_be_is_said(
    tmp_path, monkeypatch, capsys
):
    call(tmp_path, "--arms vanilla myopic --seeds 2")
    figure = tmp_path / "OUT" / "text_gaps.png"
    for encoding in ("cp1252", "cp932"):
        figure.unlink()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        call(tmp_path, "--arms vanilla myopic bigram --plot_only")  # bigram is not recorded
        assert figure.exists()
    monkeypatch.undo()
    call(tmp_path, "--arms myopic --plot_only")
    assert not figure.exists() and "no text_gaps.png: " in capsys.readouterr().out


def test_sizes_are_swept_and_drawn(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(mg, "draw_sizes", lambda ax, values, ylabel: lines.append(values))
    call(tmp_path, "--arms vanilla myopic --sizes 1x16 2x16 1x32")
    shapes = {
        (run.n_layer, run.n_embd, run.n_head) for run in mg.read_runs(tmp_path / "OUT", mg.TextRun)
    }
    assert shapes == {(1, 16, 1), (2, 16, 1), (1, 32, 2)}
    assert [size[:2] for size in lines[0]] == [(1, 16), (2, 16), (1, 32)]
    assert (tmp_path / "OUT" / "text_size.png").exists()


BAD = [
    ("--learning_rate nan", "learning_rate is nan"),
    ("--n_embd 7 --n_head 2", "n_embd is 7"),
    ("--arms no_such", "arm no_such is unknown"),
    ("--sizes 3by4", "size 3by4"),
    ("--data LATIN", "LATIN"),
    ("--data NO_FILE", "NO_FILE"),
    ("--data SHORT", "block_size is 8"),
    ("--out_dir SHORT", "SHORT"),
    ("--jobs 0", "jobs is 0"),
    ("--seeds 0", "seeds is 0"),
    ("--pre demo", "unrecognized arguments"),
    ("--plot_only", "none of these runs"),
    ("--max_iters 1 --learning_rate 1e30", "--learning_rate"),
    ("--arms myopic --learning_rate 1e30 --jobs 2", "loss is nan at step 4 of myopic, seed 0"),
]


@pytest.mark.parametrize("words, said", BAD)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        mg.main(tiny(tmp_path, words))
    error = capsys.readouterr().err.partition("error: ")[2].strip()
    assert stop.value.code == 2 and said in error and "\n" not in error


@pytest.mark.skipif(os.name == "nt", reason="no process groups")
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_interrupted_or_killed_no_process_is_left(tmp_path, number, status):
    command = [sys.executable, mg.__file__, *tiny(tmp_path, "--max_iters 9999999 --jobs 2")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    process, said = subprocess.Popen([*command, "--arms", "vanilla"], **pipes), b""
    while b"vanilla, seed 0: loss" not in said and process.poll() is None:
        said += process.stderr.read1()
    kill = os.killpg if number == signal.SIGINT else os.kill  # a terminal tells the whole group
    kill(process.pid, number)
    _, said = process.communicate(timeout=20)  # the pipes end with the last process
    assert process.returncode == status and b"Traceback" not in said


def die(run, device, report_progress):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_worker_killed_for_its_memory_is_one_line_and_status_1(capsys):
    with pytest.raises(SystemExit) as stop, mg.exit_status("script.py"):
        list(mg.train_side_by_side(die, [mg.TextRun()], "cpu", 2, nothing))
    assert stop.value.code == 1 and "--jobs" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a bug"), mg.exit_status("script.py"):
        raise ValueError("a bug")  # keeps its traceback


# ------------------------ tables and figures say what the records say
def make_records(losses, **more):
    """{arm: {seed: loss}} -> {run: record}"""
    found = {}
    for arm, by_seed in losses.items():
        for seed, loss in by_seed.items():
            curve = [[0, 9, 0], [4, 9, loss]]  # step, training loss, validation loss
            record = dict(val_loss=loss, train_loss=9, n_params=7, sample="so", curve=curve)
            run = mg.TextRun(arm=arm, seed=seed, block_size=4)
            found[run] = record | dict(loss_by_position=[loss, loss, loss, 3 * loss]) | more
    return found


def test_gaps_and_shares_are_paired_by_seed():
    found = make_records(dict(vanilla={1: 2, 0: 1}, myopic={0: 1.5, 2: 7}, bigram={0: 2, 1: 2.05}))
    assert mg.gaps(found, "myopic") == {0: 0.5}
    assert mg.shares_of_bigram(found, "myopic") == [50]
    assert mg.shares_of_bigram(found, "bigram") == [100]  # seed 1's bigram is worth 0.05: noise
    assert mg.mean_sd([1, 2, 3]) == "2.000 ± 1.000" and mg.mean_sd([0.5]) == "0.500"
    assert mg.mean_sd([]) == "-"


def test_gaps_are_drawn_as_they_are(tmp_path, monkeypatch):
    drawn, draw = [], mg.draw_arms

    def spy(ax, x, lines, **labels):
        drawn.append((list(x), {arm: np.array(runs).tolist() for arm, runs in lines.items()}))
        draw(ax, x, lines, **labels)

    monkeypatch.setattr(mg, "draw_arms", spy)
    found = make_records(dict(vanilla={0: 1, 1: 1}, myopic={0: 2, 1: 4}, bigram={0: 4, 1: 4}))
    mg.plot_gaps(found, tmp_path / "figure.png", "")
    training, position = drawn
    assert training == ([0, 4], dict(myopic=[[0, 1], [0, 3]], bigram=[[0, 3], [0, 3]]))
    assert position[0] == [0, 1, 2]  # positions 0, 1, and 2 and 3
    assert position[1]["myopic"] == [[1, 1, 2], [3, 3, 6]]
    assert (tmp_path / "figure.png").exists()


def test_the_table_shows_no_control_letter_and_cuts_no_number(tmp_path, monkeypatch, capsys):
    sample = "a\x1b[31m\x9b\x07b\r\nc [red] :smile:"
    found = make_records(dict(vanilla={0: 1.234}), sample=sample)
    monkeypatch.setattr(mg, "plot_lags", nothing)
    mg.report(found, SimpleNamespace(out_dir=tmp_path))
    out = capsys.readouterr().out
    assert all(c.isprintable() for c in out.replace("\n", ""))
    assert "a [31m" in out and "[red] :smile:" in out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    row = ["6x128", "local_myopic", *["12.345 ± 0.123"] * 6]
    mg.print_table("", ["size", "arm", *"abcdef"], [row], "")
    out = capsys.readouterr().out
    assert "…" not in out and out.count("12.345") == 6


def test_a_users_settings_of_matplotlib_have_no_say(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # where there is no latex
    call(tmp_path, "--arms vanilla myopic")
    assert (tmp_path / "OUT" / "text_gaps.png").exists() and matplotlib.rcParams["text.usetex"]


def test_horizons_look_different():
    looks = {mg.look(f"horizon_{h}") for h in (1, 2, 4, 9, 10, 16)}
    assert len(looks) == 6 and mg.look("myopic") == mg.LOOKS["myopic"]


def test_bench_times_what_it_says_and_two_streams_are_detached(tmp_path, monkeypatch, capsys):
    def once(calls, device):
        for call in calls.values():
            call()
        return list(calls)

    attention, two_streams = Mock(wraps=mg.myopic_attention), Mock(wraps=mg.two_stream_attention)
    monkeypatch.setattr(mg, "time_calls", once)
    monkeypatch.setattr(mg, "myopic_attention", attention)
    monkeypatch.setattr(mg, "two_stream_attention", two_streams)
    mg.main(tiny(tmp_path, "--bench"))
    horizons = [c.kwargs["horizon"] for c in attention.call_args_list if "horizon" in c.kwargs]
    assert horizons == [None, 0] * 3
    assert [c.args[4] for c in attention.call_args_list if len(c.args) > 4] == [None, 0]  # steps
    for c in two_streams.call_args_list:
        x, past_x = c.args[:2]
        assert x.requires_grad and not past_x.requires_grad and torch.equal(x, past_x)
    monkeypatch.undo()
    cells = mg.time_calls(
        {"slow": lambda: sum(range(20000)), "fast": lambda: None}, "cpu", rounds=3
    )
    assert cells[0].startswith("1.00 (1.00–1.00)") and float(cells[1][:4]) < 0.5


# ------------------------ the sine task
def test_sample_batch_is_the_definition_and_the_curriculum_ends_on_it():
    a, b, T = 3, 4.0, 9
    xs, ys = synthetic.sample_batch(5, T, 0.5, a, b, torch.Generator().manual_seed(0))
    for s, n in itertools.product(range(5), range(T)):
        x, z = xs[s, :, 0].double(), xs[s, n, 1].item()
        past = sum(math.sin(b * x[n - i]) for i in range(1, a + 1) if n - i >= 0)
        assert z in (0, 1) and abs(ys[s, n].item() - (z * past + (1 - z) * x[n].item())) < 1e-5
    x, y = synthetic.sample_batch(4000, 64, 0.3, generator=torch.Generator().manual_seed(1))
    assert abs(x[..., 1].mean() - 0.3) < 0.01 and abs(x[..., 0].std() - 1) < 0.01
    losses = synthetic.huber_losses(lambda x: (torch.zeros(x.shape[:2]), None), x, y, 0.3)
    assert losses["trivial_over_p"] == pytest.approx(1.2569, abs=0.03)  # the paper's
    assert losses["ratio"] * 0.3 * losses["trivial_over_p"] == pytest.approx(F.huber_loss(y * 0, y))
    run = replace(synthetic.QUICK, max_iters=100, p=0.25, p_until=0.85)
    assert synthetic.curriculum(run, 0) == (2.0, 1.0, 1.5)
    assert synthetic.curriculum(run, 40) == pytest.approx((6.0, 0.25 ** (25 / 70), 1.5))
    assert synthetic.curriculum(run, 50) == pytest.approx((7.6, 0.5, 1.5))
    assert all(synthetic.curriculum(run, step) == (10.0, 0.25, 1.0) for step in range(85, 100))


def test_r_squared_is_centred_and_the_probe_is_held_out():
    truth = torch.tensor([[5.0], [7.0]])
    assert synthetic.r_squared(torch.tensor([[6.0], [6.0]]), truth).tolist() == [0]
    assert synthetic.r_squared(truth, truth).tolist() == [1]
    noise = Mock()  # a model whose states know nothing: in sample, 100 channels would find much
    noise.hidden_states = lambda x: [torch.randn(*x.shape[:2], 100)] * 2
    run = replace(synthetic.QUICK, block_size=12, a=3, b=4.0)
    torch.manual_seed(0)
    r2, _, _ = synthetic.probe_model(noise, run, 32, "cpu")
    assert np.max(r2) < 0
    knows = Mock()  # its layer 1 holds the sine of x two positions back, and nothing else
    knows.hidden_states = lambda x: [x * 0, F.pad(torch.sin(4 * x), (0, 0, 2, 0))[:, :-2]]
    r2, x, estimate = synthetic.probe_model(knows, run, 600, "cpu")
    assert r2[1] == pytest.approx([0, 0, 1, 0, 0, 0], abs=0.02) and len(x) == len(estimate)
    assert max(np.abs(r2[0])) < 0.02


def test_patch_measures_cause_and_effect():
    run = replace(synthetic.QUICK, block_size=40, a=5, b=3.0, p=0.5)
    model = Mock()  # its layer 1 holds the sine; where z = 1, its answer is half the sum due
    model.hidden_states = lambda x: [x, torch.stack([torch.sin(run.b * x[..., 0]), x[..., 1]], -1)]

    def answer(state, blocks_done):
        return F.pad(state[..., 0], (5, 0))[:, :-1].unfold(1, 5, 1).sum(-1) / 2 * state[..., 1]

    model.answer = answer
    slopes = synthetic.patch(model, run, 500, "cpu")
    assert slopes == pytest.approx([0] + [0.5] * 5 + [0] * 10, abs=1e-4)


def test_evaluation_never_sees_what_training_draws(monkeypatch):
    evaluated, trained_on, sample = [], [], synthetic.sample_batch

    def spy(*args, **more):
        generator = next(t for t in (*args, *more.values()) if isinstance(t, torch.Generator))
        seed = generator.initial_seed()
        (evaluated if seed >= synthetic.EVALUATION else trained_on).append((seed, args[2:5]))
        return sample(*args, **more)

    monkeypatch.setattr(synthetic, "sample_batch", spy)
    run = replace(synthetic.PRESETS["demo"]["run"], max_iters=10, p=0.5, seed=7, eval_sequences=64)
    _, numbers, arrays = synthetic.train_sine(run, "cpu", nothing)
    assert {seed for seed, _ in trained_on} == {1007} and len(trained_on) == 10
    assert len({seed for seed, _ in evaluated}) >= 4
    # the curve is of the task that training is at, the numbers of the run's own
    at = [synthetic.curriculum(run, step) for step in range(11)]
    of_curve = [task for seed, task in evaluated if task[0] != 0.5 or task[2] != 4.0]
    assert {task[0] for task in of_curve} >= {p for b, p, _ in at if p not in (0.5,)}
    assert {task[2] for task in of_curve} >= {b for b, p, _ in at if b != 4.0}
    assert [step for step, _ in numbers["curve"]] == list(range(11))
    assert arrays["film"].shape == (11, 2, 300) and len(numbers["probe_r2"]) == 3


def sine_model(**arm):
    """A small model of the sine task in float64 with random weights, and a batch."""
    torch.manual_seed(0)
    model = synthetic.SineModel(mg.GPTConfig(9, 1, 2, 2, 12, **arm)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, y = synthetic.sample_batch(4, 9, 0.7, 3, 4.0, torch.Generator().manual_seed(0))
    return model, x.double(), y.double()


def text_model(**arm):
    return make_gpt(**arm), *batch(8)


def test_the_sine_model_starts_with_waves_and_answers_from_any_layer():
    model = synthetic.SineModel(mg.GPTConfig(64, 1, 2, 2, 128), 0.1, 0.3)
    waves = model.transformer.wpe.weight
    assert waves.square().mean().item() == pytest.approx(0.3**2, rel=0.1)
    assert waves[0, 1].item() == pytest.approx(math.sqrt(2) * 0.3)  # a cosine at position 0
    assert model.read_in.weight.std().item() == pytest.approx(0.1, rel=0.2)
    model, x, y = sine_model()
    assert isinstance(model.transformer.h[0].mlp.gelu, torch.nn.ReLU)
    guess, loss = model(x, y)
    for done, state in enumerate(model.hidden_states(x)):
        assert relative_error(model.answer(state, done), guess) < 1e-12
    assert relative_error(model.position_losses(state, y).mean(), loss) < 1e-12


REACH = dict(vanilla=(8, 8), horizon_2=(4, 2), myopic=(0, 0), myopic_kv=(0, 0))


@pytest.mark.parametrize("arm", REACH)
def test_a_loss_reaches_the_embedding_through_two_layers_and_layer_1_through_one(arm):
    model, x, y = sine_model()
    tables = mg.gradient_tables(mg.as_arm(model, arm), x, y)
    for i, j in itertools.product(range(9), range(9)):
        assert [t[i, j] > 1e-9 for t in tables[:2]] == [0 <= i - j <= n for n in REACH[arm]]
        assert (tables[2][i, j] > 1e-9) == (i == j)
    assert model.transformer.h[0].attn.horizon is None  # as_arm copies


@pytest.mark.parametrize("make", [sine_model, text_model])
def test_parts_by_lag_add_up_to_the_gradient(make):
    model, x, y = make()
    weights = [block.attn.c_attn.weight for block in model.transformer.h]
    true = torch.autograd.grad(model(x, y)[1], weights)
    by_lag, shares = mg.gradients_by_lag(model, x, y), mg.lag_shares(model, x, y)
    for parts, whole, share in zip(by_lag, true, shares):
        assert relative_error(parts.sum(0), whole[12:]) < 1e-10
        assert (parts.norm(dim=(1, 2)) > 1e-9).all()  # every lag has a part
        for n, g in enumerate((whole[12:24], whole[24:])):  # W_K, then W_V
            own = (parts[0, 12 * n : 12 * n + 12] * g).sum() / g.square().sum()
            assert share[n][0] == pytest.approx(own.item(), abs=1e-4)
            assert sum(share[n]) == pytest.approx(1, abs=1e-3)
    # lag 0 alone is what the writer's account leaves: dW_K, dW_V of the cut "kv" in the last layer
    kv = gradients(mg.as_arm(model, "myopic_kv"), x, y)["transformer.h.1.attn.c_attn.weight"]
    assert relative_error(by_lag[1, 0], kv[12:]) < 1e-10
    for arm in ("myopic", "myopic_kv"):  # or the tests of the definition would be empty
        cut = gradients(mg.as_arm(model, arm), x, y)["transformer.h.0.attn.c_attn.weight"]
        assert relative_error(cut, true[0]) > 0.05


def test_vanilla_plans_ahead_and_myopic_does_not():
    run = synthetic.PRESETS["demo"]["run"]
    _, vanilla, _ = synthetic.train_sine(run, "cpu", nothing)
    _, myopic, _ = synthetic.train_sine(replace(run, arm="myopic"), "cpu", nothing)
    assert vanilla["ratio"] < 0.2 and myopic["ratio"] > 0.85
    assert vanilla["probe_r2"][1][0] > 0.7 > 0.3 > vanilla["probe_r2_untrained"][1][0]
    assert np.mean(vanilla["patch_slope"][1 : run.a + 1]) > 0.7
    assert myopic["probe_r2"][1][0] < 0.1 > np.abs(myopic["patch_slope"]).max()


def test_sines_from_command_to_film(tmp_path, capsys):
    tiny = "--preset demo --max_iters 6 --batch_size 4 --n_embd 8 --eval_sequences 64 --jobs 1"
    flags = [*tiny.split(), "--p", "0.5", "1", "--out_dir", str(tmp_path)]
    synthetic.main(flags)
    pictures = ["precache.png", "precache.gif"]
    pictures += [f"precache_{name}.png" for name in ("patch", "lags", "sequence", "gradients")]
    made = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert made == set(pictures)
    out = capsys.readouterr().out
    assert out.index("Pre-caching") < out.index("figure ") < out.index("open ")  # result first
    synthetic.main([*flags, "--plot_only", "--seeds", "2"])
    assert "no precache" not in capsys.readouterr().out
    synthetic.main([*flags, "--seed", "1"])
    for run in synthetic.mg.read_runs(tmp_path, synthetic.SineRun):
        if run.seed == 1:  # as if it had not been the first seed
            mg.run_path(tmp_path, run, ".npz").unlink()
    capsys.readouterr()
    synthetic.main([*flags, "--plot_only", "--seed", "1"])
    out = capsys.readouterr().out
    for name in ("precache_sequence.png", "precache_gradients.png", "precache.gif"):
        assert f"no {name}: " in out and not (tmp_path / name).exists()
    synthetic.main([*flags, "--p", "1", "--sizes", "2x8", "2x16"])
    assert (tmp_path / "precache_size.png").exists()


# ------------------------ run_all.sh
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("words, status, said", [("--help", 0, "Set up once"), ("--arms x", 2, "")])
def test_run_all_from_anywhere_and_with_any_environment(tmp_path, words, status, said):
    (tmp_path / "project").symlink_to(ROOT, target_is_directory=True)
    odd = dict(CDPATH=str(tmp_path), PYTHONOPTIMIZE="2", PYTHONSAFEPATH="1", MPLBACKEND="no_such")
    command = ["bash", "project/run_all.sh", *words.split()]
    env = {**os.environ, **odd, "PYTHONHOME": "no_such"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == status and said in done.stdout and "==" not in done.stdout
    assert "Traceback" not in done.stderr and len(done.stdout.splitlines()) < 8
    assert [path.name for path in tmp_path.iterdir()] == ["project"]  # nothing is made


# ------------------------ README
README, TABLES = ((ROOT / name).read_text("utf-8") for name in ("README.md", "results/README.md"))


def test_readme_shows_what_its_examples_print(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shown = re.findall(r"```python\n(import.*?)```(?:\s+```\n(.*?)```)?", README, re.S)
    for code, printed in shown:
        exec(code, {})
        assert capsys.readouterr().out == printed
    assert len(shown) == 2


def test_numbers_in_the_tables_are_those_of_the_records():
    rows = []
    for folder in ("demo", "quick", "full", "earlier"):
        groups = {}
        for kind in (synthetic.SineRun, mg.TextRun):
            for run, record in mg.read_runs(ROOT / "results" / folder, kind).items():
                groups.setdefault(replace(run, seed=0, arm="vanilla"), {})[run] = record
        for base, group in groups.items():
            for arm in mg.arms_of(group):
                records = [record for run, record in group.items() if run.arm == arm]
                if folder == "earlier" and len(records) == 1:
                    continue  # the ablation has a table of its own
                n = str(len(records))
                if base.kind == "sines":
                    columns = zip(*map(synthetic.main_numbers, records))
                    rows.append([f"{base.p:g}", arm, n, *map(mg.mean_sd, columns)])
                else:
                    losses = mg.mean_sd(mg.per_seed(group, arm, "val_loss"))
                    gap = mg.mean_sd(list(mg.gaps(group, arm).values()))
                    rows.append([f"{records[0]['n_params']:,}", arm, n, losses, gap])
    assert len(rows) > 15
    for row in rows:
        assert f"| {' | '.join(row)} |" in TABLES
    shown = [line for line in README.splitlines() if line.startswith("|") and "±" in line]
    assert len(shown) > 3 and set(shown) <= set(TABLES.splitlines())
