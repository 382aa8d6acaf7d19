"""A training run for tests that need a process of its own: `python -m tests.trainers.run_training '{"...": ...}'`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.evaluation.zero_shot import RobustnessProtocol, evaluate_zero_shot
from hf_robust_vision.trainers import base
from tests.trainers.helpers import make_trainer, weights


class KillAt(TrainerCallback):
    """SIGKILL, as a power cut or a batch system does it."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_while_saving(step: int) -> None:
    """Die when the weights of a checkpoint are written and its optimizer is not."""
    save = base.AdversarialTrainer._save_optimizer_and_scheduler

    def save_or_die(self, output_dir):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    base.AdversarialTrainer._save_optimizer_and_scheduler = save_or_die


def main() -> None:
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[1])
    output, resume = Path(settings.pop("output_dir")), settings.pop("resume", None)
    kill, kill_save = settings.pop("kill", None), settings.pop("kill_save", None)
    measure, world = settings.pop("measure", False), settings.pop("world_size", 1)
    if kill_save is not None:
        kill_while_saving(kill_save)
    callbacks = [KillAt(kill)] if kill is not None else None
    trainer = make_trainer(settings.pop("clip"), output, callbacks=callbacks, **settings)
    assert trainer.args.world_size == world, (trainer.args.world_size, world)
    trainer.train(resume_from_checkpoint=resume)
    rank = trainer.args.process_index
    torch.save({"weights": weights(trainer), "log": trainer.state.log_history}, output / f"final-{rank}.pt")
    if measure:
        how = RobustnessProtocol(get_protocol("apgd-ce", steps=3), (0.25 / 255, 1 / 255), batch_size=4)
        encoder = trainer.accelerator.unwrap_model(trainer.model)
        bank = trainer.text_bank(trainer.eval_dataset)
        results = evaluate_zero_shot(
            encoder, bank, trainer.eval_dataset, how, model_name="after", samples_dir=output, progress=False
        )
        if rank == 0:
            (output / "samples.json").write_text(json.dumps([result.samples for result in results]))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
