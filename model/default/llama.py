"""The Llama architecture in plain torch, for training: packed documents in, hidden states out; Hugging Face's names.

Shape suffixes: N tokens of a packed batch, R rows of a sampling batch, T positions, D width, H heads, K head width,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from model.default.batches import Batch

NORM_EPS = 1e-5
ROPE_THETA = 10_000.0


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama with tied embeddings and as many key heads as query heads."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    hidden: int
    context: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def attend(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, starts: Tensor, context: int) -> Tensor:
    """Causal attention inside each document of a packed batch; document i is starts[i]:starts[i + 1]."""
    if q_NHK.is_cuda and q_NHK.dtype != torch.float32:  # the kernel takes 16-bit types only
        out = varlen_attn(q_NHK, k_NHK, v_NHK, starts, starts, context, context, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out
    index = torch.arange(len(q_NHK), device=q_NHK.device)
    document = torch.bucketize(index, starts[1:], right=True)
    mask = (document[:, None] == document) & (index[:, None] >= index)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_NHK, k_NHK, v_NHK))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-rotation layout (Su et al. 2021, as in Hugging Face's Llama)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


class Block(nn.Module):
    """One layer: attention and a gated feed-forward, each normed before and added after."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        dim, hidden = shape.dim, shape.hidden
        self.heads, self.context, self.dropout = shape.heads, shape.context, dropout
        self.attention_norm = nn.Parameter(torch.ones(dim))
        self.qkv_proj = nn.Parameter(torch.empty(3 * dim, dim))
        self.o_proj = nn.Parameter(torch.empty(dim, dim))
        self.ffn_norm = nn.Parameter(torch.ones(dim))
        self.gate_up_proj = nn.Parameter(torch.empty(2 * hidden, dim))
        self.down_proj = nn.Parameter(torch.empty(dim, hidden))

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each [tokens, H, K]."""
        normed = F.rms_norm(x, x.shape[-1:], self.attention_norm, NORM_EPS)
        qkv = F.linear(normed, self.qkv_proj).view(len(x), 3, self.heads, -1)
        q, k, v = qkv.unbind(1)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def feed_forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, x.shape[-1:], self.ffn_norm, NORM_EPS)
        gate, up = F.linear(normed, self.gate_up_proj).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj)

    def forward(self, x_ND: Tensor, cos: Tensor, sin: Tensor, starts: Tensor) -> Tensor:
        q, k, v = self.qkv(x_ND, cos, sin)
        mixed = attend(q, k, v, starts, self.context).flatten(1)
        x_ND = x_ND + F.dropout(F.linear(mixed, self.o_proj), self.dropout, self.training)
        return x_ND + F.dropout(self.feed_forward(x_ND), self.dropout, self.training)


class Llama(nn.Module):
    """Embedding, blocks and final norm; the output weights are the embedding's."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.embedding = nn.Parameter(torch.empty(shape.vocab_size, shape.dim))
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.dim))
        frequency = ROPE_THETA ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angle = torch.arange(shape.context).float()[:, None] * frequency
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angle.sin().repeat(1, 2), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                std = 0.02 if name == "embedding" else weight.shape[1] ** -0.5
                nn.init.zeros_(weight) if name.endswith(("o_proj", "down_proj")) else nn.init.normal_(weight, std=std)

    def compile_blocks(self) -> None:
        """Compile one block and share it between the layers: seconds instead of a minute for the whole graph."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def forward(self, batch: Batch) -> Tensor:
        """Normed hidden states [N, D] of a packed batch."""
        x = F.dropout(F.embedding(batch.tokens, self.embedding), self.dropout, self.training)
        cos, sin = self.cos[batch.positions, None], self.sin[batch.positions, None]
        for block in self.blocks:
            x = block(x, cos, sin, batch.starts)
        return F.rms_norm(x, x.shape[-1:], self.norm, NORM_EPS)

    def new_cache(self, rows: int, length: int, dtype: torch.dtype) -> Tensor:
        """Keys and values for decode: [layers, 2, R, T, H, K]."""
        size = (self.shape.layers, 2, rows, length, self.shape.heads, self.shape.head_dim)
        return torch.zeros(size, dtype=dtype, device=self.embedding.device)

    def decode(self, tokens_R: Tensor, position: int, cache: Tensor) -> Tensor:
        """Logits [R, V] after one more token in each row, all rows being at the same position."""
        x = F.embedding(tokens_R, self.embedding)
        cos, sin = self.cos[position], self.sin[position]
        for block, (keys, values) in zip(self.blocks, cache, strict=True):
            assert isinstance(block, Block)
            q, keys[:, position], values[:, position] = block.qkv(x, cos, sin)
            k, v = (past[:, : position + 1].transpose(1, 2) for past in (keys, values))
            mixed = F.scaled_dot_product_attention(q[:, :, None].to(k.dtype), k, v)[:, :, 0].flatten(1)
            x = x + F.linear(mixed, block.o_proj)
            x = x + block.feed_forward(x)
        return F.linear(F.rms_norm(x, x.shape[-1:], self.norm, NORM_EPS), self.embedding)


@torch.no_grad()
def mean_probs(models: Sequence[Llama], batch: Batch, half: bool) -> Tensor:
    """Probabilities [N, V] of the next tokens, averaged over the models, float32; half: compute in bfloat16."""
    total = torch.zeros((), device=batch.tokens.device)
    for model in models:
        model.eval()
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=half):
            logits = F.linear(model(batch), model.embedding)
        total = total + torch.softmax(logits.float(), dim=-1)
        model.train()
    return total / len(models)


def to_hugging_face(model: Llama, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights under the names of Hugging Face's LlamaForCausalLM (tied: no lm_head)."""
    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        q, k, v = block.qkv_proj.chunk(3)
        gate, up = block.gate_up_proj.chunk(2)
        parts: dict[str, Tensor] = {
            "input_layernorm": block.attention_norm,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.o_proj,
            "post_attention_layernorm": block.ffn_norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.down_proj,
        }
        tensors |= {f"model.layers.{index}.{name}.weight": part for name, part in parts.items()}
    return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}


def from_hugging_face(tensors: dict[str, Tensor], shape: Shape) -> Llama:
    """The inverse of to_hugging_face, in float32; KeyError for a missing tensor."""
    model = Llama(shape)
    state = {"embedding": tensors["model.embed_tokens.weight"], "norm": tensors["model.norm.weight"]}
    for index in range(shape.layers):
        part = {key: tensors[f"model.layers.{index}.{key}.weight"] for key in LAYER_KEYS}
        state |= {
            f"blocks.{index}.attention_norm": part["input_layernorm"],
            f"blocks.{index}.qkv_proj": torch.cat([part[f"self_attn.{x}_proj"] for x in "qkv"]),
            f"blocks.{index}.o_proj": part["self_attn.o_proj"],
            f"blocks.{index}.ffn_norm": part["post_attention_layernorm"],
            f"blocks.{index}.gate_up_proj": torch.cat([part["mlp.gate_proj"], part["mlp.up_proj"]]),
            f"blocks.{index}.down_proj": part["mlp.down_proj"],
        }
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


LAYER_KEYS = (
    "input_layernorm",
    *(f"self_attn.{x}_proj" for x in "qkvo"),
    "post_attention_layernorm",
    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
)
