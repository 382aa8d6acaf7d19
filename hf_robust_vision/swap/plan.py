"""Everything that is checked before a swap may touch a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor
from transformers.activations import ACT2FN

from hf_robust_vision.towers.weights import check_weights

from .layouts import Geometry, OpenClipTower, Tower
from .open_clip import POSITIONS, interpolate_positions
from .source import PixelSettings, Source, reference_tower


RESIZE = ("error", "interpolate", "native")

_NATIVE = ("llava", "vipllava", "video_llava")  # their processors count one grid of patches an image
_ADVICE = {
    "hidden_act": "if the weights were trained with {got!r}, pass hidden_act={got!r}: the tower is switched to it",
    "num_attention_heads": "if the weights were trained with {got}, pass num_attention_heads={got}",
    "layer_norm_eps": "a tower cannot be switched; to run the weights with the tower's own, pass a state dict",
    "image_size": "pass resize='interpolate' to resize the positions to the tower's {want} px, or resize='native' "
    "and processor= to run the VLM at {got} px",
}


@dataclass
class Plan:
    """The swap of one tower, prepared without touching it."""

    tower: Tower
    old: Geometry
    new: Geometry
    state: dict[str, Tensor]  # under the tower's own names, in its dtype
    reference: Tower  # a plain tower with these weights, which the source was found equal to
    original: dict[str, Tensor] | None = None  # what the source was trained from, likewise under own names; if known

    @property
    def switched(self) -> list[str]:
        """Names of the settings that change with the swap."""
        return [name for name, *_ in differences(self.old, self.new)]


def differences(want: Geometry, got: Geometry) -> list[tuple[str, Any, Any]]:
    """Name, value wanted and value got of everything that differs."""
    pairs = ((field.name, getattr(want, field.name), getattr(got, field.name)) for field in fields(Geometry))
    return [(name, a, b) for name, a, b in pairs if a != b]


def make_plan(tower: Tower, source: Source, resize: str, asked: Mapping[str, Any]) -> Plan:
    """Fit the source's weights to one tower; refuse what no argument settles, and weights that are not finite.

    `asked` are the settings, by their names in `Geometry`, that the user says the weights were trained with.
    """
    if source.kind.family != tower.family:
        raise ValueError(
            f"the source is a {source.kind.family}, {tower} is a {tower.family}; nothing was changed. These are other "
            "networks: take a source that was trained from the VLM's own kind of tower, or harden the VLM in place "
            "(hf-robust-vision harden-vlm)."
        )
    old = tower.geometry
    new = source.completed(old, asked)
    _check_geometry(tower, old, new, {*asked, *(["image_size"] if resize != "error" else [])})
    state = dict(source.state)
    if resize == "interpolate":
        if new.num_patches != old.num_patches:
            state[POSITIONS] = interpolate_positions(state[POSITIONS], old.num_patches, tower.class_tokens)
        new = replace(new, image_size=old.image_size)
    _check_shapes(tower, state)
    # Once as they are, and once in the tower's dtype, where a value that was finite may overflow.
    weights, own = tower.weights(), {}
    check_weights(source.state, source.name)
    for name, value in tower.rename(state).items():
        check_weights({name: value}, source.name, weights[name].dtype)
        own[name] = value.to(weights[name])
    # Cast as the tower's, so that the comparison shows other code and not another precision. A SigLIP's head is compared
    # where the tower has one.
    kept = tower.rename(state) if tower.family == "SigLIP" else state
    reference = reference_tower({name: value.to(tower.patch_weight) for name, value in kept.items()}, new)
    return Plan(tower, old, new, own, reference, source.original and tower.rename(source.original))


def check_native(model_type: str, plans: Sequence[Plan], processor: Any) -> None:
    """Refuse to run a model at another image size unless model and processor can both be told."""
    if not any("image_size" in plan.switched for plan in plans):
        return
    sizes = f"{plans[0].old.image_size} px to {plans[0].new.image_size} px"
    if model_type not in _NATIVE or any(isinstance(plan.tower, OpenClipTower) for plan in plans):
        raise ValueError(
            f"resize='native' (from {sizes}) is supported for {', '.join(_NATIVE)}, not for {model_type or 'this'} "
            "model (tiles of a fixed size, or a transform of its own): pass resize='interpolate'."
        )
    if getattr(processor, "image_processor", None) is None or not hasattr(processor, "patch_size"):
        raise ValueError(
            f"resize='native' changes the image size from {sizes}, and the processor must follow, but processor= is "
            f"{'absent' if processor is None else type(processor).__name__}: pass the VLM's processor "
            "(AutoProcessor.from_pretrained(...)), and save it with the VLM."
        )
    if processor.patch_size != plans[0].new.patch_size:
        raise ValueError(
            f"processor.patch_size is {processor.patch_size}, the tower's {plans[0].new.patch_size}: set "
            f"processor.patch_size = {plans[0].new.patch_size}."
        )


def check_shared(plans: Sequence[Plan], others: set[str]) -> None:
    """Refuse to switch settings of some towers only: the model's config has one `vision_config` for all."""
    switched = sorted({name for plan in plans for name in plan.switched})
    if switched and others:
        raise ValueError(
            f"the swap changes {', '.join(switched)}, which all towers share, but leaves out {', '.join(sorted(others))}: "
            "pass towers='all'."
        )


def check_pixels(known: PixelSettings | None, wanted: PixelSettings | None) -> bool:
    """Whether means and deviations of the processor and of the source are both known; refuse any that differ."""
    if known is None or wanted is None:
        return False
    if (known.mean, known.std) != (wanted.mean, wanted.std):
        raise ValueError(
            f"the source was trained with image mean and std {(wanted.mean, wanted.std)}, the processor uses "
            f"{(known.mean, known.std)}: set image_mean and image_std of the processor's image processor to the "
            "source's (and do_normalize), or pass the weights alone (a state dict) if you know better."
        )
    if None not in (known.rescale, wanted.rescale) and known.rescale != wanted.rescale:
        raise ValueError(
            f"the source's image processor multiplies pixels by {wanted.rescale:g}, the VLM's by {known.rescale:g}: set "
            "do_rescale and rescale_factor of the processor's image processor to the source's."
        )
    return True


def pixel_notes(known: PixelSettings | None, wanted: PixelSettings | None, plan: Plan) -> list[str]:
    """What of the processor does not go with the source or the tower, though the swap may stand."""
    if known is None:
        return []
    notes = []
    if wanted is not None and None not in (known.resample, wanted.resample) and known.resample != wanted.resample:
        notes.append(
            f"images are resized with resample={known.resample} (PIL's code) by the processor, with {wanted.resample} "
            "by the source's."
        )
    side = plan.new.image_size
    if "image_size" not in plan.switched and known.size is not None and known.size != (side, side):
        height, width = known.size
        notes.append(f"the processor makes images of {height} x {width} pixels, the tower takes {side} x {side}.")
    return notes


def _check_geometry(tower: Tower, want: Geometry, got: Geometry, settled: set[str]) -> None:
    problems = []
    for name, a, b in differences(want, got):
        if name not in settled:
            advice = _ADVICE.get(name, "take a source of the tower's architecture").format(want=a, got=b)
            problems.append(f"{name} is {a!r} in the tower and {b!r} in the source: {advice}")
    if problems:
        raise ValueError(f"the source does not fit {tower}; nothing was changed. " + "; ".join(problems) + ".")
    if got.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act={got.hidden_act!r} is unknown to transformers: pass 'quick_gelu' or 'gelu'.")
    if got.num_attention_heads < 1 or got.hidden_size % got.num_attention_heads:
        raise ValueError(f"num_attention_heads={got.num_attention_heads} does not divide {got.hidden_size}.")


def _check_shapes(tower: Tower, state: dict[str, Tensor]) -> None:
    for name, weight in tower.clip_state().items():
        # Positions may be more or fewer, and a source without a projection leaves the tower's as it is.
        if name != POSITIONS and name in state and state[name].shape != weight.shape:
            shapes = f"shape {tuple(weight.shape)}, in the source it is {tuple(state[name].shape)}"
            raise ValueError(f"{tower}: {name} has {shapes}.")
