"""LoRA files for Stable Diffusion: read the common families, merge them into weights, write them for other programs.

Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), section 4.1.
"""

from ldm.interop.lora.files import lora_files, open_lora
from ldm.interop.lora.layers import LayerChange, LoraLayer, Part, merge_lora
from ldm.interop.lora.reading import bundled_embeddings, read_lora
from ldm.interop.lora.writing import write_lora_diffusers, write_lora_kohya

__all__ = [
    "LayerChange",
    "LoraLayer",
    "Part",
    "bundled_embeddings",
    "lora_files",
    "merge_lora",
    "open_lora",
    "read_lora",
    "write_lora_diffusers",
    "write_lora_kohya",
]
