"""nanochat's core. ``__init__.pyi`` lists the public names; each is imported when it is first used."""

import sys

import lazy_loader

if sys.platform == "win32":
    raise ImportError("nanochat runs on Linux and macOS; on Windows install and start it in WSL (wsl --install)")

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
