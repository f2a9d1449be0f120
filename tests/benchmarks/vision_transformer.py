"""A vision transformer of Hugging Face as a user would name it, ``tests.benchmarks.vision_transformer:build``."""

import torch
from torch import nn
from transformers import ViTConfig, ViTModel


def build() -> nn.Module:
    """ViT-S/16 with random weights: 12 blocks of width 384, which torch.fx cannot trace."""
    torch.manual_seed(0)
    return ViTModel(ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536))
