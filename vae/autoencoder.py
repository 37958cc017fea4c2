"""Stable Diffusion's KL autoencoder (Rombach et al. 2022, appendix G; Esser et al. 2021), of any size.

Parameter names are those of diffusers' AutoencoderKL, so that weights load in both directions unchanged.

B batch, C channels, H x W pixels, h x w latents, Z latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # Stable Diffusion's VAE; its U-Net uses 1e-5
STABLE_DIFFUSION_SCALE = 0.18215  # 1 / standard deviation of its latents, which all software for its files assumes


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """Sizes of the autoencoder. Each level after the first halves the image: n levels make an "f" 2^(n-1)."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2  # residual blocks per level in the encoder; the decoder has one more
    latent_channels: int = 4
    norm_num_groups: int = 32
    # Measured over the training set, per channel; latents = (z - mean) / std have unit variance.
    latent_mean: tuple[float, ...] | None = None  # None: zero
    latent_std: tuple[float, ...] | None = None  # None: Stable Diffusion's 1 / 0.18215

    def __post_init__(self) -> None:
        for name in ("layers_per_block", "latent_channels", "norm_num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"vae.{name} must be at least 1, not {getattr(self, name)}")
        if not self.block_out_channels:
            raise ValueError("vae.block_out_channels is empty: give one width per level")
        for width in self.block_out_channels:
            if width < 1 or width % self.norm_num_groups:
                raise ValueError(
                    f"vae.block_out_channels holds {width}, not a multiple of vae.norm_num_groups "
                    f"({self.norm_num_groups}): change either"
                )
        for name in ("latent_mean", "latent_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(
                    f"vae.{name} has {len(values)} numbers for {self.latent_channels} latent channels: give one each"
                )
        if self.latent_std is not None and min(self.latent_std) <= 0:
            raise ValueError(f"vae.latent_std must be positive, not {self.latent_std}: measure it again")

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 convolution on the shortcut if the width changes."""

    def __init__(self, width_in: int, width_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Residual single-head self-attention over all positions of the image."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=NORM_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list only to match diffusers' name, to_out.0

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # B x hw x C
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        mixed = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + self.to_out[0](mixed).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Halve the image; pad right and below only, as in Stable Diffusion (a symmetric pad shifts by half a pixel)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the image: nearest-neighbour upsampling, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, layers: int, groups: int, *, last: bool) -> None:
        super().__init__()
        widths = [width_in] + [width_out] * layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(width_out)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, layers: int, groups: int, *, last: bool) -> None:
        super().__init__()
        widths = [width_in] + [width_out] * layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(width_out)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Pixels -> moments: B x 3 x H x W -> B x 2Z x h x w."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(before, width, config.layers_per_block, groups, last=level == len(widths) - 1)
            for level, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        h = self.conv_in(pixels)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """z -> pixels: B x Z x h x w -> B x 3 x H x W."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            UpBlock(before, width, config.layers_per_block + 1, groups, last=level == len(widths) - 1)
            for level, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


@dataclass(frozen=True, slots=True)
class DiagonalGaussian:
    """The encoder's posterior q(z|x) (Kingma & Welling 2013): N(mean, diag(exp(logvar))), both B x C x h x w."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """Split moments B x 2C x h x w into mean and log-variance, which is clamped so that exp stays finite."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: Tensor) -> Tensor:
        """Sample by reparametrisation: z = mu + sigma * eps, eps ~ N(0, I), shaped like the mean."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Compute KL(q || N(0, I)) = 1/2 sum(mu^2 + sigma^2 - 1 - log sigma^2), in nats per image: B."""
        mean, logvar = self.mean.float(), self.logvar.float()  # in bfloat16, sums of thousands of terms lose precision
        terms = mean.square() + logvar.exp() - 1.0 - logvar
        return 0.5 * terms.flatten(1).sum(dim=1)


class AutoencoderKL(nn.Module):
    """The autoencoder. *z* is the space of its networks; *latents* are z shifted and scaled to unit variance.

    Outside this class, only pixels (B x 3 x H x W in [-1, 1]) and latents (B x Z x h x w) are used.
    """

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def posterior(self, pixels: Tensor) -> DiagonalGaussian:
        """Compute q(z | pixels), in units of z. Raises ValueError unless H and W are multiples of the factor."""
        if pixels.shape[-2] % self.config.factor or pixels.shape[-1] % self.config.factor:
            raise ValueError(
                f"an image of {pixels.shape[-2]} x {pixels.shape[-1]} pixels is not divisible by the autoencoder's "
                f"factor {self.config.factor}: crop or resize it to a multiple"
            )
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(pixels)))

    def encode(self, pixels: Tensor) -> DiagonalGaussian:
        """Compute the distribution of the latents of pixels."""
        q = self.posterior(pixels)
        mean, std = self._latent_statistics(q.mean)
        return DiagonalGaussian((q.mean - mean) / std, q.logvar - 2.0 * torch.log(std))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to pixels; not clamped."""
        mean, std = self._latent_statistics(latents)
        return self.decode_z(latents * std + mean)

    def decode_z(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """Run a training pass: return the reconstruction from a sample of the posterior, and the posterior.

        noise: standard normal, B x Z x h x w.
        """
        q = self.posterior(pixels)
        return self.decode_z(q.sample(noise)), q

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        channels = self.config.latent_channels
        mean = self.config.latent_mean or (0.0,) * channels
        std = self.config.latent_std or (1.0 / STABLE_DIFFUSION_SCALE,) * channels
        return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)
