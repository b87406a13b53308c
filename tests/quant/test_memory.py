"""Quantizing while loading takes the quantized model, the largest tensor in full precision, and little more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LOAD = """
import psutil, torch
from cli.builder import load_model, meta_model, prepare
from config.settings import BuildSettings, Setting
from model.device import peak_memory_bytes, reset_peak_memory
from quant import native
from quant.recipe import read_recipe
from quant.schemes import SCHEMES, Arguments, quiet_torchao

recipe = read_recipe({recipe!r}, "--quantize").text
settings = BuildSettings({model!r}, Setting("cpu"), Setting("fp32"), quantize=recipe, random_weights=True)
prepared = prepare(settings)
native.available()
with quiet_torchao():
    import torchao.quantization
SCHEMES["linear:int8"].torchao_config(Arguments(8, 0))
cpu = torch.device("cpu")
reset_peak_memory(cpu)
before = psutil.Process().memory_info().rss
model = load_model(prepared, 64)
largest = 4 * max(p.numel() for p in meta_model(prepared.config).parameters())
print(peak_memory_bytes(cpu) - before, sum(p.nbytes for p in model.parameters()), largest)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak cannot be reset")
@pytest.mark.parametrize("recipe", ["cpu", "cpu-small", '{"linear:int4": {}}'])
def test_the_peak_is_the_quantized_model_and_one_tensor(recipe: str) -> None:
    check("stories110m", recipe)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak cannot be reset")
def test_so_it_is_with_experts(tmp_path: Path) -> None:
    """A layer's are the largest tensors there are, of which a few rows at a time are in full precision."""
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "hidden_size": 768}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1000}
    family = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({**family, **shape, **experts}))
    check(str(tmp_path), "cpu")


def check(model: str, recipe: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(model=model, recipe=recipe)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    peak, quantized, largest = map(int, done.stdout.split())
    assert peak < 1.1 * (quantized + largest)
