"""LoRA files for Stable Diffusion: read the common formats, merge them into weights, write them for other programs.

Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), section 4.1.
"""

from ldm.interop.lora.layers import LoraLayer, Part, merge_lora
from ldm.interop.lora.reading import read_lora
from ldm.interop.lora.writing import write_lora_diffusers, write_lora_kohya

__all__ = ["LoraLayer", "Part", "merge_lora", "read_lora", "write_lora_diffusers", "write_lora_kohya"]
