"""The public names of nanochat's core: plugins import from here and from ``nanochat_core.testing``, nothing else.

``lazy_loader`` reads this file, and imports a name when it is first used.
"""

# isort: skip_file

__version__: str

# The six interfaces, and what factories get and return.
from .plugins.hookspecs import (
    HOOK_API as HOOK_API,
    hookimpl as hookimpl,
)
from .plugins.registry import (
    Registrar as Registrar,
)
from .interfaces.model import (
    Batch as Batch,
    Cache as Cache,
    DataContext as DataContext,
    DataSource as DataSource,
    Evaluation as Evaluation,
    Evaluator as Evaluator,
    EvaluatorContext as EvaluatorContext,
    IGNORED as IGNORED,
    Model as Model,
    ModelContext as ModelContext,
    Multipliers as Multipliers,
    Optimizer as Optimizer,
    OptimizerContext as OptimizerContext,
    Resolved as Resolved,
    Split as Split,
    Tokenizer as Tokenizer,
    TokenizerContext as TokenizerContext,
    Tokens as Tokens,
    base_role as base_role,
    default_roles as default_roles,
)
from .interfaces.logger import (
    Logger as Logger,
    LoggerContext as LoggerContext,
    metrics_and_texts as metrics_and_texts,
)
from .distributed.world import (
    World as World,
)

# Options of a config class.
from .plugins.options import (
    above as above,
    at_least as at_least,
    between as between,
    one_of as one_of,
    option as option,
)

# Exceptions that users meet.
from .errors import (
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    DataError as DataError,
    NanochatError as NanochatError,
    PluginError as PluginError,
    Problem as Problem,
)

# Text: documents and tokenizers.
from .data.documents import (
    Documents as Documents,
    Problems as Problems,
    hold_out as hold_out,
)
from .data.texts import (
    SPECIAL_TOKENS as SPECIAL_TOKENS,
    cut_long_runs as cut_long_runs,
    well_formed as well_formed,
)
from .data.table_tokenizer import (
    PerThread as PerThread,
    TableTokenizer as TableTokenizer,
    load_table_tokenizer as load_table_tokenizer,
    special_tokens_from as special_tokens_from,
)

# Evaluation: spans, scores and samples.
from .evaluation.spans import (
    Span as Span,
    choice_spans as choice_spans,
    cropped_span as cropped_span,
    token_spans as token_spans,
)
from .evaluation.scoring import (
    OutOfTime as OutOfTime,
    SpanScore as SpanScore,
    greedy_match as greedy_match,
    is_close_call as is_close_call,
    pick_choice as pick_choice,
    score_choices as score_choices,
    score_spans as score_spans,
)
from .evaluation.sampling import (
    generate as generate,
)
from .interfaces.loss import (
    cross_entropy as cross_entropy,
)

# Optimizers.
from .training.gradients import (
    GradientReducer as GradientReducer,
    TorchOptimizer as TorchOptimizer,
)

# Machines and files.
from .files import (
    cache_dir as cache_dir,
)
from .hardware.casting import (
    cast as cast,
)
from .hardware.devices import (
    cuda_capability as cuda_capability,
    device_type as device_type,
    has_fast_bfloat16 as has_fast_bfloat16,
)
