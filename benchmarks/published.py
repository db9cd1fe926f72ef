"""The step that a user of the research code runs: the published layout, transformers' own attention, mask and head.

Form E: a row of ids with places for the memory, embedded, the memory written over its places, a mask of what is not
padding (arXiv 2304.11062 and its code). Form D: `[memory | text | memory]` under a mask of ones. Either way the whole
model is called with all hidden states kept, pooler and head included, in every segment. What the published loop does
beside the step (rows put together in Python, logits of every segment kept) is left out, in this peer's favour.
"""

from __future__ import annotations

import torch
from torch import nn

from rmt_trt.benchmarks.lean import backbone_in
from rmt_trt.model.step import RMTModel

ATTENTION = "sdpa"  # what transformers takes by itself


class PublishedStep(nn.Module):
    """forward(memory (b, M, d), segment (b, S) int64, full) -> (new memory (b, M, d), logits), in the weights' dtype.

    logits  (b, c), or (b, S, v) of a language model
    """

    before: torch.Tensor
    after: torch.Tensor

    def __init__(self, model: RMTModel, dtype: str, device: torch.device | str = "cpu") -> None:
        super().__init__()
        config = model.config
        self.encoder, self.num_memory, self.first = config.form == "encoder", config.num_memory, len(config.prefix_ids)
        self.pad_id = config.pad_id
        self.backbone = backbone_in(model, dtype, device, ATTENTION)
        self.embed = self.backbone.get_input_embeddings()
        place = 1 if config.pad_id == 0 else 0  # any id but padding: memory is written over its embedding
        rows = {
            "before": (*config.prefix_ids, *[place] * config.num_memory, *config.middle_ids),
            "after": config.suffix_ids,
        }
        for name, ids in rows.items():
            self.register_buffer(name, torch.tensor(ids, dtype=torch.int64, device=device)[None], persistent=False)

    def forward(self, memory: torch.Tensor, segment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        m = self.num_memory
        if not self.encoder:
            embeddings = torch.cat([memory, self.embed(segment), memory], dim=1)
            mask = torch.ones(embeddings.shape[:2], dtype=torch.int64, device=segment.device)
            mask[:, m:-m] = (segment >= 0).long()
            out = self.backbone(inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True)
            return out.hidden_states[-1][:, -m:], out.logits[:, m:-m]
        batch = segment.shape[0]
        ids = torch.cat([self.before.expand(batch, -1), segment, self.after.expand(batch, -1)], dim=1)
        embeddings = self.embed(ids)
        embeddings[:, self.first : self.first + m] = memory
        mask = (ids != self.pad_id).long()
        out = self.backbone(inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True)
        return out.hidden_states[-1][:, self.first : self.first + m], out.logits
