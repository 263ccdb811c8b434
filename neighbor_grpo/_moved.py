"""What earlier versions had elsewhere: old names of modules work and say what the new ones are,
old settings of algorithms are refused with their new place.

Written by hand; scripts with new names never notice it.
"""

import importlib
import inspect
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import ModuleType
from typing import TypeVar

PACKAGE = "neighbor_grpo"

# Modules that moved as a whole: the old name is another one of the same module, patches included.
WHOLE = {
    "benchmark": "lab.benchmark",
    "compare": "lab.compare",
    "cost": "lab.cost",
    "orphans": "lab.orphans",
    "flux": "models.flux",
    "miniature": "models.miniature",
    "remote": "rewards.remote",
    "forward": "rivals.forward",
    "mixed": "rivals.mixed",
    "options": "rivals.modifiers",
    "sde": "rivals.sde",
    "folder": "runs.folder",
    "digits": "tasks.digits",
    "images": "tasks.images",
    "prompts": "tasks.prompts",
    "scenes": "tasks.scenes",
    "toy2d": "tasks.toy2d",
}

# Modules whose content went to several places, which are asked in this order.
PARTS = {
    "algorithms": ("neighbor", "rollouts", "rivals.gaussian"),
    "distributed": ("runs.processes", "runs.tracking", "runs.machine"),
    "flow": ("toyflows",),
    "rewards": ("rewards.programs", "rewards.remote", "rewards.judges", "runs.machine"),
    "rivals": (
        "rivals.catalogue",
        "rivals.trajectories",
        "neighbor",
        "rollouts",
        "rivals.gaussian",
        "rivals.mixed",
        "rivals.forward",
    ),
    "sd3": ("models.pipeline", "models.sd3", "runs.machine"),
    "training": ("penalties", "runs.trainer", "runs.folder", "runs.state", "runs.pictures"),
}
# What `import *` also takes.
STARRED = {"training": ["Checkpoints", "Trainer", "plot_run", "read_rows", "run_config"]}
GONE = ("algorithms", "distributed", "sd3")  # nothing of these names is left

Kind = TypeVar("Kind")  # a class of algorithms

# Settings that algorithms had, and where they are.
SETTINGS = {
    "train_step": "leap_from",
    "old_anchor": "leap_from",
    "rescale": "an argument of quasi_norm",
    "guard": "the modifier GuardedRatios",
    "chunk": "ChunkedRatios.chunk, a modifier's; that of VGRPO is one_ratio",
    "time_weight": "TimeWeights.time_weight, a modifier's; that of TempFlowGRPO is weigh_noise",
}
_OWNERS = {
    "TrainSettings": ("micro_batch", "kl_weight", "hold_weight"),
    "ShapedAdvantages": ("advantage_power", "advantage_scale"),
    "MaskedRatios": ("kl_threshold",),
    "Previews": ("scouts", "scout_steps"),
    "Replay": ("replay", "memory_size", "memory_age"),
}
for _owner, _names in _OWNERS.items():
    _whose = "" if _owner == "TrainSettings" else ", a modifier's"
    SETTINGS |= {name: f"{_owner}.{name}{_whose}" for name in _names}


def places(names: Iterable[str]) -> str:  # empty where none has moved
    "Where settings of these names are now."
    return "; ".join(f"{name} is now {SETTINGS[name]}" for name in names if name in SETTINGS)


def new_without_moved(kind: type[Kind], *arguments: object, **settings: object) -> Kind:
    """The `__new__` of algorithms: a `TypeError`, as Python raises for any unknown name, which
    says where the setting is now."""
    for name in [name for name in settings if name in SETTINGS]:
        try:
            inspect.signature(kind.__init__).bind_partial(None, **{name: None})
        except TypeError:
            text = f"{kind.__name__} has no setting {name!r}: {places([name])}"
            raise TypeError(text) from None
    return object.__new__(kind)


def warn(old: str, new: str) -> None:
    "Name the new place, at the line that asked for the old one."
    text = f"{PACKAGE}.{old} is now {PACKAGE}.{new}; the old name will go"
    warnings.warn(text, DeprecationWarning, stacklevel=3)


class Asked:
    "What a module does when asked for a name that it does not have: its `__getattr__`."

    def __init__(self, module: str):
        self.module = module

    def __call__(self, name: str) -> object:
        full = f"{PACKAGE}.{self.module}"
        for home in () if self.is_own(full, name) else PARTS[self.module]:
            module = importlib.import_module(f"{PACKAGE}.{home}")
            if name in vars(module)["__all__"]:
                warn(f"{self.module}.{name}", f"{home}.{name}")
                return getattr(module, name)
        raise AttributeError(f"module {full!r} has no attribute {name!r}")

    def is_own(self, full: str, name: str) -> bool:
        "Is it a special name, or that of a module which is about to be imported?"
        if name.startswith("__"):
            return True
        return hasattr(sys.modules[full], "__path__") and find_spec(f"{full}.{name}") is not None


class Alias(Loader):
    "Hands out a module that moved as a whole."

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        old = spec.name.removeprefix(f"{PACKAGE}.")
        warn(old, WHOLE[old])
        module = importlib.import_module(f"{PACKAGE}.{WHOLE[old]}")
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # That of the new name, which importing it by the old one has replaced.
        module.__spec__ = self.spec


class Remains(Loader):
    "Makes a module that is gone: it has nothing of its own."

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix(f"{PACKAGE}.")
        homes = [importlib.import_module(f"{PACKAGE}.{home}") for home in PARTS[old]]
        offered = [name for home in homes for name in vars(home)["__all__"]]
        vars(module).update(__all__=offered, __getattr__=Asked(old))


class Extended(SourceFileLoader):
    "Loads a module that is still there, and lets it be asked for what has left it."

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        old = module.__name__.removeprefix(f"{PACKAGE}.")
        offered = [*vars(module).get("__all__", []), *STARRED.get(old, [])]
        vars(module).update(__getattr__=Asked(old), **{"__all__": offered} if offered else {})


class Moved(MetaPathFinder):
    "Finds modules of this package by the names that they had."

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        if package != PACKAGE or old not in WHOLE and old not in PARTS:
            return None
        if old in WHOLE:
            return ModuleSpec(name, Alias())
        if old in GONE:
            return ModuleSpec(name, Remains())
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = Extended(name, spec.loader.path)
        return spec


def install() -> None:
    "Be asked before the folders are: one of them, of data, has the name of a module that moved."
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, Moved())
