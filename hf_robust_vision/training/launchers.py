"""What a launcher may do to the model: refused where training would go wrong unseen, gathered where it is shared out."""

from __future__ import annotations

import copy
from typing import Any

from accelerate import Accelerator
from torch import nn

from hf_robust_vision.towers.load import Encoder


def check_launcher(accelerator: Accelerator, *, adapter: bool, average: bool = False, compiled: bool = False) -> None:
    """Refuse FSDP1, ZeRO-3, fp16, fp8, FSDP2 with an adapter, a compiled attack or lost weights, ZeRO with an average."""
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision={accelerator.mixed_precision} lets the attack's gradients underflow to zero unseen; set "
            "mixed_precision: 'no' in accelerate's config and type --bf16 true."
        )
    # The attack goes around the wrapper, where ZeRO-3 and FSDP1 leave pieces of weights. FSDP2 has none: it gathers in
    # hooks of the modules themselves. ZeRO-2 shares out gradients and optimizer states alone.
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError("DeepSpeed ZeRO-3 shards what the attack must read; use zero_stage: 2, or DDP.")
    if deepspeed is not None and average:
        raise ValueError(
            "ema_decay and DeepSpeed do not go together: its optimizer holds the weights; use DDP or FSDP2."
        )
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None:
        if compiled:  # it gathers weights in hooks, which no graph can hold
            raise ValueError("attack_compile and FSDP do not go together; leave it out, or use DDP.")
        _check_fsdp(fsdp, adapter)
        # Accelerate would cast the images to bf16, which is coarser than a perturbation; its autocast, which runs as
        # well, is the precision of DDP.
        fsdp.mixed_precision_policy = None


def _check_fsdp(plugin: Any, adapter: bool) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP1 shards what the attack must read; set fsdp_version: 2, or use MULTI_GPU (DDP).")
    if adapter:
        raise ValueError("use_peft=true and FSDP do not go together; an adapter is small: use DDP.")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: true loads the weights on one process only, and the others would hold a "
            "random original to compare with; set it to false."
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"fsdp_state_dict_type {plugin.state_dict_type} leaves no model folder at the end; set FULL_STATE_DICT."
        )


def make_shardable(encoder: Encoder) -> None:
    """Hold the scale and bias of logits as buffers, in the same state dict: FSDP2 refuses parameters without dimensions."""
    for name in ("logit_scale", "logit_bias"):
        value = getattr(encoder, name, None)
        if isinstance(value, nn.Parameter):
            delattr(encoder, name)
            encoder.register_buffer(name, value.detach())


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has shared out the weights of a model."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def gathered(model: nn.Module, like: Encoder) -> Encoder:
    """A copy of a sharded model with whole weights, of the class of `like`; every process must ask for it."""
    # Processes measure different numbers of images, and a sharded model would wait for ever for the one that is done.
    whole = copy.deepcopy(like)
    state = model.state_dict()
    whole.load_state_dict({name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in state.items()})
    return whole
