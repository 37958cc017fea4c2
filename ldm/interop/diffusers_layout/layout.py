"""The interface of a denoiser's layout: its folder, its config.json, and the pipelines that open it; our own layout;
and the base of the schemas of config.json, in diffusers' layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from ldm.denoisers import DENOISERS, Denoiser, DenoiserConfig
from ldm.denoisers.contract import Channels
from ldm.interop.network_files import check_whole_numbers
from ldm.model.components import LoadedDenoiser

Config = TypeVar("Config", bound=DenoiserConfig)
VERSION = "0.30.0"  # of diffusers, whose format is written
OWN_LIMITS = {"sample_size": 4096, "latent_channels": 256, "context_width": 8192}  # of the keys of our own layout


@dataclass(frozen=True)
class Surroundings(Channels):
    """Properties of a denoiser that follow from the model around it, not from its own configuration."""

    sample_size: int  # side of the native latents
    latent_channels: int
    context_width: int
    concat_channels: int = 0
    learned_variance: bool = False

    @classmethod
    def of(cls, loaded: LoadedDenoiser) -> Surroundings:
        network, _, side, width = loaded
        return cls(side, network.latent_channels, width, network.concat_channels, network.learned_variance)

    def build(self, config: DenoiserConfig) -> Denoiser:
        return config.build(
            latent_channels=self.latent_channels,
            context_width=self.context_width,
            concat_channels=self.concat_channels,
            learned_variance=self.learned_variance,
        )


class DenoiserLayout(ABC, Generic[Config]):
    """The storage format of denoisers with one kind of configuration."""

    folder: ClassVar[str]  # its name, which the pipelines look for
    classes: ClassVar[tuple[str, ...]]  # in config.json and model_index.json; the first is written
    library: ClassVar[str] = "diffusers"
    further_parts: ClassVar[dict[str, Any]] = {}  # additional entries of model_index.json
    call_note: ClassVar[str] = ""  # for the card: what to know of call_words; a paragraph, or ""
    pipelines: ClassVar[tuple[str, ...]]  # the classes that open the model's folder; the last one for inpainting

    @abstractmethod
    def to_json(self, config: Config, around: Surroundings) -> dict[str, Any]:
        """Build config.json, as the class writes it."""

    @abstractmethod
    def from_json(self, content: dict[str, Any], *, source: Path) -> tuple[Config, Surroundings]:
        """Parse config.json. Raises ValueError or KeyError for a network that this program does not support."""

    def call_words(self, *, size: int, context_length: int, for_inpainting: bool) -> str:
        """Return the keyword arguments that the pipeline needs for such a model, each after a comma, for the card."""
        return f", height={size}, width={size}"

    def other_names(self, network: Denoiser, config: Config) -> Mapping[str, str]:
        """Map names of its modules in other programs' files to its own."""
        return {}


class OwnLayout(DenoiserLayout[DenoiserConfig]):
    """The layout of any registered kind, without a class in diffusers: config.json is our own configuration. Only this
    program opens it."""

    folder = "denoiser"
    classes = ("FoundryDenoiser",)
    library = "latent_foundry"
    pipelines = ("LatentFoundryPipeline",)

    def to_json(self, config: DenoiserConfig, around: Surroundings) -> dict[str, Any]:
        return {"_class_name": self.classes[0], "config": asdict(config)} | asdict(around)

    def from_json(self, content: dict[str, Any], *, source: Path) -> tuple[DenoiserConfig, Surroundings]:
        check_whole_numbers(content, OWN_LIMITS, source=source)
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content["config"].items()}
        kind = given.get("kind")
        if kind not in DENOISERS:
            raise ValueError(f"{source} describes a denoiser of kind {kind!r}, expected one of {sorted(DENOISERS)}")
        config: DenoiserConfig = DENOISERS[kind](**given)
        return config, Surroundings(**{field.name: content[field.name] for field in fields(Surroundings)})


OWN = OwnLayout()


def whole(most: int, *, default: Any = MISSING) -> Any:
    """Declare a whole number from 1 to `most`, or a list of them: the network is built before its weights are read."""
    return field(default=default, metadata={"most": most})


def fixed(value: Any) -> Any:
    """Declare a key with which the weights would load but compute something else if it had another value."""
    return field(default=value, init=False)


@dataclass(frozen=True, kw_only=True)
class ConfigJson:
    """The base of all schemas, which state the keys of a config.json once, for reading and for writing, in this order.

    A field is a whole number with a limit (`whole`), a property that all these networks have (`fixed`), or any value,
    which its reader checks. One with a default may be absent, or null. One whose name begins with _ is only written.
    """

    UNUSED: ClassVar[Mapping[str, Any]] = {}  # further fixed keys, which are not written
    IGNORED: ClassVar[tuple[str, ...]] = ()  # further keys, which never change the result, and are not written

    def to_json(self) -> dict[str, Any]:
        return {key.name: getattr(self, key.name) for key in fields(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, source: Path) -> Self:
        """Read the keys. Raises ValueError for a missing key, a number out of range, or a value that may change the
        computation: of a fixed key, or of an unknown one, unless that is null, false, 0 or empty, as an unused option
        is."""
        keys = {key.name: key for key in fields(cls) if not key.name.startswith("_")}
        only = {name: key.default for name, key in keys.items() if not key.init} | dict(cls.UNUSED)
        for name, value in content.items():
            if name in only and value not in (None, only[name]):
                problem = f"{name} {value!r}, expected {only[name]!r}"
            elif value and not name.startswith("_") and name not in {*only, *keys, *cls.IGNORED}:
                problem = f"the unknown key {name} {str(value)[:60]}"
            else:
                continue
            raise ValueError(f"{source} has {problem}: this network is not supported")
        limits = {name: key.metadata["most"] for name, key in keys.items() if "most" in key.metadata}
        check_whole_numbers(content, limits, source=source)
        required = {name for name, key in keys.items() if key.default is MISSING}
        if lacking := sorted(required - content.keys()):
            raise ValueError(f"{source} lacks the key {lacking[0]!r}: copy it again")
        read = [name for name in content if name in keys and name not in only]
        return cls(**{name: content[name] for name in read if name in required or content[name] is not None})
