"""Building the data source of an experiment."""

from __future__ import annotations

from nanochat_core.errors import PluginError
from nanochat_core.files import cache_dir
from nanochat_core.interfaces.data_source import DataContext, DataSource
from nanochat_core.plugins.choice import Choice


def build_source(choice: Choice) -> DataSource:
    """The data source."""
    source = choice.build(DataContext(cache_dir=cache_dir()))
    if not isinstance(source, DataSource):
        raise PluginError(f"the factory of data source {choice.plugin!r} must return a nanochat_core.DataSource")
    return source
