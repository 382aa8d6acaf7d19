"""A training run for tests that need a process of its own: `python -m tests.training.run_training '{"...": ...}'`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from transformers import TrainerCallback

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.zero_shot import evaluate_zero_shot
from hf_robust_vision.methods.pmg_aft import PMGAFTTrainer
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.methods.tima import TIMATrainer
from hf_robust_vision.processes import PATIENCE, part
from hf_robust_vision.training import base
from hf_robust_vision.training.launchers import is_sharded
from tests.conftest import make_dataset
from tests.training.helpers import make_stream, make_trainer, weights


KINDS = {"sim_clip": SimCLIPTrainer, "tima": TIMATrainer, "pmg_aft": PMGAFTTrainer}


class KillAt(TrainerCallback):
    """SIGKILL, as a power cut or a batch system does it."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def shard_on_the_cpu(version: int) -> None:
    """Let accelerate run FSDP on gloo processes: by itself it runs DDP there, whatever its settings say."""
    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    os.environ |= {
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": str(version),
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def kill_while_saving(step: int) -> None:
    """Die when the weights of a checkpoint are written and its optimizer is not."""
    save = base.AdversarialTrainer._save_optimizer_and_scheduler

    def save_or_die(self, output_dir):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    base.AdversarialTrainer._save_optimizer_and_scheduler = save_or_die


def main(settings: dict) -> None:
    torch.set_num_threads(1)
    output, resume = Path(settings.pop("output_dir")), settings.pop("resume", None)
    kill, kill_save = settings.pop("kill", None), settings.pop("kill_save", None)
    killed = settings.pop("kill_rank", 0) == int(os.environ.get("RANK", 0))
    measure, world = settings.pop("measure", False), settings.pop("world_size", 1)
    version = settings.pop("fsdp", 0)
    if version:
        shard_on_the_cpu(version)
    if kill_save is not None:
        kill_while_saving(kill_save)
    if count := settings.pop("stream", 0):
        settings["train"] = make_stream(count, shards=min(count, 2))
    callbacks = [KillAt(kill)] if kill is not None and killed else None
    kind = KINDS[settings.pop("kind", "sim_clip")]
    measured = settings.pop("measured", 9)
    trainer = make_trainer(settings.pop("clip"), output, kind=kind, callbacks=callbacks, **settings)
    trainer.eval_dataset = make_dataset(measured, "validation", 100)
    assert trainer.args.world_size == world, (trainer.args.world_size, world)
    if world > 1 and not version:  # findings-code 5; with FSDP the group is the one made above
        group = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        assert group.options._timeout == PATIENCE, group.options._timeout
    trainer.train(resume_from_checkpoint=resume)
    rank = trainer.args.process_index
    sharded = is_sharded(trainer.model)
    prompts = len(trainer.prompts["input_ids"]) if hasattr(trainer, "prompts") else 0
    torch.save(
        {"weights": weights(trainer), "sharded": sharded, "log": trainer.state.log_history, "prompts": prompts},
        output / f"final-{rank}.pt",
    )
    if measure:
        how = RobustnessProtocol(get_protocol("apgd-ce", steps=3), (0.25 / 255, 1 / 255), batch_size=4)
        encoder = trainer.whole_encoder()
        bank = trainer.text_bank(trainer.eval_dataset, encoder)
        trainer.save_model()
        results = evaluate_zero_shot(
            encoder, bank, trainer.eval_dataset, how, model_name="after", samples_dir=output, progress=False
        )
        if rank == 0:
            (output / "samples.json").write_text(json.dumps([result.samples for result in results]))
    part()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
