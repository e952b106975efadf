"""The tests: offline, on the CPU, in seconds.   python -m pytest -q
The hand-written backward is held against the definition executed literally: literal_gradient."""
import functools
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from pytest import mark

import myopic_gpt as mg
import synthetic

torch.set_num_threads(1)    # the tensors here are tiny: more threads would only wait for each other


def relative_error(a, b):
    """|a - b| / |b|, or |a| where b is zero."""
    return ((a.double() - b.double()).norm() / (b.double().norm() or 1)).item()


def assert_agree(got, true, tolerance=1e-10):
    """Every tensor in the dict `got` is the one of that name in `true`, up to a relative error."""
    assert got.keys() == true.keys()
    for name in true:
        assert relative_error(got[name], true[name]) <= tolerance, name


def make_gpt(dtype=torch.float64, **fields):
    """A small GPT with all parameters random, so that no gradient is zero by accident."""
    torch.manual_seed(0)
    fields = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=12) | fields
    model = mg.GPT(mg.GPTConfig(**fields)).to(dtype)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def batch(T, B=2):
    """-> idx, targets (B, T): random tokens for make_gpt's model."""
    return torch.randint(11, (2, B, T), generator=torch.Generator().manual_seed(1))


def gradients(model, idx, targets):
    """{name: gradient of the loss}"""
    model.zero_grad(set_to_none=True)
    model(idx, targets)[1].backward()
    return {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters()}


# ------------------------ the definition, literally
def literal_gradient(model, idx, targets, which, owner):
    """The gradient of the mean loss by the definition: position j computes with its copy theta_j.

    which: "all" sums d loss_i / d theta_j over every i, j; "diagonal" over i = j only. owner: whose
    copy of W_K, W_V makes the key of writer j for reader i: the "reader"'s or the "writer"'s. One
    position at a time; nothing of the model is used but its weights."""
    c, (B, T) = model.config, idx.shape
    C, hs = c.n_embd, c.n_embd // c.n_head
    theta = [{n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
             for _ in range(T)]
    norm = lambda x, P, name: F.layer_norm(x, (C,), P[name + ".weight"], P.get(name + ".bias"))
    linear = lambda x, P, name: F.linear(x, P[name + ".weight"], P.get(name + ".bias"))
    qkv = lambda x, P: linear(x, P, h + "attn.c_attn").view(B, 3, c.n_head, hs).unbind(1)
    x = [P["transformer.wte.weight"][idx[:, j]] + P["transformer.wpe.weight"][j]
         for j, P in enumerate(theta)]
    for l in range(c.n_layer):
        h = f"transformer.h.{l}."
        normed = [norm(x[j], P, h + "ln_1") for j, P in enumerate(theta)]
        for i, P in enumerate(theta):
            q, _, _ = qkv(normed[i], P)
            _, keys, values = zip(*(qkv(normed[j], P if owner == "reader" else theta[j])
                                    for j in range(i + 1)))
            score = torch.stack([(q * k).sum(-1) for k in keys]) / math.sqrt(hs)    # (i+1, B, nh)
            weight = score.exp() / score.exp().sum(0)
            mixed = sum(w[..., None] * v for w, v in zip(weight, values)).flatten(1)        # (B, C)
            y = x[i] + linear(mixed, P, h + "attn.c_proj")
            inner = F.gelu(linear(norm(y, P, h + "ln_2"), P, h + "mlp.c_fc"))
            x[i] = y + linear(inner, P, h + "mlp.c_proj")
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i, P in enumerate(theta):
        logits = norm(x[i], P, "transformer.ln_f") @ P["transformer.wte.weight"].T
        loss = -logits.log_softmax(-1)[torch.arange(B), targets[:, i]].sum() / (B * T)
        for j in (range(i + 1) if which == "all" else [i]):
            grads = torch.autograd.grad(loss, [*theta[j].values()], retain_graph=True,
                                        materialize_grads=True)
            for n, g in zip(theta[j], grads):
                total[n] += g
    return total


@mark.parametrize("layers", [1, 2, 3])
@mark.parametrize("heads", [1, 2, 3])
@mark.parametrize("bias, T", [(True, 1), (False, 2), (True, 3), (False, 5)])
@mark.parametrize("arm, which, owner", [
    ("vanilla", "all", "writer"), ("vanilla", "all", "reader"),     # all: the owner does not matter
    ("myopic", "diagonal", "reader"), ("myopic_kv", "diagonal", "writer")])
def test_gradient_is_the_definition(layers, heads, bias, T, arm, which, owner):
    model = make_gpt(n_layer=layers, n_head=heads, bias=bias, **mg.ARMS[arm])
    assert_agree(gradients(model, *batch(T)), literal_gradient(model, *batch(T), which, owner))


def test_the_three_arms_differ():       # or the comparison above would be empty
    models = [make_gpt(**mg.ARMS[arm]) for arm in ("vanilla", "myopic", "myopic_kv")]
    grads = [gradients(m, *batch(5))["transformer.h.0.attn.c_attn.weight"] for m in models]
    assert all(relative_error(a, b) > 0.05 for a, b in itertools.combinations(grads, 2))


@mark.parametrize("arm", ["vanilla", "myopic", "myopic_kv"])
def test_float32_gradient(arm):
    single, exact = (make_gpt(dtype, **mg.ARMS[arm]) for dtype in (torch.float32, torch.float64))
    exact.load_state_dict(single.state_dict())                  # the same rounded weights
    assert_agree(gradients(single, *batch(7)), gradients(exact, *batch(7)), 1e-4)


# ------------------------ the attention function
def attention_inputs(T, C=12, bias=True, dtype=torch.float64):
    """x, w, b (leaves that require gradients) and a random dy."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    leaves = [draw(2, T, C), draw(3 * C, C), draw(3 * C) if bias else None]
    return [None if t is None else t.requires_grad_() for t in leaves], draw(2, T, C)


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
    if horizon == 0:
        return mg.merge_heads(mg.two_stream_attention(q, k, v, k_past, v_past))
    lag = torch.arange(x.size(1))[:, None] - torch.arange(x.size(1))                        # (T, T)
    S = torch.where(lag <= horizon, q @ k.transpose(-2, -1), q @ k_past.transpose(-2, -1))
    A = (S / math.sqrt(q.size(-1))).masked_fill(lag < 0, -math.inf).softmax(-1)
    near = A * (lag <= horizon)
    return mg.merge_heads(near @ v + (A - near) @ v_past)


@mark.parametrize("T", [1, 2, 7])
@mark.parametrize("bias", [True, False])
@mark.parametrize("cut", ["hidden", "kv"])
@mark.parametrize("horizon", [0, 1, 2, 5, 6, 100])
def test_horizon_against_two_streams(T, bias, cut, horizon):
    inputs = attention_inputs(T, bias=bias)
    got = attention_gradients(mg.myopic_attention, *inputs, 3, horizon, cut)
    assert_agree(got, attention_gradients(oracle, *inputs, 3, horizon, cut))
    if horizon >= T - 1:
        assert_agree(got, attention_gradients(mg.myopic_attention, *inputs, 3, None, cut))


@mark.parametrize("cut, horizon", [("hidden", None), ("hidden", 0), ("kv", 0), ("hidden", 3)])
def test_fused_against_plain(monkeypatch, cut, horizon):
    assert mg.fused_serves("cpu", torch.float64, 4), "it should run in this version of torch"
    inputs = attention_inputs(33)
    names = ("plain_forward", "plain_backward", "fused_forward", "fused_backward")
    for name in names:
        monkeypatch.setattr(mg, name, Mock(wraps=getattr(mg, name)))
    calls = lambda: [getattr(mg, name).call_count for name in names]
    fused = attention_gradients(mg.myopic_attention, *inputs, 3, horizon, cut)
    assert calls() == [0, 0, 1, 1]
    monkeypatch.setattr(mg, "fused_serves", lambda *_: False)
    plain = attention_gradients(mg.myopic_attention, *inputs, 3, horizon, cut)
    assert calls() == [1, 1, 1, 1]
    assert_agree(fused, plain)


@mark.parametrize("fused_forward", [
    Mock(side_effect=RuntimeError("No available kernel")),      # it is missing
    lambda q, k, v: (v * 2, q[..., 0])])                        # it gives something else
def test_plain_serves_if_fused_fails(monkeypatch, capsys, fused_forward):
    monkeypatch.setattr(mg, "fused_forward", fused_forward)
    monkeypatch.setattr(mg, "try_fused", functools.cache(mg.try_fused.__wrapped__))   # as if new
    inputs = attention_inputs(5)
    for _ in range(2):
        got = attention_gradients(mg.myopic_attention, *inputs, 3)
        assert_agree(got, attention_gradients(oracle, *inputs, 3, 0, "hidden"))
    assert capsys.readouterr().out.count("plain matrix products serve") == 1


@mark.parametrize("fused", [True, False])
@mark.parametrize("cut, horizon", [("hidden", None), ("hidden", 0), ("kv", 2)])
def test_bfloat16(monkeypatch, fused, cut, horizon):
    monkeypatch.setattr(mg, "fused_serves", lambda *_: fused)
    leaves, dy = attention_inputs(64, C=32, dtype=torch.bfloat16)
    leaves[1].data.mul_(0.2)
    single = [t.detach().float().requires_grad_() for t in leaves]
    true = attention_gradients(mg.myopic_attention, single, dy.float(), 2, horizon, cut)
    low = attention_gradients(mg.myopic_attention, leaves, dy, 2, horizon, cut)
    with torch.autocast("cpu", torch.bfloat16):
        cast = attention_gradients(mg.myopic_attention, single, dy, 2, horizon, cut)
    assert_agree(low, true, 2e-2)
    assert_agree(cast, true, 2e-2)
    assert low["y"].dtype == cast["y"].dtype == torch.bfloat16 and cast["dx"].dtype == torch.float32


@mark.parametrize("attention, quadratic", [
    (mg.myopic_attention, False), (oracle, True)])      # the textbook way: the check can fail
def test_no_saved_tensor_has_two_T_axes(attention, quadratic):
    assert mg.fused_serves("cpu", torch.float64, 4)
    T, shapes, ((x, w, b), _) = 37, [], attention_inputs(37)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape), lambda _: None):
        attention(x, w, b, 3, 0, "hidden")
    assert shapes and any(shape.count(T) > 1 for shape in shapes) == quadratic


def test_bad_arguments_and_second_derivatives_are_refused():
    leaves, _ = attention_inputs(4)
    for settings in ((5,), (0,), (3, -1), (3, 0, "both")):
        with pytest.raises(mg.Refusal):
            mg.myopic_attention(*leaves, *settings)
    for loss in (lambda y: y.sum(), lambda y: y.square().sum()):
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss(mg.myopic_attention(*leaves, 3)), leaves, create_graph=True)


@mark.parametrize("arm", ["vanilla", "myopic", "myopic_kv", "horizon_2", "bigram"])
def test_compiled_gradient_is_the_eager_one(arm):
    model = make_gpt(n_layer=1, **mg.arm_fields(arm))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_agree(gradients(compiled, *batch(6)), gradients(model, *batch(6)), 1e-12)


def test_one_line_makes_nanogpt_myopic():
    """nanoGPT's attention, up to c_proj, as it is and with the one-line edit of the README."""
    torch.manual_seed(0)
    c_attn, x = nn.Linear(12, 36).double(), torch.randn(2, 6, 12).double().requires_grad_()
    q, k, v = (t.view(2, 6, 3, 4).transpose(1, 2) for t in c_attn(x).split(12, dim=2))
    usual = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    myopic = mg.myopic_attention(x, c_attn.weight, c_attn.bias, 3)
    assert relative_error(myopic, usual) < 1e-12
    for y, hear in ((usual, [0, 1, 2, 3, 4]), (myopic, [4])):
        dx, = torch.autograd.grad(y[:, 4].sum(), x)
        assert [j for j in range(6) if dx[:, j].norm() > 0] == hear


# ------------------------ facts about the idea
@mark.parametrize("arm, leaks", [("vanilla", True), ("myopic", False), ("myopic_kv", False)])
def test_no_loss_leaks_into_the_past(arm, leaks):
    model, (idx, targets) = make_gpt(n_layer=3, **mg.ARMS[arm]), batch(7, B=1)
    F.cross_entropy(model(idx)[0][:, 4], targets[:, 4]).backward()
    heard = model.transformer.wpe.weight.grad.norm(dim=1)                       # per position
    assert heard[4] > 0 and (heard[5:] == 0).all()
    assert (heard[:4] > 0).all() if leaks else (heard[:4] == 0).all()


def test_attention_to_oneself_alone_is_a_linear_layer():
    (x, w, b), _ = attention_inputs(6)
    alone = mg.myopic_attention(x.reshape(-1, 1, 12), w, b, 3).reshape(2, 6, 12)
    assert relative_error(alone, F.linear(x, w[24:], b[24:])) < 1e-12


@mark.parametrize("route", ["plain", "fused"])
def test_vanilla_keys_hear_every_reader_from_themselves_on(route):
    forward, backward = getattr(mg, route + "_forward"), getattr(mg, route + "_backward")
    g = torch.Generator().manual_seed(0)
    q, k, v, G = torch.randn(4, 1, 2, 6, 4, generator=g, dtype=torch.float64)
    out, lse = forward(q, k, v)
    for i, j in itertools.product(range(6), range(6)):
        only_i = G * (torch.arange(6) == i)[:, None]
        _, dk, dv = backward(only_i, q, k, v, out, lse)
        assert (dv[:, :, j].norm() > 1e-9) == (j <= i)
        assert (dk[:, :, j].norm() > 1e-9) == (j <= i and i > 0)        # reader 0 has no choice


# ------------------------ the synthetic task
def test_sample_batch_is_the_definition():
    a, b, T = 3, 4.0, 9
    draw = lambda: synthetic.sample_batch(5, T, 0.5, a, b, torch.Generator().manual_seed(0))
    xs, ys = draw()
    for s, n in itertools.product(range(5), range(T)):
        x, z = xs[s, :, 0].double(), xs[s, n, 1].item()
        past = sum(math.sin(b * x[n - i]) for i in range(1, a + 1) if n - i >= 0)
        assert z in (0, 1) and abs(ys[s, n].item() - (z * past + (1 - z) * x[n].item())) < 1e-5
    assert all(torch.equal(again, first) for again, first in zip(draw(), (xs, ys)))
    x, _ = synthetic.sample_batch(2000, 20, 0.3, generator=torch.Generator().manual_seed(1))
    assert abs(x[..., 1].mean() - 0.3) < 0.01 and abs(x[..., 0].std() - 1) < 0.01


@mark.parametrize("p", [0.1, 1.0])
def test_trivial_predictor_has_the_papers_loss(p):
    x, y = synthetic.sample_batch(4000, 64, p, generator=torch.Generator().manual_seed(0))
    assert abs(F.huber_loss(synthetic.trivial_prediction(x), y).item() / p - 1.26) < 0.03


def test_probe_finds_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    X, other = torch.randn(2, 4000, 8, generator=g, dtype=torch.float64)
    Y = torch.stack([X @ torch.arange(8.0).double() + 5, other[:, 0]], dim=1)           # (rows, 2)
    r2, estimate = synthetic.ridge_probe(X[:2000], Y[:2000], X[2000:], Y[2000:])
    assert r2[0] > 0.99 and abs(r2[1]) < 0.02 and estimate.shape == (2000, 2)
    corr = synthetic.correlations(X, Y)
    assert corr.shape == (8, 2) and corr[7, 0] > 0.5 and corr[:, 1].max() < 0.06


def test_probe_rows_line_up_with_their_inputs():
    model = synthetic.SineModel(mg.GPTConfig(6, 1, 2, 2, 8))
    x, _ = synthetic.sample_batch(3, 6, 1.0, 2)
    states, past = synthetic.probe_data(model, x, lookbacks=3)
    assert states.shape == (3, 12, 8) and past.shape == (12, 3)
    assert past[0].tolist() == x[0, [2, 1, 0], 0].double().tolist()     # n = 2: lookbacks 0, 1, 2
    assert torch.equal(states[1, 5], model.hidden_states(x)[1][1, 3].double())  # sequence 1, n = 3
    assert all(isinstance(block.mlp.act, nn.ReLU) for block in model.transformer.h)


@mark.parametrize("b", [2, 0.5])
def test_frequency_moves_to_its_goal(monkeypatch, tmp_path, b):
    drawn, original = [], synthetic.sample_batch
    monkeypatch.setattr(synthetic, "sample_batch", lambda *a: drawn.append(a) or original(*a))
    call(synthetic, tmp_path / "out", f"--arms vanilla --max_iters 10 --b {b}")
    trained = [b for n, _, _, _, b, _ in drawn if n == 16]     # 16: batch_size of smoke
    assert trained == pytest.approx([1 + (b - 1) * n / 6 for n in range(6)] + 4 * [b])


# ------------------------ training
def test_arms_share_start_and_forward_pass():
    def built(arm):
        torch.manual_seed(3)
        return mg.GPT(mg.GPTConfig(8, 11, 2, 2, 12, **mg.arm_fields(arm)))
    models = {arm: built(arm) for arm in [*mg.ARMS, "horizon_2"]}
    models["local_myopic"].teach(built("vanilla"))
    start = models["vanilla"].state_dict()
    assert all(torch.equal(p, start[n]) for m in models.values() for n, p in m.named_parameters())
    logits = {arm: model(batch(8)[0])[0] for arm, model in models.items()}
    vanilla = logits["vanilla"]
    assert all(torch.equal(logits[arm], vanilla) for arm in ("myopic", "myopic_kv", "horizon_2"))
    assert torch.allclose(logits["local_myopic"], vanilla, atol=1e-5)           # its own teacher
    assert not torch.allclose(logits["bigram"], vanilla, atol=1e-3)


def test_bigram_does_not_see_the_past():
    model, (idx, _) = make_gpt(**mg.ARMS["bigram"]), batch(6)
    other = idx.clone()
    other[:, :4] = (other[:, :4] + 1) % 11
    assert torch.equal(model(idx)[0][:, 4:], model(other)[0][:, 4:])


def test_block_size_is_kept():
    model = make_gpt(block_size=4)
    with pytest.raises(mg.Refusal, match="block_size 4"):
        model(torch.zeros(1, 5, dtype=torch.long))
    assert model.generate(torch.zeros(1, 9, dtype=torch.long), 3, top_k=2).shape == (1, 12)


def test_gradient_accumulation_is_one_large_batch():
    def trained(parts):
        model, left = make_gpt(), iter(parts)
        mg.train(model, model.configure_optimizers(0.1, 1e-2), lambda step: next(left), steps=1,
                 learning_rate=1e-2, grad_accum=len(parts))
        return dict(model.named_parameters())
    idx, targets = batch(6, B=4)
    halves = list(zip(idx.split(2), targets.split(2)))
    assert_agree(trained(halves), trained([(idx, targets)]), 1e-6)


@mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_learns(dtype):
    torch.manual_seed(0)
    model = mg.GPT(mg.GPTConfig(8, 11, 2, 2, 16, horizon=0))
    x, y = torch.arange(8).repeat(4, 1), torch.arange(1, 9).repeat(4, 1)
    before = model(x, y)[1].item()
    mg.train(model, model.configure_optimizers(0.1, 1e-2), lambda step: (x, y), steps=30,
             learning_rate=1e-2, dtype=dtype)
    assert model(x, y)[1].item() < 0.5 * before


def test_a_loss_that_is_not_finite_stops():
    model, steps = make_gpt(torch.float32), []
    def next_batch(step):
        if len(steps) == 3:
            nn.init.constant_(model.lm_head.weight, math.inf)
        return batch(6)
    optimizer = model.configure_optimizers(0.1, 1e-3)
    with pytest.raises(mg.Refusal, match=r"at step 3 \(last good: 2\).*--learning_rate"):
        mg.train(model, optimizer, next_batch, steps=9, learning_rate=1, after_step=steps.append)


# ------------------------ text and checkpoints
def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_bins(folder, tokens, names=("train", "val")):
    folder.mkdir(exist_ok=True)
    for name in names:
        np.array(tokens, dtype=np.uint16).tofile(folder / f"{name}.bin")


def call(script, out, words="", *more):
    """Call a script's main, with its smallest preset and a small text; -> the records it leaves."""
    flags = ["--preset", "smoke", "--device", "cpu", "--out_dir", out]
    if script is mg:
        lines = [f"line {n} of a small text, {n * n} and {n % 7};\n" for n in range(60)]
        flags += ["--data", write(out.with_suffix(".txt"), "".join(lines))]
    script.main([*map(str, flags), *words.split(), *map(str, more)])
    return json.loads((out / f"{script.__name__}.json").read_text())


def test_text_is_split_by_document(tmp_path):
    for n in range(25):
        write(tmp_path / "d" / f"{n:02}.txt", f"document{n} " * 5)
    write(tmp_path / "d" / "99.txt", "document3 " * 5)                          # a double
    text = mg.load_text([tmp_path / "d"])
    train, val = (set("".join(mg.spell(tokens, "byte", text.words)).split())
                  for tokens in (text.train, text.val))
    assert val == {"document0", "document10", "document20"}
    assert train.isdisjoint(val) and len(train) == 22
    one, two = (write(tmp_path / f"{n}.txt", n * 1000) for n in ("a", "b"))
    for files, sizes in (([one], (900, 100)), ([one, two], (1801, 201))):
        few = mg.load_text(files)
        assert (len(few.train), len(few.val)) == sizes


def test_words(tmp_path):
    file = write(tmp_path / "one.txt", "the cat, the dog. " * 18 + "the emu, the cat.")
    text = mg.load_text([file], "word", vocab_size=5)
    assert text.words[:2] == ["<unk>", "the"] and len(text.words) == 5
    assert mg.encode("the emu", "word", text.words).tolist() == [1, 0]
    assert "emu" not in mg.load_text([file], "word").words                      # validation only
    assert "".join(mg.spell([1, 0], "word", text.words)) == "the <unk> "


def test_bin_files_are_memory_mapped(tmp_path):
    write_bins(tmp_path, range(50))
    text = mg.load_text([tmp_path], vocab_size=50)
    assert isinstance(text.train, np.memmap) and text.kind == "bin" and text.vocab_size == 50
    for tokens in (text.train, torch.arange(50, dtype=torch.int32)):
        x, y = mg.windows(tokens, torch.tensor([0, 40]), 4)
        assert x.tolist() == [[0, 1, 2, 3], [40, 41, 42, 43]]
        assert y.tolist() == [[1, 2, 3, 4], [41, 42, 43, 44]]


def test_python_brings_its_own_text():
    documents = mg.python_documents()
    assert sum(map(len, documents)) > 1_000_000 and all("\n" in d for d in documents)


@mark.parametrize("last", [0, 4])
def test_resume_is_bitwise_the_same(tmp_path, monkeypatch, last):
    flags, save = "--n_embd 8 --save_every 4 --arms myopic --dropout 0.2", mg.save_checkpoint
    def interrupted(path, model, optimizer, step, **more):
        save(path, model, optimizer, step, **more)
        if step == last:
            raise KeyboardInterrupt
    a, b = tmp_path / "a", tmp_path / "b"
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(mg, "save_checkpoint", interrupted)
        call(mg, a, flags)
    assert stop.value.code == 130 and not (a / "myopic_gpt.json").exists()
    (resumed,), (whole,) = call(mg, a, flags), call(mg, b, flags)
    for key in ("val_loss", "train_loss", "curve", "loss_by_position"):
        assert resumed[key] == whole[key]
    got, true = (mg.load_checkpoint(next(out.glob("*.pt")))[0].state_dict() for out in (a, b))
    assert_agree(got, true, tolerance=0)


def test_evaluation_is_deterministic_with_dropout():
    model = make_gpt(dropout=0.5).train()
    first, second = (mg.token_losses(model, torch.arange(100) % 11, 5, 8)[0] for _ in range(2))
    assert torch.equal(first, second) and model.training and first.shape == (5, 8)


SEVEN = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


def nanogpt_checkpoint(path, **extra):
    """nanoGPT's file, after torch.compile, with a mask buffer as its old versions had it."""
    model = make_gpt(torch.float32)
    state = {"_orig_mod." + k: v for k, v in model.state_dict().items()}
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    torch.save(dict(model=state, optimizer={}, iter_num=7, best_val_loss=torch.tensor(2.0),
                    model_args={k: getattr(model.config, k) for k in SEVEN},
                    config=dict(dataset="x", block_size=999, learning_rate=1e-3), **extra), path)
    return model


def test_nanogpt_checkpoint_loads_and_is_trained_on(tmp_path):
    file, tokens, (idx, _) = tmp_path / "ckpt.pt", torch.arange(300) % 11, batch(8)
    model = nanogpt_checkpoint(file)
    loaded, saved = mg.load_checkpoint(file)
    assert torch.equal(loaded(idx)[0], model(idx)[0]) and saved["iter_num"] == 7
    assert loaded.config.horizon is None and list(loaded.state_dict()) == list(model.state_dict())
    write_bins(tmp_path / "data", tokens.numpy())
    flags = "--arms vanilla local_myopic --block_size 8 --vocab_size 11 --data"
    records = call(mg, tmp_path / "out", flags, tmp_path / "data", "--init_from", file)
    start = mg.token_losses(model, tokens, 32, 8)[0].mean().item()
    assert [r["arm"] for r in records] == ["vanilla", "local_myopic"]
    assert records[0]["tokens"] == "bin" and records[0]["val_loss"] < start
    assert abs(records[0]["curve"][0][2] - start) < 1e-5


def test_our_checkpoint_is_nanogpts_and_writes_text(tmp_path, capsys):
    call(mg, tmp_path / "out", "--n_embd 8 --arms myopic")
    saved = torch.load(next((tmp_path / "out").glob("*.pt")), weights_only=True)
    assert saved["config"]["horizon"] == 0 and saved["config"]["tokens"] == "byte"
    mg.GPT(mg.GPTConfig(**saved["model_args"])).load_state_dict(saved["model"], strict=True)
    assert sorted(saved["model_args"]) == sorted(SEVEN)
    layers = ["ln_f", *(f"h.{l}.{name}" for l in (0, 1) for name in (
        "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"))]
    assert set(saved["model"]) == {
        "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight",
        *(f"transformer.{layer}.{p}" for layer in layers for p in ("weight", "bias"))}
    outputs = []
    for _ in range(2):
        capsys.readouterr()
        call(mg, tmp_path / "out", "--n_embd 8 --arms myopic --sample line")
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("line") and len(outputs[0]) > 100 and outputs[0] == outputs[1]


def test_pickled_objects_are_refused_and_do_not_run(tmp_path):
    file, ran = tmp_path / "bad.pt", tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (ran,)
    nanogpt_checkpoint(file, surprise=Bomb())
    with pytest.raises(mg.Refusal, match="never run"):
        mg.load_checkpoint(file)
    assert not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists(), "the file was dangerous: the check can fail"


# ------------------------ command lines and records
def test_runs_are_recorded_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mg, "save_figure", Mock())
    run = lambda flags: call(synthetic, tmp_path / "out", "--max_iters 2 " + flags)
    first = run("--arms vanilla horizon_1 --p 0.5 1")
    assert [(r["arm"], r["p"]) for r in first] == [
        ("vanilla", 0.5), ("horizon_1", 0.5), ("vanilla", 1.0), ("horizon_1", 1.0)]
    for r in first:
        assert {"task", "seed", "steps", "seconds", "device", "torch", "code", "a", "b",
                "huber_over_p", "trivial_over_p", "probe_r2", "probe_r2_untrained"} <= r.keys()
        assert (r["huber_z0"] is None) == (r["p"] == 1)
        assert np.shape(r["probe_r2"]) == (3, 6)                                # layers, lookbacks
    assert run("--arms vanilla horizon_1 --p 0.5 1") == first
    assert "of other code" not in capsys.readouterr().out
    first[0]["code"] = "00000000"
    write(tmp_path / "out/synthetic.json", json.dumps(first))
    assert run("--arms vanilla --p 0.5") == first
    assert capsys.readouterr().out.count("of other code") == 1
    fresh, other = run("--arms vanilla --p 0.5 --fresh"), run("--arms vanilla --seed 5")
    assert len(fresh) == 4 and fresh[-1]["code"] != "00000000"
    assert fresh[-1]["huber_over_p"] == first[0]["huber_over_p"]                # the same seed
    assert other[-1]["huber_over_p"] != first[2]["huber_over_p"]                # another seed


def test_torch_compiles_every_run(tmp_path):        # it stops after eight models of one class
    compiled, backend = [], lambda graph, _: compiled.append(graph) or graph
    run = lambda s: torch.compile(make_gpt(horizon=s["seed"]), backend=backend)(*batch(4)) and {}
    args = Mock(fresh=False, plot_only=False, minutes_per_run=1, stamp=dict(device="", code=""))
    wanted = [dict(task="text", arm="myopic", seed=n, max_iters=1) for n in range(9)]
    mg.run_experiments(tmp_path / "records.json", wanted, ("seed",), run, args)
    assert len(compiled) == 9


@mark.parametrize("script, figure", [(synthetic, "precache"), (mg, "text_sizes_byte")])
def test_plot_only_redraws(tmp_path, script, figure):
    out, file = tmp_path / "out", tmp_path / f"out/{figure}.png"
    call(script, out, "--max_iters 2 --arms vanilla myopic myopic_kv")
    file.unlink()
    call(script, out, "--max_iters 2 --arms vanilla myopic myopic_kv --plot_only")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob(".part*")), "no half-written file is left"


def test_bench_measures_every_way(tmp_path, monkeypatch):
    monkeypatch.setitem(mg.BENCH, "cpu", (1, 2, 8, 64, 0, 16, 16, 32))
    mg.main(["--bench", "--device", "cpu", "--out_dir", str(tmp_path)])
    records = json.loads((tmp_path / "bench.json").read_text())
    assert [(r["what"], r["T"]) for r in records] == [
        case for case in (("sublayer", 16), ("sublayer", 32), ("step", 16)) for _ in range(7)]
    assert all(r["ms"] > 0 and (r["way"] != "vanilla" or r["quartiles"][1] == 1) for r in records)


# Flags and what the message has to say. Capitals name a file that the test below writes.
numbers = lambda text: [(f"--{n}", n.replace(" ", " is ")) for n in text.split(", ")]
BOTH = [
    *numbers("n_layer 0, n_head 0, n_embd 0, block_size 0, batch_size 0, seeds 0, max_iters -1, "
             "learning_rate -1, learning_rate nan, learning_rate inf"),
    ("--n_embd 10 --n_head 4", "n_embd is 10"), ("--arms no_such", "arm no_such is unknown"),
    ("--arms horizon_-1", "arm horizon_-1 is unknown"), ("--compile", "--compile is for"),
    ("--preset huge", "invalid choice: 'huge'"), ("--device tpu", "invalid choice: 'tpu'"),
    ("--seed x", "invalid int value: 'x'"), ("--plot_only", "no results for these settings"),
    ("--out_dir FILE", "name an --out_dir that can"), ("--out_dir DAMAGED", "results file DAMAGED")]
SYNTHETIC = [
    *numbers("p 0, p 1.5, p nan, a 0, a 12, b inf, b 0, b nan"),
    ("--arms local_myopic", "arm local_myopic is for text")]
LANGUAGE = [
    *numbers("dropout 1, vocab_size 0"), ("--tokens char", "invalid choice: 'char'"),
    ("--data MISSING", "--data MISSING"), ("--data EMPTY", "--data EMPTY holds no text"),
    ("--data LATIN", "--data LATIN"), ("--data FILE", "block_size 16 is not below 1, the size"),
    ("--data BINS", "--data BINS holds token 60000"), ("--data HALF", "val.bin: [Errno 2]"),
    ("--init_from MISSING", "checkpoint MISSING"), ("--init_from FILE", "checkpoint FILE"),
    ("--init_from LONG", "byte tokens do not fit LONG"),
    ("--init_from LONG --data GOOD --vocab_size 11", "do not fit block_size 8"),
    ("--init_from CUT", """checkpoint CUT cannot be used (Refusal("cut is 'middle'"""),
    ("--arms local_myopic", "arm local_myopic needs the trained"),
    ("--sample x", "vanilla_byte_2x32_seed0.pt cannot be used"),
    ("--sample= --init_from OURS", "--sample is empty")]


@mark.parametrize("script, flags, said", [
    *((synthetic, *case) for case in BOTH + SYNTHETIC), *((mg, *case) for case in BOTH + LANGUAGE)])
def test_bad_input_is_refused(tmp_path, capsys, script, flags, said):
    write(tmp_path / "FILE", "too short")
    write(tmp_path / "EMPTY", " ")
    damaged = write(tmp_path / "DAMAGED" / f"{script.__name__}.json", "[{]")
    (tmp_path / "LATIN").write_bytes("déjà vu".encode("latin-1") * 100)
    write_bins(tmp_path / "BINS", [60000] * 100)
    write_bins(tmp_path / "HALF", [60000] * 100, ["train"])
    write_bins(tmp_path / "GOOD", [7] * 100)
    nanogpt_checkpoint(tmp_path / "LONG")                                       # block_size 8
    saved, words = torch.load(tmp_path / "LONG", weights_only=True), [chr(n) for n in range(256)]
    torch.save({**saved, "config": dict(cut="middle")}, tmp_path / "CUT")
    torch.save({**saved, "config": dict(tokens="byte", words=words)}, tmp_path / "OURS")
    place = lambda text: [str(tmp_path / w) if w.isupper() else w for w in text.split()]
    with pytest.raises(SystemExit) as stop:
        call(script, tmp_path / "out", "--max_iters 1", *place(flags))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "it/s" not in err and "Traceback" not in err
    message = err[err.index("error: "):].strip()
    assert "\n" not in message and " ".join(place(said)) in message
    assert damaged.read_text() == "[{]" and not list(tmp_path.glob("out/*.json"))


@mark.parametrize("script", [synthetic, mg])
def test_bad_input_from_the_shell(script, tmp_path):
    run = subprocess.run([sys.executable, script.__file__, "--preset", "smoke", "--n_embd", "7"],
                         cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "n_embd is 7" in run.stderr and "Traceback" not in run.stderr
