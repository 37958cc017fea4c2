"""Text condition of a latent diffusion model: CLIP's text transformer, one interface, two backends.

Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision (arXiv 2103.00020),
section 2.4. Shapes: B captions, L tokens (at most `context_length`), D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from text.tokenizer import BOS_ID, EOS_ID, TokenizerConfig, mask_to_eos

Activation = Literal["quick_gelu", "gelu"]
Hidden = Literal["last", "penultimate"]
LAYER_NORM_EPS = 1e-5  # of every published CLIP; other values are refused
SD2_STORED_LAYERS = 23  # of Stable Diffusion 2's 24 in diffusers' folder
# Fields of TextEncoderConfig, by their names in transformers' CLIPTextConfig.
TRANSFORMERS_SIZES = {
    "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "intermediate_size": "intermediate_size", "max_position_embeddings": "context_length", "vocab_size": "vocab_size",
}
TRANSFORMERS_NAMES = TRANSFORMERS_SIZES | {
    "hidden_act": "activation", "projection_dim": "projection_dim",
    "pad_token_id": "pad_id", "bos_token_id": "bos_id", "eos_token_id": "eos_id",
}


class TextCondition(NamedTuple):
    """The text condition of a denoiser."""

    context: Tensor  # B, L, D: token states
    pooled: Tensor  # B, D: state of the EOS token
    mask: Tensor  # B, L: bool, True up to and including the EOS


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Sizes and conventions of a CLIP text transformer.

    Stable Diffusion 1 is 768 wide, 12 layers, "quick_gelu", "last"; 2 is 1024, 24, "gelu", "penultimate".
    `hidden` selects the layer whose output is the context; the final layer norm follows in both cases. `pad_id` is the
    tokenizer's padding id. `projection_dim` is the width of CLIP's joint space with images, which the condition does
    not use.
    """

    width: int
    layers: int
    heads: int
    intermediate_size: int
    context_length: int = 77
    vocab_size: int = 49408
    activation: Activation = "quick_gelu"
    hidden: Hidden = "last"
    projection_dim: int | None = 512
    pad_id: int = EOS_ID
    bos_id: int = BOS_ID
    eos_id: int = EOS_ID

    def __post_init__(self) -> None:
        sizes = ("width", "layers", "heads", "intermediate_size", "context_length", "vocab_size")
        if wrong := {name: getattr(self, name) for name in sizes if getattr(self, name) < 1}:
            raise ValueError(f"sizes of a text encoder must be at least 1, not {wrong}")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not divisible by heads={self.heads}; change one of them")
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation={self.activation!r} is not one of {get_args(Activation)}")
        if self.hidden not in get_args(Hidden):
            raise ValueError(f"hidden={self.hidden!r} is not one of {get_args(Hidden)}")
        if self.hidden == "penultimate" and self.layers < 2:
            raise ValueError(
                f"hidden='penultimate' needs 2 layers or more, not layers={self.layers}; use hidden='last'"
            )
        ids = {"pad_id": self.pad_id, "bos_id": self.bos_id, "eos_id": self.eos_id}
        if wrong := {name: i for name, i in ids.items() if not 0 <= i < self.vocab_size}:
            raise ValueError(f"{wrong} is outside the vocabulary; vocab_size={self.vocab_size}")

    @property
    def own_clip_skip(self) -> int:
        """The layer whose output is the context, counted from the end of the whole tower, 1 being the last.

        Stable Diffusion 2's is the 23rd of 24. Diffusers' folder leaves the 24th out; no whole tower of CLIP's has 23.
        """
        return 2 if self.hidden == "penultimate" or self.most_clip_skip > self.layers else 1

    def layer_from_end(self, clip_skip: int | None) -> int:
        """Return the layer whose output is the context, counted from the end of those that are here.

        clip_skip counts from the end of the whole tower: A1111's "Clip skip", ComfyUI's CLIPSetLastLayer without its
        sign, and, for Stable Diffusion 1, diffusers' clip_skip + 1. None: the model's own. Stable Diffusion 2 has no
        1: it is 2 there. Raises ValueError for more than there are.
        """
        if clip_skip is not None and not 1 <= clip_skip <= self.most_clip_skip:
            most = self.most_clip_skip
            raise ValueError(f"clip skip is {clip_skip}, expected 1 to {most}, the text encoder's layers")
        return max(clip_skip or self.own_clip_skip, self.least_clip_skip) - (self.most_clip_skip - self.layers)

    @property
    def least_clip_skip(self) -> int:
        """2 for Stable Diffusion 2, whose last layer nobody uses."""
        return 2 if self.most_clip_skip == SD2_STORED_LAYERS + 1 else 1

    @property
    def unusual_clip_skip(self) -> int:
        """The model's own if it is not the least, which other programs assume; 0 otherwise."""
        return self.own_clip_skip if self.own_clip_skip > self.least_clip_skip else 0

    @property
    def most_clip_skip(self) -> int:
        """The layers of the whole tower."""
        return self.layers + (self.layers == SD2_STORED_LAYERS and self.hidden == "last")

    @property
    def tokenizer(self) -> TokenizerConfig:
        """The tokenizer configuration that matches this encoder."""
        return TokenizerConfig(context_length=self.context_length, pad_id=self.pad_id)


class TextEncoder(nn.Module, ABC):
    """Token ids B x L (int64) -> TextCondition; both backends compute the same for the same weights."""

    kind: ClassVar[str] = "clip_text_model"  # its entry in text.conversion.TEXT_ENCODERS

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, ids: Tensor, *, extra: Tensor | None = None, clip_skip: int | None = None) -> TextCondition:
        """Encode token ids.

        extra: vectors N x D of textual inversions, whose ids are those from `vocab_size` on. clip_skip: the layer whose
        output is the context, counted from the end, 1 being the last; None: the model's own. The final layer norm
        follows in any case. Raises ValueError for ids that are not B x L with L up to `context_length`, and for more
        layers than there are.
        """
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.config.context_length:
            raise ValueError(
                f"token ids are {tuple(ids.shape)}, not B x L with L from 1 to {self.config.context_length}"
            )
        layer = self.config.layer_from_end(clip_skip)
        with self._with_vectors(ids, extra) as known:
            context, last = self._context_and_last(known, layer)                                    # B, L, D
        mask = mask_to_eos(ids, self.config.eos_id)                                                 # B, L
        rows = torch.arange(len(ids), device=ids.device)
        pooled = last[rows, mask.sum(dim=1) - 1]                                                    # B, D
        return TextCondition(context, pooled, mask)

    @abstractmethod
    def _context_and_last(self, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Compute the states of a layer, counted from the end, and of the last, after the final norm: B x L x D."""

    @property
    @abstractmethod
    def _table(self) -> nn.Module:
        """The embeddings of the tokens."""

    @contextmanager
    def _with_vectors(self, ids: Tensor, extra: Tensor | None) -> Iterator[Tensor]:
        """Yield ids that the table has, with its output replaced by these vectors where `ids` has theirs, meanwhile."""
        if extra is None:
            yield ids
            return
        own = ids < self.config.vocab_size                                                          # B, L
        chosen = (ids - self.config.vocab_size).clamp(min=0)                                        # B, L

        def replace_some(_: nn.Module, __: tuple[Tensor, ...], found: Tensor) -> Tensor:
            return torch.where(own[..., None], found, extra.to(found)[chosen])                      # B, L, D

        handle = self._table.register_forward_hook(replace_some)
        try:
            yield torch.where(own, ids, 0)
        finally:
            handle.remove()


class TransformersTextEncoder(TextEncoder):
    """Encoder with transformers' CLIPTextModel as `model`; random weights from torch's global generator."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__(config)
        # Imported here, because it takes longer than torch and tokenizing does not need it.
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel

        self.model = CLIPTextModel(CLIPTextConfig(**transformers_settings(config)))

    @property
    def _table(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def _context_and_last(self, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        output = self.model(input_ids=ids, output_hidden_states=layer > 1)
        last = output.last_hidden_state
        return self.model.final_layer_norm(output.hidden_states[-layer]) if layer > 1 else last, last


class OpenClipTextEncoder(TextEncoder):
    """The text tower of an open_clip CLIP, CustomTextCLIP or TextTransformer, sharing its weights.

    The configuration is read from the tower; the image tower and the projection into the joint space are dropped.
    Raises TypeError for other models, ValueError for towers unlike CLIP's causal one, such as CoCa's.
    """

    def __init__(self, model: nn.Module, *, hidden: Hidden = "last", pad_id: int = 0) -> None:
        tower = _text_tower(model)
        super().__init__(_tower_config(tower, hidden, pad_id))
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final
        self.attn_mask: Tensor
        self.register_buffer("attn_mask", tower.attn_mask, persistent=False)

    @property
    def _table(self) -> nn.Module:
        return self.token_embedding

    def _context_and_last(self, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:length]                          # B, L, D
        causal = self.attn_mask[:length, :length]                                                   # L, L
        chosen = [self.config.layers - layer]
        last, states = self.transformer.forward_intermediates(x, attn_mask=causal, indices=chosen)
        return self.ln_final(states[0]), self.ln_final(last)


def transformers_settings(config: TextEncoderConfig) -> dict[str, Any]:
    """Return a configuration's values under CLIPTextConfig's names."""
    settings = {theirs: getattr(config, ours) for theirs, ours in TRANSFORMERS_NAMES.items()}
    return settings | {"layer_norm_eps": LAYER_NORM_EPS}


def open_clip_text_cfg(config: TextEncoderConfig) -> dict[str, Any]:
    """Build the `text_cfg` with which open_clip's CLIP or CustomTextCLIP creates this tower.

    It lacks the activation: open_clip sets that of both towers with CLIP's argument `quick_gelu`.
    """
    return {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.width,
        "heads": config.heads,
        "layers": config.layers,
        # open_clip truncates width x mlp_ratio; adding 0.5 keeps rounding from losing one unit.
        "mlp_ratio": (config.intermediate_size + 0.5) / config.width,
    }


def _text_tower(model: nn.Module) -> Any:
    from open_clip.model import CLIP, CustomTextCLIP
    from open_clip.transformer import TextTransformer

    tower = model.text if isinstance(model, CustomTextCLIP) else model
    if not isinstance(tower, CLIP | TextTransformer):
        raise TypeError(f"{type(tower).__name__} is not a text tower of open_clip; use its CLIP or CustomTextCLIP")
    if getattr(tower, "cls_emb", None) is not None or tower.attn_mask is None:
        raise ValueError("this text tower has a class token or attends to later tokens, which CLIP's does not")
    return tower


def _tower_config(tower: Any, hidden: Hidden, pad_id: int) -> TextEncoderConfig:
    """Read the configuration from the modules. Raises ValueError for blocks that transformers' CLIP lacks."""
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock

    block: Any = tower.transformer.resblocks[0]
    mlp: Any = block.mlp
    act = mlp.gelu
    plain = type(block) is ResidualAttentionBlock and type(block.ls_1) is nn.Identity
    exact_gelu = type(act) is nn.GELU and act.approximate == "none"
    if not plain or not (exact_gelu or type(act) is QuickGELU) or tower.ln_final.eps != LAYER_NORM_EPS:
        raise ValueError(
            "this text tower's blocks are not CLIP's: they must be open_clip's ResidualAttentionBlock without"
            f" layer scale, with GELU or QuickGELU and layer norms of eps {LAYER_NORM_EPS}"
        )
    projection = tower.text_projection
    if isinstance(projection, nn.Linear):
        projection_dim = projection.out_features
    else:
        projection_dim = None if projection is None else projection.shape[1]
    return TextEncoderConfig(
        width=tower.token_embedding.embedding_dim,
        layers=len(tower.transformer.resblocks),
        heads=block.attn.num_heads,
        intermediate_size=mlp.c_fc.out_features,
        context_length=tower.positional_embedding.shape[0],
        vocab_size=tower.token_embedding.num_embeddings,
        activation="gelu" if exact_gelu else "quick_gelu",
        hidden=hidden,
        projection_dim=projection_dim,
        pad_id=pad_id,
    )
