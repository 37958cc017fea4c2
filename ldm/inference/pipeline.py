"""Load a model and draw pictures from prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.denoisers import Condition, Denoiser, choose_attention, describe_attention
from ldm.diffusion import Prediction
from ldm.files.paths import user_path
from ldm.inference.call import check_functions, requests_of_call
from ldm.inference.contact_sheet import to_images
from ldm.inference.course import Course, course_of
from ldm.inference.devices import choose_device
from ldm.inference.guiding import guided
from ldm.inference.img2img import Canvas, Start, begin, canvas_of, keeping, remarks_on
from ldm.inference.options import FORMATS
from ldm.inference.parameter import check_number
from ldm.inference.progress import Progress, StepCallback, reporters
from ldm.inference.prompt_loras import LoraFolders, applied
from ldm.inference.prompts import Prompt, PromptReader
from ldm.inference.recipe import Drawing, recipe_of
from ldm.inference.request import DrawRequest
from ldm.inference.results import carrying, check_output_type, returned
from ldm.inference.turns import Turns
from ldm.interop.compvis.writing import write_single_file
from ldm.interop.diffusers_layout.folder import write_folder
from ldm.interop.embedding_files import embedding_source
from ldm.interop.hub_cache import model_path
from ldm.interop.read_model import AS_IT_IS, LoadOptions, model_name, read_model
from ldm.model.components import ModelComponents
from ldm.model.facts import ModelFacts
from ldm.model.latent_diffusion import LatentDiffusion
from ldm.model.precision import Precision, choose_precision, dtype_of, of_autoencoder, precision_named
from ldm.samplers import Denoise, Variance
from ldm.samplers.network_denoise import NetworkDenoise

MAX_BATCH = 16  # pictures drawn at once; more are drawn in several batches, with the same result


class TextToImage:
    """A trained model, ready to draw.

    pipe = TextToImage.load("weights/emoji64")
    images = pipe("a noto emoji of red apple", steps=30, scale=5.0, seed=7, n=4)
    """

    def __init__(
        self, parts: ModelComponents, options: LoadOptions = AS_IT_IS, *, name: str, weights_hash: str | None = None
    ) -> None:
        """options: what the parts were loaded with, for the recipes."""
        self.parts, self.loaded_with, self.name = parts, options, name
        self._weights_hash = weights_hash
        self._turns = Turns()  # of threads: a prompt's LoRAs change the weights for as long as it is drawn
        self.prompts = PromptReader(self.model.conditioner, tags=bool(options.lora_folders), scheduler=parts.scheduler)
        self.lora_folders = LoraFolders(options.lora_folders)
        choose_attention(self.denoiser, self.device, self.dtype)
        self.native_size = parts.sample_size * self.model.vae.config.factor  # pixels a side, as in training
        # H and W must be multiples of this: whole latents, and whole patches of them.
        self.factor = self.model.vae.config.factor * parts.config.stride

    @property
    def model(self) -> LatentDiffusion:
        return self.parts.model

    @property
    def denoiser(self) -> Denoiser:
        return self.parts.denoiser

    @property
    def facts(self) -> ModelFacts:
        """The properties that requests are checked against."""
        return ModelFacts(
            name=self.name,
            path=self.model.path,
            scheduler=self.parts.scheduler,
            unfollowed=self.parts.unfollowed,
            learned_variance=self.denoiser.learned_variance,
            native_size=self.native_size,
            factor=self.factor,
            unusual_clip_skip=self.model.conditioner.towers[0].encoder.config.unusual_clip_skip,
            for_inpainting=self.parts.for_inpainting,
        )

    @property
    def weights_hash(self) -> str:
        """The first 10 hex digits of the SHA-256 of the denoiser's file. The first access reads the complete file."""
        if self._weights_hash is None:
            assert self.parts.origin is not None
            self._weights_hash = self.parts.origin.hash()
        return self._weights_hash

    @property
    def description(self) -> str:
        """One line: the kind of model, its prediction, precision and number of tensors, and its file's hash."""
        return f"{self.parts.describe()}, sha256 {self.weights_hash}"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    def precision(self) -> Precision:
        """The name of the denoiser's dtype."""
        return precision_named(self.dtype)

    @property
    def attention(self) -> str:
        """One line: the attention kernel at the native size, and why."""
        length = self.parts.config.attention_length(self.native_size // self.model.vae.config.factor)
        return describe_attention(self.device, length, self.dtype, training=False)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        vae: str | Path | None = None,
        text: str | Path | None = None,
        lora: Sequence[tuple[str | Path, float]] = (),
        ema: bool = True,
        prediction: Prediction | None = None,
        lora_folders: Sequence[str | Path] = (),
        embeddings: Sequence[str | Path | tuple[str | Path, str]] = (),
    ) -> TextToImage:
        """Read a model: a folder in diffusers' layout (an export of this project, Stable Diffusion's, the newest of a
        run), or Stable Diffusion 1 or 2 in a single file. The content determines which of them it is.

        path may also be the name of a model in the Hub's cache, "owner/name". device: "auto" (CUDA if there is one), or
        a torch device. dtype: "fp32", "bf16", "fp16" (with the autoencoder in fp32), another name of one, a
        torch.dtype, or "auto": see choose_precision. vae, text: an autoencoder, and a text encoder with its tokenizer,
        to use in place of the model's own, which it need not have. lora: files and their strengths, merged into the
        weights in this order. ema: use the averaged weights, if a single file has both. prediction: of the denoiser, if
        the file specifies it wrongly or not at all. lora_folders: of LoRAs that prompts name, as in <lora:style:0.8>.
        embeddings: textual inversions, files (or pairs of a file and a name for it) or folders of them. Nothing in the
        files is executed. Raises ValueError or FileNotFoundError, naming the file, if it is missing, truncated or
        something else.
        """
        place, path = choose_device(device), model_path(path)
        precision = choose_precision(dtype, place)
        options = LoadOptions(
            vae=None if vae is None else model_path(vae), text=None if text is None else model_path(text),
            lora=[(user_path(file), strength) for file, strength in lora], ema=ema, prediction=prediction,
            lora_folders=[user_path(folder) for folder in lora_folders],
            embeddings=[embedding_source(given) for given in embeddings],
        )  # fmt: skip
        of_vae = dtype_of(of_autoencoder(precision))
        parts = read_model(path, options, dtype=dtype_of(precision), vae_dtype=of_vae)
        for network in parts.networks:
            network.eval().requires_grad_(False).to(device=place)
        return cls(parts, options, name=model_name(path))

    def save(self, path: str | Path, *, format: str = "diffusers", dtype: str | torch.dtype | None = None) -> None:
        """Write the model, LoRAs merged, for other programs: "diffusers", a folder with a model card, or "single-file",
        CompVis's layout with a .yaml next to it (only U-Nets). dtype: "fp32", "fp16" or "bf16"; None: as it was loaded.

        An older export is replaced once the new one is complete. Raises ValueError if the format cannot hold the model,
        and for another precision of a model that was loaded in bf16: its weights are already rounded.
        """
        path = user_path(path)
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}, expected {' or '.join(FORMATS)}")
        wanted = self.precision if dtype is None else precision_named(dtype)
        stored = dtype_of(wanted)
        if stored != self.dtype != torch.float32:
            raise ValueError(
                f"the model was loaded in {self.precision}, and a file in {wanted} would claim a precision that its "
                "weights do not have: load it with dtype='fp32', or use python -m ldm.export"
            )
        if format == "diffusers":
            from ldm.interop.model_card import CARD, model_card  # imports PyYAML, which drawing does not need

            card = model_card(self.parts, name=path.resolve().name, dtype=stored)
            write_folder(self.parts, path, dtype=stored, beside={CARD: card.encode()})
        else:
            write_single_file(self.parts, path, dtype=stored)

    def __call__(
        self, prompt: str | Sequence[str], *, n: int = 1, output_type: str = "pil",
        progress: Progress | None = None, callback: StepCallback | None = None, **settings: Any,
    ) -> Any:  # fmt: skip
        """Draw n pictures of each prompt; picture i depends on seed + i, not on the others.

        settings: the other fields of DrawRequest: negative_prompt, steps, scale, sampler, seed (by default 0),
        height, width, image, mask, strength, options. Prompts, negative prompts and seeds may be lists of equal length,
        and the pictures of one entry follow those of the one before it. output_type, as in diffusers: "pil", a list of
        PIL images, whose save() writes their record into a PNG; "np", a float32 array N x H x W x 3 in [0, 1]; "pt", a
        tensor N x 3 x H x W in [0, 1]; "latent", a tensor N x C x h x w of unit variance, see `decode`.
        progress(done, all) is called after each denoising step, callback(step) with the estimate of the pictures: see
        Step. What they raise ends the drawing. Several threads may call it: they take turns.

        Raises ValueError, naming the value, for what cannot be drawn, and TypeError for a value of another type.
        """
        check_output_type(output_type)
        check_functions(progress=progress, callback=callback)
        given = requests_of_call({"seed": 0, "prompt": prompt} | settings)
        requests = [own for request in given for own in self._each(request, n)]
        drawn = self._together(requests, progress, callback, decode=output_type != "latent")
        if output_type == "pil":
            return [drawing.image for drawing in self._drawings(requests, drawn)]
        return returned(drawn, output_type)

    def draw(
        self, request: DrawRequest, *, n: int = 1, progress: Progress | None = None,
        callback: StepCallback | None = None,
    ) -> list[Drawing]:  # fmt: skip
        """Draw n pictures, picture i with seed + i, each with its recipe. See `__call__`."""
        requests = self._each(request, n)
        return self._drawings(requests, self._together(requests, progress, callback))

    def _drawings(self, requests: Sequence[DrawRequest], pixels: Tensor) -> list[Drawing]:
        found: list[Drawing] = []
        for request, image in zip(requests, to_images(pixels), strict=True):
            recipe = recipe_of(request, self, image)
            found.append(Drawing(carrying(image, recipe), recipe))
        return found

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Decode latents B x C x h x w of unit variance, such as a Step's x0, to pictures without a record."""
        with self._turns:
            return to_images(self.model.decode(latents.to(self.device)))

    def to(self, device: str | torch.device) -> TextToImage:
        """Move the model to a device: "cpu", "cuda", "cuda:1", or "auto". Returns itself. The precision stays.

        Raises ValueError if this machine does not have the device.
        """
        place = choose_device(device)
        with self._turns:
            for network in self.parts.networks:
                network.to(device=place)
            choose_attention(self.denoiser, self.device, self.dtype)
        return self

    def check(self, request: DrawRequest) -> DrawRequest:
        """Return the request as it is drawn: see DrawRequest.check. Prompts and masks are checked, too."""
        checked = request.check(self.facts)
        for encoder in self.model.conditioner.encoders:
            encoder.config.layer_from_end(checked.options.clip_skip)  # raises if there are fewer
        missing = self.lora_folders.missing(self.prompts.read(checked).loras)
        on_mask = remarks_on(checked, self.model.vae.config.factor)
        return checked.remarked([*self.prompts.remarks(checked), *missing, *on_mask])

    def named_in(self, request: DrawRequest) -> dict[str, list[tuple[str, Path]]]:
        """List the LoRAs, with their strengths, and the embeddings that a checked request's prompts name, and their
        files."""
        prompt, negative = self.prompts.read(request), self.prompts.read_negative(request)
        texts = [segment.text for part in (*prompt.parts, negative) for segment in part.segments]
        loras = self.lora_folders.find(prompt.loras)
        return {
            "prompt_loras": [(lora.describe(), lora.file) for lora in loras],
            "embeddings": [(one.name, one.source) for one in self.model.conditioner.embeddings_in(texts)],
        }

    def _each(self, request: DrawRequest, n: int) -> list[DrawRequest]:
        check_number("n", n, int)
        if n < 1:
            raise ValueError(f"n is {n}, expected at least 1 picture")
        first = self.check(request).seeded(n)
        return [replace(first, seed=first.seed + i) for i in range(n)]

    def pixels(self, *requests: DrawRequest, progress: Progress | None = None) -> Tensor:
        """Draw one picture per request, as pixels N x 3 x H x W in about [-1, 1], neither clamped nor rounded.

        They are drawn in one batch, so they may differ only in prompt and seed. Raises ValueError otherwise.
        """
        wanted = [self.check(request).seeded() for request in requests]
        common = wanted[0]
        if any(replace(own, prompt=common.prompt, seed=common.seed) != common for own in wanted):
            raise ValueError(
                "the requests differ in more than prompt and seed, so they are no batch: draw them one by one"
            )
        return self._together(wanted, progress)

    def _together(
        self, wanted: Sequence[DrawRequest], progress: Progress | None, callback: StepCallback | None = None, *,
        decode: bool = True,
    ) -> Tensor:  # fmt: skip
        """Draw checked requests that differ only in prompts and seed, as pixels; decode=False: as latents."""
        common = wanted[0]
        cell = self.model.vae.config.factor
        assert common.height is not None and common.width is not None
        drawn_on, size = canvas_of(common), (common.height // cell, common.width // cell)
        course = course_of(common, self.parts, drawn_on)
        drawn: list[Tensor] = []
        rounds = self.prompts.batches(wanted, largest=1 if course.one_by_one else MAX_BATCH)
        for batch, steps in zip(rounds, reporters(rounds, len(course.times) - 1, progress, callback), strict=True):
            generators = [torch.Generator().manual_seed(own.seed) for own, _ in batch]
            loras = self.lora_folders.find(batch[0][1].loras)
            with self._turns, torch.no_grad(), applied(self.parts, loras):
                begun = self._begin(drawn_on, generators, course, size)
                denoise, variance = self._denoise(batch, begun, course)
                latents = course.draw(steps.watching(denoise, course.times), begun, generators, variance)
            steps.reached(steps.steps)  # the last evaluation of a sampler that chooses its own times may be before
            if decode:
                pixels = self.model.decode(latents)
                drawn.append(pixels if drawn_on is None else drawn_on.paste(pixels))
            else:
                drawn.append(latents)
        return torch.cat(drawn)

    def _begin(
        self, drawn_on: Canvas | None, generators: Sequence[torch.Generator], course: Course, size: tuple[int, int]
    ) -> Start:
        model, times = course.model, course.times
        if drawn_on is None:
            return Start(x=model.prior(model.noise(generators, size=size), times))
        own, stock = self.parts.for_inpainting, course.stock is not None
        return begin(model, drawn_on, generators, times, for_inpainting=own, stock=stock)

    def _denoise(
        self, batch: Sequence[tuple[DrawRequest, Prompt]], begun: Start, course: Course
    ) -> tuple[Denoise, Variance]:
        """Return the function for the sampler, with guidance and the mask applied, and the network's variance."""
        model, request, prompts = course.model, batch[0][0], [prompt for _, prompt in batch]

        def network(condition: Condition) -> NetworkDenoise:
            return model.denoise_with(self.denoiser, condition._replace(concat=begun.concat))

        found = self.prompts.denoisers(prompts, request, network)
        denoise = found.counting(guided(found.with_prompt, found.without, request.scale, request.options))
        denoise = denoise if begun.mask is None else keeping(denoise, begun, model.path, course.times)
        return denoise, found.variance

    def cut_off(self, prompt: str) -> str:
        """Return the part of a prompt beyond the text encoder's context length; "" if it fits."""
        return self.prompts.cut_off(prompt)
