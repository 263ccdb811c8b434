"""A setting that an algorithm had in an earlier version is refused with its new place; no other call notices."""

import copy
import inspect
import pickle
from dataclasses import dataclass, fields, replace

import pytest

from neighbor_grpo._moved import SETTINGS
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.rivals.catalogue import ALGORITHMS, MODIFIERS, make, modified, own_fields
from neighbor_grpo.rivals.gaussian import FlowGRPO
from neighbor_grpo.training import TrainSettings

PLACES = {
    "train_step": "train_step is now leap_from",
    "micro_batch": "micro_batch is now TrainSettings.micro_batch",
    "guard": "guard is now the modifier GuardedRatios",
    "scouts": "scouts is now Previews.scouts, a modifier's",
    "chunk": "chunk is now ChunkedRatios.chunk, a modifier's; that of VGRPO is one_ratio",
}


@pytest.mark.parametrize("kind", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("name", PLACES)
def test_an_algorithm_says_where_a_setting_is(kind, name):
    with pytest.raises(TypeError, match=f"{kind.__name__} has no setting '{name}': ") as e:
        kind(**{name: 1})
    assert PLACES[name] in str(e.value)


@pytest.mark.parametrize("name", ["micro_batch", "guard"])
def test_so_does_what_makes_one_by_name(name):
    for wrong in (lambda: make("flow", **{name: 1}), lambda: modified(FlowGRPO(), "slas", **{name: 1})):
        with pytest.raises(ValueError, match="settings must be those of") as e:
            wrong()
        assert PLACES[name] in str(e.value)


def test_every_place_exists():
    "A setting is named with the class that has it."
    owners = {kind.__name__: kind for kind in [TrainSettings, *MODIFIERS.values(), NeighborGRPO]}
    for name, place in SETTINGS.items():
        owner, dot, setting = place.partition(",")[0].partition(".")
        if dot:
            assert setting == name and name in [field.name for field in fields(owners[owner])]
    own = {field.name for kind in MODIFIERS.values() for field in own_fields(kind)}
    assert own <= SETTINGS.keys() and "leap_from" in [field.name for field in fields(NeighborGRPO)]


@dataclass(frozen=True)
class Held(NeighborGRPO):
    "Has a setting of its own, which happens to have an old name."

    kl_weight: float = 0.5


class Free(NeighborGRPO):
    "Takes anything."

    def __init__(self, **more):
        super().__init__()
        object.__setattr__(self, "more", more)


def test_other_calls_do_not_notice():
    assert Held(kl_weight=0.1).kl_weight == 0.1 and Free(guard=True).more == {"guard": True}
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_setting'"):
        NeighborGRPO(no_setting=1)
    algorithm = modified(NeighborGRPO(anchors=2), "previews", scouts=30)
    assert pickle.loads(pickle.dumps(algorithm)) == copy.deepcopy(algorithm) == replace(algorithm, scouts=30)
    assert [*inspect.signature(NeighborGRPO).parameters] == [field.name for field in fields(NeighborGRPO)]
