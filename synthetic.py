"""A task where planning ahead pays: who computes sin(b x_n) before anyone asks for it?

    x_n ~ N(0, 1)    z_n ~ Bernoulli(p)    y_n = z_n sum_{i=1..a} sin(b x_{n-i}) + (1 - z_n) x_n

Where z_n = 1 the answer needs `a` sines of past inputs. A layer of attention can add up `a` values,
but it cannot take `a` sines first. A model of two layers can do it if layer 1 computes sin(b x_n)
at every position n, although n itself has no use for it, and layer 2 adds up what lies ready. That
is pre-caching: it takes gradient from later losses, and myopic training stops that.

    python synthetic.py                      # p = 1, three arms, three seeds: minutes on two cores
    python synthetic.py --preset smoke       # the same in seconds
    python synthetic.py --preset full        # the paper's task and model, four values of p: one GPU
    python synthetic.py --p 0.3 --a 4 --b 3 --out_dir out/mine      # another task

Evidence: (1) the loss, beside that of the predictor (1 - z_n) x_n; (2) a linear probe that reads
sin(b x_{n-i}) out of the residual stream, beside the same probe on the model before training.
Task, model and probes after Wu, Morris, Levine (2024), arXiv 2404.00859, section 4.
Shapes as in myopic_gpt.py; also L = n_layer, and K lookbacks i = 0 .. K-1.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import myopic_gpt as mg

COMMON = dict(arms=["vanilla", "myopic", "myopic_kv"], seed=0, n_layer=2, n_head=2, embd_std=0.05,
              wave_std=0.0, learning_rate=2e-3, minutes_on="two CPU cores")
PRESETS = {     # b_start: the frequency that training begins with, see next_batch in run_precache
    "smoke": dict(COMMON, seeds=1, p=[1.0], a=3, b=2.0, b_start=1.0, block_size=12, n_embd=16,
                  batch_size=16, max_iters=20, eval_sequences=128, minutes_per_run=0.01),
    "quick": dict(COMMON, seeds=3, p=[1.0], a=10, b=5.0, b_start=2.0, block_size=32, n_embd=64,
                  batch_size=128, max_iters=800, eval_sequences=2048, minutes_per_run=0.6),
    "full": dict(COMMON, seeds=3, p=[0.01, 0.1, 0.3, 1.0], a=10, b=10.0, b_start=2.0, block_size=64,
                 n_embd=128, batch_size=512, max_iters=11718, eval_sequences=8192,
                 embd_std=0.1, wave_std=0.1, learning_rate=1e-3, minutes_per_run=1.0,
                 minutes_on="a GPU (guess)"),
}
PAPER = {   # Huber / p of the paper's runs: one seed, a = b = 10
    0.01: dict(vanilla=0.096, myopic=1.10), 0.1: dict(vanilla=0.016, myopic=0.97),
    0.3: dict(vanilla=0.0030, myopic=1.03), 1.0: dict(vanilla=0.0074)}  # myopic: 1.26 with 3 layers
LOOKBACKS = 16


# ------------------------ the task and the model
def sample_batch(batch_size, seq_len, p, a=10, b=10.0, generator=None):
    """Draw sequences of D_p: x (B, T, 2), x[..., 0] = x_n and x[..., 1] = z_n, and y (B, T).

    y_n = z_n sum_{i=1..a} sin(b x_{n-i}) + (1 - z_n) x_n; terms before position 0 are 0. The batch
    is made on the generator's device. Source: Wu, Morris, Levine (2024), section 4.1."""
    device = None if generator is None else generator.device
    x = torch.randn(batch_size, seq_len, generator=generator, device=device)            # (B, T)
    z = (torch.rand(batch_size, seq_len, generator=generator, device=device) < p).float()
    sines = F.pad(torch.sin(b * x), (a, 0))[:, :-1]                                     # (B, a+T-1)
    y = z * sines.unfold(1, a, 1).sum(-1) + (1 - z) * x                                 # (B, T)
    return torch.stack([x, z], dim=-1), y


def trivial_prediction(x):
    """(1 - z_n) x_n: right where z_n = 0, and knows of no sine. x (B, T, 2) -> (B, T)."""
    return (1 - x[..., 1]) * x[..., 0]


class SineModel(mg.GPT):
    """GPT with ReLUs, a linear embedding of (x, z) and a linear read-out of one number. Learned
    positions start at random (deviation 0.02) or, if wave_std > 0, as sines and cosines whose
    mean square is wave_std^2: channel c goes through T^(-c/C) radians per position."""

    def __init__(self, config, embd_std=0.02, wave_std=0.0):
        super().__init__(config)
        for block in self.transformer.h:
            block.mlp.act = nn.ReLU()
        self.transformer.wte = nn.Linear(2, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, 1)
        for layer, std in ((self.transformer.wte, embd_std), (self.lm_head, 0.02)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)      # a random one spreads the kinks: a sine by chance
        if wave_std:
            T, c = config.block_size, torch.arange(config.n_embd)
            angle = torch.arange(T)[:, None] * T ** (-c / len(c)) + math.pi / 2 * (c % 2)   # (T, C)
            self.transformer.wpe.weight.data.copy_(math.sqrt(2) * wave_std * angle.sin())

    def forward(self, x, y=None):
        """x (B, T, 2), y (B, T) -> prediction (B, T), Huber loss (delta 1) or None."""
        guess = self.lm_head(self.transformer.ln_f(self.hidden_states(x)[-1])).squeeze(-1)
        return guess, None if y is None else F.huber_loss(guess.float(), y)


# ------------------------ measurements
@torch.no_grad()
def huber_losses(model, x, y, p):
    """Huber loss of the model and of the trivial predictor: over p, and apart for z = 1, z = 0."""
    z, numbers = x[..., 1] == 1, {}
    for name, guess in (("huber", torch.cat([model(part)[0] for part in x.split(512)])),
                        ("trivial", trivial_prediction(x))):
        loss = F.huber_loss(guess, y, reduction="none")                                 # (B, T)
        numbers[f"{name}_over_p"] = loss.mean().item() / p
        numbers[f"{name}_z1"] = loss[z].mean().item() if z.any() else None
        numbers[f"{name}_z0"] = loss[~z].mean().item() if not z.all() else None
    numbers["ratio"] = numbers["huber_over_p"] / numbers["trivial_over_p"] if z.any() else None
    return numbers


@torch.no_grad()
def probe_data(model, x, lookbacks):
    """Rows for the probe: one per sequence and position with all `lookbacks` inputs, its own first.

    Returns hidden states (L+1, rows, C), past inputs x_{n-i} (rows, K): float64, on the CPU."""
    T, K = x.size(1), lookbacks
    states = torch.stack(model.hidden_states(x))[:, :, K - 1:].flatten(1, 2)        # (L+1, rows, C)
    past = torch.stack([x[:, K - 1 - i:T - i, 0] for i in range(K)], dim=-1)        # (B, T-K+1, K)
    return states.cpu().double(), past.flatten(0, 1).cpu().double()


def ridge_probe(train_states, train_targets, test_states, test_targets, ridge=1e-3):
    """Held-out, centred R^2 of a linear probe: 1 - squared error / squared distance to the mean.

    states (rows, C), targets (rows, K), from two separate draws -> R^2 (K,), estimates (rows, K).
    """
    mean, scale, centre = train_states.mean(0), train_states.std(0) + 1e-9, train_targets.mean(0)
    X, X_test = (train_states - mean) / scale, (test_states - mean) / scale             # (rows, C)
    penalty = ridge * len(X) * torch.eye(X.size(1), dtype=X.dtype)
    weights = torch.linalg.solve(X.T @ X + penalty, X.T @ (train_targets - centre))     # (C, K)
    estimate = X_test @ weights + centre                                                # (rows, K)
    error = (test_targets - estimate).square().sum(0)
    return 1 - error / (test_targets - test_targets.mean(0)).square().sum(0), estimate


def correlations(states, targets):
    """|correlation| of each channel with each target: (rows, C), (rows, K) -> (C, K)."""
    X, Y = (t - t.mean(0) for t in (states, targets))
    return (X.T @ Y).abs() / (X.norm(dim=0)[:, None] * Y.norm(dim=0) + 1e-12)


def probe_model(model, s, device, pictures):
    """Probe the residual stream after every block (0: the embedding; 1: after block 1, its MLP
    included) for sin(b x_{n-i}): R^2 [layer][lookback]; with data for the figures if asked."""
    generator, K = torch.Generator(device).manual_seed(20_000), min(LOOKBACKS, s["block_size"] // 2)
    draws = [sample_batch(s["eval_sequences"] // 2, s["block_size"], s["p"], s["a"], s["b"],
                          generator)[0] for _ in ("train", "test")]
    (train, past_train), (test, past) = (probe_data(model, x, K) for x in draws)
    sines_train, sines = torch.sin(s["b"] * past_train), torch.sin(s["b"] * past)       # (rows, K)
    fits = [ridge_probe(X, sines_train, X_test, sines) for X, X_test in zip(train, test)]
    rounded = lambda t, digits: np.round(t.tolist(), digits).tolist()
    numbers = dict(probe_r2=[rounded(r2, 4) for r2, _ in fits])
    if pictures:
        estimate = fits[1][1][:400, 0]                                                  # layer 1
        numbers.update(sine_x=rounded(past[:400, 0], 3), sine_estimate=rounded(estimate, 3),
                       neurons_x=[rounded(correlations(X, past), 2) for X in test[1:]],
                       neurons_sin=[rounded(correlations(X, sines), 2) for X in test[1:]])
    return numbers


# ------------------------ one run
def run_precache(s, device, pictures):
    """Train one model; -> the numbers of its record. Same seed: same start, same batches."""
    torch.manual_seed(s["seed"])
    config = mg.GPTConfig(s["block_size"], 1, s["n_layer"], s["n_head"], s["n_embd"],
                          **mg.arm_fields(s["arm"]))
    model = SineModel(config, s["embd_std"], s["wave_std"]).to(device)
    batches = torch.Generator(device).manual_seed(1_000 + s["seed"])
    x, y = sample_batch(s["eval_sequences"], s["block_size"], s["p"], s["a"], s["b"],
                        torch.Generator(device).manual_seed(10_000))
    untrained = probe_model(model, s, device, pictures)         # the control: same seed, step 0
    curve = []

    def next_batch(step):   # in every arm alike, b goes from b_start to b over the first 60%
        b = s["b_start"] + (s["b"] - s["b_start"]) * min(1, step / (0.6 * s["max_iters"]))
        return sample_batch(s["batch_size"], s["block_size"], s["p"], s["a"], b, batches)

    def after_step(n):
        if n % max(1, s["max_iters"] // 20) == 0:
            curve.append([n, huber_losses(model, x[:512], y[:512], s["p"])["ratio"]])

    after_step(0)
    optimizer = model.configure_optimizers(0.01, s["learning_rate"], device_type=device)
    mg.train(torch.compile(model) if s["compile"] else model, optimizer, next_batch,
             steps=s["max_iters"], learning_rate=s["learning_rate"], dtype=s["dtype"],
             grad_accum=s["gradient_accumulation_steps"], after_step=after_step,
             title=f"{s['arm']} p={s['p']:g} seed {s['seed']}")
    numbers = {**huber_losses(model, x, y, s["p"]), **probe_model(model, s, device, pictures),
               "probe_r2_untrained": untrained["probe_r2"], "curve": curve,
               "sine_estimate_untrained": untrained.get("sine_estimate")}
    print(f"{s['arm']:>9}, p = {s['p']:g}, seed {s['seed']}: loss {numbers['huber_over_p']:.3f}, "
          f"{numbers['ratio'] or math.nan:.2f} of the trivial predictor's; layer 1 gives "
          f"sin({s['b']:g} x_n) with R² {numbers['probe_r2'][1][0]:.2f}, "
          f"untrained {untrained['probe_r2'][1][0]:.2f}", flush=True)
    return numbers


# ------------------------ figures and table
def by_arm(records, p):
    """{arm: [records of its seeds]} at this p."""
    arms = {}
    for r in records:
        if r["p"] == p:
            arms.setdefault(r["arm"], []).append(r)
    return arms


def seeds_text(records):
    n = len({r["seed"] for r in records})
    return f"mean of {n} seeds, band: one standard deviation" if n > 1 else "one seed"


def plot_evidence(records, out_dir):
    """Loss against training steps, and what the probe finds in layer 1, for the largest p."""
    p, r = max(r["p"] for r in records), records[0]
    arms = by_arm(records, p)
    fig, ((left, right),) = mg.new_figure(2, width=4.8, height=3.5)
    left.axhline(1, color="#999999", linewidth=0.8)
    mg.draw_lines(left, [n for n, _ in r["curve"]], {
        arm: {r["seed"]: [ratio for _, ratio in r["curve"]] for r in runs}
        for arm, runs in arms.items()},
        title="Who learns the task?", xlabel="training steps", ylim=(0, 1.6),
        ylabel="loss / loss of the trivial predictor")
    draw_probe(right, arms, 1, f"Whose layer 1 prepares sin({r['b']:g}·x) for later?")
    mg.save_figure(fig, out_dir / "precache.png", f"p = {p:g}, a = {r['a']}, b = {r['b']:g} "
                   f"(from {r['b_start']:g} over 60% of the steps); {seeds_text(records)}")


def draw_probe(ax, arms, layer, title):
    """R^2 of the probe for sin(b x_{n-i}) against the lookback i, for every arm and the control."""
    lines = {arm: {r["seed"]: r["probe_r2"][layer] for r in runs} for arm, runs in arms.items()}
    lines["untrained"] = {r["seed"]: r["probe_r2_untrained"][layer]
                          for runs in arms.values() for r in runs}
    lookbacks = range(len(next(iter(lines["untrained"].values()))))
    mg.draw_lines(ax, lookbacks, lines, label_at=0, title=title,
                  xlabel="lookback i", ylabel="probe R² for the sine i back", ylim=(-0.05, 1.05),
                  xticks=lookbacks[::5])


def plot_probes(records, out_dir):
    """The probe's R^2 for every layer (columns) and p (rows)."""
    ps, layers = sorted({r["p"] for r in records}), len(records[0]["probe_r2"])
    fig, axes = mg.new_figure(layers, len(ps), width=4.4, height=3)
    for row, p in zip(axes, ps):
        for layer, ax in enumerate(row):
            where = f"after layer {layer}" if layer else "embedding"
            draw_probe(ax, by_arm(records, p), layer, f"{where}, p = {p:g}")
    mg.save_figure(fig, out_dir / "precache_probe.png",
                   f"held-out, centred R² of a ridge probe; {seeds_text(records)}")


def plot_neurons(records, out_dir):
    """|correlation| of every channel with x_{n-i} and with sin(b x_{n-i}), vanilla and myopic."""
    p = max(r["p"] for r in records)
    shown = {arm: runs[0] for arm, runs in by_arm(records, p).items()
             if arm in ("vanilla", "myopic") and "neurons_sin" in runs[0]}
    if not shown:
        return
    layers, b = range(records[0]["n_layer"]), records[0]["b"]
    fig, axes = mg.new_figure(2 * len(layers), len(shown), width=2.6, height=2.8)
    for row, (arm, r) in zip(axes, shown.items()):
        panels = [(l, *name) for l in layers for name in (("neurons_x", "x"),
                                                          ("neurons_sin", f"sin({b:g}·x)"))]
        for ax, (l, key, name) in zip(row, panels):
            grid = np.array(r[key][l])                                                  # (C, K)
            grid = grid[np.lexsort((-grid.max(1), grid.argmax(1)))]     # by favourite lookback
            image = ax.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="magma_r")
            ax.set_title(f"{arm}, layer {l + 1}: {name}", fontsize=9)
            ax.set(xlabel="lookback i", yticks=[])
        row[0].set_ylabel(f"{len(grid)} channels, sorted")
    fig.colorbar(image, ax=axes, label="|correlation|", shrink=0.6)
    mg.save_figure(fig, out_dir / "precache_neurons.png", f"residual stream, p = {p:g}, first seed")


def plot_sine(records, out_dir):
    """The layer-1 probe's estimate of sin(b x_n), drawn over the true sine."""
    p = max(r["p"] for r in records)
    runs = {arm: rs[0] for arm, rs in by_arm(records, p).items() if "sine_x" in rs[0]}
    if not runs:
        return
    first, grid = next(iter(runs.values())), np.linspace(-2.5, 2.5, 400)
    estimates = {**{arm: r["sine_estimate"] for arm, r in runs.items()},
                 "untrained": first["sine_estimate_untrained"]}
    fig, (row,) = mg.new_figure(len(estimates), width=2.7, height=2.6, sharey=True)
    for ax, (arm, estimate) in zip(row, estimates.items()):
        ax.plot(grid, np.sin(first["b"] * grid), color="#bbbbbb", linewidth=1)
        colour, _, _ = mg.LOOKS.get(arm, mg.LOOKS["other"])
        ax.plot(first["sine_x"], estimate, ".", markersize=3, color=colour)
        ax.set(title=arm.replace("_", " "), xlabel="x at n", xlim=(-2.5, 2.5), ylim=(-1.5, 1.5))
    row[0].set_ylabel(f"sin({first['b']:g}·x)")
    mg.save_figure(fig, out_dir / "precache_sine.png", "dots: what a linear probe of layer 1 at "
                   f"position n reads; grey: the true sine; p = {p:g}, first seed")


def plot_by_p(records, out_dir):
    """Huber loss over p for every arm against p, beside the paper's where the task agrees."""
    ps, arms = sorted({r["p"] for r in records}), dict.fromkeys(r["arm"] for r in records)
    arms = [arm for arm in arms if all(arm in by_arm(records, p) for p in ps)]
    if len(ps) < 2:
        return
    fig, ((ax,),) = mg.new_figure(width=5.5, height=3.8)
    for arm in arms if same_task(records[0]) else []:
        ax.plot(ps, [PAPER.get(p, {}).get(arm) for p in ps], "*", markersize=10,
                markerfacecolor="none", color=mg.LOOKS.get(arm, mg.LOOKS["other"])[0])
    loss = {(r["arm"], r["seed"], r["p"]): r["huber_over_p"] for r in records}
    seeds = [s for s in {r["seed"] for r in records}
             if all((a, s, p) in loss for a in arms for p in ps)]
    lines = {a: {s: [loss[a, s, p] for p in ps] for s in seeds} for a in arms}
    mg.draw_lines(ax, ps, lines if seeds else {}, xscale="log",
                  yscale="log", xlabel="p: how often the answer needs the sines",
                  ylabel="Huber loss / p", title="The cost of not planning ahead")
    stars = "stars: the paper, one seed; " if same_task(records[0]) else ""
    mg.save_figure(fig, out_dir / "precache_p.png", stars + seeds_text(records))


def same_task(record):
    """Is this the paper's task and model, so that its numbers may stand beside ours?"""
    paper = dict(a=10, b=10.0, block_size=64, n_layer=2, n_head=2, n_embd=128)
    return record["p"] in PAPER and all(record[k] == v for k, v in paper.items())


def show_results(records):
    """One table: every arm at every p, mean ± sd over seeds, beside the paper's for its task."""
    rows, apart = [], any(r["p"] < 1 for r in records)
    for p in sorted({r["p"] for r in records}):
        for arm, runs in by_arm(records, p).items():
            value = lambda key: mg.mean_sd([r[key] for r in runs], 3 if "huber" in key else 2)
            probe = lambda key: mg.mean_sd([r[key][1][0] for r in runs])
            paper = PAPER[p].get(arm, "-") if same_task(runs[0]) else (
                f"other task (b = {runs[0]['b']:g})")
            rows.append([f"{p:g}", arm, str(len(runs)), value("huber_over_p"), value("ratio"),
                         probe("probe_r2"), probe("probe_r2_untrained"), str(paper)]
                        + [value("huber_z1"), value("huber_z0")] * apart)
    mg.print_table("Pre-caching", [
        "p", "arm", "n", "Huber/p", "/ trivial", "probe R²", "untrained", "paper's Huber/p",
        *["Huber, z=1", "Huber, z=0"] * apart], rows,
        "mean ± sd over n seeds; probe: layer 1, lookback 0, held out; untrained: its control")


# ------------------------ main
def experiments(args):
    for arm in args.arms:
        if mg.arm_fields(arm)["past"] == "frozen":
            raise mg.Refusal(f"arm {arm} is for text: leave it out here, or call myopic_gpt.py")
    for name, value, high in [*(("p", p, 1) for p in args.p), ("b", args.b, math.inf),
                              ("b_start", args.b_start, math.inf)]:
        if not 0 < value <= high:
            raise mg.Refusal(f"{name} is {value}: give a number above 0 and at most {high}")
    if args.a >= args.block_size:
        raise mg.Refusal(f"a is {args.a}: make it less than block_size, {args.block_size}")
    mg.GPTConfig(args.block_size, 1, args.n_layer, args.n_head, args.n_embd)  # refuses bad shapes
    shared = {k: getattr(args, k) for k in (
        "a", "b", "b_start", "block_size", "n_layer", "n_head", "n_embd", "embd_std", "wave_std",
        "batch_size", "gradient_accumulation_steps", "max_iters", "learning_rate", "dtype",
        "compile", "eval_sequences")}
    wanted = [dict(task="precache", arm=arm, p=p, seed=seed, **shared)
              for seed in range(args.seed, args.seed + args.seeds)
              for p in dict.fromkeys(args.p) for arm in args.arms]
    records = mg.run_experiments(
        args.out_dir / "synthetic.json", wanted, ("arm", "seed", "p"),
        lambda s: run_precache(s, args.device, pictures=s["seed"] == args.seed), args)
    for plot in (plot_evidence, plot_probes, plot_neurons, plot_sine, plot_by_p):
        plot(records, args.out_dir)
    show_results(records)


def main(argv=None):
    """Train what is not recorded yet, draw the figures, print the table."""
    mg.run_command(__doc__, PRESETS, {
        "--task": dict(nargs="+", choices=["precache"], help="what to train on"),
        "--p": dict(type=float, nargs="+", metavar="P", help="how often the sines are asked for"),
        "--a": dict(type=int, metavar="N", help="how many sines are summed"),
        "--b": dict(type=float, metavar="X", help="frequency of the sine"),
        "--b_start": dict(type=float, metavar="X", help="frequency that training begins with"),
        "--embd_std": dict(type=float, metavar="X", help="scale of the embedding at the start"),
        "--wave_std": dict(type=float, metavar="X", help="scale of positions as waves; 0: random"),
    }, argv, experiments)


if __name__ == "__main__":
    main()
