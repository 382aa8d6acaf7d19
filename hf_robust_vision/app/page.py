"""The page of the app: what a visitor chooses, sees and presses."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from hf_robust_vision.data.decode import decode_image
from hf_robust_vision.data.demo import CLASS_NAMES, demo_rows
from hf_robust_vision.evaluation.single import Watch
from hf_robust_vision.pipeline.one_image import ImageAttack, Opened, attack_image, open_model
from hf_robust_vision.terminal import mendable, one_line

from . import show
from .limits import EPS, LIMITS, STEPS, Limits, check_number, check_picture, check_text, class_names
from .work import Progress, StoppedError, attacking


@dataclass(frozen=True)
class Pair:
    """A model and its hardened twin: folders, Hub ids, or names of the demo."""

    original: str
    hardened: str

    def __str__(self) -> str:
        twin = "its twin" if self.hardened.startswith(self.original) else self.hardened
        return f"{self.original} and {twin}"


DEMO = (Pair("demo-llava", "demo-llava-hardened"), Pair("demo-clip", "demo-clip-hardened"))
QUESTION, CLASSES = "what color is the shape?", ", ".join(CLASS_NAMES)
OWN = "models of your own: name them below"
SIDES = ("original", "hardened")
EXAMPLES = 8


@dataclass(frozen=True)
class Asked:
    """What a visitor wants to see."""

    pair: Pair
    picture: Path
    text: str
    eps: float
    steps: int


def make_page(pairs: Sequence[Pair] = DEMO, *, own: bool = True, limits: Limits = LIMITS) -> gr.Blocks:
    """The app, ready to be launched.

    Args:
        pairs: To choose from.
        own: Whether visitors may also name folders and Hub ids of this machine: only where they are its own people.
        limits: Of what they hand in.
    """
    page = _Page(pairs, own, limits)
    page.build()
    return page.blocks


class _Page:
    """Components and what they do; of visitors it keeps nothing."""

    def __init__(self, pairs: Sequence[Pair], own: bool, limits: Limits):
        self.pairs = {str(pair): pair for pair in pairs}
        self.own, self.limits = own, limits
        self.open = functools.lru_cache(maxsize=2 * len(pairs) + 2)(open_model)

    def build(self) -> None:
        """Lay the page out."""
        with gr.Blocks(
            title="hf-robust-vision", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
        ) as self.blocks:
            gr.Markdown(
                "# A picture under attack\nA faint change of the pixels, made for each model alone, against a model and "
                "its hardened twin. What you upload stays on the machine that runs this page."
            )
            with gr.Row():
                with gr.Column(scale=2, min_width=280):
                    self._inputs()
                with gr.Column(scale=3, min_width=280):
                    self._outputs()
            self._events()

    def _inputs(self) -> None:
        names = [*self.pairs, *([OWN] if self.own else [])]
        self.pair = gr.Dropdown(names, value=names[0], label="Models", elem_id="pair")
        hidden = {"visible": names[0] == OWN, "max_lines": 1}
        self.named = [
            gr.Textbox(label="Model: folder or Hub id", elem_id="original", **hidden),
            gr.Textbox(label="Its hardened twin: folder or Hub id", elem_id="hardened", **hidden),
        ]
        self.picture: Any = gr.Image(
            label="Image", sources=["upload", "clipboard"], height=240, buttons=[], image_mode=None, type="filepath",
            format="png", elem_id="image", elem_classes="pixels", alt_text="the image to attack",
        )  # fmt: skip
        # On the object: of a subclass gradio would write a `.pyi` file beside this one.
        self.picture.preprocess = _path
        self.picture.async_move_resource_to_block_cache = _uploaded(self.picture)
        self.examples = _examples()
        shown = {"label": "Examples: shapes of the demo", "samples_per_page": EXAMPLES, "visible": bool(self.examples)}
        self.choice = gr.Dataset(
            components=[self.picture],
            samples=[[file] for file in self.examples],
            type="index",
            elem_id="examples",
            **shown,
        )
        self.text = gr.Textbox(
            QUESTION,
            label="Question, or for a CLIP class names parted by commas",
            lines=2,
            max_lines=6,
            elem_id="text",
        )
        self.eps = gr.Slider(*EPS, value=8, step=1, label="eps: radius in 255ths of the pixel range", elem_id="eps")
        self.steps = gr.Slider(*STEPS, value=20, step=5, label="steps of each attack", elem_id="steps")
        with gr.Row():
            self.attack = gr.Button("Attack", variant="primary", elem_id="attack", min_width=120)
            self.cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel", min_width=120)

    def _outputs(self) -> None:
        # Apart: news of the progress may come in after a cancellation, and must not write over what it says.
        with gr.Column(elem_id="state"):
            self.progress = gr.HTML(visible=False)
            self.state = gr.HTML(show.state("Choose an image, then press Attack."))
        self.answers: list[gr.HTML] = []
        self.attacked: list[gr.Image] = []
        self.changes: list[gr.Image] = []
        with gr.Column(visible=False) as self.results:
            self._results()

    def _results(self) -> None:
        with gr.Row():
            for side in SIDES:
                with gr.Column(min_width=240, elem_id=f"of-{side}"):
                    gr.Markdown(f"## {side.capitalize()}")
                    self.answers.append(gr.HTML(elem_id=f"answers-{side}"))
                    shown = {"format": "png", "height": 220, "interactive": False, "elem_classes": "pixels"}
                    alt = f"the image as attacked against the {side} model"
                    label = f"attacked against the {side} model"
                    self.attacked.append(gr.Image(label=label, buttons=["download"], alt_text=alt, **shown))
                    alt = f"the change of its pixels against the {side} model, enlarged"
                    self.changes.append(gr.Image(label="perturbation", buttons=[], alt_text=alt, **shown))
        self.curve = gr.HTML(elem_id="curve")
        self.call = gr.Code(
            language="python", label="The same in Python", interactive=False, wrap_lines=True, elem_id="call"
        )

    def _events(self) -> None:
        inputs = [self.pair, *self.named, self.picture, self.text, self.eps, self.steps]
        said = [self.progress, self.state, self.attack, self.cancel]
        shown = [*self.answers, *self.attacked, *self.changes, self.results, self.curve, self.call]
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        run = self.attack.click(self.waiting, None, said, **quick).then(
            self.run, inputs, [*said, *shown], concurrency_limit=1, concurrency_id="attack",
            show_progress="minimal", show_progress_on=self.state, api_visibility="private",
        )  # fmt: skip
        self.cancel.click(self.cancelled, None, said, cancels=[run], **quick)
        self.choice.click(self.example, self.choice, self.picture, **quick)
        self.pair.change(self.chosen, self.pair, [self.text, *self.named], **quick)

    def waiting(self) -> dict[Any, Any]:
        """Nothing to press but cancel, also while others have their turn."""
        return self._told("Waiting for a free turn.", busy=True)

    def chosen(self, name: str) -> list[Any]:
        """Fit the page to the pair that was chosen."""
        own = gr.update(visible=name == OWN)
        text = gr.update() if name == OWN else gr.update(value=CLASSES if "clip" in name else QUESTION)
        return [text, own, own]

    def example(self, place: int) -> Image.Image:
        """The picture that was chosen."""
        return show.picture(decode_image(self.examples[place]))

    def cancelled(self) -> dict[Any, Any]:
        """Say so, and let the next attack begin."""
        return self._told("Cancelled: the attack has stopped.")

    def run(self, *values: Any) -> Iterator[dict[Any, Any]]:
        """Attack both models, and show each as it is done."""
        found: list[tuple[str, ImageAttack]] = []
        try:
            asked = self.read(*values)
            yield self._begun()
            for place, name in enumerate((asked.pair.original, asked.pair.hardened)):
                for news in attacking(self._job(name, asked), self.limits.seconds):
                    if isinstance(news, Progress):
                        words = f"the {SIDES[place]} model, " + (
                            f"eps {show.radius(news.eps)}" if news.eps else "loading"
                        )
                        yield {self.progress: show.progress((place + news.share) / 2, words)}
                    else:
                        found.append((SIDES[place], news))
                        yield self._side(place, news, asked)
            yield self._done(found, asked)
        except StoppedError:
            return
        except Exception as error:
            if not mendable(error):
                raise
            yield self._told(f"Not done: {one_line(error)}")

    def read(self, name: str, original: str, hardened: str, file: str, text: str, eps: float, steps: float) -> Asked:
        """What was handed in, once it has been checked."""
        if name == OWN and self.own:
            pair = Pair((original or "").strip(), (hardened or "").strip())
            if not (pair.original and pair.hardened):
                raise ValueError("name both models, each by its folder or Hub id.")
            if max(map(len, (pair.original, pair.hardened))) > self.limits.characters:
                raise ValueError("the name of a model is too long.")
        elif name in self.pairs:
            pair = self.pairs[name]
        else:
            raise ValueError("choose one of the models of the list.")
        said = check_text(text, self.limits)
        radius = check_number("eps", eps, *EPS) / 255
        return Asked(pair, check_picture(file, self.limits), said, radius, int(check_number("steps", steps, *STEPS)))

    def _job(self, name: str, asked: Asked) -> Any:
        def job(watch: Watch) -> ImageAttack:
            model = self.open(name)
            text = self._text(model, asked)
            return attack_image(model, asked.picture, text, asked.eps, steps=asked.steps, watch=watch)

        return job

    def _text(self, model: Opened, asked: Asked) -> str | Sequence[str]:
        return asked.text if model.answers else class_names(asked.text, self.limits)

    def _told(self, words: str, *, busy: bool = False) -> dict[Any, Any]:
        """A line in the place of the progress, and the button that can be pressed now."""
        return {
            self.progress: gr.update(visible=False),
            self.state: gr.update(value=show.state(words), visible=True),
            self.attack: gr.update(interactive=not busy),
            self.cancel: gr.update(interactive=busy),
        }

    def _begun(self) -> dict[Any, Any]:
        empty = dict.fromkeys([*self.answers, *self.attacked, *self.changes, self.curve, self.call])
        return {
            **empty,
            self.results: gr.update(visible=True),
            self.state: gr.update(visible=False),
            self.progress: gr.update(value=show.progress(0, "the picture is read"), visible=True),
        }

    def _side(self, place: int, attack: ImageAttack, asked: Asked) -> dict[Any, Any]:
        change, label = show.enlarged(attack)
        return {
            self.answers[place]: show.answers(attack, show.radius(asked.eps)),
            self.attacked[place]: show.picture(attack.adversarial),
            self.changes[place]: gr.update(value=change, label=label),
        }

    def _done(self, found: Sequence[tuple[str, ImageAttack]], asked: Asked) -> dict[Any, Any]:
        spent = ", ".join(f"{side} {attack.seconds:.1f} s" for side, attack in found)
        models = (asked.pair.original, asked.pair.hardened)
        text = self._text(self.open(models[0]), asked)
        return {
            **self._told(f"Done. Time spent: {spent}."),
            self.curve: show.curve(found),
            self.call: show.call(models, text, asked.eps, asked.steps),
        }


def _path(payload: Any) -> str | None:
    """The file of an upload as it is, to be opened where its errors are told."""
    return None if payload is None or not payload.path else str(payload.path)


def _uploaded(component: gr.Image) -> Callable[[Any], Awaitable[str | None]]:
    """What brings a file to the server, without the addresses that it would fetch from elsewhere."""
    move: Any = component.async_move_resource_to_block_cache

    async def only_uploads(source: Any) -> str | None:
        if source is not None and "://" in str(source):
            raise gr.Error("an image is uploaded, not fetched from an address.")
        return await move(source)

    return only_uploads


def _examples() -> list[str]:
    """The first test image of some classes of the demo; none where its data is not installed."""
    try:
        rows = demo_rows("test")
    except ModuleNotFoundError:
        return []
    first: dict[int, str] = {}
    for row in rows:
        first.setdefault(row["label"], row["image"])
    return [first[label] for label in sorted(first)[:: len(first) // EXAMPLES]][:EXAMPLES]
