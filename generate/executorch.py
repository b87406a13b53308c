"""The steps of a model as a program of ExecuTorch's: lowered to XNNPACK into one file, and run out of it. Knows a
Transformer and ExecuTorch; not where a model came from, nor what else is in the file.

The program has one method for prefill and decode alike, "forward": tokens int64 [1, T], start int64 [1] -> logits
float32 [1, V] of the token after the last. Keys and values are its own state, of one conversation. What else is known
of the model lies in the program too, as bytes that the method "torchchat" returns.
"""

import contextlib
import logging
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config.errors import UserError
from config.settings import shorten
from model.kv_cache import KVCache
from model.layers import Linear
from model.tracing import portable
from model.transformer import Transformer

FORWARD, METADATA = "forward", "torchchat"
HEADER = struct.Struct("<4x4s4sIQQQ")
"""Of a program: its two magic words, the header's length, the program's size, where its data begin, their size."""
MAX_METADATA = 512 << 20
INSTALL = "pip install 'torchchat[executorch]', which needs torch 2.13"


class _Step(nn.Module):
    """What is lowered: the model, and a cache as `model.portable` reads it."""

    def __init__(self, model: Transformer, max_seq_len: int) -> None:
        super().__init__()
        self.model, self.max_seq_len = model, max_seq_len
        config = model.config
        cache = KVCache.create(config, 1, max_seq_len, "cpu", torch.float32)
        self.names: dict[str, list[str]] = {"keys": [], "values": [], "frequencies": []}
        for kind, names in self.names.items():
            for i, tensor in enumerate(getattr(cache, kind)):
                names.append(f"{kind}_{i}")
                own = tensor if kind == "frequencies" else tensor.transpose(1, 2).contiguous()
                self.register_buffer(names[-1], own)

    def forward(self, tokens_1T: Tensor, start_1: Tensor) -> Tensor:
        buffers = dict(self.named_buffers(recurse=False))
        keys, values, frequencies = ([buffers[name] for name in names] for names in self.names.values())
        start = start_1[0].item()
        context = start + tokens_1T.shape[1]
        torch._check(start >= 0)  # type: ignore[no-untyped-call]
        torch._check(context <= self.max_seq_len)  # type: ignore[no-untyped-call]
        cache = KVCache(keys, values, frequencies, self.max_seq_len)
        slots_1 = torch.zeros(1, dtype=torch.int64)
        x_1TD = self.model.hidden(tokens_1T, start_1, cache, slots_1, context)  # type: ignore[arg-type]
        return self.model.logits(x_1TD[:, -1:]).squeeze(1)


def lower(model: Transformer, max_seq_len: int, prefill_chunk: int, metadata: bytes, facts: dict[str, Any]) -> Any:
    """The program, as its `write_to_file` writes it. model: in float32 on the CPU, its quantized layers such as
    `quant.portable` makes. facts: what runners of ExecuTorch's own ask a program for, such as "get_eos_ids". Raises
    UserError where ExecuTorch does not take the model.
    """
    require()
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
            XnnpackDynamicallyQuantizedPartitioner,
            XnnpackPartitioner,
        )
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass
        from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

        _load_ops()
        partitioners: list[Any] = [XnnpackDynamicallyQuantizedPartitioner()]
        if any(isinstance(module, Linear) for module in model.modules()):
            partitioners.append(XnnpackPartitioner())  # else slower to lower and to run: more pieces of program
        length = min(prefill_chunk, max_seq_len)
        inputs = (torch.zeros(1, min(8, length), dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        sizes = ({1: torch.export.Dim("T", min=1, max=length)}, None)
        constants = {**facts, METADATA: torch.frombuffer(bytearray(metadata), dtype=torch.uint8)}
        try:
            with torch.no_grad(), portable():
                exported = torch.export.export(_Step(model, max_seq_len), inputs, dynamic_shapes=sizes, strict=False)
            return to_edge_transform_and_lower(
                exported,
                partitioner=partitioners,
                constant_methods=constants,
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            ).to_executorch(
                ExecutorchBackendConfig(
                    memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                    sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
                )
            )
        except Exception as error:  # what these compilers raise has nothing else in common
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
            raise UserError(
                f"export: ExecuTorch does not take this model: {type(error).__name__}: {shorten(reason, 200)}; see all "
                "of it with TORCHCHAT_DEBUG=1"
            ) from error


class Program(nn.Module):
    """A program that is loaded: a `generate.step.LanguageModel` of one sequence, in slot 0."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is no program, cut short, or not ours, and where ExecuTorch is missing."""
        super().__init__()
        require()
        check_whole(path)
        with _quiet():
            from executorch.runtime import Runtime

            _load_ops()
            try:
                self._program = Runtime.get().load_program(path)
                if not {FORWARD, METADATA} <= self._program.method_names:
                    raise UserError(f"{path}: was not exported by torchchat: it has no method {METADATA!r}")
                (stored,) = self._program.load_method(METADATA).execute([])
                self._forward = self._program.load_method(FORWARD)
            except (RuntimeError, ValueError) as error:
                reason = shorten(str(error).strip().partition("\n")[0], 200)
                raise UserError(f"{path}: ExecuTorch does not load it: {reason}; export the model again") from error
        self.metadata = bytes(stored.numpy().tobytes())

    def forward(
        self,
        tokens_BT: Tensor,
        start_B: Tensor,
        cache: KVCache,
        slots_B: Tensor,
        context: int | Tensor,
        logits_at_B: Tensor | None = None,
    ) -> Tensor:
        """`Transformer.forward` for one row and the logits after its last token, [1, V]."""
        if logits_at_B is None:
            raise _next_alone()
        (logits_1V,) = self._forward.execute([tokens_BT.contiguous(), start_B])
        result: Tensor = logits_1V
        return result

    def hidden(
        self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, slots_B: Tensor, context: int | Tensor
    ) -> Tensor:
        """Raises UserError: a program says nothing but what comes next."""
        raise _next_alone()

    def logits(self, x_BTD: Tensor) -> Tensor:
        """As `hidden`."""
        raise _next_alone()


def _next_alone() -> UserError:
    return UserError("a program of ExecuTorch's gives the next token alone: it cannot be measured on a text")


def no_cache(max_seq_len: int) -> KVCache:
    """What stands for the cache beside a program, which has its own."""
    nothing = torch.empty(1, 0, max_seq_len, 0)
    return KVCache([nothing], [nothing], [], max_seq_len)


def require() -> None:
    """Raises UserError unless ExecuTorch is installed."""
    if find_spec("executorch") is None:
        raise UserError(f"a .pte file needs ExecuTorch, which is not installed here: {INSTALL}")


def check_whole(path: Path) -> None:
    """Raises UserError for a file that is no program of ExecuTorch's, or shorter than it says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER.size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(head) < HEADER.size or head[4:6] != b"ET":
        raise UserError(f"{path}: is no program of ExecuTorch's; torchchat export --output-pte-path makes one")
    if head[8:12] != b"eh00":  # one without data of its own
        return
    _, _, _, program, begin, data = HEADER.unpack(head)
    if size < max(program, begin + data):
        raise UserError(f"{path}: is cut short: it has {size} bytes of {max(program, begin + data)}; export it again")


def _load_ops() -> None:
    """Registers the operators that `model.portable` and `quant.portable` call, with torch and with the runtime."""
    try:
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401
    except (ImportError, OSError, AssertionError) as error:
        raise UserError(f"ExecuTorch does not load beside torch {torch.__version__}: {error}; {INSTALL}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what ExecuTorch, and the libraries that it brings, say to their makers: warnings, and lines written to
    stderr beside Python.
    """
    if os.environ.get("TORCHCHAT_DEBUG", "") not in ("", "0"):
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    before = logging.root.manager.disable
    try:
        with open(os.devnull, "wb") as nowhere, warnings.catch_warnings():
            os.dup2(nowhere.fileno(), 2)
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(before)
        os.dup2(kept, 2)
        os.close(kept)
