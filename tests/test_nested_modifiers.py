"""A modifier stands around an algorithm once, and what it cannot change it does not accept silently."""

import pytest
import torch

from neighbor_grpo.rivals.catalogue import MODIFIERS, modified
from neighbor_grpo.rivals.gaussian import FlowGRPO
from neighbor_grpo.rivals.modifiers import ShapedAdvantages
from neighbor_grpo.rivals.trajectories import TMPO


@pytest.mark.parametrize("name", MODIFIERS)
@pytest.mark.parametrize("between", [(), ("slas",), ("previews",)], ids="+".join)
def test_none_stands_around_itself(name, between):
    "A run folder remembers the settings of one."
    kind, inner = MODIFIERS[name], modified(FlowGRPO(trained_steps=4), name)
    for other in between:
        if other != name:
            inner = MODIFIERS[other](inner)
    with pytest.raises(ValueError, match=f"{kind.__name__} must be around none of its kind"):
        kind(inner)


def test_shaped_advantages_say_where_nothing_is_standardized():
    rewards = torch.tensor([[0.0, 1.0, 5.0]])
    plain = TMPO(group_size=3, standardise=False)
    assert plain.advantages(rewards).tolist() == [[-4.0, -2.0, 6.0]]
    with pytest.raises(ValueError, match="standardise must be True where a modifier shapes"):
        ShapedAdvantages(plain).advantages(rewards)
    shaped = ShapedAdvantages(TMPO(group_size=3)).advantages(rewards)
    assert not torch.equal(shaped, TMPO(group_size=3).advantages(rewards))
