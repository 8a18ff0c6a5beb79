"""Small traces for tests, written as their formats are."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

AgentStep = tuple[float, float | None, int, int, Sequence[int]]
"""Seconds since the start, think time, prompt tokens, answer tokens, ids."""


def mooncake(path: Path, requests: Iterable[tuple[int, int, Sequence[int]]], output_tokens: int = 10) -> Path:
    """Write a trace of (timestamp in ms, prompt tokens, block ids)."""
    rows = [
        {"timestamp": at_ms, "input_length": tokens, "output_length": output_tokens, "hash_ids": list(ids)}
        for at_ms, tokens, ids in requests
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def agentic(path: Path, conversations: Iterable[Iterable[AgentStep]], block_tokens: int = 64) -> Path:
    """Write a directory of conversations, of which each has its own blocks."""
    path.mkdir()
    for number, steps in enumerate(conversations):
        requests = [
            {"t": at_s, "type": "n", "in": tokens_in, "out": tokens_out, "hash_ids": list(ids)}
            | ({} if think_s is None else {"think_time": think_s, "api_time": 0.0})
            for at_s, think_s, tokens_in, tokens_out, ids in steps
        ]
        document = {"id": f"c{number}", "block_size": block_tokens, "requests": requests}
        (path / f"conversation_{number:03}.json").write_text(json.dumps(document))
    return path


def burstgpt(path: Path, requests: Iterable[tuple[float, int, int]]) -> Path:
    """Write a trace without block ids, of (timestamp in s, prompt tokens, answer tokens)."""
    lines = ["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"]
    lines += [f"{at_s},ChatGPT,{tokens},{answer},{tokens + answer},API log" for at_s, tokens, answer in requests]
    path.write_text("\n".join(lines) + "\n")
    return path
