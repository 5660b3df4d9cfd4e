"""Low-rank adaptation (Hu et al., 2021) of linear layers, in plain PyTorch."""

import torch
from torch import nn


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices."""

    def __init__(self, base, rank=4, alpha=8):
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))  # the adapted layer begins as the frozen one
        self.scale = alpha / rank

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.lora_a.T @ self.lora_b.T)


def with_lora(model, names):
    """Freeze a model and put adapters around its linear layers of these names; returns the model."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in names and isinstance(layer, nn.Linear):
                setattr(parent, name, LoRALinear(layer))
    return model


def adapters(model):
    """The state of what is trained: what clients and server send each other."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name in trained}


def load_adapters(model, state):
    """Put adapters into a model."""
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"The model has no adapters {unexpected}.")
