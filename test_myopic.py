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
import textwrap
import weakref
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import myopic_gpt as mg
import synthetic

torch.set_num_threads(1)  # the tensors here are tiny: more threads would only wait for each other
ROOT = Path(mg.__file__).parent
README, TABLES = ((ROOT / name).read_text("utf-8") for name in ("README.md", "results/README.md"))
TINY = {synthetic: "--preset demo --max_iters 4 --n_embd 8 --block_size 8 --device cpu --jobs 1"}
TINY[mg] = f"{TINY[synthetic]} --data text"
_, (SINES, _) = synthetic.flags(["--preset", "demo"])  # vanilla and myopic
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}
DEVICES = list(itertools.product(["cpu"], TOLERANCE))
for name in ("cuda", "mps"):
    if getattr(torch, name).is_available():
        DEVICES += [(name, torch.float32), (name, torch.bfloat16)]


def assert_agree(got, true, tolerance=1e-10):
    """Two dicts of tensors: the same names, |got - true| <= tolerance |true| (of 1, if it is 0)."""
    assert got.keys() == true.keys()
    for name in true:
        a, b = got[name].cpu().double(), true[name].cpu().double()
        assert (a - b).norm() <= tolerance * (b.norm() or 1), name


def make_gpt(dtype=torch.float64, **settings):
    """A small GPT with all parameters random, so that no gradient is zero by accident."""
    torch.manual_seed(0)
    settings = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=12) | settings
    model = mg.GPT(mg.GPTConfig(**settings)).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def batch(T):
    """-> idx, targets (2, T): random tokens for make_gpt's model."""
    return torch.randint(11, (2, 2, T), generator=torch.Generator().manual_seed(1))


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(model, idx, targets):
    """{name: gradient of the loss}"""
    parameters = trainable(model)
    grads = torch.autograd.grad(model(idx, targets)[1], list(parameters.values()))
    return dict(zip(parameters, grads))


# ------------------------ the definition, literally
def literal_losses(copies, idx, targets, owner):
    """T losses, one per position, where position i computes with its own copy of the model.
    owner: whose W_K, W_V make the key and value of writer j for reader i, "reader" or "writer"."""
    n_head = copies[0].config.n_head
    x = [model.embed(idx)[:, i] for i, model in enumerate(copies)]  # T of (B, C)
    for layer in range(copies[0].config.n_layer):
        blocks = [model.transformer.h[layer] for model in copies]
        normed = [block.ln_1(x_i) for block, x_i in zip(blocks, x)]
        for i, block in enumerate(blocks):
            qkv = []
            for j in range(i + 1):
                whose = block if owner == "reader" else blocks[j]
                qkv.append(whose.attn.c_attn(normed[j]).unflatten(-1, (3, n_head, -1)))
            q, k, v = torch.stack(qkv).unbind(2)  # (i + 1, B, nh, hs); of q the last, i's own
            scores = (q[-1] * k).sum(-1, keepdim=True) / math.sqrt(q.size(-1))
            mixed = (scores.softmax(0) * v).sum(0).flatten(1)  # (B, C)
            x[i] = x[i] + block.attn.c_proj(mixed)
            x[i] = x[i] + block.mlp(block.ln_2(x[i]))
    losses = []
    for model, x_i, target in zip(copies, x, targets.T):
        logits = model.lm_head(model.transformer.ln_f(x_i))  # (B, V)
        losses.append(F.cross_entropy(logits, target) / len(copies))
    return losses


def literal_gradient(model, idx, targets, which, owner):
    """The gradient of the mean loss by the definition: the sum of d loss_i / d (copy j) over all i
    and j (which="all") or over i = j (which="diagonal"). The model's forward is never called."""
    copies = [copy.deepcopy(model) for _ in range(idx.size(1))]
    losses = literal_losses(copies, idx, targets, owner)
    total = {name: torch.zeros_like(p) for name, p in trainable(model).items()}
    for j, model_j in enumerate(copies):
        loss = losses[j] if which == "diagonal" else sum(losses)
        of_j = list(trainable(model_j).values())
        grads = torch.autograd.grad(loss, of_j, retain_graph=True, materialize_grads=True)
        for name, grad in zip(total, grads):
            total[name] += grad
    return total


DEFINITIONS = [("myopic", "diagonal", "reader"), ("myopic_kv", "diagonal", "writer")]
DEFINITIONS += [("vanilla", "all", "writer")]  # for which the owner does not matter
SHAPES = [(1, 1, True, 1), (1, 3, False, 5), (2, 2, True, 3), (2, 1, False, 4), (3, 2, True, 5)]


@pytest.mark.parametrize("n_layer, n_head, bias, T", SHAPES)
@pytest.mark.parametrize("arm, which, owner", DEFINITIONS)
def test_gradient_is_the_definition(n_layer, n_head, bias, T, arm, which, owner):
    model = make_gpt(n_layer=n_layer, n_head=n_head, bias=bias, **mg.ARMS[arm])
    true = literal_gradient(model, *batch(T), which, owner)
    assert_agree(gradients(model, *batch(T)), true)


# ------------------------ the attention function
def attention_inputs(B=2, T=9, dtype=torch.float64, device="cpu"):
    """[x, w, b] (strided leaves that require gradients) and a random dy; C = 24."""
    torch.manual_seed(0)
    shapes = [(B, T, 24, 2), (72, 24, 2), (72, 2), (B, T, 24, 2)]
    buffers = [(torch.randn(shape).double() / 3).to(device, dtype) for shape in shapes]
    x, w, b, dy = (buffer[..., 0] for buffer in buffers)
    return [x.requires_grad_(), w.requires_grad_(), b.requires_grad_()], dy


def attention_gradients(f, leaves, dy, *settings):
    """y = f(x, w, b, *settings) -> {"y": y, "dx": dx, "dw": dw, "db": db}."""
    x, w, b = (leaf.detach().requires_grad_() for leaf in leaves)
    y = f(x, w, b, *settings)
    y.backward(dy)
    return dict(y=y.detach(), dx=x.grad, dw=w.grad, db=b.grad)


def oracle(x, w, b, n_head, horizon, cut):
    """myopic_attention by autograd: a live stream where i - j <= horizon, a detached one before."""
    q, k, v = mg.heads(x, w, b, n_head)
    k_past, v_past = k.detach(), v.detach()
    if cut == "hidden":
        _, k_past, v_past = mg.heads(x.detach(), w, b, n_head)
    if horizon == 0:
        return mg.merge_heads(mg.two_stream_attention(q, k, v, k_past, v_past))
    lag = torch.arange(x.size(1))[:, None] - torch.arange(x.size(1))  # (T, T)
    is_near = lag <= (math.inf if horizon is None else horizon)
    S = torch.where(is_near, q @ k.mT, q @ k_past.mT) / math.sqrt(q.size(-1))
    A = S.masked_fill(lag < 0, -math.inf).softmax(-1)
    return mg.merge_heads((A * is_near) @ v + (A * ~is_near) @ v_past)


@pytest.mark.parametrize("keeps_lse", [True, False])
@pytest.mark.parametrize("device, dtype", DEVICES)
@pytest.mark.parametrize("B, T", [(2, 1), (2, 33), (1, 64), (0, 3), (2, 0)])
@pytest.mark.parametrize("cut", ["hidden", "kv"])
@pytest.mark.parametrize("horizon", [None, 0, 1, 40])
def test_attention_is_its_oracle(monkeypatch, device, dtype, B, T, horizon, cut, keeps_lse):
    leaves, dy = attention_inputs(B, T, dtype, device)
    exact = [leaf.cpu().double() for leaf in leaves]
    true = attention_gradients(oracle, exact, dy.cpu().double(), 3, horizon, cut)
    if not keeps_lse:  # as where torch's kernel keeps none: ours is computed
        monkeypatch.setattr(mg, "hasattr", lambda thing, name: False, raising=False)
    got = attention_gradients(mg.myopic_attention, leaves, dy, 3, horizon, cut)
    assert_agree(got, true, TOLERANCE[dtype])


def test_it_holds_under_checkpointing_compile_and_autocast():
    leaves, dy = attention_inputs()
    attention = functools.partial(mg.myopic_attention, n_head=3)
    true = attention_gradients(attention, leaves, dy)
    ways = [torch.compile(attention, backend="aot_eager")]
    for reentrant in (True, False):
        ways.append(functools.partial(checkpoint, attention, use_reentrant=reentrant))
    for way in ways:
        assert_agree(attention_gradients(way, leaves, dy), true, 1e-12)
    under_autocast = torch.autocast("cpu", torch.bfloat16)(attention)
    assert under_autocast(*leaves).dtype == torch.float64  # which autocast leaves alone
    leaves, dy = attention_inputs(dtype=torch.float32)
    got = attention_gradients(under_autocast, leaves, dy.bfloat16())
    assert [t.dtype for t in got.values()] == [torch.bfloat16] + 3 * [torch.float32]
    assert_agree(got, true, 0.03)


def test_second_derivatives_are_refused_and_what_it_saves_is_small_and_freed():
    leaves, dy = attention_inputs(T=9)
    y = mg.myopic_attention(*leaves, 3)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), leaves, create_graph=True)
    saved = y.grad_fn.saved_tensors  # x, w, q, k, v, O; none is (T, T), nor is one of the kernel's
    assert all(t.shape[-2:] != (9, 9) for t in saved) and "Flash" in saved[-1].grad_fn.name()
    kept = [weakref.ref(t) for t in saved[2:]]  # q, k, v, O
    del saved
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert all(ref() is not None for ref in kept)
    assert all(map(torch.equal, first, torch.autograd.grad(y, leaves, dy)))
    assert all(ref() is None for ref in kept)  # by counting references: there is no cycle


# ------------------------ the model
def test_nanogpts_weights_load_and_its_start_values():
    layers = {"ln_f": (12,), "h.0.ln_1": (12,), "h.0.ln_2": (12,), "h.0.attn.c_attn": (36, 12)}
    layers |= {"h.0.attn.c_proj": (12, 12), "h.0.mlp.c_fc": (48, 12), "h.0.mlp.c_proj": (12, 48)}
    state = {f"transformer.{n}.bias": torch.zeros(shape[0]) for n, shape in layers.items()}
    layers |= {"wte": (11, 12), "wpe": (8, 12)}
    state |= {f"transformer.{n}.weight": torch.randn(shape) for n, shape in layers.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    model, x = make_gpt(n_layer=1, n_head=3, dropout=0.5), torch.randn(2, 3, 12).double()
    model.load_state_dict(state, strict=True)
    block = model.transformer.h[0]
    assert torch.equal(block.mlp.gelu(x), F.gelu(x))  # not the approximate one
    for part in (model.transformer.drop, block.attn, block.mlp):  # each drops out
        assert not torch.equal(part(x), part(x))
    for name, p in mg.GPT(mg.GPTConfig(64, 200, 8, 2, 128)).named_parameters():
        std = 0.005 if name.endswith("c_proj.weight") else 0.02  # 0.02 / sqrt(2 * 8 layers)
        assert p.dim() == 1 or p.std().item() == pytest.approx(std, rel=0.1), name


def test_bigram_sees_no_past_and_local_myopic_its_teachers():
    (idx, targets), bigram = batch(6), make_gpt(**mg.ARMS["bigram"])
    other = idx.clone()
    other[:, :4] = (idx[:, :4] + 1) % 11
    assert torch.equal(bigram(idx)[0][:, 4:], bigram(other)[0][:, 4:])
    q, k, v = torch.randn(3, 1, 2, 4, 3).double().requires_grad_().unbind()
    zeros = torch.zeros_like(k)
    no_past = functools.partial(mg.two_stream_attention, k_past=zeros, v_past=zeros)
    assert torch.autograd.gradcheck(no_past, (q, k, v))

    teacher = make_gpt(dropout=0.5)
    local = mg.LocalMyopicGPT(replace(teacher.config, past="frozen", dropout=0), teacher).double()
    assert not trainable(teacher)
    # with its teacher's own weights it is myopic, if the teacher does not drop out
    local.load_state_dict(teacher.state_dict(), strict=False)
    true = gradients(make_gpt(horizon=0), idx, targets)
    assert_agree(gradients(local.train(), idx, targets), true)
    before, _ = local(idx)
    torch.nn.init.normal_(teacher.transformer.h[1].ln_1.weight)  # makes the past of block 1
    moved = ((local(idx)[0] - before).abs() > 1e-9).any(-1)  # (B, T)
    assert not moved[:, 0].any() and moved[:, 1:].all()


def test_bad_values_are_refused_and_good_ones_act():
    (x, w, b), _ = attention_inputs()
    bad = [(x[0], w, b, 3), (x, w[:36], b, 3), (x, w, b[:9], 3), (x, w, b, 5), (x, w, b, 0)]
    for arguments in [*bad, (x, w, b, 3, 1.5), (x, w, b, 3, -1), (x, w, b, 3, 0, "k")]:
        pytest.raises(mg.UsageError, mg.myopic_attention, *arguments)
    model, (idx, _) = make_gpt(), batch(9)
    pytest.raises(mg.UsageError, model, idx)  # block_size is 8
    for settings in (dict(idx=idx[:, :0]), dict(temperature=0), dict(top_k=0)):
        pytest.raises(mg.UsageError, model.generate, **(dict(idx=idx, max_new_tokens=1) | settings))
    best = model(idx[:, 1:])[0][:, -1].argmax(-1)
    for settings in (dict(top_k=1), dict(temperature=1e-6)):
        assert torch.equal(model.generate(idx, 1, **settings)[:, -1], best)
    bad = [dict(horizon=True), dict(horizon=1.5), dict(horizon=-1), dict(past="none")]
    bad = list(itertools.product([model.config], bad))
    of_text = [dict(muon="some"), dict(block_size=2.5), dict(n_head=5), dict(arm="horizon_1.5")]
    of_text += [dict(learning_rate=math.nan), dict(beta1=1), dict(seed=2**32)]
    bad += itertools.product([mg.TextRun()], of_text)
    of_sines = [dict(p=0), dict(p=1.5), dict(a=6), dict(block_size=6), dict(n_layer=1)]
    of_sines += [dict(arm="local_myopic"), dict(seed=9000), dict(b_hold=0.7)]
    for settings, change in [*bad, *itertools.product([SINES], of_sines)]:
        pytest.raises(mg.UsageError, replace, settings, **change)
    words = "--preset demo --n_head 0 --n_embd 40 16 --p 1 1.0"
    _, runs = synthetic.flags(words.split())
    wanted = itertools.product(["vanilla", "myopic"], [2, 1])  # all combinations, each once
    assert [(run.arm, run.n_head) for run in runs] == list(wanted)
    for h in mg.HORIZONS:  # these are between myopic, 0, and vanilla, and nothing else
        assert mg.ARMS[f"horizon_{h}"] == mg.ARMS["myopic"] | {"horizon": h}


def test_generate_takes_the_best_in_half_precision_and_shapes_alone_are_enough():
    model, idx = mg.GPT(mg.GPTConfig(4, 50304, 1, 1, 8)).half(), torch.zeros(2, 3, dtype=torch.long)
    logits, _ = model(idx)
    for settings in (dict(top_k=1), dict(temperature=1e-6, top_k=2)):
        assert torch.equal(model.generate(idx, 1, **settings)[:, -1], logits[:, -1].argmax(-1))
    torch.manual_seed(0)
    drawn = (logits[:, -1].float() / 0.1).softmax(-1).multinomial(1)
    torch.manual_seed(0)
    assert torch.equal(model.generate(idx, 1, temperature=0.1)[:, -1:], drawn)
    torch.nn.init.zeros_(model.lm_head.weight)  # all are equal: two of them are kept
    assert len({model.generate(idx, 1, top_k=2)[0, -1].item() for _ in range(40)}) == 2
    x, w = torch.empty(2, 5, 8, device="meta"), torch.empty(24, 8, device="meta")
    assert mg.myopic_attention(x, w, None, 2).shape == x.shape


# ------------------------ text and training
@pytest.mark.parametrize("muon, clip", [("all", 0.1), ("attn", 0)])
def test_training_is_torchs(monkeypatch, muon, clip):
    clip_norm = Mock(wraps=torch.nn.utils.clip_grad_norm_)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_norm)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)  # else torch's Muon takes it
    run = mg.TextRun(max_iters=4, warmup=0.5, decay_from=0.5, grad_clip=clip, muon=muon)
    run = replace(run, learning_rate=0.002, weight_decay=0.5, beta1=0.7, beta2=0.8)
    run = replace(run, muon_rate=0.005, muon_decay=0.8)
    (start, ours, theirs), progress = (make_gpt() for _ in range(3)), Mock()
    mg.train(ours, run, lambda step: batch(6), lambda done: None, progress)
    assert [c.args[0] for c in progress.call_args_list] == [4]  # steps since the last report
    assert [c.args[1] for c in clip_norm.call_args_list] == (4 * [clip] if clip else [])

    of_muon, embeddings, others = [], [], []  # norms and biases, which do not decay
    for name, p in theirs.named_parameters():
        is_muons = ".attn." in name or (muon == "all" and ".mlp." in name)
        (others if p.dim() == 1 else of_muon if is_muons else embeddings).append(p)
    groups = [dict(params=embeddings, weight_decay=0.5), dict(params=others, weight_decay=0)]
    adamw = torch.optim.AdamW(groups, betas=(0.7, 0.8))
    torchs = torch.optim.Muon(of_muon, weight_decay=0.8, adjust_lr_fn="match_rms_adamw")
    for scale in (0.5, 1, 1, 0.5):
        theirs.zero_grad()
        theirs(*batch(6))[1].backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        for optimizer, rate in ((adamw, 0.002), (torchs, 0.005)):
            for group in optimizer.param_groups:
                group["lr"] = scale * rate
            optimizer.step()
    for (name, p), q, r in zip(ours.named_parameters(), theirs.parameters(), start.parameters()):
        assert_agree({name: p - r}, {name: q - r}, 1e-6)


def test_text_is_split_between_paragraphs_and_each_of_english_is_there_once(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("\ufeff" + "the cat, the dög.\n\n" * 200, encoding="utf-8")
    train, held_out = (part.decode() for part in mg.load_text([file]))
    assert train == "the cat, the dög.\n\n" * 180 + "the cat, the dög."
    assert held_out == "\n\nthe cat, the dög." * 19 + "\n\n"
    assert b"".join(mg.load_text([file, file])).count(b"cat") == 400
    train, held_out = (set(part.split(b"\n\n")) for part in mg.load_text([]))
    assert len(train) > 5000 and len(held_out) > 500 and train & held_out <= {b""}


def test_the_numbers_of_a_record_are_of_the_right_text():
    text = b"d" * 40, bytes(range(40))
    run = mg.TextRun(block_size=3, max_iters=20, eval_windows=5000, dropout=0.5)
    model, numbers, arrays = mg.train_text(text, run, "cpu", Mock())
    held_out = torch.tensor(list(text[1])).unfold(0, 4, 1)  # (37, T + 1)
    spaced = held_out[torch.linspace(0, 36, 5000, dtype=torch.float64).long()]  # in two parts
    y = spaced[:, 1:]
    true = F.cross_entropy(model(spaced[:, :-1])[0].mT, y, reduction="none").detach()  # (5000, T)
    assert np.allclose(arrays["losses"], true[:64]) and np.array_equal(arrays["y"], y[:64])
    assert numbers["loss_by_position"] == pytest.approx(true.mean(0).tolist())
    step, train_loss, val_loss = numbers["curve"][-1]
    assert step == 20 and train_loss == numbers["train_loss"] < 1
    assert val_loss == numbers["val_loss"] == pytest.approx(true.mean().item())
    assert numbers["sample"].startswith("\0\1\2\3")
    torch.manual_seed(run.seed)
    for when, measured in (("start", mg.GPT(model.config)), ("end", model)):
        shares = mg.lag_shares(measured, held_out[::2, :-1], held_out[::2, 1:])
        assert numbers["lag_share"][when] == shares


def test_arms_share_start_and_batches_and_seeds_share_none(monkeypatch):
    monkeypatch.setattr(mg, "train", Mock(wraps=mg.train))
    text = bytes(range(250)), bytes(reversed(range(250)))  # ascending alone is trained on
    settings = dict(block_size=8, max_iters=1, learning_rate=0, muon_rate=0)  # stays as it starts
    for arm, seed in (("vanilla", 0), ("local_myopic", 0), ("bigram", 1)):
        mg.train_text(text, mg.TextRun(arm=arm, seed=seed, **settings), "cpu", Mock())
    arms, seen = [], []
    for c in mg.train.call_args_list:
        model, run, next_batch, *_ = c.args
        arms.append(run.arm)
        seen.append(model.transformer.state_dict() | dict(xy=torch.stack(next_batch(1))))
    assert arms == ["vanilla", "vanilla", "local_myopic", "bigram"]  # first local_myopic's teacher
    vanilla, teacher, local, other_seed = seen
    assert_agree(teacher, vanilla, 0)
    assert_agree(local, vanilla, 0)
    for name in ("xy", "wte.weight"):
        assert not torch.allclose(other_seed[name], vanilla[name])
    assert torch.equal(vanilla["xy"][1], vanilla["xy"][0] + 1)


@pytest.mark.parametrize("script", [mg, synthetic])
def test_every_setting_acts(script):
    small = dict(seed=2, block_size=8, n_layer=2, n_head=2, n_embd=12, batch_size=2, max_iters=4)
    small |= dict(dropout=0.1, beta1=0.5, beta2=0.5, warmup=0.6, grad_clip=0.01)
    text = np.random.default_rng(0).integers(256, size=(2, 99), dtype=np.uint8)
    train = functools.partial(mg.train_text, [part.tobytes() for part in text])
    run = mg.TextRun(**small, eval_windows=2)
    if script is synthetic:
        train = synthetic.train_sine
        run = synthetic.SineRun(**small, p=0.5, a=2, x_until=0.6, p_until=0.6, eval_sequences=64)
    _, numbers, _ = train(run, "cpu", Mock())
    for f in fields(run):
        if f.metadata:  # a setting
            value, choices = getattr(run, f.name), f.metadata["choices"]
            other = list(choices)[1] if choices else type(value)(1.5 * value)
            _, others, _ = train(replace(run, **{f.name: other}), "cpu", Mock())
            assert others["curve"] != numbers["curve"], f.name
    assert train(run, "cpu", Mock())[1] == numbers  # no chance is left


# ------------------------ the command and its files
@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a small text, one too short and one that is not UTF-8."""
    monkeypatch.chdir(tmp_path)
    lines = [f"line {n} of a small text, {n * n} and {n % 7};\n" for n in range(60)]
    texts = dict(text="".join(lines), short="short", latin="déjà vu " * 100)
    for name, text in texts.items():
        Path(name).write_text(text, encoding="latin-1")


def call(words, out="out/demo"):
    """Run the command -> {name: record} of all that the folder then holds, but for the seconds."""
    mg.main(f"{TINY[mg]} {words} --out_dir {out}".split())
    found = mg.read_runs(out, mg.TextRun)
    return {name: vars(run) | dict(seconds=0, npz=None) for name, run in found.items()}


def test_runs_are_trained_once_and_are_the_same_for_any_jobs(folder, monkeypatch, capsys):
    monkeypatch.setattr(mg, "train", Mock(wraps=mg.train))
    monkeypatch.setattr(mg, "report", Mock())
    arms = "--arm vanilla horizon_1 bigram local_myopic"
    torch.set_num_threads(2)  # a run takes one all the same
    torch.set_float32_matmul_precision("medium")
    records = call(arms)
    assert len({record["n_params"] for record in records.values()}) == 1  # the teacher is no part
    assert torch.get_num_threads() == 2 and torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)
    assert call(arms) == records and mg.train.call_count == 5  # a teacher is the fifth
    out = capsys.readouterr().out
    assert "4 of 4 runs are recorded" in out and "other code" not in out
    (path,) = Path("out/demo/runs").glob("text-bigram*.json")
    path.write_text(path.read_text().replace(mg.TextRun.code, "another1"))
    call("--arm vanilla bigram")
    out = capsys.readouterr().out
    assert "2 of 2 runs are recorded" in out and "made by other code" in out
    assert call(f"{arms} --jobs 2", "two") == records  # in other processes: not counted
    assert call("--arm vanilla bigram --fresh") == records and mg.train.call_count == 7

    vanilla, bigram = mg.report.call_args[0][0]  # the runs asked for, in that order
    text = Path("text").read_bytes()
    digest = hashlib.sha256(b"%d " % (len(text) * 9 // 10) + text).hexdigest()
    assert (vanilla.arm, bigram.arm, vanilla.data_sha256) == ("vanilla", "bigram", digest)
    lesson, sines = (Path(script.__file__).read_bytes() for script in (mg, synthetic))
    assert vanilla.code == mg.TextRun.code == hashlib.sha256(lesson).hexdigest()[:8]
    assert synthetic.SineRun.code == hashlib.sha256(lesson + sines).hexdigest()[:8]


def test_old_arrays_and_figures_do_not_stay(folder, capsys, monkeypatch):
    # a console that lacks letters, a user's settings (this one takes latex), and TQDM_DISABLE=1
    console = io.TextIOWrapper(io.BytesIO(), "cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setitem(mg.matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setattr(mg, "tqdm", functools.partial(mg.tqdm, disable=True))
    records, figure = call("--seed 2 3 --arm vanilla myopic"), Path("out/demo/text_gaps.png")
    assert figure.exists()
    call("--seed 3 2 --arm vanilla --fresh")
    assert not figure.exists()
    kept = [path.stem[:-9] for path in sorted(Path("out/demo").glob("*/*.npz"))]
    assert kept == ["text-myopic-seed2", "text-vanilla-seed3"]  # of the first seeds alone
    assert b"no text_gaps.png: it takes vanilla and another" in console.buffer.getvalue()
    assert call("--seed 3 --arm bigram myopic --plot_only") == records  # nothing is trained
    assert not list(Path("out/demo").glob("*.png")) and capsys.readouterr().err == ""


def test_files_are_whole_and_a_record_counts_under_its_own_name(folder, monkeypatch):
    def fail(part):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    Path("out").mkdir()
    pytest.raises(mg.UsageError, mg.write_whole, Path("out/figure"), fail)
    assert not list(Path("out").iterdir())
    monkeypatch.setattr(mg, "time", SimpleNamespace(time=itertools.count(0, 90).__next__))
    call("--arm vanilla")
    (run,) = mg.read_runs("out/demo", mg.TextRun).values()
    assert run.seconds == 90
    run.npz.write_bytes(run.npz.read_bytes()[:-99])
    pytest.raises(mg.UsageError, mg.read_arrays, run)
    path = run.npz.with_suffix(".json")
    path.rename(path.with_stem(f"{path.stem[:-1]}x"))
    assert not mg.read_runs("out/demo", mg.TextRun)
    for text in ("", "[1]", "{"):
        path.write_text(text)
        with pytest.raises(mg.UsageError, match=path.stem):
            mg.read_runs("out/demo", mg.TextRun)


BAD = [
    (mg, "--arm x", "'x'"),
    (mg, "--arms vanilla", "--arms"),
    (mg, "--n_embd 16 --n_head 5", "n_head 5"),
    (mg, "--jobs 0", "jobs is 0"),
    (mg, "--data latin", "latin"),
    (mg, "--data short", "block_size is 8"),
    (mg, "--out_dir short", "short"),
    (mg, "--plot_only", "none of these runs"),
    (mg, "--max_iters 1 --learning_rate 1e30", "--learning_rate"),
    (mg, "--arm myopic --learning_rate 1e30 --jobs 2", "myopic, seed 0: loss nan at step 4"),
    (synthetic, "--p 0.01 --a 1 --eval_sequences 64 --block_size 6", "p is 0.01"),
]


@pytest.mark.parametrize("script, words, said", BAD)
def test_bad_input_is_one_line_and_status_2(folder, capsys, script, words, said):
    with pytest.raises(SystemExit) as stop:
        script.main(f"{TINY[script]} {words}".split())
    error = capsys.readouterr().err.partition("error: ")[2].strip()
    assert stop.value.code == 2 and said in error and "\n" not in error


@pytest.mark.skipif(os.name == "nt", reason="no process groups")
@pytest.mark.parametrize("script, number", [(mg, signal.SIGINT), (synthetic, signal.SIGKILL)])
def test_interrupted_or_killed_no_process_is_left(folder, monkeypatch, script, number):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # a script's folder is not looked into then
    words = f"{TINY[script]} --max_iters 9999999 --jobs 2 --arm vanilla"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    # a test run in the background would hand down a Ctrl-C that is ignored
    pipes["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command, said = [sys.executable, script.__file__, *words.split()], b""
    process = subprocess.Popen(command, **pipes)
    while b"vanilla, seed 0: loss" not in said and process.poll() is None:
        said += process.stderr.read1()
    kill = os.killpg if number == signal.SIGINT else os.kill  # a terminal tells the whole group
    kill(process.pid, number)
    _, said = process.communicate(timeout=20)  # the pipes end with the last process
    assert process.returncode in (130, -signal.SIGKILL) and b"Traceback" not in said


def die(run, device, report_progress):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_worker_killed_for_its_memory_is_one_line_and_a_bug_has_a_traceback(tmp_path):
    args = SimpleNamespace(jobs=2, out_dir=tmp_path, device="cpu", kept_seed=0)
    with pytest.raises(SystemExit, match="--jobs"), mg.no_traceback():
        list(mg.train_side_by_side(die, args, [mg.TextRun()], Mock()))
    with pytest.raises(ValueError, match="a bug"), mg.no_traceback():
        raise ValueError("a bug")


# ------------------------ tables and figures say what the records say
def recorded(name, script):
    """The finished runs in a folder of results."""
    run_class = mg.TextRun if script is mg else synthetic.SineRun
    return list(mg.read_runs(ROOT / "results" / name, run_class).values())


def figures_of(monkeypatch, plot, *data):
    """-> {file name: Figure}, what plot(*data) would write."""
    monkeypatch.setattr(mg, "save_figure", Mock())
    plot(*data)
    return {c.args[0].name: c.args[1] for c in mg.save_figure.call_args_list}


def assert_drawn(ax, runs, x, y_of):
    """The line of each arm, of its colour, is the mean of y_of(run) over seeds."""
    lines = {line.get_label().split(":")[0]: line for line in ax.lines}
    for arm, group in mg.group_by(runs, "arm").items():
        assert lines[arm].get_color() == mg.LOOKS[arm][0]
        assert list(lines[arm].get_xdata()) == list(x)
        assert lines[arm].get_ydata() == pytest.approx(np.mean([*map(y_of, group)], axis=0))


def assert_lags_drawn(figure, runs, last):
    """The shares of the last layer's W_V, which are [-1][1], of vanilla before and after."""
    (ax,), vanilla = figure.axes, [run for run in runs if run.arm == "vanilla"]
    for line, when in zip(ax.lines[1:], ("start", "end"), strict=True):
        mean = np.mean([run.lag_share[when][-1][1] for run in vanilla], axis=0)
        assert line.get_ydata() == pytest.approx(mean)
    title, T = figure.get_suptitle(), len(mean)
    pairs = sum(T - lag for lag in range(1, min(last, T - 1) + 1)) / (T * (T + 1) / 2)
    assert (
        f": {100 * mean[1 : last + 1].sum():.0f} ± " in title and f"({100 * pairs:.0f} %" in title
    )
    assert mg.seeds_of(runs) == "mean and range of 3 seeds"


def test_what_vanilla_needs_and_letters_of_a_table(capsys):
    losses = dict(vanilla=[1, 2], myopic=[1.5, 3], bigram=[1.05, 9])
    runs = []
    for arm, seed in itertools.product(losses, (0, 1)):
        run = mg.TextRun(arm=arm, seed=seed)
        loss = run.val_loss = losses[arm][seed]
        run.curve = [[2, 8, 2 * loss], [3, 8, 9], [4, 8, loss]]  # step, training, validation
        runs.append(run)
    assert mg.shares_of_bigram(runs, "bigram") == [100]  # seed 0's gap of bigram is noise
    # vanilla's best so far, after 50, 75, 100 % of the steps: 2, 2, 1 of seed 0 and 4, 4, 2 of 1
    assert mg.steps_needed(runs, "myopic") == pytest.approx([87.5, 87.5])
    runs[3].val_loss = 1.9  # below what seed 1's vanilla comes to
    assert mg.steps_needed(runs, "myopic") == []
    mg.print_table("title", ["name"], [["[red]:smile:" + 200 * "@"]])
    out = capsys.readouterr().out
    assert "[red]:smile:" in out and out.count("@") == 200  # letters as they are, none cut
    assert len(set(mg.LOOKS.values())) == len(mg.LOOKS) == len(mg.ARMS) + 1  # and "untrained"


def test_what_is_shown_of_english(tmp_path, monkeypatch, capsys):
    runs = recorded("full", mg)  # seven sizes
    shown = [run for run in runs if run.size == "3x128"]  # has more parameters than 6x64
    shown[0].sample = "so\x1b\x9b\r"
    others = [copy.copy(run) for run in runs if run.size == "1x64"]
    for run in others:
        run.warmup = 0.5  # never averaged with the rest
    figures = figures_of(monkeypatch, mg.report, [*others, *runs], tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(row) in out for row in mg.table_rows([*others, *runs], ["warmup"]))
    share = mg.mean_sd(mg.shares_of_bigram(shown, "myopic"), 1)
    assert f"3x128, warmup 0.05: myopic training loses {share} %" in out and "\x1b" not in out

    vanilla = {run.seed: run for run in shown if run.arm == "vanilla"}
    others = [run for run in shown if run.arm != "vanilla"]

    def curve_of(run):
        return np.subtract(run.curve, vanilla[run.seed].curve)[:, 2]

    def bins_of(run):
        gap = np.subtract(run.loss_by_position, vanilla[run.seed].loss_by_position)
        return [gap[0], *(gap[n : 2 * n].mean() for n in (1, 2, 4, 8, 16, 32))]

    left, right = figures["text_gaps.png"].axes
    assert_drawn(left, others, [step for step, _, _ in shown[0].curve], curve_of)
    assert_drawn(right, others, range(7), bins_of)
    assert [t.get_text() for t in right.get_xticklabels()] == ["0", "1", "2", "4", "8", "16", "32"]
    gap = mg.mean_sd(list(mg.gaps(shown, "myopic").values()), 2)
    assert f"myopic {gap}" in figures["text_gaps.png"].get_suptitle()
    band = left.collections[0].get_paths()[0].get_extents()  # of all seeds
    curves = [curve_of(run) for run in others if run.arm == others[0].arm]
    assert (band.ymin, band.ymax) == pytest.approx((np.min(curves), np.max(curves)))
    assert_lags_drawn(figures["text_lags.png"], shown, 64)

    assert figures["text_size.png"].get_suptitle().endswith(f"{share} % at 3x128")
    assert len(mg.comparisons([shown[0], replace(shown[0], data_sha256="another text")])) == 2
    (ax,), depths = figures["text_size.png"].axes, {}
    runs.sort(key=attrgetter("n_params"))
    for line, of_size in zip(ax.lines, mg.group_by(runs, "n_layer", "n_params").items()):
        (n_layer, n_params), group = of_size
        shares = mg.shares_of_bigram(group, "myopic")
        assert line.get_xydata().tolist() == [[n_params, share] for share in shares]
        depths.setdefault(f"{n_layer} layers", []).append([n_params, np.mean(shares)])
    assert {line.get_label(): line.get_xydata().tolist() for line in ax.lines[7:-1]} == depths


@pytest.mark.parametrize("name", ["quick", "full"])  # four sizes; four p
def test_what_is_shown_of_sines(tmp_path, monkeypatch, capsys, name):
    runs = [run for run in recorded(name, synthetic) if run.max_iters <= 6000]
    runs.sort(key=attrgetter("p", "n_embd"), reverse=True)
    for run in runs:
        run.npz = Path("none")
    others = [
        copy.copy(run) for run in runs if (run.p, run.n_embd) == (runs[-1].p, runs[-1].n_embd)
    ]
    for run in others:
        run.warmup = 0.5  # never averaged with the rest
    figures = figures_of(monkeypatch, synthetic.report, [*others, *runs], tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    for row in synthetic.table_rows([*others, *runs], ["warmup"]):
        assert " ".join(row[:-3]) in out and " ".join(row[:5] + row[-3:]) in out

    shown = [run for run in runs if (run.p, run.n_embd) == (runs[0].p, runs[0].n_embd)]
    for run in shown:
        run.npz = (
            ROOT / "README.md"
            if (run.arm, run.seed) in (("vanilla", 0), ("myopic", 1))
            else run.npz
        )
    with pytest.raises(mg.UsageError):  # what is kept is of different seeds
        synthetic.kept_of(shown, "vanilla", "myopic")
    left, right = figures["precache.png"].axes
    steps, _ = zip(*shown[0].curve)
    assert_drawn(left, shown, steps, lambda run: [ratio for _, ratio in run.curve])
    bars = [[run.probe_r2_untrained[1][0] for run in shown]]
    for arm, group in reversed(mg.group_by(shown, "arm").items()):
        bars.insert(0, [run.probe_r2[1][0] for run in group])
        assert f"{arm} {np.mean([run.ratio for run in group]):.2f}" in out.rpartition("Loss, if")[2]
    for line, bar, values in zip(right.lines, right.patches, bars, strict=True):
        assert list(line.get_ydata()) == values and bar.get_height() == np.mean(values)
    arms = list(mg.group_by(shown, "arm"))
    assert [t.get_text() for t in right.get_xticklabels()] == [*arms, "untrained"]
    assert f"figures of p {shown[0].p:g}, {shown[0].size}, warmup 0.05:" in out
    (ax,) = figures["precache_patch.png"].axes
    assert (ax.patches[0].get_x(), ax.patches[0].get_width()) == (0.5, 10)  # the answers of a = 10
    assert_drawn(ax, shown, range(16), attrgetter("patch_slope"))
    assert_lags_drawn(figures["precache_lags.png"], shown, 10)


# ------------------------ the sine task
def test_the_task_is_the_papers():
    a, b, T = 3, 4.0, 9
    xs, ys = synthetic.sample_batch(5, T, 0.5, a, b, torch.Generator().manual_seed(0))
    for s, n in itertools.product(range(5), range(T)):
        x, z = xs[s, :, 0].double(), xs[s, n, 1].item()
        past = sum(math.sin(b * x[n - i]) for i in range(1, a + 1) if n - i >= 0)
        assert z in (0, 1) and abs(ys[s, n].item() - (z * past + (1 - z) * x[n].item())) < 1e-5

    x, y = synthetic.sample_batch(4000, 64, 0.3, generator=torch.Generator().manual_seed(1))
    assert abs(x[..., 1].mean() - 0.3) < 0.01 and abs(x[..., 0].std() - 1) < 0.01
    trivial = torch.nn.Module()
    trivial.forward = lambda x: ((1 - x[..., 1]) * x[..., 0], None)
    losses = synthetic.huber_losses(trivial, x, y, 0.3)
    assert losses["ratio"] == pytest.approx(1)
    assert losses["huber_over_p"] == pytest.approx(1.2569, abs=0.03)  # the paper's


class KnownModel(torch.nn.Module):
    """Layers 0 and 2 hold noise, layer 1 sin(4 x), the same of x two positions back, and z. Where
    z = 1 the answer is half of the three sines that are due, and the one that lies two back."""

    def hidden_states(self, x):
        sines = torch.sin(4 * x[..., 0])  # (B, T)
        two_back = F.pad(sines, (2, 0))[:, :-2]
        layer_1 = F.pad(torch.stack([sines, two_back, x[..., 1]], dim=-1), (0, 97))  # (B, T, 100)
        return [torch.randn(layer_1.shape), layer_1, torch.randn(layer_1.shape)]

    def answer(self, state, blocks_done):
        due = F.pad(state[..., 0], (3, 0))[:, :-1].unfold(1, 3, 1).sum(-1)  # (B, T)
        return (due / 2 + state[..., 1]) * state[..., 2]


def test_probe_and_patch_find_what_a_known_model_holds():
    run, model = replace(SINES, p=0.5), KnownModel()
    torch.manual_seed(0)
    r2, x, estimate = synthetic.probe_model(model, run, 600, "cpu")
    assert np.max(r2[0]) < 0  # held out: in sample, 100 channels of noise would hold something
    assert r2[1] == pytest.approx([1, 0, 1, 0, 0, 0], abs=0.02)
    assert estimate == pytest.approx(np.sin(4 * x), abs=0.02)
    model.hidden_states = Mock(wraps=model.hidden_states)
    slopes = synthetic.patch(model, run, 500, "cpu")
    assert slopes == pytest.approx([0, 0.5, 0.5, 0.5, 0, 0], abs=1e-4)  # only n's state moves
    x, other = (c.args[0] for c in model.hidden_states.call_args_list)
    changed = x != other  # (B, T, 2): one x of each sequence is drawn anew
    assert changed[..., 0].sum(1).eq(1).all() and not changed[..., 1].any()
    assert other[changed].std().item() == pytest.approx(1, abs=0.1)
    assert [synthetic.lookbacks(T) for T in (12, 32, 64)] == [6, 16, 16]


def test_sines_are_trained_and_measured_on_the_right_draws(monkeypatch):
    monkeypatch.setattr(synthetic, "sample_batch", Mock(wraps=synthetic.sample_batch))
    run = replace(SINES, max_iters=10, p=0.5, seed=7, eval_sequences=64, x_wide=1.5)
    model, numbers, arrays = synthetic.train_sine(run, "cpu", Mock())
    drawn = set()  # seed, b, p, and in training the standard deviation of x
    for c in synthetic.sample_batch.call_args_list:
        _, _, p, _, b, generator, *x_std = c.args
        drawn.add((generator.initial_seed(), b, p, *x_std))
    lessons = [synthetic.curriculum(run, step) for step in range(11)]  # (b, p, x_std)
    assert lessons[1] == (2.0, 1.0, 1.5) and lessons[9] == lessons[10] == (4.0, 0.5, 1.0)
    assert lessons[4] == pytest.approx((3.0, 0.5 ** (1 / 3), 1.5))  # b halfway there, log p a third
    wanted = {(10003, 4.0, 0.5)}  # patch
    for n, (b, p, x_std) in enumerate(lessons):
        wanted.add((10000, b, p))  # losses
        if n < 10:
            wanted.add((1007, b, p, x_std))  # TRAINING + the run's seed
        if n % 2 == 0:  # probe, as the frames of the film
            wanted |= {(10001, b, p), (10002, b, p)}
    assert drawn == wanted
    assert arrays["film_steps"].tolist() == [0, 2, 4, 6, 8, 10]
    _, x, estimate = synthetic.probe_model(model, run, 256, "cpu")
    assert np.allclose(arrays["film"][-1], [x[:300], estimate[:300]], atol=1e-5)
    x, y = synthetic.sample_task(run, 64, synthetic.EVALUATION)
    for when, measured in (("start", synthetic.make_model(run)), ("end", model)):
        assert numbers["lag_share"][when] == mg.lag_shares(measured, x, y)
    loss = model.position_losses(model.hidden_states(x)[-1], y).mean().item()
    assert loss / run.p == pytest.approx(numbers["huber_over_p"], rel=1e-4)


def test_a_sine_model_starts_the_same_in_every_arm_with_positions_as_waves():
    run = replace(SINES, n_embd=128, block_size=64, wave_std=0.3, embd_std=0.2)
    others = {}, dict(arm="myopic"), dict(seed=1)
    model, myopic, other = (synthetic.make_model(replace(run, **change)) for change in others)
    assert_agree(trainable(myopic), trainable(model), 0)
    embedding, waves = model.read_in.weight, model.transformer.wpe.weight
    assert not torch.equal(other.read_in.weight, embedding)
    assert embedding.std().item() == pytest.approx(0.2, rel=0.15)
    assert waves.square().mean().item() == pytest.approx(0.3**2, rel=0.1)
    assert waves[0, ::2].abs().max() < 1e-6 < waves[0, 1::2].min()  # sines, cosines


def test_lag_shares_and_tables_are_parts_of_the_gradient():
    model, xy = make_gpt(dropout=0.5), batch(8)
    xy[1][0, ::3] = -1  # no target
    shares, tables = mg.lag_shares(model, *xy), mg.gradient_tables(model, *xy)
    assert model.training  # as before, but measured without dropout
    states = model.eval().hidden_states(xy[0])
    of_loss_5 = model.position_losses(states[-1], xy[1])[:, 5].sum()
    (grad,) = torch.autograd.grad(of_loss_5, states[1])  # (B, T, C)
    assert tables[1][5] == pytest.approx(grad.square().mean((0, 2)).sqrt().numpy())
    for layer, block in enumerate(model.transformer.h):
        # what W_K and W_V of this block get from readers at most `horizon` later
        up_to = [torch.zeros(2, 12, 12)]
        for horizon in range(8):
            block.attn.config = replace(model.config, horizon=horizon, cut="kv")
            dw = gradients(model, *xy)[f"transformer.h.{layer}.attn.c_attn.weight"]
            up_to.append(dw[12:].unflatten(0, (2, 12)))
        block.attn.config = model.config
        whole = up_to[-1]
        for lag, (before, after) in enumerate(itertools.pairwise(up_to)):
            true = ((after - before) * whole).sum((1, 2)) / whole.square().sum((1, 2))
            assert [shares[layer][n][lag] for n in (0, 1)] == pytest.approx(true.tolist(), abs=1e-4)
    assert np.allclose(mg.lag_shares(model.bfloat16(), *xy), shares, atol=0.03)
    for settings in (dict(horizon=0), dict(past="zero")):
        pytest.raises(mg.UsageError, mg.lag_shares, make_gpt(**settings), *xy)


def test_vanilla_plans_ahead_and_myopic_does_not():
    _, vanilla, _ = synthetic.train_sine(SINES, "cpu", Mock())
    _, myopic, _ = synthetic.train_sine(replace(SINES, arm="myopic"), "cpu", Mock())
    assert vanilla["ratio"] < 0.2 and myopic["ratio"] > 0.85
    assert vanilla["probe_r2"][1][0] > 0.7 and vanilla["probe_r2_untrained"][1][0] < 0.3
    assert np.mean(vanilla["patch_slope"][1 : SINES.a + 1]) > 0.7
    assert myopic["probe_r2"][1][0] < 0.1 and np.abs(myopic["patch_slope"]).max() < 0.1


def test_sines_from_records_to_film(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "results" / "demo" / "runs", tmp_path / "runs")
    monkeypatch.setattr(synthetic, "FuncAnimation", Mock(wraps=synthetic.FuncAnimation))
    monkeypatch.setattr(mg, "save_figure", Mock(wraps=mg.save_figure))
    words = f"--preset demo --plot_only --out_dir {tmp_path}".split()
    synthetic.main(words)
    assert len(list(tmp_path.glob("precache*"))) == 6
    myopic, vanilla = mg.read_runs(tmp_path, synthetic.SineRun).values()
    film, frame = synthetic.FuncAnimation.call_args[0]
    for n in (0, 7, 12):  # every second point of the curve
        frame(n)
        step, _ = vanilla.curve[2 * n]
        b, _, _ = synthetic.curriculum(vanilla, step)
        assert film.texts[-1].get_text() == f"step {step}: the sine is sin({b:.1f}·x)"
        for run, top, low in zip((vanilla, myopic), film.axes[:2], film.axes[2:]):
            grid, grey = top.lines[0].get_data()
            assert np.allclose(grey, np.sin(b * grid))
            assert np.array_equal(top.lines[1].get_data(), mg.read_arrays(run)["film"][n])
            assert low.lines[1].get_xydata().tolist() == run.curve[: 2 * n + 1]

    figures = {c.args[0].name: c.args[1] for c in mg.save_figure.call_args_list}
    true = []
    for ax in figures["precache_sequence.png"].axes:  # sines, answers
        n = len(ax.lines[0].get_xdata())
        true.append(np.array([bar.get_height() for bar in ax.patches[:n]]))
        of_vanilla, of_myopic = (np.abs(line.get_ydata() - true[-1]).mean() for line in ax.lines)
        assert of_vanilla < 0.25 < of_myopic
    assert [sum(true[0][i - 3 : i]) for i in range(3, n)] == pytest.approx(true[1][3:])  # a = 3
    for ax, reach in zip(figures["precache_gradients.png"].axes, (11, 0)):  # all; its own
        is_drawn = ~np.ma.getmaskarray(ax.images[0].get_array())
        assert np.array_equal(is_drawn, np.triu(np.tri(12), -reach))  # 0 <= i - j <= reach

    vanilla.npz.write_bytes(b"")
    synthetic.main(words)
    gone = re.findall(
        f"no (precache.*): it takes what .* {vanilla.name()}", capsys.readouterr().out
    )
    assert gone == ["precache_sequence.png", "precache_gradients.png", "precache.gif"]


# ------------------------ run_all.sh and README
@pytest.mark.skipif(os.name == "nt", reason="no bash")
def test_run_all_installs_into_venv_whatever_pip_is_told(tmp_path):
    # a python that has no packages; its venv is another such, and its pip says what it is told
    fake = tmp_path / "python3"
    fake.write_text(
        '#!/bin/sh\ncase "$2" in\n'
        "venv) mkdir -p $3/bin; cp $0 $3/bin/python;;\n"
        "pip) echo pip $0 user=$PIP_USER target=$PIP_TARGET; exit 3;;\n"
        '"import sys"*) exit 0;;\n*) exit 1;;\nesac\n'
    )
    fake.chmod(0o755)
    shutil.copy(fake, tmp_path / "python")
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    env = dict(PATH=f"{tmp_path}:/usr/bin:/bin", PIP_USER="1", PIP_TARGET="elsewhere")
    bash = ["bash", str(tmp_path / "run_all.sh")]
    done = subprocess.run(bash, env=env, capture_output=True, text=True)
    venv = tmp_path / ".venv" / "bin" / "python"
    assert done.returncode == 3 and f"pip {venv} user=0 target=\n" in done.stdout, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no bash")
@pytest.mark.parametrize("words, status, said", [("--help", 0, "Set up once"), ("--arm x", 2, "")])
def test_run_all_from_anywhere_and_with_any_environment(tmp_path, words, status, said):
    (tmp_path / "link").symlink_to(ROOT / "run_all.sh")
    for name in ("synthetic.py", "random.py"):
        (tmp_path / name).write_text("raise ValueError('of somebody else')")
    made = sorted(tmp_path.iterdir())
    odd = dict(CDPATH=str(tmp_path), PYTHONOPTIMIZE="2", PYTHONSAFEPATH="1", PYTHONHOME="no_such")
    # this python has all packages, so nothing is installed
    odd |= dict(MPLBACKEND="no_such", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    bash = ["bash", "link", *words.split()]
    done = subprocess.run(bash, cwd=tmp_path, env=os.environ | odd, capture_output=True, text=True)
    assert done.returncode == status and said in done.stdout and "==" not in done.stdout  # a run
    assert "Traceback" not in done.stderr and len(done.stdout.splitlines()) < 8
    assert sorted(tmp_path.iterdir()) == made


def test_readme_shows_what_its_examples_print(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    block = r"^( *)```python\n(.*?)```(?:\s+```\n(.*?)^ *```)?"
    ran = 0
    for indent, code, printed in re.findall(block, README, re.S | re.M):
        if not code.lstrip().startswith("# a fragment"):
            exec(textwrap.dedent(code), {})
            assert textwrap.indent(capsys.readouterr().out, indent) == printed
            ran += 1
    assert ran == 6


def test_snippets_of_the_results_print_the_tables_above_them(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for code in re.findall(r"```python\n(# prints the table above\n.*?)```", TABLES, re.S):
        exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) > 20 and set(printed) <= set(TABLES.splitlines())


def test_commands_of_the_readmes_are_parsed():
    text, scripts = README + TABLES, {"myopic_gpt.py": mg, "synthetic.py": synthetic}
    commands = re.findall(r"`python (\w+\.py)([^`…]*)", text)  # in a line
    commands += re.findall(r"^python (\w+\.py)([^#\n]*)", text, re.M)  # in a block
    assert len(commands) > 15
    for script, words in commands:
        scripts[script].flags(words.split())
    for words in re.findall(r"`(--\w+ [^`]*)`", text):  # what is said to be added
        (mg if "local_myopic" in words else synthetic).flags(words.split())


def test_numbers_in_the_readmes_are_those_of_the_records(monkeypatch):
    quick = recorded("quick", mg)
    lags = figures_of(monkeypatch, mg.plot_lags, Path("x"), quick, "All later readers", 64)
    title = lags["x"].get_suptitle()
    share = re.search(r"(\d+ ± \d+) %", title)[1]
    assert f"{share} %" in README and "(97 % if all pairs" in title
    for name, script in itertools.product(("demo", "quick", "full", "earlier"), (synthetic, mg)):
        runs = recorded(name, script)
        digest = dict(data_sha256=runs[0].data_sha256) if runs and script is mg else {}
        for row in script.table_rows(runs) if runs else []:
            is_ablation = name == "earlier" and row[3] == "1"  # of sines, one seed
            assert is_ablation or f"| {' | '.join(row)} |" in TABLES
        if name in ("demo", "quick"):  # and a preset's runs are found, under names that last
            wanted = [replace(run, **digest) for run in script.flags(["--preset", name])[1]]
            assert {run.name() for run in wanted} <= {run.name() for run in runs}
    shown = [line for line in README.splitlines() if line.startswith("|") and "±" in line]
    assert len(shown) > 3 and set(shown) <= set(TABLES.splitlines())
