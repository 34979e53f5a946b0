"""Peak memory of a training step: ours against the same step with the float32 logits of the whole micro-batch.

    python benchmarks/step_memory.py                 # CPU or CUDA, depth 4, T = 512, 8,192 tokens, both vocabularies
    python benchmarks/step_memory.py --depth 12 --seq-len 2048 --tokens 32768

Both train experiments/classic.toml at this shape with one micro-batch per step. "full logits" differs only in the loss:
logits [N, V] in float32 for every position, then torch's cross-entropy, differentiated by autograd. "logits MiB" is one
such tensor. Each runs two steps in its own process (in the second the optimizer has its state). On CUDA the peak is
that of the allocator, on a CPU the growth of resident memory since before the model was built.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

MIB = 2**20


def one(kind: str, options: argparse.Namespace) -> dict[str, object]:
    """Train two steps. Returns the peak in MiB, the loss of the second step, and the device."""
    import torch.nn.functional as F
    from torch import Tensor
    from training import EXPERIMENTS, Training

    from nanochat_core.hardware.casting import autocast
    from nanochat_core.hardware.machine import device_name, peak_memory_mib, pick_device

    device = pick_device(0)
    before = 0.0 if device.type == "cuda" else peak_memory_mib(device)
    overrides = [
        f"model.depth={options.depth}",
        f"tokenizer.vocab_size={options.vocab}",
        f"train.max_seq_len={options.seq_len}",
        f"train.total_batch_size={options.tokens}",
        f"train.device_batch_size={options.tokens // options.seq_len}",
        f"train.dtype={options.dtype}",
        "train.num_iterations=100",
        "train.compile=false",
    ]

    class FullLogits(Training):
        def forward_backward(self, ids: Tensor, targets: Tensor) -> Tensor:
            with autocast(self.device, self.dtype):
                hidden_ND = self.model.hidden(ids).flatten(0, 1)
                logits_NV = self.model.logits(hidden_ND)
            loss = F.cross_entropy(logits_NV, targets.flatten(), reduction="sum")
            loss.backward()
            return loss.detach()

    training = (Training if kind == "ours" else FullLogits)(EXPERIMENTS / "classic.toml", overrides, device)
    ids, targets = training.batch()
    loss = [training.step(ids, targets) for _ in range(2)][-1]
    return {"peak": peak_memory_mib(device) - before, "loss": loss, "device": device_name(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per step")
    parser.add_argument("--vocab", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--one", choices=["ours", "full"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    vocabularies = options.vocab
    if options.one:
        (options.vocab,) = vocabularies
        print(json.dumps(one(options.one, options)))
        return
    own = [f"--{k.replace('_', '-')}={getattr(options, k)}" for k in ("depth", "seq_len", "tokens", "dtype")]
    for index, vocab in enumerate(vocabularies):
        results = {}
        for kind in ("ours", "full"):
            command = [sys.executable, __file__, *own, f"--vocab={vocab}", "--one", kind]
            # Freed memory is returned to the system, so that the peak is that of memory in use.
            environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            results[kind] = json.loads(done.stdout.splitlines()[-1])
        if not index:
            print(f"{results['ours']['device']}; depth {options.depth}, T = {options.seq_len}, {options.tokens} tokens")
            print(
                f"{'vocabulary':>10} {'ours MiB':>9} {'full logits MiB':>16} {'ratio':>7} {'logits MiB':>11}"
                f" {'loss':>9} {'loss, full':>11}"
            )
        ours, full = results["ours"], results["full"]
        logits = options.tokens * vocab * 4 / MIB
        print(
            f"{vocab:>10,} {ours['peak']:>9,.0f} {full['peak']:>16,.0f} {ours['peak'] / full['peak']:>7.1%}"
            f" {logits:>11,.0f} {ours['loss']:>9.5f} {full['loss']:>11.5f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
