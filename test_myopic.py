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
import signal
import subprocess
import sys
import weakref
from dataclasses import asdict, dataclass, replace
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


def relative_error(a, b):
    """|a - b| / |b|, or |a| where b is zero."""
    a, b = a.cpu().double(), b.cpu().double()
    return ((a - b).norm() / (b.norm() or 1)).item()


def assert_agree(got, true, tolerance=1e-10):
    """Every tensor in the dict `got` is the one of that name in `true`, up to a relative error."""
    assert got.keys() == true.keys()
    for name in true:
        assert relative_error(got[name], true[name]) <= tolerance, name


def make_gpt(dtype=torch.float64, **settings):
    """A small GPT with all parameters random, so that no gradient is zero by accident."""
    torch.manual_seed(0)
    settings = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=12) | settings
    model = mg.GPT(mg.GPTConfig(**settings)).to(dtype)
    for p in model.parameters():
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
def attention_inputs(T, dtype=torch.float64, device="cpu"):
    """[x, w, b] (strided leaves that require gradients) and a random dy; C = 24."""
    torch.manual_seed(0)
    shapes = [(2, T, 24, 2), (72, 24, 2), (72, 2), (2, T, 24, 2)]
    buffers = [(torch.randn(shape).double() / 3).to(device, dtype) for shape in shapes]
    x, w, b, dy = (buffer[..., 0] for buffer in buffers)
    return [x.requires_grad_(), w.requires_grad_(), b.requires_grad_()], dy


def attention_gradients(f, leaves, dy, *settings):
    """y = f(x, w, b, *settings) -> {"y": y, "dx": dx, "dw": dw, "db": db}."""
    for leaf in leaves:
        leaf.grad = None
    y = f(*leaves, *settings)
    y.backward(dy)
    return dict(zip(("y", "dx", "dw", "db"), (y.detach(), *[leaf.grad for leaf in leaves])))


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
    leaves, dy = attention_inputs(T, dtype, device)
    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
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
    for grad_fn in (padded, trailing):
        got = mg.log_sum_exp(0 * q, k, SimpleNamespace(grad_fn=grad_fn))  # read, not computed
        assert torch.equal(got, lse)
    computed = mg.log_sum_exp(q.bfloat16(), k.bfloat16(), SimpleNamespace(grad_fn=None))
    assert computed.dtype == torch.float32
    big = torch.full((1, 1, 2, 8), 300.0)
    dk, dv = mg.lag_gradients(0, big, big, big, big, big, torch.zeros(1, 1, 2))
    assert dk.isfinite().all() and torch.equal(dv, big)  # P is at most 1, however wrong lse is


def test_it_holds_under_checkpointing_compile_and_hooks():
    leaves, dy = attention_inputs(9)
    call = functools.partial(mg.myopic_attention, n_head=3)
    true = attention_gradients(call, leaves, dy)

    def saved_on_cpu(*leaves):
        with torch.autograd.graph.save_on_cpu():
            return call(*leaves)

    ways = [saved_on_cpu, torch.compile(call, backend="aot_eager")]
    for reentrant in (True, False):
        ways.append(functools.partial(checkpoint, call, use_reentrant=reentrant))
    for way in ways:
        assert_agree(attention_gradients(way, leaves, dy), true, 1e-12)


def test_autocast_as_torchs_own():
    leaves, dy = attention_inputs(9)
    true = attention_gradients(mg.myopic_attention, leaves, dy, 3)
    under_autocast = torch.autocast("cpu", torch.bfloat16)(mg.myopic_attention)
    assert under_autocast(*leaves, 3).dtype == torch.float64
    low = [t.detach().float().requires_grad_() for t in leaves]
    got = attention_gradients(under_autocast, low, dy.bfloat16(), 3)
    assert [t.dtype for t in got.values()] == [torch.bfloat16] + 3 * [torch.float32]
    assert_agree(got, true, 0.03)


def test_what_it_saves_is_small_and_is_freed_by_the_backward_pass():
    leaves, dy = attention_inputs(9)
    y = mg.myopic_attention(*leaves, 3)
    saved = y.grad_fn.saved_tensors
    lse = saved[-1].grad_fn._saved_logsumexp
    assert all(t.shape.count(9) < 2 for t in [*saved, lse])  # none is (T, T)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), leaves, create_graph=True)

    kept = [weakref.ref(t) for t in saved[2:]]  # q, k, v, O
    del saved
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert all(ref() is not None for ref in kept)
    second = torch.autograd.grad(y, leaves, dy)
    assert all(map(torch.equal, first, second))
    assert all(ref() is None for ref in kept)  # by counting references: there is no cycle
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("B, T", [(0, 3), (2, 0)])
def test_lengths_and_batches_of_none(B, T):
    x, w = torch.randn(B, T, 8, requires_grad=True), torch.randn(24, 8, requires_grad=True)
    for horizon in (None, 0, 2):
        mg.myopic_attention(x, w, None, 2, horizon).sum().backward()
    assert x.grad.shape == x.shape and not w.grad.any()
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


def test_bigram_sees_no_past_and_local_myopic_its_teachers():
    idx, targets = batch(6)
    other = idx.clone()
    other[:, :4] = (idx[:, :4] + 1) % 11
    bigram = make_gpt(**mg.ARMS["bigram"])
    assert torch.equal(bigram(idx)[0][:, 4:], bigram(other)[0][:, 4:])

    teacher = make_gpt(dropout=0.5)
    local = mg.LocalMyopicGPT(replace(teacher.config, past="frozen", dropout=0), teacher).double()
    assert not trained(teacher)
    got = gradients(local.train(), idx, targets)  # would differ, if the teacher dropped out
    frozen = []
    for block, x in zip(teacher.transformer.h, teacher.eval().hidden_states(idx)):
        frozen.append(block.ln_1(x))
    assert_agree(got, literal_gradient(local, idx, targets, "all", "reader", frozen))


def test_generate_is_causal():
    model, (idx, _) = make_gpt(), batch(6)
    likeliest = model.generate(idx, 4, top_k=1)  # the last tokens see a part of it
    assert likeliest.shape == (2, 10)
    assert torch.equal(likeliest, model.generate(idx, 4, temperature=1e-9))
    assert torch.equal(likeliest[:, 6:9], model(likeliest[:, :8])[0][:, 5:].argmax(-1))


def test_dropout_acts_in_training_alone():
    model, (idx, _) = make_gpt(dropout=0.5, n_layer=1), batch(6)
    drops = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(drops) == 3
    for kept in drops:  # each of the three acts
        for m in drops:
            m.train(m is kept)
        assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_bad_values_are_refused():
    (x, w, b), _ = attention_inputs(9)
    bad = [(x[0], w, b, 3), (x, w[:36], b, 3), (x, w, b, 5), (x, w, b, 0), (x, w, b, 3, 1.5)]
    for arguments in [*bad, (x, w, b[:9], 3), (x, w, b, 3, -1), (x, w, b, 3, 0, "k")]:
        pytest.raises(mg.UsageError, mg.myopic_attention, *arguments)
    model, (idx, _) = make_gpt(), batch(9)
    pytest.raises(mg.UsageError, model, idx)  # block_size is 8
    pytest.raises(mg.UsageError, model.generate, idx[:, :0], 4)
    pytest.raises(mg.UsageError, model.generate, idx, 4, temperature=0)
    pytest.raises(mg.UsageError, model.generate, idx, 4, top_k=0)
    pytest.raises(mg.UsageError, mg.GPTConfig, 1, 1, 1, 1, 1, past="no_such")
    bad = [dict(dtype="bf16"), dict(block_size=2.5), dict(n_head=0), dict(n_embd=7)]
    bad += [dict(arm="no_such"), dict(arm="horizon_1.5"), dict(learning_rate=math.nan)]
    bad += [dict(learning_rate=math.inf), dict(weight_decay=-1), dict(max_iters=0), dict(beta1=1)]
    for settings in bad:
        pytest.raises(mg.UsageError, mg.TextRun, **settings)
    bad = [dict(p=0), dict(p=1.5), dict(a=32), dict(n_layer=1), dict(seed=9000)]
    for settings in [*bad, dict(arm="local_myopic")]:
        pytest.raises(mg.UsageError, replace, synthetic.QUICK, **settings)


# ------------------------ text and training
@pytest.mark.parametrize("muon, n", [("all", 4), ("attn", 2), ("none", 0)])
def test_every_parameter_has_one_optimizer_and_one_decay(muon, n):
    model, found = make_gpt(n_layer=1), []
    optimizers = mg.configure_optimizers(model, mg.TextRun(muon=muon, muon_decay=0.3))
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            found += [(names[p], group["weight_decay"]) for p in group["params"]]
    assert optimizers[0].defaults["betas"] == (0.9, 0.95)
    true = {name: 0.1 * (p.dim() > 1) for p, name in names.items()}  # AdamW
    for matrix in ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"][:n]:  # Muon
        true[f"transformer.h.0.{matrix}.weight"] = 0.3
    assert sorted(found) == sorted(true.items())


def test_rates_and_start_values():
    run = mg.TextRun(max_iters=4, warmup=0.5, decay_from=0.5, learning_rate=0.2, muon_rate=0.4)
    model, seen = make_gpt(torch.float32), []
    optimizers = mg.configure_optimizers(model, run)

    def next_batch(step):
        seen.extend(group["lr"] for part in optimizers for group in part.param_groups)
        return batch(6)

    def after_step(step):
        assert model.training
        model.eval()

    mg.train(model, optimizers, next_batch, run, Mock(), after_step)
    assert seen == pytest.approx([0.1, 0.1, 0.2] + 2 * [0.2, 0.2, 0.4] + [0.1, 0.1, 0.2])
    for name, p in mg.GPT(mg.GPTConfig(64, 200, 8, 2, 128)).named_parameters():
        std = 0.005 if name.endswith("c_proj.weight") else 0.02 * (p.dim() == 2)
        assert p.std().item() == pytest.approx(std, rel=0.1), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_clipped_and_takes_its_products_in_the_dtype(monkeypatch, dtype):
    model = make_gpt(torch.float32)
    run = mg.TextRun(max_iters=1, grad_clip=0.01, warmup=0, dtype=dtype)
    monkeypatch.setattr(mg, "attend", Mock(wraps=mg.attend))
    before = [p.detach().clone() for p in model.parameters()]
    is_autocast = []  # in the backward pass
    model.lm_head.weight.register_hook(
        lambda g: is_autocast.append(torch.is_autocast_enabled("cpu"))
    )
    plain = torch.optim.SGD(model.parameters(), 1.0)
    mg.train(model, [plain], lambda step: batch(6), run, Mock())
    assert is_autocast and not any(is_autocast)
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


def test_english_is_ordered_by_digest_and_each_paragraph_once(tmp_path, monkeypatch):
    train, held_out = (set(part.split(b"\n\n")) for part in mg.load_text([], 64))
    assert len(train) > 5000 and len(held_out) > 500 and train & held_out <= {b""}
    monkeypatch.setattr(mg.ast, "__file__", str(tmp_path / "ast.py"))  # no modules beside it
    monkeypatch.setattr(mg, "topics", {n: f"{n}\n\nall" for n in range(9)})
    documents = list(mg.topics.values())
    documents.sort(key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    paragraphs = "\n\n".join(documents).split("\n\n")
    assert mg.python_english().split("\n\n") == list(dict.fromkeys(paragraphs))


def test_losses_of_tokens_are_evenly_spaced_in_order_and_without_dropout():
    model, rows = make_gpt(dropout=0.5).train(), torch.arange(5000).remainder(11).unfold(0, 9, 1)
    losses, y = mg.token_losses(model, rows, 4000)  # in three chunks
    assert losses.shape == y.shape == (4000, 8)
    assert y[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and y[-1, -1] == 4999 % 11
    logits, _ = model.eval()(torch.cat([(y[:, :1] - 1) % 11, y[:, :-1]], dim=1))
    assert relative_error(losses, F.cross_entropy(logits.mT, y, reduction="none")) < 1e-6


def test_the_numbers_of_a_record_are_of_the_right_text(monkeypatch):
    def losses_are_bytes(model, windows, count):
        y = windows[:count, 1:].long()
        return y.double(), y

    monkeypatch.setattr(mg, "token_losses", losses_are_bytes)
    monkeypatch.setattr(mg, "lag_shares", Mock(side_effect=["before", "after"]))
    run = mg.TextRun(block_size=3, max_iters=2, eval_windows=1, dropout=0.5)
    model, numbers, _ = mg.train_text((b"d" * 40, b"9 ab" * 10), run, "cpu", Mock())
    a, b, d = ord("a"), ord("b"), ord("d")
    mean = pytest.approx((32 + a + b) / 3)
    assert numbers["train_loss"] == d and numbers["val_loss"] == mean
    assert numbers["curve"] == [[1, d, mean], [2, d, mean]]
    assert numbers["loss_by_position"] == [32, a, b]
    assert numbers["sample"].startswith("9 ab")
    assert numbers["lag_share"] == dict(start="before", end="after")
    assert model.transformer.drop.p == 0.5


def test_arms_share_start_and_batches_and_seeds_share_none(monkeypatch):
    monkeypatch.setattr(mg, "train", Mock(wraps=mg.train))
    text = bytes(range(250)), bytes(reversed(range(250)))  # ascending alone is trained on
    settings = dict(block_size=8, max_iters=1, learning_rate=0, muon_rate=0)  # stays as it starts
    for arm, seed in (("vanilla", 0), ("local_myopic", 0), ("bigram", 1)):
        mg.train_text(text, mg.TextRun(arm=arm, seed=seed, **settings), "cpu", Mock())
    arms, seen = [], []
    for c in mg.train.call_args_list:
        model, _, next_batch, run, *_ = c.args
        arms.append(run.arm)
        seen.append(model.transformer.state_dict() | dict(xy=torch.stack(next_batch(1))))
    assert arms == ["vanilla", "vanilla", "local_myopic", "bigram"]
    vanilla, teacher, local, other_seed = seen
    assert_agree(teacher, vanilla, 0)
    assert_agree(local, vanilla, 0)
    for name in ("xy", "wte.weight"):
        assert relative_error(other_seed[name], vanilla[name]) > 0.1
    x, y = vanilla["xy"]
    assert torch.equal(y, x + 1)


# ------------------------ runs and their files
def test_equal_runs_have_one_name_and_others_another():
    assert replace(synthetic.QUICK, b=4).name() == replace(synthetic.QUICK, b=4.0).name()
    assert mg.TextRun().name() == "text-vanilla-seed0-44136fa3"  # it must never change
    others = [dict(seed=1), dict(recipe=2), dict(beta2=0.5), dict(dropout=0.5), dict(muon="attn")]
    assert len({mg.TextRun(**settings).name() for settings in others}) == 5


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
    assert not mg.read_runs(tmp_path, mg.TextRun)


def test_a_file_is_whole_or_not_there_and_a_full_disk_costs_the_arrays_alone(tmp_path, monkeypatch):
    def fail(part, **arrays):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(np, "savez_compressed", fail)
    mg.save_run(tmp_path, mg.TextRun(), {}, dict(a=np.zeros(2)))
    assert [path.name for path in tmp_path.rglob("*.*")] == [f"{mg.TextRun().name()}.json"]
    pytest.raises(mg.UsageError, mg.draw, tmp_path / "figure", lambda: fail)
    monkeypatch.setattr(mg, "write_whole", Mock())
    mg.save_run(tmp_path, mg.TextRun(), {}, {})  # the record comes last: it says that all is there
    assert [c.args[0].suffix for c in mg.write_whole.call_args_list] == [".npz", ".json"]


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
    """Run the command -> {run: record, but for what the clock says}, all that the folder holds."""
    mg.main(tiny(tmp_path, f"{words} --out_dir {out}"))
    found = mg.read_runs(tmp_path / out, mg.TextRun)
    return {run: record | dict(seconds=0) for run, record in found.items()}


def test_runs_are_trained_once_and_are_the_same_for_any_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(mg, "train", Mock(wraps=mg.train))
    monkeypatch.setattr(mg, "report", Mock())
    arms = "--arms vanilla horizon_1 bigram local_myopic"
    torch.set_num_threads(2)  # a run takes one all the same
    records = call(tmp_path, arms)
    assert torch.get_num_threads() == 1
    assert call(tmp_path, arms) == records and mg.train.call_count == 5  # a teacher is the fifth
    assert call(tmp_path, f"{arms} --jobs 2", "TWO") == records
    assert call(tmp_path, "--arms vanilla bigram --fresh") == records and mg.train.call_count == 7

    vanilla, bigram = mg.report.call_args[0][0]  # the runs asked for, in that order
    text = (tmp_path / "DATA").read_bytes()
    digest = hashlib.sha256(b"%d " % (len(text) * 9 // 10) + text).hexdigest()
    assert (vanilla.arm, bigram.arm, vanilla.data_sha256) == ("vanilla", "bigram", digest)
    weights = trained(mg.train.call_args_list[0][0][0])
    arrays = mg.read_arrays(tmp_path / "OUT", vanilla)
    again = mg.load_weights(mg.GPT(vanilla.config(256)), arrays)
    assert_agree(trained(again), weights, 1e-3)  # kept in half precision


def test_what_is_recorded_is_drawn_whatever_the_console_and_the_settings(tmp_path, monkeypatch):
    seeds = "--seed 2 --seeds 2"
    call(tmp_path, f"{seeds} --arms vanilla myopic")
    kept = [path.name.split("-")[2] for path in tmp_path.glob("OUT/runs/*.npz")]
    assert kept == ["seed2", "seed2"]  # arrays of the first seed alone
    figure = tmp_path / "OUT" / "text_gaps.png"
    figure.unlink()
    # a console that lacks some letters, and a user's setting that takes latex
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    records = call(tmp_path, f"{seeds} --arms vanilla myopic bigram --plot_only")
    assert figure.exists() and len(records) == 4  # bigram was not trained


def test_flags_by_hand_override_the_preset():
    runs = mg.flags(["--preset", "full", "--n_layer", "3"]).runs  # one size: no sweep
    assert {(run.n_layer, run.n_embd) for run in runs} == {(3, 96)}
    args = mg.flags(["--sizes", "3x64"])
    assert args.runs[0].n_head == 4 and args.out_dir == Path("out", "quick")


BAD = [
    ("--sizes 3by4", "size 3by4"),
    ("--data LATIN", "LATIN"),
    ("--data NO_FILE", "NO_FILE"),
    ("--data SHORT", "block_size is 8"),
    ("--out_dir SHORT", "SHORT"),
    ("--jobs 0", "jobs is 0"),
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
        list(mg.train_side_by_side(die, [mg.TextRun()], "cpu", 2, Mock()))
    assert stop.value.code == 1 and "--jobs" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a bug"), mg.exit_status("script.py"):
        raise ValueError("a bug")  # keeps its traceback


# ------------------------ tables and figures say what the records say
@pytest.fixture
def shown(monkeypatch):
    """{file name: figure that would be saved}, and under "table" the rows that would be printed."""
    shown = {}

    def finish(fig, caption):
        return lambda path: shown.update({path.name: fig})

    monkeypatch.setattr(mg, "finish", finish)
    monkeypatch.setattr(mg, "write_whole", lambda path, write: write(path))
    monkeypatch.setattr(mg, "print_table", lambda title, header, rows, _: shown.update(table=rows))
    return shown


def heights(ax):
    """Of every line of a plot, at each of its points."""
    return [[float(y) for y in line.get_ydata()] for line in ax.lines]


def make_records(losses, n_embd=96, n_params=7):
    """{arm: {seed: loss}} -> {run: record}"""
    found = {}
    for arm, by_seed in losses.items():
        for seed, loss in by_seed.items():
            record = dict(val_loss=loss, train_loss=9, n_params=n_params, sample="so\x1b\x9b\r")
            record["curve"] = [[0, 9, 0], [4, 9, loss]]  # step, training loss, validation loss
            record["loss_by_position"] = [0, loss, loss, 3 * loss, loss]
            found[mg.TextRun(arm=arm, seed=seed, block_size=5, n_embd=n_embd)] = record
    return found


def test_gaps_and_shares_are_paired_by_seed():
    found = make_records(dict(vanilla={1: 2, 0: 1}, myopic={0: 1.5, 2: 7}, bigram={1: 2.05, 0: 2}))
    assert mg.gaps(found, "myopic") == {0: 0.5}
    assert mg.shares_of_bigram(found, "myopic") == [50]
    assert mg.shares_of_bigram(found, "bigram") == [100]  # seed 1's bigram is worth 0.05: noise
    assert mg.mean_sd([1, 2, 3]) == "2.000 ± 1.000" and mg.mean_sd([0.5]) == "0.500"
    assert len({mg.look(f"horizon_{h}") for h in (1, 2, 4, 9, 10, 16)}) == 6


def test_the_report_of_english(shown, tmp_path, monkeypatch):
    monkeypatch.setattr(mg, "plot_lags", Mock(side_effect=mg.UsageError("it takes more")))
    large = make_records(dict(vanilla={0: 1, 1: 1}, myopic={0: 2, 1: 4}, bigram={0: 4, 1: 4}))
    small = make_records(dict(vanilla={0: 3}, myopic={0: 4}, bigram={0: 5}), 48, 3)
    mg.report(large | small, SimpleNamespace(out_dir=tmp_path))
    _, of_small, _, _, of_large, _ = shown["table"]
    assert of_small == ["3x48", "3", "myopic", "4.000", "9.000", "1.000", "50.0", "so   "]
    numbers = ["3.000 ± 1.414", "9.000 ± 0.000", "2.000 ± 1.414", "66.7 ± 47.1"]
    assert of_large == ["3x96", "7", "myopic", *numbers, "so   "]
    (ax,) = shown["text_size.png"].axes
    assert pytest.approx([50, 200 / 3]) in heights(ax)

    left, right = shown["text_gaps.png"].axes  # of the largest
    assert heights(left) == [[0, 2], [0, 3]] and left.lines[0].get_xdata().tolist() == [0, 4]
    low, high = left.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == pytest.approx((0, 2 + math.sqrt(2)))  # mean + standard deviation
    # positions 0 (where context is worth nothing), 1, 2 and 3, and 4
    myopic, bigram = heights(right)
    assert math.isnan(myopic[0]) and myopic[1:] == [2, 4, 2] and bigram[1:] == [3, 6, 3]


def test_a_line_of_sizes_joins_models_that_differ_in_one_thing(shown):
    values = {(2, 16, 10): [1], (1, 32, 15): [5], (2, 32, 20): [2, 4]}
    mg.plot_sizes(dict(gap=values, other=values | {(2, 32, 20): [9]}), "costs", "")(Path("sizes"))
    lines = {line.get_label(): line.get_xydata().tolist() for line in shown["sizes"].axes[0].lines}
    assert lines["2 layers"] == [[10, 1], [20, 3]] and lines["32 channels"] == [[15, 5], [20, 3]]
    assert shown["sizes"].get_suptitle() == "costs 1.0 % at 2x16, 3.0 ± 1.4 % at 2x32"
    pytest.raises(mg.UsageError, mg.plot_sizes, dict(gap=values | {(1, 32, 15): []}), "", "")


def test_the_table_takes_letters_as_they_are_and_cuts_nothing(capsys):
    mg.print_table("title", ["writes"], [["[red]:smile:" + 200 * "@"]], "caption")
    out = capsys.readouterr().out
    assert "[red]:smile:" in out and out.count("@") == 200


def test_bench_times_what_it_says_and_two_streams_are_detached(tmp_path, monkeypatch):
    near_sums = set()  # of each way: how often it sums them

    def call_once(calls):
        for name, call in calls.items():
            mg.near_gradients.reset_mock()
            call()
            near_sums.add((name, mg.near_gradients.call_count))
        return list(calls)

    for name in ("two_stream_attention", "near_gradients"):
        monkeypatch.setattr(mg, name, Mock(wraps=getattr(mg, name)))
    monkeypatch.setattr(mg, "time_calls", call_once)
    mg.main(tiny(tmp_path, "--bench"))
    assert near_sums == {("torch's own", 0), ("vanilla", 0), ("myopic", 1), ("two streams", 0)}
    for c in mg.two_stream_attention.call_args_list:
        x, past_x = c.args[:2]
        assert x.requires_grad and not past_x.requires_grad
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


def test_the_curriculum_ends_on_the_task():
    run = replace(synthetic.QUICK, max_iters=100, p=0.25, p_until=0.85)
    assert synthetic.curriculum(run, 0) == (2.0, 1.0, 1.5)
    assert synthetic.curriculum(run, 40) == pytest.approx((6.0, 0.25 ** (25 / 70), 1.5))
    assert synthetic.curriculum(run, 50) == pytest.approx((7.6, 0.5, 1.5))
    assert all(synthetic.curriculum(run, step) == (10.0, 0.25, 1.0) for step in range(85, 100))


class KnownModel:
    """Layer 0 holds noise; layer 1 sin(4 x), the same of x two positions back, and z; layer 2
    nothing. Where z = 1 the answer is half of the three sines that are due."""

    def hidden_states(self, x):
        sines = torch.sin(4 * x[..., 0])  # (B, T)
        two_back = F.pad(sines, (2, 0))[:, :-2]
        held = torch.stack([sines, two_back, x[..., 1]], dim=-1)
        layer_1 = F.pad(held, (0, 97))  # (B, T, 100)
        return [torch.randn(layer_1.shape), layer_1, 0 * layer_1]

    def answer(self, state, blocks_done):
        due = F.pad(state[..., 0], (3, 0))[:, :-1].unfold(1, 3, 1).sum(-1)  # (B, T)
        return due / 2 * state[..., 2]


def test_probe_and_patch_find_what_a_known_model_holds():
    run = replace(synthetic.DEMO, p=0.5)
    torch.manual_seed(0)
    r2, x, estimate = synthetic.probe_model(KnownModel(), run, 600, "cpu")
    assert np.max(r2[0]) < 0  # held out: in sample, 100 channels of noise would hold something
    assert r2[1] == pytest.approx([1, 0, 1, 0, 0, 0], abs=0.02)
    assert r2[2] == pytest.approx([0] * 6, abs=0.02)
    assert estimate == pytest.approx(np.sin(4 * x), abs=0.02)
    truth = torch.tensor([[5.0], [7.0]])
    assert synthetic.r_squared(torch.full((2, 1), 6.0), truth).item() == 0  # it is centred
    slopes = synthetic.patch(KnownModel(), run, 500, "cpu")
    assert slopes == pytest.approx([0, 0.5, 0.5, 0.5, 0, 0], abs=1e-4)


def test_training_and_evaluation_draw_what_they_should(monkeypatch):
    monkeypatch.setattr(synthetic, "sample_batch", Mock(wraps=synthetic.sample_batch))
    monkeypatch.setattr(mg, "lag_shares", Mock(side_effect=["before", "after"]))
    run = replace(synthetic.DEMO, max_iters=10, p=0.5, seed=7, eval_sequences=64, x_wide=1.5)
    _, numbers, _ = synthetic.train_sine(run, "cpu", Mock())
    drawn = {}  # {seed: [(b, p, standard deviation of x)]}
    for c in synthetic.sample_batch.call_args_list:
        _, _, p, _, b, generator, *x_std = c.args
        drawn.setdefault(generator.initial_seed(), []).append((b, p, *x_std))

    lessons = [synthetic.curriculum(run, step) for step in range(11)]
    assert drawn.pop(1007) == lessons[:10]
    tasks = {(b, p) for b, p, _ in lessons}  # the last is the run's own
    losses, fitted, tested, patched = map(set, drawn.values())
    assert losses == fitted == tested == tasks and patched == {(4.0, 0.5)}
    assert min(drawn) == synthetic.EVALUATION
    assert [step for step, _ in numbers["curve"]] == list(range(11))
    assert numbers["lag_share"] == dict(start="before", end="after")


def test_the_sine_model_starts_with_waves_and_the_same_in_every_arm():
    model = synthetic.make_model(replace(synthetic.FULL, wave_std=0.3))
    waves = model.transformer.wpe.weight
    assert waves.square().mean().item() == pytest.approx(0.3**2, rel=0.1)
    assert waves[0, ::2].abs().max() < 1e-6 < waves[0, 1::2].min()  # sines, cosines
    assert relative_error(waves[:, 2], waves[:, 0]) > 0.1  # of another frequency
    myopic = synthetic.make_model(replace(synthetic.FULL, wave_std=0.3, arm="myopic"))
    assert_agree(trained(myopic), trained(model), 0)


def sine_model(arm="vanilla"):
    """A small model of the sine task in float64 with random weights, and a batch."""
    torch.manual_seed(0)
    model = synthetic.SineModel(mg.GPTConfig(9, 1, 2, 2, 12, **mg.arm_fields(arm))).double()
    assert isinstance(model.transformer.h[0].mlp.gelu, torch.nn.ReLU)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, y = synthetic.sample_batch(4, 9, 0.7, 3, 4.0, torch.Generator().manual_seed(0))
    return model, x.double(), y.double()


def test_a_loss_reaches_the_embedding_through_two_layers_and_layer_1_through_one():
    reach = dict(vanilla=[8, 8, 0], horizon_2=[4, 2, 0], myopic=[0, 0, 0], myopic_kv=[0, 0, 0])
    lag = np.arange(9)[:, None] - np.arange(9)
    for arm, of_states in reach.items():
        tables = mg.gradient_tables(*sine_model(arm))
        for table, most in zip(tables, of_states):
            assert np.array_equal(table > 1e-9, (lag >= 0) & (lag <= most)), arm


def test_parts_by_lag_add_up_to_the_gradient():
    model, x, y = sine_model()
    weights = [block.attn.c_attn.weight for block in model.transformer.h]
    true = torch.autograd.grad(model(x, y)[1], weights)
    by_lag, shares = mg.gradients_by_lag(model, x, y), mg.lag_shares(model, x, y)
    for parts, whole, share in zip(by_lag, true, shares):
        assert relative_error(parts.sum(0), whole[12:]) < 1e-10
        for n, g in enumerate((whole[12:24], whole[24:])):  # W_K, then W_V
            own = (parts[0, 12 * n : 12 * n + 12] * g).sum() / g.square().sum()
            assert share[n][0] == pytest.approx(own.item(), abs=1e-4)
    pytest.raises(mg.UsageError, mg.lag_shares, *sine_model("myopic"))


def test_vanilla_plans_ahead_and_myopic_does_not():
    run = synthetic.PRESETS["demo"]["run"]
    _, vanilla, _ = synthetic.train_sine(run, "cpu", Mock())
    _, myopic, _ = synthetic.train_sine(replace(run, arm="myopic"), "cpu", Mock())
    assert vanilla["ratio"] < 0.2 and myopic["ratio"] > 0.85
    assert vanilla["probe_r2"][1][0] > 0.7 > 0.3 > vanilla["probe_r2_untrained"][1][0]
    assert np.mean(vanilla["patch_slope"][1 : run.a + 1]) > 0.7
    assert myopic["probe_r2"][1][0] < 0.1 > np.abs(myopic["patch_slope"]).max()


def test_sines_from_command_to_film(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "FuncAnimation", Mock(wraps=synthetic.FuncAnimation))
    tiny = "--preset demo --max_iters 6 --eval_sequences 64 --jobs 1 --sizes 2x8 2x16"
    flags = [*tiny.split(), "--out_dir", str(tmp_path)]
    synthetic.main(flags)
    made = {path.name for path in tmp_path.iterdir() if path.is_file()}
    of_models = {"precache_sequence.png", "precache_gradients.png", "precache.gif"}
    of_records = {f"precache{name}.png" for name in ("", "_patch", "_lags", "_size")}
    assert made == of_models | of_records
    out = capsys.readouterr().out
    assert out.index("Pre-caching") < out.index("figure ") < out.index("open ")  # result first

    film, frame = synthetic.FuncAnimation.call_args[0]
    for step, b in ((0, 2.0), (6, 4.0)):
        frame(step)
        assert film.get_suptitle() == f"step {step}: the sine is sin({b}·x)"
        grid, grey = film.axes[0].lines[0].get_data()
        assert np.allclose(grey, np.sin(b * grid))

    for path in tmp_path.glob("runs/*.npz"):
        path.unlink()  # as for seeds of which no arrays are kept
    synthetic.main([*flags, "--plot_only"])
    out = capsys.readouterr().out
    for name in of_models:
        assert f"no {name}: " in out and not (tmp_path / name).exists()


def test_the_table_and_the_figures_of_sines_show_the_records(shown, tmp_path):
    record = dict(huber_over_p=1, ratio=2, probe_r2=[[9], [3, 9]], probe_r2_untrained=[[9], [4, 9]])
    record |= dict(a=3, patch_slope=[9, 4, 5, 6, 9])
    assert synthetic.main_numbers(record) == (1, 2, 3, 4, 5)
    found = mg.read_runs(ROOT / "results" / "demo", synthetic.SineRun)
    synthetic.plot_evidence(found)(tmp_path / "evidence")
    synthetic.plot_patch(found)(tmp_path / "patch")
    left, right = shown["evidence"].axes
    (patch,) = shown["patch"].axes
    curves, probes, slopes = heights(left)[1:], right.patches, heights(patch)
    for record, curve, probe, slope in zip(found.values(), curves, probes, slopes):
        assert curve == [ratio for _, ratio in record["curve"]]
        assert probe.get_height() == record["probe_r2"][1][0] and slope == record["patch_slope"]


def test_pictures_of_trained_models_are_of_their_own_weights(shown, tmp_path):
    folder = ROOT / "results" / "demo"
    found = mg.read_runs(folder, synthetic.SineRun)
    run = replace(next(iter(found)), arm="bigram")  # the first arm of a call may be any
    synthetic.plot_gradients(found, run, folder)(tmp_path / "gradients")
    lag = np.arange(12)[:, None] - np.arange(12)
    for ax, reach in zip(shown["gradients"].axes, (11, 8, 0)):
        is_drawn = ~np.ma.getmaskarray(ax.images[0].get_array())
        assert np.array_equal(is_drawn, (lag >= 0) & (lag <= reach))
    synthetic.plot_sequence(found, run, folder)(tmp_path / "sequence")
    for ax in shown["sequence"].axes:
        true = [bar.get_height() for bar in ax.patches[:12]]
        vanilla, myopic = (np.abs(np.subtract(y, true)).mean() for y in heights(ax))
        assert vanilla < 0.25 < myopic
    pytest.raises(mg.UsageError, synthetic.plot_sequence, {}, run, folder)  # not asked for


def test_the_shares_of_lags_in_words(shown, tmp_path):
    last = [[9] * 12, [0.6, 0.1, 0.1, 0.1, *[0.0125] * 8]]  # W_K, W_V
    record = dict(lag_share=dict(start=[last, last], end=[[[9] * 12] * 2, last]))
    mg.plot_lags({mg.TextRun(): record}, 3, "")(tmp_path / "lags")
    said = shown["lags"].get_suptitle()
    assert "later positions give 40 % (by counting 85 %)" in said
    assert "the next 3 positions 30 % (by counting 38 %)" in said
    assert heights(shown["lags"].axes[1])[2] == last[1]


# ------------------------ run_all.sh
@pytest.mark.skipif(os.name == "nt", reason="no bash")
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
