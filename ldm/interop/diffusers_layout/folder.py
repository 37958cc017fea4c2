"""Read and write a model as a folder in diffusers' layout. Reading never executes code from the folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldm.denoisers import UNet, UNetConfig
from ldm.diffusion import PathConfig, Prediction, ScaledLinearBetaPath
from ldm.files.paths import contents
from ldm.files.strict_json import write_json
from ldm.files.writing import writing
from ldm.interop.compvis.prediction import find_prediction
from ldm.interop.diffusers_layout.denoiser import ALL_LAYOUTS, layout_of, open_denoiser, save_denoiser
from ldm.interop.diffusers_layout.layout import OWN, VERSION, DenoiserLayout
from ldm.interop.diffusers_layout.scheduler import (
    DEFAULT_CLASS,
    Sampling,
    read_scheduler,
    sampling_from,
    scheduler_config_json,
    warn_of,
)
from ldm.interop.diffusers_layout.vae import folded, open_vae, save_vae, vae_weights
from ldm.interop.export_files import (
    INDEX,
    NOTES,
    Listing,
    check_listing,
    check_target,
    replaced_files,
    write_listing,
)
from ldm.interop.extra_tensors import extra_tensors, warn_of_extras
from ldm.interop.given_parts import NONE_GIVEN, GivenParts
from ldm.interop.hub_cache import is_own_file
from ldm.interop.identify import without_wrapping
from ldm.interop.network_files import TEXT_STEM, described_by, fill, find_weights, read_config
from ldm.interop.ownership import ownership, section
from ldm.interop.published import published
from ldm.interop.weight_reader import Weights, describe
from ldm.model.components import LoadedDenoiser, ModelComponents, Origin, check_components_fit
from ldm.model.conditioner import Conditioner, TextTower
from ldm.model.latent_diffusion import LatentDiffusion
from ldm.samplers.stock.scheduler import StockScheduler
from text.conversion import TEXT_ENCODERS, TextEncoderKind, kind_of
from text.encoder import TextEncoderConfig
from text.tokenizer import Tokenizer
from vae.autoencoder import AutoencoderKL

SCHEDULER = Path("scheduler") / "scheduler_config.json"
MAX_NOTES_BYTES = 2**20
# Allowed in a model_index.json: diffusers' own pipelines, and known classes for the parts that are read.
PIPELINES = {
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
    "PixArtAlphaPipeline", "PixArtSigmaPipeline", *OWN.pipelines,
}  # fmt: skip
KNOWN_CLASSES = {
    **{layout.folder: [[layout.library, name] for name in layout.classes] for layout in ALL_LAYOUTS},
    "vae": [["diffusers", "AutoencoderKL"]],
}
TEXT_FOLDERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
LIBRARY = "transformers"


def read_folder(
    folder: Path, *, dtype: torch.dtype, vae_dtype: torch.dtype | None = None, prediction: Prediction | None = None,
    given: GivenParts = NONE_GIVEN,
) -> ModelComponents:  # fmt: skip
    """Read a model in this precision, on the CPU. prediction: overrides the one in the scheduler's config.

    vae_dtype: the autoencoder's precision, if it is another. given: parts in place of the folder's own, with which a
    denoiser's folder alone is a model. Raises ValueError or FileNotFoundError, naming the file, if a file is missing,
    truncated or of another kind.
    """
    listing = Listing.parse(own_file(folder, folder / NOTES, most=MAX_NOTES_BYTES).decode(errors="replace"))
    remark = check_listing(folder, listing)
    check_index(folder)
    # Read all configs before any weights, so that an unsuitable folder fails at once and not after a minute.
    loaded = open_denoiser(part := _denoiser_part(folder))
    given.check(folder, has_vae=(folder / "vae").is_dir(), has_text=(folder / TEXT_FOLDERS[0][0]).is_dir())
    path, stated, place = _path_and_prediction(folder, loaded)
    scheduler_config_json(path, prediction or stated or "eps")  # raises for a prediction that this path does not have
    opened = _open_frozen(folder, loaded, given)
    weights = given.denoiser(loaded, part) if given.denoiser else find_weights(part)
    vae, towers, further = _read_frozen(folder, loaded, given, opened, dtype=dtype, vae_dtype=vae_dtype or dtype)
    fill(loaded.network, weights, dtype=dtype)
    predicted, remarks = find_prediction(prediction, stated, loaded, conditioner := Conditioner(*towers))
    sampling = Sampling(None)
    if place is not None:
        unet, inpainting = isinstance(loaded.network, UNet), loaded.network.concat_channels > 0
        sampling = read_sampling(place, path, predicted, unet=unet, inpainting=inpainting)
        warn_of(sampling, source=place / SCHEDULER, path=path)
    precision, remarks = _precision([weights, *further]), (() if stated else remarks) + remark
    return ModelComponents(
        model=LatentDiffusion(vae=vae, conditioner=conditioner, path=path, prediction=predicted),
        denoiser=loaded.network,
        config=loaded.config,
        sample_size=loaded.sample_size,
        notes=listing.notes,
        origin=Origin(files=weights.files, precision=precision, remarks=remarks, places=(folder,)),
        scheduler=sampling.stock,
        unfollowed=sampling.unfollowed,
    )


def _open_frozen(
    folder: Path, loaded: LoadedDenoiser, given: GivenParts
) -> tuple[AutoencoderKL | None, list[TextPart]]:
    """Open the folder's own autoencoder and text encoders, and check that they fit the denoiser."""
    own_vae = open_vae(folder / "vae") if (folder / "vae").is_dir() else None
    texts = [] if given.towers else open_text_parts(folder)
    if own_vae is not None and not given.towers:
        check_components_fit(loaded, own_vae, [(text.config, text.tokenizer) for text in texts], source=folder)
    return own_vae, texts


def _read_frozen(
    folder: Path, loaded: LoadedDenoiser, given: GivenParts, opened: tuple[AutoencoderKL | None, list[TextPart]], *,
    dtype: torch.dtype, vae_dtype: torch.dtype,
) -> tuple[AutoencoderKL, Sequence[TextTower], list[Weights]]:  # fmt: skip
    """Read what was opened, or take what is given, and check that it fits the denoiser; also return their files."""
    own_vae, texts = opened
    of_vae = [] if given.vae else [vae_weights(folder / "vae")]
    # The text encoders first, so that their mapped pages are released before the larger parts are read.
    towers = given.towers or [text.read(dtype) for text in texts]
    vae = given.vae(own_vae and own_vae.config) if given.vae else own_vae
    assert vae is not None
    check_components_fit(loaded, vae, [(tower.encoder.config, tower.tokenizer) for tower in towers], source=folder)
    for found in of_vae:
        fill(vae, found, dtype=vae_dtype)
    return vae, towers, [*(text.weights for text in texts), *of_vae]


def read_sampling(folder: Path, path: PathConfig, prediction: Prediction, *, unet: bool, inpainting: bool) -> Sampling:
    """Read how a folder says to sample its model, as diffusers' pipelines would."""
    content, kind = read_config(folder / SCHEDULER), None
    if (folder / INDEX).exists():
        named = read_config(folder / INDEX).get("scheduler")
        if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str):
            kind = named[1] if named[0] == "diffusers" else ".".join(map(str, named))
    with described_by(folder / SCHEDULER):
        return sampling_from(content, path, prediction, kind=kind, unet=unet, inpainting=inpainting)


def _path_and_prediction(folder: Path, loaded: LoadedDenoiser) -> tuple[PathConfig, Prediction | None, Path | None]:
    """Read the scheduler: the folder's own, or of the model that a denoiser's folder is a part of; and which folder it
    is in. A U-Net without one is on Stable Diffusion's path, and its prediction is not known."""
    places = [folder, folder.parent] if (folder / "config.json").exists() else [folder]
    place = next((place for place in places if (place / SCHEDULER).exists()), folder)
    if (
        isinstance(loaded.config, UNetConfig)
        and not (place / SCHEDULER.parent).is_dir()
        and not (folder / INDEX).exists()
    ):
        return ScaledLinearBetaPath(), None, None
    return *read_scheduler(place / SCHEDULER), place


def own_file(folder: Path, file: Path, *, most: int) -> bytes:
    """Read a file next to the weights, to be copied into the export; b"" if it does not exist.

    Raises ValueError for a link that leads out of the folder, whose target would be published with the export, for
    anything but a plain file, and for more than `most` bytes. In the Hub's cache, links lead to the folder blobs/ of
    the same model: these files are the folder's own.
    """
    if not file.exists():
        return b""
    if not file.is_file():
        raise ValueError(f"{file} is not a plain file, expected one that an export may copy: move it elsewhere")
    if not is_own_file(file, folder):
        raise ValueError(
            f"{file} is not a plain file of the model, but a link to {file.resolve()}, which an export would publish: "
            "replace it by a copy if that is intended"
        )
    if (size := file.stat().st_size) > most:
        raise ValueError(f"{file} has {size} bytes, expected at most {most}: move it elsewhere")
    return file.read_bytes()


def check_index(folder: Path) -> None:
    """Raise ValueError if model_index.json, if it exists, names classes that are not diffusers' own."""
    index = folder / INDEX
    if not index.exists():
        return
    content = read_config(index)
    pipeline = str(content.get("_class_name", "StableDiffusionPipeline"))
    if pipeline not in PIPELINES:
        raise ValueError(f"{index} names a {pipeline[:60]!r}, expected one of {', '.join(sorted(PIPELINES))}")
    for name, known in (KNOWN_CLASSES | known_text_classes()).items():
        if name in content and content[name] not in known:
            raise ValueError(
                f"{index} names the class {str(content[name])[:60]} for {name}: refused; only "
                f"{' or '.join('.'.join(pair) for pair in known)} is read"
            )


def _denoiser_part(folder: Path) -> Path:
    """Return the folder of the denoiser, which may be the given one."""
    parts = [layout.folder for layout in ALL_LAYOUTS if (folder / layout.folder).is_dir()]
    if not parts and (folder / "config.json").exists():
        return folder
    if len(parts) != 1:
        held = " and ".join(f"{part}/" for part in parts) or contents(folder)
        raise ValueError(f"{folder} holds {held}, expected unet/ or transformer/: this is not a text-to-image model")
    return folder / parts[0]


def _precision(parts: Sequence[Weights]) -> str:
    return describe({f"{part}.{name}": t for part, found in enumerate(parts) for name, t in found.tensors.items()})


def write_folder(
    parts: ModelComponents,
    folder: Path,
    *,
    dtype: torch.dtype,
    beside: Mapping[str, bytes] | None = None,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Write a model to a folder. Its files replace those of an older export there once all are complete; others stay.

    beside: additional files, such as a model card, by their path in the folder; the licence files of the model follow
    by themselves. check: called with the complete new files before any is replaced; if it raises, none is. Raises
    ValueError if the folder exists and is not an export; WriteError for a full disk and the like.
    """
    check_target(folder)
    whose = ownership(parts)
    with writing(folder), replaced_files(folder) as partial:
        write_parts(parts, partial, dtype=dtype)
        for name, content in (whose.files | dict(beside or {})).items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        write_listing(partial, published(parts.notes, section(whose.publish)))
        if check is not None:
            check(partial)


def write_parts(parts: ModelComponents, folder: Path, *, dtype: torch.dtype) -> None:
    """Write a model's parts into an existing, empty folder."""
    model, towers = parts.model, parts.model.conditioner.towers
    layout = layout_of(parts.config)
    save_denoiser(parts.as_loaded, folder / layout.folder, dtype=dtype)
    save_vae(folded(model.vae), folder / "vae", dtype=dtype)
    save_text_parts(towers, folder, dtype=dtype)
    (folder / "scheduler").mkdir()
    write_json(scheduler_config_json(model.path, model.prediction, parts.scheduler), folder / SCHEDULER)
    kinds = [tower.encoder.kind for tower in towers]
    index = model_index(
        layout, text_encoders=kinds, for_inpainting=parts.for_inpainting, scheduler=scheduler_class(parts.scheduler)
    )
    write_json(index, folder / INDEX)


def scheduler_class(scheduler: StockScheduler | None) -> str:
    return DEFAULT_CLASS if scheduler is None else scheduler.kind


def model_index(
    layout: DenoiserLayout[Any], *, text_encoders: Sequence[str], for_inpainting: bool, scheduler: str = DEFAULT_CLASS
) -> dict[str, Any]:
    """Build model_index.json: the pipeline that opens the folder, and the class of each subfolder.

    text_encoders: their kinds. scheduler: its class.
    """
    return {
        "_class_name": layout.pipelines[-1 if for_inpainting else 0],
        layout.folder: [layout.library, layout.classes[0]],
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", scheduler],
        **text_classes(text_encoders),
        "vae": ["diffusers", "AutoencoderKL"],
        **layout.further_parts,
    }


@dataclass(frozen=True, slots=True)
class TextPart:
    """A text encoder and its tokenizer, opened: the weights are not read yet."""

    folder: Path
    kind: TextEncoderKind
    config: TextEncoderConfig
    tokenizer: Tokenizer
    weights: Weights

    def read(self, dtype: torch.dtype) -> TextTower:
        """Read the weights. The special tokens are the tokenizer's: published text encoders state ids of their own."""
        tokens = self.tokenizer
        with described_by(self.folder):
            config = replace(self.config, pad_id=tokens.config.pad_id, bos_id=tokens.bos_id, eos_id=tokens.eos_id)
            encoder = self.kind.build(config, self.weights.read(dtype), dtype=dtype)
        return TextTower(encoder, tokens)


def open_text_parts(folder: Path) -> list[TextPart]:
    """Open the model's text encoders. Raises ValueError or FileNotFoundError for what is not one of a known kind."""
    count = 1 + (folder / TEXT_FOLDERS[1][0]).is_dir()
    return [_open(folder / encoder, folder / tokenizer) for encoder, tokenizer in TEXT_FOLDERS[:count]]


def _open(folder: Path, tokenizer: Path) -> TextPart:
    source = folder / "config.json"
    content = read_config(source)
    with described_by(source):
        kind = kind_of(content)
        config = kind.read_config(content)
    found = find_weights(folder, TEXT_STEM)
    with described_by(found.source):
        weights = found.changed(without_wrapping).changed(kind.own_names)
    if extras := extra_tensors(weights.tensors, wanted=(), modules=kind.modules):
        warn_of_extras(extras, found.source)
        weights = weights.only(name for name in weights.tensors if name not in extras)
    return TextPart(folder, kind, config, kind.load_tokenizer(tokenizer), weights)


def save_text_parts(towers: Sequence[TextTower], folder: Path, *, dtype: torch.dtype) -> None:
    """Write the text encoders and their tokenizers into a model's folder."""
    for (encoder, tokenizer), places in zip(towers, TEXT_FOLDERS[: len(towers)], strict=True):
        kind = TEXT_ENCODERS[encoder.kind]
        kind.save(encoder, folder / places[0], dtype=dtype)
        kind.save_tokenizer(tokenizer, folder / places[1])


def text_classes(kinds: Sequence[str]) -> dict[str, Any]:
    """Build the entries of model_index.json for text encoders of these kinds."""
    found: dict[str, Any] = {}
    for kind, (encoder, tokenizer) in zip(kinds, TEXT_FOLDERS[: len(kinds)], strict=True):
        found[encoder] = [LIBRARY, TEXT_ENCODERS[kind].class_name]
        found[tokenizer] = [LIBRARY, TEXT_ENCODERS[kind].tokenizer_classes[0]]
    return found


def known_text_classes() -> dict[str, list[list[str]]]:
    """Map each folder to the classes that are read from it."""
    kinds = TEXT_ENCODERS.values()
    encoders = [[LIBRARY, kind.class_name] for kind in kinds]
    tokenizers = [[LIBRARY, name] for kind in kinds for name in kind.tokenizer_classes]
    return {name: known for pair in TEXT_FOLDERS for name, known in zip(pair, (encoders, tokenizers), strict=True)}
