"""A task where planning ahead pays: who computes sin(b x_n) before anyone asks for it?

    x_n ~ N(0, 1)    z_n ~ Bernoulli(p)    y_n = z_n sum_{i=1..a} sin(b x_{n-i}) + (1 - z_n) x_n

Where z_n = 1 the answer needs `a` sines of past inputs. Attention can add up `a` values, but
not take `a` sines first. A model of two layers can do it if the MLP of layer 1 takes sin(b x_n) at
every position n, although n itself has no use for it, and layer 2 adds up what lies ready. That is
pre-caching: it takes gradient from later losses, and myopic training stops that.

    python synthetic.py --preset demo        # an easy sine: vanilla learns it, myopic does not
    python synthetic.py                      # the paper's sine, a small model: minutes on two cores
    python synthetic.py --preset full        # the paper's task and model, four values of p

Evidence: (1) the loss, beside that of the predictor (1 - z_n) x_n; (2) a linear probe that reads
sin(b x_{n-i}) out of the residual stream, beside the same probe before training; (3) exchange the
state after layer 1 at one position, and see which later answers move. Task, model and probe: Wu,
Morris, Levine (2024), arXiv 2404.00859, section 4.

Shapes as in myopic_gpt.py; also L = n_layer, and K lookbacks i = 0 .. K-1.
"""

import math
from dataclasses import dataclass, replace

import matplotlib.style
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.colors import LogNorm

import myopic_gpt as mg


# random seeds: training draws from TRAINING + the run's seed
TRAINING, EVALUATION = 1_000, 10_000
LOOKBACKS = 16


# ------------------------ a run
@dataclass(frozen=True)
class SineRun(mg.Run):
    """A run on the sine task. Training starts with an easier one (see curriculum) in every arm."""

    kind = "sines"
    seed: int = mg.setting(0, "the first seed", most=EVALUATION - TRAINING - 1)
    p: float = 1.0
    a: int = mg.setting(10, "how many sines are summed")
    b: float = mg.setting(10.0, "frequency of the sine")
    b_start: float = mg.setting(2.0, "the frequency that training starts with")
    b_hold: float = mg.setting(0.15, "share of the steps with b_start and p = 1", most=1)
    b_full: float = mg.setting(0.65, "share of the steps after which b is reached", most=1)
    x_wide: float = mg.setting(1.5, "standard deviation of x at first")
    x_until: float = mg.setting(0.8, "share of the steps with x_wide", most=1)
    p_until: float = mg.setting(0.9, "share of the steps after which p is reached", most=1)
    embd_std: float = mg.setting(0.1, "of the embedding at the start")
    wave_std: float = mg.setting(0.1, "of positions at the start, as waves")
    eval_sequences: int = mg.setting(2048, "sequences that are evaluated")

    def __post_init__(self):
        super().__post_init__()
        mg.require(0.01 <= self.p <= 1, f"p is {self.p}: give a number from 0.01 to 1")
        mg.require(self.n_layer > 1, f"n_layer is {self.n_layer}: the task takes two layers")
        mg.require(self.a < self.block_size, f"a is {self.a}: make it less than block_size")
        mg.require(min(self.b, self.b_start) > 0, "b and b_start: give numbers above 0")
        first = min(self.b_full, self.p_until)
        mg.require(self.b_hold < first, f"b_hold is {self.b_hold}: make it less than {first}")
        enough = self.eval_sequences >= 64
        mg.require(enough, f"eval_sequences is {self.eval_sequences}: give 64 or more")
        text_only = mg.arm_fields(self.arm)["past"] == "frozen"
        mg.require(not text_only, f"arm {self.arm} is for text: leave it out, or use myopic_gpt.py")


QUICK = SineRun(
    block_size=32,
    n_layer=2,
    n_head=2,
    n_embd=64,
    batch_size=32,
    max_iters=2400,
    learning_rate=5e-3,
    beta1=0.99,
    beta2=0.998,
    weight_decay=0.0,
    muon="attn",
    muon_rate=5e-3,
    muon_decay=1.0,
    decay_from=0.65,
)
DEMO = replace(
    QUICK,
    a=3,
    b=4.0,
    x_wide=1.0,
    block_size=12,
    n_embd=32,
    batch_size=64,
    max_iters=300,
    eval_sequences=1024,
)
FULL = replace(QUICK, block_size=64, n_embd=128, max_iters=6000, eval_sequences=8192)
THREE_ARMS = ["vanilla", "myopic", "myopic_kv"]
PRESETS = {  # seconds: of a run, about, on one core
    "demo": dict(run=DEMO, arms=THREE_ARMS[:2], seeds=1, p=[1], seconds=5),
    "quick": dict(run=QUICK, arms=THREE_ARMS, seeds=3, p=[1], seconds=45),
    "full": dict(run=FULL, arms=THREE_ARMS[:2], seeds=3, p=[0.01, 0.1, 0.3, 1], seconds=540),
}
# Huber / p of the paper's runs: one seed, a = b = 10 (at p = 1 its myopic model has 3 layers).
PAPER = {
    0.01: dict(vanilla=0.096, myopic=1.10),
    0.1: dict(vanilla=0.016, myopic=0.97),
    0.3: dict(vanilla=0.0030, myopic=1.03),
    1.0: dict(vanilla=0.0074),
}


# ------------------------ the task and the model
def sample_batch(batch_size, seq_len, p, a=10, b=10.0, generator=None, x_std=1.0):
    """Draw sequences of D_p: x (B, T, 2), x[..., 0] = x_n and x[..., 1] = z_n, and y (B, T).

    y_n = z_n sum_{i=1..a} sin(b x_{n-i}) + (1 - z_n) x_n; terms before position 0 are 0. x_std, the
    standard deviation of x, is for a curriculum. Source: Wu, Morris, Levine (2024), section 4.1."""
    x = x_std * torch.randn(batch_size, seq_len, generator=generator)  # (B, T)
    z = (torch.rand(batch_size, seq_len, generator=generator) < p).float()
    sines = F.pad(torch.sin(b * x), (a, 0))[:, :-1]  # (B, a + T - 1)
    y = z * sines.unfold(1, a, 1).sum(-1) + (1 - z) * x  # (B, T)
    return torch.stack([x, z], dim=-1), y


def sample_task(run, count, seed, device="cpu"):
    """`count` sequences of the run's own task; the same for the same seed, on any device."""
    generator = torch.Generator().manual_seed(seed)
    x, y = sample_batch(count, run.block_size, run.p, run.a, run.b, generator)
    return x.to(device), y.to(device)


def curriculum(run, step):
    """The task of a training step: its b, its p, and the standard deviation of its x.

    At first b = b_start and every answer asks for the sines, so that attention finds its window.
    Then b rises in a straight line until b_full, and p falls, as run.p ** (0 to 1), until p_until.
    x is drawn wider until x_until, so that the rare large |x| are learned before attention has
    learned to avoid them."""
    done = step / run.max_iters
    rise = (done - run.b_hold) / (run.b_full - run.b_hold)
    fall = (done - run.b_hold) / (run.p_until - run.b_hold)
    b = run.b_start + (run.b - run.b_start) * min(1, max(0, rise))
    p = run.p ** min(1, max(0, fall))
    return b, p, run.x_wide if done < run.x_until else 1.0


def start_with_waves(wpe, std):
    """Start learned positions, an nn.Embedding (T, C), so that near and far differ: as sines (even
    channels) and cosines (odd ones) of mean square std^2; channel c turns by T^(-c/C) each step."""
    T, C = wpe.weight.shape
    c = torch.arange(C)
    angle = torch.arange(T)[:, None] * T ** (-c / C) + math.pi / 2 * (c % 2)  # (T, C)
    wpe.weight.data.copy_(math.sqrt(2) * std * angle.sin())


class SineModel(mg.GPT):
    """GPT with ReLUs, a linear embedding of (x, z) and a linear read-out of one number."""

    def __init__(self, config, embd_std=0.1, wave_std=0.1):
        super().__init__(config)
        for block in self.transformer.h:
            block.mlp.gelu = nn.ReLU()
        del self.transformer.wte, self.lm_head  # no tokens here
        self.read_in = nn.Linear(2, config.n_embd)
        self.read_out = nn.Linear(config.n_embd, 1)
        nn.init.normal_(self.read_in.weight, std=embd_std)
        nn.init.normal_(self.read_out.weight, std=0.02)
        nn.init.zeros_(self.read_in.bias)
        nn.init.zeros_(self.read_out.bias)
        start_with_waves(self.transformer.wpe, wave_std)

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
        guess = self.answer(self.embed(x), 0)
        return guess, None if y is None else F.huber_loss(guess.to(y.dtype), y)


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
    """A row for each position that has K inputs so far, its own included.

    x (B, T, 2) -> residual stream (L + 1, rows, C), past inputs x_{n-i} (rows, K); float64, CPU."""
    T = x.size(1)
    K = min(LOOKBACKS, T // 2)
    states = torch.stack(model.hidden_states(x))[:, :, K - 1 :].flatten(1, 2)  # (L + 1, rows, C)
    past = torch.stack([x[:, K - 1 - i : T - i, 0] for i in range(K)], dim=-1)  # (B, T - K + 1, K)
    return states.cpu().double(), past.flatten(0, 1).cpu().double()


def fit_probe(states, targets):
    """Ridge regression of targets (rows, K) on states (rows, C) -> a function of states."""
    mean, scale, centre = states.mean(0), states.std(0) + 1e-9, targets.mean(0)
    X = (states - mean) / scale  # (rows, C)
    penalty = 1e-3 * len(X) * torch.eye(X.size(1), dtype=X.dtype)
    weights = torch.linalg.solve(X.T @ X + penalty, X.T @ (targets - centre))  # (C, K)

    def read(states):
        return (states - mean) / scale @ weights + centre  # (rows, K)

    return read


def probe_model(model, run, count, device):
    """What a linear probe reads of sin(b x_{n-i}), held out and centred.

    -> R^2 [layer][lookback], layer 0 the embedding, l that after block l; then for layer 1 and the
    position's own x: x (rows,), estimate (rows,)."""
    fit_x, _ = sample_task(run, count // 2, EVALUATION + 1, device)
    test_x, _ = sample_task(run, count // 2, EVALUATION + 2, device)
    states, past = probe_rows(model, fit_x)
    test_states, test_past = probe_rows(model, test_x)
    r2, estimates = [], []
    for X, test_X in zip(states, test_states):
        estimates.append(fit_probe(X, torch.sin(run.b * past))(test_X))  # (rows, K)
        r2.append(r_squared(estimates[-1], torch.sin(run.b * test_past)).tolist())
    return r2, test_past[:, 0].numpy(), estimates[1][:, 0].numpy()


@torch.no_grad()
def patch(model, run, count, device):
    """Cause and effect: at one position n of each sequence, put in place of the state after block 1
    the one that the same model has there with another x. Answers i later that need the sine (z = 1)
    should move by sin(b x') - sin(b x) for i = 1 .. a, and by nothing else.

    -> slope of the answer's move on that, for i = 0 .. K - 1."""
    x, _ = sample_task(run, count, EVALUATION + 3, device)
    K, rows = min(LOOKBACKS, run.block_size // 2), torch.arange(count, device=device)
    generator = torch.Generator().manual_seed(EVALUATION + 4)
    n = torch.randint(run.block_size - K, (count,), generator=generator).to(device)
    other = x.clone()
    other[rows, n, 0] = torch.randn(count, generator=generator).to(device)
    state = model.hidden_states(x)[1]  # (B, T, C)
    patched = state.clone()
    patched[rows, n] = model.hidden_states(other)[1][rows, n]
    move = model.answer(patched, 1) - model.answer(state, 1)  # (B, T)
    due = torch.sin(run.b * other[rows, n, 0]) - torch.sin(run.b * x[rows, n, 0])  # (B,)
    slopes = []
    for i in range(K):
        asked = x[rows, n + i, 1] == 1
        got, want = move[rows, n + i][asked], due[asked]
        slopes.append(((got @ want) / (want @ want + 1e-12)).item())
    return slopes


@torch.no_grad()
def huber_losses(model, x, y, p):
    """Huber / p of the model and of (1 - z_n) x_n on the same sequences, and their ratio."""
    guess = torch.cat([model(part)[0] for part in x.split(512)])
    huber = F.huber_loss(guess, y).item()
    trivial = F.huber_loss((1 - x[..., 1]) * x[..., 0], y).item()  # it knows of no sine
    return dict(huber_over_p=huber / p, trivial_over_p=trivial / p, ratio=huber / trivial)


# ------------------------ one run
def train_sine(run, device, report_progress):
    """Train one model -> the model, the numbers of its record, arrays for pictures."""
    model = make_model(run).to(device)
    x, y = sample_task(run, run.eval_sequences, EVALUATION, device)
    batches = torch.Generator().manual_seed(TRAINING + run.seed)
    r2_untrained, _, _ = probe_model(model, run, len(x), device)
    curve, film = [], []
    if run.arm == "vanilla":
        at_start = mg.lag_shares(model, x[:128], y[:128])

    def next_batch(step):  # the same in every arm
        b, p, x_std = curriculum(run, step)
        x, y = sample_batch(run.batch_size, run.block_size, p, run.a, b, batches, x_std)
        return x.to(device), y.to(device)

    def after_step(done):  # measured on the task that training is at, but with evaluation's x
        if done % max(1, run.max_iters // 24) == 0 or done == run.max_iters:
            b, p, _ = curriculum(run, done)
            now = replace(run, b=b, p=p)
            part = sample_task(now, min(512, run.eval_sequences), EVALUATION, device)
            curve.append([done, huber_losses(model, *part, p)["ratio"]])
            _, film_x, estimate = probe_model(model, now, 256, device)
            film.append([film_x[:300], estimate[:300]])

    after_step(0)
    optimizers = mg.configure_optimizers(model, run)
    mg.train(model, optimizers, next_batch, run, report_progress, after_step)
    mg.require(np.isfinite(curve).all(), f"{run.arm}: a loss is not finite: lower --learning_rate")
    r2, _, _ = probe_model(model, run, len(x), device)
    numbers = huber_losses(model, x, y, run.p) | dict(
        probe_r2=r2,
        probe_r2_untrained=r2_untrained,
        patch_slope=patch(model, run, len(x), device),
        curve=curve,
    )
    if run.arm == "vanilla":
        at_end = mg.lag_shares(model, x[:128], y[:128])
        numbers["lag_share"] = dict(start=at_start, end=at_end)
    return model, numbers, dict(film=np.array(film, dtype=np.float32))  # (frames, 2, 300)


# ------------------------ figures, of the runs of a single p and size
def about(found):
    """What the runs have in common, for captions."""
    run = next(iter(found))
    task = f"p = {run.p:g}, a = {run.a}, b = {run.b:g}; T = {run.block_size}, {run.n_embd} channels"
    steps = f"{run.max_iters} steps of {run.batch_size} sequences"
    return f"{task}; {steps}; {mg.seeds_of(found)}"


def kept_arrays(found, run, folder, arms=("vanilla", "myopic")):
    """{arm: arrays} of these arms, otherwise like the run."""
    kept = {}
    for arm in arms:
        of_arm = replace(run, arm=arm)
        kept[arm] = mg.read_arrays(folder, of_arm) if of_arm in found else None
        mg.require(kept[arm], f"it takes what is kept of {arm}'s seed {run.seed}")
    return kept


def plot_evidence(found):
    """Who learns the task, and what layer 1 holds of each position's own sine."""
    run, record = next(iter(found.items()))
    fig, ((left, right),) = mg.new_figure(2, width=4.8, height=3.4)
    curves, probes, ends = {}, {}, []
    for arm in mg.arms_of(found):
        curves[arm] = np.array(mg.per_seed(found, arm, "curve"))[:, :, 1]  # (seeds, points)
        probes[arm] = np.array(mg.per_seed(found, arm, "probe_r2"))[:, 1, :1]  # (seeds, 1)
        ends.append(f"{arm} {np.mean(mg.per_seed(found, arm, 'ratio')):.2f}")
    untrained = np.array(mg.per_seed(found, run.arm, "probe_r2_untrained"))
    probes["untrained"] = untrained[:, 1, :1]
    left.axhline(1, color="#999999", linewidth=0.8)
    mg.draw_arms(left, np.array(record["curve"])[:, 0], curves)
    left.set_title(f"Who learns it: {', '.join(ends)}", fontsize=10)
    left.set(yscale="log", xlabel="training steps", ylabel="loss / trivial predictor's")
    for n, (arm, r2) in enumerate(probes.items()):
        colour, _, _ = mg.look(arm)
        right.bar(n, r2.mean(), color=colour)
        right.plot(np.full(len(r2), n), r2[:, 0], "k.", markersize=4)  # the seeds
    right.set_xticks(range(len(probes)), list(probes))
    right.set(ylabel="R² of the probe", ylim=(-0.02, 1))
    right.set_title(f"sin({run.b:g}·x) in layer 1, where no answer needs it", fontsize=10)
    caption = f"\nloss of the task that training is at: b rises from {run.b_start:g} to {run.b:g}"
    return mg.finish(fig, about(found) + caption)


def plot_sequence(found, run, folder):
    """One sequence, position by position: what layer 1 carries, what each answer needs and gets."""
    kept = kept_arrays(found, run, folder)
    x, y = sample_task(run, 512, EVALUATION + 5)
    sines = torch.sin(run.b * x[..., 0])  # (512, T)
    n = np.arange(min(20, run.block_size))
    shown = slice(len(n))
    fig, ((top,), (low,)) = mg.new_figure(1, 2, width=10, height=2.3, sharex=True)
    top.bar(n, sines[0, shown].numpy(), color="#dddddd", label="true")
    low.bar(n, y[0, shown].numpy(), color="#dddddd", label="needed")
    for arm in ("vanilla", "myopic"):
        colour, _, marker = mg.look(arm)
        model = mg.load_weights(make_model(replace(run, arm=arm)), kept[arm])
        with torch.no_grad():
            state = model.hidden_states(x)[1].double()  # (512, T, C)
            answer, _ = model(x[:1])  # (1, T)
        read = fit_probe(state[1:].flatten(0, 1), sines[1:].flatten()[:, None].double())
        top.plot(n, read(state[0])[shown, 0], marker, color=colour, label=f"read in {arm}")
        low.plot(n, answer[0, shown], marker, color=colour, label=arm)
    asked = [i for i in n if x[0, i, 1] == 1 and i >= run.a]
    if asked:  # bracket the sines that one answer adds up
        last = asked[-1]
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
    return mg.finish(fig, f"held out; p = {run.p:g}, seed {run.seed}")


def plot_patch(found):
    """Cause and effect: how far answers move when layer 1's state at one position is exchanged."""
    run, record = next(iter(found.items()))
    slopes = {}
    for arm in mg.arms_of(found):
        slopes[arm] = np.array(mg.per_seed(found, arm, "patch_slope"))  # (seeds, K)
    K = len(record["patch_slope"])
    inside = slopes[run.arm][:, 1 : run.a + 1].mean()
    fig, ((ax,),) = mg.new_figure(width=7)
    ax.axvspan(0.5, run.a + 0.5, color="#ffe9a8", zorder=0)
    mg.draw_arms(ax, range(K), slopes)
    ax.axhline(1, color="#999999", linewidth=0.8)
    ax.set(xlabel="answers so many positions later", ylabel="slope: moved / due", xticks=range(K))
    fig.suptitle(f"One state exchanged: {run.arm}'s answers move by {inside:.2f} of what is due")
    return mg.finish(fig, "shaded: the answers that sum that sine\n" + about(found))


def plot_gradients(found, run, folder):
    """Whom the gradient serves: vanilla's trained weights, the backward passes of three arms."""
    weights = kept_arrays(found, run, folder, ["vanilla"])["vanilla"]
    x, y = sample_task(run, 64, EVALUATION + 6)
    fig, (row,) = mg.new_figure(3, width=3.6, height=3.4)
    tables = {}
    for arm in ("vanilla", "horizon_4", "myopic"):
        model = mg.load_weights(make_model(replace(run, arm=arm)), weights)
        tables[arm] = mg.gradient_tables(model, x, y)[0]  # (T, T)
    top = max(table.max() for table in tables.values())
    for ax, (arm, table) in zip(row, tables.items()):
        shown = np.where(table > 0, table / top, np.nan)  # what is exactly zero stays white
        image = ax.imshow(shown, norm=LogNorm(1e-4, 1))
        ax.set(title=mg.GLOSS.get(arm, arm), xlabel="position j")
    row[0].set_ylabel("loss at position i")
    j = run.block_size // 3
    edge = dict(xytext=(0.25, 0.9), textcoords="axes fraction", fontsize=8)
    arrow = dict(arrowstyle="->")
    row[0].annotate(f"last to need it: {run.a} later", (j, j + run.a), arrowprops=arrow, **edge)
    fig.colorbar(image, ax=list(row), label="gradient of loss i by the embedding at j")
    fig.suptitle("Which losses pull at position j: all later ones, near ones, its own")
    caption = "white: exactly zero; vanilla's weights; of the largest"
    return mg.finish(fig, f"{caption}; p = {run.p:g}, a = {run.a}, seed {run.seed}")


def draw_film(found, run, folder):
    """precache.gif: what the probe reads in layer 1 while both models train, and the losses."""
    kept, curves = kept_arrays(found, run, folder), {}
    for arm in ("vanilla", "myopic"):
        curves[arm] = found[replace(run, arm=arm)]["curve"]
    grid = np.linspace(-2.5, 2.5, 400)
    fig, axes = mg.new_figure(2, 2, width=4.2, height=2.5)
    fig.set_dpi(80)

    def frame(n):
        step, _ = curves["vanilla"][n]
        b, _, _ = curriculum(run, step)
        fig.suptitle(f"step {step}: the sine is sin({b:.1f}·x)", fontsize=10)
        for (top, low), arm in zip(axes.T, curves):
            colour, _, _ = mg.look(arm)
            top.clear()
            low.clear()
            top.plot(grid, np.sin(b * grid), color="#bbbbbb", linewidth=1)
            top.plot(*kept[arm]["film"][n], ".", markersize=2, color=colour)
            top.set(title=mg.GLOSS[arm], xlabel="x", xlim=(-2.5, 2.5), ylim=(-1.5, 1.5))
            low.plot(*np.transpose(curves[arm]), color="#dddddd")
            low.plot(*np.transpose(curves[arm][: n + 1]), color=colour)
            low.axvline(step, color="#999999", linewidth=0.8)
            low.set(xlabel="training steps", ylim=(0, 1.3))
        axes[0, 0].set_ylabel("read in layer 1\n(grey: the sine)")
        axes[1, 0].set_ylabel("loss / trivial")

    frame(0)
    fig.draw_without_rendering()
    fig.set_layout_engine("none")  # laid out once, not for every frame
    last = len(curves["vanilla"]) - 1
    frames = [*range(0, last, 2), last, last, last, last]  # two seconds of the end
    film = FuncAnimation(fig, frame, frames=frames, init_func=fig.draw_without_rendering)
    return lambda part: film.save(part, writer=PillowWriter(fps=2))


# ------------------------ table and report
def main_numbers(record):
    """Huber / p, its ratio to the trivial predictor's, probe, its control, mean slope inside."""
    inside = record["patch_slope"][1 : record["a"] + 1]
    probe, untrained = record["probe_r2"][1][0], record["probe_r2_untrained"][1][0]
    return record["huber_over_p"], record["ratio"], probe, untrained, np.mean(inside)


def is_papers_task(run):
    """Is this the paper's task and model, so that its numbers may stand beside ours?"""
    shape = (run.a, run.b, run.block_size, run.n_layer, run.n_head, run.n_embd)
    return shape == (10, 10.0, 64, 2, 2, 128)


def table_rows(found):
    """-> a row for each p, size and arm; the last cell is the paper's Huber / p."""
    groups = {}
    for run, record in found.items():
        size = f"{run.n_layer}x{run.n_embd}"
        groups.setdefault((run.p, size, run.arm), {})[run] = record
    rows = []
    for (p, size, arm), group in groups.items():
        columns = zip(*map(main_numbers, group.values()))
        paper = PAPER.get(p, {}).get(arm, "-") if is_papers_task(next(iter(group))) else "-"
        cells = map(mg.mean_sd, columns)
        rows.append([f"{p:g}", size, arm, str(len(group)), *cells, str(paper)])
    return rows


@matplotlib.style.context("default")  # as in myopic_gpt.py
def report(found, args):
    """The table; then the figures, of the largest p and the largest model."""
    header = ["p", "size", "arm", "n", "Huber/p", "ratio"]
    header += ["probe R²", "untrained", "slope", "paper"]
    caption = "mean ± standard deviation over n seeds; probe: layer 1, its own sine, held out"
    mg.print_table("Pre-caching", header, table_rows(found), caption)

    folder, p_shown = args.out_dir, max(run.p for run in found)
    of_p = {run: record for run, record in found.items() if run.p == p_shown}
    sizes = mg.by_size(of_p)
    shown = list(sizes.values())[-1]
    run = replace(next(iter(shown)), seed=args.run.seed)
    mg.draw(folder / "precache.png", plot_evidence, shown)
    mg.draw(folder / "precache_patch.png", plot_patch, shown)
    mg.draw(folder / "precache_lags.png", mg.plot_lags, shown, run.a, about(shown))
    if len(sizes) > 1:
        gap, probe = {}, {}
        for size, group in sizes.items():
            gap[size] = [100 * ratio for ratio in mg.gaps(group, "myopic", "ratio").values()]
            probe[size] = [r2[1][0] for r2 in mg.per_seed(group, "vanilla", "probe_r2")]
        panels = {"myopia gap (% of trivial loss)": gap, "R² of the probe, vanilla": probe}
        finding = "Of the trivial predictor's loss, myopia costs"
        task = f"p = {run.p:g}, a = {run.a}, b = {run.b:g}; T = {run.block_size}"
        caption = f"{task}; {mg.seeds_of(of_p)}"
        mg.draw(folder / "precache_size.png", mg.plot_sizes, panels, finding, caption)
    mg.draw(folder / "precache_sequence.png", plot_sequence, shown, run, folder)
    mg.draw(folder / "precache_gradients.png", plot_gradients, shown, run, folder)
    mg.draw(folder / "precache.gif", draw_film, shown, run, folder)
    print(f"open {folder / 'precache.png'} first")


# ------------------------ main
def flags(argv=None):
    """argv -> args."""
    p = dict(nargs="+", type=float, metavar="P", help="how often the answer needs the sines")
    args = mg.parse_flags(__file__, __doc__, PRESETS, argv, [("--p", p)])
    args.runs = []
    for value in args.p:
        args.runs += mg.all_runs(args, replace(args.run, p=value), lambda channels: 2)
    return args


def main(argv=None):
    """Train what is not recorded yet, print the table, draw the figures."""
    with mg.exit_status(__file__):
        args = flags(argv)
        report(mg.train_missing(args.runs, train_sine, "ratio", args), args)


if __name__ == "__main__":
    main()
