"""A mixture of experts in the place of a feed-forward: a router sends each token to a few of many, whose answers are
added up by its weights (Shazeer et al., arXiv:1701.06538; Mixtral, arXiv:2401.04088).
"""

from torch import Tensor, nn

from model.config import ModelConfig
from model.moe_experts import ExpertLinear, Router


class Experts(nn.Module):
    """The weights of down(act(gate(x)) * up(x)) of all experts of a layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, chosen, width = config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
        self.gate_up_proj = ExpertLinear(count, chosen, config.hidden_size, 2 * width)
        self.down_proj = ExpertLinear(count, chosen, width, config.hidden_size)


class MixtureOfExperts(nn.Module):
    """What `model.transformer.FeedForward` is, of which each token has several out of many."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.chosen, self.normalizes = config.num_experts_per_tok, config.norm_topk_prob
        self.hidden_act = config.hidden_act

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x_BTD is normalized already. Returns [B, T, D]."""
        scores_ME = self.router(x_BTD).flatten(0, 1)
        weights_MC, experts_MC = scores_ME.float().softmax(-1).topk(self.chosen)
        if self.normalizes:
            weights_MC = weights_MC / weights_MC.sum(-1, keepdim=True)
        inner_MCF = self.experts.gate_up_proj(x_BTD.flatten(0, 1).unsqueeze(1), experts_MC, gate=self.hidden_act)
        out: Tensor = self.experts.down_proj(inner_MCF, experts_MC, weights_MC=weights_MC)
        return out.view_as(x_BTD)
