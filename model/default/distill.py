"""What teachers give a student: texts that they write, and the probabilities of the next token in every text."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.default.batches import IGNORED, Batch, Document, pack
from model.default.llama import Llama, mean_probs
from model.default.sample import SampleSettings, sample
from model.default.vocabulary import BOS, EOS, Vocabulary

STORY_LENGTH, CHAT_LENGTH = 480, 320
WRITING_MIN_P = 0.01  # keeps the far tail, mostly noise in a small model, out of the written texts


def write_texts(
    teachers: Sequence[Llama], vocabulary: Vocabulary, chat: bool, tokens: float, rows: int, seed: int
) -> list[Document]:
    """About so many tokens of new stories (or dialogues), each teacher writing in turn, rows texts at a time."""
    device = teachers[0].embedding.device
    generator = torch.Generator(device=device).manual_seed(seed)
    length = CHAT_LENGTH if chat else STORY_LENGTH
    banned = () if chat else (vocabulary.user, vocabulary.assistant)
    settings = SampleSettings(length=length, min_p=WRITING_MIN_P, banned=banned)
    prompt = [BOS, vocabulary.user] if chat else [BOS]
    after_end = vocabulary.user if chat else None
    documents: list[Document] = []
    written, turn = 0, 0
    while written < tokens:
        teacher = teachers[turn % len(teachers)]
        for ids in sample(teacher, [prompt] * rows, settings, EOS, generator, after_end):
            kept = ids[: length - ids[::-1].index(EOS)] if chat and EOS in ids else ids
            documents.append(Document(torch.tensor(kept), predicted=False))
            written += len(kept)
        turn += 1
    return documents


def label(
    teachers: Sequence[Llama], documents: list[Document], batch_tokens: int, top: int, rng: random.Random
) -> list[Batch]:
    """The documents, shuffled and packed, with the teachers' mean probabilities of the top tokens of each position."""
    shuffled = rng.sample(documents, len(documents))
    device = teachers[0].embedding.device
    batches = []
    for packed in pack(shuffled, batch_tokens, teachers[0].shape.context):
        batch = packed.to(device)
        best, ids = mean_probs(teachers, batch, half=device.type == "cuda").topk(top, dim=-1)
        batches.append(replace(batch, soft_ids=ids.to(torch.int16), soft_probs=best.half()))
    return batches


def hard_loss(hidden_ND: Tensor, embedding_VD: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of the real next tokens, in nats."""
    return F.cross_entropy(F.linear(hidden_ND, embedding_VD).float(), batch.targets, ignore_index=IGNORED)


def soft_loss(hidden_ND: Tensor, embedding_VD: Tensor, batch: Batch, hard_weight: float) -> Tensor:
    """Cross-entropy with the teachers' probabilities, all but the top tokens as one; plus the weighted hard_loss."""
    assert batch.soft_ids is not None
    assert batch.soft_probs is not None
    logits = F.linear(hidden_ND, embedding_VD).float()
    log_total = logits.logsumexp(-1)
    log_probs = logits.gather(-1, batch.soft_ids.long()) - log_total[:, None]
    wanted = batch.soft_probs.float()
    rest = (1 - log_probs.exp().sum(-1)).clamp(min=1e-6).log()
    wanted_rest = (1 - wanted.sum(-1)).clamp(min=0)
    soft = -(wanted * log_probs).sum(-1) - wanted_rest * rest
    real = batch.tokens.ne(0)  # padding is made of token 0
    predicted = batch.targets.ne(IGNORED)
    target = logits.gather(-1, batch.targets.clamp(min=0)[:, None])[:, 0]
    hard = (log_total - target) * predicted
    return (soft * real).sum() / real.sum() + hard_weight * hard.sum() / predicted.sum().clamp(min=1)
