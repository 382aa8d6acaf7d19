"""Put a hardened CLIP or SigLIP encoder into a VLM: check everything, copy in place, verify, or leave the VLM as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from hf_robust_vision.pixels import OPENAI_MEAN, OPENAI_STD, PixelTransform
from hf_robust_vision.towers.base import weights_sha256

from .journal import LOCK, Journal
from .layouts import Tower, tell_config
from .open_clip import PROJECTION, square_side
from .plan import RESIZE, Plan, check_native, check_pixels, check_shared, make_plan, pixel_notes
from .report import SwapReport, TowerReport
from .source import Source, load_source, processor_pixels, reference_tower
from .towers import check_writable, find_towers, model_config


# Mean cosine of old and new patch tokens. Hardened towers of the demo have 0.83 to 0.97, towers of random weights -0.06
# to 0.05, and 0.49 where they are the very weights that the demo's training started from.
STRANGE_DRIFT = 0.5

# What the same computation may differ by, relatively, in other kernels and orders of summation.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def swap_vision_encoder(
    vlm: nn.Module,
    source: Any,
    *,
    towers: str | Sequence[str] = "all",
    resize: str = "error",
    hidden_act: str | None = None,
    num_attention_heads: int | None = None,
    processor: Any = None,
    verify: bool = True,
    base: Any = None,
) -> SwapReport:
    """Copy the weights of a hardened CLIP or SigLIP encoder into the tower(s) of a VLM, in place.

    The tower keeps its dtype, device, hooks and flags, and the VLM's config stays true to it. On any failure the VLM is
    left as it was.

    Args:
        vlm: A model with a CLIP or SigLIP vision tower, of transformers, of the original LLaVA code or of OpenFlamingo.
        source: The hardened encoder, see `load_source`.
        towers: "all", or the paths of those to swap.
        resize: What to do if source and tower differ in image size: "error"; "interpolate" the source's positions to
            the tower's size; or "native": run the tower, and the processor, at the source's size.
        hidden_act: The activation that the source was trained with, where it does not say so; the tower is switched.
        num_attention_heads: The number of heads of the source, likewise.
        processor: The VLM's processor: its settings are compared with the source's, and "native" sets its sizes.
        verify: Compare the new tower's output with the source's, and measure the drift from the old one.
        base: The model that a PEFT adapter was trained on, if the adapter does not name it.

    Returns:
        A report, with `restore()`.

    Raises:
        TypeError: If `vlm` is no model, or `source` nothing that can be one.
        ValueError: If anything does not fit; the message names what was found, what was wanted, and what to type.
        RuntimeError: If the result does not equal the source; the VLM was brought back before.
    """
    if resize not in RESIZE:
        raise ValueError(f"resize={resize!r}; choose one of {', '.join(map(repr, RESIZE))}.")
    if isinstance(processor, str | Path):
        raise ValueError(f"processor={str(processor)!r} is a name; pass AutoProcessor.from_pretrained(that name).")
    with LOCK:
        # First all that can be refused, from the cheap to the dear: of a VLM with two towers none may be half done because
        # of what is found at the second.
        found = find_towers(vlm, towers)
        for tower in found:
            check_writable(tower)
        loaded = load_source(source, base=base)
        pixels = processor_pixels(processor)
        compared = check_pixels(pixels, loaded.pixels)
        settings = {"hidden_act": hidden_act, "num_attention_heads": num_attention_heads}
        asked = {name: value for name, value in settings.items() if value is not None}
        plans = [make_plan(tower, loaded, resize, asked) for tower in found]
        if verify and loaded.tower is not None:
            _check_source(loaded.tower)
        config = model_config(vlm)
        check_native(getattr(config, "model_type", ""), plans, processor)
        check_shared(plans, {tower.path for tower in find_towers(vlm)} - {tower.path for tower in found})
        report = SwapReport(
            model=type(vlm).__name__,
            source=loaded.name,
            resize=resize,
            image_size=plans[0].new.image_size,
            towers=[],
            checks=_checks(compared, verify),
            warnings=[*_warnings(config, loaded, plans, compared), *pixel_notes(pixels, loaded.pixels, plans[0])],
            versions={"transformers": transformers.__version__, "torch": torch.__version__},
        )
        # From here on weights move, since only a changed tower can show that it computes what the source does. Whatever goes
        # wrong, an interrupt too, the journal brings everything back.
        journal = Journal()
        try:
            report.towers = [_commit(plan, journal, verify=verify) for plan in plans]
            _sync(config, plans, processor, journal)
            if config is not None:
                journal.record(config, report.provenance())
        except BaseException:
            journal.undo()
            raise
        if verify:
            report.warnings[:0] = _drift_warnings(report.towers)
        report.warnings += [note for plan, told in zip(plans, report.towers) for note in _origin_notes(plan, told)]
        report._journal = journal
    return report


def _check_source(source: Tower) -> None:
    """Refuse a source that computes something else than its weights and settings say, which is all that is copied."""
    weights = {name: value.to(source.patch_weight) for name, value in source.clip_state().items()}
    plain = reference_tower(weights, source.geometry)
    pixel_values = _pixel_values(source.geometry.image_size)
    gap = _gap(source.run(pixel_values), plain.run(pixel_values))
    if not gap <= _TOLERANCE[source.patch_weight.dtype]:
        raise ValueError(
            f"the source, {source}, does not compute what its weights and settings say (relative difference {gap:.2g}): "
            "a hook, or a module of another kind, would not be copied, or it overflows. Remove the hook, or pass its "
            "state_dict() to swap the weights alone; an overflow needs bfloat16 or float32."
        )


def _commit(plan: Plan, journal: Journal, *, verify: bool) -> TowerReport:
    """Change one tower and compare it with its source."""
    tower, state = plan.tower, plan.state
    old_tokens = tower.run(_pixel_values(plan.old.image_size))[0] if verify else None
    sha256_before = weights_sha256(tower.module)
    old = {name: weight.detach() for name, weight in tower.weights().items()}
    changed = _differing(old, state)
    original = plan.original
    off_original = None if original is None else _differing(old, {k: v.to(old[k]) for k, v in original.items()})
    journal.sign(tower.module)
    # In place: dtype, device, hooks, flags and the optimizer's references to the parameters all stay.
    tower.adapt(plan.old, plan.new, journal)
    weights = tower.weights()
    for name, value in state.items():
        journal.copy(weights[name], value)
    # Read back: a parameter of an unusual kind may take a copy without a word and keep what it had.
    wrong = [name for name, value in state.items() if not torch.equal(weights[name].detach(), value)]
    if wrong or tower.geometry != plan.new:
        raise RuntimeError(f"{tower} did not take {wrong[:3] or 'the settings'} over; the old tower was brought back.")
    drift, error = (None, None) if old_tokens is None else _measure(plan, old_tokens)
    unread = tower.unread()
    return TowerReport(
        path=tower.path,
        parameters=sum(weight.numel() for weight in weights.values()),
        changed=changed,
        off_original=off_original,
        unread=sum(weights[name].numel() for name in unread),
        unread_names=unread,
        drift=drift,
        output_error=error,
        sha256_before=sha256_before,
        sha256_after=weights_sha256(tower.module),
    )


def _differing(old: dict[str, Tensor], state: dict[str, Tensor]) -> int:
    return sum(
        int((old[name] != value).sum()) if old[name].shape == value.shape else value.numel()
        for name, value in state.items()
    )


def _measure(plan: Plan, old_tokens: list[Tensor]) -> tuple[float | None, float]:
    """Mean cosine of old and new patch tokens where the VLM reads, and the largest relative error to the source."""
    # To the reference and not to the source, which may be a file; `_check_source` has found the two equal.
    pixel_values = _pixel_values(plan.new.image_size)
    (new_tokens, given), dtype = plan.tower.run(pixel_values), plan.tower.patch_weight.dtype
    gap = _gap((new_tokens, given), plan.reference.run(pixel_values))
    if not gap <= _TOLERANCE[dtype]:  # so written that NaN is refused
        why = f"differs from the source's by {gap:.2g} (relative), more than {_TOLERANCE[dtype]}: its code computes "
        why += "something else from the same weights"
        if not math.isfinite(gap):
            why = f"is not finite in {dtype}: convert the VLM to bfloat16 or float32"
        raise RuntimeError(f"the output of {plan.tower} {why}. The old tower was brought back.")
    cut = plan.tower.class_tokens
    layers = plan.tower.layers_read or (len(new_tokens) - 1,)
    cosines = [_cosine(old_tokens[layer][:, cut:].float(), new_tokens[layer][:, cut:].float()) for layer in layers]
    drift = sum(cosines) / len(cosines)
    return drift if math.isfinite(drift) else None, gap


def _gap(got: tuple[list[Tensor], list[Tensor]], plain: tuple[list[Tensor], list[Tensor]]) -> float:
    """The largest relative difference of what two towers compute, at all layers; NaN if anything is not finite."""
    wanted = plain[0] + plain[1] if got[1] else plain[0]
    pairs = [(a.float(), b.to(a).float()) for a, b in zip(got[0] + got[1], wanted, strict=True)]
    # A maximum of torch's, because Python's drops NaN.
    return float(torch.stack([(a - b).norm() / b.norm().clamp_min(1e-12) for a, b in pairs]).max())


def _drift_warnings(towers: Sequence[TowerReport]) -> list[str]:
    notes = []
    for tower in towers:
        if tower.drift is None:
            notes.append(
                f"the old tower at {tower.path} did not compute finite numbers, so there is no drift from it."
            )
        elif tower.drift < STRANGE_DRIFT:
            notes.append(
                f"THE NEW TOWER IS A STRANGER at {tower.path}: its clean patch tokens have a mean cosine of "
                f"{tower.drift:.2f} with the old ones (hardened towers stay over {STRANGE_DRIFT}), so the language model "
                "will not understand it. Was it trained from the VLM's own tower? Measure the clean answers."
            )
    return notes


def _origin_notes(plan: Plan, told: TowerReport) -> list[str]:
    """Whether the VLM had trained its tower further, as far as that can be known."""
    if told.off_original is None and plan.tower.family == "SigLIP" and told.changed:
        return [
            f"the old tower at {told.path} was not compared with the SigLIP that the source was trained from, which only "
            "an adapter names. A VLM that trains its tower, as PaliGemma does, equals no published SigLIP: what it "
            "learned there is lost by a swap. Swap the original in first, whose `changed` is 0 where the tower equals it; "
            "otherwise harden the VLM in place (hf-robust-vision harden-vlm)."
        ]
    if not told.off_original or not told.changed:
        return []
    return [
        f"{told.off_original:,} of {told.parameters:,} weights of the old tower at {told.path} differ from those of the "
        "model that the adapter was trained on: the VLM has trained its tower further, or another was swapped in before. "
        "What it learned there is lost; to keep it, harden the VLM in place (hf-robust-vision harden-vlm)."
    ]


def _cosine(old: Tensor, new: Tensor) -> float:
    if old.shape[1] != new.shape[1]:  # another grid over the same images: compare at the same places
        side, wanted = square_side(new.shape[1]), square_side(old.shape[1])
        grid = new.transpose(1, 2).reshape(len(new), -1, side, side)
        grid = F.interpolate(grid, (wanted, wanted), mode="bilinear", align_corners=False)
        new = grid.flatten(2).transpose(1, 2)
    return float(F.cosine_similarity(old, new, dim=-1).mean())


def _pixel_values(size: int) -> Tensor:
    """Two smooth random images, the same at any size, normalised as CLIP does; shape (2, 3, size, size)."""
    coarse = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
    return PixelTransform(size, None, OPENAI_MEAN, OPENAI_STD).normalize(images)


def _sync(config: Any, plans: Sequence[Plan], processor: Any, journal: Journal) -> None:
    """Tell the VLM's config, and at another image size its processor, what the towers are now."""
    new = plans[0].new
    vision_config = getattr(config, "vision_config", None)
    # Another object where the tower was replaced.
    if getattr(vision_config, "model_type", "") in ("clip_vision_model", "siglip_vision_model"):
        tell_config(vision_config, new, journal)
    if "image_size" not in plans[0].switched:
        return
    if hasattr(config, "image_seq_length"):
        journal.set(config, "image_seq_length", new.num_patches)
    square = {"height": new.image_size, "width": new.image_size}
    for name in ("image_processor", "video_processor"):
        part = getattr(processor, name, None)
        if part is None:
            continue
        shortest = "shortest_edge" in dict(part.size)
        journal.set(part, "size", {"shortest_edge": new.image_size} if shortest else square)
        if getattr(part, "crop_size", None) is not None:
            journal.set(part, "crop_size", dict(square))


def _checks(compared: bool, verify: bool) -> list[str]:
    checks = ["layout", "sizes", "activation", "heads", "layer-norm epsilon", "finite after the cast", "weights equal"]
    return checks + ["image mean and std equal"] * compared + ["tokens equal the source's at every layer"] * verify


def _warnings(config: Any, source: Source, plans: Sequence[Plan], compared: bool) -> list[str]:
    new = plans[0].new
    notes = []
    if source.geometry is None:
        notes.append(
            "a bare state dict does not tell its settings; it runs with "
            f"hidden_act={new.hidden_act!r}, num_attention_heads={new.num_attention_heads}, "
            f"layer_norm_eps={new.layer_norm_eps}, taken from the arguments or from the old tower."
        )
    elif source.geometry.hidden_act != new.hidden_act:
        notes.append(f"the source says hidden_act={source.geometry.hidden_act!r}; {new.hidden_act!r} was asked for.")
    notes += [f"{name} of the tower was switched to {getattr(new, name)!r}." for name in plans[0].switched]
    if source.num_patches != new.num_patches:
        notes.append(f"positions were interpolated from {source.num_patches} to {new.num_patches} patches.")
    if PROJECTION not in source.state and any({PROJECTION, "proj"} & set(plan.tower.weights()) for plan in plans):
        notes.append("the source has no projection: the old one was kept, and does not belong to the new tower.")
    if not compared:
        notes.append("image mean and std were not compared: source or processor= does not tell them.")
    if getattr(config, "mm_vision_tower", None):
        notes.append(
            f"loading this LLaVA again fetches {config.mm_vision_tower!r} anew: save the tower on its own and point "
            "config.mm_vision_tower to that folder."
        )
    return notes
