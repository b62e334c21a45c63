"""What a run remembers, as named tensors, and how it takes them up again."""

from typing import Any

import torch

from data.errors import InputError
from training.distillation import State
from training.run_folder import RunFolder
from training.saved_state import read_into_, read_shapes


def everything(state: State[Any], step: int) -> dict[str, torch.Tensor]:
    """All that a run remembers, as tensors by name; they are the state's own, or shards of them, except the few numbers."""
    found = {f"student.{name}": tensor for name, tensor in state.student.state_dict().items()}
    found |= {f"teacher.{name}": tensor for name, tensor in state.teacher.state_dict().items()}
    found |= {f"centers.{name}": tensor for name, tensor in state.centers.items()}
    for name, parameter in state.student.named_parameters():
        for key, value in state.optimizer.state[parameter].items() if parameter in state.optimizer.state else ():
            found[f"optimizer.{name}.{key}"] = value
    for key, number in state.scaler.state_dict().items():
        found[f"scaler.{key}"] = torch.tensor(float(number), dtype=torch.float64)
    return found | {"step": torch.tensor(step)}


def room_for(parameter: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What a value of this shape that an optimiser keeps of a parameter is read into.

    On the parameter's device: on a GPU the fused AdamW reads its count of steps there too, and not from the host's memory.
    """
    if shape == parameter.shape:
        return torch.zeros_like(parameter).detach()
    return torch.zeros(shape, device=parameter.device)


def restore_(state: State[Any], folder: RunFolder) -> int:
    """Load the newest saved state into `state`, whatever number of processes saved it; returns the step to take next."""
    saved = folder.states.newest_sound()
    shapes = read_shapes(saved)
    for name, parameter in state.student.named_parameters():
        for full in (full for full in shapes if full.startswith(f"optimizer.{name}.")):
            key = full.removeprefix(f"optimizer.{name}.")
            if "." not in key:
                state.optimizer.state[parameter][key] = room_for(parameter, shapes[full])
    tensors = everything(state, 0)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = [name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name)]
    if wrong:
        raise InputError(f"{saved}: does not fit this recipe (first {min(wrong)}); choose another --out")
    read_into_(saved, tensors)
    if scaler := {key.split(".")[1]: tensors[key].item() for key in tensors if key.startswith("scaler.")}:
        state.scaler.load_state_dict(
            {name: type(kind)(scaler[name]) for name, kind in state.scaler.state_dict().items()}
        )
    return int(tensors["step"])
