"""The sanity checks of a measurement, whatever its task: which samples, which surrogate, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypedDict

from typing_extensions import Unpack

from hf_robust_vision.data.captions import CaptionedImages
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.evaluation.task import RobustnessProtocol, Task, need_usable
from hf_robust_vision.evaluation.tasks import Retrieval, RetrievalProtocol, ZeroShot
from hf_robust_vision.towers.base import attack_mode
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.load import Encoder
from hf_robust_vision.towers.text_bank import TextBank

from .bench import Bench, pick, right_on_grey
from .checks import not_run, run_checks


class SanitySettings(TypedDict, total=False):
    """How much the checks look at."""

    # The first in a seeded order that the model gets right. Of fewer than 20 a single one is more than `TOLERANCE`.
    samples: int
    queries: int  # looks at the model of the black-box attack per image


class SurrogateSettings(SanitySettings, total=False):
    """As `SanitySettings`, and another model for images of the same size to carry images over from."""

    surrogate: Encoder | None


class RetrievalSanitySettings(SurrogateSettings, total=False):
    """As `SurrogateSettings`, and what is searched."""

    k: int | None  # one of the protocol's, by default the smallest


def check_task(
    task: Task, how: RobustnessProtocol, *, surrogate: Task | None = None, samples: int = 100, queries: int = 1000
) -> dict[str, Any]:
    """Look for signs that a measurement flatters its model, and give what `RobustnessResult.sanity` holds.

    Attacks run at the largest radius of `how` unless a check says otherwise; those that ask for no gradient are left to
    the black-box check. The dearest checks attack with the steps of `how` at each of its radii and at every doubling up
    to half the pixel range, and at the largest one with up to twice the steps, all in the process that calls.

    Where no image has to make a model say a chosen text (`ChosenText`), robust accuracy has no level that it must fall to
    at a large radius, and that check is not run. A target that the model can not be made to say at all fails "stronger
    than noise": nothing tells an attack that does not work from a model that resists.

    A defence is part of the task's model. The surrogate is the same task of another model for images of the same size,
    from which attacks are carried over: the undefended one is a good one. Without it that check is not run.

    Raises:
        ValueError: If the protocol has no gradient attack or no radius above 0, the model is right about no sample, or
            the surrogate sees images of another size.
    """
    need_usable(task.model)
    how, _ = task.fit(how)
    white = [attack for attack in how.protocol.attacks if attack.algorithm != "square"]
    if not white or max(how.eps) == 0:
        raise ValueError(
            f"nothing to check: protocol {how.protocol.name!r} at eps {list(how.eps)} follows no gradient. Choose one "
            "with a gradient attack, such as 'apgd-ce', and an eps above 0."
        )
    if surrogate is not None and task.ids and (ours := task.load(0).shape) != (theirs := surrogate.load(0).shape):
        raise ValueError(
            f"the surrogate sees images of {theirs[1]} x {theirs[2]} pixels, the model of {ours[1]} x {ours[2]}: images "
            "can only be carried over between models for images of the same size."
        )
    with attack_mode(task.model), attack_mode(surrogate.model) if surrogate is not None else nullcontext():
        trials = pick(task, how, samples)
        share, what = task.luck([place for trial in trials for place in trial.batch.places])
        bench = Bench(
            trials,
            how.norm,
            how.eps,
            steps=max(attack.steps for attack in white),
            chance=None if share is None else max(share, right_on_grey(trials)),
            chance_is=what,
            stronger=task.stronger,
        )
        about = {"metric": task.metrics[0], "protocol": how.protocol.name, "seed": how.seed}
        return run_checks(bench, task, queries, surrogate) | about


def add_sanity(
    results: Sequence[RobustnessResult],
    tasks: Mapping[str, Task],
    how: RobustnessProtocol,
    **settings: Unpack[SanitySettings],
) -> None:
    """Fill `sanity` of results, each model checked with another one, if there is one, as its surrogate.

    `tasks` is what was measured, by the `model` of the results; others serve as surrogates only. Where nothing can be
    checked the results say why, and stand.
    """
    for name in dict.fromkeys(result.model for result in results):
        surrogate = next((task for key, task in tasks.items() if key != name), None)
        try:
            sanity = check_task(tasks[name], how, surrogate=surrogate, **settings)
        except ValueError as error:
            sanity = not_run(error)
        for result in results:
            if result.model == name:
                result.sanity = sanity


def add_retrieval_sanity(
    results: Sequence[RobustnessResult],
    encoder: DualEncoder,
    tokenizer: Any,
    dataset: CaptionedImages,
    how: RetrievalProtocol,
    **settings: Unpack[SanitySettings],
) -> None:
    """Fill `sanity` of one model's results of `evaluate_retrieval`, each direction and k with checks of its own."""
    for metric in dict.fromkeys(result.metric for result in results):
        direction, _, k = metric.partition("_recall@")
        task = Retrieval(encoder, tokenizer, dataset, direction, (int(k),), how.batch_size)
        own = [result for result in results if result.metric == metric]
        for name in dict.fromkeys(result.model for result in own):
            add_sanity(own, {name: task}, replace(how, ks=task.ks).robustness(direction), **settings)


def check_sanity(
    encoder: Encoder,
    bank: TextBank,
    dataset: LabelledImages,
    how: RobustnessProtocol,
    *,
    surrogate_bank: TextBank | None = None,
    **settings: Unpack[SurrogateSettings],
) -> dict[str, Any]:
    """`check_task` of a zero-shot classification; a defence overrides the encoder's `encode_images`.

    The surrogate is another model for images of the same size, by default with the same classifier.
    """
    rest: Any = dict(settings)
    surrogate = rest.pop("surrogate", None)
    other = ZeroShot(surrogate, surrogate_bank or bank, dataset) if surrogate is not None else None
    return check_task(ZeroShot(encoder, bank, dataset), how, surrogate=other, **rest)


def check_retrieval_sanity(
    encoder: DualEncoder,
    tokenizer: Any,
    dataset: CaptionedImages,
    how: RetrievalProtocol,
    *,
    direction: str = "image_to_text",
    **settings: Unpack[RetrievalSanitySettings],
) -> dict[str, Any]:
    """`check_task` of a retrieval, in one direction at one k; a defence overrides the encoder's `encode_images`.

    Raises:
        ValueError: As `check_task`; or if there is no such direction or k.
    """
    rest: Any = dict(settings)
    k, surrogate = rest.pop("k", None), rest.pop("surrogate", None)
    if k is not None and k not in how.ks:
        raise ValueError(f"recall at {k} was not measured, only at {list(how.ks)}.")
    how = replace(how, ks=(min(how.ks) if k is None else k,))
    task = Retrieval(encoder, tokenizer, dataset, direction, how.ks, how.batch_size)
    other = replace(task, model=surrogate) if surrogate is not None else None
    return check_task(task, how.robustness(direction), surrogate=other, **rest)


def sanity_text(results: Sequence[RobustnessResult]) -> str:
    """A line for each model, dataset, group and metric whose results were checked."""
    found = {}
    for result in results:
        if result.sanity is not None:
            metric = "" if result.metric == "accuracy" else f", {result.metric.replace('_', ' ')}"
            group = "" if result.group == "all" else f", {result.group}"
            found[f"{result.model} on {result.dataset}{group}{metric}"] = result.sanity
    return "\n".join(
        f"sanity checks, {what}: {sanity.get('why') or ', '.join(sanity['flagged']) or 'all passed'}"
        for what, sanity in found.items()
    )
