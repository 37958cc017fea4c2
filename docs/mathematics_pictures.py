"""Draw the pictures of docs/mathematics.md, each with the functions that the page derives.

    python docs/mathematics_pictures.py
    python docs/mathematics_pictures.py --only trajectories --outdir outputs

Needs matplotlib, which the dev extra installs. Nothing is trained or measured: the pictures are the same every time.
"""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from ldm.diffusion import Prediction
    from ldm.diffusion.objective import Weighting

ROOT = Path(__file__).resolve().parents[1]
# Okabe and Ito's colours, which colour-blind readers can distinguish.
BLACK, ORANGE, SKY, GREEN, BLUE = "#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2"
RED, PINK, GREY, PALE = "#d55e00", "#cc79a7", "#b8b8b8", "#e0e0e0"

# The data of `trajectories`: a mixture of three normals in two dimensions.
CENTRES, SHARES, SPREAD = ((1.5, 0.0), (-1.0, 1.0), (-0.5, -1.5)), (0.4, 0.3, 0.3), 0.25


def panels(height: float, rows: int, columns: int, **settings: Any) -> tuple[Figure, Any]:
    """A figure 1000 pixels wide and its axes, rows x columns, without pyplot and its list of open figures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **settings)
    for axis in axes.flat:
        axis.grid(color=PALE)
    return figure, axes


def paths() -> Figure:
    """alpha, sigma and log-SNR over t. EDM's sigma goes to 80, so it stands in the last panel alone."""
    import torch

    from ldm.diffusion import CosinePath, EDMPath, LinearBetaPath, RectifiedFlowPath, ScaledLinearBetaPath

    figure, axes = panels(4.6, 1, 3)
    lines = [
        ("DDPM", LinearBetaPath(), BLACK, "-"),
        ("cosine", CosinePath(), GREEN, "-"),
        ("Stable Diffusion", ScaledLinearBetaPath(), BLUE, "-"),
        ("… with zero terminal SNR", ScaledLinearBetaPath(zero_terminal_snr=True), SKY, "--"),
        ("rectified flow", RectifiedFlowPath(), RED, "-"),
        ("… with shift 3", RectifiedFlowPath(shift=3.0), ORANGE, "--"),
        ("EDM", EDMPath(), PINK, "-."),
    ]
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for label, path, color, dashes in lines:
        curves = (path.alpha(t), path.sigma(t), path.log_snr(t))
        for panel in (2,) if label == "EDM" else (0, 1, 2):
            inside = curves[panel].isfinite()
            axes[0, panel].plot(t[inside], curves[panel][inside], dashes, color=color, linewidth=2, label=label)
    for axis, title in zip(axes[0], ("α: share of the data", "σ: share of the noise", "log-SNR"), strict=True):
        axis.set(title=title, xlabel="t", xlim=(0, 1), ylim=(-0.02, 1.02))
    axes[0, 2].set_ylim(-12, 12)
    figure.legend(*axes[0, 2].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def forward() -> Figure:
    """Draw one picture on its way to noise along two paths. The noise is the same in all: only its weight changes."""
    import torch
    from matplotlib.figure import Figure

    from ldm.diffusion import RectifiedFlowPath, ScaledLinearBetaPath, noise_sample

    pixels = emoji("a noto emoji of dog face")
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0, 0.1, 0.25, 0.4, 0.6, 0.8, 1], dtype=torch.float64)
    width, height, side, gap = 1000, 448, 128, 14  # in pixels, so that each of the picture's is 2 x 2 of ours
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    rows = (("Stable Diffusion", ScaledLinearBetaPath(), 235), ("rectified flow", RectifiedFlowPath(), 8))
    for label, path, bottom in rows:
        figure.text(gap / width, (bottom + side + 50) / height, label, weight="bold")
        for place, (t, log_snr) in enumerate(zip(times, path.log_snr(times).tolist(), strict=True)):
            left = gap + place * (side + gap)
            axis = figure.add_axes((left / width, bottom / height, side / width, side / height), frameon=False)
            noisy = noise_sample(pixels, noise, path, t).clamp(-1, 1)
            axis.imshow((noisy.permute(1, 2, 0) + 1) / 2, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            number = f"{log_snr:.1f}".replace("-", "−").replace("inf", "∞")
            axis.set_title(f"t = {t:g}\nlog-SNR {number}", fontsize=12)
    return figure


def emoji(caption: str) -> Tensor:
    """Pixels 3 x 64 x 64 in [-1, 1] of the embedded training picture with this caption."""
    from data.captions import read_captions
    from data.readers import decode_pixels
    from data.shards import Shard
    from data.sources import expand

    for shard in (Shard(Path(one.location)) for one in expand(str(ROOT / "data/emoji64/train/*.tar.gz"))):
        for raw in (shard[i] for i in range(len(shard))):
            if read_captions(raw)[0] == caption:
                return decode_pixels(raw, 64)
    raise ValueError(f"no training picture has the caption {caption!r}")


def trajectories() -> Figure:
    """Where samplers walk with an exact denoiser; colours and rings show where the ODE takes the same noise."""
    import torch

    start = torch.randn(24, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = (("euler", 500), ("euler", 8), ("dpmpp_2m", 8), ("euler_ancestral", 40))
    walks = [walk(sampler, start, steps) for sampler, steps in settings]
    true_ends = walks[0][-1]
    colors = [(BLUE, RED, GREEN)[i] for i in torch.cdist(true_ends, torch.tensor(CENTRES).double()).argmin(1)]
    side = torch.linspace(-2.7, 2.7, 200, dtype=torch.float64)
    density = members(torch.cartesian_prod(side, side), torch.ones(()), torch.zeros(()))[0].exp().sum(1).view(200, 200)
    figure, axes = panels(10.2, 2, 2, sharex=True, sharey=True)
    for axis, (sampler, steps), walked in zip(axes.flat, settings, walks, strict=True):
        axis.contourf(side, side, density.T / density.max(), levels=(0.03, 0.2, 0.4, 0.6, 0.8, 1), cmap="Greys", vmax=2)
        for i, (line, color, true_end) in enumerate(zip(walked.unbind(1), colors, true_ends, strict=True)):
            faint = 0.2 if steps == 40 and i not in map(colors.index, (BLUE, RED, GREEN)) else 1.0
            axis.plot(*line.T, "-" if steps == 500 else ".-", color=color, alpha=faint, linewidth=1.2, markersize=5)
            axis.plot(*line[0], "o", color="white", markeredgecolor=color, markersize=5)
            axis.plot(*line[-1], "o", color=color, markersize=6)
            if steps == 8:
                axis.plot(*true_end, "o", color="none", markeredgecolor=BLACK, markersize=10)
        title = "the ODE (500 steps)" if steps == 500 else f"{sampler}, {steps} steps"
        axis.set(title=title, aspect="equal", xlim=(-2.7, 2.7), ylim=(-2.7, 2.7))
    return figure


def members(x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The mixture under noise, seen from x, N x 2: the log of what each of its normals adds to the density there,
    N x 3, and the mean of the data if x came from that one, N x 3 x 2."""
    import torch

    centres, variance = torch.tensor(CENTRES).double(), alpha**2 * SPREAD**2 + sigma**2
    away = x[:, None] - alpha * centres
    log_density = torch.tensor(SHARES).log() - away.square().sum(2) / (2 * variance) - (2 * math.pi * variance).log()
    return log_density, centres + alpha * SPREAD**2 / variance * away


def walk(sampler: str, start: Tensor, steps: int) -> Tensor:
    """Each x_t that a sampler asks an exact denoiser, E[x0 | x_t], about, and its answer: (steps + 1) x N x 2."""
    import torch

    from ldm.diffusion import ScaledLinearBetaPath
    from ldm.samplers import SAMPLERS, time_grid

    path, seen = ScaledLinearBetaPath(), []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        log_density, means = members(x, path.alpha(t), path.sigma(t))
        return (log_density.softmax(1)[..., None] * means).sum(1)

    generators = [torch.Generator().manual_seed(i) for i in range(len(start))]
    end = SAMPLERS[sampler].function(denoise, start, path, time_grid(path, steps, "log_snr"), generators)
    return torch.stack([*seen, end])


def grids() -> Figure:
    """Draw where each time grid puts 12 steps, over log-SNR. Two names of one function have a common row."""
    import torch

    from ldm.diffusion import ScaledLinearBetaPath
    from ldm.samplers import TIME_GRIDS, time_grid

    path = ScaledLinearBetaPath()
    names: dict[object, list[str]] = {}
    for name, grid in TIME_GRIDS.items():
        names.setdefault(grid, []).append(name)
    figure, axes = panels(6.4, 1, 1)
    axis, low, high = axes[0, 0], *path.log_snr_range
    end = high + 0.9  # where t = 0 is drawn, whose log-SNR is infinite
    for row, same in enumerate(names.values()):
        places = path.log_snr(time_grid(path, 12, same[0]))[:-1]
        axis.plot([low, end], [row, row], color=PALE)
        axis.plot(places, [row] * len(places), "|", color=BLUE, markersize=18, markeredgewidth=2.5)
        axis.plot(end, row, ">", color=RED, markersize=8)
    axis.set_yticks(range(len(names)), ["\n".join(same) for same in names.values()])
    axis.set(xlim=(low - 0.3, end + 0.3), ylim=(len(names) - 0.4, -0.6), xlabel="log-SNR, from noise to data")
    axis.grid(visible=False)
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    top, shown = axis.secondary_xaxis("top"), torch.tensor([1, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.02, 0.001]).double()
    top.set(xticks=[*path.log_snr(shown), end], xticklabels=[*(f"{t:g}" for t in shown), "0"], xlabel="t")
    return figure


def weights() -> Figure:
    """What each loss weighting asks for, as a weight on the error of x0, of eps and of v; broad where two agree."""
    import torch

    from ldm.diffusion import ObjectiveConfig, ScaledLinearBetaPath, loss_weight
    from ldm.diffusion.predictions import x0_sensitivity

    path = ScaledLinearBetaPath()
    t = torch.arange(1, path.num_train_timesteps + 1, dtype=torch.float64) / path.num_train_timesteps
    figure, axes = panels(4.4, 1, 3, sharex=True, sharey=True)
    lines: list[tuple[str, Prediction, Weighting, str, str, float]] = [
        ("constant, on ε", "eps", "constant", GREY, "-", 8),
        ("constant, on v", "v", "constant", ORANGE, "-", 6),
        ("edm", "v", "edm", BLACK, ":", 2.5),
        ("min_snr", "v", "min_snr", BLUE, "-", 2.5),
        ("soft_min_snr", "v", "soft_min_snr", GREEN, "--", 2.5),
    ]
    errors: list[tuple[str, Prediction]] = [("x₀", "x0"), ("ε", "eps"), ("v", "v")]
    for label, own, weighting, color, dashes, width in lines:
        config = ObjectiveConfig(prediction=own, weighting=weighting)
        on_x0 = loss_weight(config, path, t) / x0_sensitivity(own, path, t)
        for axis, (symbol, error) in zip(axes[0], errors, strict=True):
            weight = on_x0 * x0_sensitivity(error, path, t)
            axis.plot(path.log_snr(t), weight, color=color, ls=dashes, lw=width, label=label)
            axis.set(title=f"weight on the error of {symbol}", xlabel="log-SNR", yscale="log", ylim=(3e-3, 2e3))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


PICTURES = {function.__name__: function for function in (paths, forward, trajectories, grids, weights)}


def save(name: str, target: Path) -> None:
    """Draw one picture. 256 colours are enough for it, and a third of the bytes."""
    from matplotlib import rc_context
    from PIL import Image

    drawn = io.BytesIO()
    with rc_context({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        PICTURES[name]().savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(256).save(target, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outdir", type=Path, default=ROOT / "docs/mathematics", help="docs/mathematics if left out")
    parser.add_argument("--only", choices=PICTURES, help="one picture; all if left out")
    args = parser.parse_args()
    args.outdir.mkdir(parents=True, exist_ok=True)
    for name in [args.only] if args.only else PICTURES:
        save(name, args.outdir / f"{name}.png")


if __name__ == "__main__":
    main()
