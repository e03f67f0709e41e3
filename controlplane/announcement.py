"""What `make up` says once everything runs: where to look, and what to type."""

import shlex
import shutil
from typing import TextIO

from controlplane.config import Config
from controlplane.demo import OPERATOR, Secrets, secrets_path

BOLD, PLAIN = "\033[1m", "\033[0m"


def address(config: Config) -> str:
    """The base URL as typed on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{config.port}"


def curl_line(config: Config, key: str, model: str, *, chats: bool) -> str:
    """A stream that works when pasted: a chat, or for a model without a chat template a completion."""
    asked = '"messages": [{"role": "user", "content": "What is a penstock?"}]' if chats else '"prompt": "A penstock"'
    body = f'{{"model": "{model}", "stream": true, {asked}}}'
    return (
        f"curl -N {address(config)}/v1/{'chat/' if chats else ''}completions -H 'Authorization: Bearer {key}' "
        f"-H 'Content-Type: application/json' -d '{body}'"
    )


def settings_prefix(config: Config) -> str:
    """The variables without which a command in another terminal would look for this system elsewhere."""
    chosen = [name for name in ("var", "host", "port") if name in config.model_fields_set]
    return "".join(f"PENSTOCK_{name.upper()}={shlex.quote(str(getattr(config, name)))} " for name in chosen)


def announce(config: Config, secrets: Secrets | None, model: str, out: TextIO, *, chats: bool = True) -> None:
    """Print the block. `chats`: the model has a chat template."""
    bold, plain = (BOLD, PLAIN) if out.isatty() else ("", "")
    rule = "-" * min(shutil.get_terminal_size().columns, 100)
    lines = ["", rule, f"{bold}Penstock is running.{plain}", "", f"  Dashboard   {bold}{address(config)}/{plain}"]
    if secrets:
        tenant, key = next(iter(secrets.keys.items()))
        lines += [
            f"  Login       {OPERATOR} / {secrets.password or 'the password that you gave it'}",
            f"  API key     {key}   (tenant {tenant}; all are in {secrets_path(config)})",
            f"  API docs    {address(config)}/api/docs",
            "",
            "  Try it:",
            f"  {curl_line(config, key, model, chats=chats)}",
            "",
            f"  Send traffic from another terminal:   {settings_prefix(config)}make load",
        ]
    else:
        lines += ["  Make a key:   .venv/bin/python manage.py create_key --tenant NAME"]
    lines += ["  Stop everything:                      Ctrl-C", rule, ""]
    out.write("\n".join(lines) + "\n")
    out.flush()
