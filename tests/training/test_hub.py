"""Publishing against a local server that speaks the hub's upload calls; the token goes there and nowhere else."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from library.training.model_card import Card, render

TOKEN = "hf_secrettokenforthistest"


class Hub(ThreadingHTTPServer):
    """Accepts one token, remembers repositories and commits."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.fails = False
        self.away = False


class Answers(BaseHTTPRequestHandler):
    """The calls that huggingface_hub makes for an upload of small files."""

    def log_message(self, *_):
        """Silence."""

    def _answer(self, value: object, code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.server.away:
            self._answer({"error": "nobody home"}, 404)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        else:
            self._answer({"name": "painter", "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.fails:
            self._answer({"error": "out of order"}, 500)
        elif self.path == "/api/repos/create":
            made = json.loads(body)
            self.server.repositories.append(made)
            here = f"http://127.0.0.1:{self.server.server_port}/painter/{made['name']}"
            self._answer({"url": here, "name": f"painter/{made['name']}"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._answer({"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            address = f"http://127.0.0.1:{self.server.server_port}/painter/net/commit/abc"
            self._answer({"commitUrl": address, "commitOid": "abc", "pullRequestUrl": None})
        else:
            self._answer({"error": self.path}, 404)


@pytest.fixture
def hub(monkeypatch):
    """A running server that huggingface_hub takes for the hub."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", address)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()


def test_a_finished_run_is_published(project, tmp_path, hub, monkeypatch, caplog, capfd):
    """Network and card arrive; the token is in no file and no output."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    options = {"push_to_hub": True, "hub_model_id": "net", "trigger_words": "<b>zap</b>"}
    assert project.train(**options) == 0
    out = tmp_path / "out"
    made = hub.repositories[0]
    assert made["name"] == "net" and "private" in (made.get("visibility"), made.get("private") and "private")
    assert hub.files["net.safetensors"] == (out / "net.safetensors").read_bytes()
    card = hub.files["README.md"].decode()
    assert "base_model: " in card and "FluxFillPipeline" in card and "ComfyUI" in card
    assert "&lt;b&gt;zap" in card
    assert str(tmp_path) not in card
    printed = "".join(capfd.readouterr()) + caplog.text
    assert "uploaded to" in printed
    assert TOKEN not in printed
    for path in out.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_a_token_on_the_command_line_is_not_written_down(project, tmp_path, hub, capfd):
    """hub_token works, and is masked everywhere."""
    assert project.train(push_to_hub=True, hub_token=TOKEN, hub_model_id="painter/net") == 0
    assert "README.md" in hub.files
    assert all(TOKEN.encode() not in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert all(TOKEN.encode() not in content for content in hub.files.values())
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_wrong_token_is_found_before_training(project, tmp_path, hub, capsys):
    """Not after a night of work."""
    assert project.train(push_to_hub=True, hub_token="hf_wrong") == 2
    error = capsys.readouterr().err
    assert "does not accept the token" in error and "hf_wrong" not in error
    assert not (tmp_path / "out/net.safetensors").exists()
    assert project.train(push_to_hub=True) == 2
    assert "HF_TOKEN" in capsys.readouterr().err


def test_a_failing_upload_leaves_the_network(project, tmp_path, hub, capsys):
    """The message says what to do; the run counts as finished."""
    hub.fails = True
    assert project.train(push_to_hub=True, hub_token=TOKEN) == 2
    assert "finished and saved" in capsys.readouterr().err
    assert (tmp_path / "out/net.safetensors").exists()
    assert json.loads((tmp_path / "out/run.json").read_text())["finished_steps"] == 3


def test_a_card_holds_no_markup_of_the_user():
    """Captions and settings are text, in Markdown, HTML and YAML."""
    text = 'x" | y\n---\n<script>alert(1)</script> [a](javascript:b)'
    card = Card("n", "n.safetensors", "b", ("edit", "mask"), 30.0, 5, 4, (64, 64), (text,), None,
                [("images/a.png", text)], [("key", text)], [("items", text)])  # fmt: skip
    rendered = render(card)
    front, body = rendered.split("\n---\n", 1)
    assert "<script>" not in body
    assert not re.search(r"(?<!\\)\]\(javascript", body)
    assert front.count("\n") == len(front.splitlines()) - 1
    import yaml

    assert yaml.safe_load(front.removeprefix("---\n"))["widget"][0]["text"] == text


def test_a_hub_that_is_away_at_the_end_gets_it_by_the_same_command(project, tmp_path, hub, capsys, caplog):
    """The card is on the disk; running again uploads what the first time could not, once."""
    options = {"push_to_hub": True, "hub_token": TOKEN, "hub_model_id": "net"}
    hub.fails = True
    assert project.train(**options) == 2
    assert "Run the same command again to upload it" in capsys.readouterr().err
    out = tmp_path / "out"
    assert "# net" in (out / "README.md").read_text()
    assert project.train(**options) == 2, "still away"
    hub.fails = False
    assert project.train(**options) == 0
    assert "nothing is left to do" in caplog.text and "uploaded to" in caplog.text
    assert hub.files["README.md"] == (out / "README.md").read_bytes()
    assert hub.files["net.safetensors"] == (out / "net.safetensors").read_bytes()
    hub.files.clear()
    assert project.train(**options) == 0
    assert not hub.files and not (out / "upload.json").exists()


def test_a_hub_that_cannot_be_reached_is_not_called_a_wrong_token(project, hub, capsys):
    """What the user has to mend is another thing."""
    hub.away = True
    assert project.train(push_to_hub=True, hub_token=TOKEN) == 2
    error = capsys.readouterr().err
    assert "the hub cannot be reached" in error and "token" not in error.replace("hub_token", "")


def test_what_is_uploaded_is_what_the_card_speaks_of(project, tmp_path, hub):
    """The file that diffusers loads whole, graphs for ComfyUI, the repository's own name; no network on the way."""
    options = {"push_to_hub": True, "hub_token": TOKEN, "hub_model_id": "net", "train_x_embedder": True}
    assert project.train(**options, save_every_n_steps=2, save_every_n_epochs=1, max_train_steps=5) == 0
    card = hub.files["README.md"].decode()
    assert 'load_lora_weights("painter/net", weight_name="net_diffusers.safetensors")' in card
    networks = {name for name in hub.files if name.endswith(".safetensors")}
    assert networks == {"net.safetensors", "net_diffusers.safetensors"}
    graphs = {name for name in hub.files if name.endswith(".json")}
    assert graphs and all(f"`{name.replace('_', chr(92) + '_')}`" in card for name in graphs)
    assert "Further files: `net\\_diffusers.safetensors`" in card


def compiled(card: str) -> str:
    """The card's Python, which is Python."""
    code = card.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    return code


def test_the_card_of_every_mode_shows_its_own_call():
    """Spatial networks are given a canvas, and what diffusers cannot load is not said to load."""
    shown = {
        mode: render(Card("n", "n.safetensors", "b", (mode,), 30.0, 5, 4, (64, 48), repository="me/n",
                          diffusers_file="n.safetensors"))
        for mode in ("edit", "mask", "spatial")
    }  # fmt: skip
    assert "canvas" not in compiled(shown["edit"]) + compiled(shown["mask"])
    spatial = compiled(shown["spatial"])
    assert "(128, 48)" in spatial and "mask.paste(255, (64, 0, 128, 48))" in spatial
    assert "image=canvas" in spatial and "width=128, height=48" in spatial and "crop((64, 0, 128, 48))" in spatial
    assert "ImagePadForOutpaint" in shown["spatial"] and "InstructPixToPix" in shown["edit"]
    none = render(Card("n", "n.safetensors", "b", ("edit",), 30.0, 5, 4, (64, 48)))
    assert "cannot load this kind" in none and "load_lora_weights" not in none
