"""What `make up` says: lines that work when they are pasted."""

import io
from pathlib import Path

from controlplane.announcement import announce, curl_line
from controlplane.config import Config
from controlplane.demo import Secrets

SECRETS = Secrets(password="pass", keys={"checkout": "ps-key"})


def announced(config: Config) -> str:
    out = io.StringIO()
    announce(config, SECRETS, "demo", out)
    return out.getvalue()


def test_the_commands_for_another_terminal_carry_the_settings_that_find_this_system() -> None:
    text = announced(Config.model_validate({"port": 8123, "var": Path("/srv/my data")}))
    assert "PENSTOCK_VAR='/srv/my data' PENSTOCK_PORT=8123 make load" in text
    assert "http://127.0.0.1:8123/v1/chat/completions" in text
    assert "operator / pass" in text


def test_a_model_without_a_chat_template_is_asked_for_a_completion() -> None:
    line = curl_line(Config.model_construct(_fields_set=set()), "ps-key", "gpt", chats=False)
    assert "/v1/completions" in line
    assert '"prompt"' in line


def test_with_the_defaults_the_commands_are_plain() -> None:
    config = Config.model_construct(_fields_set=set())
    assert "terminal:   make load\n" in announced(config)
