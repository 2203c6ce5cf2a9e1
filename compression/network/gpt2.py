"""transformers' GPT-2 made ready for students: its Conv1D become Linear, so that matrices are [out, in] and may be narrower.

A Conv1D insists on the width that it was made with, and the attention splits `c_attn` at the teacher's hidden width; both
would refuse a student with fewer heads or neurons. Everything else of the forward pass stays transformers'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# This project's names of a layer's parts, and where they are in the changed module.
MODULES_OF_GPT2 = {
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.c_attn.q_proj",
    "self_attn.k_proj": "attn.c_attn.k_proj",
    "self_attn.v_proj": "attn.c_attn.v_proj",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


class PackedProjections(nn.Module):
    """In the place of `c_attn`: three Linear side by side, and the attention told where to split."""

    def __init__(self, attention: Any, hidden: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, hidden, device="meta") for _ in "qkv")
        self._attention = [attention]  # in a list, because a module would become a part of this one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, hidden] to [batch, length, 3 x heads x head_dim]."""
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        self._attention[0].split_size = parts[0].shape[-1]
        return torch.cat(parts, -1)


def as_linears(model: nn.Module) -> None:
    """Change a GPT2Model on the meta device in place."""
    layers: Any = model.h
    for layer in layers:
        hidden = layer.ln_1.normalized_shape[0]
        layer.attn.c_attn = PackedProjections(layer.attn, hidden)
        layer.attn.c_proj = nn.Linear(hidden, hidden, device="meta")
        layer.mlp.c_fc = nn.Linear(hidden, layer.mlp.c_fc.nf, device="meta")
        layer.mlp.c_proj = nn.Linear(layer.mlp.c_fc.out_features, hidden, device="meta")
