"""The tests: offline, on the CPU and whatever accelerator is present.   python -m pytest -q
The hand-written backward is held against the definition executed literally: literal_gradient."""

import copy
import functools
import hashlib
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
from dataclasses import asdict, dataclass, fields, replace
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
if torch.cuda.is_available():
    DEVICES.append(("cuda", torch.bfloat16))


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
def literal_losses(copies, idx, targets, owner, frozen=None):
    """The loss at every position (T,), where position i computes with its own copy of the model.

    owner: whose copy of W_K, W_V makes the key of writer j for reader i: the "reader"'s or the
    "writer"'s. frozen: per layer (B, T, C), what the ln_1 of the past gave, or None: their own."""
    T, config = idx.size(1), copies[0].config
    hs = config.n_embd // config.n_head
    x = []
    for i, model in enumerate(copies):
        x.append(
            model.transformer.wte.weight[idx[:, i]] + model.transformer.wpe.weight[i]
        )  # (B, C)
    for layer in range(config.n_layer):
        blocks = [model.transformer.h[layer] for model in copies]
        normed = [block.ln_1(x_i) for block, x_i in zip(blocks, x)]
        for i, block in enumerate(blocks):
            keys, values = [], []
            for j in range(i + 1):
                whose = block if owner == "reader" else blocks[j]
                seen = frozen[layer][:, j] if frozen is not None and j < i else normed[j]
                _, k, v = whose.attn.c_attn(seen).chunk(3, dim=-1)
                keys.append(k.unflatten(-1, (-1, hs)))  # (B, nh, hs)
                values.append(v.unflatten(-1, (-1, hs)))
            q, _, _ = block.attn.c_attn(normed[i]).chunk(3, dim=-1)
            q = q.unflatten(-1, (-1, hs))
            scores = [(q * k).sum(-1, keepdim=True) / math.sqrt(hs) for k in keys]  # (B, nh, 1)
            weights = torch.stack(scores).softmax(0)  # (i + 1, B, nh, 1)
            mixed = (weights * torch.stack(values)).sum(0).flatten(1)  # (B, C)
            x[i] = x[i] + block.attn.c_proj(mixed)
            x[i] = x[i] + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x[i]))))
    losses = []
    for i, model in enumerate(copies):
        logits = model.transformer.ln_f(x[i]) @ model.transformer.wte.weight.T  # (B, V)
        losses.append(F.cross_entropy(logits, targets[:, i]) / T)
    return losses


def literal_gradient(model, idx, targets, which, owner, frozen=None):
    """The gradient of the mean loss by the definition: the sum of d loss_i / d (copy j) over all i
    and j (which="all") or over i = j (which="diagonal"). Of the model only its layers are used."""
    T = idx.size(1)
    copies = [copy.deepcopy(model) for _ in range(T)]
    losses = literal_losses(copies, idx, targets, owner, frozen)
    total = {name: torch.zeros_like(p) for name, p in trained(model).items()}
    for j in range(T):
        loss = losses[j] if which == "diagonal" else sum(losses)
        of_j = list(trained(copies[j]).values())
        grads = torch.autograd.grad(loss, of_j, retain_graph=True, allow_unused=True)
        for name, grad in zip(total, grads):
            if grad is not None:
                total[name] += grad
    return total


ARMS = [("myopic", "diagonal", "reader"), ("myopic_kv", "diagonal", "writer")]
ARMS += [("vanilla", "all", "writer")]  # for which the owner does not matter
SHAPES = [(1, 1, True, 1), (1, 3, False, 5), (2, 2, True, 3), (2, 1, False, 4), (3, 2, True, 5)]


@pytest.mark.parametrize("n_layer, n_head, bias, T", SHAPES)
@pytest.mark.parametrize("arm, which, owner", ARMS)
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
        monkeypatch.setattr(mg, "hasattr", Mock(return_value=False), raising=False)
    got = attention_gradients(mg.myopic_attention, leaves, dy, 3, horizon, cut)
    assert_agree(got, true, TYPES[dtype])


def test_padded_log_sum_exp_and_large_scores():
    q, k, v, out = mg.attend(*torch.randn(3, 2, 3, 5, 8).double())
    lse = out.grad_fn._saved_logsumexp  # (B, nh, T)
    padded = SimpleNamespace(_saved_log_sumexp=F.pad(lse, (0, 27)))
    trailing = SimpleNamespace(_saved_logsumexp=lse[..., None])
    for grad_fn, asked in ((padded, 0 * q), (trailing, 0 * q), (None, q)):  # read, or computed of q
        got = mg.log_sum_exp(asked, k, SimpleNamespace(grad_fn=grad_fn))
        assert relative_error(got, lse) < 1e-12 and got.shape == (2, 3, 5)
    big = torch.full((1, 1, 2, 8), 300.0)
    dk, dv = mg.lag_gradients(0, big, big, big, big, big, torch.zeros(1, 1, 2))
    assert dk.isfinite().all() and torch.equal(dv, big)  # P is at most 1, however wrong lse is


@pytest.mark.parametrize("horizon", [None, 0])
def test_it_holds_where_others_take_graphs_apart(horizon):
    leaves, dy = attention_inputs(9)
    call = functools.partial(mg.myopic_attention, n_head=3, horizon=horizon)
    true = attention_gradients(call, leaves, dy)

    def copied(*leaves):  # as a caller's hooks give saved tensors back: without their graph
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            return call(*leaves)

    ways = dict(copied=copied)
    for reentrant in (True, False):
        ways[reentrant] = functools.partial(checkpoint, call, use_reentrant=reentrant)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        ways[backend] = torch.compile(call, backend=backend)
    for way in ways.values():
        for t in leaves:
            t.grad = None
        y = way(*leaves)
        y.backward(dy)
        got = dict(y=y.detach(), dx=leaves[0].grad, dw=leaves[1].grad, db=leaves[2].grad)
        assert_agree(got, true, 1e-12)


def test_autocast_as_torchs_own():
    leaves, dy = attention_inputs(9)
    true = attention_gradients(mg.myopic_attention, leaves, dy, 3)
    low = [t.detach().float().requires_grad_() for t in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        assert mg.myopic_attention(*leaves, 3).dtype == torch.float64
        y = mg.myopic_attention(*low, 3)
    assert y.dtype == torch.bfloat16
    dx, dw, db = torch.autograd.grad(y, low, dy.bfloat16())
    assert {t.dtype for t in (dx, dw, db)} == {torch.float32}
    assert_agree(dict(y=y.detach(), dx=dx, dw=dw, db=db), true, 0.03)


def test_bad_shapes_and_settings_are_refused():
    (x, w, b), _ = attention_inputs(9)
    bad = [(x[0], w, b, 3), (x, w[:36], b, 3), (x, w, b, 5), (x, w, b, 0), (x, w, b, 3, 1.5)]
    for arguments in [*bad, (x, w, b, 3, 0, "k")]:
        with pytest.raises(mg.UsageError):
            mg.myopic_attention(*arguments)


def test_what_it_saves_is_small_is_not_mutated_and_is_freed_by_the_backward_pass():
    leaves, dy = attention_inputs(9)
    y = mg.myopic_attention(*leaves, 3)
    *_, out = saved = y.grad_fn.saved_tensors
    tensors = [*saved, out.grad_fn._saved_logsumexp, *leaves, dy]
    assert all(t.shape.count(9) < 2 for t in tensors)  # none is (T, T)
    before = [t.detach().clone() for t in tensors]
    for _ in range(2):
        torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert all(torch.equal(t, old) for t, old in zip(tensors, before))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), leaves, create_graph=True)

    kept = [weakref.ref(t) for t in saved[2:]]  # q, k, v, O
    del saved, out, tensors
    assert all(ref() is not None for ref in kept)
    torch.autograd.grad(y, leaves, dy)
    assert all(ref() is None for ref in kept)  # by counting references: there is no cycle
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, dy)


def test_lengths_and_batches_of_none():
    for B, T in ((0, 3), (2, 0), (1, 1)):
        x = torch.randn(B, T, 8, requires_grad=True)
        w = torch.randn(24, 8, requires_grad=True)
        for horizon in (None, 0, 2):
            y = mg.myopic_attention(x, w, None, 2, horizon)
            dx, dw = torch.autograd.grad(y.sum(), (x, w))
            assert (y.shape, dx.shape, dw.shape) == (x.shape, x.shape, w.shape)
        assert mg.two_stream_attention(x, None, w, None, 2).shape == x.shape


# ------------------------ facts about the idea
def test_nanogpt_weights_load():
    layers = {"ln_f": (12,), "h.0.ln_1": (12,), "h.0.ln_2": (12,), "h.0.attn.c_attn": (36, 12)}
    layers |= {"h.0.attn.c_proj": (12, 12), "h.0.mlp.c_fc": (48, 12), "h.0.mlp.c_proj": (12, 48)}
    state = {f"transformer.{n}.bias": torch.zeros(shape[0]) for n, shape in layers.items()}
    layers |= {"wte": (11, 12), "wpe": (8, 12)}
    state |= {f"transformer.{n}.weight": torch.randn(shape) for n, shape in layers.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    make_gpt(n_layer=1, n_head=3).load_state_dict(state, strict=True)


def test_two_streams_with_a_detached_past_are_myopic():
    def two_streams(x, w, b):
        return mg.two_stream_attention(x, x.detach(), w, b, 3)

    leaves, dy = attention_inputs(9)
    true = attention_gradients(two_streams, leaves, dy)
    assert_agree(attention_gradients(mg.myopic_attention, leaves, dy, 3), true)


def test_bigram_and_local_myopic():
    teacher, (idx, targets), other = make_gpt(dropout=0.5), batch(6), batch(6)[0]
    other[:, :4] = (idx[:, :4] + 1) % 11
    bigram = make_gpt(**mg.ARMS["bigram"])
    assert torch.equal(bigram(idx)[0][:, 4:], bigram(other)[0][:, 4:])
    local = make_gpt(teacher=teacher, **mg.ARMS["local_myopic"]).train()
    assert all(not p.requires_grad for p in teacher.parameters())
    dropping = make_gpt(teacher=make_gpt(), dropout=0.5, **mg.ARMS["local_myopic"])
    first = dropping.hidden_states(idx)[0]
    assert not torch.equal(dropping.hidden_states(idx)[0], first)  # its own states do drop out
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
    assert torch.equal(likeliest[:, 6:9], model(likeliest[:, :8])[0][:, 5:].argmax(-1))
    assert likeliest.shape == (2, 10)
    for bad in (dict(temperature=0), dict(top_k=0)):
        with pytest.raises(mg.UsageError, match="top_k"):
            model.generate(idx, 4, **bad)
    with pytest.raises(mg.UsageError, match="no tokens"):
        model.generate(idx[:, :0], 4)


def test_dropout_acts_in_training_alone():
    model, (idx, _) = make_gpt(dropout=0.5, n_layer=1), batch(6)
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
    if n:  # one rate fits both
        assert optimizers[1].defaults["adjust_lr_fn"] == "match_rms_adamw"
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

    progress = Mock()
    mg.train(model, optimizers, lambda step: batch(6), run, progress, after_step)
    assert progress.call_args[0][0] == 4
    assert seen == pytest.approx([0.1, 0.1, 0.2] + 2 * [0.2, 0.2, 0.4] + [0.1, 0.1, 0.2])
    for name, p in mg.GPT(mg.GPTConfig(64, 200, 8, 2, 128)).named_parameters():
        std = 0.005 if name.endswith("c_proj.weight") else 0.02 * (p.dim() == 2)
        assert p.std().item() == pytest.approx(std, rel=0.1), name
        assert p.dim() == 2 or p[0] == (not name.endswith("bias")), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_clipped_and_takes_its_products_in_the_dtype(monkeypatch, dtype):
    model = make_gpt(torch.float32)
    run = mg.TextRun(max_iters=1, grad_clip=0.01, warmup=0, dtype=dtype)
    monkeypatch.setattr(mg, "attend", Mock(wraps=mg.attend))
    before = [p.detach().clone() for p in model.parameters()]
    plain = torch.optim.SGD(model.parameters(), 1.0)
    mg.train(model, [plain], lambda step: batch(6), run, nothing)
    assert mg.attend.call_args[0][0].dtype == getattr(torch, dtype)
    assert all(p.grad is None for p in model.parameters())  # nothing is left for the next step
    moved = [(p - old).flatten() for p, old in zip(model.parameters(), before)]
    assert torch.cat(moved).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_text_is_split_between_paragraphs(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("\ufeff" + "the cat, the dög.\n\n" * 200, encoding="utf-8")
    train, held_out = (part.decode() for part in mg.load_text([file], 8))
    assert train == "the cat, the dög.\n\n" * 180 + "the cat, the dög."
    assert held_out == "\n\nthe cat, the dög." * 19 + "\n\n"


def test_english_is_each_paragraph_once_and_its_documents_are_ordered_by_digest(
    tmp_path, monkeypatch
):
    train, held_out = (set(part.split(b"\n\n")) for part in mg.load_text([], 64))
    assert len(train) > 5000 and len(held_out) > 500 and train & held_out <= {b""}
    (tmp_path / "module.py").write_text('"""one"""\ndef f():\n    """two\n\n    one"""')
    monkeypatch.setattr(mg.ast, "__file__", str(tmp_path / "ast.py"))
    monkeypatch.setattr(mg, "topics", dict(a="three", b="four", c="five", d="six"))
    documents = ["one", "two\n\none", "three", "four", "five", "six"]
    documents.sort(key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    paragraphs = "\n\n".join(documents).split("\n\n")
    assert mg.python_english().split("\n\n") == list(dict.fromkeys(paragraphs))


def test_losses_of_tokens_are_evenly_spaced_in_order_and_without_dropout():
    model, rows = make_gpt(dropout=0.5).train(), torch.arange(5000).remainder(11).unfold(0, 9, 1)
    losses, y = mg.token_losses(model, rows, 4000)  # in three chunks
    assert not model.training and losses.shape == y.shape == (4000, 8)
    assert y[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and y[-1, -1] == 4999 % 11
    logits, _ = model(torch.cat([(y[:, :1] - 1) % 11, y[:, :-1]], dim=1))
    assert relative_error(losses, F.cross_entropy(logits.mT, y, reduction="none")) < 1e-6


def test_the_numbers_of_a_record_are_of_the_right_text(monkeypatch):
    def losses_are_bytes(model, windows, count):
        y = windows[:count, 1:].long()
        return y.double(), y

    monkeypatch.setattr(mg, "token_losses", losses_are_bytes)
    monkeypatch.setattr(mg, "lag_shares", Mock(side_effect=["before", "after"]))
    settings = dict(block_size=3, max_iters=2, learning_rate=0, dropout=0.5)
    run = mg.TextRun(eval_windows=1, **settings)
    model, numbers, _ = mg.train_text((b"d" * 40, b"9 ab" * 10), run, "cpu", nothing)
    a, b, d = ord("a"), ord("b"), ord("d")
    mean = pytest.approx((32 + a + b) / 3)
    assert numbers["train_loss"] == d and numbers["val_loss"] == mean
    assert numbers["curve"] == [[1, d, mean], [2, d, mean]]
    assert numbers["loss_by_position"] == [32, a, b]
    assert numbers["sample"].startswith("9 ab")
    assert numbers["lag_share"] == dict(start="before", end="after")
    assert model.transformer.drop.p == 0.5


# ------------------------ runs and their files
def test_a_run_refuses_bad_values_and_equal_runs_have_one_name():
    bad = [dict(dtype="bf16"), dict(muon="some"), dict(block_size=2.5), dict(n_head=0)]
    bad += [dict(arm="no_such"), dict(arm="horizon_1.5"), dict(learning_rate=math.nan)]
    bad += [dict(learning_rate=math.inf), dict(weight_decay=-1), dict(max_iters=0)]
    bad += [dict(beta1=1), dict(dropout=1), dict(n_embd=7), dict(seed=-1), dict(warmup=2)]
    for settings in bad:
        with pytest.raises(mg.UsageError):
            mg.TextRun(**settings)
    bad = [dict(p=0), dict(p=1.5), dict(a=32), dict(n_layer=1), dict(seed=9000)]
    for settings in [*bad, dict(arm="local_myopic"), dict(arm="no_such")]:
        with pytest.raises(mg.UsageError):
            replace(synthetic.QUICK, **settings)
    with pytest.raises(mg.UsageError, match="past"):
        mg.GPTConfig(1, 1, 1, 1, 1, past="no_such")
    assert replace(synthetic.QUICK, b=4).name() == replace(synthetic.QUICK, b=4.0).name()
    assert mg.TextRun().name() == "text-vanilla-seed0-44136fa3"  # it must never change


def test_every_field_changes_the_name_of_a_run():
    others = dict(arm="myopic", muon="attn", dtype="bfloat16", data_sha256="x")
    for f in fields(mg.TextRun):
        if f.type is int:
            others[f.name] = 2 * f.default or 1
        elif f.type is float:
            others[f.name] = f.default / 2 or 0.5
    names = {replace(mg.TextRun(), **{name: value}).name() for name, value in others.items()}
    assert len(names | {mg.TextRun().name()}) == len(fields(mg.TextRun)) + 1


def test_a_new_field_loses_no_record_and_a_changed_default_does(tmp_path):
    @dataclass(frozen=True)
    class Newer(mg.TextRun):
        more: int = mg.setting(5, "a field that old records lack")

    (tmp_path / "runs").mkdir()
    run = mg.TextRun(seed=3)
    mg.save_run(tmp_path, run, asdict(run), None)
    assert Newer(seed=3).name() == run.name()
    assert Newer(seed=3) in mg.read_runs(tmp_path, Newer)
    mg.save_run(tmp_path, run, asdict(run) | dict(max_iters=701), None)  # the default of its time
    assert run not in mg.read_runs(tmp_path, mg.TextRun)
    path = mg.run_path(tmp_path, run)
    path.write_text(path.read_text("utf-8")[:-3], "utf-8")
    with pytest.raises(mg.UsageError, match=f"{path.name}: .*delete it"):
        mg.read_runs(tmp_path, mg.TextRun)


def test_a_file_is_whole_or_not_there_and_a_full_disk_costs_the_arrays_alone(tmp_path, monkeypatch):
    def fail(part, **arrays):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "runs").mkdir()
    with pytest.raises(mg.UsageError, match="No space left"):
        mg.write_whole(tmp_path / "figure", fail)
    run, arrays = mg.TextRun(), dict(a=np.zeros(2))
    monkeypatch.setattr(np, "savez_compressed", fail)
    mg.save_run(tmp_path, run, asdict(run), arrays)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [mg.run_path(tmp_path, run)]
    written = Mock()
    monkeypatch.setattr(mg, "write_whole", written)
    mg.save_run(tmp_path, run, asdict(run), arrays)  # a record says: all is there
    assert [c.args[0].suffix for c in written.call_args_list] == [".npz", ".json"]


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


def watch_training(monkeypatch):
    """-> a list that gets a model's start, batches and end, whenever one is trained."""
    watched, train = [], mg.train

    def spy(model, optimizers, next_batch, run, report_progress, after_step):
        start = {name: p.clone() for name, p in trained(model).items()}
        batches = []

        def remember(step):
            batches.append(next_batch(step))
            return batches[-1]

        train(model, optimizers, remember, run, report_progress, after_step)
        watched.append(SimpleNamespace(start=start, batches=batches, end=trained(model)))

    monkeypatch.setattr(mg, "train", spy)
    return watched


FOUR = "--arms vanilla horizon_1 bigram local_myopic"


def test_arms_share_start_and_batches_and_seeds_share_none(tmp_path, monkeypatch):
    models = watch_training(monkeypatch)
    torch.set_num_threads(2)  # a run takes one all the same
    records = call(tmp_path, FOUR)
    vanilla, _, _, teacher, _ = models  # local_myopic trains its teacher first
    assert torch.get_num_threads() == 1
    assert_agree(teacher.end, vanilla.end, 0)
    for model in models:
        assert_agree(model.start, vanilla.start, 0)
        for (x, y), (vanilla_x, vanilla_y) in zip(model.batches, vanilla.batches):
            assert torch.equal(x, vanilla_x) and torch.equal(y, vanilla_y)
    assert len({record["val_loss"] for record in records.values()}) == 4
    assert len({record["n_params"] for record in records.values()}) == 1

    text = (tmp_path / "DATA").read_bytes()
    cut = len(text) * 9 // 10
    x, y = vanilla.batches[0]
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert all(bytes(row.tolist()) in text[:cut] for row in x)
    for record in records.values():
        assert record["curve"][-1] == [4, record["train_loss"], record["val_loss"]]
        assert record["data_sha256"] == hashlib.sha256(b"%d " % cut + text).hexdigest()
    run = mg.TextRun(**{f.name: records["vanilla", 0][f.name] for f in fields(mg.TextRun)})
    arrays = mg.read_arrays(tmp_path / "OUT", run)
    assert arrays["y"][0].tobytes() == text[cut:][1:9]
    again = mg.load_weights(mg.GPT(run.config(256)), arrays)  # kept in half precision
    assert_agree(trained(again), vanilla.end, 1e-3)
    assert not again.training and mg.read_arrays(tmp_path / "OUT", mg.TextRun()) is None

    assert call(tmp_path, FOUR) == records and len(models) == 5  # trained once
    assert call(tmp_path, "--arms bigram --fresh") == records and len(models) == 6
    assert call(tmp_path, FOUR + " --jobs 2", "TWO") == records
    call(tmp_path, "--arms vanilla --seed 1")
    assert not torch.equal(models[-1].batches[0][0], x)
    wte = "transformer.wte.weight"
    assert relative_error(models[-1].start[wte], vanilla.start[wte]) > 1

    monkeypatch.setattr(mg, "report", Mock())
    call(tmp_path, "--arms local_myopic bigram")
    found, _ = mg.report.call_args[0]  # the runs asked for, in that order
    assert [run.arm for run in found] == ["local_myopic", "bigram"]


def test_what_is_recorded_is_drawn_and_what_cannot_be_is_said(tmp_path, monkeypatch, capsys):
    call(tmp_path, "--arms vanilla myopic --seeds 2")
    figure = tmp_path / "OUT" / "text_gaps.png"
    figure.unlink()
    # a console that lacks some letters, and a user's setting that takes latex
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    call(tmp_path, "--arms vanilla myopic bigram --plot_only")  # bigram is not recorded
    assert figure.exists() and matplotlib.rcParams["text.usetex"]
    monkeypatch.undo()
    call(tmp_path, "--arms myopic --plot_only")
    assert not figure.exists() and "no text_gaps.png: " in capsys.readouterr().out
    assert len(mg.read_runs(tmp_path / "OUT", mg.TextRun)) == 4  # nothing was trained


def test_sizes_are_swept_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(mg, "shares_of_bigram", lambda found, arm: [5])
    call(tmp_path, "--arms vanilla --sizes 1x16 2x16 1x32")
    runs = mg.read_runs(tmp_path / "OUT", mg.TextRun)
    shapes = {(run.n_layer, run.n_embd, run.n_head) for run in runs}
    assert shapes == {(1, 16, 1), (2, 16, 1), (1, 32, 2)}
    assert (tmp_path / "OUT" / "text_size.png").exists()
    monkeypatch.undo()
    call(tmp_path, "--arms myopic --sizes 1x16 2x16")  # nothing to draw: no empty figure stays
    assert not (tmp_path / "OUT" / "text_size.png").exists()
    runs = mg.flags(["--preset", "full", "--n_layer", "3"]).runs  # by hand: not the preset's sizes
    assert {(run.n_layer, run.n_embd) for run in runs} == {(3, 96)}


BAD = [
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
    ("--arms myopic --learning_rate 1e30 --jobs 2", "myopic, seed 0: loss nan at step 4"),
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
    # a test run in the background would hand down a Ctrl-C that is ignored
    pipes["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
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
@pytest.fixture
def shown(monkeypatch):
    """{file name: figure that would be saved}, and under "table" the rows that would be printed."""
    shown = {}
    monkeypatch.setattr(mg, "save_figure", lambda fig, path, _: shown.update({path.name: fig}))
    monkeypatch.setattr(
        mg, "print_table", lambda _, header, rows, caption: shown.update(table=rows)
    )
    return shown


def heights(ax):
    """Of every line of a plot, at each of its points."""
    return [[float(y) for y in line.get_ydata()] for line in ax.lines]


def make_records(losses, n_embd=96, n_params=7, **more):
    """{arm: {seed: loss}} -> {run: record}"""
    found = {}
    for arm, by_seed in losses.items():
        for seed, loss in by_seed.items():
            curve = [[0, 9, 0], [4, 9, loss]]  # step, training loss, validation loss
            record = dict(val_loss=loss, train_loss=9, n_params=n_params, sample="so", curve=curve)
            run = mg.TextRun(arm=arm, seed=seed, block_size=4, n_embd=n_embd)
            found[run] = record | dict(loss_by_position=[0, loss, loss, 3 * loss]) | more
    return found


def test_gaps_and_shares_are_paired_by_seed():
    found = make_records(dict(vanilla={1: 2, 0: 1}, myopic={0: 1.5, 2: 7}, bigram={1: 2.05, 0: 2}))
    assert mg.gaps(found, "myopic") == {0: 0.5}
    assert mg.shares_of_bigram(found, "myopic") == [50]
    assert mg.shares_of_bigram(found, "bigram") == [100]  # seed 1's bigram is worth 0.05: noise
    assert mg.mean_sd([1, 2, 3]) == "2.000 ± 1.000" and mg.mean_sd([0.5]) == "0.500"
    assert mg.mean_sd([]) == "-"
    assert mg.seeds_of(found) == "mean and standard deviation of 3 seeds"
    assert len({mg.look(f"horizon_{h}") for h in (1, 2, 4, 9, 10, 16)}) == 6


def test_the_report_of_english(shown, tmp_path, monkeypatch):
    monkeypatch.setattr(mg, "plot_lags", nothing)
    large = make_records(dict(vanilla={0: 1, 1: 1}, myopic={0: 2, 1: 4}, bigram={0: 4, 1: 4}))
    small = make_records(dict(vanilla={0: 3}, myopic={0: 4}, bigram={0: 5}), 48, 3)
    mg.report(large | small, SimpleNamespace(out_dir=tmp_path))
    vanilla, myopic, _, _, of_large, _ = shown["table"]
    assert vanilla == ["3x48", "3", "vanilla", "3.000", "9.000", "0.000", "0.0", "so"]
    assert myopic == ["3x48", "3", "myopic", "4.000", "9.000", "1.000", "50.0", "so"]
    numbers = ["3.000 ± 1.414", "9.000 ± 0.000", "2.000 ± 1.414", "66.7 ± 47.1"]
    assert of_large == ["3x96", "7", "myopic", *numbers, "so"]
    (ax,) = shown["text_size.png"].axes
    assert pytest.approx([50, 200 / 3]) in heights(ax)

    left, right = shown["text_gaps.png"].axes  # of the largest
    title = shown["text_gaps.png"].get_suptitle()
    assert "myopic 2.00 ± 1.41, bigram 3.00 ± 0.00 nats" in title
    assert heights(left) == [[0, 2], [0, 3]] and left.lines[0].get_xdata().tolist() == [0, 4]
    low, high = left.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == pytest.approx((0, 2 + math.sqrt(2)))  # mean + standard deviation
    # positions 0 (where context is worth nothing), 1, and 2 and 3
    myopic, bigram = heights(right)
    assert math.isnan(myopic[0]) and myopic[1:] == [2, 4] and bigram[1:] == [3, 6]


def test_a_line_of_sizes_joins_models_that_differ_in_one_thing():
    _, ((ax,),) = mg.new_figure()
    mg.draw_sizes(ax, {(2, 16, 10): [1], (1, 32, 15): [5], (2, 32, 20): [2, 4]}, "")
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert lines["width (2 layers)"] == [[10, 1], [20, 3]]
    assert lines["depth (32 channels)"] == [[15, 5], [20, 3]]


def test_the_table_shows_no_control_letter_and_cuts_nothing(tmp_path, monkeypatch, capsys):
    sample = "[red]:smile:\x1b\x9b\x07\r\n" + 200 * "@"
    found = make_records(dict(vanilla={0: 1.234}), sample=sample)
    monkeypatch.setattr(mg, "plot_lags", nothing)
    mg.report(found, SimpleNamespace(out_dir=tmp_path))
    out = capsys.readouterr().out
    assert all(c.isprintable() for c in out.replace("\n", ""))
    assert "[red]:smile:" in out and out.count("@") == 200


def test_bench_times_what_it_says_and_two_streams_are_detached(tmp_path, monkeypatch):
    def once(calls):
        for call in calls.values():
            call()
        return list(calls)

    for name in ("myopic_attention", "two_stream_attention", "near_gradients"):
        monkeypatch.setattr(mg, name, Mock(wraps=getattr(mg, name)))
    monkeypatch.setattr(mg, "time_calls", once)
    mg.main(tiny(tmp_path, "--bench"))
    calls = mg.myopic_attention.call_args_list
    assert [c.kwargs.get("horizon", c.args[-2]) for c in calls] == [None, 0] * 4
    assert mg.near_gradients.call_count == 4  # backward, too: three sublayers and a step
    for c in mg.two_stream_attention.call_args_list:
        x, past_x = c.args[:2]
        is_live = x.requires_grad, past_x.requires_grad
        assert is_live == (True, False) and torch.equal(x, past_x)
    monkeypatch.undo()
    cells = mg.time_calls({"slow": lambda: sum(range(20000)), "fast": lambda: None}, rounds=3)
    assert cells[0].startswith("1.00 (1.00–1.00)") and float(cells[1][:4]) < 0.5


# ------------------------ the sine task
def test_sample_batch_is_the_definition():
    a, b, T = 3, 4.0, 9
    xs, ys = synthetic.sample_batch(5, T, 0.5, a, b, torch.Generator().manual_seed(0))
    for s, n in itertools.product(range(5), range(T)):
        x, z = xs[s, :, 0].double(), xs[s, n, 1].item()
        past = sum(math.sin(b * x[n - i]) for i in range(1, a + 1) if n - i >= 0)
        assert z in (0, 1) and abs(ys[s, n].item() - (z * past + (1 - z) * x[n].item())) < 1e-5


def test_losses_are_huber_over_p_and_beside_the_trivial_predictors():
    x, y = synthetic.sample_batch(4000, 64, 0.3, generator=torch.Generator().manual_seed(1))

    assert abs(x[..., 1].mean() - 0.3) < 0.01 and abs(x[..., 0].std() - 1) < 0.01
    losses = synthetic.huber_losses(lambda x: ((1 - x[..., 1]) * x[..., 0], None), x, y, 0.3)
    assert losses["ratio"] == pytest.approx(1)
    assert losses["huber_over_p"] == pytest.approx(1.2569, abs=0.03)  # the paper's
    assert losses["trivial_over_p"] == pytest.approx(1.2569, abs=0.03)


def test_the_curriculum_ends_on_the_task():
    run = replace(synthetic.QUICK, max_iters=100, p=0.25, p_until=0.85)
    assert synthetic.curriculum(run, 0) == (2.0, 1.0, 1.5)
    assert synthetic.curriculum(run, 40) == pytest.approx((6.0, 0.25 ** (25 / 70), 1.5))
    assert synthetic.curriculum(run, 50) == pytest.approx((7.6, 0.5, 1.5))
    assert all(synthetic.curriculum(run, step) == (10.0, 0.25, 1.0) for step in range(85, 100))


def test_r_squared_is_centred_and_the_probe_is_held_out():
    truth = torch.tensor([[5.0], [7.0]])
    assert synthetic.r_squared(torch.tensor([[6.0], [6.0]]), truth).tolist() == [0]
    noise = Mock()  # a model whose states know nothing: in sample, 100 channels would find much
    noise.hidden_states = lambda x: [torch.randn(*x.shape[:2], 100)] * 2
    run = replace(synthetic.QUICK, block_size=12, a=3, b=4.0)
    torch.manual_seed(0)
    r2, _, _ = synthetic.probe_model(noise, run, 32, "cpu")
    assert np.max(r2) < 0
    knows = Mock()  # its layer 1 holds the sines of x and of x two positions back, nothing else

    def hidden_states(x):
        sines = torch.sin(4 * x[..., :1])  # (B, T, 1)
        two_back = F.pad(sines, (0, 0, 2, 0))[:, :-2]
        return [0 * x, torch.cat([sines, two_back], -1), 0 * x]

    knows.hidden_states = hidden_states
    r2, x, estimate = synthetic.probe_model(knows, run, 600, "cpu")
    assert r2[1] == pytest.approx([1, 0, 1, 0, 0, 0], abs=0.02)
    assert np.max(np.abs([r2[0], r2[2]])) < 0.02
    assert estimate == pytest.approx(np.sin(4 * x), abs=0.02)


def test_patch_measures_cause_and_effect():
    run = replace(synthetic.QUICK, block_size=40, a=5, b=3.0, p=0.5)
    model = Mock()  # its layer 1 holds the sine; where z = 1, its answer is half the sum due

    def hidden_states(x):
        layer_1 = torch.stack([torch.sin(run.b * x[..., 0]), x[..., 1]], -1)
        return [0 * layer_1, layer_1, 0 * layer_1]

    def answer(state, blocks_done):
        assert blocks_done == 1
        return F.pad(state[..., 0], (5, 0))[:, :-1].unfold(1, 5, 1).sum(-1) / 2 * state[..., 1]

    model.hidden_states, model.answer = hidden_states, answer
    slopes = synthetic.patch(model, run, 500, "cpu")
    assert slopes == pytest.approx([0] + [0.5] * 5 + [0] * 10, abs=1e-4)


def test_training_and_evaluation_draw_what_they_should(monkeypatch):
    drawn, sample = [], synthetic.sample_batch

    def spy(batch_size, seq_len, p, a, b, generator, x_std=1.0):
        drawn.append((generator.initial_seed(), p, a, b, x_std))
        return sample(batch_size, seq_len, p, a, b, generator, x_std)

    monkeypatch.setattr(synthetic, "sample_batch", spy)
    monkeypatch.setattr(synthetic, "probe_model", Mock(wraps=synthetic.probe_model))
    monkeypatch.setattr(mg, "lag_shares", Mock(side_effect=["before", "after"]))
    run = replace(synthetic.DEMO, max_iters=10, p=0.5, seed=7, eval_sequences=64, x_wide=1.5)
    _, numbers, arrays = synthetic.train_sine(run, "cpu", nothing)

    lessons = [synthetic.curriculum(run, step) for step in range(11)]
    of_training = [draw for draw in drawn if draw[0] < synthetic.EVALUATION]
    assert of_training == [(1007, p, 3, b, x_std) for b, p, x_std in lessons[:10]]
    own, at_steps = (0.5, 3, 4.0, 1.0), {(p, 3, b, 1.0) for b, p, _ in lessons}
    for more, tasks in ((0, at_steps), (1, at_steps), (2, at_steps), (3, set())):
        seed = synthetic.EVALUATION + more  # losses, probe fitted, probe tested, patch
        assert {draw[1:] for draw in drawn if draw[0] == seed} == {own} | tasks
    probed = [c.args[1].b for c in synthetic.probe_model.call_args_list]
    assert probed == [4.0, *[b for b, _, _ in lessons], 4.0]
    assert [step for step, _ in numbers["curve"]] == list(range(11))
    assert arrays["film"].shape == (11, 2, 300) and len(numbers["probe_r2"]) == 3
    assert numbers["probe_r2"] != numbers["probe_r2_untrained"]
    assert numbers["lag_share"] == dict(start="before", end="after")


def sine_model():
    """A small model of the sine task in float64 with random weights, and a batch."""
    torch.manual_seed(0)
    model = synthetic.SineModel(mg.GPTConfig(9, 1, 2, 2, 12)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, y = synthetic.sample_batch(4, 9, 0.7, 3, 4.0, torch.Generator().manual_seed(0))
    return model, x.double(), y.double()


def test_the_sine_model_starts_with_waves_and_answers_from_any_layer():
    run = replace(synthetic.FULL, embd_std=0.2, wave_std=0.3)
    model = synthetic.make_model(run)
    waves = model.transformer.wpe.weight
    assert waves.square().mean().item() == pytest.approx(0.3**2, rel=0.1)
    assert model.read_in.weight.std().item() == pytest.approx(0.2, rel=0.2)
    other_arm = synthetic.make_model(replace(run, arm="myopic"))
    assert_agree(trained(other_arm), trained(model), 0)
    other_seed = synthetic.make_model(replace(run, seed=1))
    assert relative_error(other_seed.read_in.weight, model.read_in.weight) > 1
    model, x, y = sine_model()
    with pytest.raises(mg.UsageError, match="block_size allows 9"):
        model(torch.zeros(1, 10, 2).double())
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
    assert model.config.horizon is None  # as_arm copies
    states = mg.as_arm(model, arm).hidden_states(x)
    own_loss = model.position_losses(states[2], y)[:, 5].sum()
    (d_state,) = torch.autograd.grad(own_loss, states[1])  # (B, T, C)
    root_mean_square = d_state[:, 5].square().mean().sqrt().item()
    assert tables[1][5, 5] == pytest.approx(root_mean_square)


@pytest.mark.parametrize("make", [sine_model, lambda: (make_gpt(), *batch(8))])
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
    # lag 0 alone is what the writer's account leaves: dW_K, dW_V of the cut "kv" in the last layer
    myopic = mg.as_arm(model, "myopic_kv")
    kv = gradients(myopic, x, y)["transformer.h.1.attn.c_attn.weight"]
    assert relative_error(by_lag[1, 0], kv[12:]) < 1e-10
    with pytest.raises(mg.UsageError, match="vanilla"):
        mg.lag_shares(myopic, x, y)


def test_vanilla_plans_ahead_and_myopic_does_not():
    run = synthetic.PRESETS["demo"]["run"]
    _, vanilla, _ = synthetic.train_sine(run, "cpu", nothing)
    _, myopic, _ = synthetic.train_sine(replace(run, arm="myopic"), "cpu", nothing)
    assert vanilla["ratio"] < 0.2 and myopic["ratio"] > 0.85
    assert vanilla["probe_r2"][1][0] > 0.7 > 0.3 > vanilla["probe_r2_untrained"][1][0]
    assert np.mean(vanilla["patch_slope"][1 : run.a + 1]) > 0.7
    assert myopic["probe_r2"][1][0] < 0.1 > np.abs(myopic["patch_slope"]).max()


def test_sines_from_command_to_film(tmp_path, monkeypatch, capsys):
    tiny = "--preset demo --max_iters 6 --batch_size 4 --n_embd 8 --eval_sequences 64 --jobs 1"
    flags = [*tiny.split(), "--p", "0.5", "1", "--out_dir", str(tmp_path)]
    synthetic.main(flags)
    made = {path.name for path in tmp_path.iterdir() if path.is_file()}
    pictures = {f"precache_{name}.png" for name in ("patch", "lags", "sequence", "gradients")}
    assert made == pictures | {"precache.png", "precache.gif"}
    out = capsys.readouterr().out
    assert out.index("Pre-caching") < out.index("figure ") < out.index("open ")  # result first
    # a folder that keeps no arrays of the seed that is asked for first
    monkeypatch.setattr(mg, "read_arrays", nothing)
    synthetic.main([*flags, "--plot_only"])
    out = capsys.readouterr().out
    for name in ("precache_sequence.png", "precache_gradients.png", "precache.gif"):
        assert f"no {name}: " in out and not (tmp_path / name).exists()


def sine_records(starts, p=1.0, n_embd=64):
    """{arm: n} -> {run: record} of two seeds; its numbers are made of n + seed, or 9 where neither
    table nor figure should look."""
    found, others = {}, [9] * 5
    for (arm, n), seed in itertools.product(starts.items(), (0, 1)):
        shape = dict(block_size=12, a=3, n_embd=n_embd)
        run = replace(synthetic.QUICK, arm=arm, seed=seed, p=p, **shape)
        n += seed
        flat, last = [[9] * 12, [0] * 12], [[9] * 12, [0.6, 0.1, 0.1, 0.1, *[0.0125] * 8]]
        found[run] = asdict(run) | dict(
            n_params=n_embd,
            huber_over_p=n,
            ratio=n / 10,
            curve=[[0, 1], [1200, 0.9], [2400, n / 10]],
            patch_slope=[9, n / 5, n / 5, n / 5, 9, 9],
            probe_r2=[[9, *others], [n / 4, *others], [9, *others]],
            probe_r2_untrained=[[9, *others], [n / 20, *others], [9, *others]],
            lag_share=dict(start=[flat, flat], end=[flat, last]),
        )
    return found


def test_the_report_of_sines(shown, tmp_path):
    found = sine_records(dict(vanilla=5), p=0.5)
    found |= sine_records(dict(vanilla=4, myopic=4), n_embd=32)
    found |= sine_records(dict(vanilla=1, myopic=5))
    run = next(iter(found))
    synthetic.report(found, SimpleNamespace(out_dir=tmp_path, seed=0, run=run))
    of_p, small, _, vanilla, myopic = shown["table"]
    assert of_p[:3] == ["0.5", "2x64", "vanilla"] and small[:3] == ["1", "2x32", "vanilla"]
    means = ["1.500 ± 0.707", "0.150 ± 0.071", "0.375 ± 0.177", "0.075 ± 0.035", "0.300 ± 0.141"]
    assert vanilla == ["1", "2x64", "vanilla", "2", *means, "-"]
    assert myopic[2:6] == ["myopic", "2", "5.500 ± 0.707", "0.550 ± 0.071"]

    left, right = shown["precache.png"].axes
    assert "vanilla 0.15, myopic 0.55" in left.get_title()
    assert heights(left)[1:] == [pytest.approx([1, 0.9, 0.15]), pytest.approx([1, 0.9, 0.55])]
    assert [bar.get_height() for bar in right.patches] == pytest.approx([0.375, 1.375, 0.075])
    assert heights(right)[0] == pytest.approx([0.25, 0.5])  # a dot for each seed

    assert "vanilla's answers move by 0.30" in shown["precache_patch.png"].get_suptitle()
    (ax,) = shown["precache_patch.png"].axes
    assert (ax.patches[0].get_x(), ax.patches[0].get_width()) == (0.5, 3)
    assert heights(ax)[0] == pytest.approx([9, 0.3, 0.3, 0.3, 9, 9])

    lags = shown["precache_lags.png"]
    assert "later positions give 40 ± 0 % (by counting 85 %)" in lags.get_suptitle()
    assert "the next 3 positions 30 ± 0 % (by counting 38 %)" in lags.get_suptitle()
    untrained, trained, by_count = heights(lags.axes[1])
    assert max(untrained) == 0 and trained[:4] == pytest.approx([0.6, 0.1, 0.1, 0.1])
    assert by_count[0] == pytest.approx(12 / 78) and sum(by_count) == pytest.approx(1)

    for ax, points in zip(shown["precache_size.png"].axes, ([0, 40], [1.125, 0.375])):
        assert pytest.approx(points) in heights(ax)


def test_pictures_of_trained_models_are_of_the_first_seed(shown, tmp_path, monkeypatch):
    found = sine_records(dict(vanilla=1, myopic=5))
    kept = {}
    for n, run in enumerate(found):
        film = np.arange(12).reshape(3, 2, 2) / 12 + n  # frames, (x, estimate), points
        kept[run] = dict(film=film)
    monkeypatch.setattr(mg, "load_weights", lambda model, arrays: model)
    monkeypatch.setattr(mg, "read_arrays", lambda folder, run: kept[run])
    monkeypatch.setattr(mg, "write_whole", nothing)
    monkeypatch.setattr(synthetic, "FuncAnimation", Mock())
    run = next(iter(found))
    synthetic.report(found, SimpleNamespace(out_dir=tmp_path, seed=0, run=run))

    (film, frame), settings = synthetic.FuncAnimation.call_args
    for n, sine in ((settings["frames"][0], "sin(2.0·x)"), (settings["frames"][-1], "sin(10.0·x)")):
        frame(n)
        assert film.get_suptitle().endswith(sine)
    shown_last = [heights(ax) for ax in film.axes]
    for (_, dots), n in zip(shown_last[:2], (0, 2)):  # seed 0 of vanilla and of myopic
        assert dots == pytest.approx([10 / 12 + n, 11 / 12 + n])
    assert [lines[1] for lines in shown_last[2:]] == [[1, 0.9, 0.1], [1, 0.9, 0.5]]

    for ax, reach in zip(shown["precache_gradients.png"].axes, (11, 8, 0)):
        is_drawn = ~np.ma.getmaskarray(ax.images[0].get_array())
        lag = np.arange(12)[:, None] - np.arange(12)
        assert (is_drawn == ((lag >= 0) & (lag <= reach))).all()


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
    assert len(shown) == 3


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
