"""The tests: offline, on the CPU and whatever accelerator is present.   python -m pytest -q
The hand-written backward is held against the definition executed literally: literal_gradient."""

import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import myopic_gpt as mg
import synthetic

torch.set_num_threads(1)  # the tensors here are tiny: more threads would only wait for each other
TYPES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}  # and their tolerance
DEVICES = list(itertools.product(["cpu"], TYPES))
DEVICES += [(d, torch.float32) for d in ("cuda", "mps") if getattr(torch, d).is_available()]
DEVICES += [("cuda", torch.bfloat16)] * torch.cuda.is_available()


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
    model = mg.GPT(mg.GPTConfig(**settings), teacher).to(dtype)
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
def literal_gradient(model, idx, targets, which, owner, frozen=None):
    """The gradient of the mean loss by the definition: every position has its copy of all weights.

    which: "all" sums d loss_i / d theta_j over every i, j; "diagonal" over i = j only. owner: whose
    copy of W_K, W_V makes the key of writer j for reader i: the "reader"'s or the "writer"'s.
    frozen: per layer (B, T, C), what the past's ln_1 gave. Only the model's weights are used."""
    c, T, theta = model.config, idx.size(1), {}  # theta: (T, *shape), a copy per position
    for name, p in trained(model).items():
        copies = p.detach().expand(T, *p.shape).clone().requires_grad_()
        theta[name.removeprefix("transformer.")] = copies

    def norm(x, name):
        return F.layer_norm(x, (c.n_embd,)) * theta[name + ".weight"] + theta.get(name + ".bias", 0)

    def linear(x, name, axes="btc,tdc->btd"):
        bias = theta.get(name + ".bias", torch.zeros(T, 1))  # (T, d)
        y = torch.einsum(axes, x, theta[name + ".weight"])
        return y + (bias[:, None] if axes == "bijc,idc->bijd" else bias)

    place = torch.arange(T)
    x = theta["wte.weight"][place, idx] + theta["wpe.weight"][place, place]  # (B, T, C)
    for h in (f"h.{layer}." for layer in range(c.n_layer)):
        own = norm(x, h + "ln_1")
        past = own if frozen is None else frozen[int(h[2])]
        read = torch.where(place[:, None, None] == place[:, None], own[:, None], past[:, None])
        axes = "bijc,idc->bijd" if owner == "reader" else "bijc,jdc->bijd"  # reader i, writer j
        q, k, v = linear(read, h + "attn.c_attn", axes).unflatten(-1, (3, c.n_head, -1)).unbind(3)
        score = torch.einsum("biihd,bijhd->bijh", q, k) / math.sqrt(q.size(-1))
        future = (place > place[:, None])[..., None]  # (i, j, 1)
        weight = score.masked_fill(future, -math.inf).softmax(2)
        mixed = torch.einsum("bijh,bijhd->bihd", weight, v).flatten(2)  # (B, T, C)
        x = x + linear(mixed, h + "attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc")), h + "mlp.c_proj")
    logits = torch.einsum("btc,tvc->bvt", norm(x, "ln_f"), theta["wte.weight"])
    losses = F.cross_entropy(logits, targets, reduction="none").mean(0) / T  # (T,)
    total = {n: torch.zeros_like(p) for n, p in trained(model).items()}
    for i in range(T):
        grads = torch.autograd.grad(losses[i], list(theta.values()), retain_graph=True)
        for name, g in zip(total, grads):
            total[name] += g.sum(0) if which == "all" else g[i]
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
    if n_head == 1:
        model.compile(backend="aot_eager", fullgraph=True)
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
    q, k, v = mg.split_heads(F.linear(x, w, b), n_head)
    k_past, v_past = k.detach(), v.detach()
    if cut == "hidden":
        _, k_past, v_past = mg.split_heads(F.linear(x.detach(), w, b), n_head)
    place = torch.arange(x.size(1))
    lag = place[:, None] - place  # (T, T)
    is_near = lag <= (x.size(1) if horizon is None else horizon)
    S = torch.where(is_near, q @ k.mT, q @ k_past.mT) / math.sqrt(q.size(-1))
    A = S.masked_fill(lag < 0, -math.inf).softmax(-1)
    return mg.merge_heads((A * is_near) @ v + (A * ~is_near) @ v_past)


CUTS = [(None, "hidden"), (0, "hidden"), (0, "kv"), (1, "kv"), (2, "hidden"), (40, "kv")]


@pytest.mark.parametrize("device, dtype", DEVICES)
@pytest.mark.parametrize("T", [1, 33, 64])
@pytest.mark.parametrize("horizon, cut", CUTS)
def test_attention_is_its_oracle(monkeypatch, device, dtype, T, horizon, cut):
    leaves, dy = attention_inputs(T, T != 33, dtype, device)
    exact = [None if t is None else t.detach().cpu().double().requires_grad_() for t in leaves]
    true = attention_gradients(oracle, exact, dy.cpu().double(), 3, horizon, cut)
    for name in ["fused_backward"] * mg.try_fused(device, dtype, 8) + ["plain_backward"]:
        monkeypatch.setattr(mg, name, Mock(wraps=getattr(mg, name)))
        got = attention_gradients(mg.myopic_attention, leaves, dy, 3, horizon, cut)
        assert_agree(got, true, TYPES[dtype])
        assert getattr(mg, name).call_count == 1
        monkeypatch.setattr(mg, "try_fused", Mock(return_value=False))


WRONG = [
    ("fused_forward", Mock(side_effect=RuntimeError("No available kernel"))),
    ("fused_forward", lambda *t: [mg.plain_forward(*t)[0], mg.plain_forward(*t)[1] + 0.01]),
    ("fused_backward", lambda *t: [d * c for d, c in zip(mg.plain_backward(*t), (0.9, 0.9, 1))]),
]


@pytest.mark.parametrize("name, kernel", WRONG)
def test_plain_serves_if_fused_fails(monkeypatch, capsys, name, kernel):
    assert all(mg.try_fused(device, dtype, 8) for device, dtype in DEVICES if device != "mps")
    monkeypatch.setattr(mg, name, kernel)
    monkeypatch.setattr(mg, "try_fused", functools.cache(mg.try_fused.__wrapped__))  # as if new
    inputs = attention_inputs(5)
    got = [attention_gradients(mg.myopic_attention, *inputs, 3) for _ in range(2)]
    assert_agree(got[1], attention_gradients(oracle, *inputs, 3, 0, "hidden"))
    assert capsys.readouterr().out.count("plain products serve") == 1


def test_kernels_on_cuda_are_called_as_their_signatures_say():
    q = torch.empty(2, 2, 33, 8, device="meta")  # computes nothing, checks arguments
    grads = mg.fused_backward(q, q, q, q, *mg.fused_forward(q, q, q))
    assert [t.shape for t in grads] == [q.shape] * 3


def test_plain_products_upcast_before_they_multiply():
    *low, G = torch.randn(4, 2, 3, 16, 8).bfloat16()
    out, lse = mg.plain_forward(*low)
    wide = [t.float() for t in (G, *low, out)]
    true = [*mg.plain_forward(*wide[1:4]), *mg.plain_backward(*wide, lse)]
    got = [out, lse, *mg.plain_backward(G, *low, out, lse)]
    assert all(torch.equal(g, t.to(g.dtype)) for g, t in zip(got, true))


def test_nothing_is_mutated_copied_or_differentiated_twice():
    leaves, dy = attention_inputs(9)
    y = mg.myopic_attention(*leaves, 3)
    assert all(t.shape.count(9) < 2 for t in y.grad_fn.saved_tensors)  # no (T, T) matrix is kept
    tensors = [*y.grad_fn.saved_tensors, *leaves, dy]
    copies = [t.detach().clone() for t in tensors]
    torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies))
    out, _ = mg.fused_forward(*mg.split_heads(tensors[2], 3))
    assert mg.merge_heads(out).data_ptr() == out.data_ptr()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), leaves, create_graph=True)


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
    q, k, v = (t.view(2, 6, 3, 4).transpose(1, 2) for t in c_attn(x).split(12, dim=2))
    usual = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    myopic = mg.myopic_attention(x, c_attn.weight, c_attn.bias, 3)
    assert relative_error(myopic, usual) < 1e-12
    for y, writers in ((usual, 5), (myopic, 1)):
        (dx,) = torch.autograd.grad(y[:, 4].sum(), x)
        assert (dx.norm(dim=(0, 2)) > 0).sum() == writers


def test_bigram_and_local_myopic():
    teacher, (idx, targets), other = make_gpt(), batch(6), batch(6)[0]
    other[:, :4] = (idx[:, :4] + 1) % 11
    bigram = make_gpt(**mg.ARMS["bigram"])
    assert torch.equal(bigram(idx)[0][:, 4:], bigram(other)[0][:, 4:])
    assert torch.equal(bigram.generate(idx, 4, top_k=1), bigram.generate(idx, 4, temperature=1e-9))
    local = make_gpt(teacher=teacher, **mg.ARMS["local_myopic"])
    states, before = teacher.hidden_states(idx), local(idx)[0][:, 4:]
    frozen = [block.ln_1(x) for block, x in zip(teacher.transformer.h, states)]
    true = literal_gradient(local, idx, targets, "all", "reader", frozen)
    assert_agree(gradients(local, idx, targets), true)
    assert relative_error(local(other)[0][:, 4:], before) > 0.01
    teacher.hidden_states = Mock(return_value=states)
    assert torch.equal(local(other)[0][:, 4:], before)  # the past is seen through the teacher alone


# ------------------------ training and text
@pytest.mark.parametrize("muon, n", [("", 4), (".h.", 4), ("attn", 2), ("none", 0)])
def test_every_parameter_has_one_optimizer_and_one_decay(muon, n):
    model = make_gpt(n_layer=1, past="frozen", teacher=make_gpt())
    found, names = [], {id(p): n for n, p in model.named_parameters()}
    for optimizer in model.configure_optimizers(mg.Run(muon=muon, muon_decay=0.3)):
        for group in optimizer.param_groups:
            found += [(names[id(p)], group["weight_decay"]) for p in group["params"]]
    true = {name: 0.1 * (p.dim() > 1) for name, p in trained(model).items()}  # AdamW
    matrices = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    true |= {f"transformer.h.0.{matrix}.weight": 0.3 for matrix in matrices[:n]}  # Muon
    assert dict(found) == true and len(found) == len(true)


def test_rates_and_start_values():
    run = mg.Run(max_iters=4, warmup=0.5, decay_from=0.5, learning_rate=0.2, muon_rate=0.4)
    model, seen = make_gpt(torch.float32), []
    optimizers = model.configure_optimizers(run)

    def after_step(step):
        assert model.training
        model.eval()
        seen.extend(group["lr"] for part in optimizers for group in part.param_groups)

    mg.train(model, optimizers, lambda step: batch(6), run, Mock(), after_step)
    assert seen == pytest.approx([0.1, 0.1, 0.2] + 2 * [0.2, 0.2, 0.4] + [0.1, 0.1, 0.2])
    for name, p in mg.GPT(mg.GPTConfig(64, 200, 8, 2, 128)).named_parameters():
        std = 0.005 if name.endswith("c_proj.weight") else 0.02 * (p.dim() == 2)
        assert p.std().item() == pytest.approx(std, rel=0.1), name
        assert p.dim() == 2 or p[0] == (not name.endswith("bias")), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_learns_and_stops_at_a_loss_that_is_not_finite(monkeypatch, dtype):
    model, run = mg.GPT(mg.GPTConfig(8, 11, 2, 2, 16, horizon=0)), mg.Run(max_iters=30, dtype=dtype)
    x, y = torch.arange(8).repeat(4, 1), torch.arange(1, 9).repeat(4, 1)
    optimizers, before = model.configure_optimizers(run), model(x, y)[1].item()
    monkeypatch.setattr(mg, "kernels", Mock(wraps=mg.kernels))
    mg.train(model, optimizers, lambda step: (x, y), run, Mock())
    assert mg.kernels.call_args[0][0].dtype == getattr(torch, dtype)
    assert model(x, y)[1].item() < 0.5 * before
    torch.nn.init.constant_(model.lm_head.weight, math.inf)
    with pytest.raises(mg.UsageError, match="loss is nan at step 10 .*--learning_rate"):
        mg.train(model, optimizers, lambda step: (x, y), run, Mock())


def test_text_is_split_and_evaluated_without_dropout(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("the cat, the dog. " * 18 + "the emu, the cät.", encoding="utf-8")
    words = mg.TextRun(tokens="word", vocab_size=5, block_size=8)
    train, held_out, vocabulary = mg.load_text([file, file], words)
    assert vocabulary[:2] == ["<unk>", "the"] and len(vocabulary) == 5
    assert held_out[[0, -1]].tolist() == [0, 3] and (train == 1).sum() == 68
    default = (bytes(part.tolist()) for part in mg.load_text([], mg.TextRun())[:2])
    train, held_out = (set(part.split(b"\n\n")) - {b""} for part in default)  # paragraphs
    assert len(train) > 5000 and len(held_out) > 500 and train.isdisjoint(held_out)
    model, run = make_gpt(dropout=0.5).train(), mg.TextRun(block_size=8, eval_windows=5)
    rows = torch.arange(100).remainder(11).unfold(0, 9, 1)
    (first, y), (second, _) = (mg.token_losses(model, rows, run) for _ in "ab")
    assert torch.equal(first, second) and first.shape == (5, 8)
    assert y[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and y[-1, -1] == 99 % 11


# ------------------------ records
WRITER = f"""
import json, os, pathlib, sys
{inspect.getsource(mg.append_record)}
for _ in range(int(sys.argv[3])):
    append_record(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))
"""


def test_racing_and_killed_writers(tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    records = [json.dumps(asdict(mg.Run(seed=n)) | dict(filler="x" * 9999)) for n in range(6)]
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, record, "40"]) for record in records[:4]]
    assert [process.wait(60) for process in writers] == [0] * 4
    assert [path.read_text().splitlines().count(record) for record in records[:4]] == [40] * 4
    process, size = subprocess.Popen([*command, records[4], "99999"]), path.stat().st_size
    while path.stat().st_size < size + 10**6:
        time.sleep(0.01)
    process.kill()
    process.wait()
    path.write_bytes(path.read_bytes() + b'{"half": ')
    mg.append_record(path, json.loads(records[5]))
    mg.append_record(path, asdict(mg.Run()))
    found = mg.read_records(path, mg.Run)
    assert sorted(run.seed for run in found) == list(range(6))
    assert "filler" not in found[mg.Run()]  # the last line counts
    assert 1 <= capsys.readouterr().out.count("is skipped") <= 2


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
    """Run the command -> its records so far, by all but what the clock says."""
    mg.main(tiny(tmp_path, f"{words} --out_dir {out}"))
    lines = (tmp_path / out / "text.jsonl").read_bytes().splitlines()
    return [json.loads(line) | dict(seconds=0) for line in lines]


def test_arms_share_start_and_batches_and_jobs_change_nothing(tmp_path, monkeypatch):
    seen, train = [], mg.train

    def spy(model, optimizers, next_batch, run, tell, after_step):
        seen.append({n: p.clone() for n, p in trained(model).items()})

        def recorded(step):
            x, y = next_batch(step)
            seen[-1] |= {(step, "x"): x, (step, "y"): y}
            return x, y

        train(model, optimizers, recorded, run, tell, after_step)
        ends.append(trained(model))

    ends, arms = [], ["vanilla", "horizon_1", "bigram", "local_myopic"]
    monkeypatch.setattr(mg, "train", spy)
    records = call(tmp_path, "--arms " + " ".join(arms))
    assert [r["arm"] for r in records] == arms and len({r["val_loss"] for r in records}) == 4
    for start_and_batches in seen:
        assert_agree(start_and_batches, seen[0], 0)
    assert_agree(ends[3], ends[0], 0)  # local_myopic trains its teacher first: vanilla
    assert call(tmp_path, "--arms " + " ".join(arms)) == records and len(seen) == 5
    assert call(tmp_path, "--arms bigram --fresh") == [*records, records[2]]
    parallel = call(tmp_path, f"--arms {' '.join(arms)} --jobs 2", "TWO")
    assert sorted(parallel, key=lambda r: arms.index(r["arm"])) == records
    demo = replace(synthetic.PRESETS["demo"]["run"], max_iters=3)
    for arm in arms[:2]:
        synthetic.train_sine(replace(demo, arm=arm), "cpu", Mock())
    assert_agree(seen[-1], seen[-2], 0)
    text, x, y = (tmp_path / "DATA").read_bytes(), seen[0][0, "x"], seen[0][0, "y"]
    train, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    assert torch.equal(x[:, 1:], y[:, :-1]) and all(bytes(row.tolist()) in train for row in x)
    assert all(r["curve"][-1] == [4, r["train_loss"], r["val_loss"]] for r in records)
    arrays = np.load(next((tmp_path / "OUT" / "arrays").iterdir()))
    assert "".join(arrays["tokens"][0]) == held_out[1:9].decode()


def test_figures_are_redrawn_on_any_console(tmp_path, monkeypatch):
    call(tmp_path, "--arms vanilla myopic")
    figure = tmp_path / "OUT" / "text_gaps_byte.png"
    for encoding in ("cp1252", "cp932"):
        figure.unlink()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        call(tmp_path, "--arms vanilla myopic bigram --plot_only")  # bigram is not recorded
        assert figure.exists()


BAD = [
    ("--learning_rate nan", "learning_rate is nan"),
    ("--n_embd 7 --n_head 2", "n_embd is 7"),
    ("--arms no_such", "arm no_such is unknown"),
    ("--data LATIN", "LATIN"),
    ("--out_dir SHORT", "SHORT"),
    ("--plot_only", "no results"),
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
    while b"loss" not in said and process.poll() is None:
        said += process.stderr.read1()
    kill = os.killpg if number == signal.SIGINT else os.kill  # a terminal tells the whole group
    kill(process.pid, number)
    _, said = process.communicate(timeout=20)  # the pipes end with the last process
    assert process.returncode == status and b"Traceback" not in said


def test_gaps_are_paired_by_seed(monkeypatch, capsys):
    losses, found = dict(vanilla=[1, 2], myopic=[1.5, 2.25], bigram=[2, 3]), {}
    for arm, seed in itertools.product(losses, (1, 0)):
        record = dict(n_params=7, val_loss=losses[arm][seed], train_loss=3, sample="so")
        found[mg.TextRun(arm=arm, seed=seed)] = record
    monkeypatch.setattr(mg, "plot_gaps", Mock())
    mg.report(found, MagicMock())
    assert re.search(r"myopic .* 0.375 ± 0.177 .* 37.5 ± 17.7", capsys.readouterr().out)
    found.pop(mg.TextRun(arm="vanilla", seed=1))
    assert mg.gaps(found, "myopic").tolist() == [0.5]


def test_bench_has_a_cell_for_what_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mg, "two_stream_attention", Mock(side_effect=torch.OutOfMemoryError))
    mg.main(tiny(tmp_path, "--bench"))
    table = capsys.readouterr().out
    assert table.count("(1.00–1.00)") == 7 and table.count("(nan–nan)") == 6


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
    assert abs(F.huber_loss(synthetic.trivial_prediction(x), y) / 0.3 - 1.2569) < 0.03  # paper's
    run = synthetic.SineRun(max_iters=100, p=0.3, **synthetic.SHARED)
    assert synthetic.curriculum(run, 0) == (2.0, 1.0, 1.5)
    assert synthetic.curriculum(run, 40) == pytest.approx((6.0, 0.3, 1.5))
    assert all(synthetic.curriculum(run, step) == (10.0, 0.3, 1.0) for step in range(80, 100))


def test_patch_measures_cause_and_effect():
    run = synthetic.SineRun(block_size=40, a=5, b=3.0, **synthetic.SHARED)
    model = Mock()  # its layer 1 holds the sine; its answer is half the sum that is due
    model.hidden_states = lambda x: [x, torch.sin(run.b * x[..., :1])]
    model.resume = lambda s, layer: F.pad(s[..., 0], (5, 0))[:, :-1].unfold(1, 5, 1).sum(-1) / 2
    slopes, correlations = synthetic.patch(model, run, 500, "cpu")
    assert slopes == pytest.approx([0] + [0.5] * 5 + [0] * 10, abs=1e-4)
    assert correlations == pytest.approx([0] + [1] * 5 + [0] * 10, abs=1e-4)


def sine_model(**arm):
    """A small model of the sine task in float64 with random weights, and a batch."""
    torch.manual_seed(0)
    model = synthetic.SineModel(mg.GPTConfig(9, 1, 2, 2, 12, **arm)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, y = synthetic.sample_batch(4, 9, 0.7, 3, 4.0, torch.Generator().manual_seed(0))
    return model, x.double(), y.double()


REACH = dict(vanilla=(8, 8), horizon_2=(4, 2), myopic=(0, 0), myopic_kv=(0, 0))


@pytest.mark.parametrize("arm", REACH)
def test_a_loss_reaches_the_embedding_through_two_layers_and_layer_1_through_one(arm):
    tables = synthetic.gradient_tables(*sine_model(**mg.arm_fields(arm)))
    for i, j in itertools.product(range(9), range(9)):
        assert [t[i, j] > 1e-9 for t in tables] == [0 <= i - j <= reach for reach in REACH[arm]]


def test_lags_and_diagonal_with_rest_add_up_to_the_gradient():
    model, x, y = sine_model()
    weights = [block.attn.c_attn.weight for block in model.transformer.h]
    true = torch.autograd.grad(model(x, y)[1], weights)
    for parts, whole in zip(synthetic.gradients_by_lag(model, x, y), true):
        assert relative_error(parts.sum(0), whole[12:]) < 1e-10
        assert (parts.norm(dim=(1, 2)) > 1e-9).all()  # every lag has a part
    for signed, size in itertools.chain(*synthetic.lag_shares(model, x, y)):
        assert sum(signed) == pytest.approx(1, abs=1e-3) == sum(size) and min(size) >= 0
    grads = [gradients(sine_model(**mg.ARMS[arm])[0], x, y) for arm in list(mg.ARMS)[:3]]
    whole, diagonal, kv = (torch.cat([g.flatten() for g in arm.values()]) for arm in grads)
    cosine = F.cosine_similarity(diagonal, whole - diagonal, dim=0)
    true = diagonal.norm().item(), (whole - diagonal).norm().item(), cosine.item()
    assert synthetic.diagonal_and_rest(model, x, y) == pytest.approx(true)
    for a, b in itertools.combinations([diagonal, kv, whole], 2):
        assert relative_error(a, b) > 0.05  # or the tests of the definition would be empty


def test_vanilla_plans_ahead_and_myopic_does_not():
    run = synthetic.PRESETS["demo"]["run"]
    _, vanilla, _ = synthetic.train_sine(run, "cpu", Mock())
    _, myopic, _ = synthetic.train_sine(replace(run, arm="myopic"), "cpu", Mock())
    assert vanilla["ratio"] < 0.2 and myopic["ratio"] > 0.85
    assert vanilla["probe_r2"][1][0] > 0.7 > 0.3 > vanilla["probe_r2_untrained"][1][0]
    assert np.mean(vanilla["patch_slope"][1 : run.a + 1]) > 0.7
    assert myopic["probe_r2"][1][0] < 0.1 > np.abs(myopic["patch_slope"]).max()


def test_sines_from_command_to_film(tmp_path):
    tiny = "--preset demo --max_iters 6 --batch_size 4 --n_embd 8 --eval_sequences 64 --jobs 1"
    flags = [*tiny.split(), "--p", "0.5", "0.7", "1", "--seeds", "1", "--out_dir", str(tmp_path)]
    synthetic.main(flags)
    figures = {path.name for path in tmp_path.iterdir()}
    for name in ("", "_patch", "_trap", "_lags", "_sine", "_sequence", "_gradients"):
        assert f"precache{name}.png" in figures and "precache.gif" in figures
    assert len((tmp_path / "synthetic.jsonl").read_text().splitlines()) == 6
    for words in ("--a 12", "--n_layer 1", "--p 0"):
        with pytest.raises(SystemExit, match="2"):
            synthetic.main([*flags, *words.split()])


# ------------------------ README
ROOT = Path(mg.__file__).parent
README, TABLES = ((ROOT / name).read_text("utf-8") for name in ("README.md", "results/README.md"))


def test_readme_shows_what_its_examples_print(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shown = re.findall(r"```python\n((?:import|from p).*?)```(?:\s+```\n(.*?)```)?", README, re.S)
    for code, printed in shown:
        exec(code, {})
        assert capsys.readouterr().out == printed
    assert len(shown) == 3


def test_numbers_in_the_tables_are_those_of_the_records():
    rows = []
    for folder in ("full", "full20k", "quick", "demo", "horizon"):
        found = mg.read_records(ROOT / "results" / folder / "synthetic.jsonl", synthetic.SineRun)
        for p, arm in {(run.p, run.arm) for run in found}:
            records = [record for run, record in found.items() if (run.p, run.arm) == (p, arm)]
            columns = zip(*map(synthetic.main_numbers, records))
            rows.append([f"{p:g}", arm, str(len(records)), *map(mg.mean_sd, columns)])
    for path in (ROOT / "results").glob("*/text.jsonl"):
        found = mg.read_records(path, mg.TextRun)
        for size, arm in {(record["n_params"], run.arm) for run, record in found.items()}:
            same = {run: record for run, record in found.items() if record["n_params"] == size}
            losses = [record["val_loss"] for run, record in same.items() if run.arm == arm]
            gap = mg.mean_sd(mg.gaps(same, arm))
            rows.append([f"{size:,}", arm, str(len(losses)), mg.mean_sd(losses), gap])
    assert len(rows) > 15 and all(f"| {' | '.join(row)} |" in TABLES for row in rows)
    shown = [line for line in README.splitlines() if line.startswith("|") and "±" in line]
    assert len(shown) > 3 and set(shown) <= set(TABLES.splitlines())
