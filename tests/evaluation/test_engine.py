"""The loop that all tasks share, on a task that is one short file: worst case, resume, processes, checks, page, card."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from dataclasses import replace

import pytest
import torch

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.evaluation.engine import evaluate, prefetched
from hf_robust_vision.evaluation.images import AdversarialImages, measure_again
from hf_robust_vision.evaluation.results import load_results, load_samples, save_results
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.hub.card import make_card
from hf_robust_vision.report.page import write_report
from hf_robust_vision.sanity.check import add_sanity
from tests.evaluation.toy_task import BrighterHalf, Halves
from tests.training.ranks import free_port


HOW = RobustnessProtocol(get_protocol("apgd-ce", steps=4), (0.0125, 0.0525), batch_size=4)


def make_pictures():
    """Fourteen pictures of noise, their left halves brighter or darker by 0.01 to 0.14."""
    pictures = 0.4 + 0.2 * torch.rand(14, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shifts = torch.linspace(0.01, 0.14, 14) * torch.tensor([1, -1]).repeat(7)
    pictures[..., :4] += shifts.view(-1, 1, 1, 1) - pictures[..., :4].mean((1, 2, 3), keepdim=True)
    pictures[..., :4] += pictures[..., 4:].mean((1, 2, 3), keepdim=True)
    return pictures


@pytest.fixture
def pictures():
    return make_pictures()


def run(task, how=HOW, **settings):
    return evaluate(task, how, **{"model_name": "before", "progress": False} | settings)


def flags(folder, results):
    return [
        [(r.id, r.clean, r.adversarial, r.fooled_by) for r in load_samples(folder / one.samples)] for one in results
    ]


def test_a_linear_model_falls_where_its_margin_says(pictures):
    """The mean of each half moves by eps at most: a picture stands where its halves differ by more than 2 * eps."""
    small, large = run(BrighterHalf(Halves(), pictures))
    assert (small.clean_accuracy, large.clean_accuracy) == (1, 1)
    assert small.robust_accuracy == pytest.approx(12 / 14)  # 0.03 to 0.14; the bound lies between two pictures
    assert large.robust_accuracy == pytest.approx(4 / 14)  # 0.11 to 0.14


def test_a_task_gets_resume_from_the_engine(pictures, tmp_path, monkeypatch):
    whole = run(BrighterHalf(Halves(), pictures), samples_dir=tmp_path / "a")

    class Broken(BrighterHalf):
        def load(self, place):
            if place == 9:
                raise KeyboardInterrupt
            return super().load(place)

    with pytest.raises(KeyboardInterrupt):
        run(Broken(Halves(), pictures), samples_dir=tmp_path / "b")
    met = []
    strike = BrighterHalf.strike
    monkeypatch.setattr(BrighterHalf, "strike", lambda t, s, b, n: met.append(len(b.places)) or strike(t, s, b, n))
    again = run(BrighterHalf(Halves(), pictures), samples_dir=tmp_path / "b")
    assert 0 < sum(met) < 14 * 2
    assert flags(tmp_path / "b", again) == flags(tmp_path / "a", whole)
    met.clear()
    repeated = run(BrighterHalf(Halves(), pictures), samples_dir=tmp_path / "b")
    assert met == []
    assert repeated[0].seconds == pytest.approx(again[0].seconds, abs=1e-3)  # not those of reading a file
    assert repeated[0].seconds > 0


def _rank(rank, port, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    results = run(BrighterHalf(Halves(), make_pictures()), samples_dir=folder)
    if rank == 0:
        save_results(results, folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(pictures, tmp_path):
    alone = run(BrighterHalf(Halves(), pictures), samples_dir=tmp_path / "one")
    context = multiprocessing.get_context("spawn")
    port = free_port()
    ranks = [context.Process(target=_rank, args=(rank, port, tmp_path / "two")) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(400)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert flags(tmp_path / "two", load_results(tmp_path / "two")) == flags(tmp_path / "one", alone)
    assert not list((tmp_path / "two").glob("*.rank*"))


def test_a_task_gets_checks_page_and_card(pictures, tmp_path):
    task = BrighterHalf(Halves(), pictures)
    how = replace(HOW, eps=(0.05, 0.1))
    results = run(task, how, samples_dir=tmp_path, save_images=task.ids)
    add_sanity(results, {"before": task}, how, samples=8, queries=20)
    assert results[0].sanity["flagged"] == []
    save_results(results, tmp_path)
    page = write_report([tmp_path], tmp_path / "report")[1].read_text()
    assert "toy" in page
    assert "apgd-ce" in page
    card = str(make_card([replace(result, model="after") for result in results], model_name="x"))
    assert "toy" in card
    again = measure_again(task, results[1], tmp_path)
    assert (again.changed, again.outside) == ([], [])
    assert AdversarialImages(tmp_path / results[1].images).ids() == task.ids


def test_a_value_that_is_not_finite_is_no_number(pictures):
    """findings-reliability 3: NaN is no answer, on the clean image or under attack."""
    broken = Halves()
    with torch.no_grad():
        broken.scale.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite for sample 0"):
        run(BrighterHalf(broken, pictures, labels=[0] * 14))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda task: setattr(task, "ids", [0] * 14), "ids name more than one sample"),
        (lambda task: setattr(task, "ids", []), "holds no samples"),
        (lambda task: task.model.half(), "float16.*bfloat16"),
        (lambda task: task.model.to("meta"), "on no device"),
    ],
)
def test_what_can_not_be_measured_is_refused(pictures, break_it, said):
    """findings-scale 5 and 6, findings-swap 13: half precision, offloaded weights, nothing to measure."""
    task = BrighterHalf(Halves(), pictures)
    break_it(task)
    with pytest.raises(ValueError, match=said):
        run(task)


def test_memory_that_does_not_fit_halves_the_batch(pictures, tmp_path, monkeypatch):
    """findings-scale 6."""
    wanted = run(BrighterHalf(Halves(), pictures), samples_dir=tmp_path / "a")
    strike, sizes = BrighterHalf.strike, []

    def small(task, stage, batch, seed):
        sizes.append(len(batch.places))
        if len(batch.places) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return strike(task, stage, batch, seed)

    monkeypatch.setattr(BrighterHalf, "strike", small)
    with pytest.warns(UserWarning, match="does not fit into memory; going on with 2"):
        results = run(BrighterHalf(Halves(), pictures), samples_dir=tmp_path / "b")
    assert sum(size > 2 for size in sizes) == 1
    assert flags(tmp_path / "b", results) == flags(tmp_path / "a", wanted)


def test_records_of_something_else_are_refused(pictures, tmp_path):
    """findings-reliability 12: a wrong label, or an attack that was none of these, is not believed."""
    results = run(BrighterHalf(Halves(), pictures), samples_dir=tmp_path)
    file = tmp_path / results[0].samples
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for change in ({"label": 1 - rows[0]["label"]}, {"fooled_by": "magic"}):
        file.write_text("".join(json.dumps(row) + "\n" for row in [rows[0] | change, *rows[1:]]))
        with pytest.raises(ValueError, match=r"samples-.*\.jsonl.*not of this measurement: sample 0"):
            run(BrighterHalf(Halves(), pictures), samples_dir=tmp_path)


def test_radii_near_each_other_have_files_of_their_own(pictures, tmp_path):
    """findings-swap 13."""
    how = replace(HOW, eps=(0.0100001, 0.0100002))
    assert len({result.samples for result in run(BrighterHalf(Halves(), pictures), how, samples_dir=tmp_path)}) == 2


def test_another_module_under_the_same_weights_is_another_model(pictures, tmp_path):
    """findings-swap 11."""

    class Louder(Halves):
        pass

    first, second = (run(BrighterHalf(m(), pictures), samples_dir=tmp_path)[0] for m in (Halves, Louder))
    assert first.model_sha256 == second.model_sha256
    assert first.samples != second.samples


def test_images_are_decoded_ahead_and_in_order():
    """The ninth image is read before the first is asked for a second time."""
    ninth = threading.Event()

    def load(place):
        if place == 8:
            ninth.set()
        return torch.tensor(place)

    source = prefetched(load, range(20), ahead=8)
    assert next(source)[0] == 0
    assert ninth.wait(10)
    assert [(place, int(image)) for place, image in source] == [(place, place) for place in range(1, 20)]


def test_radii_and_batches_are_checked():
    """findings-reliability 8: a radius that stands twice gives no two rows."""
    with pytest.raises(ValueError, match="twice"):
        replace(HOW, eps=(0.01, 0.01))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        replace(HOW, batch_size=0)
