"""The engine: requests in, tokens out, a step at a time, many requests to a step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from tenfold.engine.budget import Budget, divide
from tenfold.engine.cache_manager import Match, PrefixCache
from tenfold.engine.disk_cache import DiskCache
from tenfold.engine.generation import Generation
from tenfold.engine.llm import check_prompt, eos_ids
from tenfold.engine.logprobs import logprobs
from tenfold.engine.model_runner import EngineModel, Span
from tenfold.engine.request import FinishReason, Request, Update
from tenfold.engine.sampler import Floats, Sampler
from tenfold.engine.scheduler import Scheduler, Work
from tenfold.engine.speculative import Speculator
from tenfold.engine.step_cost import Acceptance, DraftLength, Patience, StepCost
from tenfold.engine.stopping import Stopping, Verdict
from tenfold.engine.structure import Constraint, Structure, StructureCompiler
from tenfold.tokenizer import Tokenizer

MOST_UNDRAFTED = 256  # hidden states that wait for the draft module while a request does without it


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The knobs of an engine. None of them changes a token."""

    memory_bytes: int = 1 << 30  # for running requests and the prefix cache, with what is on its way to the disk
    max_batch: int = 8  # requests that run at once
    max_waiting: int = 256  # requests that wait beyond those; 0 refuses what cannot run at once
    step_tokens: int = 256  # of a step, at most
    step_seconds: float = 0.25  # that a step should take at most while others wait for their next token
    alone_seconds: float = 0.15  # while prompts alone are read: for so long someone who comes may have to wait
    max_drafts: int = 4  # tokens drafted for a request in a step; 0 turns speculation off
    disk: Path | None = None  # folder of cached prefixes that outlive the process
    disk_bytes: int = 16 << 30

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "max_batch", "step_tokens", "disk_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("max_waiting", "max_drafts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")

    @property
    def places(self) -> int:
        """How many requests there can be, in the batch and in the queue."""
        return self.max_batch + self.max_waiting


@dataclass(kw_only=True)
class Stats:
    """Counters since the start, and the moment's figures."""

    waiting: int = 0
    running: int = 0
    pages_held: int = 0  # by running requests
    pages_used: int = 0  # with those of the prefix cache
    slots_held: int = 0
    slots_used: int = 0
    memory_used: int = 0  # bytes
    memory_total: int = 0
    disk_bytes: int = 0
    steps: int = 0
    finished: int = 0
    preempted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of those, that were not computed
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class QueueFull(Exception):
    """The engine takes no more requests for now."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} s")
        self.retry_after = retry_after  # seconds


class Engine:
    """Synchronous, for one thread: `add` requests and call `step` while it `has_work`."""

    def __init__(
        self,
        model: EngineModel,
        settings: EngineSettings,
        tokenizer: Tokenizer | None = None,
        budget: Budget | None = None,
    ) -> None:
        """tokenizer: without one there is no text, no stop string, no structure. budget: instead of the settings' own.

        Raises ValueError where the memory is too small for any request, and MemoryError.
        """
        self.model, self.settings = model, settings
        self._tokenizer = tokenizer
        self._structures = StructureCompiler(tokenizer) if tokenizer else None
        memory, disk = settings.memory_bytes, settings.disk
        self.budget = budget or divide(model, memory, settings.max_batch, settings.max_drafts, disk is not None)
        self.context = self.budget.context(model)
        model.allocate(self.budget.pages, self.budget.slots)
        self._drafts = model.can_draft and settings.max_drafts > 0
        self._cache = PrefixCache(model, self.budget.pages, self.budget.slots, self._drafts)
        buffer = self.budget.disk_buffer
        self._disk = DiskCache(model, self._cache, disk, settings.disk_bytes, buffer) if disk else None
        self._costs, self._acceptance, self._patience = StepCost(), Acceptance(), Patience()
        self._speculator = Speculator(model, self._cache, self._costs, settings.max_drafts)
        self._scheduler = Scheduler(self._cache, settings.max_batch, self._find, self._park)
        self._generations: dict[int, Generation] = {}
        self._arrivals = 0
        self._updates: list[Update] = []
        self._stats = Stats()
        self._finished_at = deque([time.monotonic()], maxlen=32)

    # ---- requests

    def check(self, request: Request) -> None:
        """Raises ValueError for what could never be answered. May be called from any thread."""
        check_prompt(request.prompt_ids, self.model.config)
        if len(request.prompt_ids) > self.context:
            raise ValueError(
                f"the prompt has {len(request.prompt_ids)} tokens, the caches hold {self.context}: shorten it, or give "
                "more memory"
            )
        request.params.check_vocabulary(self.model.config.vocab_size)

    def add(self, request: Request) -> None:
        """Raises ValueError for what could never be answered, and QueueFull."""
        generation = self.prepare(request)
        if len(self._generations) >= self.settings.places:
            raise QueueFull(self.retry_after)
        self.start(generation)

    def prepare(self, request: Request) -> Generation:
        """The slow part of adding one, for any thread. Raises ValueError."""
        self.check(request)
        params, eos = request.params, () if request.params.ignore_eos else self._eos_ids
        stops = frozenset((*params.stop_ids, *eos))
        decoder = self._tokenizer and self._tokenizer.stream(skip_special_tokens=True)
        return Generation(
            request=request,
            sampler=Sampler(params, request.prompt_ids, eos),
            stopping=Stopping(stops, strings=params.stop, decoder=decoder, min_tokens=params.min_tokens),
            stop_ids=stops,
            constraint=self._constraint(params.structure) if params.structure else None,
            draft_length=DraftLength(self._costs, self._acceptance, self._patience),
            last_token=min(self.context, len(request.prompt_ids) + params.max_tokens),
            drafts_follow=self._drafts,
            stored=self._disk.find(request.isolation, request.prompt_ids) if self._disk else [],
        )

    def _constraint(self, structure: Structure) -> Constraint:
        if self._structures is None:
            raise ValueError("structured output needs a tokenizer, and there is none")
        return self._structures.compile(structure)

    @property
    def _eos_ids(self) -> tuple[int, ...]:
        return (*eos_ids(self.model.config), *(self._tokenizer.stop_ids if self._tokenizer else ()))

    def start(self, generation: Generation) -> None:
        """Queues what was prepared, full or not. Raises ValueError for an id in use."""
        request_id = generation.request.id
        if request_id in self._generations:
            raise ValueError(f"request {request_id} is under way: another needs another id")
        self._arrivals += 1
        generation.arrival = self._arrivals
        self._generations[request_id] = generation
        self._scheduler.add(generation)

    @property
    def retry_after(self) -> float:
        """Seconds until the queue is likely to have room, by how fast requests ended of late."""
        ended = self._finished_at
        return max(1.0, (time.monotonic() - ended[0]) / len(ended))

    def cancel(self, request_id: int) -> None:
        """Ends a request, with an update of the next step; one that is unknown or has ended is none."""
        if generation := self._generations.get(request_id):
            self._end(generation, "cancelled")

    @property
    def has_work(self) -> bool:
        return bool(self._generations or self._updates or (self._disk and self._disk.has_work))

    # ---- a step

    @torch.no_grad()
    def step(self) -> list[Update]:
        """Runs all that fits in a step; what became of the requests. Never raises for what one of them causes."""
        try:
            self._run()
        except Exception as error:  # a model's, whatever it is: those in the step are lost, the others are not
            for generation in list(self._scheduler.running or self._scheduler.waiting[:1]):
                self._fail(generation, error)
        if self._disk:
            self._disk.write_some(idle=not self._generations)
        updates, self._updates = self._updates, []
        return updates

    def _run(self) -> None:
        if self._disk:
            self._disk.receive()
        started = time.perf_counter()
        work = self._scheduler.plan(self._step_tokens())
        if not work:
            if self._disk:
                self._disk.wait()
            return
        self._stats.steps += 1
        started += self._speculator.draft(work)  # which has a measurement of its own
        hidden = self._forward(work)
        drawing = [index for index, part in enumerate(work) if part.count == part.generation.remaining]
        logits = self._logits([self._rows(work[index].generation, hidden[index]) for index in drawing])
        for part, rows in zip(work, hidden, strict=True):
            self._note_prompt_logprobs(part.generation, rows)
        tables = dict(zip(drawing, logits, strict=True))
        for index, part in enumerate(work):
            self._advance(part, hidden[index], tables.get(index))
        if tokens := sum(map(len, hidden)):
            self._costs.observe(tokens, time.perf_counter() - started)
        self._close_step([part.generation for part in work])

    def _step_tokens(self) -> int:
        """Large steps are quicker in all; small ones keep those that decode, and those that come, from waiting long."""
        settings, most = self.settings, self.settings.step_tokens
        if any(generation.decodes for generation in self._scheduler.running):
            return self._costs.tokens_within(settings.step_seconds, most, min(32, most))
        return self._costs.tokens_within(settings.alone_seconds, most, min(self.model.thrifty_tokens, most))

    def _forward(self, work: Sequence[Work]) -> list[Tensor]:
        """Hidden states `[T, D]` of each part's tokens and drafts; none where it has no tokens."""
        spans = [_span(part) for part in work]
        running = [span for span in spans if span.tokens]
        if not running:
            return [torch.empty(0) for _ in spans]
        hidden = self.model.forward(running)
        return list(hidden.split([len(span.tokens) for span in spans]))

    @staticmethod
    def _rows(generation: Generation, hidden: Tensor) -> Tensor:
        """The last hidden states, from which tokens are drawn: of the last token and its drafts."""
        if len(hidden):
            return hidden[-1 - len(generation.drafts) :]
        last = generation.hidden.last
        assert last is not None
        return last

    def _logits(self, rows: Sequence[Tensor]) -> Sequence[Floats]:
        """fp32 `[1 + drafts, vocab]` for each."""
        if not rows:
            return ()
        logits = self.model.logits(torch.cat(list(rows))).numpy()
        ends = accumulate(len(part) for part in rows)
        return [logits[end - len(part) : end] for part, end in zip(rows, ends, strict=True)]

    def _advance(self, part: Work, hidden: Tensor, logits: Floats | None) -> None:
        """The state moves on over what was right of the step; tokens are drawn where the prompt is through."""
        generation = part.generation
        try:
            right = self._draw(generation, logits) if logits is not None else 0
        except Exception as error:  # of a sampler's or a grammar's library
            self._fail(generation, error)
            return
        computed = min(part.count + right, len(generation.tokens) - generation.computed)
        self._speculator.settle(generation, computed)
        generation.advance(hidden[:computed])

    def _draw(self, generation: Generation, logits: Floats) -> int:
        """Tokens from logits `[1 + drafts, vocab]`, as long as the drafts are what is drawn: how many were."""
        drafts, right, tokens, text = generation.drafts, 0, [], ""
        verdict = Verdict(finish=None if generation.room else "length")
        while verdict.finish is None:
            token = generation.draw(logits[right])
            self._note_logprobs(generation, logits[right], token)
            verdict = generation.push(token)
            tokens += verdict.tokens
            text += verdict.text
            if verdict.finish == "stop" or right == len(drafts) or token != drafts[right]:
                break
            right += 1
        generation.note_drafts(right)
        generation.finish = verdict.finish
        by_token = isinstance(verdict.stopped_by, int)
        self._updates.append(
            Update(
                request_id=generation.request.id,
                tokens=tokens,
                text=text,
                logprobs=generation.take_logprobs(len(tokens)),
                prompt_logprobs=generation.take_prompt_logprobs(),
                usage=generation.usage,
                finish=verdict.finish,
                stopped_by=verdict.stopped_by,
                stop_logprobs=generation.logprobs[-1] if by_token and generation.logprobs else (),
            )
        )
        return right

    @staticmethod
    def _note_logprobs(generation: Generation, logits: Floats, token: int) -> None:
        count = generation.request.params.logprobs
        if count is not None:
            generation.logprobs.append(logprobs(logits, token, count))

    def _note_prompt_logprobs(self, generation: Generation, hidden: Tensor) -> None:
        """Of the prompt's tokens that follow those just computed; the first token has none."""
        count = generation.request.params.prompt_logprobs
        known = generation.tokens[generation.computed + 1 : generation.computed + 1 + len(hidden)]
        if count is not None and known and not generation.reads_cache:
            tables = self.model.logits(hidden[: len(known)])
            generation.prompt_logprobs += [
                logprobs(row, token, count) for row, token in zip(tables, known, strict=True)
            ]

    def _close_step(self, generations: Sequence[Generation]) -> None:
        """Snapshots where they are due, and the ends of those that are through."""
        there = [generation for generation in generations if generation.request.id in self._generations]
        due = [generation for generation in there if generation.finish or generation.is_due]
        self._speculator.catch_up(due + [g for g in there if g not in due and g.hidden.waiting > MOST_UNDRAFTED])
        for generation in due:
            if generation.finish:
                self._remove(generation)
                self._remember(generation, final=True)
            else:
                self._remember(generation, final=False)
                generation.points.pop(0)

    # ---- memory

    def _find(self, generation: Generation) -> Match | None:
        """What the cache has of it; None while more is read from the disk, one request after the other."""
        if not generation.reads_cache:
            return Match(path=[], snapshot=None, common=0)
        match = self._cache.match(generation.request.isolation, generation.tokens)
        return None if self._disk and self._reads(self._disk, generation, match) else match

    def _reads(self, disk: DiskCache, generation: Generation, match: Match) -> bool:
        """Whether it waits for the disk, which has more of it than the memory, where there is room."""
        isolation, tokens = generation.request.isolation, generation.tokens
        if generation.stored is None:
            generation.stored = disk.find(isolation, tokens)
        least = match.length + self.model.page_tokens
        better = next((stored for stored in generation.stored if stored.length >= least), None)
        running = len(self._scheduler.running)
        if better is None or not self._cache.can_start(match, len(tokens), spare_pages=running):
            return False
        if disk.reading is None:
            generation.stored.remove(better)
            disk.read(isolation, tokens, better)
        return True

    def _park(self, generation: Generation) -> None:
        self._stats.preempted += 1
        self._speculator.catch_up([generation])
        self._remember(generation, final=True)

    def _remember(self, generation: Generation, final: bool) -> None:
        """A snapshot of where it is; in the end it gives up its memory for that."""
        if (last := generation.hidden.last) is None:
            return self._drop(generation)
        isolation, tokens = generation.request.isolation, generation.tokens[: generation.computed]
        snapshot = self._cache.insert(isolation, tokens, generation.pages, generation.slot, last[0], final)
        if snapshot and self._disk:
            self._disk.note(snapshot, isolation, tokens)
        if final:
            generation.stop_holding()
        return None

    def _drop(self, generation: Generation) -> None:
        """Gives its memory back, with nothing kept."""
        if generation.slot >= 0:
            for slot in (generation.slot, *generation.saves):
                self._cache.slots.release(slot)
            self._cache.give_back(generation.pages)
        generation.stop_holding()

    # ---- ends

    def _end(self, generation: Generation, finish: FinishReason) -> None:
        """Before it is through; what it has computed is kept."""
        running = generation in self._scheduler.running
        self._finish(generation, finish)
        self._remove(generation)
        if not running:
            return
        try:
            self._speculator.catch_up([generation])
            self._remember(generation, final=True)
        except Exception:  # a model's: then nothing is kept
            self._drop(generation)

    def _fail(self, generation: Generation, error: Exception) -> None:
        """What it has computed may be wrong, and is not kept."""
        if not generation.finish:
            self._finish(generation, "error", f"{type(error).__name__}: {error}".splitlines()[0])
        self._remove(generation)
        self._drop(generation)

    def _finish(self, generation: Generation, finish: FinishReason, error: str | None = None) -> None:
        generation.finish = finish
        self._updates.append(
            Update(
                request_id=generation.request.id,
                prompt_logprobs=generation.take_prompt_logprobs(),
                usage=generation.usage,
                finish=finish,
                error=error,
            )
        )

    def _remove(self, generation: Generation) -> None:
        self._scheduler.remove(generation)
        del self._generations[generation.request.id]
        self._finished_at.append(time.monotonic())
        self._stats.finished += 1
        self._stats.prompt_tokens += generation.prompt_tokens
        self._stats.cached_tokens += generation.usage.cached_tokens
        self._stats.completion_tokens += len(generation.answer)
        self._stats.drafted_tokens += generation.drafted
        self._stats.accepted_tokens += generation.accepted

    # ---- for the owner's eyes

    def stats(self) -> Stats:
        """May be called from any thread; the figures may then be a step apart."""
        pages, slots, model = self._cache.pages, self._cache.slots, self.model
        pages_used, slots_used = pages.size - pages.free, slots.size - slots.free
        return replace(
            self._stats,
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            pages_held=pages.held,
            pages_used=pages_used,
            slots_held=slots.held,
            slots_used=slots_used,
            memory_used=pages_used * model.page_bytes + slots_used * model.state_bytes,
            memory_total=pages.size * model.page_bytes + slots.size * model.state_bytes,
            disk_bytes=self._disk.used_bytes if self._disk else 0,
        )

    def check_integrity(self) -> None:
        """Every page and slot is owned exactly as counted, and every request is where it belongs."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        assert {g.request.id for g in (*running, *waiting)} == set(self._generations)
        assert all(not g.pages and g.slot < 0 and not g.saves for g in waiting)
        assert [g.arrival for g in running] == sorted(g.arrival for g in running)
        for generation in running:
            assert 0 <= generation.computed <= len(generation.tokens) <= generation.last_token
            assert not generation.saves and not generation.drafts
        holders = [*running, *([self._disk.reading] if self._disk and self._disk.reading else [])]
        pages = [page for holder in holders for page in holder.pages]
        self._cache.check_integrity(pages, [holder.slot for holder in holders])

    def close(self) -> None:
        """Cancels what is left, and waits for the disk."""
        for request_id in list(self._generations):
            self.cancel(request_id)
        if self._disk:
            self._disk.close()


def _span(part: Work) -> Span:
    generation = part.generation
    past = generation.computed
    return Span(
        tokens=[*generation.tokens[past : past + part.count], *generation.drafts],
        slot=generation.slot,
        past=past,
        pages=generation.pages,
        saves=[*generation.saves, generation.slot] if generation.saves else (),
    )
