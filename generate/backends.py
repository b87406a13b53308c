"""Two ways to turn a step into code that can be kept: a package of AOTInductor, and an Inductor artifact. Knows
functions of tensors and files; not steps, keys or caches.

On the CPU a package: it loads in milliseconds without importing the compiler, and runs without Python. On CUDA an
artifact: it needs no CUDA toolkit on the machine, and what Python adds to a call vanishes in a CUDA graph.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.tracing import tracing

Function = Callable[..., Tensor]
Program = Callable[[list[Tensor]], Tensor]
Dynamic = dict[int, dict[int, str]]
"""Input -> its dimensions whose sizes change from call to call, by the names that such sizes have."""
Largest = dict[str, int]
"""The largest of each of these sizes; the smallest is 2."""


@dataclass(frozen=True)
class Backend:
    """compile(function, inputs, dynamic, largest, path, compiler): into the file `path`; `compiler` is the C++ compiler
    to use. Raises whatever the compilers raise.

    load(path, device): what was compiled. Raises RuntimeError for a file that is nothing of the kind.
    """

    compile: Callable[[Function, list[Tensor], Dynamic, Largest, Path, str], None]
    load: Callable[[Path, torch.device], Program]


def _compile_package(
    function: Function, inputs: list[Tensor], dynamic: Dynamic, largest: Largest, path: Path, compiler: str
) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor import config as inductor_config

    class Step(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return function(*tensors)

    sizes = {name: torch.export.Dim(name, min=2, max=most) for name, most in largest.items()}
    dims = {i: {d: sizes[name] for d, name in named.items()} for i, named in dynamic.items()}
    shapes = (tuple(dims.get(i) for i in range(len(inputs))),) if dynamic else None
    # What is made on the way goes beside the result, not into the compiler's own cache, where nothing ever leaves.
    build = {"aot_inductor.output_path": str(path.parent / "build")}
    with _compiling(compiler), _kept_whole(), inductor_config.patch(build):
        program = torch.export.export(Step(), tuple(inputs), dynamic_shapes=shapes, strict=False)
        aoti_compile_and_package(program, package_path=str(path))


def load_package(path: Path, device: torch.device, name: str = "model") -> Program:
    """One of the programs in a package. Raises RuntimeError for a file that is nothing of the kind."""
    index = -1 if device.type == "cpu" else (device.index or 0)
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), name, True, 1, index)

    def run(inputs: list[Tensor]) -> Tensor:
        outputs: list[Tensor] = loader.run(inputs)
        return outputs[0]

    return run


def _compile_artifact(
    function: Function, inputs: list[Tensor], dynamic: Dynamic, largest: Largest, path: Path, compiler: str
) -> None:
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor import standalone_compile
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: list[Any] = []
    for i, tensor in enumerate(inputs):
        sizes = [DimDynamic.STATIC] * tensor.dim()
        for dimension in dynamic.get(i, ()):
            sizes[dimension] = DimDynamic.DYNAMIC
        source = torch._dynamo.source.ConstantSource(f"input_{i}")
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        fakes.append(mode.from_tensor(tensor, source=source, symbolic_context=context))
    with _compiling(compiler):
        with mode, enable_python_dispatcher():
            graph = make_fx(function)(*fakes)
        assert all(node.op != "get_attr" for node in graph.graph.nodes), "a constant, which no caller would pass"
        artifact = standalone_compile(graph, fakes, dynamic_shapes="from_graph")
        artifact.save(path=str(path), format="binary")


def _load_artifact(path: Path, device: torch.device) -> Program:
    from torch._inductor.standalone_compile import CompiledArtifact

    try:
        artifact = CompiledArtifact.load(path=str(path), format="binary")
    except (AssertionError, ValueError, KeyError, EOFError) as error:
        raise RuntimeError(f"{path}: not an artifact of this torch") from error

    def run(inputs: list[Tensor]) -> Tensor:
        output = artifact(*inputs)
        result: Tensor = output if isinstance(output, Tensor) else output[0]
        return result

    return run


@contextlib.contextmanager
def _compiling(compiler: str) -> Iterator[None]:
    """No gradients, the model told that it is traced, and the compiler's remarks to its makers left out."""
    from torch._inductor import config as inductor_config

    options = {
        "cpp.cxx": (None, compiler),
        # They would be kept under a name in the shared temporary directory that anybody can guess and take, and need
        # the program openssl.
        "aot_inductor.precompile_headers": False,
        "cpp_cache_precompile_headers": False,
    }
    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch._export", "torch.export")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.no_grad(),
        tracing(),
        inductor_config.patch(options),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _kept_whole() -> Iterator[None]:
    """Inductor would take a matrix-vector product apart into a slower loop of its own."""
    from torch._inductor.decomposition import decompositions
    from torch._inductor.lowering import lowerings, make_fallback

    mv = torch.ops.aten.mv.default
    saved = decompositions.pop(mv, None)
    if mv not in lowerings:
        # Its warning would be an error wherever the variable CI is set.
        make_fallback(mv, warn=False)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if saved is not None:
            decompositions[mv] = saved


PACKAGE = Backend(_compile_package, load_package)
"""A package of AOTInductor, torch's .pt2 form."""
ARTIFACT = Backend(_compile_artifact, _load_artifact)
"""An artifact of Inductor's."""
