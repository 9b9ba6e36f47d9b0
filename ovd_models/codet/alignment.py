"""Align a caption's concept with an image's proposals: by what its group shares (CoDet), or by simpler rules.

Every rule gives attention weights over an image's proposals; their weighted mean is trained with the concept's name.

G groups, g images of a group, Q = g query images, S = g supports, N proposals of an image, M = g * N proposals of a
group, D embedding width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Aggregation = Literal["maximum", "top_k", "attention", "learned"]
"""From similarities to one score per proposal; `learned` is `LearnedAggregation`, the others are rules of `align`."""
Guidance = Literal["support", "dimensions", "none"]
"""How a concept's name selects among the objects that a group shares: it is compared with the proposals like another
support image, or weights the dimensions of their similarity (`guidance_weights`, as in the paper), or is not used."""


@dataclass(frozen=True)
class Alignment:
    """How the proposals of each image relate to its group's concept."""

    attention: Tensor
    """[G, g, N] weights over an image's proposals; each row with a proposal sums to 1."""
    prototype: Tensor
    """[G, g, D] attention-weighted mean of the image's region features."""


def guidance_weights(text_GD: Tensor, centre_D: Tensor) -> Tensor:
    """[G, D] weights of embedding dimensions for each group's concept, averaging 1 (CoDet, text guidance).

    The absolute embedding after subtracting the mean over all concepts. Without that, a few large dimensions that all
    concepts share dominate, and guidance hardly depends on the concept.
    """
    magnitude_GD = (text_GD - centre_D).abs()
    return magnitude_GD * text_GD.shape[1] / magnitude_GD.sum(1, keepdim=True).clamp(min=1e-12)


def finite_regions(region_GgND: Tensor, valid_GgN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features, unit features (zero ones stay zero), and a mask of those that are finite and not padding.

    A feature that is not finite becomes zero.
    """
    region_GgND = region_GgND.float()
    norm_GgN1 = torch.linalg.vector_norm(region_GgND, dim=-1, keepdim=True)
    finite_GgN1 = torch.isfinite(norm_GgN1)
    region_GgND = torch.where(finite_GgN1, region_GgND, 0.0)
    norm_GgN1 = torch.linalg.vector_norm(region_GgND, dim=-1, keepdim=True)
    # A product: the backward pass of a quotient takes twice as long.
    return region_GgND, region_GgND * norm_GgN1.clamp(min=1e-12).reciprocal(), valid_GgN & finite_GgN1[..., 0]


# ------------------------------------------------------------------------------------- what the group shares


def align(
    region_GgND: Tensor,
    valid_GgN: Tensor,
    guidance_GD: Tensor,
    temperature: float,
    *,
    text_GD: Tensor | None = None,
    aggregation: Aggregation = "maximum",
    top_k: int = 3,
    gradient: bool = True,
) -> Alignment:
    """Find in every image the object that its group shares (CoDet, section 3.2; all queries at once).

    S[a, b] = sum_k w_k p_a[k] p_b[k] between unit features of a query's proposals a and a support's proposals b. For
    each a, S is reduced to one number per support, averaged over supports, and a softmax is taken over a. The result
    does not depend on the order of images or proposals, nor on padding. A name, if given, has the weight of all
    supports together.

    Args:
        region_GgND: [G, g, N, D] region features of any norm.
        valid_GgN: [G, g, N] bool, False where padded.
        guidance_GD: [G, D] weights of the dimensions.
        temperature: divides the similarity before the softmax.
        text_GD: [G, D] unit embeddings of the groups' concepts, whose similarity to a is added.
        aggregation: a support's number for a: its greatest similarity (`maximum`), the mean of its `top_k` greatest,
            or the mean of all, weighted by a softmax over b at the same temperature (`attention`).
        top_k: see `aggregation`.
        gradient: let the gradient flow to the regions through the attention too, and not only through their mean.
    """
    if not region_GgND.shape[2]:  # no image has a proposal
        return Alignment(region_GgND.new_zeros(valid_GgN.shape), region_GgND.sum(2))
    region_GgND, unit_GgND, valid_GgN = finite_regions(region_GgND, valid_GgN)
    unit_GgND = unit_GgND if gradient else unit_GgND.detach()
    guided_GgND = unit_GgND * guidance_GD[:, None, None, :]
    weight_GQS = support_weights(valid_GgN)
    if aggregation == "attention":
        shared_GQN = soft_matches(guided_GgND, unit_GgND, valid_GgN, weight_GQS, temperature)
    else:
        count = 1 if aggregation == "maximum" else min(top_k, unit_GgND.shape[2])
        shared_GQN = best_matches(guided_GgND, unit_GgND, valid_GgN, weight_GQS, count)
    if text_GD is not None:
        shared_GQN = shared_GQN + torch.einsum("gqad,gd->gqa", unit_GgND, text_GD)
    hidden = torch.finfo(shared_GQN.dtype).min
    attention_GgN = torch.softmax((shared_GQN / temperature).masked_fill(~valid_GgN, hidden), dim=-1) * valid_GgN
    return Alignment(attention_GgN, torch.einsum("gqa,gqad->gqd", attention_GgN, region_GgND))


def support_weights(valid_GgN: Tensor) -> Tensor:
    """[G, Q, S] weights of the mean over a query's supports: the other images that have a proposal."""
    itself_QS = torch.eye(valid_GgN.shape[1], dtype=torch.bool, device=valid_GgN.device)
    support_GQS = valid_GgN.any(-1)[:, None, :] & ~itself_QS
    return support_GQS / support_GQS.sum(-1, keepdim=True).clamp(min=1)


def best_matches(guided_GgND: Tensor, unit_GgND: Tensor, valid_GgN: Tensor, weight_GQS: Tensor, count: int) -> Tensor:
    """[G, Q, N] mean over supports of the mean of each one's `count` greatest similarities.

    Only the matches have a gradient, so they are searched for without one. The mean of the matched features, a bag of
    rows, is then compared once, and the backward pass needs no similarity matrix.
    """
    groups, size, proposals, width = unit_GgND.shape
    with torch.no_grad():
        similarity_GMM = torch.bmm(guided_GgND.flatten(1, 2), unit_GgND.flatten(1, 2).mT)
        similarity_GMSN = similarity_GMM.view(groups, size * proposals, size, proposals)
        hidden = torch.finfo(similarity_GMSN.dtype).min
        similarity_GMSN.masked_fill_(~valid_GgN[:, None], hidden)
        best = similarity_GMSN.max(-1, keepdim=True) if count == 1 else similarity_GMSN.topk(count, dim=-1)
        found_GMSk = best.values > hidden
        share_GMSk = found_GMSk / found_GMSk.sum(-1, keepdim=True).clamp(min=1)
        share_GMSk = share_GMSk * weight_GQS.repeat_interleave(proposals, dim=1)[..., None]
        first_GS = torch.arange(groups * size, device=unit_GgND.device).view(groups, size) * proposals
        row_GMSk = best.indices + first_GS[:, None, :, None]
    matched_RD = F.embedding_bag(
        row_GMSk.reshape(groups * size * proposals, -1),
        unit_GgND.reshape(-1, width),
        per_sample_weights=share_GMSk.reshape(groups * size * proposals, -1),
        mode="sum",
    )
    return (guided_GgND * matched_RD.view_as(guided_GgND)).sum(-1)


def soft_matches(
    guided_GgND: Tensor, unit_GgND: Tensor, valid_GgN: Tensor, weight_GQS: Tensor, temperature: float
) -> Tensor:
    """[G, Q, N] mean over supports of each one's similarities, weighted by their softmax."""
    similarity_GQNSN = torch.einsum("gqad,gsbd->gqasb", guided_GgND, unit_GgND)
    hidden = torch.finfo(similarity_GQNSN.dtype).min
    logits_GQNSN = (similarity_GQNSN / temperature).masked_fill(~valid_GgN[:, None, None], hidden)
    mean_GQNS = (torch.softmax(logits_GQNSN, dim=-1) * similarity_GQNSN).sum(-1)
    return torch.einsum("gqas,gqs->gqa", mean_GQNS, weight_GQS)


class LearnedAggregation(nn.Module):
    """The released aggregation: a two-layer MLP scores each row of the similarity matrix.

    Unlike `align`, it depends on the ranks of proposals and the order of supports, fits only one group size and one
    number N of proposals, and gives attention to padding. It reproduces the results of released weights. Images with
    fewer than N proposals are padded with zero features.
    """

    def __init__(self, group_size: int, num_proposals: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_proposals * (group_size - 1), num_proposals)
        self.score = nn.Linear(num_proposals, 1)
        nn.init.kaiming_uniform_(self.hidden.weight, a=1)
        nn.init.normal_(self.score.weight, std=1e-3)  # attention starts out even
        for layer in (self.hidden, self.score):
            nn.init.zeros_(layer.bias)

    def forward(self, region_GgND: Tensor, guidance_GD: Tensor) -> Alignment:
        """[G, g, N, D] region features, zero where padded, and [G, D] weights of the dimensions."""
        groups, size, count, _ = region_GgND.shape
        unit_GgND = F.normalize(region_GgND, dim=-1)
        similarity_GQNSN = torch.einsum("gqad,gsbd->gqasb", unit_GgND * guidance_GD[:, None, None, :], unit_GgND)
        pairs = [(query, other) for query in range(size) for other in range(size) if other != query]
        query_P, other_P = torch.tensor(pairs, device=region_GgND.device).T
        rows = similarity_GQNSN.transpose(2, 3)[:, query_P, other_P].view(groups, size, size - 1, count, count)
        score_GgN = self.score(F.relu(self.hidden(rows.transpose(2, 3).flatten(3)))).squeeze(-1)
        attention_GgN = torch.softmax(score_GgN, dim=-1)
        return Alignment(attention_GgN, torch.einsum("gqa,gqad->gqd", attention_GgN, region_GgND))


# -------------------------------------------------------------------------------------------------- baselines


def nearest_to_text(region_GgND: Tensor, valid_GgN: Tensor, text_GD: Tensor) -> Alignment:
    """Region-text alignment: all attention on the proposal most similar to the concept's name, as in `align`."""
    region_GgND, unit_GgND, valid_GgN = finite_regions(region_GgND, valid_GgN)
    return hard_attention(region_GgND, valid_GgN, torch.einsum("gqad,gd->gqa", unit_GgND, text_GD))


def largest_proposal(region_GgND: Tensor, valid_GgN: Tensor, area_GgN: Tensor) -> Alignment:
    """All attention on the largest proposal (Detic, arXiv 2201.02605, max-size loss); areas [G, g, N] in any unit."""
    region_GgND, _, valid_GgN = finite_regions(region_GgND, valid_GgN)
    return hard_attention(region_GgND, valid_GgN, area_GgN)


def hard_attention(region_GgND: Tensor, valid_GgN: Tensor, score_GgN: Tensor) -> Alignment:
    """All attention on the valid proposal with the highest score; none if no proposal is valid."""
    if not region_GgND.shape[2]:
        return Alignment(region_GgND.new_zeros(valid_GgN.shape), region_GgND.sum(2))
    best_Gg = score_GgN.masked_fill(~valid_GgN, -torch.inf).argmax(-1)
    attention_GgN = F.one_hot(best_Gg, region_GgND.shape[2]).to(region_GgND.dtype) * valid_GgN
    return Alignment(attention_GgN, torch.einsum("gqa,gqad->gqd", attention_GgN, region_GgND))
