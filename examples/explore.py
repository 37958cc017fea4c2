"""Explore the shipped model, cell by cell: drawing, inversion, guidance, likelihood. Writes outputs/explore.png.

    .venv/bin/python examples/explore.py

Takes fifty seconds on one CPU core. An argument replaces the 30 steps of each drawing: 8 take 18 seconds.
"""

# %% Load a pipeline, and take out its parts: the frozen model, its denoiser, and the times that a sampler visits.
import sys
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from data.readers import to_pixels
from ldm import TextToImage
from ldm.diffusion import noise_sample
from ldm.samplers import SAMPLERS, invert, time_grid
from ldm.samplers.guidance import classifier_free, projected, rescaled, within_interval
from ldm.samplers.likelihood import bits_per_dimension, log_likelihood, signs

ROOT = Path(__file__).parents[1]
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 30
pipe = TextToImage.load(ROOT / "weights" / "emoji64", device="cpu", dtype="fp32")
model = pipe.model
times = time_grid(model.path, STEPS)
rows: list[tuple[list[Image.Image], list[str]]] = []  # of the sheet: pictures, and a label below each


def denoise_for(captions: list[str]):
    """Return denoise(x_t, t) -> x0_hat, the only function of the model that samplers, inversion and likelihood call."""
    return model.denoise_with(pipe.denoiser, model.conditioner(captions))


def pictures(values: torch.Tensor) -> list[Image.Image]:
    """B x 3 x h x w in [-1, 1] -> pictures of 128 x 128."""
    flat = ((values.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one).resize((128, 128), Image.Resampling.NEAREST) for one in flat]


# %% Draw.
subjects = ["red apple", "Santa Claus, dark skin tone", "dog face", "fire engine"]
prompts = [f"a noto emoji of {subject}" for subject in subjects]
drawn = torch.stack([to_pixels(pipe(prompt, steps=STEPS, seed=7)[0]) for prompt in prompts])
rows.append((pictures(drawn), subjects))

# %% Invert: the noise from which DDIM draws these pictures. The grid ends above 0, where some noise is left to follow.
ddim, generators = SAMPLERS["ddim"].function, [torch.Generator().manual_seed(i) for i in range(4)]
with torch.no_grad():
    latents = model.vae.encode(drawn).mean
    noise = invert(denoise_for(prompts), latents, model.path, times[:-1], iterations=3)
    again, other = (
        model.decode(ddim(denoise_for(captions), noise, model.path, times, generators))
        for captions in (prompts, [prompt.replace("noto", "twemoji") for prompt in prompts])
    )
distances = (again - model.decode(latents)).square().mean((1, 2, 3)).sqrt()
rows.append((pictures(noise[:, :3] / 3), [f"its noise, deviation {one.std():.2f}" for one in noise]))
rows.append((pictures(again), [f"drawn again, {d:.3f} off" for d in distances.tolist()]))
rows.append((pictures(other), ["as a twemoji emoji"] * 4))

# %% Guidance: functions from two denoisers to one, here all from the same noise.
caption, start = "a twemoji emoji of dog face", torch.randn(1, *latents.shape[1:], generator=generators[0])
plain, without = denoise_for([caption]), denoise_for([""])
strong = classifier_free(plain, without, 5.0)
variants = {
    "no guidance": plain,
    "scale 5": strong,
    "5 in 0.2 <= t <= 0.8": within_interval(strong, plain, 0.2, 0.8),
    "5, rescaled by 0.7": rescaled(plain, without, 5.0, 0.7),
    "5, projected": projected(plain, without, 5.0),
}
with torch.no_grad():
    draw = partial(SAMPLERS["dpmpp_2m"].function, x=start, path=model.path, times=times, generator=generators[:1])
    drawings = [pictures(model.decode(draw(denoise)))[0] for denoise in variants.values()]
rows.append((drawings, list(variants)))

# %% Likelihood: bits per dimension of the drawings' latents, a little noisy, under their own and under other words.
falling = torch.linspace(1, 0.1, STEPS // 3 + 2, dtype=torch.float64)
x_t = noise_sample(latents, torch.randn(latents.shape, generator=generators[1]), model.path, falling[-1])
captions_of = {"own": prompts, "none": [""] * 4, "other": prompts[1:] + prompts[:1]}
bits = {
    name: bits_per_dimension(
        log_likelihood(denoise_for(captions), x_t, model.path, falling, signs(x_t, generators)), x_t[0].numel()
    )
    for name, captions in captions_of.items()
}
labels = ["bits " + ", ".join(f"{name} {one[i]:.2f}" for name, one in bits.items()) for i in range(4)]
with torch.no_grad():
    rows.append((pictures(model.decode(x_t)), labels))

# %% One sheet of all.
canvas = Image.new("RGB", (5 * 184, len(rows) * 150), "white")
for row, (images, names) in enumerate(rows):
    for column, (image, name) in enumerate(zip(images, names, strict=True)):
        canvas.paste(image, (column * 184 + 28, row * 150))
        ImageDraw.Draw(canvas).text((column * 184 + 4, row * 150 + 132), name[:46], fill="black", font_size=10)
Path("outputs").mkdir(exist_ok=True)
canvas.save("outputs/explore.png")
print(*(name for _, names in rows for name in names), "outputs/explore.png", sep="\n")
