"""A whole task in one file: which half of a picture is brighter? It is all that somebody has to write for a new one."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from hf_robust_vision.attacks import Logits, Misclassified
from hf_robust_vision.attacks.protocol import classification_objective
from hf_robust_vision.evaluation.task import Batch, Stage, Task, Verdict


class Halves(nn.Module):
    """Logits of "left" and "right": the mean brightness of the two halves."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, images):
        return self.scale * torch.stack([half.flatten(1).mean(1) for half in images.chunk(2, dim=3)], 1)


class BrighterHalf(Task):
    """Is the brighter half of the picture still found?"""

    kind = task = "brighter_half"
    loss = "cross-entropy"

    def __init__(self, model, pictures, name="toy", labels=None):
        self.model, self.pictures, self.dataset, self.split = model, pictures, name, "test"
        self.ids, self.logits = list(range(len(pictures))), Logits(model)
        with torch.no_grad():
            self.labels = model(pictures).argmax(1).tolist() if labels is None else labels

    def load(self, place):
        return self.pictures[place]

    def label(self, place):
        return self.labels[place]

    def judge(self, batch: Batch, images):
        logits, truth = self.logits(images), self._truth(batch)
        wrong = logits.scatter(1, truth[:, None], -torch.inf)
        margin = (wrong.amax(1) - logits.gather(1, truth[:, None]).squeeze(1)).tolist()
        notes = wrong.argsort(dim=1, descending=True)
        rows = zip(logits.argmax(1).tolist(), truth.tolist(), margin, notes)
        return [Verdict(answer, answer != label, harm, round(harm, 6), note) for answer, label, harm, note in rows]

    def aim(self, stage: Stage, batch: Batch):
        truth = self._truth(batch)
        targets = torch.stack([clean.notes[stage.target] for clean in batch.clean]) if stage.attack.targets else None
        return classification_objective(stage.attack, self.logits, truth, targets), Misclassified(self.logits, truth)

    def identity(self):
        return {"pictures": hashlib.sha256(self.pictures.numpy().tobytes()).hexdigest(), "labels": self.labels}

    def scores(self, batch: Batch, images):
        return self.logits(images)

    def luck(self, places):
        labels = [self.labels[place] for place in places]
        return max(labels.count(label) for label in labels) / len(labels), "the share of the commonest answer"

    def _truth(self, batch: Batch):
        return torch.tensor([self.labels[place] for place in batch.places])
