"""The Transformer, the one architecture that every family is a configuration of. Knows nothing of files or requests.

Shapes in names: B batch, T tokens of each row, D hidden size, E heads side by side (N * H), F feed-forward size,
N heads, K key/value heads, H head size, V vocabulary.
"""

import torch
from torch import Tensor, nn

from model.attention import Rows, attend
from model.config import LayerConfig, ModelConfig
from model.kv_cache import KVCache, distinct_ropes
from model.layers import Embedding, Linear, RMSNorm
from model.moe import MixtureOfExperts
from model.rope import attention_factor, cos_sin


def norm_of(config: ModelConfig, dim: int) -> RMSNorm:
    return RMSNorm(dim, config.rms_norm_eps, config.norm_plus_one)


class Attention(nn.Module):
    """Grouped-query attention over the cache; q, k and v come out of one matrix."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv_proj = Linear(config.hidden_size, heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.o_bias)
        self.norms_whole = config.qk_norm_whole
        q_width, k_width = (self.num_heads, self.num_kv_heads) if config.qk_norm_whole else (1, 1)
        self.q_norm = norm_of(config, q_width * self.head_dim) if config.qk_norm else None
        self.k_norm = norm_of(config, k_width * self.head_dim) if config.qk_norm else None
        self.scale = config.attention_scale if config.attention_scale is not None else self.head_dim**-0.5
        self.softcap = config.attention_softcap
        self.window = config.sliding_window if layer.attention == "sliding" else None

    def forward(
        self,
        x_BTD: Tensor,
        norm: RMSNorm,
        rotation: tuple[Tensor, Tensor] | None,
        keys: Tensor,
        values: Tensor,
        rows: Rows,
    ) -> Tensor:
        """What the heads see, before `o_proj`: [B, T, N * H]."""
        B, T, _ = x_BTD.shape
        heads_BTNH = self.qkv_proj(x_BTD, norm=norm).view(B, T, -1, self.head_dim)
        q_BTNH, k_BTKH, v_BTKH = heads_BTNH.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            if self.norms_whole:
                q_BTNH = self.q_norm(q_BTNH.flatten(2)).view_as(q_BTNH)
                k_BTKH = self.k_norm(k_BTKH.flatten(2)).view_as(k_BTKH)
            else:
                q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, keys, values, rows, rotation, self.scale, self.window, self.softcap)
        return out_BTNH.reshape(B, T, -1)


class FeedForward(nn.Module):
    """The weights of down(act(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202); gate and up are one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the residual."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.attention_norm = norm_of(config, config.hidden_size)
        self.attention = Attention(config, layer)
        self.attention_post_norm = norm_of(config, config.hidden_size) if config.post_norms else None
        self.ffn_norm = norm_of(config, config.hidden_size)
        self.feed_forward = MixtureOfExperts(config) if layer.experts else FeedForward(config)
        self.ffn_post_norm = norm_of(config, config.hidden_size) if config.post_norms else None
        self.hidden_act = config.hidden_act
        self.residual_multiplier = config.residual_multiplier
        assert not config.post_norms or config.residual_multiplier == 1.0, "no family has both"
        assert not (layer.experts and (config.post_norms or config.residual_multiplier != 1.0)), "no family has that"

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        keys: Tensor,
        values: Tensor,
        rows: Rows,
    ) -> Tensor:
        heads_BTE: Tensor = self.attention(x_BTD, self.attention_norm, rotation, keys, values, rows)
        x_BTD = self._add(x_BTD, self.attention.o_proj, heads_BTE, self.attention_post_norm)
        if isinstance(self.feed_forward, MixtureOfExperts):
            update_BTD: Tensor = self.feed_forward(self.ffn_norm(x_BTD))
            return x_BTD + update_BTD
        gated_BTF = self.feed_forward.gate_up_proj(x_BTD, norm=self.ffn_norm, gate=self.hidden_act)
        return self._add(x_BTD, self.feed_forward.down_proj, gated_BTF, self.ffn_post_norm)

    def _add(self, x_BTD: Tensor, linear: Linear, inner: Tensor, post_norm: RMSNorm | None) -> Tensor:
        """x + linear(inner), the update scaled by Granite or normalized by Gemma on its way."""
        if post_norm is None:
            out: Tensor = linear(inner, residual=x_BTD, multiplier=self.residual_multiplier)
            return out
        update_BTD: Tensor = post_norm(linear(inner))
        return x_BTD + update_BTD


class Transformer(nn.Module):
    """Token ids in, logits out. Build it under `torch.device("meta")` and let the loader fill it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.norm = norm_of(config, config.hidden_size)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        ropes = distinct_ropes(config)
        self.num_ropes = len(ropes)
        self._rope_scales = [attention_factor(rope, config.max_position_embeddings) for rope in ropes]
        self._rope_of_layer = [None if layer.rope is None else ropes.index(layer.rope) for layer in config.layers]

    def forward(
        self,
        tokens_BT: Tensor,
        start_B: Tensor,
        cache: KVCache,
        slots_B: Tensor,
        context: int | Tensor,
        logits_at_B: Tensor | None = None,
    ) -> Tensor:
        """Reads tokens, writes their keys and values into the cache, and gives the logits of what may follow.

        tokens_BT: int64 token ids. start_B: int64, the position of each row's first token. slots_B: int64, the row of
        the cache that each row of the batch lives in, each a different one. context: max(start_B) + T, known to the
        host so that nothing waits for the device (a tensor on the CPU while the step is traced). logits_at_B: the index
        in T of the one position of each row whose logits are wanted. Returns float32 [B, V] with `logits_at_B`, else
        [B, T, V]. Rows may be padded on the right: what padding writes is past the row's end and is overwritten before
        it is ever attended to.
        """
        x_BTD = self.hidden(tokens_BT, start_B, cache, slots_B, context)
        if logits_at_B is None:
            return self.logits(x_BTD)
        if x_BTD.shape[1] > 1:
            x_BTD = x_BTD[torch.arange(x_BTD.shape[0], device=x_BTD.device), logits_at_B].unsqueeze(1)
        return self.logits(x_BTD).squeeze(1)

    def hidden(
        self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, slots_B: Tensor, context: int | Tensor
    ) -> Tensor:
        """What the layers make of the tokens, [B, T, D]: `forward` up to its logits, its arguments the same."""
        T = tokens_BT.shape[1]
        positions_BT = start_B[:, None]
        if T > 1:
            positions_BT = positions_BT + torch.arange(T, device=tokens_BT.device)
        rotations = [
            cos_sin(frequencies, positions_BT, scale)
            for frequencies, scale in zip(cache.frequencies, self._rope_scales, strict=True)
        ]
        x_BTD: Tensor = self.embed_tokens(tokens_BT)
        if self.config.embedding_multiplier != 1.0:
            # Rounded to the model's dtype first, as in training.
            x_BTD = x_BTD * torch.full((), self.config.embedding_multiplier, dtype=x_BTD.dtype, device=x_BTD.device)
        rows = Rows(start_B, slots_B, context)
        for i, layer in enumerate(self.layers):
            rope = self._rope_of_layer[i]
            rotation = None if rope is None else rotations[rope]
            x_BTD = layer(x_BTD, rotation, cache.keys[i], cache.values[i], rows)
        return x_BTD

    def logits(self, x_BTD: Tensor) -> Tensor:
        """float32 logits [B, T, V] of what `hidden` gives; of any of its rows, [N, D], too."""
        logits: Tensor = self.lm_head(x_BTD, norm=self.norm).float()
        if self.config.logits_divisor != 1.0:
            logits = logits / self.config.logits_divisor
        if self.config.logits_softcap is not None:
            logits = torch.tanh(logits / self.config.logits_softcap) * self.config.logits_softcap
        return logits
