"""What `save` leaves for others, and `--push`: a card without secrets, and a hub that is asked only when told to."""

import json
import re
import threading
from contextlib import contextmanager

import huggingface_hub
import pytest
import uvicorn
import yaml
from huggingface_hub import constants
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from neighbor_grpo import cli
from neighbor_grpo.cli import main
from neighbor_grpo.lab import share
from neighbor_grpo.runs.folder import read_config

TOKEN = "hf_" + "secret" * 5
RUN = (
    "train sd3 --quiet --iterations 2 --groups 2 --group_size 4 --anchors 2 --steps 2 --trained_steps 1 --eval_every 2 "
    "--source miniature --height 32 --width 32 --max_sequence_length 16 --precision float32 --lora_rank 2 --lr 0.002 "
    "--lora_alpha 0 --guidance_scale 1 --train_guidance_scale 1 --eval_images 4 --eval_steps 2"
)


class Hub:
    "As much of the hub as an upload asks for; what it was asked and given."

    def __init__(self, refuse="", private=True):
        self.refuse, self.private, self.asked, self.files, self.made = refuse, private, [], {}, None
        self.app = Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST", "PUT", "HEAD"])])

    async def answer(self, request):
        path, body = request.url.path, await request.body()
        self.asked.append((request.method, path, request.headers.get("authorization")))
        if self.refuse and self.refuse in path:
            return JSONResponse({"error": f"no entry for {TOKEN}"}, 403)
        if path == "/api/repos/create":
            self.made = json.loads(body)
            return JSONResponse({"url": f"{self.address}/me/mine", "id": "me/mine", "name": "me/mine"})
        if path == "/api/models/me/mine":
            return JSONResponse({"id": "me/mine", "private": self.private, "siblings": []})
        if path.endswith("/preupload/main"):
            names = [entry["path"] for entry in json.loads(body)["files"]]
            kinds = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return JSONResponse({"files": kinds})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = line["value"]["content"]
            address = f"{self.address}/me/mine/commit/1"
            return JSONResponse({"commitUrl": address, "commitOid": "0" * 40, "hookOutput": ""})
        return JSONResponse({}, 200 if "validate" in path else 404)


@contextmanager
def serving(monkeypatch, **how):
    "A local stand-in of the hub, which the library takes for the real one, and a token."
    hub = Hub(**how)
    server = uvicorn.Server(uvicorn.Config(hub.app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
    hub.address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(share, "HfApi", lambda: huggingface_hub.HfApi(endpoint=hub.address))
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A short run of the miniature, with files in a place that nobody else has to know."
    place = tmp_path_factory.mktemp("secret-place")
    (place / "p.txt").write_text("two red circles\na blue square\n")
    words = f"{RUN} --prompts {place / 'p.txt'} --out {place / 'run'}".split()
    assert main(words) == 0
    return place / "run"


def card_of(folder):
    text = (folder / "README.md").read_text()
    return text, yaml.safe_load(text.split("---\n")[1])


@pytest.mark.slow
def test_a_card_says_what_it_is_and_no_secrets(run, tmp_path, capsys):
    assert main(["evaluate", str(run), "--json", "--out", str(tmp_path / "f.json")]) == 0
    assert main(["save", str(run), "--out", str(tmp_path / "plain")]) == 0
    assert main(["save", str(run), "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "f.json")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "pytorch_lora_weights.safetensors"}
    text, front = card_of(tmp_path / "out")
    assert front["license"] == "apache-2.0" and "lora" in front["tags"] and "base_model" not in front
    assert "NeighborGRPO" in text and "compressibility" in text and "±" in text and "load_lora_weights" in text
    assert "±" not in card_of(tmp_path / "plain")[0]
    assert str(run.parent) not in text and "secret-place" not in text
    # the command makes the same run
    command = re.search(r"```sh\nneighbor-grpo (.*)\n```", text)[1]
    _, (task, algorithm, loop), _ = cli.read_command(command.replace("p.txt", str(run.parent / "p.txt")).split()[1:])
    config = read_config(run)
    assert vars(task) == config["task"] and vars(loop) == config["training"]
    assert json.loads(json.dumps(vars(algorithm))) == config["algorithm"]
    # the code of the card runs
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace('"run"', repr(str(tmp_path / "out")))
    exec(code, {})
    capsys.readouterr()
    assert main(["save", str(run), "--figures", str(tmp_path / "out" / "README.md")]) == 1
    assert "--figures must be what evaluate --json wrote" in capsys.readouterr().err


@pytest.mark.slow
def test_a_push_is_private_and_the_token_goes_nowhere(run, tmp_path, monkeypatch, capfd):
    with serving(monkeypatch) as hub:
        assert main(["save", str(run), "--out", str(tmp_path / "kept")]) == 0 and not hub.asked
        assert main(["save", str(run), "--out", str(tmp_path / "out"), "--push", "me/mine"]) == 0
    assert hub.made["name"] == "mine" and (hub.made.get("private") or hub.made.get("visibility") == "private")
    assert set(hub.files) == {"README.md", "pytorch_lora_weights.safetensors"}
    assert {authorization for *_, authorization in hub.asked} <= {f"Bearer {TOKEN}", None}
    text, _ = card_of(tmp_path / "out")
    said = capfd.readouterr()
    assert 'load_lora_weights("me/mine")' in text and f"{hub.address}/me/mine" in said.out
    written = b"".join(path.read_bytes() for path in (*tmp_path.rglob("*"), *run.rglob("*")) if path.is_file())
    assert TOKEN not in said.out + said.err and TOKEN.encode() not in written


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, why",
    [(dict(refuse="/api/"), "403"), (dict(refuse="/commit"), "403"), (dict(private=False), "private, or --public")],
)
def test_a_push_that_fails_leaves_the_folder(run, tmp_path, monkeypatch, capfd, how, why):
    with serving(monkeypatch, **how) as hub:
        assert main(["save", str(run), "--out", str(tmp_path / "out"), "--push", "me/mine"]) == 1
    said = capfd.readouterr()
    assert why in said.err and "me/mine" in said.err and TOKEN not in said.out + said.err and not hub.files
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "pytorch_lora_weights.safetensors"}


def test_names_that_the_hub_cannot_have_are_refused_before_anything(tmp_path, capsys):
    for name in ("mine", "a/b/c", "me/mi ne", "me/..", ""):
        assert main(["save", str(tmp_path), "--push", name]) == 1
        assert "--push must be OWNER/NAME" in capsys.readouterr().err


def test_licenses_come_from_the_base_or_not_at_all(tmp_path):
    assert share.license_of("miniature") == {"license": "apache-2.0"}
    texts = {"a": "---\nlicense: other\nlicense_name: own\nextra: 1\n---\n", "b": "no front", "c": "---\n: : [\n---\n"}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(text)
    assert share.license_of(str(tmp_path / "a")) == {"license": "other", "license_name": "own"}
    assert share.license_of(str(tmp_path / "b")) == share.license_of(str(tmp_path / "c")) == {}
