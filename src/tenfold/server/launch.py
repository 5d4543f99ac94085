"""`tenfold serve`: from a checkpoint to a service."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tenfold.engine.engine import Engine, EngineSettings
from tenfold.engine.llm import require_tokenizer, start_native
from tenfold.engine.loop import EngineLoop
from tenfold.kernels import cpu
from tenfold.memory import available_memory
from tenfold.models.native import NativeModel
from tenfold.server import keys
from tenfold.server.settings import Settings
from tenfold.tokenizer import Tokenizer

Quantization = Literal["bf16", "int8", "int4"]
KvFormat = Literal["fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The knobs of the engine; none of them changes an answer, but for the first two."""

    quantization: Quantization | None = None  # how the weights are packed: bf16, or as a packed folder has them
    kv_format: KvFormat = "bf16"  # of keys and values; in int8 twice as long a context fits
    threads: int | None = None  # of the kernels; without it one per core that the process may use
    memory: float = 1.0  # GB for running requests and cached prefixes, beside the weights
    max_batch: int = 8  # requests that run at once
    max_queue: int = 256  # requests that wait beyond those; more are answered with 429
    drafts: int = 4  # tokens that multi-token prediction proposes at most; 0 turns it off
    prefix_cache_dir: Path | None = None  # folder where cached prefixes outlive the process
    prefix_cache_gb: float = 16.0  # of that folder


def launch(model: str, host: str, port: int, options: EngineOptions, settings: Settings) -> None:
    """Serves a model until SIGTERM. Raises ValueError, OSError, MemoryError."""
    try:
        from tenfold.server.app import create_app
        from tenfold.server.serve import bound, serve
    except ImportError as error:
        raise ValueError(f"{error.name} is missing, which the service needs: pip install 'tenfold[serve]'") from None
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port {port}: there are 0 to 65535")
    logging.basicConfig(format="tenfold: %(message)s", level=logging.WARNING)
    settings = _with_defaults(_with_keys(settings, host), Path(model))
    with bound(host, port) as listener:  # before the model is read, which may take minutes
        engine, tokenizer, context = start_engine(model, options)
        try:
            settings = _for_model(settings, model, context)
            serve(create_app(engine, tokenizer, settings), settings, listener)
        finally:
            asyncio.run(engine.drain(0))  # or its thread, and the weights with it, would outlive the interpreter


def start_engine(model: str, options: EngineOptions) -> tuple[EngineLoop, Tokenizer, int]:
    """The engine in its thread, the tokenizer, and the tokens that a context can have.

    Raises ValueError where the checkpoint has no tokenizer or the memory is not there, and as `load_native`.
    """
    native, tokenizer = _load(model, options)
    _require_room(options.memory)
    engine = Engine(
        native,
        EngineSettings(
            memory_bytes=int(options.memory * 1e9),
            max_batch=options.max_batch,
            max_waiting=options.max_queue,
            max_drafts=options.drafts,
            disk=options.prefix_cache_dir,
            disk_bytes=int(options.prefix_cache_gb * 1e9),
        ),
        tokenizer,
    )
    return EngineLoop(engine), tokenizer, engine.context


def _load(model: str, options: EngineOptions) -> tuple[NativeModel, Tokenizer]:
    if options.threads is not None:
        cpu.set_threads(options.threads)
    native, tokenizer = start_native(model, options.quantization, options.kv_format)
    return native, require_tokenizer(tokenizer, model)


def _require_room(memory: float) -> None:
    """Raises ValueError where the memory is not there: the engine fills it at once, and a container would be killed."""
    free = available_memory()
    if free is not None and memory * 1e9 > free:
        raise ValueError(f"--memory {memory:g}: {free / 1e9:.2f} GB are available beside the weights")


def _for_model(settings: Settings, model: str, context: int) -> Settings:
    """What is left to the model: its name, and as much context as it and the memory allow."""
    names = settings.model_names or (Path(model).name,)
    return replace(settings, model_names=names, context_length=min(settings.context_length or context, context))


def _with_keys(settings: Settings, host: str) -> Settings:
    """The keys of `tenfold keys`, where there are any and no other file is named.

    Raises ValueError or OSError where the file cannot be read.
    """
    path = settings.api_keys
    if path is None:
        path = keys.default_path() if keys.default_path().exists() else None
    elif not path.exists():
        raise ValueError(f"{path}: no such file; tenfold keys add NAME --api-keys {path} makes it")
    if path is not None:
        keys.KeyFile.read(path)
    elif not _is_loopback(host):
        print("tenfold: no keys: whoever reaches this address may ask. tenfold keys add makes one", file=sys.stderr)
    return replace(settings, api_keys=path)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _with_defaults(settings: Settings, model: Path) -> Settings:
    """How tokens are drawn where a request does not say: as the checkpoint's `generation_config.json` has it."""
    path = model / "generation_config.json"
    if not path.is_file():
        return settings
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}); copy or download it again") from None
    return replace(
        settings,
        temperature=_given(settings.temperature, config.get("temperature")),
        top_p=_given(settings.top_p, config.get("top_p")),
        top_k=_given(settings.top_k, config.get("top_k")),
    )


def _given(chosen: Any, offered: Any) -> Any:
    return offered if chosen is None and isinstance(offered, int | float) else chosen
