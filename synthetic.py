"""A task where planning ahead pays: who computes sin(b x_n) before anyone asks for it?

    x_n ~ N(0, 1)    z_n ~ Bernoulli(p)    y_n = z_n sum_{i=1..a} sin(b x_{n-i}) + (1 - z_n) x_n

Where z_n = 1 the answer needs `a` sines of past inputs. A layer of attention can add up `a` values,
but it cannot take `a` sines first. A model of two layers can do it if layer 1 computes sin(b x_n)
at every position n, although n itself has no use for it, and layer 2 adds up what lies ready. That
is pre-caching: it takes gradient from later losses, and myopic training stops that.

    python synthetic.py --preset demo        # an easy sine: vanilla learns it, myopic does not
    python synthetic.py                      # the paper's sine, a small model: minutes on two cores
    python synthetic.py --preset full        # the paper's task and model, four values of p

Evidence: (1) the loss, beside that of the predictor (1 - z_n) x_n; (2) a linear probe that reads
sin(b x_{n-i}) out of the residual stream, beside the same probe before training; (3) exchange what
layer 1 wrote at one position, and see which later answers move. Task, model and probe: Wu, Morris,
Levine (2024), arXiv 2404.00859, section 4.

Shapes as in myopic_gpt.py; also L = n_layer, and K lookbacks i = 0 .. K-1.
"""

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.colors import LogNorm

import myopic_gpt as mg


# ------------------------ a run
@dataclass(frozen=True)
class SineRun(mg.Run):
    """A run on the sine task. Training starts with an easier one (see curriculum) in every arm."""

    p: float = 1.0
    a: int = mg.setting(10, "how many sines are summed", 1)
    b: float = mg.setting(10.0, "frequency of the sine", 1e-6)
    b_start: float = mg.setting(2.0, "the frequency that training starts with", 1e-6)
    b_hold: float = mg.setting(0.15, "share of the steps with b_start", most=0.99)
    b_full: float = mg.setting(0.65, "share of the steps after which b is reached", 1e-6, 1)
    x_wide: float = mg.setting(1.5, "standard deviation of x at first", 1e-6)
    x_until: float = mg.setting(0.8, "share of the steps with x_wide", most=1)
    embd_std: float = mg.setting(0.1, "of the embedding at the start")
    wave_std: float = mg.setting(0.1, "of the positions at the start, sines and cosines")
    eval_sequences: int = mg.setting(2048, "sequences that are evaluated", 64)

    def __post_init__(self):
        mg.require(0.01 <= self.p <= 1, f"p is {self.p}: give a number from 0.01 to 1")
        super().__post_init__()
        mg.require(self.n_layer > 1, f"n_layer is {self.n_layer}: the task takes two layers")
        mg.require(self.a < self.block_size, f"a is {self.a}: make it less than block_size")
        mg.require(self.b_hold < self.b_full, f"b_hold is {self.b_hold}: make it less than b_full")
        text_only = self.config(1).past == "frozen"
        mg.require(not text_only, f"arm {self.arm} is for text: leave it out, or use myopic_gpt.py")


SHARED = dict(
    n_layer=2,
    n_head=2,
    n_embd=64,
    batch_size=32,
    learning_rate=5e-3,
    beta1=0.99,
    beta2=0.998,
    weight_decay=0.0,
    muon="attn",
    muon_rate=5e-3,
    muon_decay=1.0,
    decay_from=0.65,
)
DEMO = dict(a=3, b=4.0, x_wide=1.0, block_size=12, n_embd=32, batch_size=64, max_iters=300)
THREE = ["vanilla", "myopic", "myopic_kv"]
QUICK = SineRun(block_size=32, max_iters=2400, **SHARED)
PRESETS = {
    "demo": dict(
        run=replace(QUICK, eval_sequences=1024, **DEMO), arms=THREE[:2], seeds=1, seconds=5, p=[1.0]
    ),
    "quick": dict(run=QUICK, arms=THREE, seeds=3, seconds=45, p=[1.0]),
    "full": dict(
        run=replace(QUICK, block_size=64, n_embd=128, max_iters=6000, eval_sequences=8192),
        arms=THREE,
        seeds=3,
        seconds=560,
        p=[0.01, 0.1, 0.3, 1.0],
    ),
}
# Huber / p of the paper's runs: one seed, a = b = 10 (at p = 1 its myopic model has 3 layers).
PAPER = {
    0.01: dict(vanilla=0.096, myopic=1.10),
    0.1: dict(vanilla=0.016, myopic=0.97),
    0.3: dict(vanilla=0.0030, myopic=1.03),
    1.0: dict(vanilla=0.0074),
}
LOOKBACKS = 16


# ------------------------ the task and the model
def sample_batch(batch_size, seq_len, p, a=10, b=10.0, generator=None, x_std=1.0):
    """Draw sequences of D_p: x (B, T, 2), x[..., 0] = x_n and x[..., 1] = z_n, and y (B, T).

    y_n = z_n sum_{i=1..a} sin(b x_{n-i}) + (1 - z_n) x_n; terms before position 0 are 0. The batch
    is made on the generator's device; x_std is for a curriculum. Source: Wu, Morris, Levine (2024),
    section 4.1."""
    device = None if generator is None else generator.device
    x = x_std * torch.randn(batch_size, seq_len, generator=generator, device=device)  # (B, T)
    z = (torch.rand(batch_size, seq_len, generator=generator, device=device) < p).float()
    sines = F.pad(torch.sin(b * x), (a, 0))[:, :-1]  # (B, a + T - 1)
    y = z * sines.unfold(1, a, 1).sum(-1) + (1 - z) * x  # (B, T)
    return torch.stack([x, z], dim=-1), y


def sample_task(run, count, seed, device="cpu"):
    """`count` sequences of the run's own task; the same for the same seed, on any device. Seeds
    from 10,000 on are for evaluation; training draws from 1,000 + the run's seed."""
    generator = torch.Generator().manual_seed(seed)
    x, y = sample_batch(count, run.block_size, run.p, run.a, run.b, generator)
    return x.to(device), y.to(device)


def trivial_prediction(x):
    """(1 - z_n) x_n: right where z_n = 0, and knows of no sine. x (B, T, 2) -> (B, T)."""
    return (1 - x[..., 1]) * x[..., 0]


def curriculum(run, step):
    """The task of a training step: its b, its p, and the standard deviation of its x.

    At first b = b_start and every answer asks for the sines, so that attention finds its window;
    then b rises in a straight line until b_full. x is drawn wider until x_until, so that the rare
    large |x| are learned before attention has learned to avoid them."""
    done = step / run.max_iters
    rise = (done - run.b_hold) / (run.b_full - run.b_hold)
    b = run.b_start + (run.b - run.b_start) * min(1, max(0, rise))
    return b, run.p if rise > 0 else 1.0, run.x_wide if done < run.x_until else 1.0


class SineModel(mg.GPT):
    """GPT with ReLUs, a linear embedding of (x, z) and a linear read-out of one number.

    Learned positions start as sines (even channels) and cosines (odd ones) whose mean square is
    wave_std^2: channel c goes through T^(-c/C) radians per position."""

    def __init__(self, config, embd_std=0.1, wave_std=0.1):
        super().__init__(config)
        for block in self.transformer.h:
            block.mlp.act = nn.ReLU()
        self.transformer.wte = nn.Linear(2, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, 1)
        for layer, std in ((self.transformer.wte, embd_std), (self.lm_head, 0.02)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        T, c = config.block_size, torch.arange(config.n_embd)
        angle = torch.arange(T)[:, None] * T ** (-c / len(c)) + math.pi / 2 * (c % 2)  # (T, C)
        self.transformer.wpe.weight.data.copy_(math.sqrt(2) * wave_std * angle.sin())

    def forward(self, x, y=None):
        """x (B, T, 2), y (B, T) -> prediction (B, T), Huber loss (delta 1) or None."""
        guess = self.resume(self.hidden_states(x)[-1], len(self.transformer.h))
        return guess, None if y is None else F.huber_loss(guess.to(y.dtype), y)

    def resume(self, state, layer):
        """The residual stream after `layer` blocks (B, T, C) -> prediction (B, T)."""
        for block in self.transformer.h[layer:]:
            state = block(state)
        return self.lm_head(self.transformer.ln_f(state)).squeeze(-1)


def make_model(run):
    """The untrained model of a run: the same start in every arm."""
    torch.manual_seed(run.seed)
    return SineModel(run.config(1), run.embd_std, run.wave_std)


# ------------------------ measurements
def r_squared(estimate, truth):
    """1 - squared error / squared distance to the mean, for each column: (rows, K) -> (K,)."""
    return 1 - (truth - estimate).square().sum(0) / (truth - truth.mean(0)).square().sum(0)


@torch.no_grad()
def probe_rows(model, x):
    """A row for each position, of each sequence, with K inputs so far, its own included.

    x (B, T, 2) -> residual stream (L + 1, rows, C), past inputs x_{n-i} (rows, K); float64, CPU."""
    T = x.size(1)
    K = min(LOOKBACKS, T // 2)
    states = torch.stack(model.hidden_states(x))[:, :, K - 1 :].flatten(1, 2)  # (L + 1, rows, C)
    past = torch.stack([x[:, K - 1 - i : T - i, 0] for i in range(K)], dim=-1)  # (B, T - K + 1, K)
    return states.cpu().double(), past.flatten(0, 1).cpu().double()


def fit_probe(states, targets, ridge=1e-3):
    """Ridge regression of targets (rows, K) on states (rows, C) -> a function of states."""
    mean, scale, centre = states.mean(0), states.std(0) + 1e-9, targets.mean(0)
    X = (states - mean) / scale  # (rows, C)
    penalty = ridge * len(X) * torch.eye(X.size(1), dtype=X.dtype)
    weights = torch.linalg.solve(X.T @ X + penalty, X.T @ (targets - centre))  # (C, K)

    def read(states):
        return (states - mean) / scale @ weights + centre  # (rows, K)

    return read


def probe_model(model, run, b, count, device):
    """What a linear probe reads of sin(b x_{n-i}), held out and centred.

    -> R^2 [layer][lookback], layer 0 the embedding, l that after block l; then for layer 1 and the
    position's own x: x (rows,), estimate (rows,)."""
    states, past = probe_rows(model, sample_task(run, count // 2, 20_000, device)[0])
    states_test, past_test = probe_rows(model, sample_task(run, count // 2, 20_001, device)[0])
    r2 = []
    for layer, (X, X_test) in enumerate(zip(states, states_test)):
        estimate = fit_probe(X, torch.sin(b * past))(X_test)
        r2.append(r_squared(estimate, torch.sin(b * past_test)).tolist())
        if layer == 1:
            x, shown = past_test[:, 0], estimate[:, 0]
    return r2, x.numpy(), shown.numpy()


@torch.no_grad()
def patch(model, run, count, device):
    """Cause and effect: at one position n of each sequence, put in place of the state after block 1
    the one that the same model has there with another x. Answers i later that need the sine (z = 1)
    should move by sin(b x') - sin(b x) for i = 1 .. a, and by nothing else. -> slope and un-centred
    correlation of the answer's move with that, for i = 0 .. K - 1. (The state holds x, too: with
    a = 1 a reader could take the sine itself; of ten x's at once, two layers cannot.)"""
    x, _ = sample_task(run, count, 30_000, device)
    K, rows = min(LOOKBACKS, run.block_size // 2), torch.arange(count, device=device)
    generator = torch.Generator().manual_seed(30_001)
    n = torch.randint(run.block_size - K, (count,), generator=generator).to(device)
    other = x.clone()
    other[rows, n, 0] = torch.randn(count, generator=generator).to(device)
    state = model.hidden_states(x)[1]  # (B, T, C)
    patched = state.clone()
    patched[rows, n] = model.hidden_states(other)[1][rows, n]
    move = model.resume(patched, 1) - model.resume(state, 1)  # (B, T)
    due = torch.sin(run.b * other[rows, n, 0]) - torch.sin(run.b * x[rows, n, 0])  # (B,)
    slopes, correlations = [], []
    for i in range(K):
        asked = x[rows, n + i, 1] == 1
        got, want = move[rows, n + i][asked], due[asked]
        slopes.append(((got @ want) / (want @ want + 1e-12)).item())
        correlations.append(((got @ want) / (got.norm() * want.norm() + 1e-12)).item())
    return slopes, correlations


EDGES = np.arange(0, 3.5, 0.5)  # of bins of |x|, the last one open


@torch.no_grad()
def attention_by_x(model, run, count, device):
    """Mean attention of block 2 from readers with z = 1 to a token in their window, by its |x|."""
    x, _ = sample_task(run, count, 40_000, device)
    block, state, T = model.transformer.h[1], model.hidden_states(x)[1], run.block_size
    q, k, _ = mg.split_heads(block.attn.c_attn(block.ln_1(state)), run.n_head)  # (B, nh, T, hs)
    S = (q @ k.mT / math.sqrt(q.size(-1))).float()  # (B, nh, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)
    P = S.masked_fill(future, -math.inf).softmax(-1).mean(1)  # (B, T, T)
    lag = torch.arange(T)[:, None] - torch.arange(T)  # (T, T)
    inside = ((lag >= 1) & (lag <= run.a)).to(device) & (x[:, :, 1:] == 1)  # (B, T, T)
    size = x[:, None, :, 0].abs().expand_as(P)[inside].cpu().numpy()
    return mean_in_bins(size, P[inside].cpu().numpy())


def mean_in_bins(size, values):
    """Mean of the values in each bin of |x|, None where there are none."""
    bins = [values[np.digitize(size, EDGES) == n] for n in range(1, len(EDGES) + 1)]
    return [float(inside.mean()) if inside.size else None for inside in bins]


def huber_losses(model, x, y, p):
    """Huber / p of the model and of the trivial predictor on the same sequences, and the ratio."""
    with torch.no_grad():
        guess = torch.cat([model(part)[0] for part in x.split(512)])
    huber, trivial = F.huber_loss(guess, y).item(), F.huber_loss(trivial_prediction(x), y).item()
    return dict(huber_over_p=huber / p, trivial_over_p=trivial / p, ratio=huber / trivial)


# ------------------------ one run
def train_sine(run, device, tell):
    """Train one model -> the model, the numbers of its record, arrays for pictures."""
    model = make_model(run).to(device)
    x, y = sample_task(run, run.eval_sequences, 10_000, device)
    batches = torch.Generator().manual_seed(1_000 + run.seed)
    r2_untrained, _, estimate_untrained = probe_model(model, run, run.b, len(x), device)
    curve, film, gradient_parts = [], [], []

    def next_batch(step):  # the same in every arm
        b, p, x_std = curriculum(run, step)
        x, y = sample_batch(run.batch_size, run.block_size, p, run.a, b, batches, x_std)
        return x.to(device), y.to(device)

    def after_step(step):
        if step % max(1, run.max_iters // 24) == 0 or step == run.max_iters:
            b, _, _ = curriculum(run, step)
            curve.append([step, huber_losses(model, x[:512], y[:512], run.p)["ratio"]])
            _, film_x, estimate = probe_model(model, run, b, 256, device)
            film.append([film_x[:300], estimate[:300]])
            if run.arm == "vanilla":
                at_this_b = sample_task(replace(run, b=b), 128, 70_000, device)
                gradient_parts.append([step, *diagonal_and_rest(model, *at_this_b)])

    after_step(0)
    optimizers = model.configure_optimizers(run)
    mg.train(model, optimizers, next_batch, run, tell, after_step)
    finite = np.isfinite(curve).all() and np.isfinite(gradient_parts).all()
    mg.require(finite, f"{run.arm}: loss or gradient is not finite: lower --learning_rate")
    r2, probe_x, estimate = probe_model(model, run, run.b, len(x), device)
    slopes, correlations = patch(model, run, len(x), device)
    error = np.sin(run.b * probe_x) - estimate
    numbers = huber_losses(model, x, y, run.p) | dict(
        probe_r2=r2,
        probe_r2_untrained=r2_untrained,
        patch_slope=slopes,
        patch_correlation=correlations,
        attention_by_x=attention_by_x(model, run, min(512, len(x)), device),
        probe_error_by_x=mean_in_bins(np.abs(probe_x), error**2),
        curve=curve,
    )
    if run.arm == "vanilla":
        start = lag_shares(make_model(run).to(device), x[:128], y[:128])
        shares = dict(start=start, end=lag_shares(model, x[:128], y[:128]))
        numbers |= dict(lag_share=shares, gradient_parts=gradient_parts)
    arrays = dict(
        probe_x=probe_x[:400],
        estimate=estimate[:400],
        estimate_untrained=estimate_untrained[:400],
        film=np.array(film, dtype=np.float32),  # (frames, 2, 300)
    )
    return model, numbers, arrays


# ------------------------ whom the gradient serves
def position_losses(model, state, y):
    """The loss at every position (B, T), from the state after the last block (B, T, C)."""
    if isinstance(model, SineModel):
        guess = model.resume(state, len(model.transformer.h))
        return F.huber_loss(guess, y, reduction="none")
    logits = model.lm_head(model.transformer.ln_f(state))  # (B, T, V)
    return F.cross_entropy(logits.transpose(1, 2), y, reduction="none")


def gradient_tables(model, x, y):
    """Two tables (2, T, T): of the embedding, and of the state after layer 1.

    Entry (i, j): root mean square, over sequences and channels, of the gradient of the loss at i
    with respect to the state at j. One backward pass per row."""
    states, rows = model.hidden_states(x), []
    losses = position_losses(model, states[-1], y)  # (B, T)
    for i in range(x.size(1)):
        d_states = torch.autograd.grad(losses[:, i].sum(), states[:2], retain_graph=True)
        rows.append(torch.stack(d_states).square().mean((1, 3)).sqrt())  # (2, T)
    return torch.stack(rows, dim=1).cpu().numpy()


def gradients_by_lag(model, x, y):
    """The gradient of every block's W_K and W_V, split by lag = reader - writer.

    -> (L, T, 2C, C): part [l, lag] is what the readers `lag` later want of them; the parts of all
    lags add up to the gradient of the mean loss."""
    n_head, state, seen = model.config.n_head, model.hidden_states(x)[0].detach(), []
    for block in model.transformer.h:  # the model's forward pass, kept open at its attention
        normed, c_attn = block.ln_1(state), block.attn.c_attn
        y_attn = mg.myopic_attention(normed, c_attn.weight, c_attn.bias, n_head, horizon=None)
        seen.append((normed, c_attn, y_attn))
        state = state + block.attn.c_proj(y_attn)
        state = state + block.mlp(block.ln_2(state))
    loss = position_losses(model, state, y).mean()
    d_ys = torch.autograd.grad(loss, [y_attn for _, _, y_attn in seen])
    layers = []
    for (normed, c_attn, _), d_y in zip(seen, d_ys):
        with torch.no_grad():
            q, k, v = mg.split_heads(c_attn(normed), n_head)  # (B, nh, T, hs)
            out, lse = mg.plain_forward(q, k, v)
            (G,) = mg.split_heads(d_y, n_head, parts=1)
            parts = []
            for lag in range(x.size(1)):
                near = mg.near_gradients(G, q, k, v, out, lse, lag, first=lag)
                d_kv = mg.merge_heads(*near)  # (B, T, 2C)
                parts.append(d_kv.flatten(0, 1).T @ normed.flatten(0, 1))
            layers.append(torch.stack(parts))  # (T, 2C, C)
    return torch.stack(layers)


def lag_shares(model, x, y):
    """How much of this batch's gradient comes from readers, in that layer, `lag` later:
    [layer][W_K or W_V][signed or size], (T,) each. Signed, <g_lag, g> / |g|^2, they add up to 1;
    of size, |g_lag| / sum of |g_lag|, too."""
    layers = []
    for parts in gradients_by_lag(model, x, y):  # (T, 2C, C)
        row = []
        for part in parts.chunk(2, dim=1):  # W_K, W_V: (T, C, C)
            whole, sizes = part.sum(0), part.norm(dim=(1, 2))
            signed = (part * whole).sum((1, 2)) / (whole.square().sum() + 1e-30)
            shares = torch.stack([signed, sizes / (sizes.sum() + 1e-30)])  # (2, T)
            row.append(np.round(shares.tolist(), 4).tolist())
        layers.append(row)
    return layers


def diagonal_and_rest(model, x, y):
    """Norm of the diagonal part of the gradient, norm of the rest, and the cosine between them."""
    trained_with, parts = model.config.horizon, []
    for horizon in (0, None):
        model.config.horizon = horizon  # every block shares this config
        _, loss = model(x, y)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        parts.append(torch.cat([g.flatten() for g in grads]))
    model.config.horizon = trained_with
    diagonal, rest = parts[0], parts[1] - parts[0]
    cosine = F.cosine_similarity(diagonal, rest, dim=0)
    return [diagonal.norm().item(), rest.norm().item(), cosine.item()]


# ------------------------ figures: every one for the runs of a single p
def per_seed(found, arm, key):
    """[record[key] of every seed] of one arm."""
    return [record[key] for run, record in found.items() if run.arm == arm]


def arms_of(found):
    return list(dict.fromkeys(run.arm for run in found))


def about(found):
    """What the runs have in common, for captions."""
    run, n = next(iter(found)), len({run.seed for run in found})
    task = f"p = {run.p:g}, a = {run.a}, b = {run.b:g}; T = {run.block_size}, {run.n_embd} channels"
    seeds = f"mean and standard deviation over at most {n} seeds" if n > 1 else "one seed"
    return f"{task}; {run.max_iters} steps of {run.batch_size} sequences; {seeds}"


def draw_bars(ax, lines, **labels):
    """{name: [y of each seed]} -> bars side by side at 0, 1, 2, ...: mean, standard deviation."""
    width = 0.8 / len(lines)
    for n, (arm, runs) in enumerate(lines.items()):
        colour, _, marker = mg.LOOKS[arm]
        y = np.array(runs)  # (seeds, K)
        at, sd = np.arange(y.shape[1]) + (n + 0.5) * width - 0.4, y.std(0, ddof=len(y) > 1)
        ax.bar(at, y.mean(0), width, yerr=sd, color=colour, label=arm, error_kw=dict(lw=0.8))
        ax.plot(at, y.mean(0), marker, markersize=2, color=colour)  # a bar of 0 is seen, too
    ax.set(**labels)


def plot_evidence(found, out_dir):
    """Who learns the task, and what is in the residual stream after each layer."""
    run, record = next(iter(found.items()))
    K = len(record["patch_slope"])
    fig, ((left, middle, right),) = mg.new_figure(3, width=4.8, height=3.4)
    curves = {
        arm: [[ratio for _, ratio in curve] for curve in per_seed(found, arm, "curve")]
        for arm in arms_of(found)
    }
    left.axhline(1, color="#999999", linewidth=0.8)
    mg.draw_lines(left, [step for step, _ in record["curve"]], curves, yscale="log")
    ends = [f"{arm} {np.mean(per_seed(found, arm, 'ratio')):.2f}" for arm in arms_of(found)]
    left.set_title(f"Who learns it: {', '.join(ends[:2])}")
    left.set(xlabel="training steps", ylabel="loss / trivial predictor's")
    for layer, ax in ((1, middle), (2, right)):
        shown = {
            arm: [r2[layer] for r2 in per_seed(found, arm, "probe_r2")] for arm in arms_of(found)
        }
        untrained = per_seed(found, run.arm, "probe_r2_untrained")
        shown["untrained"] = [r2[layer] for r2 in untrained]
        draw_bars(ax, shown, title=f"Sines a probe reads after layer {layer}")
        ax.set(xlabel="lookback i of sin(b·x)", ylabel="R² of the probe", xticks=range(0, K, 5))
        ax.axvspan(0.5, run.a + 0.5, color="#ffe9a8", zorder=0, label="what the answer needs")
    middle.legend(fontsize=7)
    caption = "\nloss of the true task: it may rise while training is on the easier one (smaller b)"
    mg.save_figure(fig, out_dir / "precache.png", about(found) + caption)


def plot_sine(found, arrays, out_dir):
    """The layer-1 probe's estimate of sin(b x_n), drawn over the true sine."""
    run = next(iter(found))
    panels = {arm: shown["estimate"] for arm, shown in arrays.items()}
    first = next(iter(arrays.values()))
    panels["untrained"] = first["estimate_untrained"]
    grid = np.linspace(-2.5, 2.5, 400)
    fig, (row,) = mg.new_figure(len(panels), width=2.9, height=2.7, sharey=True)
    for ax, (arm, estimate) in zip(row, panels.items()):
        colour, _, _ = mg.LOOKS[arm]
        ax.plot(grid, np.sin(run.b * grid), color="#bbbbbb", linewidth=1)
        ax.plot(first["probe_x"], estimate, ".", markersize=3, color=colour)
        ax.set(title=arm, xlabel="x at n", xlim=(-2.5, 2.5), ylim=(-1.5, 1.5))
    row[0].set_ylabel(f"sin({run.b:g}·x)")
    caption = "dots: what a linear probe of layer 1 reads at position n; grey: the true sine; "
    mg.save_figure(fig, out_dir / "precache_sine.png", caption + f"seed {run.seed}")


def plot_sequence(found, models, out_dir):
    """One sequence, position by position: what layer 1 carries, what each answer needs and gets."""
    run = next(iter(found))
    x, y = sample_task(run, 512, 50_000)
    sines, n = torch.sin(run.b * x[..., 0]), np.arange(run.block_size)
    fig, axes = mg.new_figure(1, 3, width=11, height=2, sharex=True)
    (top,), (middle,), (low,) = axes
    top.bar(n, x[0, :, 0].numpy(), color="#999999")
    middle.bar(n, sines[0].numpy(), color="#dddddd", label="true")
    low.bar(n, y[0].numpy(), color="#dddddd", label="needed")
    for arm, model in models.items():
        colour, _, marker = mg.LOOKS[arm]
        with torch.no_grad():
            state = model.hidden_states(x)[1].double()  # (B, T, C)
            answer, _ = model(x[:1])
        read = fit_probe(state[1:].flatten(0, 1), sines[1:].flatten()[:, None].double())
        middle.plot(n, read(state[0])[:, 0], marker, color=colour, label=f"read in {arm}")
        low.plot(n, answer[0], marker, color=colour, label=arm)
    top.set(title="One sequence: whose layer 1 carries the sine of its own x?", ylabel="x")
    middle.set_ylabel(f"sin({run.b:g}·x)")
    low.set(xlabel=f"position n; where z = 1 an answer is the sum of the {run.a} sines before it")
    low.set_ylabel("answer")
    for ax in (middle, low):
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    caption = f"held out; p = {run.p:g}, seed {run.seed}"
    mg.save_figure(fig, out_dir / "precache_sequence.png", caption)


def plot_patch(found, out_dir):
    """Cause and effect: how far answers move when layer 1's state at one position is exchanged."""
    run = next(iter(found))
    slopes = {arm: per_seed(found, arm, "patch_slope") for arm in arms_of(found)}
    inside = np.mean([slope[1 : run.a + 1] for slope in slopes[run.arm]])
    correlations = {arm: per_seed(found, arm, "patch_correlation") for arm in arms_of(found)}
    starts = [make_model(other) for other in found if other.arm == run.arm]
    untrained = [patch(model, run, min(run.eval_sequences, 2048), "cpu") for model in starts]
    slopes["untrained"], correlations["untrained"] = zip(*untrained)
    fig, ((left, right),) = mg.new_figure(2, width=5.5)
    draw_bars(left, slopes, ylabel="slope: moved / expected")
    draw_bars(right, correlations, ylabel="correlation")
    for ax in (left, right):
        ax.axvspan(0.5, run.a + 0.5, color="#ffe9a8", zorder=0)
        ax.set_xlabel("answers so many positions later")
    left.legend(fontsize=7)
    fig.suptitle(f"One state exchanged: {run.arm}'s answers move by {inside:.2f} of what is due")
    caption = "shaded: the answers that sum that sine\n" + about(found)
    mg.save_figure(fig, out_dir / "precache_patch.png", caption)


def draw_table(ax, table, title):
    """A table of gradients as a heat map; what is exactly zero stays white."""
    top = table.max()
    image = ax.imshow(np.where(table > 0, table / top, np.nan), norm=LogNorm(1e-4, 1))
    ax.set(title=title, xlabel="position j", ylabel="loss at position i")
    return image


def plot_gradients(model, x, y, path, caption):
    """Whom the gradient serves: one trained model, the backward passes of three arms."""
    fig, axes = mg.new_figure(3, 2, width=3.6, height=3.2)
    for (top, low), arm in zip(axes.T, ("vanilla", "horizon_4", "myopic")):
        vars(model.config).update(mg.arm_fields(arm))  # every block shares this config
        embedding, layer_1 = gradient_tables(model, x, y)
        draw_table(top, embedding, f"{arm}, embedding")
        image = draw_table(low, layer_1, f"{arm}, after layer 1")
    vars(model.config).update(mg.arm_fields("vanilla"))
    fig.colorbar(
        image, ax=axes, label="gradient of loss i by the state at j, of its panel's largest"
    )
    fig.suptitle("Which losses pull at position j: all later ones, near ones, its own")
    mg.save_figure(fig, path, f"white: exactly zero; vanilla's weights; {caption}")


def plot_lags(shares, path, caption, parts=None):
    """Whom W_K and W_V serve, by lag: figure and table; shares: of every seed, {"start": what
    lag_shares gives, "end": ...}. parts: the two parts of the gradient while training."""
    stages = {stage: np.array([share[stage] for share in shares]) for stage in ("start", "end")}
    _, layers, _, _, T = stages["end"].shape  # (seeds, L, W_K or W_V, signed or size, T)
    counted = (T - np.arange(T)) / (T * (T + 1) / 2)
    fig, axes = mg.new_figure(layers + (parts is not None), 2, width=4.2, height=3)
    rows = [["counting terms", *lag_sums(counted[None])]]
    for layer, row in np.ndindex(layers, 2):
        ax, name = axes[row, layer], f"W_{'KV'[row]}, layer {layer + 1}"
        for stage, style in (("start", ":"), ("end", "-")):
            signed = stages[stage][:, layer, row, 0]  # (seeds, T)
            mean, sd = signed.mean(0), signed.std(0, ddof=len(signed) > 1)
            ax.plot(mean, style, color="#0072B2", label=f"at the {stage}")
            ax.fill_between(range(T), mean - sd, mean + sd, color="#0072B2", alpha=0.2, lw=0)
            rows.append([f"{name}, {stage}", *lag_sums(signed)])
        by_size = stages["end"][:, layer, row, 1].mean(0)
        ax.plot(by_size, color="#D55E00", linewidth=0.8, label="at the end, by size")
        ax.plot(counted, "--", color="#999999", label="counting terms")
        ax.set(title=name, xlabel="lag: reader − writer")
    axes[0, 0].set_ylabel("share of the gradient")
    axes[0, 0].legend(fontsize=7)
    if parts is not None:
        draw_parts(*axes[:, -1], *parts)
    fig.suptitle("Whom W_K and W_V serve: trained (solid), not every reader alike (grey)")
    mg.save_figure(fig, path, f"vanilla; shares add up to 1, signed (blue) or by size; {caption}")
    header = ["share of the gradient", "of itself", "of readers 1–4 later", "1–10 later"]
    mg.print_table("Whom W_K and W_V serve", header, rows, caption)


def lag_sums(signed):
    """Shares (seeds, T) -> cells: the sums over lag 0, lags 1 to 4, lags 1 to 10."""
    return [mg.mean_sd(signed[:, lags].sum(1)) for lags in (slice(1), slice(1, 5), slice(1, 11))]


def draw_parts(top, low, steps, diagonal, rest, cosine):
    top.plot(steps, diagonal, "--", color="#D55E00", label="diagonal: own losses")
    top.plot(steps, rest, color="#0072B2", label="the rest: later losses")
    top.set(title="Two parts of the gradient", yscale="log", ylabel="norm")
    top.legend(fontsize=7)
    low.plot(steps, cosine, color="k")
    low.set(title="Do they agree?", ylabel="cosine", xlabel="training steps", ylim=(-1, 1))


def plot_text_gradients(out_dir):
    """The same two figures for the language model whose records are in this folder, if any."""
    records = mg.read_records(out_dir / "text.jsonl", mg.TextRun)
    runs = [run for run in records if run.arm == "vanilla" and run.tokens == "byte"]
    paths = [mg.arrays_path(out_dir, run) for run in runs]
    kept = [(run, np.load(path)) for run, path in zip(runs, paths) if path.exists()]
    if not kept or "weights.lm_head.weight" not in kept[-1][1]:
        return
    run, arrays = kept[-1]
    torch.manual_seed(run.seed)
    model = mg.GPT(run.config(256))
    ids = torch.tensor([[ord(letter or "\0") for letter in row] for row in arrays["tokens"]])
    x, y = ids[:, :-1], ids[:, 1:]
    start = lag_shares(model, x, y)
    load_weights(model, arrays)
    shares = [dict(start=start, end=lag_shares(model, x, y))]
    caption = f"text, {run.max_iters} steps, seed {run.seed}"
    plot_gradients(model, x, y, out_dir / "text_gradients.png", caption)
    plot_lags(shares, out_dir / "text_lags.png", caption)


def variants(base, path):
    """{what differs: record} of other recipes for the vanilla run `base` in the same file."""
    others = {}
    for run, record in mg.read_records(path, SineRun).items():
        theirs = {f.name: getattr(run, f.name) for f in fields(run)}
        differing = [name for name, value in theirs.items() if value != getattr(base, name)]
        task = {"arm", "seed", "p", "a", "b", "block_size"}
        if differing and task.isdisjoint(differing):
            others[", ".join(f"{name} {theirs[name]}" for name in differing)] = record
    return others


def plot_trap(found, others, out_dir):
    """Why the task is hard: a reader looks away from tokens whose sine is not ready yet. Beside the
    runs themselves the other recipe that reads |x| in 1.5–2 least, relative to |x| < 0.5."""
    fig, ((left, right),) = mg.new_figure(2, width=5.2)
    avoidance = {
        name: r["attention_by_x"][3] / r["attention_by_x"][0] for name, r in others.items()
    }
    caught = min(avoidance, key=avoidance.get, default=None)
    for ax, key in ((left, "attention_by_x"), (right, "probe_error_by_x")):
        lines = {"vanilla": per_seed(found, "vanilla", key)}
        if caught is not None:
            lines[caught] = [others[caught][key]]
        mg.draw_lines(ax, EDGES + 0.25, lines, xlabel="|x| of the token, in bins of 0.5")
    left.set(title="Block 2's attention to a token in the window", ylim=(0, None))
    right.set_title("Squared error of layer 1's sine")
    mg.save_figure(fig, out_dir / "precache_trap.png", about(found))


def draw_film(found, arrays, path):
    """precache.gif: what the probe reads in layer 1 while both models train, and the losses."""
    run = next(iter(found))
    shown = {arm: arrays[arm]["film"] for arm in ("vanilla", "myopic")}
    curves = {arm: found[replace(run, arm=arm)]["curve"] for arm in shown}
    grid = np.linspace(-2.5, 2.5, 400)
    fig, axes = mg.new_figure(2, 2, width=3.4, height=2.2)
    fig.set_dpi(80)

    def frame(n):
        step = curves["vanilla"][n][0]
        b, _, _ = curriculum(run, step)
        for (top, low), arm in zip(axes.T, shown):
            colour, _, _ = mg.LOOKS[arm]
            top.clear()
            low.clear()
            top.plot(grid, np.sin(b * grid), color="#bbbbbb", linewidth=1)
            top.plot(*shown[arm][n], ".", markersize=2, color=colour)
            top.set(title=f"{arm}: layer 1's sin({b:.1f}·x)", xlim=(-2.5, 2.5), ylim=(-1.5, 1.5))
            low.plot(*np.transpose(curves[arm]), color="#dddddd")
            low.plot(*np.transpose(curves[arm][: n + 1]), color=colour)
            low.axvline(step, color="#999999", linewidth=0.8)
            low.set(xlabel="training steps", ylim=(0, 1.6))
        axes[1, 0].set_ylabel("loss / trivial")

    frame(0)
    fig.canvas.draw()
    fig.set_layout_engine("none")  # laid out once, not for every frame
    last = len(shown["vanilla"]) - 1
    frames = [*range(0, last, 2), last]
    film = FuncAnimation(fig, frame, frames=frames, init_func=fig.canvas.draw)
    mg.write_whole(path, film.save, writer=PillowWriter(fps=2))
    print(f"film {path}")


def is_papers_task(run):
    """Is this the paper's task and model, so that its numbers may stand beside ours?"""
    shape = (run.a, run.b, run.block_size, run.n_layer, run.n_head, run.n_embd)
    return shape == (10, 10.0, 64, 2, 2, 128)


# ------------------------ main
def report(found, args):
    """The figures of the largest p, and the tables."""
    p_shown = max(run.p for run in found)
    shown = {run: record for run, record in found.items() if run.p == p_shown}
    first = {run: record for run, record in shown.items() if run.seed == args.seed}
    vanilla = next((run for run in first if run.arm == "vanilla"), None)
    arrays, models = load_kept(first, args.out_dir)
    plot_evidence(shown, args.out_dir)
    plot_patch(shown, args.out_dir)
    if vanilla is not None:
        others = variants(vanilla, args.out_dir / "synthetic.jsonl")
        plot_trap(shown, others, args.out_dir)
        shares = per_seed(shown, "vanilla", "lag_share")
        parts = np.array(per_seed(shown, "vanilla", "gradient_parts")).mean(0)  # (points, 4)
        plot_lags(shares, args.out_dir / "precache_lags.png", about(shown), parts.T)
        if others:
            rows = [[name, *recipe_numbers(r)] for name, r in others.items()]
            rows.insert(0, ["this recipe", *recipe_numbers(first[vanilla])])
            header = ["differs in", "ratio", "probe R²", "patch slope"]
            mg.print_table("Other recipes, vanilla, first seed", header, rows, "")
    if {"vanilla", "myopic"} <= arrays.keys():
        plot_sine(first, arrays, args.out_dir)
        draw_film(first, arrays, args.out_dir / "precache.gif")
    if "vanilla" in models:
        plot_sequence(first, models, args.out_dir)
        x, y = sample_task(vanilla, 64, 60_000)
        caption = f"p = {vanilla.p:g}, a = {vanilla.a}, seed {vanilla.seed}"
        path = args.out_dir / "precache_gradients.png"
        plot_gradients(models["vanilla"], x, y, path, caption)
    plot_text_gradients(args.out_dir)
    rows = []
    for p, arm in dict.fromkeys((run.p, run.arm) for run in found):
        records = [r for run, r in found.items() if (run.p, run.arm) == (p, arm)]
        columns = zip(*(main_numbers(record) for record in records))
        paper = PAPER.get(p, {}).get(arm, "-") if is_papers_task(args.run) else "other task"
        rows.append([f"{p:g}", arm, str(len(records)), *map(mg.mean_sd, columns), str(paper)])
    header = ["p", "arm", "n", "Huber/p", "ratio", "probe R²", "untrained", "slope", "paper"]
    caption = "mean ± standard deviation over n seeds; probe: layer 1, its own sine, held out"
    mg.print_table("Pre-caching", header, rows, caption)


def main_numbers(record):
    """Huber / p, its ratio to the trivial predictor's, probe, its control, mean slope inside."""
    inside = record["patch_slope"][1 : record["a"] + 1]
    probes = [record[key][1][0] for key in ("probe_r2", "probe_r2_untrained")]
    return record["huber_over_p"], record["ratio"], *probes, np.mean(inside)


def recipe_numbers(record):
    _, ratio, probe, _, slope = main_numbers(record)
    return [f"{value:.3f}" for value in (ratio, probe, slope)]


def load_weights(model, arrays):
    """Put the weights that a run's arrays hold into a model of its shape -> the model."""
    names = model.state_dict().keys()
    model.load_state_dict({n: torch.from_numpy(arrays[f"weights.{n}"]).float() for n in names})
    return model.eval()


def load_kept(found, out_dir):
    """What is kept of these runs -> {arm: arrays}, {arm: trained model, unless it is too large}."""
    arrays, models = {}, {}
    for run in found:
        path = mg.arrays_path(out_dir, run)
        if path.exists():
            arrays[run.arm] = np.load(path)
            if "weights.lm_head.weight" in arrays[run.arm]:  # not of a model above 1 MB
                models[run.arm] = load_weights(make_model(run), arrays[run.arm])
    return arrays, models


def flags(argv=None):
    """argv -> args."""
    p = dict(nargs="+", type=float, metavar="P", help="how often the answer needs the sines")
    return mg.parse_flags(__file__, __doc__, PRESETS, argv, [("--p", p)])


def main(argv=None):
    """Train what is not recorded yet, draw the figures, print the table."""
    with mg.exit_status(__file__):
        args = flags(argv)
        runs = [
            replace(args.run, seed=seed, p=p, arm=arm)
            for seed in range(args.seed, args.seed + args.seeds)
            for p in args.p
            for arm in args.arms
        ]
        path = args.out_dir / "synthetic.jsonl"
        report(mg.train_missing(runs, train_sine, "ratio", path, args), args)


if __name__ == "__main__":
    main()
