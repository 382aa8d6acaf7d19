"""What a VLM says about images under attack, written down: what `hf-robust-vision evaluate-vlm` calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from hf_robust_vision.data.demo import DEMO_NAME, shipped
from hf_robust_vision.data.demo_questions import load_questions
from hf_robust_vision.data.questions import need_decodable, read_captioned, read_questions
from hf_robust_vision.data.splits import seeded_places
from hf_robust_vision.evaluation.engine import evaluate
from hf_robust_vision.evaluation.results import RobustnessResult, add_results
from hf_robust_vision.evaluation.tasks import VQA, Captions, VLMProtocol
from hf_robust_vision.evaluation.tasks.vlm import VLMTask
from hf_robust_vision.processes import barrier, meet, rank_and_world
from hf_robust_vision.towers.load import load_named
from hf_robust_vision.towers.stock import need_hook
from hf_robust_vision.towers.vlm import is_vlm

from .estimate import say_cost
from .harden_vlm import check_rest
from .measure import check_output


@dataclass(frozen=True)
class Asked:
    """What a VLM is asked about which images: the demo's questions of colour and shape where no file is named.

    Raises:
        ValueError: If both files are named.
    """

    questions: str | None = None  # file of `read_questions`
    captions: str | None = None  # file of `read_captioned`
    prompt: str | None = None  # with "{}" for the question; by default the question alone, or a wish for a caption
    max_samples: int | None = None  # seeded subset; all by default, of the demo 300
    skip_corrupt: bool = False  # count and leave out images that can not be decoded

    def __post_init__(self) -> None:
        if self.questions and self.captions:
            raise ValueError("--questions and --captions are two measurements; name one file.")
        if self.prompt is not None and not self.captions and "{}" not in self.prompt:
            raise ValueError(f'--prompt {self.prompt!r} has no place for the question; write "{{}}" there.')

    def load(self) -> Sequence[Any]:
        """The samples."""
        if self.questions is None and self.captions is None:
            return load_questions("test", yes_no=False, limit=self.max_samples or 300)
        samples: Sequence[Any] = (
            read_questions(self.questions) if self.questions else read_captioned(str(self.captions))
        )
        if self.max_samples is not None and self.max_samples < len(samples):
            samples = [samples[place] for place in seeded_places(len(samples), self.max_samples, seed=0)]
        return need_decodable(samples, skip=self.skip_corrupt)

    def task(self, vlm: Any, processor: Any, samples: Sequence[Any]) -> VLMTask:
        """The measurement of a model."""
        file = self.questions or self.captions
        kind, prompt = (Captions, "Describe the image in one sentence.") if self.captions else (VQA, "{}")
        about = (Path(file).stem, "all") if file else (DEMO_NAME, "test", "colour/shape")
        try:
            return kind(vlm, processor, samples, self.prompt or prompt, *about)
        except TypeError as error:  # of a processor that is none
            raise ValueError(str(error)) from error


def measure_vlm(
    model: str,
    asked: Asked,
    how: VLMProtocol,
    output_dir: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    examples: int = 0,
    progress: bool = True,
) -> list[RobustnessResult]:
    """Ask a VLM under attack and add the results to `output_dir/robustness.json`, one result per eps.

    Under a launcher the samples are shared out, as by `measure_model`. Killed and called again, it goes on from what is
    written down.

    Args:
        model: Folder or Hub id of a VLM, "demo-llava" or "demo-smolvlm".
        asked: Questions, or images to caption.
        how: The attack, through the whole VLM.
        output_dir: Where results and records go.
        name: What results call the model; by default its id, or the name of its folder.
        revision: Branch, tag or commit of the model.
        device: By default a GPU where there is one.
        dtype: Of the model under attack.
        examples: Samples whose images are kept for the report, evenly spread.
        progress: Show a bar.

    Raises:
        ValueError: If the model is no VLM or can not be attacked, was hardened and then changed, or a file or the results in
            `output_dir` can not be read.
    """
    device = meet(device)
    check_output(output_dir)
    samples = asked.load()
    if not samples:
        raise ValueError("there is nothing to ask: no image can be read.")
    vlm = load_named(shipped(model), revision=revision, dtype=dtype)
    if not is_vlm(vlm):
        if not hasattr(vlm, "get_text_features"):  # as a CLIP has
            need_hook(vlm, f"{model} ({type(vlm).__name__})", "get_decoder")
        raise ValueError(f"{model} is a {type(vlm).__name__}, no vision-language model; type evaluate for a CLIP.")
    check_rest(shipped(model))
    vlm.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    task = asked.task(vlm, AutoProcessor.from_pretrained(shipped(model), revision=revision), samples)
    say_cost(task, how.robustness(), "--max_samples N, or fewer --steps")
    count = min(examples, len(samples))
    results = evaluate(
        task,
        how.robustness(),
        model_name=name or (Path(model).resolve().name if Path(model).is_dir() else model),
        samples_dir=output_dir,
        save_images={task.ids[place * len(samples) // count] for place in range(count)},
        progress=progress,
    )
    if rank_and_world()[0] == 0:
        add_results(results, output_dir)
    barrier()
    return results
