"""The loop of every evaluation: attacks at rising radii, the worst case per sample, records, results.

Samples flow through the searches one by one, in batches that are always full: what a search leaves standing waits for
the next batch's survivors, and both go on together. No sample's outcome depends on what it shares a batch with.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Required, TypedDict

import torch
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from hf_robust_vision import __version__
from hf_robust_vision.processes import rank_and_world
from hf_robust_vision.towers.base import attack_mode

from .images import AdversarialImages
from .results import RobustnessResult, SampleRecord, eps_text, versions
from .samples import Progress, SampleId, SampleStore
from .task import Batch, Level, RobustnessProtocol, Stage, Task, Verdict, model_identity, need_usable, one_size


READERS = min(4, os.cpu_count() or 1)  # threads that decode images while the device attacks


class Output(TypedDict, total=False):
    """What an evaluation is called, where it runs and writes."""

    model_name: Required[str]  # "before", "after", or a path, for the results
    samples_dir: str | Path | None  # an interrupted call goes on from there, and a repeated one measures nothing
    progress: bool  # show a bar on the main process


class RunSettings(Output, total=False):
    """As `Output`, and what is kept of single samples."""

    # Ids of samples whose images go to `samples_dir` (`AdversarialImages`); measured again where they were not kept.
    save_images: Collection[SampleId]


def evaluate(task: Task, how: RobustnessProtocol, **settings: Unpack[RunSettings]) -> list[RobustnessResult]:
    """Measure a task, one result per metric and level.

    The samples are shared out over the processes of `torch.distributed`, and each is measured exactly once. Weights,
    mode and gradients of the model are as they were.

    Raises:
        ValueError: If two samples share an id, images have no folder to go to, the model gives values that are not
            finite, or it can not be attacked (float16, offloaded).
    """
    if "model_name" not in settings:
        raise TypeError('model_name= is missing: "before", "after" or a path, as results are to call the model.')
    model_name, save_images = settings["model_name"], set(settings.get("save_images", ()))
    samples_dir = settings.get("samples_dir")
    if save_images and samples_dir is None:
        raise ValueError("save_images needs a samples_dir to save them in.")
    if twice := [sample for sample, count in Counter(task.ids).items() if count > 1]:
        raise ValueError(
            f"{len(twice)} ids name more than one sample ({', '.join(map(repr, twice[:3]))}): give every sample, that "
            "is every question about an image, an id of its own."
        )
    if not task.ids:
        raise ValueError(f"there is nothing to measure: {task.dataset} ({task.split}) holds no samples.")
    need_usable(task.model)
    how, left_out = task.fit(how)
    levels, about = task.levels(how), model_identity(task.model)
    folder = Path(samples_dir) if samples_dir is not None else None
    store = SampleStore(
        folder,
        f"{Path(model_name).name}-{task.kind}-{task.group}-{how.norm}",
        [level.value for level in levels],
        _identity(task, how, levels) | about,
        {sample: task.label(place) for place, sample in enumerate(task.ids)},
        task.blames(levels),
    )
    saved = AdversarialImages((folder or Path()) / store.images)
    store.forget({sample for sample in save_images if sample not in saved})
    with attack_mode(task.model):  # `judge` and `aim` rely on it: no dropout, no gradient of a parameter
        flow = _Flow(task, how, levels, store, saved, save_images, f"{model_name}: {task.kind}")
        flow.run(show=settings.get("progress", True))
    records = store.gather(task.ids)
    by_level = [[records[sample][place] for sample in task.ids] for place in range(len(levels))]
    shared: dict[str, Any] = {
        **{name: getattr(task, name) for name in ("task", "dataset", "dataset_id", "split", "group")},
        "model": model_name,
        "model_sha256": about["weights"],
        "protocol": how.protocol.name,
        "norm": how.norm,
        "carry": how.protocol.carry,
        "left_out": left_out,
        "images": store.images if folder is not None and saved.ids() else None,
        "seconds": store.seconds,
        "versions": versions(),
    }
    of_level = []
    for place, level in enumerate(levels):
        smaller = by_level[place - 1] if place and how.protocol.carry else []
        rows = task.rows(level, by_level[place], smaller, how.seed)
        samples = store.names[place] if folder is not None else None
        of_level.append(shared | {"eps": level.value, "attacks": rows, "samples": samples} | task.fields(level))
    return [
        RobustnessResult(**values, metric=metric, **task.summary(metric, level_records))
        for metric in task.metrics
        for values, level_records in zip(of_level, by_level)
    ]


def _identity(task: Task, how: RobustnessProtocol, levels: Sequence[Level]) -> dict[str, Any]:
    """What decides the records, beside the model."""
    # The batch size decides no outcome: a run may go on with another one.
    shared = asdict(replace(how, batch_size=1)) | {"levels": [level.value for level in levels]}
    shared |= {"kind": task.kind, "data": [task.dataset, task.split, list(task.ids)], "dtype": str(task.weight.dtype)}
    return shared | {"task": task.identity(), "version": __version__}


@dataclass
class _Flight:
    """A sample on its way through the searches."""

    place: int
    image: Tensor
    clean: Verdict
    record: SampleRecord
    harm: float
    level: int = 0
    stage: int = 0
    behind: list[SampleRecord] = field(default_factory=list)
    found: dict[float, Tensor] = field(default_factory=dict)


_Place = tuple[int, int, torch.Size]  # level, stage, and the size that images of one batch share


@dataclass
class _Flow:
    """The samples of this process, from the clean image to the last record."""

    task: Task
    how: RobustnessProtocol
    levels: list[Level]
    store: SampleStore
    saved: AdversarialImages
    save: set[SampleId]
    label: str

    def run(self, *, show: bool) -> None:
        """Measure what the store does not hold yet."""
        rank, world = rank_and_world()
        ids, known = self.task.ids, self.store.progress
        # Every world-th sample: of data in the order of its classes each process gets some of each.
        todo = [at for at in range(rank, len(ids), world) if ids[at] not in known or not known[ids[at]].done]
        self.size = self.how.batch_size
        # Samples wait per search, not per batch. Without it the last searches, which few samples reach, would run on
        # one or two images at a time: most of the time of a strong protocol.
        self.waiting: dict[_Place, deque[_Flight]] = defaultdict(deque)
        self.met, self.left = Counter[tuple[int, int]](), Counter[tuple[int, int]]()  # by level and stage, to show
        source = prefetched(self.task.load, todo, ahead=2 * self.size)
        self.bar = tqdm(total=len(todo), desc=self.label, disable=not show or rank > 0)
        order = itemgetter(0, 1)
        while True:
            full = [place for place, flights in self.waiting.items() if len(flights) >= self.size]
            if full:
                self._attack(max(full, key=order))  # the furthest first: what is done is written down
            elif admitted := list(islice(source, self.size)):
                self._admit(admitted)
            elif left := [place for place, flights in self.waiting.items() if flights]:
                self._attack(min(left, key=order))  # the hindmost first: it fills up those before it
            else:
                break
        self.bar.close()

    def _admit(self, items: list[tuple[int, Tensor]]) -> None:
        """Ask the model about clean images."""
        start = time.time()
        states: dict[SampleId, Progress] = {}
        for batch in one_size(items, len(items), self.task.weight.device):
            for place, image, clean in zip(batch.places, batch.images, self._in_memory(batch, self._judge_clean)):
                states |= self._onward(self._take_up(self._fresh(place, image, clean)))
        self.store.add(states, time.time() - start)

    @torch.no_grad()
    def _judge_clean(self, batch: Batch) -> list[Verdict]:
        return self.task.judge(batch, batch.images)

    def _fresh(self, place: int, image: Tensor, clean: Verdict) -> _Flight:
        harm = clean.harm if self.task.compares_with_clean else -math.inf
        return _Flight(place, image, clean, self.task.first(place, clean), harm)

    def _take_up(self, flight: _Flight) -> _Flight:
        """Go on where an interrupted run was."""
        state = self.store.progress.get(self.task.ids[flight.place])
        if state is None or state.stage is None or self.task.ids[flight.place] in self.save:
            return flight
        *behind, record = state.records
        return replace(flight, behind=behind, level=len(behind), record=record, harm=state.harm, stage=state.stage)

    def _attack(self, place: _Place) -> None:
        """One search on the samples that wait for it."""
        # Start noise belongs to the sample, so it does not matter with whom a sample shares the batch.
        start, queue = time.time(), self.waiting[place]
        flights = [queue.popleft() for _ in range(min(self.size, len(queue)))]
        level, stage = self.levels[place[0]], self.levels[place[0]].stages[place[1]]
        self._show(place, f"{len(flights)} under attack")
        batch = Batch(
            tuple(flight.place for flight in flights),
            torch.stack([flight.image for flight in flights]),
            tuple(flight.clean for flight in flights),
        )

        def search(part: Batch) -> list[tuple[Tensor, Verdict]]:
            attacked = self.task.strike(stage, part, self.how.seed)
            with torch.no_grad():
                return list(zip(attacked, self.task.judge(part, attacked)))

        states: dict[SampleId, Progress] = {}
        for flight, (image, verdict) in zip(flights, self._in_memory(batch, search)):
            self._compare(flight, stage, level, image, verdict)
            self.met[place[:2]] += 1
            self.left[place[:2]] += self.task.stands(flight.record, stage)
            flight.stage += 1
            states |= self._onward(flight)
        self.store.add(states, time.time() - start)
        self._show(place, "")

    def _show(self, place: _Place, now: str) -> None:
        """Beside the bar: the radius and the attack, and how many of those that met it there are left."""
        level, key = self.levels[place[0]], place[:2]
        severity = self.task.fields(level).get("severity")
        radius = f"eps {eps_text(level.value, self.how.norm)}" if severity is None else f"severity {severity}"
        told = [f"{self.left[key]} of {self.met[key]} left"] if self.met[key] else []
        told += [now] if now else []
        self.bar.set_postfix_str(f"{radius}, {level.stages[key[1]].attack.name}: {', '.join(told)}")

    def _compare(self, flight: _Flight, stage: Stage, level: Level, image: Tensor, verdict: Verdict) -> None:
        """Keep the worst that a sample has met."""
        if math.isnan(verdict.harm):
            raise ValueError(
                f"the model gives values that are not finite for sample {self.task.ids[flight.place]!r} under "
                f"{stage.attack.name}: no number can come of it. Load it in float32, or check its weights."
            )
        # The worst case is per sample: the mean over attacks would flatter the model.
        if verdict.harm > flight.harm or (flight.record.adversarial is None and verdict.harm == flight.harm):
            flight.harm, flight.found[level.value] = verdict.harm, image
            blame = self.task.blame(stage, verdict, flight.record)
            changes: dict[str, Any] = {"adversarial": verdict.answer, "score": verdict.score, "fooled_by": blame}
            flight.record = replace(flight.record, **changes)

    def _onward(self, flight: _Flight) -> dict[SampleId, Progress]:
        """Let a sample wait for its next search, or write it down; how far it has come, by its id."""
        sample = self.task.ids[flight.place]
        while flight.level < len(self.levels):
            stages = self.levels[flight.level].stages
            while flight.stage < len(stages) and not self.task.stands(flight.record, stages[flight.stage]):
                flight.stage += 1
            if flight.stage < len(stages):
                self.waiting[flight.level, flight.stage, flight.image.shape].append(flight)
                return {sample: Progress([*flight.behind, flight.record], flight.stage, flight.harm)}
            flight.behind.append(flight.record)
            flight.level, flight.stage = flight.level + 1, 0
            # The smaller ball lies inside the larger one: what was found there counts here, unless the protocol wants
            # each radius measured on its own.
            if not self.how.protocol.carry:
                fresh = self._fresh(flight.place, flight.image, flight.clean)
                flight.record, flight.harm = fresh.record, fresh.harm
        if sample in self.save:  # before the record, which says that the sample is done
            self.saved.write(sample, flight.image, flight.found)
        self.bar.update()
        return {sample: Progress(flight.behind)}

    def _in_memory(self, batch: Batch, function: Callable[[Batch], list[Any]]) -> list[Any]:
        """A function of a batch; where it does not fit into the device's memory, of its halves."""
        try:
            return function(batch)
        except torch.OutOfMemoryError:
            if len(batch.places) == 1:
                raise
        # Outside the `except`: inside, the traceback would keep the failed pass in memory.
        half = (len(batch.places) + 1) // 2
        self.size = min(self.size, half)
        warnings.warn(f"a batch of {len(batch.places)} does not fit into memory; going on with {half}.", stacklevel=2)
        rows = torch.arange(len(batch.places), device=batch.images.device)
        return [value for part in rows.split(half) for value in self._in_memory(batch.take(part), function)]


def prefetched(load: Callable[[int], Tensor], places: Sequence[int], *, ahead: int) -> Iterator[tuple[int, Tensor]]:
    """Places with their images, in order, decoded by threads up to `ahead` images before they are asked for."""
    # Threads, not worker processes: decoding and resizing release the interpreter's lock, and nothing is copied.
    with ThreadPoolExecutor(READERS) as pool:
        rest = iter(places)
        coming = deque((place, pool.submit(load, place)) for place in islice(rest, ahead))
        while coming:
            place, image = coming.popleft()
            # The next one before this one is given away: the threads decode while the caller attacks.
            coming.extend((after, pool.submit(load, after)) for after in islice(rest, 1))
            yield place, image.result()
