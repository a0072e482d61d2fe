"""Agents' command-line programs, unmodified: what they print is what a plain request gets for what they sent, and a
session that outgrows the model's context is compacted and goes on."""

import json
import re
from typing import Any

import pytest

from conftest import Program, ServerOf
from recorded import Exchange, Recorded

pytestmark = pytest.mark.slow

ROOM = 262_144  # tokens
STORY = "Once there was a small house at the edge of a wood, and nobody had lived in it for a long time. "
PROMPT = "What is said in the story?"


def claude(program: Program, server: Recorded, *arguments: str, **environment: str) -> dict[str, Any]:
    quiet = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "API_TIMEOUT_MS": "270000", "IS_SANDBOX": "1"}
    asked = {"ANTHROPIC_BASE_URL": server.url, "ANTHROPIC_API_KEY": "none", "ANTHROPIC_MODEL": "tiny"}
    command = ("claude", "-p", *arguments, "--output-format", "json")
    found: dict[str, Any] = json.loads(program(*command, **quiet, **asked, **environment))
    assert (found["subtype"], found["is_error"]) == ("success", False)
    return found


def codex(program: Program, server: Recorded, *arguments: str, window: int = ROOM) -> str:
    """What the agent says last."""
    config = (
        f'model = "tiny"\nmodel_context_window = {window}\nmodel_provider = "kvist"\nweb_search = "disabled"\n'
        "check_for_update_on_startup = false\n[analytics]\nenabled = false\n"
        f'[model_providers.kvist]\nname = "Kvist"\nbase_url = "{server.url}/v1"\nwire_api = "responses"\n'
    )
    command = ("codex", "exec", *arguments, "--skip-git-repo-check", "--json")
    printed = program(*command, files={"home/.codex/config.toml": config})
    events = [json.loads(line) for line in printed.splitlines()]
    assert events[-1]["type"] == "turn.completed"
    said = [event["item"]["text"] for event in events if event.get("item", {}).get("type") == "agent_message"]
    return str(said[-1])


def opencode(program: Program, server: Recorded, *arguments: str, window: int = ROOM) -> str:
    config = {
        "model": "kvist/tiny",
        "autoupdate": False,
        "share": "disabled",
        "provider": {
            "kvist": {
                "npm": "@ai-sdk/openai-compatible",
                "options": {"baseURL": f"{server.url}/v1"},
                "models": {"tiny": {"limit": {"context": window, "output": 1000}}},
            }
        },
    }
    quiet = {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}
    files = {"home/.config/opencode/opencode.json": json.dumps(config)}
    return program("opencode", "run", *arguments, files=files, **quiet)


def answered(server: Recorded, printed: str) -> Exchange:
    """The last exchange, whose prompt is in it and whose text was printed: what a plain request gets, too."""
    last = server.exchanges[-1]
    assert last.status == 200
    assert PROMPT in last.text_of()
    text = server.plain(last)
    assert text
    assert printed.strip().endswith(text)
    server.exchanges.pop()  # the plain one
    return last


def compacted(server: Recorded, first: str) -> list[int]:
    """Which exchanges asked for a summary; what came after each holds it, and not the prompt that the session began
    with."""
    found = []
    for index, exchange in enumerate(server.exchanges):
        if exchange.status == 200 and re.search(r"(?i)summar", last_said(exchange)):
            found.append(index)
            after = server.exchanges[index + 1]
            assert first in exchange.text_of()
            assert first not in after.text_of()
            server.plain(exchange)
    return found


def test_claude_code(program: Program, server_of: ServerOf) -> None:
    server = server_of(ROOM)
    found = claude(program, server, PROMPT, "--max-turns", "1")
    answered(server, found["result"])
    assert found["modelUsage"].keys() == {"tiny"}


def test_codex(program: Program, server_of: ServerOf) -> None:
    server = server_of(ROOM)
    answered(server, codex(program, server, PROMPT))


def test_opencode(program: Program, server_of: ServerOf) -> None:
    server = server_of(ROOM)
    answered(server, opencode(program, server, PROMPT))


def test_qwen_code(program: Program, server_of: ServerOf) -> None:
    server = server_of(ROOM)
    asked = {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "none", "OPENAI_MODEL": "tiny"}
    settings = {"privacy": {"usageStatisticsEnabled": False}, "general": {"disableAutoUpdate": True}}
    files = {"home/.qwen/settings.json": json.dumps(settings)}
    answered(server, program("qwen", "-p", PROMPT, files=files, **asked))


def test_continue(program: Program, server_of: ServerOf) -> None:
    server = server_of(ROOM)
    config = (
        "name: local\nversion: 1.0.0\nschema: v1\nmodels:\n"
        f"  - {{name: tiny, provider: openai, model: tiny, apiBase: {server.url}/v1, apiKey: none}}\n"
    )
    command = ("cn", "-p", PROMPT, "--config", "../config.yaml")
    answered(server, program(*command, files={"config.yaml": config}, CONTINUE_TELEMETRY_ENABLED="0"))


def test_aider(program: Program, server_of: ServerOf) -> None:
    server = server_of(ROOM)
    asked = {"OPENAI_API_BASE": f"{server.url}/v1", "OPENAI_API_KEY": "none"}
    quiet = {"AIDER_ANALYTICS": "false", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    switches = ("--no-git", "--yes-always", "--no-check-update", "--no-show-model-warnings", "--no-pretty")
    printed = program("aider", "--model", "openai/tiny", *switches, "--message", PROMPT, **asked, **quiet)
    answered(server, printed.partition("\nTokens: ")[0])
