"""A comparison that is killed leaves nothing running, not even while its server of forks still imports."""

import multiprocessing
import sys

import pytest

from neighbor_grpo.lab import compare


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_the_server_of_forks_is_tied_to_its_parent_before_it_imports_anything_else(monkeypatch):
    context, imported = multiprocessing.get_context("forkserver"), []
    monkeypatch.setattr(context, "set_forkserver_preload", imported.extend)
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)
    assert compare.in_processes({}, jobs=1) == {}
    assert imported[0] == "neighbor_grpo.lab.orphans"  # its page shows what that does


def test_interrupted_as_a_process_begins(monkeypatch):
    "The signal is what ends it, not an error about the process that is not there."

    def start(process):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(compare.how_to_start().Process()), "start", start)
    with pytest.raises(KeyboardInterrupt):
        compare.in_processes({"one": (print,)}, jobs=1)
