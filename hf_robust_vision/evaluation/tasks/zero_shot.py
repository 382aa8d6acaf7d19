"""Zero-shot classification under attack: the one implementation of robust accuracy.

The trainer's `evaluate()`, the recipes and the command line all call `evaluate_zero_shot`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_robust_vision import __version__
from hf_robust_vision.attacks import Ball, Protocol, StartNoise, make_ball, run_protocol
from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.evaluation.images import AdversarialImages
from hf_robust_vision.evaluation.results import RobustnessResult, SampleRecord, after_each_attack, summarize, versions
from hf_robust_vision.evaluation.samples import Records, SampleStore, measure_all
from hf_robust_vision.pixels import check_images
from hf_robust_vision.towers.clip import Encoder, attack_mode, image_embedder, tensor_sha256, weights_sha256
from hf_robust_vision.towers.text_bank import TextBank


@dataclass(frozen=True)
class RobustnessProtocol:
    """How robustness is measured.

    Args:
        protocol: The attacks.
        eps: Radii, measured in rising order: a sample that falls at a radius has fallen at every larger one, since
            the smaller ball lies inside; unless the protocol says `carry=False`.
        norm: "linf" or "l2".
        restarts: Restarts at single radii that differ from the protocol's own.
        batch_size: Images attacked at once.
        seed: Of the random starts.
    """

    protocol: Protocol
    eps: tuple[float, ...]
    norm: str = "linf"
    restarts: tuple[tuple[float, int], ...] = ()
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.eps:
            raise ValueError("give at least one eps to measure at.")
        for eps in self.eps:
            make_ball(self.norm, eps)

    def __str__(self) -> str:
        """What it is, for a person: the attacks, and the radii with their own restarts."""
        unit = "/255" if self.norm == "linf" else ""
        own = {eps: f" ({count} restarts)" for eps, count in self.restarts}
        radii = [f"{eps * 255 if unit else eps:g}{unit}{own.get(eps, '')}" for eps in sorted(self.eps)]
        return f"{self.protocol}\n  {self.norm}, eps {', '.join(radii)}"

    def at(self, eps: float) -> tuple[Ball, Protocol]:
        """Ball and attacks of one radius."""
        return make_ball(self.norm, eps), self.protocol.with_budget(restarts=dict(self.restarts).get(eps))


def evaluate_zero_shot(
    encoder: Encoder,
    bank: TextBank,
    dataset: LabelledImages,
    how: RobustnessProtocol,
    *,
    model_name: str,
    device: torch.device | str | None = None,
    samples_dir: str | Path | None = None,
    progress: bool = True,
    model_sha256: str | None = None,
    save_images: Collection[int] = (),
) -> list[RobustnessResult]:
    """Measure clean and robust accuracy, one result per eps.

    The samples are shared out over the processes of `torch.distributed`, and each is measured exactly once. With
    `samples_dir` every batch is written down when it is done; a repeated call goes on from there and ends with the
    same flags. Weights, mode and gradients of the encoder are as they were. Images of another size than the tower's
    are attacked at their own size and fitted inside the attacked function.

    Args:
        encoder: Its dtype is the precision of the attack.
        bank: The zero-shot classifier.
        dataset: Labelled images.
        how: Attacks and radii.
        model_name: "before", "after", or a path, for the results.
        device: Where to run; by default where the encoder is.
        samples_dir: Folder for `samples-*.jsonl`.
        progress: Show a bar on the main process.
        model_sha256: Hash of the weights if it is known already.
        save_images: Ids of samples whose images are kept in `samples_dir`, clean and adversarial, exactly as the model
            saw them (`AdversarialImages`). A sample that was measured without them is measured again.

    Raises:
        ValueError: If the class names of the dataset and of the bank differ, or images have no folder to go to.
    """
    if save_images and samples_dir is None:
        raise ValueError("save_images needs a samples_dir to save them in.")
    bank.need_classes(dataset.class_names)
    start = time.time()
    sha256 = model_sha256 or weights_sha256(encoder)
    dtype = encoder.visual_projection.weight.dtype
    device = torch.device(device) if device is not None else encoder.visual_projection.weight.device
    protocol, left_out = how.protocol.for_classes(len(bank.class_names))
    how = replace(how, protocol=protocol, eps=tuple(sorted(how.eps)))
    identity = asdict(how) | {"weights": sha256, "data": dataset.name, "split": dataset.split, "dtype": str(dtype)}
    identity |= {"text": bank.template_hash, "scale": bank.logit_scale, "embeddings": tensor_sha256(bank.embeddings)}
    identity |= {
        "samples": list(zip(dataset.ids, dataset.labels())),
        "rows": getattr(dataset.rows, "_fingerprint", ""),
    }
    identity |= {"pixels": asdict(encoder.transform), "fit": asdict(dataset.transform), "version": __version__}
    identity |= {"config": {name: encoder.config.to_dict().get(name) for name in ("vision_config", "hidden_act")}}
    del identity["batch_size"]
    store = SampleStore(samples_dir, f"{Path(model_name).name}-{protocol.name}-{how.norm}", how.eps, identity)
    classify = classifier(encoder, bank)
    saved = AdversarialImages(Path(samples_dir or "") / store.images)
    store.forget({sample for sample in save_images if sample not in saved})

    def measure(indices: list[int]) -> Records:
        batch = collate_images([dataset[index] for index in indices])
        images, labels = check_images(batch["images"]).to(device), batch["labels"].to(device)
        ids = batch["ids"].tolist()
        records, found = _measure(classify, images, labels, ids, how)
        for row, sample in enumerate(ids):  # before the record, which says that the sample is done
            if sample in save_images:
                saved.write(sample, images[row], found[row])
        return records

    with attack_mode(encoder):
        label = f"{model_name}: {protocol.name}"
        records = measure_all(store, dataset.ids, measure, batch_size=how.batch_size, label=label, progress=progress)
    fitted = dataset.transform.crop or dataset.transform.resize
    resolution = fitted if isinstance(fitted, int) else max(fitted)
    shared: dict[str, Any] = {
        "task": "zero_shot",
        "model": model_name,
        "model_sha256": sha256,
        "dataset": dataset.name,
        "split": dataset.split,
        "protocol": protocol.name,
        "norm": how.norm,
        "class_names": list(bank.class_names),
        "templates": list(bank.templates),
        "template_hash": bank.template_hash,
        "logit_scale": bank.logit_scale,
        "left_out": left_out,
        "seconds": time.time() - start,
        "versions": versions(),
    }
    return [
        RobustnessResult(
            **shared,
            eps=eps,
            attacks=after_each_attack(
                _describe(how, eps, resolution=resolution, dtype=dtype),
                [records[sample][place] for sample in dataset.ids],
                [records[sample][place - 1] for sample in dataset.ids] if place and protocol.carry else [],
            ),
            samples=store.names[place] if samples_dir is not None else None,
            images=store.images if samples_dir is not None and saved.ids() else None,
            **summarize([records[sample][place] for sample in dataset.ids]),
        )
        for place, eps in enumerate(how.eps)
    ]


def classifier(encoder: Encoder, bank: TextBank) -> Callable[[Tensor], Tensor]:
    """Images in [0, 1] of any size to logits; they are fitted to the tower inside."""
    embed = image_embedder(encoder)
    return bank.classify(lambda images: embed(encoder.transform.fit(images)))


def _measure(
    classify: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, ids: list[int], how: RobustnessProtocol
) -> tuple[Records, list[dict[float, Tensor]]]:
    """Records of one batch, for each sample one per eps in rising order, and for each row the images found."""
    with torch.no_grad():
        clean = classify(images).argmax(1)
    latest = [
        SampleRecord(sample, label, answer, fooled_by=None if answer == label else "clean")
        for sample, label, answer in zip(ids, labels.tolist(), clean.tolist())
    ]
    alive = (clean == labels).nonzero().flatten()
    records: Records = {sample: [] for sample in ids}
    found: list[dict[float, Tensor]] = [{} for _ in ids]
    for eps in how.eps:
        if len(alive):
            ball, protocol = how.at(eps)
            noise = StartNoise(how.seed, [ids[row] for row in alive.tolist()])
            outcome = run_protocol(protocol, classify, images[alive], labels[alive], ball, noise)
            with torch.no_grad():
                logits = classify(outcome.images)
            scores = logits.scatter(1, labels[alive, None], -torch.inf).amax(1) - logits.gather(
                1, labels[alive, None]
            ).squeeze(1)
            answers, names = logits.argmax(1).tolist(), outcome.fooled_by
            for row, image, answer, score, name in zip(
                alive.tolist(), outcome.images, answers, scores.tolist(), names
            ):
                found[row][eps] = image
                latest[row] = replace(latest[row], adversarial=answer, score=round(score, 6), fooled_by=name)
            if protocol.carry:
                alive = alive[torch.tensor([name is None for name in names], device=alive.device)]
        for record in latest:
            records[int(record.id)].append(record)
    return records, found


def _describe(how: RobustnessProtocol, eps: float, *, resolution: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    ball, protocol = how.at(eps)
    return protocol.describe(ball, resolution=resolution, seed=how.seed, dtype=dtype)
