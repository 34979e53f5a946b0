"""The baseline of `train_speed.py`: the same model in plain eager float32 PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        n = norm(x)
        q, k, v = (w(n).view(B, T, self.heads, -1).transpose(1, 2) for w in self.qkv)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.relu(self.up(norm(x))).square())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


class PlainGPT(nn.Module):
    def __init__(self, depth: int, width: int, heads: int, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, vocab_size, bias=False)
        half = width // heads // 2
        angles = torch.outer(torch.arange(seq_len).float(), 10000 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        nn.init.zeros_(self.head.weight)
        for block in self.blocks:
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.down.weight)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = norm(self.embedding(ids))
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = 15 * torch.tanh(self.head(norm(x)) / 15)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


class PlainMuon(torch.optim.Optimizer):
    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["buffer"] = torch.zeros_like(p)
                g = p.grad
                state["buffer"].lerp_(g, 1 - group["momentum"])
                g = orthogonalize(g.lerp(state["buffer"], group["momentum"]))
                p.add_(g, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x.T if g.shape[0] > g.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        A = x @ x.T
        x = a * x + (b * A + c * A @ A) @ x
    return (x.T if g.shape[0] > g.shape[1] else x).to(g.dtype)


class PlainTrainer:
    """The plain model and its training step, with gradient accumulation and clipping.

    Args:
        depth, width, heads, vocab_size, seq_len: shape of the model.
        micro_batch: sequences per micro-batch.
        optimizer: "adamw" for ``torch.optim.AdamW`` by default, "fused" for its fused kernel, "muon" for AdamW on
            embedding and head and Muon on the rest.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        vocab_size: int,
        seq_len: int,
        micro_batch: int,
        optimizer: str = "adamw",
    ) -> None:
        self.model = model = PlainGPT(depth, width, heads, vocab_size, seq_len)
        self.micro_batch = micro_batch
        self.optimizers: list[torch.optim.Optimizer]
        if optimizer == "muon":
            factor = math.sqrt(768 / width)
            groups = [
                {"params": [model.embedding.weight], "lr": 0.2 * factor},
                {"params": [model.head.weight], "lr": 0.004 * factor},
            ]
            self.optimizers = [
                torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True),
                PlainMuon(list(model.blocks.parameters()), lr=0.02, momentum=0.95),
            ]
        else:
            fused = True if optimizer == "fused" else None
            self.optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=fused)]

    def step(self, ids: Tensor, targets: Tensor) -> float:
        total, micro_batches = 0.0, len(ids) // self.micro_batch
        for x, y in zip(ids.split(self.micro_batch), targets.split(self.micro_batch), strict=True):
            loss = self.model(x, y) / micro_batches
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return total
