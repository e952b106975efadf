"""A task where planning ahead pays: who computes sin(b x_n) before anyone asks for it?

    x_n ~ N(0, 1)    z_n ~ Bernoulli(p)    y_n = z_n sum_{i=1..a} sin(b x_{n-i}) + (1 - z_n) x_n

Where z_n = 1 the answer needs `a` sines of past inputs. Attention can add up `a` values, but
not take `a` sines first. A model of two layers can do it if the MLP of layer 1 takes sin(b x_n) at
every position n, although n itself has no use for it, and layer 2 adds up what lies ready. That is
pre-caching: it takes gradient from later losses, and myopic training stops that.

    python synthetic.py --preset demo  # an easy sine: vanilla learns it, myopic not
    python synthetic.py                # the paper's sine, a small model: minutes
    python synthetic.py --preset full  # the paper's task and model, four p: hours

Evidence: (1) the loss, beside that of the predictor (1 - z_n) x_n; (2) a linear probe that reads
sin(b x_{n-i}) out of the residual stream, beside the same probe before training; (3) exchange the
state after layer 1 at one position, and see which later answers move. Task, model and probe: Wu,
Morris, Levine (2024), arXiv 2404.00859, section 4.

Shapes as in myopic_gpt.py; also L = n_layer, and K lookbacks i = 0 .. K-1.
"""

import io
import math
import os
import sys
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

sys.path.append(os.path.dirname(__file__))  # PYTHONSAFEPATH leaves it out
import myopic_gpt as mg


# ------------------------ the task
def sample_batch(batch_size, seq_len, p, a=10, b=10.0, generator=None, x_std=1.0):
    """Draw sequences of D_p: x (B, T, 2), x[..., 0] = x_n and x[..., 1] = z_n, and y (B, T).

    y_n = z_n sum_{i=1..a} sin(b x_{n-i}) + (1 - z_n) x_n; terms before position 0 are 0. x_std, the
    standard deviation of x, is for a curriculum. Source: Wu, Morris, Levine (2024), section 4.1."""
    x = x_std * torch.randn(batch_size, seq_len, generator=generator)  # (B, T)
    z = (torch.rand(batch_size, seq_len, generator=generator) < p).float()
    sines = F.pad(torch.sin(b * x), (a, 0))[:, :-1]  # (B, a + T - 1)
    y = z * sines.unfold(1, a, 1).sum(-1) + (1 - z) * x  # (B, T)
    return torch.stack([x, z], dim=-1), y


# ------------------------ a run
# random seeds: training draws from TRAINING + the run's seed
TRAINING, EVALUATION = 1_000, 10_000


def lookbacks(T):
    """How many lookbacks i = 0 .. K-1 are measured: K."""
    return min(16, T // 2)


@dataclass
class SineRun(mg.Run):
    """A run on the sine task. Training starts with an easier one (see curriculum) in every arm."""

    kind = "sines"
    headline = "ratio"
    code = mg.digest_of(mg.__file__, __file__)
    seed: int = mg.setting(0, "of start and batches", most=EVALUATION - TRAINING - 1)
    p: float = mg.setting(1.0, "how often an answer asks for the sines", least=0.01, most=1)
    a: int = mg.setting(10, "how many sines are summed", least=1)
    b: float = mg.setting(10.0, "frequency of the sine", least=0.01)
    b_start: float = mg.setting(2.0, "the frequency that training starts with", least=0.01)
    b_hold: float = mg.setting(0.15, "share of the steps with b_start and p = 1", most=1)
    b_full: float = mg.setting(0.65, "share of the steps after which b is reached", most=1)
    x_wide: float = mg.setting(1.5, "standard deviation of x at first")
    x_until: float = mg.setting(0.8, "share of the steps with x_wide", most=1)
    p_until: float = mg.setting(0.9, "share of the steps after which p is reached", most=1)
    embd_std: float = mg.setting(0.1, "of the embedding at the start")
    wave_std: float = mg.setting(0.1, "of positions at the start, as waves")
    eval_sequences: int = mg.setting(2048, "sequences evaluated (probe: 2048 at most)", least=64)

    def __post_init__(self):
        super().__post_init__()
        mg.require(self.n_layer > 1, f"n_layer is {self.n_layer}: the task takes two layers")
        K = lookbacks(self.block_size)
        T = self.block_size
        mg.require(self.a < K, f"a is {self.a}: with block_size {T} make it less than {K}")
        first = min(self.b_full, self.p_until)
        mg.require(self.b_hold < first, f"b_hold is {self.b_hold}: make it less than {first}")
        of_text = mg.ARMS[self.arm]["past"] == "frozen"
        mg.require(not of_text, f"arm {self.arm} is for text: leave it out, or use myopic_gpt.py")


SIZE = dict(block_size=32, n_layer=2, n_head=2, n_embd=64, batch_size=32, max_iters=2400)
ADAMW = dict(learning_rate=5e-3, beta1=0.99, beta2=0.998, weight_decay=0.0)
MUON = dict(muon="attn", muon_rate=5e-3, muon_decay=1.0)
QUICK = SIZE | ADAMW | MUON | dict(decay_from=0.65)
EASY = dict(a=3, b=4.0, x_wide=1.0, eval_sequences=1024)
SMALL = dict(block_size=12, n_embd=32, batch_size=64, max_iters=300)
LARGE = dict(block_size=64, n_embd=128, max_iters=6000, eval_sequences=8192)
TWO_ARMS = ["vanilla", "myopic"]
PRESETS = {
    "demo": QUICK | EASY | SMALL | dict(arm=TWO_ARMS),
    "quick": QUICK | dict(arm=[*TWO_ARMS, "myopic_kv"], seed=[0, 1, 2]),
    "full": QUICK | LARGE | dict(arm=TWO_ARMS, seed=[0, 1, 2], p=[0.01, 0.1, 0.3, 1.0]),
}
# Huber / p of the paper's runs: one seed, a = b = 10 (at p = 1 its myopic model has 3 layers).
PAPER = {
    "vanilla": {0.01: 0.096, 0.1: 0.016, 0.3: 0.0030, 1.0: 0.0074},
    "myopic": {0.01: 1.10, 0.1: 0.97, 0.3: 1.03},
}


# ------------------------ how it is taught, and the model
def sample_task(run, count, seed, device="cpu"):
    """`count` sequences of the run's own task; the same for the same seed, on any device."""
    generator = torch.Generator().manual_seed(seed)
    x, y = sample_batch(count, run.block_size, run.p, run.a, run.b, generator)
    return x.to(device), y.to(device)


def curriculum(run, step):
    """The task of a training step: its b, its p, and the standard deviation of its x.

    At first b = b_start and every answer asks for the sines, so that attention finds its window.
    Then b moves in a straight line until b_full, and p falls, as run.p ** (0 to 1), until p_until.
    x is drawn wider until x_until, so that the rare large |x| are learned before attention has
    learned to avoid them."""
    done = step / run.max_iters
    b = np.interp(done, [run.b_hold, run.b_full], [run.b_start, run.b])
    p = run.p ** np.interp(done, [run.b_hold, run.p_until], [0, 1])
    return float(b), float(p), run.x_wide if done < run.x_until else 1.0


class SineModel(mg.GPT):
    """GPT with ReLUs, a linear embedding of (x, z) and a linear read-out of one number."""

    def __init__(self, run):
        super().__init__(run.config(vocab_size=1))
        for block in self.transformer.h:
            block.mlp.gelu = nn.ReLU()
        del self.transformer.wte, self.lm_head  # no tokens here
        self.read_in = nn.Linear(2, run.n_embd)
        self.read_out = nn.Linear(run.n_embd, 1)
        nn.init.normal_(self.read_in.weight, std=run.embd_std)
        nn.init.normal_(self.read_out.weight, std=0.02)
        nn.init.zeros_(self.read_in.bias)
        nn.init.zeros_(self.read_out.bias)

        # positions as sines (even channels) and cosines (odd ones), so that near and far differ;
        # channel c turns by T^(-c/C) each step
        T, c = run.block_size, torch.arange(run.n_embd)
        turn = torch.arange(T)[:, None] * T ** (-c / run.n_embd)  # (T, C)
        angle = turn + math.pi / 2 * (c % 2)
        waves = math.sqrt(2) * run.wave_std * angle.sin()  # mean square: wave_std^2
        self.transformer.wpe.weight.data.copy_(waves)

    def embed(self, x):
        """x (B, T, 2) -> (B, T, C)"""
        return self.read_in(x) + self.positions(x.size(1))

    def answer(self, state, blocks_done):
        """The residual stream after so many blocks (B, T, C) -> the answers (B, T)."""
        for block in self.transformer.h[blocks_done:]:
            state = block(state)
        return self.read_out(self.transformer.ln_f(state)).squeeze(-1)

    def position_losses(self, state, y):
        guess = self.answer(state, len(self.transformer.h))
        return F.huber_loss(guess.to(y.dtype), y, reduction="none")

    def forward(self, x, y=None):
        """x (B, T, 2), y (B, T) -> answers (B, T), mean Huber loss (delta 1) or None."""
        guess = self.answer(self.hidden_states(x)[-1], len(self.transformer.h))  # (B, T)
        return guess, None if y is None else F.huber_loss(guess.to(y.dtype), y)


def make_model(run):
    """The untrained model of a run: the same start in every arm."""
    torch.manual_seed(run.seed)
    return SineModel(run)


# ------------------------ measurements
@torch.no_grad()
@mg.without_dropout
def probe_rows(model, run, count, seed, device):
    """A row for each position of `count` sequences that has K inputs so far, its own included.

    -> residual stream (L + 1, rows, C), past inputs x_{n-i} (rows, K), their sines; float64."""
    x, _ = sample_task(run, count, seed, device)
    K = lookbacks(run.block_size)
    states = torch.stack(model.hidden_states(x))[:, :, K - 1 :].flatten(1, 2)  # (L + 1, rows, C)
    past = x[..., 0].unfold(1, K, 1).flip(-1).flatten(0, 1).cpu().double()  # (rows, K)
    return states.cpu().double(), past, torch.sin(run.b * past)


def fit_probes(model, run, count, device):
    """Ridge regressions of sin(b x_{n-i}) on the states of each layer, 0 the embedding, l that
    after block l; fitted on `count` sequences of their own.

    -> a function: states (L + 1, rows, C) -> what is read in them (L + 1, rows, K)."""
    states, _, sines = probe_rows(model, run, count, EVALUATION + 1, device)
    mean, scale = states.mean(1, keepdim=True), states.std(1, keepdim=True) + 1e-9  # (L + 1, 1, C)
    X = (states - mean) / scale  # (L + 1, rows, C)
    centre = sines.mean(0)  # (K,)
    penalty = 1e-3 * X.size(1) * torch.eye(X.size(2), dtype=X.dtype)
    weights = torch.linalg.solve(X.mT @ X + penalty, X.mT @ (sines - centre))  # (L + 1, C, K)

    def read(states):
        return (states - mean) / scale @ weights + centre

    return read


def probe_model(model, run, count, device):
    """What linear probes read of sin(b x_{n-i}), held out and centred.

    -> R^2 [layer][lookback]; then for layer 1 and the position's own x: x (rows,), estimate
    (rows,)."""
    read = fit_probes(model, run, count // 2, device)
    states, past, truth = probe_rows(model, run, count // 2, EVALUATION + 2, device)
    estimates = read(states)  # (L + 1, rows, K)
    variance = (truth - truth.mean(0)).square().sum(0)  # (K,)
    r2 = 1 - (truth - estimates).square().sum(1) / variance  # (L + 1, K)
    return r2.tolist(), past[:, 0].numpy(), estimates[1, :, 0].numpy()


@torch.no_grad()
@mg.without_dropout
def patch(model, run, count, device):
    """Cause and effect: at one position n of each sequence, put in place of the state after block 1
    the one that the same model has there with another x. Answers i later that need the sine (z = 1)
    should move by sin(b x') - sin(b x) for i = 1 .. a, and by nothing else.

    -> slope of the answer's move on that, for i = 0 .. K - 1."""
    x, _ = sample_task(run, count, EVALUATION + 3, device)
    K = lookbacks(run.block_size)
    generator = torch.Generator().manual_seed(EVALUATION + 4)
    n = torch.randint(run.block_size - K, (count,), generator=generator).to(device)
    other = x.clone()
    rows = torch.arange(count, device=device)
    other[rows, n, 0] = torch.randn(count, generator=generator).to(device)
    moves = []
    for part in rows.split(128):  # all at once take gigabytes
        at = rows[: len(part)], n[part]
        state = model.hidden_states(x[part])[1]  # (128 or fewer, T, C)
        patched = state.clone()
        patched[at] = model.hidden_states(other[part])[1][at]
        moves.append(model.answer(patched, 1) - model.answer(state, 1))
    move = torch.cat(moves)  # (B, T)
    due = torch.sin(run.b * other[rows, n, 0]) - torch.sin(run.b * x[rows, n, 0])  # (B,)
    slopes = []
    for i in range(K):
        asked = x[rows, n + i, 1] == 1
        got, want = move[rows, n + i][asked], due[asked]
        slopes.append(((got @ want) / (want @ want + 1e-12)).item())
    return slopes


@torch.no_grad()
@mg.without_dropout
def huber_losses(model, x, y, p):
    """Huber / p of the model and of (1 - z_n) x_n on the same sequences, and their ratio."""
    guess = torch.cat([model(part)[0] for part in x.split(128)])
    huber = F.huber_loss(guess, y).item()
    trivial = F.huber_loss((1 - x[..., 1]) * x[..., 0], y).item()  # it knows of no sine
    mg.require(trivial > 0, f"p is {p}: no answer of the evaluation asks for a sine; raise it")
    return dict(huber_over_p=huber / p, trivial_over_p=trivial / p, ratio=huber / trivial)


# ------------------------ one run
def train_sine(run, device, report_progress):
    """Train one model -> the model, the numbers of its record, arrays for pictures."""
    model = make_model(run).to(device)
    x, y = sample_task(run, run.eval_sequences, EVALUATION, device)
    batches = torch.Generator().manual_seed(TRAINING + run.seed)
    probed = min(2048, len(x))  # sequences; a regression on more takes gigabytes
    r2_untrained, _, _ = probe_model(model, run, probed, device)
    curve, film, film_steps, lag_share = [], [], [], {}

    def next_batch(step):  # the same in every arm
        b, p, x_std = curriculum(run, step)
        x, y = sample_batch(run.batch_size, run.block_size, p, run.a, b, batches, x_std)
        return x.to(device), y.to(device)

    def after_step(done):
        # measured on the task that training is at, but with evaluation's x
        if done % max(1, run.max_iters // 24) == 0 or done == run.max_iters:
            b, p, _ = curriculum(run, done)
            now = replace(run, b=b, p=p)
            part = sample_task(now, min(512, run.eval_sequences), EVALUATION, device)
            curve.append([done, huber_losses(model, *part, p)["ratio"]])
            if len(curve) % 2 == 1 or done == run.max_iters:  # every second has a frame
                _, film_x, estimate = probe_model(model, now, 256, device)
                film.append([film_x[:300], estimate[:300]])
                film_steps.append(done)

    if run.arm == "vanilla":
        lag_share["start"] = mg.lag_shares(model, x[:128], y[:128])
    after_step(0)
    mg.train(model, run, next_batch, after_step, report_progress)
    mg.require(np.isfinite(curve).all(), f"{run.arm}: a loss is not finite: lower --learning_rate")
    if run.arm == "vanilla":
        lag_share["end"] = mg.lag_shares(model, x[:128], y[:128])
    r2, _, _ = probe_model(model, run, probed, device)
    numbers = huber_losses(model, x, y, run.p) | dict(
        probe_r2=r2,
        probe_r2_untrained=r2_untrained,
        patch_slope=patch(model, run, len(x), device),
        curve=curve,
        lag_share=lag_share,
    )
    film = np.array(film, dtype=np.float32)  # (frames, 2, 300)
    return model, numbers, dict(film=film, film_steps=np.array(film_steps))


# ------------------------ figures, of runs that differ in arm and seed alone
def about(runs):
    """What the runs have in common, for captions."""
    run = runs[0]
    task = f"p = {run.p:g}, a = {run.a}, b = {run.b:g}; T = {run.block_size}, {run.n_embd} channels"
    steps = f"{run.max_iters} steps of {run.batch_size} sequences"
    return f"{task}; {steps}; {mg.seeds_of(runs)}"


def kept_of(runs, *arms):
    """[the run of each arm], of the first seed of which arrays are kept in all these arms."""
    for group in mg.group_by(runs, "seed").values():
        kept = {run.arm: run for run in group if run.npz.exists()}
        if kept.keys() >= set(arms):
            return [kept[arm] for arm in arms]
    words = " and ".join(arms)
    raise mg.UsageError(f"it takes the arrays of {words}, kept of a command's first --seed")


def plot_evidence(path, runs):
    """Who learns the task, and what layer 1 holds of each position's own sine."""
    run, bars, ends = runs[0], {}, []
    fig = Figure(figsize=(9.6, 3.4), layout="constrained")
    left, right = fig.subplots(1, 2)
    begin, end = run.b_hold * run.max_iters, run.b_full * run.max_iters
    left.axvspan(begin, end, color="#eeeeee", zorder=0)
    where = dict(transform=left.get_xaxis_transform(), ha="center", fontsize=8)
    left.text((begin + end) / 2, 0.8, f"b from {run.b_start:g} to {run.b:g}", **where)
    for arm, group in mg.group_by(runs, "arm").items():
        curves = np.array([run.curve for run in group])  # (seeds, points, 2)
        mg.draw_arm(left, arm, curves[0, :, 0], curves[:, :, 1])
        bars[arm] = [run.probe_r2[1][0] for run in group]
        ends.append(f"{arm} {np.mean([run.ratio for run in group]):.2f}")
    bars["untrained"] = [run.probe_r2_untrained[1][0] for run in runs]
    left.axhline(1, color="#999999", linewidth=0.8)
    left.set(yscale="log", xlabel="training steps", ylabel="loss / trivial predictor's")
    left.set_title(f"Who learns it: {', '.join(ends)}", fontsize=10)

    for n, (arm, r2) in enumerate(bars.items()):
        colour, _, _ = mg.LOOKS[arm]
        right.bar(n, np.mean(r2), color=colour)
        right.plot([n] * len(r2), r2, "k.", markersize=4)  # the seeds
    right.set_xticks(range(len(bars)), list(bars))
    right.set(ylabel="R² of the probe", ylim=(-0.02, 1))
    right.set_title(f"sin({run.b:g}·x_n) in layer 1 at n, of no use to answer n", fontsize=10)
    mg.save_figure(path, fig, f"{about(runs)}\nloss: of the task that training is at")


def plot_patch(path, runs):
    """Cause and effect: how far answers move when layer 1's state at one position is exchanged."""
    fig = Figure(figsize=(7, 3.2), layout="constrained")
    ax = fig.subplots()
    run, later = runs[0], range(len(runs[0].patch_slope))
    ax.axvspan(0.5, run.a + 0.5, color="#ffe9a8", zorder=0)
    ax.axhline(1, color="#999999", linewidth=0.8)
    for arm, group in mg.group_by(runs, "arm").items():
        mg.draw_arm(ax, arm, later, [run.patch_slope for run in group])
    ax.set(xlabel="answers so many positions later", ylabel="slope: moved / due", xticks=later)
    slope = np.mean([main_numbers(other)[-1] for other in runs if other.arm == run.arm])
    fig.suptitle(f"One state exchanged: {run.arm}'s answers move by {slope:.2f} of what is due")
    mg.save_figure(path, fig, f"shaded: the answers that sum that sine\n{about(runs)}")


def plot_sequence(path, runs):
    """One sequence, position by position: what layer 1 carries, what each answer needs and gets."""
    kept = kept_of(runs, *TWO_ARMS)
    run = kept[0]
    x, y = sample_task(run, 1, EVALUATION + 5)
    sines = torch.sin(run.b * x[..., 0])  # (1, T)
    first = lookbacks(run.block_size) - 1  # the probe is fitted from here on
    n = np.arange(first, min(first + 20, run.block_size))

    # true values as bars, those of the models as dots
    fig = Figure(figsize=(10, 4.6), layout="constrained")
    top, low = fig.subplots(2, 1, sharex=True)
    top.bar(n, sines[0, n].numpy(), color="#dddddd", label="true")
    low.bar(n, y[0, n].numpy(), color="#dddddd", label="needed")
    for of_arm in kept:
        colour, _, marker = mg.LOOKS[of_arm.arm]
        model = mg.load_weights(make_model(of_arm), of_arm)
        read = fit_probes(model, run, 512, "cpu")
        with torch.no_grad():
            states = torch.cat(model.hidden_states(x)).double()  # (L + 1, T, C)
            answer, _ = model(x)  # (1, T)
        top.plot(n, read(states)[1, n, 0], marker, color=colour, label=f"read in {of_arm.arm}")
        low.plot(n, answer[0, n], marker, color=colour, label=of_arm.arm)

    # shade the largest answer and the sines that it adds up
    asked = [i for i in n if x[0, i, 1] == 1 and i - run.a >= first]
    if asked:
        last = max(asked, key=lambda i: y[0, i].abs())
        top.axvspan(last - run.a - 0.5, last - 0.5, color="#ffe9a8", zorder=0)
        low.axvspan(last - 0.5, last + 0.5, color="#ffe9a8", zorder=0)
        where = dict(transform=low.get_xaxis_transform(), ha="right", va="top", fontsize=8)
        low.text(last - 0.7, 1, f"the sum of the {run.a} shaded sines →", **where)
    top.set(title="One sequence: whose layer 1 carries the sine of its own x?")
    top.set_ylabel(f"sin({run.b:g}·x)")
    low.set(xlabel="position n", ylabel="answer", xticks=n)
    for ax in (top, low):
        ax.margins(y=0.15)
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    mg.save_figure(path, fig, f"held out; p = {run.p:g}, seed {run.seed}")


def plot_gradients(path, runs):
    """Whom the gradient serves: vanilla's trained weights, the backward passes of two arms."""
    (run,) = kept_of(runs, "vanilla")
    x, y = sample_task(run, 16, EVALUATION + 6)
    tables = []
    for arm in TWO_ARMS:
        model = mg.load_weights(make_model(replace(run, arm=arm)), run)
        tables.append(mg.gradient_tables(model, x, y)[0])  # (T, T)

    fig = Figure(figsize=(7.6, 3.6), layout="constrained")
    axes = fig.subplots(1, 2)
    for ax, arm, table in zip(axes, TWO_ARMS, tables):
        shown = np.where(table > 0, table / np.max(tables), np.nan)  # exactly zero stays white
        image = ax.imshow(shown, norm=LogNorm(1e-4, 1))
        ax.set(title=mg.GLOSS[arm], xlabel="position j")
        ax.locator_params(integer=True)
    axes[0].set_ylabel("loss at position i")
    j = run.block_size // 3
    edge = dict(xytext=(0.25, 0.9), textcoords="axes fraction", fontsize=8)
    arrow = dict(arrowstyle="->")
    axes[0].annotate(f"last to need it: {run.a} later", (j, j + run.a), arrowprops=arrow, **edge)
    fig.colorbar(image, ax=axes, label="gradient, largest = 1").minorticks_off()
    fig.suptitle("Which losses pull at the state of j, its embedding?")
    caption = f"vanilla's weights in both; white: exactly zero; p = {run.p:g}, seed {run.seed}"
    mg.save_figure(path, fig, caption)


def plot_film(path, runs):
    """What the probe reads in layer 1 while both models train, and the losses."""
    kept = kept_of(runs, *TWO_ARMS)
    fig = Figure(figsize=(8.4, 5), dpi=80)
    axes = fig.subplots(2, 2)
    fig.subplots_adjust(left=0.1, right=0.98, bottom=0.1, top=0.87, hspace=0.45)
    for (top, low), run in zip(axes.T, kept):
        top.set(title=mg.GLOSS[run.arm], xlabel="x", xlim=(-2.5, 2.5), ylim=(-1.5, 1.5))
        low.plot(*np.transpose(run.curve), color="#dddddd")
        low.set(xlabel="training steps", ylim=(0, 1.3))
    axes[0, 0].set_ylabel("read in layer 1\n(grey: the sine)")
    axes[1, 0].set_ylabel("loss / trivial")

    # what stands still is drawn once: a picture, behind what moves
    still = io.BytesIO()
    fig.savefig(still, format="rgba")
    width, height = fig.canvas.get_width_height()
    fig.figimage(np.frombuffer(still.getvalue(), np.uint8).reshape(height, width, 4), zorder=-1)
    moving = []
    for (top, low), run in zip(axes.T, kept):
        top.set(title="")
        top.set_axis_off()
        low.set_axis_off()
        colour, _, _ = mg.LOOKS[run.arm]
        (sine,) = top.plot([], [], color="#bbbbbb", linewidth=1)
        (read,) = top.plot([], [], ".", markersize=2, color=colour)
        (so_far,) = low.plot([], [], color=colour)
        now = low.axvline(0, color="#999999", linewidth=0.8)
        curve = np.transpose(run.curve)  # (2, points): steps, losses
        arrays = mg.read_arrays(run)
        mg.require("film_steps" in arrays, "its frames were kept by other code")
        moving.append((arrays["film"], curve, sine, read, so_far, now))
    title = fig.text(0.5, 0.99, "", ha="center", va="top")
    grid, steps = np.linspace(-2.5, 2.5, 400), arrays["film_steps"]  # the same in both arms

    def frame(n):
        step = steps[n]
        b, _, _ = curriculum(kept[0], step)
        title.set_text(f"step {step}: the sine is sin({b:.1f}·x)")
        for film, curve, sine, read, so_far, now in moving:
            sine.set_data(grid, np.sin(b * grid))
            read.set_data(*film[n])
            so_far.set_data(*curve[:, curve[0] <= step])
            now.set_xdata([step, step])

    frames = [*range(len(steps)), *3 * [len(steps) - 1]]  # two seconds of the end
    film = FuncAnimation(fig, frame, frames=frames)
    mg.write_whole(path, lambda part: film.save(part, writer=PillowWriter(fps=2)))


# ------------------------ table and report
def main_numbers(run):
    """Huber / p, its ratio to the trivial predictor's, probe, its control, mean slope inside."""
    inside = np.mean(run.patch_slope[1 : run.a + 1])
    probe, untrained = run.probe_r2[1][0], run.probe_r2_untrained[1][0]
    return run.huber_over_p, run.ratio, probe, untrained, inside


COLUMNS = ["p", "size", "training", "seeds", "Huber/p", "paper's", "ratio"]
COLUMNS += ["probe R²", "untrained", "slope"]


def table_rows(runs, extra=()):
    """-> a row for each comparison and arm: the extra settings, then COLUMNS."""
    rows = []
    for of_case in mg.comparisons(runs):
        for arm, group in mg.group_by(of_case, "arm").items():
            run = group[0]
            is_papers = (run.a, run.b, run.block_size, run.size) == (10, 10.0, 64, "2x128")
            paper = PAPER.get(arm, {}).get(run.p, "-") if is_papers else "-"
            row = [f"{getattr(run, name)}" for name in extra]
            row += [f"{run.p:g}", run.size, arm, f"{len(group)}"]
            huber, *others = [mg.mean_sd(values) for values in zip(*map(main_numbers, group))]
            rows.append([*row, huber, f"{paper}", *others])
    return rows


def report(runs, folder):
    """The tables; then the figures, of the largest p and model; then the result in a sentence."""
    runs = sorted(runs, key=attrgetter("p", "n_params"))
    extra = mg.extra_settings(runs, "p", "size")
    # the columns in two tables, each of 80 letters: the last three are of layer 1
    header, *rows = [[*extra, *COLUMNS], *table_rows(runs, extra)]
    mg.print_table("Who learns it", header[:-3], [row[:-3] for row in rows])
    header, *rows = [row[:-6] + row[-3:] for row in (header, *rows)]
    mg.print_table("What layer 1 holds", header, rows)
    *_, shown = mg.comparisons(runs)
    readers = f"The next {shown[0].a} readers", shown[0].a
    print(f"figures of p {shown[0].p:g}, {mg.case_of(shown[0], extra)}:")
    mg.draw(plot_evidence, folder / "precache.png", shown)
    mg.draw(plot_patch, folder / "precache_patch.png", shown)
    mg.draw(mg.plot_lags, folder / "precache_lags.png", shown, *readers)
    mg.draw(plot_sequence, folder / "precache_sequence.png", shown)
    mg.draw(plot_gradients, folder / "precache_gradients.png", shown)
    mg.draw(plot_film, folder / "precache.gif", shown)
    ratios = []
    for arm, group in mg.group_by(shown, "arm").items():
        ratios.append(f"{arm} {np.mean([run.ratio for run in group]):.2f}")
    print(f"Loss, if 1 is that of a guess without sines: {', '.join(ratios)}.")
    print(f"Open {folder / 'precache.png'} first.")


# ------------------------ main
def flags(argv=None):
    """Words of a command line -> args, runs."""
    return mg.parse_flags(__doc__, SineRun, PRESETS, argv, {})


@mg.no_traceback()
def main(argv=None):
    """Train what is not recorded yet, print the table, draw the figures."""
    args, runs = flags(argv)
    report(mg.train_missing(train_sine, runs, args), args.out_dir)


if __name__ == "__main__":
    main()
