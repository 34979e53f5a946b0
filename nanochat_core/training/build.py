"""Building the parts of a run from an experiment's choices, and checking each plugin's side of the contract."""

from __future__ import annotations

from nanochat_core.data import packing
from nanochat_core.data.loader import TrainLoader
from nanochat_core.data.token_cache import open_cache
from nanochat_core.distributed.world import World
from nanochat_core.errors import DataError
from nanochat_core.files import cache_dir
from nanochat_core.interfaces.data_source import DataSource
from nanochat_core.interfaces.tokenizer import Tokenizer
from nanochat_core.planning.plan import Plan
from nanochat_core.plugins.choice import Choice, DataSourceKeys
from nanochat_core.runs.state import TrainState

MOST_TO_COUNT = 2**31  # bytes of text that are read only to count them


def allowed_epochs(keys: DataSourceKeys) -> int | None:
    """Passes over the training data that a run may make, None for any number."""
    if keys.epochs == "repeat":
        return None
    return 1 if keys.epochs == "error" else keys.epochs


def _check_epochs(keys: DataSourceKeys, plan: Plan, source: DataSource) -> None:
    """Refuse a run that is sure to use the data up: a token has at least one byte. The source knows its bytes only
    roughly, so where they seem too few, and aren't too many to look at, they are counted."""
    epochs, estimate = allowed_epochs(keys), source.describe().get("text_bytes")
    if epochs is None or not isinstance(estimate, int) or estimate > MOST_TO_COUNT:
        return
    documents = source.documents("train")
    needed = -(-plan.total_tokens // epochs) - len(documents)  # one token of each document is bos
    if estimate >= needed:
        return
    counted = 0
    for document in documents:
        counted += len(document.encode(errors="replace"))
        if counted >= needed:
            return
    raise DataError(
        f"the run needs {plan.total_tokens:,} tokens, more than there are in {counted:,} bytes of training text read "
        f'{epochs} times: give more data, train for fewer steps, or set data.epochs to "repeat" or a higher number',
        key="data.epochs",
    )


def build_loader(
    choice: Choice, source: DataSource, tokenizer: Tokenizer, plan: Plan, state: TrainState, world: World
) -> TrainLoader:
    """This rank's training steps from ``state`` on; pins the number of lanes in a fresh state.

    Raises:
        DataError: when the data can't be enough for the plan; see ``[data] epochs``.
    """
    keys, documents = choice.keys, source.documents("train")
    assert isinstance(keys, DataSourceKeys)
    world.on_main(lambda: _check_epochs(keys, plan, source))
    if not state.lanes:
        state.lanes = packing.lanes(plan.rows_per_step, len(documents), keys.packing, keys.packing_window)
    tokens: packing.TokenSource = packing.Encoder(documents, tokenizer)
    if keys.cache:
        tokens = open_cache(cache_dir(), tokens, source.fingerprint("train"), tokenizer)
    return TrainLoader(
        tokens,
        rows_per_step=plan.rows_per_step,
        lanes=state.lanes,
        max_seq_len=plan.max_seq_len,
        device_batch_size=plan.device_batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        cursors={lane: packing.Cursor(*cursor) for lane, cursor in state.cursors.items()} or None,
        packing=keys.packing,
        window=keys.packing_window,
        epochs=allowed_epochs(keys),
        threads=keys.threads,
    )
