__version__ = "0.1.0"

import importlib

from . import _moved

# What most scripts begin with. It is imported when it is asked for: `import neighbor_grpo` alone does not bring torch.
_OFFERED = {
    "NeighborGRPO": "neighbor", "ALGORITHMS": "rivals.catalogue", "Trainer": "runs.trainer",
    "Task": "training", "TrainSettings": "training", "train": "training",
}
__all__ = [*_OFFERED]


def __getattr__(name: str) -> object:
    "One of the names above, from its module."
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_OFFERED[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})


_moved.install()
