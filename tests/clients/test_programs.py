"""Agents' command-line programs, unmodified: what they print is what a plain request gets for what they sent, and a
session that outgrows the model's context is compacted and goes on."""

import json
from typing import Any

import pytest
from fixture_types import Program, ServerOf
from recorded import Recorded, answered

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


def qwen(program: Program, server: Recorded, *arguments: str, window: int = ROOM) -> str:
    asked = {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "none", "OPENAI_MODEL": "tiny"}
    settings = {
        "privacy": {"usageStatisticsEnabled": False},
        "general": {"disableAutoUpdate": True},
        "model": {"generationConfig": {"contextWindowSize": window}},
    }
    files = {"home/.qwen/settings.json": json.dumps(settings)}
    return program("qwen", *arguments[:-1], "-p", arguments[-1], files=files, **asked)


def tell(chapters: int, times: int) -> list[str]:
    """The turns of a session that becomes too long."""
    return [f"Chapter {number}. {STORY * times}{PROMPT}" for number in range(chapters)]


def compacted(server: Recorded, asking: str) -> list[int]:
    """Which exchanges asked for a summary, by the words that do so. What is asked after the first of them holds the
    summary and no longer the first chapter."""
    found = [index for index, exchange in enumerate(server.exchanges) if asking in exchange.sent]
    first, *later = server.exchanges[found[0] :]
    assert first.status == 200
    assert "Chapter 0." in first.sent
    assert server.plain(first) in later[0].sent
    assert [exchange for exchange in later if "Chapter 0." in exchange.sent] == []
    return found


def test_claude_code(program: Program, server_of: ServerOf) -> None:
    server = server_of(ROOM)
    found = claude(program, server, PROMPT, "--max-turns", "1")
    answered(server, found["result"], PROMPT)
    assert found["modelUsage"].keys() == {"tiny"}


def test_codex(program: Program, server_of: ServerOf) -> None:
    server = server_of(ROOM)
    answered(server, codex(program, server, PROMPT), PROMPT)


def test_opencode(program: Program, server_of: ServerOf) -> None:
    server = server_of(ROOM)
    answered(server, opencode(program, server, PROMPT), PROMPT)


def test_qwen_code(program: Program, server_of: ServerOf) -> None:
    server = server_of(ROOM)
    answered(server, qwen(program, server, PROMPT), PROMPT)


def test_continue(program: Program, server_of: ServerOf) -> None:
    server = server_of(ROOM)
    config = (
        "name: local\nversion: 1.0.0\nschema: v1\nmodels:\n"
        f"  - {{name: tiny, provider: openai, model: tiny, apiBase: {server.url}/v1, apiKey: none}}\n"
    )
    command = ("cn", "-p", PROMPT, "--config", "../config.yaml")
    answered(server, program(*command, files={"config.yaml": config}, CONTINUE_TELEMETRY_ENABLED="0"), PROMPT)


def test_aider(program: Program, server_of: ServerOf) -> None:
    server = server_of(ROOM)
    asked = {"OPENAI_API_BASE": f"{server.url}/v1", "OPENAI_API_KEY": "none"}
    quiet = {"AIDER_ANALYTICS": "false", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    switches = ("--no-git", "--yes-always", "--no-check-update", "--no-show-model-warnings", "--no-pretty")
    printed = program("aider", "--model", "openai/tiny", *switches, "--message", PROMPT, **asked, **quiet)
    answered(server, printed, PROMPT)


def test_claude_code_compacts_and_goes_on(program: Program, server_of: ServerOf) -> None:
    """It believes in a context of 200,000 tokens, and learns of the server's from the refusal."""
    server = server_of(80_000)
    for turn in tell(6, 200):
        found = claude(program, server, "--continue", turn)
        answered(server, found["result"], turn[:12])
    summaries = compacted(server, "an <analysis> block followed by a <summary> block")
    refused = [index for index, exchange in enumerate(server.exchanges) if exchange.status == 400]
    assert refused == [index - 1 for index in summaries]
    for index in refused:
        before, after = server.exchanges[index], server.exchanges[index + 2]
        assert "prompt is too long" in before.answer
        assert after.status == 200
        assert after.turn == before.turn  # the very turn that was refused


def test_claude_code_compacts_before_it_is_refused(program: Program, server_of: ServerOf) -> None:
    server = server_of(120_000)
    for turn in tell(5, 200):
        found = claude(program, server, "--continue", turn, CLAUDE_CODE_AUTO_COMPACT_WINDOW="120000")
        answered(server, found["result"], turn[:12])
    assert compacted(server, "an <analysis> block followed by a <summary> block")
    assert {exchange.status for exchange in server.exchanges} == {200}


def test_codex_compacts_and_goes_on(program: Program, server_of: ServerOf) -> None:
    """It keeps the last 80,000 letters of what the user said, whatever tokens they are."""
    server = server_of(131_072)
    for number, turn in enumerate(tell(8, 310)):
        session = ("resume", "--last") if number else ()
        answered(server, codex(program, server, *session, turn, window=120_000), turn[:12])
    assert compacted(server, "CONTEXT CHECKPOINT COMPACTION")
    assert {exchange.status for exchange in server.exchanges} == {200}


def test_opencode_compacts_and_goes_on(program: Program, server_of: ServerOf) -> None:
    server = server_of(65_536)
    for number, turn in enumerate(tell(5, 200)):
        session = ("--continue",) if number else ()
        answered(server, opencode(program, server, *session, turn, window=60_000), turn[:12])
    assert compacted(server, "context summarization agent")
    assert {exchange.status for exchange in server.exchanges} == {200}


def test_qwen_code_compacts_and_goes_on(program: Program, server_of: ServerOf) -> None:
    server = server_of(80_000)
    for number, turn in enumerate(tell(5, 200)):
        session = ("--continue",) if number else ()
        answered(server, qwen(program, server, *session, turn, window=80_000), turn[:12])
    assert compacted(server, "summarizes internal chat history")
    assert {exchange.status for exchange in server.exchanges} == {200}
