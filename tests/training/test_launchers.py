"""What is refused before a step is taken: launchers and settings that would train something else unseen."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils import patch_environment
from torch import nn

from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.training.launchers import check_launcher
from tests.training.helpers import arguments, make_trainer
from tests.training.ranks import said, start


FSDP2 = {
    "fsdp_version": 2,
    "state_dict_type": "FULL_STATE_DICT",
    "cpu_ram_efficient_loading": False,
    "reshard_after_forward": True,
}


def launched(mixed_precision="no", fsdp=None, deepspeed=None):
    """Accelerate builds its state of FSDP and DeepSpeed on a GPU only; the plugins are its own."""
    return SimpleNamespace(
        mixed_precision=mixed_precision, state=SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=deepspeed)
    )


@pytest.mark.parametrize(
    ("changes", "adapter", "message"),
    [
        ({"fsdp_version": 1, "reshard_after_forward": "FULL_SHARD"}, False, "fsdp_version: 2.*DDP"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, False, "set FULL_STATE_DICT"),
        ({"cpu_ram_efficient_loading": True}, False, "random original.*false"),
        ({}, True, "use_peft=true and FSDP"),
    ],
)
def test_fsdp_is_refused(changes, adapter, message):
    plugin = FullyShardedDataParallelPlugin(**(FSDP2 | changes))
    with pytest.raises(ValueError, match=message):
        check_launcher(launched(fsdp=plugin), adapter=adapter)


def test_a_compiled_attack_under_fsdp_is_refused():
    with pytest.raises(ValueError, match="attack_compile and FSDP do not go together"):
        check_launcher(launched(fsdp=FullyShardedDataParallelPlugin(**FSDP2)), adapter=False, compiled=True)


def test_fsdp2_runs_at_the_precision_of_ddp():
    """Accelerate would round the images to bf16, which is coarser than a perturbation."""
    plugin = FullyShardedDataParallelPlugin(**FSDP2)
    plugin.set_mixed_precision("bf16")
    check_launcher(launched("bf16", fsdp=plugin), adapter=False)
    assert plugin.mixed_precision_policy is None


def test_zero_3_is_refused_and_zero_2_is_not():
    check_launcher(launched(deepspeed=DeepSpeedPlugin(zero_stage=2)), adapter=False)
    with pytest.raises(ValueError, match="zero_stage: 2"):
        check_launcher(launched(deepspeed=DeepSpeedPlugin(zero_stage=3)), adapter=False)
    with pytest.raises(ValueError, match="ema_decay and DeepSpeed do not go together"):
        check_launcher(launched(deepspeed=DeepSpeedPlugin(zero_stage=2)), adapter=False, average=True)


def test_fp16_of_the_launcher_is_refused():
    with pytest.raises(ValueError, match="--bf16 true"):
        check_launcher(launched("fp16"), adapter=False)


def test_the_launchers_precision_is_recorded(clip_folder, tmp_path):
    """`mixed_precision: bf16` of a launcher file trains in bf16 whatever `--bf16` says."""
    with patch_environment(accelerate_mixed_precision="bf16"):
        trainer = make_trainer(clip_folder, tmp_path)
        assert trainer.training_record()["precision"] == trainer.accelerator.mixed_precision == "bf16"


def test_data_parallel_is_refused(clip_folder, tmp_path):
    from hf_robust_vision.methods.sim_clip import SimCLIPTrainer

    with pytest.raises(TypeError, match="got DataParallel"):
        SimCLIPTrainer(nn.DataParallel(load_encoder(clip_folder)), arguments(tmp_path))


def test_fsdp1_is_refused_in_a_run(clip_folder, tmp_path):
    assert start(clip_folder, tmp_path, world=2, fsdp=1) == [1, 1]
    assert "FSDP1 shards what the attack must read" in said(tmp_path)
    assert not list(tmp_path.glob("final-*"))


def test_processes_that_would_each_run_alone_are_refused(tmp_path, monkeypatch):
    """Two processes were started, but this one sees no other: both would write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)  # as on a Mac, whose GPU can not be shared
    # accelerate before 1.13 would join them on the CPU; then none is alone.
    monkeypatch.setattr("accelerate.state.get_int_from_env", lambda names, default: default)
    with pytest.raises(ValueError, match="started 2 processes.*--use_cpu true"):
        arguments(tmp_path, use_cpu=False)
