"""A vision tower of CLIP, in the layout of transformers or of open_clip, or of SigLIP: how to read it and change it in place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionModel
from transformers.activations import ACT2FN

from hf_robust_vision.towers.base import attack_mode

from .journal import Journal
from .open_clip import PROJECTION, clip_keys, hf_to_openclip, key_map, openclip_to_hf, square_side
from .siglip import HEAD, siglip_keys


_ACTIVATIONS = {
    "QuickGELU": "quick_gelu",
    "QuickGELUActivation": "quick_gelu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
}


@dataclass(frozen=True)
class Geometry:
    """What must agree before weights may change places; the names are those of `CLIPVisionConfig`, and SigLIP's."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    patch_size: int
    image_size: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Read it from the config of a vision tower."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return int(self.image_size // self.patch_size) ** 2


@dataclass(eq=False, repr=False)
class Tower:
    """A CLIP vision tower inside a model, with Hugging Face's names."""

    path: str  # its dotted name in the model; empty if it is the model itself
    module: nn.Module
    projection: nn.Linear | None = None  # that belongs to the tower, where the model has one that may change with it
    layers_read: tuple[int, ...] | None = None  # which of `tokens` the model reads, None where that is not known

    # Where its parts are, the last two in a block. The first weight tells device and dtype; what leaves `_first` enters
    # the first block.
    _patches: ClassVar[str] = "embeddings.patch_embedding.weight"
    _first: ClassVar[str] = "pre_layrnorm"
    _blocks: ClassVar[str] = "encoder.layers"
    _activation: ClassVar[str] = "activation_fn"
    _attention: ClassVar[str] = "self_attn"
    _told_by: ClassVar[str] = "the config"

    family: ClassVar[str] = "CLIP"
    class_tokens: ClassVar[int] = 1

    def __repr__(self) -> str:
        return f"{type(self.module).__name__} at {self.path or '(the model itself)'}"

    @property
    def geometry(self) -> Geometry:
        """Sizes and settings, from the config.

        Raises:
            ValueError: If the modules compute with other settings than the config says.
        """
        return self._agreed(Geometry.of(self.module.config))

    def _agreed(self, told: Geometry) -> Geometry:
        """What is told of the tower, if activation and heads of each block and the epsilon of each norm are as told."""
        # Read from the modules, because in low precision the outputs of two activations are too close to tell them apart.
        same = type(ACT2FN[told.hidden_act]) if told.hidden_act in ACT2FN else None  # some have two names
        found: list[tuple[str, str, Any]] = []
        for i, block in enumerate(self.blocks):
            act = getattr(block.mlp, self._activation)
            found.append((f"block {i}", "hidden_act", told.hidden_act if type(act) is same else _act(act)))
            found.append((f"block {i}", "num_attention_heads", getattr(block, self._attention).num_heads))
        norms = [(path, norm) for path, norm in self.module.named_modules() if isinstance(norm, nn.LayerNorm)]
        for place, name, value in [*found, *((path, "layer_norm_eps", norm.eps) for path, norm in norms)]:
            if value != getattr(told, name):
                raise ValueError(
                    f"{self}: {self._told_by} says {name}={getattr(told, name)!r}, {place} computes with {value!r}: "
                    "make the two agree, or load the model anew."
                )
        return told

    @property
    def patch_weight(self) -> Tensor:
        """The weight that meets the pixel values, and so tells their device and dtype."""
        return self.module.get_parameter(self._patches)

    @property
    def blocks(self) -> list[Any]:
        """The transformer blocks."""
        return list(self.module.get_submodule(self._blocks).children())

    def weights(self) -> dict[str, nn.Parameter]:
        """All weights of the tower under its own names, the projection among them."""
        weights: dict[str, nn.Parameter] = dict(self.module.named_parameters(remove_duplicate=False))
        if self.projection is not None:
            weights[PROJECTION] = self.projection.get_parameter("weight")
        return weights

    def clip_state(self) -> dict[str, Tensor]:
        """All weights under the keys of transformers' class for the family."""
        return {name: weight.detach() for name, weight in self.weights().items()}

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From these keys to the tower's own names, without what it has no place for."""
        return state if self.projection is not None else {k: v for k, v in state.items() if k != PROJECTION}

    def expected(self) -> set[str]:
        """The names that a plain tower has."""
        return clip_keys(self.geometry.num_hidden_layers) | ({PROJECTION} if self.projection is not None else set())

    def unread(self) -> list[str]:
        """Names of the weights that the model never reads, as far as that is known."""
        if self.layers_read is None:
            return []
        idle = [f"encoder.layers.{i}." for i in range(max(self.layers_read), len(self.blocks))]
        return [name for name in self.weights() if name.startswith((*idle, "post_layernorm.", "head.", PROJECTION))]

    @torch.no_grad()
    def run(self, pixel_values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Its tokens, and what a `CLIPVisionModel` or `SiglipVisionModel` hands to its caller; others hand over other things.

        Tokens are what enters the first block and what leaves each, `hidden_states` of shape (batch, tokens, width).
        """
        # By hooks, since every class returns something else, if it returns hidden states at all.
        caught: list[Tensor] = []

        def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)

        hooks = [
            module.register_forward_hook(catch) for module in (self.module.get_submodule(self._first), *self.blocks)
        ]
        plain, tower = isinstance(self.module, CLIPVisionModel | SiglipVisionModel), cast(Any, self.module)
        settings = {"output_hidden_states": True} if plain else {}
        try:
            with attack_mode(self.module):
                # A call with the tower's own hooks, but past `torch.compile`, whose graphs do not see new ones.
                output = tower._call_impl(pixel_values.to(self.patch_weight), **settings)
        except RuntimeError as error:
            dtypes = " and ".join(sorted({str(weight.dtype) for weight in self.weights().values()}))
            raise ValueError(
                f"{self}, whose weights are of {dtypes}, can not run on its own: bring it to one dtype and device, or "
                f"pass verify=False. ({str(error)[:120].splitlines()[0]})"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if not plain:
            return caught, []
        pooled = [] if output.pooler_output is None else [output.pooler_output]  # a SigLIP without its head has none
        return caught, [*output.hidden_states, output.last_hidden_state, *pooled]

    def adapt(self, now: Geometry, wanted: Geometry, journal: Journal) -> None:
        """Switch activation, heads and image size; new positions are left for the weights to fill."""
        # `now` is an argument: VideoLLaVA's two towers share one config, which the first one's swap has changed already.
        head_dim = wanted.hidden_size // wanted.num_attention_heads
        heads = {"num_heads": wanted.num_attention_heads, "head_dim": head_dim, "scale": head_dim**-0.5}
        for block in self.blocks:
            attention = getattr(block, self._attention)
            if wanted.hidden_act != now.hidden_act:
                journal.set(block.mlp, self._activation, ACT2FN[wanted.hidden_act])
            for name in heads if wanted.num_attention_heads != now.num_attention_heads else ():
                if hasattr(attention, name):  # torch's own attention, which open_clip uses, keeps no scale
                    journal.set(attention, name, heads[name])
        if wanted.image_size != now.image_size:
            self._resize(wanted, journal)
        # Several modules of a tower may hold the same config: it is told once.
        configs = {id(m.config): m.config for m in self.module.modules() if hasattr(m, "config")}
        for config in configs.values():
            tell_config(config, wanted, journal)

    def _resize(self, wanted: Geometry, journal: Journal) -> None:
        # A new parameter, since a tensor can not grow in place: the one change that an optimizer does not follow. An
        # open_clip tower never comes here, because nothing could tell its caller's transform (see `check_native`).
        embeddings: Any = self.module.embeddings
        table, rows = embeddings.position_embedding, self.class_tokens + wanted.num_patches
        empty = nn.Parameter(table.weight.detach().new_zeros(rows, table.embedding_dim), table.weight.requires_grad)
        ids = torch.arange(rows, device=embeddings.position_ids.device)[None]
        told = {"image_size": wanted.image_size, "num_patches": wanted.num_patches, "num_positions": rows}
        for name, value in (told | {"position_ids": ids}).items():
            journal.set(embeddings, name, value)
        journal.set(table, "weight", empty)
        journal.set(table, "num_embeddings", rows)


class SiglipTower(Tower):
    """A SigLIP vision tower inside a model; a VLM's own has no head, which nothing would read."""

    _first = "embeddings"
    family = "SigLIP"
    class_tokens = 0

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `Tower.rename`."""
        return {name: value for name, value in state.items() if name not in HEAD - self.expected()}

    def expected(self) -> set[str]:
        """As `Tower.expected`."""
        head: set[str] = set(HEAD) if hasattr(self.module, "head") else set()
        return siglip_keys(self.geometry.num_hidden_layers) | head

    def adapt(self, now: Geometry, wanted: Geometry, journal: Journal) -> None:
        """As `Tower.adapt`, and the head like the blocks."""
        super().adapt(now, wanted, journal)
        head: Any = getattr(self.module, "head", None)
        if head is not None:
            journal.set(head.mlp, "activation_fn", ACT2FN[wanted.hidden_act])
            journal.set(head.attention, "num_heads", wanted.num_attention_heads)
            journal.set(head.attention, "head_dim", wanted.hidden_size // wanted.num_attention_heads)


class OpenClipTower(Tower):
    """An open_clip vision transformer inside a model, recognised by its shape: open_clip is never imported."""

    _patches, _first, _blocks = "conv1.weight", "ln_pre", "transformer.resblocks"
    _activation, _attention, _told_by = "gelu", "attn", "the first block"

    @property
    def geometry(self) -> Geometry:
        """Sizes and settings, from the modules, for there is no config."""
        module: Any = self.module
        block = self.blocks[0]
        activation = _act(block.mlp.gelu)
        if activation not in _ACTIVATIONS.values() or getattr(block.mlp.gelu, "approximate", "none") != "none":
            raise ValueError(f"{self}: activation {block.mlp.gelu} is neither GELU nor QuickGELU.")
        patch = module.conv1.kernel_size[0]
        told = Geometry(
            hidden_size=module.conv1.out_channels,
            num_hidden_layers=len(self.blocks),
            intermediate_size=block.mlp.c_fc.out_features,
            patch_size=patch,
            image_size=patch * square_side(len(module.positional_embedding) - 1),
            num_attention_heads=block.attn.num_heads,
            hidden_act=activation,
            layer_norm_eps=block.ln_1.eps,
        )
        return self._agreed(told)

    def clip_state(self) -> dict[str, Tensor]:
        """As `Tower.clip_state`."""
        return openclip_to_hf(super().clip_state())

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `Tower.rename`."""
        return hf_to_openclip(state)

    def expected(self) -> set[str]:
        """As `Tower.expected`."""
        return {*key_map(len(self.blocks)), "proj"}

    def unread(self) -> list[str]:
        """The projection, where the model reads tokens; whether they are normalised depends on open_clip's version."""
        return ["proj"] if self.layers_read is not None else []

    def run(self, pixel_values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """As `Tower.run`; older versions of open_clip put the batch second."""
        (first, *rest), given = super().run(pixel_values)
        if not getattr(self.module.transformer, "batch_first", False):
            rest = [tokens.transpose(0, 1) for tokens in rest]
        return [first, *rest], given


def tell_config(config: Any, wanted: Geometry, journal: Journal) -> None:
    """Write the settings that a swap can switch into the config of a vision tower."""
    for name in ("hidden_act", "num_attention_heads", "image_size"):
        if getattr(config, name) != getattr(wanted, name):
            journal.set(config, name, getattr(wanted, name))


def _act(module: nn.Module) -> str:
    return _ACTIVATIONS.get(type(module).__name__, repr(module))
