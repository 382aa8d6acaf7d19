"""What an update needs of a GPU's memory, by the size of the tower: bytes that are kept are counted here, the rest is arithmetic.

Counted is what autograd keeps for the backward pass of the learner's forward pass, of a tower with random weights: of two
images less one, so that what is kept of the weights drops out. The attack's passes keep less, since no weight has a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from benchmark_node import TOWERS
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from hf_robust_vision.report.tables import markdown_table


GIB = 2**30
CARDS = (24, 80)  # GiB
HEADROOM = 0.85  # of a card's memory is taken to be free for this
# Of each parameter of the tower, bytes: float32 weights, gradient and AdamW's two moments, the frozen original, and the
# bfloat16 copy that autocast makes. An adapter leaves the weights alone and shares the original's.
FULL, ADAPTER = 4 + 4 + 8 + 4 + 2, 4 + 2


def kept(model: CLIPVisionModel, images: int) -> int:
    """Bytes that are kept for a backward pass in bfloat16, of storages that are no weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    size = model.config.image_size
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        output = model(torch.zeros(images, 3, size, size)).pooler_output
    assert output.requires_grad
    return sum(found.values())


def bytes_of(tower: Mapping[str, int]) -> dict[str, float]:
    """Parameters of a tower, and bytes an image: of all layers, and where layers are computed again."""
    model = CLIPVisionModel(CLIPVisionConfig(**tower)).train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    whole = kept(model, 2) - kept(model, 1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = kept(model, 2) - kept(model, 1)
    # While one layer is computed again it keeps what all would.
    return {"parameters": parameters, "whole": whole, "again": inputs + whole / tower["num_hidden_layers"]}


def fits(card: float, fixed: float, each: float) -> str:
    """How many images; of a fit that is none, a dash."""
    images = int((HEADROOM * card * GIB - fixed) / each)
    return f"{images:,}" if images >= 1 else "-"


def memory_by_size() -> list[str]:
    """A row for each tower: fixed bytes, bytes an image, and images that fit on a card."""
    torch.manual_seed(0)
    cells = []
    for name, tower in TOWERS.items():
        found = bytes_of(tower)
        fixed = {kind: found["parameters"] * each for kind, each in (("full", FULL), ("adapter", ADAPTER))}
        cells.append(
            [
                name,
                f"{found['parameters'] / 1e6:.0f}",
                *(f"{value / GIB:.1f}" for value in fixed.values()),
                *(f"{found[way] / 2**20:,.0f}" for way in ("whole", "again")),
                *(fits(card, fixed["full"], found[way]) for card in CARDS for way in ("whole", "again")),
            ]
        )
    again = "checkpointed"
    head = ["tower", "M parameters", "fixed, GiB", "with an adapter", "MiB an image", again]
    head += [column for card in CARDS for column in (f"images in {card} GiB", again)]
    return [
        *markdown_table(head, cells).splitlines(),
        "",
        f"Fixed are {FULL} bytes a parameter (float32 weights, gradient, AdamW, the frozen original, the bfloat16 copy), {ADAPTER} with an adapter.",
        f"An image is one of the learner's pass in bfloat16; for a form that learns from clean images as well, count two. Of a card {100 * HEADROOM:.0f} %",
        "are filled. No GPU was used: another attention kernel keeps a little less or more.",
    ]
