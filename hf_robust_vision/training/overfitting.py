"""Noticing catastrophic overfitting: a fast attack that the learner has learnt to blind, while a stronger one goes on."""

from __future__ import annotations

import warnings


# Of a stronger attack's gain, what a healthy training attack reaches at least.
WEAK_SHARE = 0.25
PROBE_STEPS = 10
PROBE_IMAGES = 32  # of each process


class CatastrophicOverfittingError(RuntimeError):
    """The training attack no longer finds what a stronger one finds."""


def check_overfitting(own: float, probe: float, on_overfitting: str, step: int, hint: str) -> None:
    """Stop a run whose attack gains less than `WEAK_SHARE` of what a stronger one does, or, at "record", only warn.

    Args:
        own: How much the training attack raises its objective above that of the clean images, a mean over images.
        probe: The same of a stronger attack on the same images in the same ball.
        on_overfitting: "stop" or "record".
        step: Of the run, for the message.
        hint: What to type.

    Reference:
        Wong et al. 2020, https://huggingface.co/papers/2001.03994; Andriushchenko and Flammarion 2020,
        https://huggingface.co/papers/2007.02617.
    """
    if own >= WEAK_SHARE * probe:
        return
    message = (
        f"catastrophic overfitting at step {step}: the training attack raises its loss by {own:.4g}, one of "
        f"{PROBE_STEPS} steps on the same images by {probe:.4g}. The model has learnt to blind this attack, not to be "
        f"robust; {hint}"
    )
    if on_overfitting == "stop":
        raise CatastrophicOverfittingError(message)
    warnings.warn(message, stacklevel=2)
