"""The interface of a denoiser's layout: its folder, its config.json, and the pipelines that open it; our own layout;
and the base of the schemas of config.json, in diffusers' layout."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from ldm.denoisers import DENOISERS, Denoiser, DenoiserConfig
from ldm.denoisers.contract import Channels
from ldm.files.messages import printable, some
from ldm.interop.network_files import as_whole, check_whole_numbers, refuse_code
from ldm.model.components import LoadedDenoiser

Config = TypeVar("Config", bound=DenoiserConfig)
VERSION = "0.30.0"  # of diffusers, whose format is written
SAME = {"swish": "silu"}  # two names of one activation, in diffusers
MAX_WARNING = 200  # characters
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
        return config, Surroundings(**{field.name: as_whole(content[field.name]) for field in fields(Surroundings)})


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
    OPTIONS: ClassVar[tuple[str, ...]] = ()  # further parameters of diffusers' class, which must be off
    ONE_OR_LIST: ClassVar[tuple[str, ...]] = ()  # keys whose list of equal values means that value

    def to_json(self) -> dict[str, Any]:
        return {key.name: getattr(self, key.name) for key in fields(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, source: Path) -> Self:
        """Read the keys. Raises ValueError for a missing key, a number out of range, or a value that changes the
        computation: of a fixed key, or of an option of diffusers' network that is not off. Warns of keys that diffusers
        does not know: it ignores them."""
        refuse_code(content, source=source)
        keys = {key.name: key for key in fields(cls) if not key.name.startswith("_")}
        limits = {name: key.metadata["most"] for name, key in keys.items() if "most" in key.metadata}
        check_whole_numbers(content, limits, source=source)
        content = {name: as_whole(value) if name in limits else value for name, value in content.items()}
        content = {name: _single(value) if name in cls.ONE_OR_LIST else value for name, value in content.items()}
        only = {name: key.default for name, key in keys.items() if not key.init} | dict(cls.UNUSED)
        for name, value in content.items():
            if name in only and value is not None and _same(value) != only[name]:
                problem = f"{name} {value!r}, expected {only[name]!r}"
            elif name in cls.OPTIONS and not _is_off(value):
                problem = f"{name} {str(value)[:60]!r}, an option that is not supported"
            else:
                continue
            raise ValueError(f"{source} has {problem}: this network is not supported")
        required = {name for name, key in keys.items() if key.default is MISSING}
        if lacking := sorted(required - content.keys()):
            raise ValueError(f"{source} lacks the key {lacking[0]!r}: copy it again")
        cls._warn_of_unknown({*only, *keys, *cls.IGNORED, *cls.OPTIONS}, content, source)
        read = [name for name in content if name in keys and name not in only]
        return cls(**{name: content[name] for name in read if name in required or content[name] is not None})

    @classmethod
    def _warn_of_unknown(cls, known: set[str], content: Mapping[str, Any], source: Path) -> None:
        """Warn of keys that nothing reads, unless they are off, or private."""
        unknown = [name for name in content if name not in known and not name.startswith("_") and content[name]]
        if unknown:
            names = printable(some(unknown), MAX_WARNING)
            warnings.warn(f"{source} has keys that nothing reads, ignored as in diffusers: {names}", stacklevel=2)


def _single(value: Any) -> Any:
    """Return the value that all entries of a list have; anything else unchanged."""
    alike = isinstance(value, list) and 0 < len(value) and all(entry == value[0] for entry in value)
    return value[0] if alike else value


def _same(value: Any) -> Any:
    return SAME.get(value, value) if isinstance(value, str) else value


def _is_off(value: Any) -> bool:
    """Return whether an option is null, false, 0 or empty, or a list of such values."""
    return not value or (isinstance(value, list) and not any(value))
