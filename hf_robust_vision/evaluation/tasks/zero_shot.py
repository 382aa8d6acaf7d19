"""Zero-shot classification under attack: the one implementation of robust accuracy.

The trainer's `evaluate()`, the recipes and the command line all call `evaluate_zero_shot`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from hf_robust_vision.attacks import Attack, Logits, Misclassified, Objective, Success
from hf_robust_vision.attacks.protocol import classification_objective
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.fingerprint import fingerprint
from hf_robust_vision.evaluation.engine import RunSettings, evaluate
from hf_robust_vision.evaluation.images import Remeasured, measure_again
from hf_robust_vision.evaluation.results import RobustnessResult, SampleRecord, load_samples
from hf_robust_vision.evaluation.task import Batch, Level, RobustnessProtocol, Stage, Task, Verdict, not_under
from hf_robust_vision.towers.base import tensor_sha256
from hf_robust_vision.towers.load import Encoder, image_embedder
from hf_robust_vision.towers.text_bank import TextBank


PROBE_TARGETS = 3  # strongest wrong classes that the sanity checks' other loss aims at


@dataclass
class ZeroShot(Task):
    """Is the image still taken for its class?

    The dtype of the encoder is the precision of the attack. Images of another size than the tower's are attacked at
    their own size and fitted inside the attacked function.

    Raises:
        ValueError: If the class names of the dataset and of the bank differ.
    """

    model: Encoder
    bank: TextBank
    images: LabelledImages
    group: str = "all"
    kind = task = "zero_shot"
    loss = "cross-entropy"
    stronger = "take 'robustvlm' or 'autoattack'"

    def __post_init__(self) -> None:
        self.bank.need_classes(self.images.class_names)
        self.ids, self.labels = self.images.ids, self.images.labels()
        self.dataset, self.split = self.images.name, self.images.split
        self.dataset_id = self.images.hub_id
        embed, fit = image_embedder(self.model), self.model.transform.fit
        # One for objective and success: it remembers its latest answer, so they share the pass.
        self.logits = Logits(self.bank.classify(lambda images: embed(fit(images))))

    @override
    def load(self, place: int) -> Tensor:
        image: Tensor = self.images[place]["images"]
        return image

    @override
    def label(self, place: int) -> int:
        return self.labels[place]

    def judge(self, batch: Batch, images: Tensor) -> list[Verdict]:
        """The class of the highest logit; the harm is how far it lies above the true one's."""
        logits, truth = self.logits(images), self._truth(batch)
        if not bool(logits.isfinite().all()):
            names = [self.ids[place] for place in batch.places]
            raise ValueError(
                f"the model gives logits that are not finite for some of the samples {names[:5]}...: no accuracy can "
                "come of them. Load it in float32, or check its weights."
            )
        others = logits.scatter(1, truth[:, None], -torch.inf)
        margins = (others.amax(1) - logits.gather(1, truth[:, None]).squeeze(1)).tolist()
        # The strongest wrong classes, from the strongest down: what targeted attacks aim at.
        wrong = others.argsort(dim=1, descending=True)
        rows = zip(logits.argmax(1).tolist(), truth.tolist(), margins, wrong)
        return [
            Verdict(answer, answer != label, margin, round(margin, 6), order) for answer, label, margin, order in rows
        ]

    def aim(self, stage: Stage, batch: Batch) -> tuple[Objective, Success]:
        """Away from the true class, or towards a wrong one."""
        truth = self._truth(batch)
        targets = None
        if stage.attack.targets:
            targets = torch.stack([clean.notes[stage.target] for clean in batch.clean])
        objective = classification_objective(stage.attack, self.logits, truth, targets)
        return objective, Misclassified(self.logits, truth)

    @override
    def fit(self, how: RobustnessProtocol) -> tuple[RobustnessProtocol, list[str]]:
        protocol, left_out = how.protocol.for_classes(len(self.bank.class_names))
        return replace(how, protocol=protocol), left_out

    @override
    def identity(self) -> dict[str, Any]:
        return {
            "labels": self.labels,
            "rows": fingerprint(self.images.rows),
            "text": [self.bank.template_hash, self.bank.logit_scale, tensor_sha256(self.bank.embeddings)],
            "pixels": [asdict(self.model.transform), asdict(self.images.transform)],
        }

    @property
    def resolution(self) -> int:
        """The size that the dataset gives its images."""
        fitted = self.images.transform.crop or self.images.transform.resize
        return fitted if isinstance(fitted, int) else max(fitted)

    @override
    def fields(self, level: Level) -> dict[str, Any]:
        return {
            "class_names": list(self.bank.class_names),
            "templates": list(self.bank.templates),
            "template_hash": self.bank.template_hash,
            "logit_scale": self.bank.logit_scale,
        }

    @classmethod
    def complaint(cls, record: SampleRecord, result: RobustnessResult) -> str:
        """An answer that is no class, or that `fooled_by` contradicts."""
        wrong = not_under(len(result.class_names), record)
        if not wrong and (record.clean == record.label) != record.clean_hit:
            lost = f"{'not ' if record.clean_hit else ''}lost before the attack"
            return f"sample {record.id!r} of class {record.label} was taken for {record.clean}, and {lost}."
        return wrong

    @override
    def scores(self, batch: Batch, images: Tensor) -> Tensor:
        return self.logits(images)

    def luck(self, places: Sequence[int]) -> tuple[float, str]:
        """What answering the commonest class gets right."""
        # Where all images look alike one answer is left, and the commonest class is right by it.
        commonest = max(Counter(self.labels[place] for place in places).values()) / len(places)
        return max(commonest, 1 / len(self.bank.class_names)), "the share of the commonest class"

    def other_loss(self, steps: int) -> tuple[Attack, str]:
        """The margin to single classes, which no scale of the logits changes."""
        targets = min(PROBE_TARGETS, len(self.bank.class_names) - 1)
        return (
            Attack("another loss", objective="targeted-margin", targets=targets, steps=steps),
            f"APGD on the margin to each of the {targets} strongest wrong classes, which no scale of the logits changes, "
            "must find next to nothing that the protocol missed. Where it does, the protocol follows the wrong loss for "
            "this model: take 'robustvlm' or 'autoattack'.",
        )

    def _truth(self, batch: Batch) -> Tensor:
        return torch.tensor([self.labels[place] for place in batch.places], device=batch.images.device)


def evaluate_zero_shot(
    encoder: Encoder,
    bank: TextBank,
    dataset: LabelledImages,
    how: RobustnessProtocol,
    *,
    device: torch.device | str | None = None,
    **settings: Unpack[RunSettings],
) -> list[RobustnessResult]:
    """Measure clean and robust accuracy, one result per eps; the encoder is moved to `device`, if one is given."""
    if device is not None:
        encoder.to(torch.device(device))
    return evaluate(ZeroShot(encoder, bank, dataset), how, **settings)


def remeasure(
    encoder: Encoder, bank: TextBank, result: RobustnessResult, folder: str | Path, *, batch_size: int = 64
) -> Remeasured:
    """Classify the saved images of a zero-shot result again; see `measure_again`.

    `encoder` is the model that was measured, in the dtype that it was measured in; `bank` is its classifier, made by
    `make_text_bank` of the class names and templates of the result, whose `robustness.json` lies in `folder`.

    Raises:
        ValueError: As `measure_again`, or if the classifier is another.
    """
    if bank.template_hash != result.template_hash:
        raise ValueError("the bank has other class names or templates than the result; build it from the result's.")
    records = load_samples(Path(folder) / str(result.samples)) if result.samples else []
    # The images come from the files: of the dataset only labels and names are asked.
    rows = [{"image": None, "label": record.label} for record in records] or [{"image": None, "label": 0}]
    transform, names = encoder.transform, bank.class_names
    known = LabelledImages(rows, names, transform, name=result.dataset, split=result.split)
    task = ZeroShot(encoder, bank, known)
    task.ids = [record.id for record in records]
    return measure_again(task, result, folder, batch_size=batch_size)
