"""What the app shows of an attack: answers, pictures, the curve, and the call that repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from PIL import Image
from torch import Tensor

from hf_robust_vision.pipeline.one_image import ImageAttack
from hf_robust_vision.report.curve import COLOURS, Curve, draw_curves
from hf_robust_vision.report.escape import python
from hf_robust_vision.report.tables import Point, percent
from hf_robust_vision.report.templates import template


class Confidence(Point):
    """A point of the curve; of one image there is no interval."""

    def __str__(self) -> str:
        return percent(self.value)


def style() -> str:
    """The page's own style, with the colours of the curve in light and dark."""
    dark = "; ".join(f"--m{place}: {pair[1]}" for place, pair in enumerate(COLOURS))
    return template("curve.css").render(colours=COLOURS) + _STYLE + f".dark {{ {dark}; {_DARK} }}\n"


def progress(share: float, words: str) -> str:
    """A bar, and beside it the words that it means."""
    return (
        f'<div class="state" role="status"><progress value="{share:.3f}" max="1" aria-label="progress of the attack">'
        f"</progress><span>{escape(words)}</span></div>"
    )


def state(words: str) -> str:
    """One line about what happened."""
    return f'<div class="state" role="status"><span>{escape(words)}</span></div>'


def answers(attack: ImageAttack, eps: str) -> str:
    """What a model says before and after."""
    clean, last = attack.looks[0], attack.looks[-1]
    first = next((look for look in attack.looks if look.fell), None)
    verdict = "stands" if first is None else f"fell at {radius(first.eps)}"
    rows = [("clean", clean.answer, clean.confidence), (eps, last.answer, last.confidence)]
    cells = "".join(
        f"<tr><th>{name}</th><td><b>{escape(said)}</b></td><td>{percent(share)}</td></tr>"
        for name, said, share in rows
    )
    note = ""
    if attack.answer_of_file != last.answer:
        note = f"<p>On the PNG, whose pixels are rounded, it says <b>{escape(attack.answer_of_file)}</b>.</p>"
    return (
        f'<div class="answers {"fell" if last.fell else "stands"}"><p class="verdict">{verdict}</p><table>'
        f"<thead><tr><td></td><th>answer</th><th>confidence in the first answer</th></tr></thead><tbody>{cells}</tbody></table>{note}</div>"
    )


def radius(eps: float) -> str:
    """As people write it."""
    return f"{255 * eps:.4g}/255"


def curve(attacks: Sequence[tuple[str, ImageAttack]]) -> str:
    """The confidence of each model in its clean answer, over eps."""
    curves = [
        Curve(
            label,
            place,
            [Confidence(255 * look.eps, look.confidence, look.confidence, look.confidence) for look in attack.looks],
        )
        for place, (label, attack) in enumerate(attacks)
    ]
    axes = ("radius in 255ths of the pixel range, Linf", "confidence in the first answer, %")
    return draw_curves(
        curves, axes, title="Confidence of each model in its answer on the clean image, over the radius"
    )


def picture(image: Tensor) -> Image.Image:
    """An image in [0, 1] as one of 256 steps."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def enlarged(attack: ImageAttack) -> tuple[Image.Image, str]:
    """The perturbation on grey, its largest change black or white, and by how much it is enlarged."""
    change = attack.adversarial - attack.clean
    size = change.abs().max().item()
    gain = 0.5 / size if size else 0.0
    return picture(change * gain + 0.5), f"perturbation, {gain:.0f} times" if size else "no perturbation"


def call(models: Sequence[str], text: str | Sequence[str], eps: float, steps: int) -> str:
    """Python that attacks the same image in the same way."""
    said = python(text) if isinstance(text, str) else f"[{', '.join(map(python, text))}]"
    return (
        "from hf_robust_vision.pipeline.one_image import attack_image\n\n"
        f"text = {said}\n"
        f"for model in ({', '.join(map(python, models))}):\n"
        f'    found = attack_image(model, "image.png", text, eps={255 * eps:g} / 255, steps={steps}, seed=0)\n'
        "    for look in found.looks:\n"
        '        print(model, f"{255 * look.eps:g}/255", look.answer, f"{look.confidence:.3f}")\n'
    )


_DARK = "--ink: #e9e7e2; --soft: #a2a5ac; --line: #33363d; --stands: #58cfa5; --fell: #ff9d66"
_STYLE = """
:root { --stands: #13795b; --fell: #b3410c; }
.state { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; min-height: 2rem; }
.state progress { flex: 1 1 12rem; height: .8rem; accent-color: #1d5fd1; }
.answers table { width: 100%; border-collapse: collapse; }
.answers th, .answers td { text-align: left; padding: .25rem .5rem; }
.answers td b { overflow-wrap: anywhere; }
.answers .verdict { font-weight: 700; margin: 0 0 .3rem; }
.answers.stands .verdict { color: var(--stands); }
.answers.fell .verdict { color: var(--fell); }
.pixels img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain; }
svg.curve { width: 100%; height: auto; max-width: 46rem; }
"""
