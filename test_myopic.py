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
from dataclasses import replace
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
TINY = "--preset demo --max_iters 4 --n_embd 8 --block_size 8 --device cpu --jobs 1 --data text "
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


def preset_run(script, name, **settings):
    """The first run of a preset, with other settings."""
    _, runs = script.flags(["--preset", name])
    return replace(runs[0], **settings)


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
    n_head, T = copies[0].config.n_head, idx.size(1)
    x = [model.embed(idx)[:, i] for i, model in enumerate(copies)]  # T of (B, C)
    for layer in range(copies[0].config.n_layer):
        blocks = [model.transformer.h[layer] for model in copies]
        normed = [block.ln_1(x_i) for block, x_i in zip(blocks, x)]
        for i, block in enumerate(blocks):
            keys, values = [], []
            for j in range(i + 1):
                whose = block if owner == "reader" else blocks[j]
                _, k, v = whose.attn.c_attn(normed[j]).chunk(3, dim=-1)
                keys.append(k.unflatten(-1, (n_head, -1)))  # (B, nh, hs)
                values.append(v.unflatten(-1, (n_head, -1)))
            q, _, _ = block.attn.c_attn(normed[i]).chunk(3, dim=-1)
            q = q.unflatten(-1, (n_head, -1))
            scores = (q * torch.stack(keys)).sum(-1, keepdim=True) / math.sqrt(q.size(-1))
            P = scores.softmax(0)  # (i + 1, B, nh, 1)
            mixed = (P * torch.stack(values)).sum(0).flatten(1)  # (B, C)
            x[i] = x[i] + block.attn.c_proj(mixed)
            x[i] = x[i] + block.mlp(block.ln_2(x[i]))
    losses = []
    for i, model in enumerate(copies):
        logits = model.lm_head(model.transformer.ln_f(x[i]))  # (B, V)
        losses.append(F.cross_entropy(logits, targets[:, i]) / T)
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
    place = torch.arange(x.size(1))
    lag = place[:, None] - place  # (T, T)
    is_near = lag <= (x.size(1) if horizon is None else horizon)
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


def test_log_sum_exp_as_other_kernels_keep_it():
    q, k, v, out = mg.attend(*torch.randn(3, 2, 3, 5, 8).double())
    lse = out.grad_fn._saved_logsumexp  # (B, nh, T)
    padded = SimpleNamespace(_saved_log_sumexp=F.pad(lse, (0, 27)))
    trailing = SimpleNamespace(_saved_logsumexp=lse[..., None])
    for grad_fn in (padded, trailing):  # read, not computed
        assert torch.equal(mg.log_sum_exp(0 * q, k, SimpleNamespace(grad_fn=grad_fn)), lse)


def test_it_holds_under_checkpointing_and_compile():
    leaves, dy = attention_inputs()
    attention = functools.partial(mg.myopic_attention, n_head=3)
    true = attention_gradients(attention, leaves, dy)
    ways = [torch.compile(attention, backend="aot_eager")]
    for reentrant in (True, False):
        ways.append(functools.partial(checkpoint, attention, use_reentrant=reentrant))
    for way in ways:
        assert_agree(attention_gradients(way, leaves, dy), true, 1e-12)


def test_under_autocast_y_is_bfloat16_and_gradients_are_float32():
    leaves, dy = attention_inputs(dtype=torch.float32)
    true = attention_gradients(mg.myopic_attention, leaves, dy, 3)
    under_autocast = torch.autocast("cpu", torch.bfloat16)(mg.myopic_attention)
    got = attention_gradients(under_autocast, leaves, dy.bfloat16(), 3)
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


@pytest.mark.parametrize("B, T", [(2, 9), (0, 3), (2, 0)])
def test_two_streams_with_a_detached_past_are_myopic(B, T):
    leaves, dy = attention_inputs(B, T)

    def textbook(x, w, b):
        q, k, v = mg.heads(x, w, b, 3)
        _, k_past, v_past = mg.heads(x.detach(), w, b, 3)
        return mg.merge_heads(mg.two_stream_attention(q, k, v, k_past, v_past))

    true = attention_gradients(textbook, leaves, dy)
    assert_agree(attention_gradients(mg.myopic_attention, leaves, dy, 3), true)


def test_two_streams_with_a_past_of_zeros_are_differentiated_through():
    q, k, v = torch.randn(3, 1, 2, 4, 3).double().requires_grad_().unbind()
    zeros = torch.zeros_like(k)
    attention = functools.partial(mg.two_stream_attention, k_past=zeros, v_past=zeros)
    assert torch.autograd.gradcheck(attention, (q, k, v))


# ------------------------ the model
def test_nanogpts_weights_load_and_its_start_values():
    layers = {"ln_f": (12,), "h.0.ln_1": (12,), "h.0.ln_2": (12,), "h.0.attn.c_attn": (36, 12)}
    layers |= {"h.0.attn.c_proj": (12, 12), "h.0.mlp.c_fc": (48, 12), "h.0.mlp.c_proj": (12, 48)}
    state = {f"transformer.{n}.bias": torch.zeros(shape[0]) for n, shape in layers.items()}
    layers |= {"wte": (11, 12), "wpe": (8, 12)}
    state |= {f"transformer.{n}.weight": torch.randn(shape) for n, shape in layers.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    make_gpt(n_layer=1, n_head=3).load_state_dict(state, strict=True)
    for name, p in mg.GPT(mg.GPTConfig(64, 200, 8, 2, 128)).named_parameters():
        std = 0.005 if name.endswith("c_proj.weight") else 0.02  # 0.02 / sqrt(2 * 8 layers)
        assert p.dim() == 1 or p.std().item() == pytest.approx(std, rel=0.1), name


def test_bigram_sees_no_past_and_local_myopic_its_teachers():
    (idx, targets), bigram = batch(6), make_gpt(**mg.ARMS["bigram"])
    other = idx.clone()
    other[:, :4] = (idx[:, :4] + 1) % 11
    assert torch.equal(bigram(idx)[0][:, 4:], bigram(other)[0][:, 4:])

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


def test_dropout_acts_in_training_alone():
    model, (idx, _) = make_gpt(dropout=0.5, n_layer=1), batch(6)
    drops = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(drops) == 3
    for dropping in [*drops, None]:  # each of the three alone, then none
        for m in drops:
            m.train(m is dropping)
        assert torch.equal(model(idx)[0], model(idx)[0]) == (dropping is None)


def test_bad_values_are_refused():
    (x, w, b), _ = attention_inputs()
    bad = [(x[0], w, b, 3), (x, w[:36], b, 3), (x, w, b[:9], 3), (x, w, b, 5), (x, w, b, 0)]
    for arguments in [*bad, (x, w, b, 3, 1.5), (x, w, b, 3, -1), (x, w, b, 3, 0, "k")]:
        pytest.raises(mg.UsageError, mg.myopic_attention, *arguments)
    model, (idx, _) = make_gpt(), batch(9)
    pytest.raises(mg.UsageError, model, idx)  # block_size is 8
    for settings in (dict(idx=idx[:, :0]), dict(temperature=0), dict(top_k=0)):
        pytest.raises(mg.UsageError, model.generate, **(dict(idx=idx, max_new_tokens=1) | settings))
    bad = [dict(muon="some"), dict(block_size=2.5), dict(n_head=5), dict(arm="horizon_1.5")]
    bad += [dict(learning_rate=math.nan), dict(weight_decay=-1), dict(beta1=1), dict(seed=2**32)]
    for settings in bad:
        pytest.raises(mg.UsageError, mg.TextRun, **settings)
    bad = [dict(p=0), dict(p=1.5), dict(a=16), dict(block_size=20), dict(n_layer=1)]
    for settings in [*bad, dict(arm="local_myopic"), dict(seed=9000), dict(b_hold=0.7)]:
        pytest.raises(mg.UsageError, preset_run, synthetic, "quick", **settings)
    for horizon in (True, 1.5, -1):
        pytest.raises(mg.UsageError, replace, model.config, horizon=horizon)


def test_generate_takes_the_best_and_goes_on_in_half_precision():
    model = mg.GPT(mg.GPTConfig(4, 50304, 1, 1, 8)).half()
    idx = torch.zeros(2, 3, dtype=torch.long)
    logits, _ = model(idx)
    for settings in (dict(top_k=1), dict(temperature=1e-6, top_k=2)):
        assert torch.equal(model.generate(idx, 1, **settings)[:, -1], logits[:, -1].argmax(-1))
    torch.nn.init.zeros_(model.lm_head.weight)  # all are equal: top_k of them are kept
    drawn = {model.generate(idx, 1, top_k=2)[0, -1].item() for _ in range(40)}
    assert len(drawn) == 2


def test_shapes_alone():
    x, w = torch.empty(2, 5, 8, device="meta"), torch.empty(24, 8, device="meta")
    assert mg.myopic_attention(x, w, None, 2).shape == x.shape


# ------------------------ text and training
def test_muon_takes_the_matrices_that_a_run_names_and_adamw_the_rest():
    for name, n in (("all", 4), ("attn", 2)):
        run = mg.TextRun(muon=name, muon_decay=0.3)
        adamw, muon = mg.configure_optimizers(make_gpt(n_layer=1), run)
        assert adamw.defaults["betas"] == (0.9, 0.95)
        groups = [*adamw.param_groups, *muon.param_groups]  # matrices, norms and biases; Muon's
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.3]
        assert [len(group["params"]) for group in groups] == [6 - n, 10, n]  # 6: 4, 2 embeddings


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_is_torchs_as_far_as_bfloat16_lets_it(shape):
    torch.manual_seed(0)
    start, idle = torch.randn(shape), torch.nn.Parameter(torch.ones(shape))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    how = dict(lr=0.1, weight_decay=0.5)
    muons = [mg.Muon([ours, idle], **how)]
    muons.append(torch.optim.Muon([theirs], **how, adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        grad, before = torch.randn(shape), ours.detach().clone()
        for p, muon in zip((ours, theirs), muons):
            p.grad = grad.clone()
            muon.step()
        # decay first, then a step of the rate; its singular values, but for the factor, are near 1
        step = (0.95 * before - ours) / (0.1 * 0.2 * math.sqrt(max(shape)))
        values = torch.linalg.svdvals(step)
        assert values.min() > 0.6 and values.max() < 1.25
        assert_agree(dict(p=ours - start), dict(p=theirs - start), 0.02)
    assert torch.equal(idle, torch.ones(shape))  # it has no gradient
    # singular values alone change: X and its factor U V^T share their vectors
    X = torch.randn(shape).double()
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    inner = U.T @ mg.orthogonalize(X) @ Vh.T
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-10


def test_a_step_is_the_clipped_gradient_times_the_rate(monkeypatch):
    run = mg.TextRun(max_iters=4, warmup=0.5, decay_from=0.5, grad_clip=0.1)
    model, weights = make_gpt(torch.float32), []
    everything = list(model.parameters())
    parts = everything[::2], everything[1::2]
    optimizers = [torch.optim.SGD(part, 0.2) for part in parts]
    monkeypatch.setattr(mg, "configure_optimizers", lambda model, run: optimizers)

    def after_step(done):
        assert model.training and model.lm_head.weight.grad is None
        weights.append([torch.cat([p.detach().flatten() for p in part]) for part in parts])

    after_step(0)
    mg.train(model, run, lambda step: batch(6), after_step, Mock())
    moved = []
    for old, new in itertools.pairwise(weights):
        moved.append([(b - a).norm().item() for a, b in zip(old, new)])
    # rates .1, .2, .2, .1, in both optimizers
    assert np.linalg.norm(moved, axis=1) == pytest.approx([0.01, 0.02, 0.02, 0.01], rel=1e-3)
    assert min(moved[0]) > 0.001


def test_text_is_split_between_paragraphs_and_each_of_english_is_there_once(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("\ufeff" + "the cat, the dög.\n\n" * 200, encoding="utf-8")
    train, held_out = (part.decode() for part in mg.load_text([file]))
    assert train == "the cat, the dög.\n\n" * 180 + "the cat, the dög."
    assert held_out == "\n\nthe cat, the dög." * 19 + "\n\n"
    train, held_out = (set(part.split(b"\n\n")) for part in mg.load_text([]))
    assert len(train) > 5000 and len(held_out) > 500 and train & held_out <= {b""}


def test_losses_of_tokens_are_evenly_spaced_in_order_and_without_dropout():
    model, rows = make_gpt(dropout=0.5), torch.arange(5000).remainder(11).unfold(0, 9, 1)
    losses, y = mg.token_losses(model, rows, 4000)  # in three chunks
    assert losses.shape == y.shape == (4000, 8) and model.training  # as before
    assert y[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and y[-1, -1] == 4999 % 11
    logits, _ = model.eval()((y - 1) % 11)  # tokens count up
    assert losses.allclose(F.cross_entropy(logits.mT, y, reduction="none"))


def test_the_numbers_of_a_record_are_of_the_right_text():
    run = mg.TextRun(block_size=3, max_iters=20, eval_windows=5, dropout=0.5)
    model, numbers, _ = mg.train_text((b"d" * 40, b"9 ab" * 10), run, "cpu", Mock())
    step, train_loss, val_loss = numbers["curve"][-1]
    assert step == 20 and train_loss == numbers["train_loss"] < 1
    assert 3 < val_loss == numbers["val_loss"]
    assert sum(numbers["loss_by_position"]) == pytest.approx(3 * val_loss)  # of 3 positions
    assert numbers["lag_share"]["start"] != numbers["lag_share"]["end"]
    assert numbers["sample"].startswith("9 ab") and model.transformer.drop.p == 0.5


def test_arms_share_start_and_batches_and_seeds_share_none(monkeypatch):
    monkeypatch.setattr(mg, "train", Mock(wraps=mg.train))
    text = bytes(range(250)), bytes(reversed(range(250)))  # ascending alone is trained on
    settings = dict(block_size=8, max_iters=1, learning_rate=0, muon_rate=0)  # stays as it starts
    for arm, seed in (("vanilla", 0), ("local_myopic", 0), ("bigram", 1)):
        mg.train_text(text, mg.TextRun(arm=arm, seed=seed, **settings), "cpu", Mock())
    seen = []
    for c in mg.train.call_args_list:
        model, _, next_batch, *_ = c.args
        seen.append(model.transformer.state_dict() | dict(xy=torch.stack(next_batch(1))))
    vanilla, teacher, local, other_seed = seen  # local_myopic trains its teacher first
    assert_agree(teacher, vanilla, 0)
    assert_agree(local, vanilla, 0)
    for name in ("xy", "wte.weight"):
        assert not torch.allclose(other_seed[name], vanilla[name])
    assert torch.equal(vanilla["xy"][1], vanilla["xy"][0] + 1)


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
    mg.main(f"{TINY} {words} --out_dir {out}".split())
    found = mg.read_runs(out, mg.TextRun)
    return {name: vars(run) | dict(seconds=0, npz=None) for name, run in found.items()}


def test_a_file_is_whole_or_not_there(tmp_path):
    def fail(part):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    pytest.raises(OSError, mg.write_whole, tmp_path / "figure", fail)
    assert not list(tmp_path.iterdir())


CALLS = {  # words: what varies, and its values in the order of the runs
    "--arm vanilla myopic --seed 3 5 --p 1 0.3 1.0": (
        ["arm", "seed", "p"],
        list(itertools.product(("vanilla", "myopic"), (3, 5), (1, 0.3))),
    ),
    "--arm bigram --seed 1 --n_layer 2 3 --n_head 1 --n_embd 16 32": (
        ["n_layer", "n_head", "n_embd"],
        [(2, 1, 16), (2, 1, 32), (3, 1, 16), (3, 1, 32)],
    ),
    "--arm bigram --seed 1 --n_head 0 --n_embd 40 16": (
        ["n_head", "n_embd"],
        [(2, 40), (1, 16)],
    ),
}


@pytest.mark.parametrize("words", CALLS)
def test_the_runs_of_a_call_are_all_combinations_each_once(words):
    names, values = CALLS[words]
    _, runs = synthetic.flags(words.split())
    assert [tuple(getattr(run, name) for name in names) for run in runs] == values


def test_runs_are_trained_once_and_are_the_same_for_any_jobs(folder, monkeypatch):
    monkeypatch.setattr(mg, "train", Mock(wraps=mg.train))
    monkeypatch.setattr(mg, "report", Mock())
    arms = "--arm vanilla horizon_1 bigram local_myopic"
    torch.set_num_threads(2)  # a run takes one all the same
    records = call(arms)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert call(arms) == records and mg.train.call_count == 5  # a teacher is the fifth
    assert call(f"{arms} --jobs 2", "two") == records  # in other processes: not counted
    assert call("--arm vanilla bigram --fresh") == records and mg.train.call_count == 7

    vanilla, bigram = mg.report.call_args[0][0]  # the runs asked for, in that order
    text = Path("text").read_bytes()
    digest = hashlib.sha256(b"%d " % (len(text) * 9 // 10) + text).hexdigest()
    assert (vanilla.arm, bigram.arm, vanilla.data_sha256) == ("vanilla", "bigram", digest)
    assert vanilla.code == hashlib.sha256(Path(mg.__file__).read_bytes()).hexdigest()[:8]


def test_figures_whatever_the_console_and_the_settings(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    monkeypatch.setitem(mg.matplotlib.rcParams, "text.usetex", True)  # takes latex
    records = call("--seed 2 3 --arm vanilla myopic")
    assert Path("out/demo/text_gaps.png").exists()
    assert not list(Path("out/demo/runs").glob("*seed3*.npz"))  # the first seed's alone are kept
    assert call("--seed 2 --arm vanilla bigram --plot_only") == records  # nothing is trained


def test_an_old_figure_does_not_stay(folder, capsys):
    call("--arm vanilla")
    assert "no text_gaps.png: it takes vanilla and another arm" in capsys.readouterr().out
    call("--arm vanilla myopic")
    assert Path("out/demo/text_gaps.png").exists()
    call("--arm myopic")
    assert not list(Path("out/demo").glob("*.png"))


BAD = [
    ("--arm x", "'x'"),
    ("--arms vanilla", "--arms"),
    ("--n_embd 16 --n_head 5", "n_head 5"),
    ("--jobs 0", "jobs is 0"),
    ("--data latin", "latin"),
    ("--data short", "block_size is 8"),
    ("--out_dir short", "short"),
    ("--plot_only", "none of these runs"),
    ("--max_iters 1 --learning_rate 1e30", "--learning_rate"),
    ("--arm myopic --learning_rate 1e30 --jobs 2", "myopic, seed 0: loss nan at step 4"),
]


@pytest.mark.parametrize("words, said", BAD)
def test_bad_input_is_one_line_and_status_2(folder, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        mg.main((TINY + words).split())
    error = capsys.readouterr().err.partition("error: ")[2].strip()
    assert stop.value.code == 2 and said in error and "\n" not in error


def test_a_file_that_is_no_record_is_named(folder):
    call("--arm vanilla")
    (path,) = Path("out/demo/runs").glob("*.json")
    for text in ("", "[1]", path.read_text()[:-9]):
        path.write_text(text)
        with pytest.raises(mg.UsageError, match=path.stem):
            mg.read_runs("out/demo", mg.TextRun)


@pytest.mark.skipif(os.name == "nt", reason="no process groups")
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_interrupted_or_killed_no_process_is_left(folder, number, status):
    words = f"{TINY} --max_iters 9999999 --jobs 2 --arm vanilla"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    # a test run in the background would hand down a Ctrl-C that is ignored
    pipes["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process, said = subprocess.Popen([sys.executable, mg.__file__, *words.split()], **pipes), b""
    while b"vanilla, seed 0: loss" not in said and process.poll() is None:
        said += process.stderr.read1()
    kill = os.killpg if number == signal.SIGINT else os.kill  # a terminal tells the whole group
    kill(process.pid, number)
    _, said = process.communicate(timeout=20)  # the pipes end with the last process
    assert process.returncode == status and b"Traceback" not in said


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
def finished(run_class, numbers, **settings):
    """A run with the numbers of a record."""
    run = run_class(**settings)
    vars(run).update(numbers)
    return run


def figure(monkeypatch, plot, *data):
    """-> the Figure that plot(path, *data) would write."""
    monkeypatch.setattr(mg, "save_figure", Mock())
    plot(Path("none"), *data)
    return mg.save_figure.call_args[0][1]


def test_what_is_shown_of_english(capsys, monkeypatch):
    losses = dict(vanilla={1: 2, 0: 1, 3: 2}, myopic={0: 2, 1: 5, 2: 9}, bigram={1: 5, 0: 4, 3: 2})
    runs = []
    for arm, by_seed in losses.items():
        for seed, loss in by_seed.items():
            record = dict(val_loss=loss, train_loss=8, n_params=7, sample="so\x1b\x9b\r")
            # step, training loss, validation loss
            record["curve"] = [[2, 8, 2 * loss], [4, 8, loss]]
            record["loss_by_position"] = [0, loss, loss, 3 * loss, loss]
            runs.append(finished(mg.TextRun, record, arm=arm, seed=seed, block_size=5))
    assert mg.gaps(runs, "myopic") == {0: 1, 1: 3}  # of the seeds that vanilla has, too
    assert mg.shares_of_bigram(runs, "bigram") == [100, 100]  # seed 3's gap of bigram is noise
    numbers = ["3", "5.333 ± 3.512", "2.000 ± 1.414", "66.7 ± 47.1", "50 ± 0"]
    # size, parameters, arm; n, loss, gap, % of bigram's, steps that vanilla needs
    assert mg.table_rows(runs)[1] == ["3x96", "7", "myopic", *numbers]
    mg.print_table("title", ["name"], [["[red]:smile:" + 200 * "@"]])
    out = capsys.readouterr().out
    assert "[red]:smile:" in out and out.count("@") == 200  # letters as they are, none cut

    left, right = figure(monkeypatch, mg.plot_gaps, runs).axes
    zero, myopic, bigram = (line.get_xydata().tolist() for line in left.lines)
    assert myopic == bigram == [[2, 4], [4, 2]]  # step; (1 + 3) / 2 and (3 + 3 + 0) / 3
    low, high = left.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == (1, 6)  # the smaller of two seeds at step 4, the larger at 2
    # positions 0, 1, mean of 2 and 3, 4
    assert list(right.lines[1].get_ydata()) == pytest.approx([0, 2, 4, 2])
    assert len(set(mg.LOOKS.values())) == len(mg.LOOKS) == len(mg.ARMS) + 1  # and "untrained"


def test_runs_of_other_settings_are_never_averaged():
    runs = []
    for n, (rate, size, seed) in enumerate(itertools.product((1e-3, 2e-3), (16, 32), (0, 1))):
        settings = dict(learning_rate=rate, n_embd=size, n_head=1, seed=seed)
        record = dict(val_loss=n, n_params=size, curve=[[1, n, n]])
        runs.append(finished(mg.TextRun, record, **settings))
    extra = mg.extra_settings(runs, "size")
    assert extra == ["learning_rate"]
    rows = [(row[0], row[1], row[5]) for row in mg.table_rows(runs, extra)]
    assert rows == [
        ("0.001", "3x16", "0.500 ± 0.707"),  # of two seeds each
        ("0.001", "3x32", "2.500 ± 0.707"),
        ("0.002", "3x16", "4.500 ± 0.707"),
        ("0.002", "3x32", "6.500 ± 0.707"),
    ]
    assert mg.extra_settings(runs[:4], "size") == []


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
    run = preset_run(synthetic, "demo", p=0.5)
    torch.manual_seed(0)
    r2, x, estimate = synthetic.probe_model(KnownModel(), run, 600, "cpu")
    assert np.max(r2[0]) < 0  # held out: in sample, 100 channels of noise would hold something
    assert r2[1] == pytest.approx([1, 0, 1, 0, 0, 0], abs=0.02)
    assert estimate == pytest.approx(np.sin(4 * x), abs=0.02)
    slopes = synthetic.patch(KnownModel(), run, 500, "cpu")
    assert slopes == pytest.approx([0, 0.5, 0.5, 0.5, 0, 0], abs=1e-4)  # only n's state moves


def test_sines_are_trained_and_measured_on_the_right_draws(monkeypatch):
    monkeypatch.setattr(synthetic, "sample_batch", Mock(wraps=synthetic.sample_batch))
    run = preset_run(synthetic, "demo", max_iters=10, p=0.5, seed=7, eval_sequences=64, x_wide=1.5)
    model, numbers, _ = synthetic.train_sine(run, "cpu", Mock())
    drawn = {}  # {seed: [(b, p, standard deviation of x)]}
    for c in synthetic.sample_batch.call_args_list:
        p, b, generator = c.args[2], c.args[4], c.args[5]
        x_std = c.args[6] if len(c.args) > 6 else 1.0  # evaluation leaves it out
        drawn.setdefault(generator.initial_seed(), []).append((b, p, x_std))
    lessons = [synthetic.curriculum(run, step) for step in range(11)]  # (b, p, x_std)
    assert lessons[1] == (2.0, 1.0, 1.5) and lessons[9] == lessons[10] == (4.0, 0.5, 1.0)
    assert lessons[4] == pytest.approx((3.0, 0.5 ** (1 / 3), 1.5))  # b halfway there, log p a third
    assert drawn.pop(1007) == lessons[:10]  # TRAINING + the run's seed
    assert list(drawn) == [10000, 10001, 10002, 10003]  # losses, probe fit, probe test, patch
    losses, fitted, tested, patched = map(set, drawn.values())
    tasks = [(b, p, 1.0) for b, p, _ in lessons]  # the last is the run's own
    assert losses == set(tasks) and patched == {(4.0, 0.5, 1.0)}
    assert fitted == tested == set(tasks[::2])  # as the frames of the film
    x, y = synthetic.sample_task(run, 64, synthetic.EVALUATION)
    assert numbers["lag_share"]["end"] == mg.lag_shares(model, x, y)
    loss = model.position_losses(model.hidden_states(x)[-1], y).mean().item()
    assert loss / run.p == pytest.approx(numbers["huber_over_p"], rel=1e-4)


def test_a_sine_model_starts_the_same_in_every_arm_with_positions_as_waves():
    run = preset_run(synthetic, "full", wave_std=0.3)
    model, myopic = synthetic.make_model(run), synthetic.make_model(replace(run, arm="myopic"))
    assert_agree(trainable(myopic), trainable(model), 0)
    other = synthetic.make_model(replace(run, seed=1))
    assert not torch.equal(other.read_in.weight, model.read_in.weight)
    waves = model.transformer.wpe.weight
    assert waves.square().mean().item() == pytest.approx(0.3**2, rel=0.1)
    assert waves[0, ::2].abs().max() < 1e-6 < waves[0, 1::2].min()  # sines, cosines


def test_lag_shares_are_parts_of_the_gradient():
    model, xy = make_gpt(), batch(8)
    shares = mg.lag_shares(model, *xy)
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
    pytest.raises(mg.UsageError, mg.lag_shares, make_gpt(horizon=0), *xy)


def test_vanilla_plans_ahead_and_myopic_does_not():
    run = preset_run(synthetic, "demo")
    _, vanilla, _ = synthetic.train_sine(run, "cpu", Mock())
    _, myopic, _ = synthetic.train_sine(replace(run, arm="myopic"), "cpu", Mock())
    assert vanilla["ratio"] < 0.2 and myopic["ratio"] > 0.85
    assert vanilla["probe_r2"][1][0] > 0.7 and vanilla["probe_r2_untrained"][1][0] < 0.3
    assert np.mean(vanilla["patch_slope"][1 : run.a + 1]) > 0.7
    assert myopic["probe_r2"][1][0] < 0.1 and np.abs(myopic["patch_slope"]).max() < 0.1


def test_sines_from_command_to_film(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "FuncAnimation", Mock(wraps=synthetic.FuncAnimation))
    tiny = "--preset demo --max_iters 6 --eval_sequences 64 --jobs 1 --n_embd 8 16"
    flags = [*tiny.split(), "--out_dir", str(tmp_path)]
    synthetic.main(flags)
    assert len(list(tmp_path.glob("precache*"))) == 6
    film, frame = synthetic.FuncAnimation.call_args[0]
    runs = mg.read_runs(tmp_path, synthetic.SineRun).values()
    (vanilla,) = (run for run in runs if run.arm == "vanilla" and run.n_embd == 16)
    for n, step, b in ((0, 0, 2.0), (1, 2, 2.7), (3, 6, 4.0)):  # every second point
        frame(n)
        assert film.texts[-1].get_text() == f"step {step}: the sine is sin({b}·x)"
        top, _, low, _ = film.axes
        grid, grey = top.lines[0].get_data()
        assert np.allclose(grey, np.sin(b * grid), atol=0.1)
        assert np.array_equal(top.lines[1].get_data(), mg.read_arrays(vanilla)["film"][n])
        assert np.array_equal(low.lines[1].get_xydata(), vanilla.curve[: step + 1])
    for path in tmp_path.glob("runs/*.npz"):
        path.unlink()  # as for seeds of which no arrays are kept
    synthetic.main([*flags, "--plot_only"])
    assert capsys.readouterr().out.count("no precache") == 3  # those that need weights
    assert len(list(tmp_path.glob("precache*"))) == 3


def test_pictures_of_trained_models_are_of_their_own_weights(monkeypatch):
    runs = list(mg.read_runs(ROOT / "results" / "demo", synthetic.SineRun).values())
    for ax in figure(monkeypatch, synthetic.plot_sequence, runs).axes:
        true = np.array([bar.get_height() for bar in ax.patches[:12]])
        vanilla, myopic = (np.abs(line.get_ydata() - true).mean() for line in ax.lines)
        assert vanilla < 0.25 < myopic
    axes = figure(monkeypatch, synthetic.plot_gradients, runs).axes
    for ax, reach in zip(axes, (11, 0)):  # all; its own
        is_drawn = ~np.ma.getmaskarray(ax.images[0].get_array())
        assert np.array_equal(is_drawn, np.triu(np.tri(12), -reach))  # 0 <= i - j <= reach


# ------------------------ run_all.sh and README
@pytest.mark.skipif(os.name == "nt", reason="no bash")
@pytest.mark.parametrize("words, status, said", [("--help", 0, "Set up once"), ("--arm x", 2, "")])
def test_run_all_from_anywhere_and_with_any_environment(tmp_path, words, status, said):
    (tmp_path / "project").symlink_to(ROOT, target_is_directory=True)
    odd = dict(CDPATH=str(tmp_path), PYTHONOPTIMIZE="2", PYTHONSAFEPATH="1", PYTHONHOME="no_such")
    odd["MPLBACKEND"] = "no_such"
    bash = ["bash", "project/run_all.sh", *words.split()]
    done = subprocess.run(bash, cwd=tmp_path, env=os.environ | odd, capture_output=True, text=True)
    assert done.returncode == status and said in done.stdout and "==" not in done.stdout  # a run
    assert "Traceback" not in done.stderr and len(done.stdout.splitlines()) < 8
    assert [path.name for path in tmp_path.iterdir()] == ["project"]  # nothing is made


def test_readme_shows_what_its_examples_print(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shown = re.findall(r"```python\n(import.*?)```(?:\s+```\n(.*?)```)?", README, re.S)
    for code, printed in shown:
        exec(code, {})
        assert capsys.readouterr().out == printed
    assert len(shown) == 3


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
    quick = list(mg.read_runs(ROOT / "results" / "quick", mg.TextRun).values())
    lags = figure(monkeypatch, mg.plot_lags, quick, "All later readers", 64).get_suptitle()
    share = re.search(r"(\d+ ± \d+) %", lags)[1]
    assert f"{share} %" in README and "(97 % if all pairs" in lags
    for name in ("demo", "quick", "full", "earlier"):
        for kind, script in ((synthetic.SineRun, synthetic), (mg.TextRun, mg)):
            runs = list(mg.read_runs(ROOT / "results" / name, kind).values())
            for row in script.table_rows(runs) if runs else []:
                is_ablation = name == "earlier" and row[3] == "1"  # of sines, one seed
                assert is_ablation or f"| {' | '.join(row)} |" in TABLES
    shown = [line for line in README.splitlines() if line.startswith("|") and "±" in line]
    assert len(shown) > 3 and set(shown) <= set(TABLES.splitlines())
