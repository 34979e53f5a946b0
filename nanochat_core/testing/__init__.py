"""Contract checks that plugin authors run on their own plugins, from any test runner.

    from nanochat_core.testing import check_tokenizer

    def test_contract():
        check_tokenizer(build, MyConfig(vocab_size=500))

A check raises ``AssertionError`` with a line for every rule that is broken.
"""

from nanochat_core.testing.data_source import check_data_source
from nanochat_core.testing.evaluator import check_evaluator
from nanochat_core.testing.logger import check_logger
from nanochat_core.testing.model import check_model
from nanochat_core.testing.optimizer import check_optimizer
from nanochat_core.testing.tokenizer import check_tokenizer, sample_documents

__all__ = [
    "check_data_source",
    "check_evaluator",
    "check_logger",
    "check_model",
    "check_optimizer",
    "check_tokenizer",
    "sample_documents",
]
