"""The official clients of both APIs against a real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import openai
import pytest
from conftest_types import Running  # type: ignore[import-not-found]
