"""The tests: offline, on the CPU and whatever accelerator is present.   python -m pytest -q
The hand-written backward is held against the definition executed literally: literal_gradient."""

import copy
import hashlib
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import weakref
from dataclasses import fields, replace
from functools import partial
from itertools import count, product
from pathlib import Path
from unittest.mock import Mock

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence  # matplotlib brings it
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
ACCELERATORS = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()]
DEVICES = list(product(["cpu"], TOLERANCE))
DEVICES += product(ACCELERATORS, [torch.float32, torch.bfloat16])


def assert_agree(got, true, tolerance=1e-10):
    """Two dicts of tensors: the same names, |got - true| <= tolerance |true| (of 1, if it is 0)."""
    assert got.keys() == true.keys()
    for name in true:
        a, b = got[name].cpu().double(), true[name].cpu().double()
        assert (a - b).norm() <= tolerance * (b.norm() or 1), name


def make_gpt(**settings):
    """A small GPT with all parameters random, so that no gradient is zero by accident."""
    torch.manual_seed(0)
    settings = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=12) | settings
    model = mg.GPT(mg.GPTConfig(**settings)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def batch(T):
    """-> idx, targets (2, T): random tokens for make_gpt's model."""
    return torch.randint(11, (2, 2, T), generator=torch.Generator().manual_seed(1))


def gradients(loss, model):
    """{name: gradient of the loss}, of all parameters that are trained"""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = dict(retain_graph=True, materialize_grads=True)
    grads = torch.autograd.grad(loss, list(trained.values()), **options)
    return dict(zip(trained, grads))


# ------------------------ the definition, literally
def literal_gradient(model, idx, targets, which, owner):
    """The gradient of the mean loss by the definition: position i computes with its own copy of
    the model; d loss_i / d (copy j) is summed over all i and j (which="all") or over i = j
    ("diagonal"). owner: whose W_K, W_V make the key and value of writer j for reader i,
    "reader" or "writer". The model's forward is never called."""
    copies = [copy.deepcopy(model) for _ in range(idx.size(1))]
    n_head = model.config.n_head
    x = [each.embed(idx)[:, i] for i, each in enumerate(copies)]  # T of (B, C)
    for layer in range(model.config.n_layer):
        blocks = [each.transformer.h[layer] for each in copies]
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

    logits = [each.lm_head(each.transformer.ln_f(x_i)) for each, x_i in zip(copies, x)]
    losses = [F.cross_entropy(z, y) / len(copies) for z, y in zip(logits, targets.T)]
    if which == "all":
        losses = len(losses) * [sum(losses)]
    of_copies = [gradients(loss, each) for loss, each in zip(losses, copies)]
    return {name: sum(grads[name] for grads in of_copies) for name in of_copies[0]}


DEFINITIONS = [("myopic", "diagonal", "reader"), ("myopic_kv", "diagonal", "writer")]
DEFINITIONS += [("vanilla", "all", "writer")]  # for which the owner does not matter
SHAPES = [(1, 1, True, 1), (1, 3, False, 5), (2, 2, True, 3), (2, 1, False, 4), (3, 2, True, 5)]


@pytest.mark.parametrize("n_layer, n_head, bias, T", SHAPES)
@pytest.mark.parametrize("arm, which, owner", DEFINITIONS)
def test_gradient_is_the_definition(n_layer, n_head, bias, T, arm, which, owner):
    model = make_gpt(n_layer=n_layer, n_head=n_head, bias=bias, **mg.ARMS[arm])
    true = literal_gradient(model, *batch(T), which, owner)
    assert_agree(gradients(model(*batch(T))[1], model), true)


# ------------------------ the attention function
def attention_inputs(B=2, T=9, dtype=torch.float64, device="cpu"):
    """x, w, b and a gradient dy of the output, all strided; C = 24."""
    torch.manual_seed(0)
    shapes = [(B, T, 24, 2), (72, 24, 2), (72, 2), (B, T, 24, 2)]
    return [(torch.randn(shape).double() / 3).to(device, dtype)[..., 0] for shape in shapes]


def attention_gradients(f, inputs, *settings):
    """y = f(x, w, b, *settings) -> {"y": y, "dx": dx, "dw": dw, "db": db}."""
    x, w, b, dy = (t.detach().requires_grad_() for t in inputs)
    y = f(x, w, b, *settings)
    y.backward(dy.to(y.dtype))
    return dict(y=y.detach(), dx=x.grad, dw=w.grad, db=b.grad)


def oracle(x, w, b, n_head, horizon, cut):
    """myopic_attention by autograd: a live stream where i - j <= horizon, a detached one before."""
    q, k, v = mg.heads(x, w, b, n_head)
    k_past, v_past = k.detach(), v.detach()
    if cut == "hidden":
        _, k_past, v_past = mg.heads(x.detach(), w, b, n_head)
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
    inputs = attention_inputs(B, T, dtype, device)
    exact = [t.cpu().double() for t in inputs]
    true = attention_gradients(oracle, exact, 3, horizon, cut)
    if not keeps_lse:  # as where torch's kernel keeps none: ours is computed
        monkeypatch.setattr(mg, "hasattr", lambda thing, name: False, raising=False)
    got = attention_gradients(mg.myopic_attention, inputs, 3, horizon, cut)
    assert_agree(got, true, TOLERANCE[dtype])


def test_it_holds_under_checkpointing_compile_and_autocast():
    attention = partial(mg.myopic_attention, n_head=3)
    under_autocast = torch.autocast("cpu", torch.bfloat16)(attention)
    ways = [under_autocast, torch.compile(attention, backend="aot_eager")]
    ways += [partial(checkpoint, attention, use_reentrant=way) for way in (True, False)]
    true = attention_gradients(attention, attention_inputs())
    for way in ways:  # autocast leaves float64 alone
        assert_agree(attention_gradients(way, attention_inputs()), true, 1e-12)
    got = attention_gradients(under_autocast, attention_inputs(dtype=torch.float32))
    assert [t.dtype for t in got.values()] == [torch.bfloat16] + 3 * [torch.float32]
    assert_agree(got, true, 0.03)
    x, w, b, _ = attention_inputs(device="meta")  # shapes alone are enough
    assert attention(x, w, b).shape == x.shape


def test_no_second_derivatives_and_what_is_saved_is_small_and_freed():
    *leaves, dy = (t.requires_grad_() for t in attention_inputs(T=9))
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
    streams = torch.randn(5, 1, 2, 4, 3).double().requires_grad_().unbind()
    assert torch.autograd.gradcheck(mg.two_stream_attention, streams)

    # with its teacher's own weights it is myopic, if the teacher does not drop out
    teacher, myopic = make_gpt(dropout=0.5), make_gpt(horizon=0)
    local = mg.LocalMyopicGPT(replace(teacher.config, past="frozen", dropout=0), teacher).double()
    local.load_state_dict(teacher.state_dict(), strict=False)
    before, loss = local.train()(idx, targets)
    assert_agree(gradients(loss, local), gradients(myopic(idx, targets)[1], myopic))
    torch.nn.init.normal_(teacher.transformer.h[1].ln_1.weight)  # makes the past of block 1
    moved = ((local(idx)[0] - before).abs() > 1e-9).any(-1)  # (B, T)
    assert not moved[:, 0].any() and moved[:, 1:].all()


def test_generate_draws_by_temperature_among_the_best():
    torch.manual_seed(0)
    model = mg.GPT(mg.GPTConfig(4, 50304, 1, 1, 8)).half()
    idx = torch.randint(50304, (2, 6))
    logits = model(idx[:, -4:])[0][:, -1].float()
    for settings in (dict(top_k=1), dict(temperature=1e-6, top_k=2), dict(temperature=1e-6)):
        assert torch.equal(model.generate(idx, 1, **settings)[:, -1], logits.argmax(-1))
    torch.manual_seed(0)
    drawn = (logits / 0.1).softmax(-1).multinomial(1)
    torch.manual_seed(0)
    assert torch.equal(model.generate(idx, 1, temperature=0.1)[:, -1:], drawn)
    torch.nn.init.zeros_(model.lm_head.weight)  # all are equal: two of them are kept
    assert len({model.generate(idx, 1, top_k=2)[0, -1].item() for _ in range(40)}) == 2


def test_bad_values_are_refused_and_good_ones_combined():
    x, w, b, _ = attention_inputs()
    bad = [(x[0], w, b, 3), (x, w[:36], b, 3), (x, w, b[:9], 3), (x, w, b, 5), (x, w, b, 0)]
    for arguments in [*bad, (x, w, b, 3, 1.5), (x, w, b, 3, -1), (x, w, b, 3, 0, "k")]:
        pytest.raises(mg.UsageError, mg.myopic_attention, *arguments)
    model, (idx, _) = make_gpt(), batch(9)
    pytest.raises(mg.UsageError, model, idx)  # block_size is 8
    pytest.raises(mg.UsageError, model.generate, idx[:, :0], 1)
    for bad in (dict(temperature=0), dict(top_k=0)):
        pytest.raises(mg.UsageError, model.generate, idx, 1, **bad)
    of_config = [dict(horizon=True), dict(horizon=-1), dict(past="none")]
    of_text = [dict(muon="some"), dict(block_size=2.5), dict(n_head=5), dict(arm="horizon_1.5")]
    of_text += [dict(learning_rate=math.nan), dict(beta1=1), dict(seed=2**32)]
    of_sines = [dict(p=0), dict(p=1.5), dict(a=6), dict(block_size=6), dict(n_layer=1)]
    of_sines += [dict(arm="local_myopic"), dict(seed=9000), dict(b_hold=0.7)]
    refused = [(model.config, of_config), (mg.TextRun(), of_text), (SINES, of_sines)]
    for settings, changes in refused:
        for change in changes:
            pytest.raises(mg.UsageError, replace, settings, **change)
    words = "--preset demo --n_head 0 --n_embd 40 16 --p 1 1.0"
    _, runs = synthetic.flags(words.split())
    wanted = product(["vanilla", "myopic"], [2, 1])  # all combinations, each once
    assert [(run.arm, run.n_head) for run in runs] == list(wanted)
    for h in mg.HORIZONS:  # these are between myopic, 0, and vanilla, and nothing else
        assert mg.ARMS[f"horizon_{h}"] == mg.ARMS["myopic"] | {"horizon": h}


# ------------------------ text and training
@pytest.mark.parametrize("muon, clip", [("all", 0.001), ("attn", 0), ("none", 0.001)])
def test_training_is_torchs(monkeypatch, muon, clip):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)  # else torch's Muon takes it
    rates = dict(learning_rate=0.002, weight_decay=0.5, beta1=0.7, beta2=0.8, grad_clip=clip)
    rates |= dict(muon=muon, muon_rate=0.005, muon_decay=0.8, warmup=0.5, decay_from=0.5)
    ours, theirs, progress = make_gpt(), make_gpt(), Mock()
    run = mg.TextRun(max_iters=4, **rates)
    mg.train(ours, run, lambda step: batch(6), lambda done: None, progress)
    assert [c.args[0] for c in progress.call_args_list] == [4]  # steps since the last report

    of_muon, embeddings, others = [], [], []  # norms and biases, which do not decay
    for name, p in theirs.named_parameters():
        is_muons = dict(all=".h." in name, attn=".attn." in name, none=False)[muon]
        if p.dim() == 1:
            others.append(p)
        elif is_muons:
            of_muon.append(p)
        else:
            embeddings.append(p)
    groups = [dict(params=embeddings, weight_decay=0.5), dict(params=others, weight_decay=0)]
    adamw = torch.optim.AdamW(groups, betas=(0.7, 0.8))
    of_muon = [dict(params=of_muon)]
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
    assert_agree(ours.state_dict(), theirs.state_dict(), 1e-9)


def test_text_is_split_between_paragraphs_and_each_is_there_once(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("\ufeff" + "the cat, the dög.\n\n" * 200, encoding="utf-8")
    train, held_out = (part.decode() for part in mg.load_text([file]))
    assert train == "the cat, the dög.\n\n" * 180 + "the cat, the dög."
    assert held_out == "\n\nthe cat, the dög." * 19 + "\n\n"
    assert b"".join(mg.load_text([file, file])).count(b"cat") == 400
    train, held_out = (set(part.split(b"\n\n")) for part in mg.load_text([]))
    assert len(train) > 5000 and len(held_out) > 500 and train & held_out <= {b""}
    topics = sorted(mg.topics.values(), key=lambda text: hashlib.sha256(text.encode()).digest())
    text = mg.python_english()
    starts = [text.find(topic) for topic in topics if topic in text]  # else some of it came before
    assert len(starts) > 40 and starts == sorted(starts)


def test_numbers_are_of_the_right_text_and_seed(monkeypatch):
    monkeypatch.setattr(torch, "randint", Mock(wraps=torch.randint))
    text = b"d" * 40, "ßà".encode() + bytes(range(36))
    settings = dict(seed=3, block_size=3, n_layer=1, n_embd=12, max_iters=20, dropout=0.5)
    run = mg.TextRun(**settings, eval_windows=5000)
    monkeypatch.setattr(mg, "token_losses", Mock(wraps=mg.token_losses))
    model, numbers, arrays = mg.train_text(text, run, "cpu", Mock())
    assert {c.args[2] for c in mg.token_losses.call_args_list} == {64, 5000}  # windows
    assert torch.randint.call_args.kwargs["generator"].initial_seed() == 3  # of the batches
    held_out = torch.tensor(list(text[1])).unfold(0, 4, 1)  # (37, T + 1)
    spaced = held_out[torch.linspace(0, 36, 5000, dtype=torch.float64).long()]  # in parts
    y = spaced[:, 1:]
    true = F.cross_entropy(model(spaced[:, :-1])[0].mT, y, reduction="none").detach()  # (5000, T)
    assert np.allclose(arrays["losses"], true[:64]) and np.array_equal(arrays["y"], y[:64])
    assert numbers["loss_by_position"] == pytest.approx(true.mean(0).tolist())
    step, train_loss, val_loss = numbers["curve"][-1]
    assert step == 20 and train_loss == numbers["train_loss"] < 3
    assert val_loss == numbers["val_loss"] == pytest.approx(true.mean().item())
    assert numbers["sample"].startswith("ßà")
    torch.manual_seed(3)
    for when, measured in (("start", mg.GPT(model.config)), ("end", model)):
        shares = mg.lag_shares(measured, held_out[::2, :-1], held_out[::2, 1:])
        assert numbers["lag_share"][when] == shares


def test_without_a_past_all_arms_come_to_the_same():
    text, trained = (bytes(range(250)), bytes(250)), {}
    for arm in (*mg.FOUR_ARMS, "local_myopic"):
        run = mg.TextRun(arm=arm, block_size=1, n_layer=2, n_embd=12, max_iters=3)
        model, _, _ = mg.train_text(text, run, "cpu", Mock())
        trained[arm] = model.transformer.state_dict()  # of the same start and batches
        assert_agree(trained[arm], trained["vanilla"], 1e-5)
    assert model.teacher.config == replace(run, arm="vanilla").config(256)
    assert_agree(model.teacher.transformer.state_dict(), trained["vanilla"], 0)


@pytest.mark.parametrize("script", [mg, synthetic])
def test_every_setting_acts(script):
    small = dict(seed=2, block_size=8, n_layer=2, n_head=2, n_embd=12, batch_size=2, max_iters=4)
    small |= dict(dropout=0.1, beta1=0.5, beta2=0.5, warmup=0.6, grad_clip=0.01)
    if script is mg:
        train = partial(mg.train_text, (bytes(range(99)), bytes(range(99))))
        run = mg.TextRun(**small, eval_windows=2)
    else:
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
    Path("text").write_text("a line of a small text;\n" * 80)
    Path("short").write_text("short")
    Path("latin").write_bytes(b"d\xe9j\xe0 vu " * 100)


def call(words, out="out/demo"):
    """Run the command -> {name: record} of all that the folder then holds, but for the seconds."""
    mg.main(f"{TINY[mg]} {words} --out_dir {out}".split())
    found = mg.read_runs(out, mg.TextRun)
    return {name: vars(run) | dict(seconds=0, npz=None) for name, run in found.items()}


def test_runs_are_trained_once_and_alike_for_any_jobs(folder, monkeypatch, capsys):
    monkeypatch.setattr(mg, "train", Mock(wraps=mg.train))
    monkeypatch.setattr(mg, "report", Mock())
    arms = "--arm vanilla horizon_1 bigram local_myopic"
    torch.set_num_threads(2)  # a run takes one all the same
    torch.set_float32_matmul_precision("medium")
    records = call(arms)
    assert torch.get_num_threads() == 2 and torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)
    assert len({record["n_params"] for record in records.values()}) == 1  # the teacher is no part
    assert call(arms) == records and mg.train.call_count == 5  # a teacher is the fifth
    assert call(f"{arms} --jobs 2", "two") == records  # in other processes: not counted
    out = capsys.readouterr().out
    assert "text: 1,728 bytes to train on, 192 held out" in out and "other code" not in out
    (path,) = Path("out/demo/runs").glob("text-bigram*.json")
    path.write_text(path.read_text().replace(mg.TextRun.code, "another1"))
    call("--arm vanilla bigram")
    out = capsys.readouterr().out
    assert "2 of 2 runs are recorded" in out and "made by other code" in out
    assert call("--arm vanilla bigram --fresh") == records and mg.train.call_count == 7

    vanilla, bigram = mg.report.call_args[0][0]  # the runs asked for, in that order
    text = Path("text").read_bytes()
    digest = hashlib.sha256(b"%d " % (len(text) * 9 // 10) + text).hexdigest()
    assert (vanilla.arm, bigram.arm, vanilla.data_sha256) == ("vanilla", "bigram", digest)
    sources = b"".join(Path(script.__file__).read_bytes() for script in (mg, synthetic))
    assert synthetic.SineRun.code == hashlib.sha256(sources).hexdigest()[:8]


def test_old_arrays_and_figures_do_not_stay(folder, capsys, monkeypatch):
    sys.stdout.reconfigure(encoding="ascii")  # a console that lacks letters
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # a user's, takes latex
    monkeypatch.setattr(mg, "tqdm", partial(mg.tqdm, disable=True))  # TQDM_DISABLE=1
    call("--seed 2 3 --arm vanilla myopic")
    figure = Path("out/demo/text_gaps.png")
    assert figure.exists()
    records = call("--seed 3 2 --arm vanilla --warmup 0.05 0.5 --fresh")
    assert not figure.exists()
    kept = [path.stem[:-9] for path in sorted(Path("out/demo").glob("*/*.npz"))]
    assert kept == ["text-myopic-seed2", *2 * ["text-vanilla-seed3"]]  # of the first seeds alone
    assert call("--seed 3 --arm bigram myopic --plot_only") == records  # nothing is trained
    assert not list(Path("out/demo").glob("*.png"))
    out, err = capsys.readouterr()
    trained = re.findall(r"(\w+), seed (\d)", out)
    assert trained[:3] == [("vanilla", "2"), ("myopic", "2"), ("vanilla", "3")]
    assert "2x8, warmup 0.5: no text_gaps.png: it takes" in " ".join(out.split()) and err == ""


def test_files_are_whole_and_count_under_their_own_name(folder, monkeypatch):
    Path("out/figure").mkdir(parents=True)
    for path in ("out/figure", "out/none/figure"):  # it is a folder; in none
        pytest.raises(mg.UsageError, mg.write_whole, Path(path), Path.touch)
    assert [path.name for path in Path("out").iterdir()] == ["figure"]
    monkeypatch.setattr(mg, "time", Mock(time=count(0, 90).__next__))
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
    (mg, "--jobs 0", "jobs is 0"),
    (mg, "--data latin", "latin"),
    (mg, "--data short", "block_size is 8"),
    (mg, "--out_dir short", "short"),
    (mg, "--plot_only", "none of these runs"),
    (mg, "--max_iters 1 --learning_rate 1e30", "--learning_rate"),
    (mg, "--arm vanilla myopic --learning_rate 1e30 --jobs 2", "seed 0: loss nan at step 4"),
    (synthetic, "--p 0.01 --a 1 --eval_sequences 64 --block_size 6", "p is 0.01"),
]


@pytest.mark.parametrize("script, words, said", BAD)
def test_bad_input_is_one_line_and_status_2(folder, capsys, script, words, said):
    with pytest.raises(SystemExit) as stop:
        script.main(f"{TINY[script]} {words}".split())
    error = capsys.readouterr().err.partition("error: ")[2].strip()
    assert stop.value.code == 2 and said in error and "\n" not in error


@pytest.mark.skipif(os.name == "nt", reason="no process groups")
@pytest.mark.parametrize("script, number", [(mg, 2), (synthetic, 9)])  # Ctrl-C, kill -9
def test_interrupted_or_killed_no_process_is_left(folder, monkeypatch, script, number):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # a script's folder is not looked into then
    words = f"{TINY[script]} --max_iters 9999999 --jobs 2 --arm vanilla myopic"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    # a test run in the background would hand down a Ctrl-C that is ignored
    pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command, said = [sys.executable, script.__file__, *words.split()], b""
    process = subprocess.Popen(command, **pipes)
    while b"vanilla, seed 0: loss" not in said and process.poll() is None:
        said += process.stderr.read1()
    kill = os.killpg if number == signal.SIGINT else os.kill  # a terminal tells the whole group
    kill(process.pid, number)
    _, said = process.communicate(timeout=20)  # the pipes end with the last process
    assert process.returncode in (130, -signal.SIGKILL) and b"Traceback" not in said


def test_a_killed_worker_is_one_line_a_bug_a_traceback(folder, monkeypatch):
    def kill(*progress):
        for worker in mg.multiprocessing.active_children():
            worker.kill()

    pipe = Mock(recv=Mock(side_effect=ConnectionResetError))  # a killed parent is no error
    mg.work(None, None, pipe)
    monkeypatch.setattr(mg.tqdm, "update", kill)
    with pytest.raises(SystemExit, match="smaller --jobs"):
        call("--arm vanilla myopic --max_iters 40 --jobs 2")
    monkeypatch.setattr(mg, "load_text", Mock(side_effect=ValueError("a bug")))
    pytest.raises(ValueError, call, "")


# ------------------------ tables and figures say what the records say
def test_shares_steps_and_letters_of_a_table(capsys):
    arms = "vanilla", "myopic", "bigram"
    runs = [mg.TextRun(*pair) for pair in product(arms, (0, 1))]
    for run, loss in zip(runs, (1, 2, 1.5, 3, 1.05, 9)):
        run.val_loss = loss
        run.curve = [[2, 8, 2 * loss], [3, 8, 9], [4, 8, loss]]  # step, training, validation
    assert mg.shares_of_bigram(runs, "bigram") == [100]  # seed 0's gap of bigram is noise
    # vanilla's best so far, after 50, 75, 100 % of the steps: 2, 2, 1 of seed 0 and 4, 4, 2 of 1
    assert mg.steps_needed(runs, "myopic") == pytest.approx([87.5, 87.5])
    runs[3].val_loss = 1.9  # below what seed 1's vanilla comes to
    assert mg.steps_needed(runs, "myopic") == []
    assert len(mg.comparisons([run, replace(run, data_sha256="another text")])) == 2
    mg.print_table("title", ["name"], [["[red]:smile:" + 200 * "@"]])
    out = capsys.readouterr().out
    assert "[red]:smile:" in out and out.count("@") == 200  # letters as they are, none cut
    assert len(set(mg.LOOKS.values())) == len(mg.LOOKS) == len(mg.ARMS) + 1  # and "untrained"


def recorded(folder, script):
    """The finished runs in a folder of results, their arms in the order of ARMS."""
    run_class = mg.TextRun if script is mg else synthetic.SineRun
    runs = mg.read_runs(ROOT / "results" / folder, run_class).values()
    return sorted(runs, key=lambda run: list(mg.ARMS).index(run.arm))


REPORTS = [
    ("demo", mg, "2x32", "2x32: myopic training loses 47.9 %"),
    ("demo", synthetic, "p 1, 2x32", "vanilla 0.09, myopic 1.00."),
    ("quick", mg, "3x96", "3x96: myopic training loses 7.4 ± 0.5 %"),
    ("quick", synthetic, "p 1, 2x64", "vanilla 0.08, myopic 1.00, myopic_kv 1.00."),
    ("full", mg, "3x128", "3x128: myopic training loses 4.7 ± 0.3 %"),
    ("full", synthetic, "p 1, 2x128, max_iters 6000", "vanilla 0.02, myopic 1.00."),
]


@pytest.mark.parametrize("preset, script, largest, result", REPORTS)
def test_reports_say_what_the_readmes_do(monkeypatch, capsys, preset, script, largest, result):
    monkeypatch.setattr(mg, "draw", Mock())
    runs = recorded(preset, script)
    for run in runs:
        run.sample = f"{run.arm}\x1b\x9b\r"
    script.report(runs, ROOT)
    out = " ".join(capsys.readouterr().out.split())
    assert f"figures of {largest}:" in out and result in out and "\x1b" not in out
    arms = {run.arm for run in runs if script is mg}
    assert all(f"{arm} writes: {arm} " in out for arm in arms)
    for row in script.table_rows(runs):  # of the sines, in two tables
        tables = [row] if script is mg else [row[:-3], row[:4] + row[-3:]]
        assert all(" ".join(table) in out for table in tables)
        assert f"| {' | '.join(row)} |" in TABLES
    _, wanted = script.flags(["--preset", preset, "--arm", "vanilla", "myopic"])
    for run in wanted:
        run.data_sha256 = getattr(runs[0], "data_sha256", "")  # of English
    assert {run.name() for run in wanted} <= {run.name() for run in runs}


DRAWN_BY = Image.open(ROOT / "results" / "quick" / "precache.png").info["Software"]


@pytest.mark.skipif(matplotlib.__version__ not in DRAWN_BY, reason=f"{DRAWN_BY} drew the results")
@pytest.mark.parametrize("folder, script", [("full", mg), ("quick", synthetic)])
def test_figures_are_those_of_the_results(tmp_path, folder, script):
    script.report(recorded(folder, script), tmp_path)
    drawn, results = list(tmp_path.iterdir()), ROOT / "results" / folder
    assert len(drawn) == (3 if script is mg else 6)
    for path in drawn:
        files = Image.open(path), Image.open(results / path.name)
        for frame, true in zip(*map(ImageSequence.all_frames, files), strict=True):
            assert np.allclose(frame.convert("RGB"), true.convert("RGB"), atol=8), path.name


def test_figures_that_lack_arrays_are_named(tmp_path, monkeypatch, capsys):
    vanilla, myopic = recorded("demo", synthetic)
    vanilla.npz = myopic.npz = ROOT  # is there, but holds no arrays
    myopic.seed = 1
    monkeypatch.setattr(mg, "train_missing", Mock(return_value=[vanilla, myopic]))
    monkeypatch.setattr(mg, "save_figure", Mock(wraps=mg.save_figure))
    monkeypatch.setattr(Path, "unlink", Mock(side_effect=OSError))  # the folder is read-only
    synthetic.main(["--out_dir", str(tmp_path)])
    missing = re.findall(r"no \w+(\S+): it takes (\S+ \S+)", capsys.readouterr().out)
    assert missing == [(".png", "the arrays"), (".png", "what is"), (".gif", "the arrays")]
    captions = [c.args[2].split("; ")[-1] for c in mg.save_figure.call_args_list]
    assert captions[2] == "one seed"  # of vanilla alone, the arm whose shares are drawn


# ------------------------ the sine task
def test_the_task_is_the_papers():
    a, b, T = 3, 4.0, 9
    xs, ys = synthetic.sample_batch(5, T, 0.5, a, b, torch.Generator().manual_seed(0))
    for s, n in product(range(5), range(T)):
        x, z = xs[s, :, 0].double(), xs[s, n, 1].item()
        past = sum(math.sin(b * x[n - i]) for i in range(1, a + 1) if n - i >= 0)
        assert z in (0, 1) and abs(ys[s, n].item() - (z * past + (1 - z) * x[n].item())) < 1e-5

    x, y = synthetic.sample_batch(4000, 64, 0.3, generator=torch.Generator().manual_seed(1))
    assert abs(x[..., 1].mean() - 0.3) < 0.01 and abs(x[..., 0].std() - 1) < 0.01
    trivial = Mock(side_effect=lambda x: ((1 - x[..., 1]) * x[..., 0], None))
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
    parts = [c.args[0] for c in model.hidden_states.call_args_list]
    x, other = torch.cat(parts[::2]), torch.cat(parts[1::2])
    changed = x != other  # (B, T, 2): one x of each sequence is drawn anew
    assert changed[..., 0].sum(1).eq(1).all() and not changed[..., 1].any()
    assert other[changed].std().item() == pytest.approx(1, abs=0.1)
    assert [synthetic.lookbacks(T) for T in (12, 32, 64)] == [6, 16, 16]


def test_sines_are_of_the_right_draws(monkeypatch):
    monkeypatch.setattr(synthetic, "sample_batch", Mock(wraps=synthetic.sample_batch))
    settings = dict(p=0.5, seed=7, eval_sequences=2100, x_wide=1.5, dropout=0.5)
    run = replace(SINES, max_iters=10, **settings)
    model, numbers, arrays = synthetic.train_sine(run, "cpu", Mock())
    drawn = set()  # seed, b, p, and in training the standard deviation of x
    for c in synthetic.sample_batch.call_args_list:
        _, _, p, _, b, generator, *x_std = c.args
        drawn.add((generator.initial_seed(), b, p, *x_std))
    lessons = [synthetic.curriculum(run, step) for step in range(11)]  # (b, p, x_std)
    assert lessons[1] == (2.0, 1.0, 1.5) and lessons[9] == lessons[10] == (4.0, 0.5, 1.0)
    assert lessons[4] == pytest.approx((3.0, 0.5 ** (1 / 3), 1.5))  # b halfway there, log p a third
    wanted = {(10003, 4.0, 0.5)}  # patch
    wanted |= {(1007, *lesson) for lesson in lessons[:10]}  # TRAINING + the run's seed
    wanted |= {(10000, b, p) for b, p, _ in lessons}  # losses
    for seed in (10001, 10002):  # probe, as the frames of the film
        wanted |= {(seed, b, p) for b, p, _ in lessons[::2]}
    assert drawn == wanted
    assert arrays["film_steps"].tolist() == [0, 2, 4, 6, 8, 10]
    part = synthetic.sample_task(run, 512, synthetic.EVALUATION)
    assert numbers["curve"][-1] == [10, synthetic.huber_losses(model, *part, 0.5)["ratio"]]
    untrained = synthetic.make_model(run)
    for name, probed in (("probe_r2", model), ("probe_r2_untrained", untrained)):
        assert numbers[name] == synthetic.probe_model(probed, run, 2048, "cpu")[0]
    _, x, estimate = synthetic.probe_model(model, run, 256, "cpu")
    assert np.allclose(arrays["film"][-1], [x[:300], estimate[:300]], atol=1e-5)
    x, y = synthetic.sample_task(run, 2100, synthetic.EVALUATION)
    for when, measured in (("start", untrained), ("end", model)):
        assert numbers["lag_share"][when] == mg.lag_shares(measured, x[:128], y[:128])
    loss = model.position_losses(model.hidden_states(x)[-1], y).mean().item()
    assert loss / run.p == pytest.approx(numbers["huber_over_p"], rel=1e-4)


def test_a_sine_model_starts_by_its_seed_with_positions_as_waves():
    run = replace(SINES, seed=3, n_embd=128, block_size=64, wave_std=0.3, embd_std=0.2)
    model = synthetic.make_model(replace(run, arm="myopic"))
    torch.manual_seed(3)
    assert_agree(model.state_dict(), synthetic.SineModel(run).state_dict(), 0)
    assert model.read_in.weight.std().item() == pytest.approx(0.2, rel=0.15)
    waves = model.transformer.wpe.weight
    assert waves.square().mean().item() == pytest.approx(0.3**2, rel=0.1)
    assert waves[0, ::2].abs().max() < 1e-6 < waves[0, 1::2].min()  # sines, cosines
    angle = waves[1, 64].item() / (0.3 * math.sqrt(2))
    assert math.asin(angle) == pytest.approx(1 / 8)  # 64 ** (-64 / 128)


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
            dw = gradients(model(*xy)[1], model)[f"transformer.h.{layer}.attn.c_attn.weight"]
            up_to.append(dw[12:].unflatten(0, (2, 12)))
        block.attn.config = model.config
        parts = torch.stack(up_to).diff(dim=0)  # (lags, 2, C, C)
        true = (parts * up_to[-1]).sum((2, 3)) / up_to[-1].square().sum((1, 2))  # (lags, 2)
        assert np.allclose(shares[layer], true.T, atol=1e-4)
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


# ------------------------ run_all.sh and README
@pytest.mark.skipif(os.name == "nt", reason="no bash")
def test_run_all_installs_into_venv_whatever_pip_is_told(tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python3", "python", ".venv/bin/python"):  # without packages
        fake = tmp_path / name
        fake.write_text('#!/bin/sh\necho $0 $* user=$PIP_USER target=$PIP_TARGET\n[ "$*" != - ]\n')
        fake.chmod(0o755)
    (tmp_path / "run_all.sh").write_bytes((ROOT / "run_all.sh").read_bytes())
    env = dict(PATH=f"{tmp_path}:/usr/bin:/bin", PIP_USER="1", PIP_TARGET="elsewhere")
    bash = ["bash", str(tmp_path / "run_all.sh"), "--seed", "3"]
    said = subprocess.run(bash, env=env, capture_output=True, text=True).stdout
    assert f"{tmp_path}/python3 -m venv .venv" in said
    assert re.search(f"{fake} -m pip install .* user=0 target=$", said, re.M)
    assert f"{fake} {tmp_path}/myopic_gpt.py --preset demo --seed 3 " in said


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


def test_examples_print_what_the_readmes_show(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    block = r"^( *)```python\n(?! *# a fragment)(.*?)```(?:\s+```\n(.*?)^ *```)?"
    examples = re.findall(block, README, re.S | re.M)
    assert len(examples) == 6
    for indent, code, printed in examples:
        exec(textwrap.dedent(code), {})
        assert textwrap.indent(capsys.readouterr().out, indent) == printed
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


def test_means_in_the_readme_are_those_of_the_results(monkeypatch):
    monkeypatch.setattr(mg, "save_figure", Mock())
    sines = [run for run in recorded("full", synthetic) if run.p == 1]
    for runs, last in ((recorded("quick", mg), 64), (sines, 10)):
        mg.plot_lags(None, runs, "", last)
    titles = [c.args[1].get_suptitle() for c in mg.save_figure.call_args_list]
    assert "(97 % if all" in titles[0] and "(28 % if all" in titles[1]
    for mean in re.findall(r"[\d.]+ ± [\d.]*\d", README):
        assert mean in f"{TABLES} {titles}"
    for row in synthetic.table_rows(recorded("earlier", synthetic)):
        assert row[3] == "1" or f"| {' | '.join(row)} |" in TABLES  # one seed: the ablation
    shown = [line for line in README.splitlines() if line.startswith("|") and "±" in line]
    assert len(shown) > 3 and set(shown) <= set(TABLES.splitlines())
