"""The public names of nanochat's core: plugins import from here and from ``nanochat_core.testing``, nothing else.

``lazy_loader`` reads this file; a name is imported when it is first used. Type checkers read it too.
"""

# ruff: noqa: I001 (the groups are for readers)

__version__: str

# Registering: a plugin's module has functions marked with @hookimpl, which get a Registrar.
from .plugins.hookspecs import HOOK_API as HOOK_API
from .plugins.hookspecs import hookimpl as hookimpl
from .plugins.registry import Registrar as Registrar

# Options: the fields of a config class, and what their values must be.
from .plugins.options import option as option
from .plugins.options import above as above
from .plugins.options import at_least as at_least
from .plugins.options import between as between
from .plugins.options import one_of as one_of
from .plugins.options import regular_file as regular_file

# Exceptions that users see as a message without a traceback. Problem is one line of a ConfigError.
from .errors import NanochatError as NanochatError
from .errors import ConfigError as ConfigError
from .errors import Problem as Problem
from .errors import DataError as DataError
from .errors import CheckpointError as CheckpointError
from .errors import PluginError as PluginError
from .errors import mask_credentials as mask_credentials

# Types that several interfaces share.
from .interfaces.types import Tokens as Tokens
from .interfaces.types import Split as Split
from .interfaces.types import Batch as Batch
from .interfaces.types import Resolved as Resolved
from .distributed.world import World as World

# The six interfaces, each with the context that its factory gets and what goes with it.
# Tokenizer
from .interfaces.tokenizer import Tokenizer as Tokenizer
from .interfaces.tokenizer import TokenizerContext as TokenizerContext

# Data source
from .interfaces.data_source import DataSource as DataSource
from .interfaces.data_source import DataContext as DataContext

# Model
from .interfaces.model import Model as Model
from .interfaces.model import ModelContext as ModelContext
from .interfaces.model import Cache as Cache
from .interfaces.model import RowCache as RowCache
from .interfaces.types import IGNORED as IGNORED
from .interfaces.loss import loss_with_gradients as loss_with_gradients
from .interfaces.loss import without_ignored as without_ignored

# Optimizer
from .interfaces.optimizer import Optimizer as Optimizer
from .interfaces.optimizer import OptimizerContext as OptimizerContext
from .interfaces.optimizer import Multipliers as Multipliers
from .interfaces.model import base_role as base_role

# Evaluator
from .interfaces.evaluator import Evaluator as Evaluator
from .interfaces.evaluator import EvaluatorContext as EvaluatorContext
from .interfaces.evaluator import Evaluation as Evaluation

# Logger
from .interfaces.logger import Logger as Logger
from .interfaces.logger import LoggerContext as LoggerContext
from .interfaces.logger import RunLabels as RunLabels
from .interfaces.logger import metrics_and_texts as metrics_and_texts

# The rest is help that a plugin may use or leave.

# For data sources and tokenizers: documents, and tokenizers made of a table of byte strings.
from .data.documents import Documents as Documents
from .data.documents import UnreadablePlaces as UnreadablePlaces
from .data.documents import hold_out as hold_out
from .data.finding import find_files as find_files
from .data.finding import refuse_shared as refuse_shared
from .data.decompression import COMPRESSED as COMPRESSED
from .data.decompression import Damage as Damage
from .data.decompression import compression as compression
from .data.decompression import decompressed as decompressed
from .data.text_files import LONGEST_DOCUMENT as LONGEST_DOCUMENT
from .data.text_files import content_problem as content_problem
from .data.text_files import field_text as field_text
from .data.text_files import json_lines as json_lines
from .data.text_files import parse_json as parse_json
from .data.text_files import parse_text as parse_text
from .data.text_files import read_json_lines as read_json_lines
from .data.text_files import read_text as read_text
from .data.string_columns import LARGEST_GROUP as LARGEST_GROUP
from .data.string_columns import read_string_column as read_string_column
from .data.string_columns import string_column_problem as string_column_problem
from .data.texts import SPECIAL_TOKENS as SPECIAL_TOKENS
from .data.texts import cut_long_runs as cut_long_runs
from .data.texts import well_formed as well_formed
from .data.table_tokenizer import PerThread as PerThread
from .data.table_tokenizer import TableTokenizer as TableTokenizer
from .data.table_tokenizer import LARGEST_VOCABULARY as LARGEST_VOCABULARY
from .data.table_tokenizer import checked_bytes as checked_bytes
from .data.table_tokenizer import no_panics as no_panics
from .data.table_tokenizer import require_exact as require_exact
from .data.table_tokenizer import encode_by_pieces as encode_by_pieces
from .data.table_tokenizer import load_table_tokenizer as load_table_tokenizer
from .data.table_tokenizer import special_tokens_from as special_tokens_from

# For evaluators: spans of text and their scores; continuations of texts.
from .evaluation.spans import Span as Span
from .evaluation.spans import choice_spans as choice_spans
from .evaluation.spans import cropped_span as cropped_span
from .evaluation.scoring import score_spans as score_spans
from .evaluation.scoring import score_choices as score_choices
from .evaluation.scoring import pick_choice as pick_choice
from .evaluation.scoring import greedy_match as greedy_match
from .evaluation.scoring import is_close_call as is_close_call
from .generation.engine import Engine as Engine
from .generation.request import Request as Request
from .generation.request import Completion as Completion
from .generation.request import Event as Event
from .generation.generate import generate as generate

# For optimizers: any torch optimizer as one of ours, and the exchange of gradients between ranks.
from .training.gradients import TorchOptimizer as TorchOptimizer
from .training.gradients import GradientExchange as GradientExchange
from .training.gradients import GradientMessage as GradientMessage
from .training.gradients import GradientReducer as GradientReducer

# Machines and files.
from .files import cache_dir as cache_dir
from .files import expand_path as expand_path
from .files import directory_problem as directory_problem
from .files import file_sha256 as file_sha256
from .files import first_few as first_few
from .files import open_regular as open_regular
from .files import name_problem as name_problem
from .files import require_regular as require_regular
from .files import read_regular as read_regular
from .files import shorten as shorten
from .files import open_atomic as open_atomic
from .files import write_atomic as write_atomic
from .files import lock_file as lock_file
from .files import read_json as read_json
from .hardware.casting import cast as cast
from .hardware.casting import kept_at_rest as kept_at_rest
from .hardware.casting import wide_dtype as wide_dtype
from .hardware.devices import cuda_capability as cuda_capability
from .hardware.devices import device_type as device_type
from .hardware.devices import has_fast_bfloat16 as has_fast_bfloat16
