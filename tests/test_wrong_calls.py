"""Wrong command lines get one line on standard error and exit status 1, and nothing is written."""

import pytest

from neighbor_grpo.cli import main

WRONG = """
trian
train faces
train toy --algorithm ppo
train toy --iterations many
train toy --lr 0
train toy --lr nan
train toy --sigma 1.5
train toy --anchors 13
train toy --method rk4
train toy --sigmaa 0.3
train toy --batch-size 12
train toy --iter 10
train toy --lr
train toy --algorithm dance --sigma 0.3
train toy --chunk 2
train toy --with glasses
train toy --algorithm nft --with guard
train sd3
train --recipe sd3.5-medium
train --recipe sd4
train --target 12
train --resume
train --out nowhere --resume
evaluate nowhere
evaluate
save nowhere
serve
serve --rewards beauty
pretrain
pretrain --out taken
pretrain --out fourth --steps 0
bench --network resnet
bench --iterations 0
bench --model sd4
compare
compare --out third
compare toy --variants neighbor neighbor --seeds 0 --iterations 5 --out third
compare toy --variants neighbor dance --seeds 0 --out third
compare --study nowhere.yaml
compare toy --variants neighbor --seeds 0 --iterations 5 --out taken
""".split("\n")[1:-1]


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_call_ends_in_one_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("runs", "taken"):  # new runs go into the first; the second is somebody's
        (tmp_path / name).mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert main(line.split()) == 1
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and said.err.startswith("neighbor-grpo: ")
    assert sorted(tmp_path.rglob("*")) == before
