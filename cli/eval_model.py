"""The engine as lm-eval knows models: texts in, log-probabilities and texts out. Encodes, cuts and names things as its
own `HFLM` does, so that both find the same; the only user of its interface for models. Knows no tasks.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cli.builder import Built
from cli.console import Progress, warn
from config.errors import UserError
from config.settings import MAX_SEED, SamplingParams, shorten
from generate.likelihood import Continuation

MAX_GEN_TOKS = 256
"""So many tokens are made where a task does not say how many."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Pair = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclass
class Work:
    """What was asked so far and how long it took, compiling apart. tokens: of the requests, each counted whole and what
    was generated with it. read: those that went through the model; what several requests begin with is read once.
    cut: requests that were longer than the context.
    """

    requests: int = 0
    tokens: int = 0
    read: int = 0
    cut: int = 0
    seconds: float = 0.0


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A built engine behind lm-eval's interface."""

    def __init__(self, built: Built, seed: int = 0) -> None:
        """seed: of what is sampled, where a task samples. Raises UserError for a model without special tokens."""
        super().__init__()
        assert built.prepared.tokenizer is not None
        assert built.prepared.template is not None
        self.built, self.engine, self.seed = built, built.engine, seed
        self.vocabulary, self.template = built.prepared.tokenizer, built.prepared.template
        self.work = Work()
        self._device = self.engine.device
        self._system_left_out = False
        bos, eos = (self._named(name) for name in ("bos_token", "eos_token"))
        ends = sorted(self.engine.eos_ids)
        self._eot = eos if eos is not None else ends[0] if ends else None
        prefix = next((one for one in (self.vocabulary.bos_id, bos, self._eot) if one is not None), None)
        if prefix is None:
            raise UserError(f"{built.prepared.name} has no token that begins or ends a text: it cannot be evaluated")
        self._prefix = prefix

    def _named(self, name: str) -> int | None:
        piece = self.vocabulary.named.get(name)
        return None if piece is None else self.vocabulary.special_id(piece)

    # ---- What lm-eval asks about a model ----

    @property
    def eot_token_id(self) -> int | None:
        return self._eot

    @property
    def prefix_token_id(self) -> int:
        """What a text without a beginning begins with."""
        return self._prefix

    @property
    def max_length(self) -> int:
        return self.engine.cache.max_seq_len

    @property
    def rows(self) -> int:
        """How many texts are read or made at a time."""
        return self.engine.scheduler.num_slots

    def customization(self) -> dict[str, Any]:
        """What runs, as JSON; its names are those of the settings."""
        prepared = self.built.prepared
        settings = prepared.settings
        return {
            "model": prepared.name,
            "device": prepared.device.device.type,
            "dtype": prepared.dtype.name,
            "quantize": None if settings.quantize is None else json.loads(settings.quantize),
            "compile": settings.compile,
            "compile_prefill": settings.compile_prefill,
            "max_seq_len": self.max_length,
            "batch_size": self.rows,
        }

    @property
    def tokenizer_name(self) -> str:
        return self.built.prepared.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.template.template if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its files beside the settings."""
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self.built.model.parameters()),
            "model_dtype": self.built.prepared.dtype.name,
            "max_length": self.max_length,
        }

    # ---- Texts and tokens ----

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """A text's ids. What spells a special token is one; BOS comes first where the tokenizer has it so, once."""
        ids = self.vocabulary.encode_parts(self.vocabulary.split_specials(string))
        bos = self.vocabulary.bos_id
        if not self.vocabulary.add_bos or bos is None or add_special_tokens is False:
            return ids
        return ids if add_special_tokens is None and ids[:1] == [bos] else [bos, *ids]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        open_end = not add_generation_prompt
        try:
            return self.template.text(chat_history, add_generation_prompt, open_end=open_end)
        except UserError as error:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            if not self._system_left_out:
                warn(f"the system message is left out: {error}")
            self._system_left_out = True
            return self.template.text(without, add_generation_prompt, open_end=open_end)

    # ---- What lm-eval asks of a model ----

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        """Of each request, its texts and the ids of its two parts, the log-probability of the second and whether it is
        what greedy decoding gives.
        """
        for texts, context, continuation in requests:
            if not context or not continuation:
                text = "" if texts is None else f": {shorten(repr(texts[1]))}"
                raise UserError(f"a task asks for the likelihood of a text without tokens{text}")
        asked = [Continuation(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        self.work.requests += len(asked)
        return self._score(asked)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-probability of each text, of windows where it is longer than the context."""
        windows: list[Continuation] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context, continuation = make_disjoint_window(window)
                windows.append(Continuation(tuple(context), tuple(continuation)))
                owners.append(i)
        self.work.requests += len(requests)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score(windows), strict=True):
            sums[owner] += logprob
        return sums

    def _score(self, asked: Sequence[Continuation]) -> list[tuple[float, bool]]:
        lengths = [len(one.context) + len(one.continuation) for one in asked]
        self.work.tokens += sum(lengths)
        self.work.cut += sum(length > self.max_length + 1 for length in lengths)
        with self._timed(), Progress("scoring", len(asked)) as progress:
            found = self.engine.score(asked, progress.advance)
        return [(one.logprob, one.is_greedy) for one in found]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model says to each text, as the arguments beside it ask."""
        prompts: list[tuple[list[int], SamplingParams]] = []
        for i, (context, kwargs) in enumerate(request.args for request in requests):
            params = self._sampling(kwargs, i)
            assert params.max_new_tokens is not None
            room = self.max_length - params.max_new_tokens
            if room <= 0:
                raise UserError(
                    f"a task asks for {params.max_new_tokens} new tokens, and the context holds {self.max_length} with "
                    "the question: raise --max-seq-len, or say --gen-kwargs max_gen_toks=N"
                )
            ids = self.tok_encode(context) or [self.prefix_token_id]
            self.work.cut += len(ids) > room
            prompts.append((ids[-room:], params))
        self.work.requests += len(prompts)
        return self._generate(prompts)

    def _generate(self, prompts: Sequence[tuple[list[int], SamplingParams]]) -> list[str]:
        """In their order: what prompts that follow one another begin with alike is still in the cache."""
        for params in {replace(params, stop=(), seed=0) for _, params in prompts}:
            self.engine.prepare(params)
        with self._timed(), Progress("generating", len(prompts)) as progress:
            sequences = [self.engine.add(ids, params, new_text=True) for ids, params in prompts]
            texts = {sequence.seq_id: "" for sequence in sequences}
            while self.engine.has_unfinished:
                for output in self.engine.step():
                    texts[output.seq_id] += output.text
                    progress.advance(output.finish_reason is not None)
        self.work.tokens += sum(len(ids) for ids, _ in prompts) + sum(len(one.token_ids) for one in sequences)
        return [texts[sequence.seq_id] for sequence in sequences]

    def _sampling(self, kwargs: Mapping[str, Any], index: int) -> SamplingParams:
        """As `HFLM` has it: greedy unless sampling is asked for; the model's own recommendation where nothing is said.
        Raises UserError for what the engine has not.
        """
        asked = dict(normalize_gen_kwargs(dict(kwargs), MAX_GEN_TOKS))
        until = tuple(dict.fromkeys(text for text in asked.pop("until") if text))
        length, sampled = int(asked.pop("max_gen_toks")), asked.pop("do_sample")
        given = {name: asked.pop(name) for name in SAMPLING if name in asked}
        if asked.pop("num_beams", 1) != 1:
            raise UserError("a task or --gen-kwargs asks for num_beams, of which there is one")
        if asked:
            known = ", ".join(("do_sample", "until", "max_gen_toks", *SAMPLING))
            raise UserError(f"a task or --gen-kwargs asks for {shorten(', '.join(asked))}; known are {known}")
        given = {name: value for name, value in given.items() if value is not None}
        if sampled and given.get("temperature") == 0.0 and "temperature" not in kwargs:
            del given["temperature"]
        if not sampled:
            kept = [name for name in ("repetition_penalty",) if name in given]
            given = {"temperature": 0.0, **{name: given[name] for name in kept}}
        return replace(
            self.built.prepared.sampling,
            max_new_tokens=length,
            stop=until,
            seed=(self.seed + index) % (MAX_SEED + 1),
            **given,
        )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Adds what is done in it to `work`; compiling is no part of its time."""
        ledger = self.engine.ledger
        compile_s, tokens = ledger.phase_s["compile"], ledger.prefill_tokens + ledger.decode_tokens
        began = time.perf_counter()
        yield
        self.work.seconds += time.perf_counter() - began - (ledger.phase_s["compile"] - compile_s)
        self.work.read += ledger.prefill_tokens + ledger.decode_tokens - tokens
