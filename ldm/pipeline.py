"""From a prompt to pictures: what a program that only wants to draw needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm.denoisers import DenoiserConfig, attention_length, describe_attention
from ldm.grids import to_images
from ldm.interop.denoiser import WEIGHTS_NAME, LoadedDenoiser, denoiser_folder, load_denoiser
from ldm.interop.files import RUN_MODEL, model_folder
from ldm.interop.scheduler import read_scheduler
from ldm.interop.vae import load_vae
from ldm.latent_diffusion import LatentDiffusion, guided
from ldm.options import PLAIN, DrawOptions
from ldm.samplers import SAMPLERS, Denoise, sampler_named, time_grid, with_share_of
from text import TextEncoder, Tokenizer, load_text_encoder, load_tokenizer
from vae import AutoencoderKL

if TYPE_CHECKING:
    from PIL import Image

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_BATCH = 16  # pictures drawn at once; more are drawn in turns, which changes none of them


class TextToImage:
    """A trained model, ready to draw.

    pipe = TextToImage.load("weights/emoji64")
    images = pipe("a noto emoji of red apple", steps=30, scale=5.0, seed=7, n=4)
    """

    def __init__(
        self,
        model: LatentDiffusion,
        denoiser: nn.Module,
        config: DenoiserConfig,
        *,
        sample_size: int,
        name: str,
        weights_hash: str,
    ) -> None:
        self.model, self.denoiser, self.denoiser_config = model, denoiser, config
        self.name, self.weights_hash = name, weights_hash
        self.sample_size = sample_size  # latents a side, as in training
        self.native_size = sample_size * model.vae.config.factor  # the same in pixels
        # H and W must be multiples of this: whole latents, and whole patches of them.
        self.factor = model.vae.config.factor * getattr(config, "patch_size", 1)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    def precision(self) -> str:
        """The name under which `load` takes this dtype."""
        return next(name for name, dtype in PRECISIONS.items() if dtype == self.dtype)

    @property
    def attention(self) -> str:
        """One line: which attention draws at the native size, and why."""
        length = attention_length(self.denoiser_config, self.native_size // self.model.vae.config.factor)
        return describe_attention(self.device, length, self.dtype, training=False)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", dtype: str = "auto") -> TextToImage:
        """Read a folder in diffusers' layout: an export of this project, Stable Diffusion's, or the newest of a run.

        device: "auto" (CUDA if there is one), or a torch device. dtype: "auto" (bf16 on CUDA, else fp32), "fp32" or
        "bf16". Nothing in the folder is executed. Raises ValueError or FileNotFoundError, naming the file, for
        anything that is missing, cut short or something else.
        """
        folder = model_folder(Path(path))
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no weights folder at {folder}: give one that holds vae/, text_encoder/ and a denoiser"
            )
        parts = [name for name in ("transformer", "unet") if (folder / name).is_dir()]
        if len(parts) != 1:
            found = sorted(entry.name for entry in folder.iterdir())[:8]
            raise ValueError(
                f"{folder} holds {found}, expected unet/ or transformer/: this is not a text-to-image model"
            )
        place, precision = choose_device(device), choose_dtype(dtype, choose_device(device))
        loaded = load_denoiser(folder / parts[0])
        noise_path, prediction = read_scheduler(folder / "scheduler" / "scheduler_config.json")
        vae, text_encoder = load_vae(folder / "vae"), load_text_encoder(folder / "text_encoder")
        tokenizer = load_tokenizer(folder / "tokenizer")
        check_parts_fit(loaded, vae, text_encoder, tokenizer, folder=folder)
        for network in (loaded.network, vae, text_encoder):
            network.eval().requires_grad_(False).to(device=place, dtype=precision)
        model = LatentDiffusion(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            path=noise_path,
            prediction=prediction,
            learned_variance=loaded.learned_variance,
        )
        with (folder / denoiser_folder(loaded.config) / WEIGHTS_NAME).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:10]
        place_of = folder.resolve()
        name = place_of.parent.name if place_of.name == RUN_MODEL else place_of.name
        return cls(model, loaded.network, loaded.config, sample_size=loaded.sample_size, name=name, weights_hash=digest)

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        steps: int = 30,
        scale: float = 5.0,
        sampler: str = "dpmpp_2m",
        seed: int = 0,
        n: int = 1,
        height: int | None = None,
        width: int | None = None,
        options: DrawOptions = PLAIN,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """Draw n pictures; picture i depends on seed + i, not on the others.

        scale: 1 is no guidance, more follows the prompt more closely. height, width: pixels, multiples of `factor`
        (default: what the model was trained at). options: eta, time grid and guidance's variants. progress(done, all)
        is called after each denoising step.
        Raises ValueError, naming the value, for what cannot be drawn.
        """
        if n < 1:
            raise ValueError(f"n is {n}, expected at least 1 picture")
        pixels = self.draw(
            [prompt] * n, negative_prompt=negative_prompt, steps=steps, scale=scale, sampler=sampler, seed=seed,
            height=height, width=width, options=options, progress=progress,
        )  # fmt: skip
        return to_images(pixels)

    def draw(
        self,
        prompts: Sequence[str],
        *,
        negative_prompt: str,
        steps: int,
        scale: float,
        sampler: str,
        seed: int,
        height: int | None = None,
        width: int | None = None,
        options: DrawOptions = PLAIN,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """One picture of each prompt, prompt i with seed + i, as pixels N x 3 x H x W in about [-1, 1]: not yet
        clamped and rounded."""
        size = self._latent_size(height or self.native_size, width or self.native_size)
        if scale < 0:
            raise ValueError(f"scale is {scale}, expected a number from 0 up (1 is no guidance)")
        model = self.model
        times = time_grid(model.path, steps, options.grid)
        found = SAMPLERS[sampler_named(sampler)]
        found.check(learned=model.learned_variance)
        function = found.with_eta(options.eta)
        rounds = range(0, len(prompts), MAX_BATCH)
        drawn: list[Tensor] = []
        for number, start in enumerate(rounds):
            own = prompts[start : start + MAX_BATCH]
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(own))]
            with_prompt, without = (
                model.denoise_with(self.denoiser, model.condition(texts))
                for texts in (own, [negative_prompt] * len(own))
            )
            denoise = guided(with_prompt, without, scale, options)
            if progress is not None:
                denoise = counted(denoise, progress, times, start=number * steps, total=len(rounds) * steps)
            latents = model.sample(denoise, generators, size=size, sampler=function, times=times)
            drawn.append(model.decode(latents))
        return torch.cat(drawn)

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that is longer than the text encoder can read; "" if all of it is read."""
        return self.model.tokenizer.cut_off(prompt)

    def _latent_size(self, height: int, width: int) -> tuple[int, int]:
        for name, value in (("height", height), ("width", width)):
            if value < 1 or value % self.factor:
                raise ValueError(f"{name} is {value}, expected a multiple of {self.factor}, as {self.native_size}")
        return height // self.model.vae.config.factor, width // self.model.vae.config.factor


def check_parts_fit(
    denoiser: LoadedDenoiser, vae: AutoencoderKL, text_encoder: TextEncoder, tokenizer: Tokenizer, *, folder: Path
) -> None:
    """Raise ValueError, naming both parts, if they were not made for each other."""
    for what, of_one, one, of_other, other in (
        ("latent channels", denoiser.in_channels, "the denoiser", vae.config.latent_channels, "the autoencoder"),
        ("wide a context", denoiser.context_width, "the denoiser", text_encoder.config.width, "the text encoder"),
        ("tokens", tokenizer.vocab_size, "the tokenizer", text_encoder.config.vocab_size, "the text encoder"),
    ):
        if of_one != of_other:
            raise ValueError(
                f"{folder}: {one} is made for {of_one} {what}, {other} for {of_other}: give a folder whose parts "
                "belong together (a denoiser with channels for inpainting is not supported)"
            )


def counted(
    denoise: Denoise, progress: Callable[[int, int], None], times: Tensor, *, start: int, total: int
) -> Denoise:
    """The same function, telling how many of the grid's steps have begun to end. Samplers know nothing of progress."""
    done = 0

    def counting(x_t: Tensor, t: Tensor) -> Tensor:
        nonlocal done
        x0 = denoise(x_t, t)
        reached = min(int((times > t).sum()) + 1, len(times) - 1)  # some samplers ask twice, or in the middle of a step
        if reached > done:
            done = reached
            progress(start + done, total)
        return x0

    return with_share_of(denoise, counting)


def choose_device(device: str) -> torch.device:
    """The device named, or the best there is. Raises ValueError for one that this machine does not have."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected auto, cpu or cuda") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {device!r}, but {torch.cuda.device_count()} CUDA devices are here: use auto or cpu"
        )
    return place


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype named, or what the device draws best in. Raises ValueError for another name."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype is {dtype!r}, expected auto, {' or '.join(PRECISIONS)}")
    return PRECISIONS[dtype]
