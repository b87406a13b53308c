"""Mixtures of experts: whatever a checkpoint calls its experts they are the same, a token is computed with its own and
no others, and our kernels give what plain PyTorch gives. That a whole model is Transformers' is in test_parity.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")

from config.errors import UserError
from generate.stats import weight_bytes_per_token
from model import kernels, moe_experts
from model.config import ModelConfig, load_config
from model.layers import finish
from model.loader import Source, load_weights
from model.moe import MixtureOfExperts
from model.moe_experts import ExpertLinear, by_expert, by_group, by_pair
from model.tracing import tracing
from model.transformer import Transformer
from tests.model.gguf_files import gguf_state, write, write_model
from tests.model.test_gguf import Kind
from tests.model.tiny import CASES

CPU = torch.device("cpu")
State = dict[str, Tensor]


# ---- What experts are called ----


def meta_model(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def load(path: Path, take: Callable[[str, torch.nn.Module, Source], bool] | None = None) -> dict[str, Tensor]:
    model = meta_model(load_config(path))
    load_weights(model, path, CPU, torch.float32, take=take)
    return dict(model.named_parameters())


def together(state: State) -> State:
    """Experts in one tensor of three dimensions, as Transformers has them in memory."""
    return state


def apart(state: State, place: str = "mlp", names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> State:
    """A tensor for each matrix of each expert, as they are published."""
    made: State = {}
    for name, tensor in state.items():
        at, _, leaf = name.partition("mlp.experts.")
        if not leaf:
            made[name.replace("mlp.gate.", f"{place}.gate.")] = tensor
            continue
        parts = names[:2] if leaf == "gate_up_proj" else names[2:]
        for expert, matrix in enumerate(tensor):
            for part, half in zip(parts, matrix.chunk(len(parts)), strict=True):
                made[f"{at}{place}.experts.{expert}.{part}.weight"] = half.contiguous()
    return made


def as_mixtral(state: State) -> State:
    return apart(state, "block_sparse_moe", ("w1", "w3", "w2"))


SPELLINGS = {"together": together, "apart": apart, "as Mixtral": as_mixtral, "gguf": None, "gguf, old": None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, State]]:
    """A tiny Mixtral with that spelling, and the state that it was written from."""

    @cache
    def make(spelling: str) -> tuple[Path, State]:
        path = tmp_path_factory.mktemp("mixtral")
        state = CASES["mixtral"].save(path).state_dict()
        rename = SPELLINGS[spelling]
        if rename is not None:
            save_file({name: tensor.contiguous() for name, tensor in rename(state).items()}, path / "model.safetensors")
            return path, state
        if spelling == "gguf":
            return write_model(path / "m.gguf", path, state), state
        config = CASES["mixtral"].config().to_dict()
        return write(path / "m.gguf", config, _each_by_itself(gguf_state(state, config))), state

    return make


def _each_by_itself(state: State) -> State:
    """Experts in GGUF as they were until 2024."""
    made: State = {}
    for name, tensor in state.items():
        if name.endswith("_exps.weight"):
            made |= {name.replace("_exps.", f".{i}."): matrix for i, matrix in enumerate(tensor)}
        else:
            made[name] = tensor
    return made


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_experts_are_found_whatever_they_are_called(spelling: str, saved: Any) -> None:
    path, state = saved(spelling)
    found = load(path)
    for i in range(2):
        ours, theirs = f"layers.{i}.feed_forward.", f"model.layers.{i}.mlp."
        assert torch.equal(found[f"{ours}router.weight"], state[f"{theirs}gate.weight"])
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(found[f"{ours}experts.{name}.weight"], state[f"{theirs}experts.{name}"].flatten(0, 1))


@pytest.mark.parametrize("rows", [1, 7, 10_000])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_experts_taken_by_rows_are_the_whole(spelling: str, rows: int, saved: Any) -> None:
    path, _ = saved(spelling)
    taken: dict[str, Tensor] = {}

    def take(name: str, module: torch.nn.Module, source: Source) -> bool:
        if isinstance(module, ExpertLinear):
            taken[f"{name}.weight"] = torch.cat(list(source.blocks(rows)))
        return isinstance(module, ExpertLinear)

    load(path, take)
    whole = load(path)
    assert len(taken) == 4
    assert all(torch.equal(weight, whole[name]) for name, weight in taken.items())


def test_quantized_experts_of_gguf_are_decoded(tmp_path: Path) -> None:
    """Each expert out of a tensor of three dimensions, whose rows are blocks."""
    case = replace(CASES["mixtral"], options={**CASES["mixtral"].options, "intermediate_size": 64})
    state = case.save(tmp_path).state_dict()
    file = write_model(tmp_path / "m.gguf", tmp_path, state, lambda name, shape: Kind.Q8_0)
    found = load(file)
    for name in ("gate_up_proj", "down_proj"):
        expected = state[f"model.layers.1.mlp.experts.{name}"].flatten(0, 1)
        error = (found[f"layers.1.feed_forward.experts.{name}.weight"] - expected).abs().max()
        assert 0 < error <= expected.abs().max() / 127


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("model.layers.1.mlp.experts.4.up_proj.weight"), "mlp.experts.4.up_proj.weight' is missing"),
        (lambda s: s.pop("model.layers.0.mlp.gate.weight"), "'model.layers.0.mlp.gate.weight' is missing"),
        (lambda s: s.update({"model.layers.0.mlp.experts.5.up_proj.weight": torch.ones(3)}), "is no part of the model"),
        (lambda s: s.update({"model.layers.0.mlp.gate.weight": torch.ones(6, 32)}), "asks for [5, 32]"),
        (lambda s: s.update({"model.layers.1.mlp.experts.2.down_proj.weight": torch.ones(9, 9)}), "has shape [9, 9]"),
    ],
)
def test_experts_that_are_wrong_are_named(
    change: Callable[[State], object], says: str, saved: Any, tmp_path: Path
) -> None:
    path, _ = saved("apart")
    state = load_file(path / "model.safetensors")
    change(state)
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_of_another_number_of_experts_is_named(saved: Any, tmp_path: Path) -> None:
    path, state = saved("together")
    state = {**state, "model.layers.0.mlp.experts.down_proj": state["model.layers.0.mlp.experts.down_proj"][:3]}
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"'model.layers.0.mlp.experts.down_proj' has shape \[3, .*each of 5 experts"):
        load(tmp_path)


# ---- What a token is computed with ----


def random_linear(
    E: int, C: int, N: int, K: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> ExpertLinear:
    linear = ExpertLinear(E, C, K, N).to(device, dtype)
    torch.nn.init.normal_(linear.weight, std=K**-0.5)
    return linear.requires_grad_(False)


def random_choice(M: int, E: int, C: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The experts of each token, and their weights."""
    experts_MC = torch.stack([torch.randperm(E)[:C] for _ in range(M)])
    return experts_MC.to(device), torch.rand(M, C).to(device)


def one_by_one(
    linear: ExpertLinear, x_MJK: Tensor, experts_MC: Tensor, gate: str | None = None, weights_MC: Tensor | None = None
) -> Tensor:
    """The definition, in float64."""
    weight_ENK = linear.weight.double().view(linear.num_experts, -1, linear.weight.shape[1])
    x_MCK = x_MJK.double().expand(*experts_MC.shape, -1)
    y = torch.einsum("mck,mcnk->mcn", x_MCK, weight_ENK[experts_MC])
    y = finish(y, gate, None, 1.0)
    return y if weights_MC is None else (y * weights_MC.double().unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [1, 2, 40])
@pytest.mark.parametrize("together", [True, False], ids=["one x", "an x for each"])
def test_each_token_times_the_matrices_of_its_experts(dtype: torch.dtype, M: int, together: bool) -> None:
    torch.manual_seed(0)
    E, C, N, K = 7, 3, 10, 36
    linear, (experts, weights) = random_linear(E, C, N, K, dtype), random_choice(M, E, C)
    x = torch.randn(M, 1 if together else C, K, dtype=dtype)
    weight_PNK = linear.weight.view(E, N, K)[experts.flatten()]
    for given in ({}, {"gate": "silu"}, {"weights_MC": weights}):
        run = linear(x, experts, **given)
        with tracing():
            traced = linear(x, experts, **given)
        exact = one_by_one(linear, x, experts, **given)
        gathered = by_pair(x, weight_PNK, given.get("weights_MC"), given.get("gate"))
        assert torch.equal(run, traced)
        assert run.dtype == dtype
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (run - exact).abs().max() < 8 * rounding
        assert (gathered - exact).abs().max() < 8 * rounding


@pytest.mark.parametrize("M", [1, 5])
def test_only_the_experts_of_a_token_are_read(M: int) -> None:
    """The others may hold anything."""
    linear = random_linear(6, 2, 8, 12)
    experts = torch.tensor([[4, 1]]).expand(M, 2)
    for expert in (0, 2, 3, 5):
        linear.weight.view(6, 8, 12)[expert] = float("nan")
    assert linear(torch.randn(M, 1, 12), experts, weights_MC=torch.rand(M, 2)).isfinite().all()
    assert weight_bytes_per_token(linear) == 2 * 8 * 12 * 4


def test_the_router_picks_the_greatest_and_weighs_them(saved: Any) -> None:
    config = load_config(saved("apart")[0])
    mixture = MixtureOfExperts(config)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 4, config.hidden_size)
    with torch.no_grad():
        found = mixture(x)
        chances = mixture.router(x[0]).softmax(-1)
        experts = mixture.experts
        for token in range(4):
            best = chances[token].argsort(descending=True)[: config.num_experts_per_tok]
            share = chances[token][best] / chances[token][best].sum()
            expected = torch.zeros(config.hidden_size)
            for expert, weight in zip(best, share, strict=True):
                gate_up = experts.gate_up_proj.weight.view(config.num_experts, -1, config.hidden_size)[expert]
                down = experts.down_proj.weight.view(config.num_experts, config.hidden_size, -1)[expert]
                gate, up = (gate_up @ x[0, token]).chunk(2)
                expected += weight * (down @ (torch.nn.functional.silu(gate) * up))
            torch.testing.assert_close(found[0, token], expected, rtol=1e-4, atol=1e-5)


# ---- On a GPU ----

SHAPES = [(5, 2, 12, 64), (4, 2, 34, 100), (8, 8, 128, 2080), (128, 8, 1536, 2048), (8, 2, 4096, 1024)]
"""Experts, those of a token, outputs, inputs: some fit the blocks and some do not."""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("M", [1, 3, 16, 40])
@torch.no_grad()
def test_on_cuda_each_way_is_as_exact_as_plain_pytorch(M: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Up to 16 tokens our kernels; more by groups, or by expert."""
    torch.manual_seed(0)
    E, C, N, K = shape
    linear, (experts, weights) = random_linear(E, C, N, K, dtype, "cuda"), random_choice(M, E, C, "cuda")
    assert kernels.usable(linear.weight)
    for J, given in ((1, {}), (1, {"gate": "silu"}), (1, {"gate": "gelu_tanh"}), (C, {"weights_MC": weights})):
        x = torch.randn(M, J, K, device="cuda", dtype=dtype)
        exact = one_by_one(linear, x, experts, **given)
        plain = by_pair(
            x, linear.weight.view(E, N, K)[experts.flatten()], given.get("weights_MC"), given.get("gate")
        )
        found = linear(x, experts, **given)
        assert found.isfinite().all()
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (found - exact).abs().max() <= 4 * (plain - exact).abs().max() + 4 * rounding


@pytest.mark.gpu
@torch.no_grad()
def test_on_cuda_groups_are_what_experts_are() -> None:
    torch.manual_seed(0)
    E, C, N, K = 9, 2, 64, 128
    linear, (experts, weights) = random_linear(E, C, N, K, torch.bfloat16, "cuda"), random_choice(50, E, C, "cuda")
    experts[experts == 3] = 4  # one that nobody is sent to
    experts = torch.where((experts[:, :1] == experts[:, 1:]) & (torch.arange(2, device="cuda") == 1), 0, experts)
    weight = linear.weight.view(E, N, K)
    x = torch.randn(50, 1, K, device="cuda", dtype=torch.bfloat16)
    if not moe_experts.groups_usable(x, weight):
        pytest.skip("the library has no grouped product here")
    for gate, weights_MC in ((None, None), ("silu", None), (None, weights)):
        found = by_group(x, weight, experts, weights_MC, gate)
        plain = by_expert(x, experts, weights_MC, N, gate, lambda rows, expert: rows @ weight[expert].T)
        torch.testing.assert_close(found, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@torch.no_grad()
def test_on_cuda_a_captured_product_reads_what_each_replay_asks_for() -> None:
    """Which experts are read is known on the device alone: of many tokens, too, nothing waits for the host."""
    torch.manual_seed(0)
    E, C, N, K = 8, 2, 64, 128
    linear = random_linear(E, C, N, K, torch.bfloat16, "cuda")
    for M in (1, 24):
        x = torch.randn(M, C, K, device="cuda", dtype=torch.bfloat16)
        experts, weights = random_choice(M, E, C, "cuda")
        linear(x, experts, weights_MC=weights)  # compiled before it is captured
        moe_experts.moe_kernels.gemv(x, linear.weight.view(E, N, K), experts, weights, None)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = linear(x, experts, weights_MC=weights)
        for _ in range(3):
            others, _ = random_choice(M, E, C, "cuda")
            experts.copy_(others)
            graph.replay()
            exact = one_by_one(linear, x, experts, weights_MC=weights)
            torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=2e-2)
