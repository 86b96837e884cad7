"""Ask a server that is about to start."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

ATTEMPTS = 600
"""Seconds that a server has to load the model."""


def asked(url: str, body: dict[str, Any], server: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The answer to a request in JSON, sent once a second until one comes, or the server has ended."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(request) as answer:
                found: dict[str, Any] = json.loads(answer.read())
                return found
        except (urllib.error.URLError, ConnectionError):
            assert server.poll() is None, f"the server ended with {server.returncode}"
            time.sleep(1)
    raise AssertionError(f"{url} did not answer")
